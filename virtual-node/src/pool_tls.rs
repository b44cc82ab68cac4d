//! Mutual TLS with the hosts of the pool: our certificate of the pool's CA, and
//! who may be at the other end. `mesh` serves with it, the pool client dials
//! with it.
//!
//! What always holds: a peer is its chain to the pool's CA and the one URI name
//! of its certificate; DNS names and addresses mean nothing. Files that change
//! are taken up for new connections; files that cannot be read or do not fit
//! together leave the old credentials in use.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use pool_agent_api::{HostName, Invalid, Peer, PeerId};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    server::{
        ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tokio_util::sync::CancellationToken;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// Where our credentials are, and the pool's SPIFFE trust domain.
#[derive(Debug, Clone)]
pub struct Files {
    pub trust_domain: String,
    /// PEM: our certificate, then intermediates.
    pub certificate: PathBuf,
    /// PEM: the private key.
    pub key: PathBuf,
    /// PEM: the pool's roots.
    pub ca: PathBuf,
}

/// Why credentials were not taken.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not PEM with what is wanted here", path.display())]
    Parse {
        path: PathBuf,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("{} holds no certificate", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} holds a certificate that cannot be a root", path.display())]
    BadRoot {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("cannot verify peers with the roots in {}", path.display())]
    Verifier {
        path: PathBuf,
        #[source]
        source: VerifierBuilderError,
    },
    #[error("{} and {} are no pair that TLS can use", certificate.display(), key.display())]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        source: rustls::Error,
    },
}

/// Why a certificate of the pool's CA is not who is expected.
#[derive(Debug, thiserror::Error)]
pub enum NotExpected {
    #[error("the peer's certificate cannot be parsed")]
    Malformed(#[source] x509_parser::nom::Err<x509_parser::error::X509Error>),
    #[error("the peer's certificate has {count} URI names, not one")]
    UriCount { count: usize },
    #[error("the peer's certificate names no member of a pool")]
    Name(#[source] Invalid),
    #[error("the peer {peer} is not of the trust domain {expected:?}")]
    TrustDomain { peer: PeerId, expected: String },
    #[error("the peer {peer} is not {expected}")]
    Peer { peer: PeerId, expected: Expected },
}

/// Whom a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    AnyHost,
    Host(HostName),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyHost => f.write_str("a host of the pool"),
            Self::Host(name) => write!(f, "host {name}"),
        }
    }
}

/// Our credentials, the newest that could be read.
pub struct PoolTls {
    files: Files,
    current: ArcSwap<Credentials>,
}

struct Credentials {
    pem: Pem,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
}

/// The files' contents: what tells a change.
#[derive(PartialEq, Eq)]
pub struct Pem {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
    pub ca: Vec<u8>,
}

impl PoolTls {
    pub fn load(files: Files) -> Result<Self, LoadError> {
        let pem = read(&files)?;
        Self::of(files, pem)
    }

    /// Credentials that are no files; `files` says what errors call them.
    pub fn of(files: Files, pem: Pem) -> Result<Self, LoadError> {
        Ok(Self {
            current: ArcSwap::from_pointee(Credentials::parse(&files, pem)?),
            files,
        })
    }

    /// To serve hosts: a client certificate of any host of the pool is required.
    /// TLS 1.3, ALPN h2. Ask anew for each connection.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().server)
    }

    /// To dial a host: it has to be that host. TLS 1.3, ALPN h2. Ask anew for each
    /// connection; the server name given to rustls plays no part.
    pub fn client(&self, host: &HostName) -> Result<ClientConfig, LoadError> {
        let current = self.current.load();
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.files.pair(e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier {
                roots: Arc::clone(&current.roots),
                algorithms: provider().signature_verification_algorithms,
                who: Who {
                    trust_domain: self.files.trust_domain.clone(),
                    expected: Expected::Host(host.clone()),
                },
            }))
            .with_client_auth_cert(current.chain.clone(), current.key.clone_key())
            .map_err(|e| self.files.pair(e))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    /// The host that a connection accepted with [`Self::server`] comes from, from
    /// the verified chain. The handshake has checked it already; this reads it.
    pub fn host(&self, chain: Option<&[CertificateDer<'_>]>) -> Result<HostName, NotExpected> {
        let leaf = chain
            .and_then(<[_]>::first)
            .ok_or(NotExpected::UriCount { count: 0 })?;
        let who = Who {
            trust_domain: self.files.trust_domain.clone(),
            expected: Expected::AnyHost,
        };
        let peer = who.check(leaf)?;
        match peer.peer {
            Peer::Host(name) => Ok(name),
            Peer::VirtualNode(_) | Peer::UsageCollector => Err(NotExpected::Peer {
                peer,
                expected: Expected::AnyHost,
            }),
        }
    }

    /// Who we are to hosts, from our certificate.
    pub fn name(&self) -> Result<PeerId, NotExpected> {
        let current = self.current.load();
        named(current.chain.first().ok_or(NotExpected::UriCount { count: 0 })?)
    }

    /// Looks at the files every `period` and takes up what changed, until `shutdown`.
    pub async fn follow_files(&self, period: Duration, shutdown: CancellationToken) {
        // What was refused last, so that one bad write is one line in the log.
        let mut refused: Option<String> = None;
        while shutdown
            .run_until_cancelled(tokio::time::sleep(period))
            .await
            .is_some()
        {
            let files = self.files.clone();
            let read = tokio::task::spawn_blocking(move || read(&files)).await;
            let Ok(read) = read else { continue };
            let taken = match read {
                Ok(pem) if pem == self.current.load().pem => Ok(false),
                Ok(pem) => Credentials::parse(&self.files, pem).map(|new| {
                    self.current.store(Arc::new(new));
                    true
                }),
                Err(error) => Err(error),
            };
            match taken {
                Ok(changed) => {
                    if changed {
                        tracing::info!(certificate = %self.files.certificate.display(), "pool credentials replaced");
                    }
                    refused = None;
                }
                Err(error) => {
                    let reason = format!("{error}: {:?}", std::error::Error::source(&error));
                    if refused.as_ref() != Some(&reason) {
                        tracing::warn!(reason, "pool credentials not replaced");
                        refused = Some(reason);
                    }
                }
            }
        }
    }
}

