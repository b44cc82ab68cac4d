use std::{net::SocketAddr, path::Path};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt;

use super::*;
use crate::config::TlsFiles;

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// PEM of a certificate with these URI names, and of its key.
    fn issue(&self, uris: &[&str]) -> (String, String) {
        self.issue_for(uris, Duration::from_secs(3600))
    }

    fn issue_for(&self, uris: &[&str], life: Duration) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.not_after = (SystemTime::now() + life).into();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

struct Server {
    address: SocketAddr,
    accepted: ReceiverStream<io::Result<Connection>>,
}

/// The host's files in a directory, as an operator puts them there.
fn write(directory: &Path, ca: &Ca, certificate: &str, key: &str) -> TlsFiles {
    let write = |name: &str, content: &str| {
        let path = directory.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    TlsFiles {
        certificate: write("certificate", certificate),
        key: write("key", key),
        ca: write("ca", &ca.pem),
        trust_domain: "pool".into(),
    }
}

async fn serve(ca: &Ca) -> Server {
    serve_within(ca, crate::policy::bounds::Bounds::default().callers()).await
}

async fn serve_within(ca: &Ca, callers: Callers) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = ca.issue(&["spiffe://pool/host/host-a"]);
    let files = write(directory.path(), ca, &certificate, &key);
    let credentials = Credentials::load(&files).unwrap();
    let accepted = accept(
        listener,
        "pool".into(),
        follow(files, credentials),
        Doorway::new(callers, &Bounds::default()),
    );
    Server { address, accepted }
}

/// Whether a caller that shakes hands is kept.
async fn call(server: SocketAddr, trusts: &Ca, own: Option<(String, String)>) -> bool {
    let Ok(mut stream) = connect(server, &trusts.pem, own).await else {
        return false;
    };
    // In TLS 1.3 a client learns only later that it was refused.
    let read = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0; 1])).await;
    read.is_err()
}

async fn connect(
    server: SocketAddr,
    trusts: &str,
    own: Option<(String, String)>,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(trusts.as_bytes()).unwrap();
    roots.add(root).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .unwrap();
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NoNames(verifier)));
    let config = match own {
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let stream = TcpStream::connect(server).await.unwrap();
    let name = ServerName::try_from("host").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// The host's name is a URI; who it is, is not what is tested here.
#[derive(Debug)]
struct NoNames(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for NoNames {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self
            .0
            .verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[tokio::test]
async fn only_a_virtual_node_of_this_pool_is_served() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let mut server = serve(&ours).await;
    let node = "spiffe://pool/tenant/demo/virtual-node";
    for (who, own) in [
        ("nobody", None),
        ("a stranger's certificate", Some(theirs.issue(&[node]))),
        ("a host", Some(ours.issue(&["spiffe://pool/host/host-b"]))),
        ("a workload", Some(ours.issue(&["spiffe://pool/ns/a/sa/b"]))),
        (
            "another pool",
            Some(ours.issue(&["spiffe://other/tenant/demo/virtual-node"])),
        ),
        (
            "two names",
            Some(ours.issue(&[node, "spiffe://pool/host/host-b"])),
        ),
        ("no name", Some(ours.issue(&[]))),
    ] {
        assert!(!call(server.address, &ours, own).await, "{who} was served");
    }
    assert!(call(server.address, &ours, Some(ours.issue(&[node]))).await);
    let connection = server.accepted.next().await.unwrap().unwrap();
    assert_eq!(connection.connect_info().0.as_str(), "demo");
}

#[tokio::test]
async fn garbage_in_place_of_a_hello_stops_nobody_else() {
    let ca = Ca::new();
    let mut server = serve(&ca).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 0x03, 0x01], &[0; 64]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
    }
    let _silent = TcpStream::connect(server.address).await.unwrap();
    let own = ca.issue(&["spiffe://pool/tenant/demo/virtual-node"]);
    assert!(call(server.address, &ca, Some(own)).await);
    assert!(server.accepted.next().await.unwrap().is_ok());
}

/// From one of the loopback's many addresses.
async fn come_from(last: u8, to: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 1, last], 0))).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test]
async fn strangers_who_say_nothing_keep_no_caller_out() {
    let ca = Ca::new();
    let mut server = serve(&ca).await;
    let own = || Some(ca.issue(&["spiffe://pool/tenant/demo/virtual-node"]));
    let mut silent = vec![];
    // Twice as many as have room, of more addresses than it takes to fill it.
    for n in 0..512_u32 {
        let last = u8::try_from(1 + n % 64).unwrap();
        silent.push(come_from(last, server.address).await);
    }
    // One whom nobody has seen yet, and then as somebody known.
    for _ in 0..2 {
        assert!(call(server.address, &ca, own()).await);
        let accepted = tokio::time::timeout(PATIENCE / 2, server.accepted.next()).await;
        assert!(accepted.is_ok_and(|a| a.is_some_and(|a| a.is_ok())));
    }
}

