//! The TLS of the kubelet API: its certificate, from files or by a CSR that the
//! cluster's operator approves, and how clients' certificates are looked at.

pub(crate) mod request;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use kube::Client;
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::aws_lc_rs,
    server::{
        ClientHello, ResolvesServerCert, VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServingError {
    #[error("cannot read PEM from {}", path.display())]
    Pem {
        path: PathBuf,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("{} cannot be used as the CA of clients", path.display())]
    ClientCa {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("{} holds no usable CA of clients", path.display())]
    NoClientCa {
        path: PathBuf,
        #[source]
        source: VerifierBuilderError,
    },
    #[error("the certificate in {} and its key cannot be used", path.display())]
    Pair {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
}

/// How often certificate files are looked at for a change.
const RELOAD: Duration = Duration::from_secs(60);

pub(super) struct Tls {
    pub(super) config: Arc<ServerConfig>,
    /// Verifies the chain that [`Asking`] only took note of.
    pub(super) client_verifier: Arc<dyn ClientCertVerifier>,
}

/// The certificate in use; none until the first was signed, and until then no
/// handshake succeeds.
#[derive(Debug, Default)]
struct Current(ArcSwapOption<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// Whose signature makes a client's certificate.
#[derive(Debug, Clone)]
pub(crate) enum Authority {
    File(PathBuf),
    Pem { called: PathBuf, pem: Vec<u8> },
}

impl Authority {
    fn called(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Pem { called, .. } => called,
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
        match self {
            Self::File(path) => CertificateDer::pem_file_iter(path)?.collect(),
            Self::Pem { pem, .. } => CertificateDer::pem_slice_iter(pem).collect(),
        }
    }
}

/// Where the certificate that is served with comes from.
#[derive(Debug)]
pub(crate) enum Certificate {
    /// Certificate and key.
    Files(PathBuf, PathBuf),
    /// Asked for by CSR, and kept in memory.
    Requested,
    /// Somebody else's to keep; none yet at first.
    Given(watch::Receiver<Option<Arc<CertifiedKey>>>),
}

/// Takes the certificate from where it comes; keeps it fresh until `shutdown`.
pub(super) fn start(
    clients: &Authority,
    certificate: Certificate,
    node_name: &str,
    address: IpAddr,
    client: Client,
    shutdown: &CancellationToken,
) -> Result<Tls, ServingError> {
    let client_verifier = client_verifier(clients)?;
    let current = Arc::new(Current::default());
    let shutdown = shutdown.clone();
    match certificate {
        Certificate::Files(certificate, key) => {
            current.0.store(Some(Arc::new(load(&certificate, &key)?)));
            let current = current.clone();
            tokio::spawn(async move {
                shutdown
                    .run_until_cancelled(reload(&certificate, &key, &current))
                    .await
            });
        }
        Certificate::Requested => {
            let requester = request::Requester::new(client, node_name, address);
            let current = current.clone();
            tokio::spawn(async move {
                let keep = requester.keep(|signed| current.0.store(Some(Arc::new(signed))));
                shutdown.run_until_cancelled(keep).await
            });
        }
        Certificate::Given(mut given) => {
            current.0.store(given.borrow_and_update().clone());
            let current = current.clone();
            tokio::spawn(async move {
                let follow = async {
                    while given.changed().await.is_ok() {
                        current.0.store(given.borrow_and_update().clone());
                    }
                };
                shutdown.run_until_cancelled(follow).await
            });
        }
    }
    let mut tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(ServingError::Tls)?
        .with_client_cert_verifier(Arc::new(Asking(client_verifier.clone())))
        .with_cert_resolver(current);
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Tls {
        config: Arc::new(tls),
        client_verifier,
    })
}

/// Takes up changed files; what cannot be used leaves the old pair in place.
async fn reload(certificate: &Path, key: &Path, current: &Current) {
    loop {
        tokio::time::sleep(RELOAD).await;
        match load(certificate, key) {
            Ok(pair) => {
                let changed = current.0.load().as_ref().is_none_or(|old| old.cert != pair.cert);
                if changed {
                    info!("kubelet API's certificate taken up anew");
                    current.0.store(Some(Arc::new(pair)));
                }
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "kubelet API's certificate cannot be taken up"
                )
            }
        }
    }
}

fn load(certificate: &Path, key: &Path) -> Result<CertifiedKey, ServingError> {
    let pem = |path: &Path| {
        let path = path.to_owned();
        move |source| ServingError::Pem { path, source }
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(pem(certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    CertifiedKey::from_der(chain, private, &aws_lc_rs::default_provider()).map_err(|source| {
        ServingError::Pair {
            path: certificate.to_owned(),
            source,
        }
    })
}

/// Whether `authority` can be one: what is refused is refused before anything starts.
pub(crate) fn check(authority: &Authority) -> Result<(), ServingError> {
    client_verifier(authority).map(drop)
}

fn client_verifier(authority: &Authority) -> Result<Arc<dyn ClientCertVerifier>, ServingError> {
    let ca = authority.called();
    let mut roots = RootCertStore::empty();
    let certificates = authority.certificates().map_err(|source| ServingError::Pem {
        path: ca.to_owned(),
        source,
    })?;
    for certificate in certificates {
        roots.add(certificate).map_err(|source| ServingError::ClientCa {
            path: ca.to_owned(),
            source,
        })?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|source| ServingError::NoClientCa {
            path: ca.to_owned(),
            source,
        })
}

/// Asks for a certificate and checks that the client holds its key; whose it is
/// is decided for each request, so that a stranger gets a 401 and not a broken
/// connection, and a client with a token needs no certificate.
#[derive(Debug)]
struct Asking(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Asking {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
