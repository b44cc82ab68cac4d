//! The host's credentials in the pool, as files that somebody renews.
//!
//! What always holds: what is given out can be used for TLS; files that cannot be
//! used, or not be read, leave the ones before in use.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::sync::watch;

use crate::config::TlsFiles;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("parsing {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{path} holds no certificate that can be a root")]
    Root { path: PathBuf },
    #[error("{certificate} and {key} are no pair that TLS can use")]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("callers cannot be verified with {path}")]
    Verifier {
        path: PathBuf,
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
}

/// PEM files as they were read.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
    pub ca: Vec<u8>,
}

impl Pem {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::Read {
                path: path.to_owned(),
                source,
            })
        };
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            ca: read(&files.ca)?,
        })
    }
}

fn server_config(files: &TlsFiles, pem: &Pem) -> Result<Arc<ServerConfig>, TlsError> {
    let certificates = |bytes: &[u8], path: &Path| {
        CertificateDer::pem_slice_iter(bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| TlsError::Parse {
                path: path.to_owned(),
                source,
            })
    };
    let chain = certificates(&pem.certificate, &files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|source| TlsError::Parse {
        path: files.key.clone(),
        source,
    })?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(&pem.ca, &files.ca)?);
    if added == 0 {
        return Err(TlsError::Root {
            path: files.ca.clone(),
        });
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|source| TlsError::Verifier {
            path: files.ca.clone(),
            source,
        })?;
    let pair = |source| TlsError::Pair {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(pair)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Files that fit each other, and what the agent serves with.
pub struct Credentials {
    pub pem: Pem,
    pub(super) server: Arc<ServerConfig>,
}

/// One of them is a key.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        Self::of(files, Pem::read(files)?)
    }

    fn of(files: &TlsFiles, pem: Pem) -> Result<Self, TlsError> {
        let server = server_config(files, &pem)?;
        Ok(Self { pem, server })
    }
}

/// Gives out the credentials, and newer ones when the files change, for as long as
/// somebody listens.
pub fn follow(files: TlsFiles, first: Credentials) -> watch::Receiver<Arc<Credentials>> {
    let mut known = first.pem.clone();
    let (current, credentials) = watch::channel(Arc::new(first));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = current.closed() => return,
            }
            match Pem::read(&files) {
                Ok(pem) if pem == known => {}
                Ok(pem) => {
                    // A bad one is told once, not at each look.
                    known = pem.clone();
                    match Credentials::of(&files, pem) {
                        Ok(new) => {
                            tracing::info!("the host's certificate in the pool was replaced");
                            current.send_replace(Arc::new(new));
                        }
                        Err(error) => {
                            tracing::warn!(error = %error, "the host's new certificate cannot be used");
                        }
                    }
                }
                Err(error) => tracing::warn!(error = %error, "the host's certificate cannot be read"),
            }
        }
    });
    credentials
}