#[tokio::test]
async fn a_tenants_connections_are_bounded_and_no_other_tenants() {
    let ca = Ca::new();
    let limit = 3;
    let callers = Callers {
        per_tenant: limit,
        ..crate::policy::bounds::Bounds::default().callers()
    };
    let mut server = serve_within(&ca, callers).await;
    let of = |tenant: &str| Some(ca.issue(&[&format!("spiffe://pool/tenant/{tenant}/virtual-node")]));
    let mut kept = vec![];
    for _ in 0..limit {
        let (called, accepted) =
            tokio::join!(call(server.address, &ca, of("greedy")), server.accepted.next());
        assert!(called);
        kept.push(accepted.unwrap().unwrap());
    }
    assert!(!call(server.address, &ca, of("greedy")).await, "beyond its share");
    let (called, accepted) = tokio::join!(call(server.address, &ca, of("modest")), server.accepted.next());
    assert!(called && accepted.unwrap().is_ok());
    kept.pop();
    let (called, accepted) = tokio::join!(call(server.address, &ca, of("greedy")), server.accepted.next());
    assert!(called && accepted.unwrap().is_ok(), "one had ended");
}

/// Whether nothing more is read of it, soon.
async fn ends(connection: &mut Connection) -> bool {
    let soon = Duration::from_secs(20);
    let read = tokio::time::timeout(soon, connection.read(&mut [0; 1])).await;
    matches!(read, Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut)
}

async fn stands(connection: &mut Connection) -> bool {
    let while_looking = Duration::from_millis(300);
    tokio::time::timeout(while_looking, connection.read(&mut [0; 1]))
        .await
        .is_err()
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_that_it_was_made_with() {
    let ca = Ca::new();
    let mut server = serve(&ca).await;
    let node = ["spiffe://pool/tenant/demo/virtual-node"];
    let mut held = vec![];
    for life in [4, 3600] {
        let own = ca.issue_for(&node, Duration::from_secs(life));
        let (address, pem) = (server.address, ca.pem.clone());
        // Never hangs up, nor says anything.
        held.push(tokio::spawn(async move {
            let _stream = connect(address, &pem, Some(own)).await.unwrap();
            std::future::pending::<()>().await;
        }));
        let mut connection = server.accepted.next().await.unwrap().unwrap();
        if life == 4 {
            assert!(ends(&mut connection).await, "it outlived its certificate");
        } else {
            assert!(stands(&mut connection).await, "its certificate is good");
        }
    }
    held.iter().for_each(|held| held.abort());
}

#[tokio::test]
async fn connections_end_when_a_root_is_taken_away_and_not_when_one_is_added() {
    let (old, new) = (Ca::new(), Ca::new());
    let files = |roots: &[&Ca]| {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = old.issue(&["spiffe://pool/host/host-a"]);
        let files = write(directory.path(), &old, &certificate, &key);
        let pem: String = roots.iter().map(|ca| ca.pem.as_str()).collect();
        std::fs::write(&files.ca, pem).unwrap();
        Arc::new(Credentials::load(&files).unwrap())
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (current, credentials) = watch::channel(files(&[&old]));
    let doorway = Doorway::new(
        crate::policy::bounds::Bounds::default().callers(),
        &Bounds::default(),
    );
    let mut accepted = accept(listener, "pool".into(), credentials, doorway);
    let own = old.issue(&["spiffe://pool/tenant/demo/virtual-node"]);
    let pem = old.pem.clone();
    let caller = tokio::spawn(async move {
        let _stream = connect(address, &pem, Some(own)).await.unwrap();
        std::future::pending::<()>().await;
    });
    let mut connection = accepted.next().await.unwrap().unwrap();
    current.send_replace(files(&[&old, &new]));
    assert!(stands(&mut connection).await, "its root is still there");
    current.send_replace(files(&[&new]));
    assert!(ends(&mut connection).await, "it outlived its root");
    caller.abort();
}

#[tokio::test(start_paused = true)]
async fn renewed_files_are_taken_up_and_bad_ones_leave_the_old_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let (first, first_key) = ca.issue(&["spiffe://pool/host/host-a"]);
    let (second, second_key) = ca.issue(&["spiffe://pool/host/host-a"]);
    let files = write(directory.path(), &ca, &first, &first_key);
    let mut current = follow(files.clone(), Credentials::load(&files).unwrap());
    // A renewal caught half way: the pair does not fit.
    write(directory.path(), &ca, &second, &first_key);
    let later = tokio::time::timeout(Duration::from_secs(600), current.changed()).await;
    assert!(later.is_err(), "a pair that does not fit was taken up");
    std::fs::remove_file(&files.ca).unwrap();
    let later = tokio::time::timeout(Duration::from_secs(600), current.changed()).await;
    assert!(later.is_err(), "missing files were taken up");
    write(directory.path(), &ca, &second, &second_key);
    current.changed().await.unwrap();
    assert_eq!(current.borrow().pem.certificate, second.as_bytes());
}