impl Files {
    fn pair(&self, source: rustls::Error) -> LoadError {
        LoadError::Pair {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            source,
        }
    }
}

fn read(files: &Files) -> Result<Pem, LoadError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| LoadError::Read {
            path: path.to_owned(),
            source,
        })
    };
    Ok(Pem {
        certificate: read(&files.certificate)?,
        key: read(&files.key)?,
        ca: read(&files.ca)?,
    })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let parsed: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|source| LoadError::Parse {
            path: path.to_owned(),
            source,
        })?;
    if parsed.is_empty() {
        return Err(LoadError::NoCertificate {
            path: path.to_owned(),
        });
    }
    Ok(parsed)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl Credentials {
    fn parse(files: &Files, pem: Pem) -> Result<Self, LoadError> {
        let chain = certificates(&files.certificate, &pem.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|source| LoadError::Parse {
            path: files.key.clone(),
            source,
        })?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.ca, &pem.ca)? {
            roots.add(root).map_err(|source| LoadError::BadRoot {
                path: files.ca.clone(),
                source,
            })?;
        }
        let roots = Arc::new(roots);
        let chains = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|source| LoadError::Verifier {
                path: files.ca.clone(),
                source,
            })?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| files.pair(e))?
            .with_client_cert_verifier(Arc::new(ClientVerifier {
                chains,
                who: Who {
                    trust_domain: files.trust_domain.clone(),
                    expected: Expected::AnyHost,
                },
            }))
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|e| files.pair(e))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would outlive the certificate it was made with.
        server.send_tls13_tickets = 0;
        Ok(Self {
            pem,
            chain,
            key,
            roots,
            server: Arc::new(server),
        })
    }
}

/// The one name of a certificate.
fn named(certificate: &CertificateDer<'_>) -> Result<PeerId, NotExpected> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(NotExpected::Malformed)?;
    let uris: Vec<&str> = parsed
        .subject_alternative_name()
        .map_err(|e| NotExpected::Malformed(x509_parser::nom::Err::Failure(e)))?
        .into_iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else {
        return Err(NotExpected::UriCount { count: uris.len() });
    };
    uri.parse().map_err(NotExpected::Name)
}

/// The name that a certificate has to have.
#[derive(Debug)]
struct Who {
    trust_domain: String,
    expected: Expected,
}

impl Who {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<PeerId, NotExpected> {
        let peer = named(certificate)?;
        if peer.trust_domain != self.trust_domain {
            return Err(NotExpected::TrustDomain {
                peer,
                expected: self.trust_domain.clone(),
            });
        }
        let fits = match (&peer.peer, &self.expected) {
            (Peer::Host(_), Expected::AnyHost) => true,
            (Peer::Host(name), Expected::Host(expected)) => name == expected,
            (Peer::VirtualNode(_) | Peer::UsageCollector, _) => false,
        };
        if fits {
            Ok(peer)
        } else {
            Err(NotExpected::Peer {
                peer,
                expected: self.expected.clone(),
            })
        }
    }

    fn check_for_tls(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        self.check(certificate)
            .map(drop)
            .map_err(|e| rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e)))))
    }
}

/// Accepts a client whose chain leads to the pool's CA and whose name is expected.
#[derive(Debug)]
struct ClientVerifier {
    chains: Arc<dyn ClientCertVerifier>,
    who: Who,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chains.verify_client_cert(leaf, intermediates, now)?;
        self.who.check_for_tls(leaf)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// Accepts a server whose chain leads to the pool's CA and whose name is expected.
#[derive(Debug)]
struct ServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    who: Who,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        self.who.check_for_tls(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
pub(crate) mod test_pool;
#[cfg(test)]
mod tests;
