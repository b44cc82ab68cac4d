//! Verification of a peer by its URI name: the mesh's SPIFFE identities and the
//! pool's own peers. Both ends of a TLS connection use the one verifier.
//!
//! A certificate passes only if its chain leads to one of the given roots, it
//! has exactly one URI name, and that name is what is expected. Host names and
//! addresses are not looked at.

use std::{fmt, sync::Arc};

use mesh_api::Identity;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{EndEntityCert, KeyUsage};

/// Whom a certificate has to name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Exactly this URI.
    Uri(String),
    /// Any workload identity of this trust domain. Which one is read from the
    /// certificate afterwards ([`peer_identity`]) and compared by the caller.
    TrustDomain(String),
}

#[derive(Debug)]
pub struct Verifier {
    roots: Vec<TrustAnchor<'static>>,
    expected: Expected,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidRoots {
    #[error("there is no root certificate")]
    Empty,
    #[error("root certificate {index} cannot be read")]
    Unreadable {
        index: usize,
        #[source]
        source: webpki::Error,
    },
}

/// Why a well-formed certificate of a trusted chain is still not the peer's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongPeer {
    #[error("the peer's certificate has {found} URI names where exactly one is needed")]
    UriNames { found: usize },
    #[error("the peer is {found:?} where {expected:?} is needed")]
    OtherUri { found: String, expected: String },
    #[error("the peer's URI name {found:?} is no workload identity")]
    NoIdentity { found: String },
    #[error("the peer {found} is of another trust domain than {expected:?}")]
    OtherTrustDomain { found: Identity, expected: String },
}

impl From<WrongPeer> for rustls::Error {
    fn from(wrong: WrongPeer) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
    }
}

impl Verifier {
    pub fn new(roots: &[CertificateDer<'_>], expected: Expected) -> Result<Self, InvalidRoots> {
        if roots.is_empty() {
            return Err(InvalidRoots::Empty);
        }
        let roots = roots
            .iter()
            .enumerate()
            .map(|(index, root)| {
                webpki::anchor_from_trusted_cert(root)
                    .map(|anchor| anchor.to_owned())
                    .map_err(|source| InvalidRoots::Unreadable { index, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            roots,
            expected,
            provider: super::crypto::provider(),
        })
    }

    /// Checks chain, validity and name at `now`.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), rustls::Error> {
        let unreadable = |_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding);
        let certificate = EndEntityCert::try_from(leaf).map_err(unreadable)?;
        certificate
            .verify_for_usage(
                self.provider.signature_verification_algorithms.all,
                &self.roots,
                intermediates,
                now,
                usage,
                None,
                None,
            )
            .map_err(chain_error)?;
        let found = only_uri(&certificate)?;
        match &self.expected {
            Expected::Uri(expected) if found == expected => Ok(()),
            Expected::Uri(expected) => Err(WrongPeer::OtherUri {
                found: found.to_owned(),
                expected: expected.clone(),
            }
            .into()),
            Expected::TrustDomain(expected) => {
                let found = identity(found)?;
                if found.trust_domain() == expected {
                    Ok(())
                } else {
                    Err(WrongPeer::OtherTrustDomain {
                        found,
                        expected: expected.clone(),
                    }
                    .into())
                }
            }
        }
    }
}

/// The identity a certificate names. Says nothing of whether to believe it: the
/// handshake that delivered the certificate does.
pub fn peer_identity(leaf: &CertificateDer<'_>) -> Result<Identity, rustls::Error> {
    let unreadable = |_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding);
    let certificate = EndEntityCert::try_from(leaf).map_err(unreadable)?;
    Ok(identity(only_uri(&certificate)?)?)
}

fn only_uri<'a>(certificate: &EndEntityCert<'a>) -> Result<&'a str, WrongPeer> {
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(WrongPeer::UriNames { found: 0 }),
        (Some(_), Some(_)) => Err(WrongPeer::UriNames {
            found: 2 + names.count(),
        }),
    }
}

fn identity(uri: &str) -> Result<Identity, WrongPeer> {
    uri.parse().map_err(|_| WrongPeer::NoIdentity {
        found: uri.to_owned(),
    })
}

/// Says what an operator has to tell apart; the rest is "not of this CA".
fn chain_error(error: webpki::Error) -> rustls::Error {
    use webpki::Error;
    rustls::Error::InvalidCertificate(match error {
        Error::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        Error::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        Error::UnknownIssuer => CertificateError::UnknownIssuer,
        Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

/// TLS 1.2 is off wherever this verifier is used, so its signatures never pass.
fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// None: which CA to use is no secret worth a hint, and no client needs it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri(uri) => f.write_str(uri),
            Self::TrustDomain(domain) => write!(f, "spiffe://{domain}/…"),
        }
    }
}
