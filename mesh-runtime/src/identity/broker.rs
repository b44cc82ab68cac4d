//! One certificate from the tenant's broker: a new key, a request for it, and
//! every check of what comes back. The key never leaves this process.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_api::{
    Identity,
    istio::certificate::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime,
    pem::{self, PemObject},
};
use tonic::transport::Channel;
use webpki::KeyUsage;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Certificate,
    tls::{BuildTlsError, Tls},
    verify::{Expected, InvalidRoots, Verifier},
};

/// What is asked for; the broker may give less.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);
/// A broker that does not answer within this is asked again later.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Far above what a chain takes.
const MAX_RESPONSE: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("cannot make a key")]
    Key(#[source] rcgen::Error),
    #[error("cannot make a certificate request")]
    Request(#[source] rcgen::Error),
    #[error("the broker refused: {}", .0.message())]
    Broker(#[source] Box<tonic::Status>),
    #[error("the broker did not answer in time")]
    Timeout,
    /// A defect, kept to this one identity and retried like any failure.
    #[error("the fetch died")]
    Died(#[source] tokio::task::JoinError),
    #[error("the broker's answer was refused")]
    Answer(#[from] InvalidAnswer),
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidAnswer {
    #[error("it has {count} elements where a leaf and roots are needed")]
    TooShort { count: usize },
    #[error("element {index} is no PEM certificate")]
    Pem {
        index: usize,
        #[source]
        source: pem::Error,
    },
    #[error("element {index} holds no certificate")]
    Empty { index: usize },
    #[error("its certificate cannot be parsed")]
    Leaf(#[source] x509_parser::nom::Err<x509_parser::error::X509Error>),
    #[error("its certificate is for another key")]
    OtherKey,
    #[error("its roots cannot be used")]
    Roots(#[source] InvalidRoots),
    #[error("its certificate does not hold")]
    Unverified(#[source] rustls::Error),
    #[error("its certificate cannot be used")]
    Unusable(#[from] BuildTlsError),
}

/// Asks for a certificate for `identity`.
pub(super) async fn fetch(
    channel: Channel,
    identity: &Identity,
    now: fn() -> SystemTime,
) -> Result<Certificate, FetchError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(FetchError::Key)?;
    let request = request(identity, &key)?;
    let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_RESPONSE);
    let response = tokio::time::timeout(TIMEOUT, client.create_certificate(request))
        .await
        .map_err(|_| FetchError::Timeout)?
        .map_err(|status| FetchError::Broker(Box::new(status)))?
        .into_inner();
    Ok(check(identity, &key, &response.cert_chain, now())?)
}

fn request(identity: &Identity, key: &KeyPair) -> Result<IstioCertificateRequest, FetchError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(
        identity.to_string().try_into().map_err(FetchError::Request)?,
    )];
    let csr = params
        .serialize_request(key)
        .and_then(|csr| csr.pem())
        .map_err(FetchError::Request)?;
    Ok(IstioCertificateRequest {
        csr,
        validity_duration: VALIDITY.as_secs() as i64,
        metadata: Some(Struct {
            fields: [(
                "ImpersonatedIdentity".to_owned(),
                Value {
                    kind: Some(Kind::StringValue(identity.to_string())),
                },
            )]
            .into(),
        }),
    })
}

/// Takes a chain only if it is for `key`, names `identity` and nothing else, and
/// leads to the roots that came with it. (The roots are believed because the
/// broker is: its own certificate is of the pool.)
fn check(
    identity: &Identity,
    key: &KeyPair,
    chain: &[String],
    now: SystemTime,
) -> Result<Certificate, InvalidAnswer> {
    let [leaf_and_intermediates @ .., roots] = chain else {
        return Err(InvalidAnswer::TooShort { count: 0 });
    };
    if leaf_and_intermediates.is_empty() {
        return Err(InvalidAnswer::TooShort { count: chain.len() });
    }
    let roots = certificates(chain.len() - 1, roots)?;
    let mut presented = Vec::new();
    for (index, element) in leaf_and_intermediates.iter().enumerate() {
        presented.extend(certificates(index, element)?);
    }
    // Each element held at least one certificate.
    let [leaf, intermediates @ ..] = &presented[..] else {
        return Err(InvalidAnswer::TooShort { count: chain.len() });
    };

    let (_, parsed) = X509Certificate::from_der(leaf).map_err(InvalidAnswer::Leaf)?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(InvalidAnswer::OtherKey);
    }
    let verifier =
        Verifier::new(&roots, Expected::Uri(identity.to_string())).map_err(InvalidAnswer::Roots)?;
    let at = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        verifier
            .verify(leaf, intermediates, at, usage)
            .map_err(InvalidAnswer::Unverified)?;
    }
    let validity = parsed.validity();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Certificate {
        identity: identity.clone(),
        serial: parsed.raw_serial_as_string(),
        not_before: time(validity.not_before.timestamp()),
        not_after: time(validity.not_after.timestamp()),
        tls: Tls::new(identity, &presented, &private, &roots)?,
    })
}

fn certificates(index: usize, text: &str) -> Result<Vec<CertificateDer<'static>>, InvalidAnswer> {
    let found = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| InvalidAnswer::Pem { index, source })?;
    if found.is_empty() {
        return Err(InvalidAnswer::Empty { index });
    }
    Ok(found)
}

/// Seconds since 1970; one before it is long over either way.
fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests;
