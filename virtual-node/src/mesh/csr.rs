//! A certificate signing request, parsed from what a host sent. Pure; called by
//! `broker`. What comes out was signed with the key it asks a certificate for, and
//! asks for one identity; nothing else of it is kept.

use mesh_api::{Identity, InvalidIdentity};
use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
    x509::SubjectPublicKeyInfo as ParsedKey,
};

/// A P-256 request with a SPIFFE id has about 600 bytes of PEM.
pub const MAX_PEM_BYTES: usize = 8 * 1024;

/// What is asked for.
pub struct Csr {
    pub identity: Identity,
    /// The key the certificate is to be for; whoever asks has the private half.
    pub key: SubjectPublicKeyInfo,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidCsr {
    #[error("the CSR has {bytes} bytes, more than {MAX_PEM_BYTES}")]
    TooLarge { bytes: usize },
    #[error("the CSR is not PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    #[error("the CSR is not a PKCS#10 request")]
    Der,
    #[error("the CSR's key is none of P-256, P-384 and Ed25519")]
    Key,
    #[error("the CSR is not signed with its own key")]
    Signature,
    #[error("the CSR asks for {count} names, not for one URI")]
    Names { count: usize },
    #[error("the CSR's name is no identity")]
    Identity(#[source] InvalidIdentity),
}

impl Csr {
    pub fn parse(pem: &str) -> Result<Self, InvalidCsr> {
        if pem.len() > MAX_PEM_BYTES {
            return Err(InvalidCsr::TooLarge { bytes: pem.len() });
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(InvalidCsr::Pem)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| InvalidCsr::Der)?;
        if !rest.is_empty() {
            return Err(InvalidCsr::Der);
        }
        let key = acceptable(&request.certification_request_info.subject_pki)?;
        request.verify_signature().map_err(|_| InvalidCsr::Signature)?;
        let names: Vec<&GeneralName<'_>> = request
            .requested_extensions()
            .into_iter()
            .flatten()
            .filter_map(|extension| match extension {
                ParsedExtension::SubjectAlternativeName(san) => Some(&san.general_names),
                _ => None,
            })
            .flatten()
            .collect();
        let [GeneralName::URI(uri)] = names[..] else {
            return Err(InvalidCsr::Names { count: names.len() });
        };
        Ok(Self {
            identity: uri.parse().map_err(InvalidCsr::Identity)?,
            key,
        })
    }
}

/// The key, if it is of a kind that a peer verifies fast. RSA costs the far side of
/// each handshake a multiple of what it costs here.
fn acceptable(key: &ParsedKey<'_>) -> Result<SubjectPublicKeyInfo, InvalidCsr> {
    let key = SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| InvalidCsr::Key)?;
    let accepted = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
    if accepted.contains(&key.algorithm()) {
        Ok(key)
    } else {
        Err(InvalidCsr::Key)
    }
}

#[cfg(test)]
mod tests;
