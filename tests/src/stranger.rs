//! Somebody at the doors of the system: with no credentials, stolen ones, or
//! those of a member that means no good.
//!
//! It dials from inside a network namespace of the lab, and shows whatever the
//! other side answers: certificates of servers are not checked here, what is
//! under test is what *they* check.

use std::{
    future::poll_fn,
    net::{SocketAddr, TcpStream as StdTcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use mesh_api::{
    Identity,
    istio::certificate::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
};
use mesh_runtime::identity::crypto::provider;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use spindrift_local::{Lab, netns::Namespace, pki::Credential};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

/// How long a door may take to answer. A refusal by silence has its own limits,
/// which the tests wait for.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a client shows of itself.
#[derive(Debug)]
pub struct Credentials {
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        let own = self
            .own
            .as_ref()
            .map(|(chain, key)| (chain.clone(), key.clone_key()));
        Self { own }
    }
}

impl Credentials {
    pub fn none() -> Self {
        Self { own: None }
    }

    pub fn load(files: &Credential) -> anyhow::Result<Self> {
        let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
        Self::parse(&read(&files.certificate)?, &read(&files.key)?)
    }

    pub fn parse(certificate: &[u8], key: &[u8]) -> anyhow::Result<Self> {
        let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>()?;
        Ok(Self {
            own: Some((chain, PrivateKeyDer::from_pem_slice(key)?)),
        })
    }

    fn tls(&self, protocol: &[u8]) -> anyhow::Result<ClientConfig> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody));
        let mut config = match self.clone().own {
            Some((chain, key)) => config.with_client_auth_cert(chain, key)?,
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        config.enable_sni = false;
        Ok(config)
    }
}

/// A connection made inside the namespace. The socket stays there.
pub async fn dial(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<TcpStream> {
    let namespace = namespace.clone();
    let connecting = tokio::task::spawn_blocking(move || {
        namespace.enter(|| StdTcpStream::connect_timeout(&address, PATIENCE))
    });
    let stream = connecting
        .await?
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(TcpStream::from_std(stream)?)
}

/// A connection with TLS on it.
pub async fn dial_tls(
    namespace: &Namespace,
    address: SocketAddr,
    credentials: &Credentials,
    protocol: &[u8],
) -> anyhow::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(Arc::new(credentials.tls(protocol)?));
    let stream = dial(namespace, address).await?;
    let name = ServerName::from(address.ip());
    Ok(timeout(PATIENCE, connector.connect(name, stream))
        .await
        .context("no TLS handshake")??)
}

/// One HTTPS endpoint.
pub struct Https {
    namespace: Namespace,
    address: SocketAddr,
    credentials: Credentials,
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: String,
}

impl Https {
    pub fn new(namespace: Namespace, address: SocketAddr, credentials: Credentials) -> Self {
        Self {
            namespace,
            address,
            credentials,
        }
    }

    pub async fn get(&self, path: &str, token: Option<&str>) -> anyhow::Result<Answer> {
        let mut request = Request::get(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        self.send(request.body(Empty::new())?).await
    }

    /// Asks to open a WebSocket.
    pub async fn upgrade(&self, path: &str, token: &str, protocol: &str) -> anyhow::Result<Answer> {
        let request = Request::get(path)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ==")
            .header(header::SEC_WEBSOCKET_PROTOCOL, protocol)
            .body(Empty::new())?;
        self.send(request).await
    }

    async fn send(&self, mut request: Request<Empty<Bytes>>) -> anyhow::Result<Answer> {
        let host = self.address.to_string().parse()?;
        request.headers_mut().insert(header::HOST, host);
        let stream = dial_tls(&self.namespace, self.address, &self.credentials, b"http/1.1").await?;
        ask(stream, request).await
    }
}

/// One plain HTTP request, as Prometheus would make it.
pub async fn get_plain(namespace: &Namespace, address: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    let stream = dial(namespace, address).await?;
    let request = Request::get(path)
        .header(header::HOST, address.to_string())
        .body(Empty::new())?;
    ask(stream, request).await
}

/// One request on a connection.
async fn ask<S>(stream: S, request: Request<Empty<Bytes>>) -> anyhow::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let asking = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let answer: Response<_> = sender.send_request(request).await?;
        let status = answer.status();
        // A switched protocol has no end.
        let body = if status == StatusCode::SWITCHING_PROTOCOLS {
            Bytes::new()
        } else {
            answer.into_body().collect().await?.to_bytes()
        };
        anyhow::Ok(Answer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    };
    timeout(PATIENCE, asking).await.context("no answer")?
}

