//! Connections from a tenant's router to its pods. A pod's answers are hostile:
//! each is read up to a bound, within the time the caller gives.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use mesh_runtime::off_limits;
use pool_agent_api::spec::HttpAction;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::{TcpSocket, TcpStream};

use super::{Vantage, resolve, shown};

/// As a kubelet: what is read of an answer's body.
const MAX_BODY: usize = 10 << 10;
/// Redirects within the same host that are followed.
const REDIRECTS: usize = 10;

mod health {
    #![allow(unreachable_pub, clippy::all)]
    tonic::include_proto!("grpc.health.v1");
}

pub(super) async fn tcp(from: &Vantage, host: Option<&str>, port: u16) -> Result<TcpStream, String> {
    let ip = match host {
        None => from.pod,
        Some(host) => resolve::address(host, &from.of).await?,
    };
    let address = SocketAddr::new(ip, port);
    // What a name led to is the host's resolver's to know, not the tenant's.
    let told = host.map_or_else(|| ip.to_string(), str::to_owned);
    if let Some(refused) = from.refuses(address)? {
        tracing::debug!(host = told, %address, %refused, "a probe is not dialled");
        return Err(format!("dial tcp {told}: {refused}"));
    }
    let socket = from
        .netns
        .enter(|| match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })
        .map_err(|e| format!("making a socket: {e}"))?;
    socket
        .connect(address)
        .await
        .map_err(|e| format!("dial tcp {}: {e}", authority(&told, port)))
}

fn authority(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

impl Vantage {
    /// A tenant names the hosts of its probes, and the host they are dialled from is
    /// not the tenant's: the same addresses are off limits as for its pods. Of those of
    /// this host's range the router leads to the tenant's own alone.
    fn refuses(&self, to: SocketAddr) -> Result<Option<off_limits::Refused>, String> {
        let ip = to.ip();
        if ip == self.pod {
            return Ok(None);
        }
        let own = off_limits::host_addresses(&self.netns)
            .map_err(|e| format!("looking at the host's addresses: {e}"))?;
        let here = matches!(ip, IpAddr::V4(v4) if self.local_pods.contains(&v4));
        let elsewhere = self.off_limits.is_pods(ip) && !here;
        Ok(off_limits::refuse(&own, ip)
            .or_else(|| self.off_limits.refuse(to))
            .or(elsewhere.then_some(off_limits::Refused::OffLimits)))
    }
}

/// Satisfied by any status from 200 to 399.
pub(super) async fn http(from: &Vantage, action: &HttpAction, agent: &str) -> Result<(), String> {
    let mut path = if action.path.starts_with('/') {
        action.path.clone()
    } else {
        format!("/{}", action.path)
    };
    for _ in 0..=REDIRECTS {
        let (status, location) = get(from, action, &path, agent).await?;
        if status.is_redirection() {
            match location.and_then(|to| same_host(&to, from.pod, action)) {
                Some(next) => path = next,
                // To somebody else: a kubelet takes that for a success.
                None => return Ok(()),
            }
            continue;
        }
        return if (200..400).contains(&status.as_u16()) {
            Ok(())
        } else {
            Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
        };
    }
    Err(format!("stopped after {REDIRECTS} redirects"))
}

/// The path a redirect leads to if it stays with the same server.
fn same_host(location: &str, pod: IpAddr, action: &HttpAction) -> Option<String> {
    let uri: Uri = location.parse().ok()?;
    let host = action.host.clone().unwrap_or_else(|| pod.to_string());
    let stays = match uri.authority() {
        None => true,
        Some(authority) => {
            authority.host() == host
                && authority.port_u16().unwrap_or(if action.tls { 443 } else { 80 }) == action.port
                && uri.scheme_str() == Some(if action.tls { "https" } else { "http" })
        }
    };
    stays
        .then(|| uri.path_and_query().map(|p| p.as_str().to_owned()))
        .flatten()
        .filter(|p| p.starts_with('/'))
}

async fn get(
    from: &Vantage,
    action: &HttpAction,
    path: &str,
    agent: &str,
) -> Result<(StatusCode, Option<String>), String> {
    let stream = tcp(from, action.host.as_deref(), action.port).await?;
    let host = action.host.clone().unwrap_or_else(|| from.pod.to_string());
    let mut request = Request::get(path);
    let given = |name: &str| action.headers.iter().any(|h| h.name.eq_ignore_ascii_case(name));
    if !given("host") {
        request = request.header(header::HOST, format!("{host}:{}", action.port));
    }
    if !given("user-agent") {
        request = request.header(header::USER_AGENT, agent);
    }
    if !given("accept") {
        request = request.header(header::ACCEPT, "*/*");
    }
    request = request.header(header::CONNECTION, "close");
    for header in &action.headers {
        request = request.header(&header.name, &header.value);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("the request cannot be made: {e}"))?;
    if action.tls {
        let name = ServerName::try_from(host.clone()).map_err(|e| format!("host {host:?}: {e}"))?;
        let stream = tokio_rustls::TlsConnector::from(unverified())
            .connect(name, stream)
            .await
            .map_err(|e| format!("TLS: {e}"))?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    }
}

async fn exchange<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<(StatusCode, Option<String>), String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(64 << 10)
        .handshake(stream)
        .await
        .map_err(|e| e.to_string())?;
    // Both at once: the connection makes progress only while it is polled.
    let connection = tokio::spawn(connection);
    let _ends_with_us = tokio_util::task::AbortOnDropHandle::new(connection);
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let status = response.status();
    let location = response
        .headers()
        .get(header::LOCATION)
        .and_then(|l| l.to_str().ok())
        .map(str::to_owned);
    // Read so that the server sees its answer taken; a longer one is cut off.
    let _taken = Limited::new(response.into_body(), MAX_BODY)
        .collect()
        .await
        .is_ok();
    Ok((status, location))
}

/// As a kubelet probes: the certificate is not looked at.
fn unverified() -> Arc<ClientConfig> {
    #[derive(Debug)]
    struct Anybody(CryptoProvider);

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
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    let provider = aws_lc_rs::default_provider();
    let builder =
        ClientConfig::builder_with_provider(Arc::new(provider.clone())).with_safe_default_protocol_versions();
    // The provider's own versions always fit it.
    let builder = match builder {
        Ok(builder) => builder,
        Err(_) => ClientConfig::builder(),
    };
    Arc::new(
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_no_client_auth(),
    )
}

/// Satisfied by SERVING, as gRPC's health protocol has it.
pub(super) async fn grpc(from: &Vantage, port: u16, service: &str) -> Result<(), String> {
    use health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
    let stream = tcp(from, None, port).await?;
    let mut stream = Some(TokioIo::new(stream));
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}:{port}", from.pod))
        .and_then(|e| e.user_agent("kube-probe/1.37"))
        .map_err(|e| e.to_string())?
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream.take().ok_or(std::io::ErrorKind::NotConnected.into());
            async move { stream as std::io::Result<_> }
        }))
        .await
        .map_err(|e| format!("gRPC: {e}"))?;
    let answer = HealthClient::new(channel)
        .max_decoding_message_size(MAX_BODY)
        .check(HealthCheckRequest {
            service: service.to_owned(),
        })
        .await
        .map_err(|status| shown(format!("gRPC: {}: {}", status.code(), status.message()).as_bytes()))?
        .into_inner();
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        other => Err(format!(
            "service unhealthy (responded with {:?})",
            other.as_str_name()
        )),
    }
}
