//! Peers that mean no good, at port 15008.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    control::Authority,
    lab::{Lab, NAMESPACE, Pod, TRUST_DOMAIN, until, within},
};

/// Takes any server: it is ourselves who are not to be trusted.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
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
        mesh_runtime::identity::crypto::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn config(
    credentials: Option<(String, String)>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(mesh_runtime::identity::crypto::provider())
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                CertificateDer::pem_slice_iter(certificate.as_bytes())
                    .map(Result::unwrap)
                    .collect(),
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

async fn tls(lab: &Lab, to: &Pod, config: Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = lab.wire.connect(to.at(15008)).await?;
    let name = ServerName::try_from("x").unwrap();
    within(
        "a handshake or its end",
        TlsConnector::from(config).connect(name, tcp),
    )
    .await
}

/// Whether the far end ends the connection when it was sent `bytes`.
async fn is_ended(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, bytes: &[u8]) -> bool {
    if stream.write_all(bytes).await.is_err() || stream.flush().await.is_err() {
        return true;
    }
    within("the end", async {
        let mut buffer = [0; 4096];
        // What it says before does not matter.
        while let Ok(1..) = stream.read(&mut buffer).await {}
    })
    .await;
    true
}

fn identity(account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{account}")
}

/// The pod still serves its friends.
async fn serves(client: &Pod, web: &Pod) {
    let listener = web.listen(8080);
    let mut stream = within("connect", client.connect(web.at(8080))).await.unwrap();
    let (mut server, _) = within("accept", listener.accept()).await.unwrap();
    server.write_all(b"ok").await.unwrap();
    let mut got = [0; 2];
    within("read", stream.read_exact(&mut got)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_prove_an_identity_of_the_mesh_gets_no_tunnel() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    let stranger = Authority::new();
    let mesh = lab.control.mesh();
    let tls13 = [&rustls::version::TLS13];
    let good = identity("client");
    let other_domain = format!("spiffe://other/ns/{NAMESPACE}/sa/client");
    for (who, config) in [
        ("nobody", config(None, &tls13)),
        ("a stranger", config(Some(stranger.issue(&[&good])), &tls13)),
        (
            "of another trust domain",
            config(Some(mesh.issue(&[&other_domain])), &tls13),
        ),
        (
            "of two identities",
            config(Some(mesh.issue(&[&good, &identity("web")])), &tls13),
        ),
        ("of no identity", config(Some(mesh.issue(&[])), &tls13)),
        (
            "no workload",
            config(Some(mesh.issue(&["spiffe://cluster.local/host/a"])), &tls13),
        ),
        (
            "of yesterday's TLS",
            config(Some(mesh.issue(&[&good])), &[&rustls::version::TLS12]),
        ),
    ] {
        // TLS 1.3's client is done before the server has looked at its
        // certificate: the end comes with the first read.
        let ended = match tls(&lab, &web, config).await {
            Err(_) => true,
            Ok(stream) => is_ended(stream, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await,
        };
        assert!(ended, "{who}");
    }
    until("each is counted", async || {
        let refused = lab
            .metrics(1)
            .lines()
            .find(|l| l.starts_with("mesh_connections_refused_total{reason=\"tls\"}"))
            .and_then(|l| l.rsplit(' ').next()?.parse::<u32>().ok());
        refused == Some(7)
    })
    .await;
    serves(&client, &web).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_takes_no_more_streams_once_its_peers_certificate_is_over() {
    let lab = Lab::new().await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    let tls13 = [&rustls::version::TLS13];
    let mut ended = vec![];
    for life in [5, 3600] {
        let own = lab
            .control
            .mesh()
            .issue_for(&[&identity("client")], Duration::from_secs(life));
        let stream = tls(&lab, &web, config(Some(own), &tls13)).await.unwrap();
        let (sender, connection) = h2::client::handshake(stream).await.unwrap();
        // It keeps the tunnel, and never hangs up.
        ended.push((tokio::spawn(connection), sender));
    }
    let (long, _long_sender) = ended.pop().unwrap();
    let (short, _short_sender) = ended.pop().unwrap();
    // However it ends.
    let _how = within("the end of a tunnel whose certificate is over", short)
        .await
        .unwrap();
    assert!(!long.is_finished(), "a tunnel with a good certificate goes on");
    long.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_silence_are_ended_and_disturb_nobody() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    let credentials = || Some(lab.control.mesh().issue(&[&identity("client")]));
    let tls13 = [&rustls::version::TLS13];
    let raw = async || lab.wire.connect(web.at(15008)).await.unwrap();

    // A TLS hello that stops in the middle, one that drips, and mere silence.
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let mut slow = Vec::new();
    // More than have room: who comes too many is hung up on at once.
    for _ in 0..600 {
        let mut stream = raw().await;
        let _hung_up = stream.write_all(hello).await;
        slow.push(stream);
    }
    let mut dripping = raw().await;
    let silent = raw().await;
    let drip = tokio::spawn(async move {
        for byte in hello.iter().cycle() {
            tokio::time::sleep(Duration::from_millis(300)).await;
            if dripping.write_all(&[*byte]).await.is_err() {
                return;
            }
        }
    });
    // Meanwhile everybody else is served.
    serves(&client, &web).await;

    for (what, bytes) in [
        ("no TLS", &b"GET / HTTP/1.1\r\n\r\n"[..]),
        ("a broken record", b"\x16\x03\x01\xff\xff\xff\xff"),
        ("zeros", &[0; 4096]),
    ] {
        assert!(is_ended(raw().await, bytes).await, "{what}");
    }
    let mut settings_flood = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    settings_flood.extend(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00");
    // A DATA frame on a stream that was never opened.
    let mut no_stream = settings_flood.clone();
    no_stream.extend(b"\x00\x00\x04\x00\x00\x00\x00\x00\x07abcd");
    // A frame larger than we said we take.
    let mut huge = settings_flood.clone();
    huge.extend(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01");
    for (what, bytes) in [
        ("HTTP/1.1", &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..]),
        ("noise", &[0xa5; 4096]),
        ("data for no stream", &no_stream),
        ("a frame that is too large", &huge),
    ] {
        let stream = tls(&lab, &web, config(credentials(), &tls13)).await.unwrap();
        assert!(is_ended(stream, bytes).await, "{what}");
    }
    // A tunnel that never says a word of HTTP/2 is ended too.
    let mute = tls(&lab, &web, config(credentials(), &tls13)).await.unwrap();
    assert!(is_ended(mute, b"").await);
    for mut stream in slow.into_iter().chain([silent]) {
        let mut buffer = [0; 64];
        within("the end", async {
            while let Ok(1..) = stream.read(&mut buffer).await {}
        })
        .await;
    }
    within("the drip is ended", drip).await.unwrap();
    serves(&client, &web).await;
}

async fn asked(lab: &Lab, to: &Pod, request: Request<()>) -> Result<StatusCode, h2::Error> {
    let credentials = lab.control.mesh().issue(&[&identity("client")]);
    let stream = tls(lab, to, config(Some(credentials), &[&rustls::version::TLS13]))
        .await
        .unwrap();
    let (send, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(async move {
        let _ended = connection.await;
    });
    let mut send: h2::client::SendRequest<Bytes> = send.ready().await?;
    let (response, _body) = send.send_request(request, false)?;
    within("an answer", response)
        .await
        .map(|response| response.status())
}

fn connect(authority: &str) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(authority.parse().unwrap());
    *request.uri_mut() = Uri::from_parts(uri).unwrap();
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_takes_only_requests_for_its_own_pod() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    let other = lab.pod(1, "other").await;
    lab.control.settled().await;
    let _listener = web.listen(8080);
    let _others = other.listen(8080);
    let _local = lab.hosts[1]
        .router
        .listen(SocketAddr::from(([127, 0, 0, 1], 8080)));
    let at = |pod: &Pod, port: u16| pod.at(port).to_string();
    for (what, request, status) in [
        ("the pod", connect(&at(&web, 8080)), StatusCode::OK),
        ("another pod", connect(&at(&other, 8080)), StatusCode::BAD_REQUEST),
        ("the host", connect("127.0.0.1:8080"), StatusCode::BAD_REQUEST),
        ("a name", connect("web.shop:80"), StatusCode::BAD_REQUEST),
        ("a mesh port", connect(&at(&web, 15008)), StatusCode::BAD_REQUEST),
        (
            "a port on which nobody listens",
            connect(&at(&web, 9999)),
            StatusCode::SERVICE_UNAVAILABLE,
        ),
        (
            "a page",
            Request::get(format!("https://{}/", at(&web, 8080)))
                .body(())
                .unwrap(),
            StatusCode::BAD_REQUEST,
        ),
    ] {
        assert_eq!(asked(&lab, &web, request).await.unwrap(), status, "{what}");
    }
    let mut traced = connect(&at(&web, 8080));
    traced
        .headers_mut()
        .insert("traceparent", "0".repeat(55).parse().unwrap());
    traced.headers_mut().insert("baggage", "=,=;;,".parse().unwrap());
    traced
        .headers_mut()
        .insert("forwarded", "for=\"".parse().unwrap());
    assert_eq!(asked(&lab, &web, traced).await.unwrap(), StatusCode::OK);
    drop(client);
}

/// A frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_in_a_tunnel_are_bounded() {
    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const REFUSED_STREAM: u32 = 7;
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    let credentials = lab.control.mesh().issue(&[&identity("client")]);
    let mut stream = tls(&lab, &web, config(Some(credentials), &[&rustls::version::TLS13]))
        .await
        .unwrap();
    {
        let listener = web.listen(8080);
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok(accepted) = listener.accept().await {
                kept.push(accepted);
            }
        });
    }
    // CONNECT to the pod, as literals (RFC 7541, 6.2.2), by a client that counts
    // nobody's streams.
    let authority = web.at(8080).to_string();
    let mut ask = b"\x02\x07CONNECT\x01".to_vec();
    ask.push(authority.len() as u8);
    ask.extend(authority.as_bytes());
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    let mut taken = 0;
    let mut refused = 0;
    for n in 0..220_u32 {
        let id = 2 * n + 1;
        stream.write_all(&frame(HEADERS, 0x4, id, &ask)).await.unwrap();
        stream.flush().await.unwrap();
        // Until it is answered in one way or the other.
        loop {
            let mut head = [0; 9];
            within("a frame", stream.read_exact(&mut head)).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            within("the rest of it", stream.read_exact(&mut payload))
                .await
                .unwrap();
            let of = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match head[3] {
                HEADERS if of == id => taken += 1,
                RESET if of == id => {
                    assert_eq!(payload, REFUSED_STREAM.to_be_bytes());
                    refused += 1;
                }
                _ => continue,
            }
            break;
        }
    }
    assert_eq!((taken, refused), (200, 20));
    until("those that were taken are delivered", async || lab.live(1) == 200).await;
    drop(stream);
    until("they end with the tunnel", async || lab.live(1) == 0).await;
    drop(client);
}