/// A gRPC channel from inside the namespace.
pub async fn grpc(
    namespace: &Namespace,
    address: SocketAddr,
    credentials: &Credentials,
) -> anyhow::Result<Channel> {
    let (namespace, credentials) = (namespace.clone(), credentials.clone());
    let connector = tower::service_fn(move |_: Uri| {
        let (namespace, credentials) = (namespace.clone(), credentials.clone());
        async move {
            let stream = dial_tls(&namespace, address, &credentials, b"h2").await;
            stream
                .map(TokioIo::new)
                .map_err(|error| std::io::Error::other(format!("{error:#}")))
        }
    });
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.timeout(PATIENCE);
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// Asks the certificate broker for an identity, as the host whose credentials
/// these are, and gives what a pod of that identity would be known by.
pub async fn certificate(
    lab: &Lab,
    broker: SocketAddr,
    host: &Credentials,
    identity: &Identity,
) -> anyhow::Result<Result<Credentials, tonic::Status>> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().as_str().try_into()?)];
    let csr = params.serialize_request(&key)?.pem()?;
    let named = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(identity.to_string())),
    };
    let request = IstioCertificateRequest {
        csr,
        validity_duration: 3600,
        metadata: Some(prost_types::Struct {
            fields: [("ImpersonatedIdentity".to_owned(), named)].into(),
        }),
    };
    let channel = grpc(&lab.topology().lab, broker, host).await?;
    let answer = IstioCertificateServiceClient::new(channel)
        .create_certificate(request)
        .await;
    let mut chain = match answer {
        Ok(answer) => answer.into_inner().cert_chain,
        Err(refusal) => return Ok(Err(refusal)),
    };
    // The last element is the roots.
    chain.pop();
    ensure!(!chain.is_empty(), "the answer has no certificate");
    Ok(Ok(Credentials::parse(
        chain.concat().as_bytes(),
        key.serialize_pem().as_bytes(),
    )?))
}

/// Asks a waypoint to heaven: an HTTP/2 CONNECT on an HBONE connection. The
/// status, or what became of the connection.
pub async fn connect(stream: TlsStream<TcpStream>, authority: &str) -> anyhow::Result<StatusCode> {
    let asking = async {
        let (client, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await?;
        let request = Request::connect(authority)
            .version(http::Version::HTTP_2)
            .body(())?;
        let (answer, _body) = client.send_request(request, false)?;
        let status = answer.await?.status();
        driver.abort();
        anyhow::Ok(status)
    };
    timeout(PATIENCE, asking).await.context("no answer to CONNECT")?
}

/// Sends bytes over a CONNECT that was granted, and reads what comes back until
/// there are as many as wanted.
pub async fn converse(
    stream: TlsStream<TcpStream>,
    authority: &str,
    text: &str,
    wanted: usize,
) -> anyhow::Result<(StatusCode, Vec<u8>)> {
    let talking = async {
        let (client, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await?;
        let request = Request::connect(authority)
            .version(http::Version::HTTP_2)
            .body(())?;
        let (answer, mut sending) = client.send_request(request, false)?;
        let answer = answer.await?;
        let status = answer.status();
        let mut heard = Vec::new();
        if status == StatusCode::OK {
            sending.reserve_capacity(text.len());
            poll_fn(|context| sending.poll_capacity(context))
                .await
                .transpose()?;
            sending.send_data(Bytes::copy_from_slice(text.as_bytes()), false)?;
            let mut body = answer.into_body();
            while heard.len() < wanted
                && let Some(chunk) = body.data().await
            {
                let chunk = chunk?;
                body.flow_control().release_capacity(chunk.len())?;
                heard.extend_from_slice(&chunk);
            }
        }
        driver.abort();
        anyhow::Ok((status, heard))
    };
    timeout(PATIENCE, talking)
        .await
        .context("no answer over the tunnel")?
}

/// Takes every server for whom it says it is.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
