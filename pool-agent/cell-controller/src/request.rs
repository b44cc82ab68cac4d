//! What every request for a certificate is held to, whatever it asks for. Pure.

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use x509_parser::{certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer};

/// Whether somebody has said yes or no.
pub fn is_decided(request: &CertificateSigningRequest) -> bool {
    has(request, &["Approved", "Denied", "Failed"])
}

pub fn is_approved(request: &CertificateSigningRequest) -> bool {
    has(request, &["Approved"]) && !has(request, &["Denied", "Failed"])
}

fn has(request: &CertificateSigningRequest, kinds: &[&str]) -> bool {
    let conditions = request.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| kinds.contains(&c.type_.as_str()))
}

/// Shows the one request that is in the PEM. The error says what is wrong with it.
pub fn read<T>(pem: &[u8], look: impl FnOnce(&X509CertificationRequest<'_>) -> T) -> Result<T, &'static str> {
    let (rest, pem) = parse_x509_pem(pem).map_err(|_| "it is not PEM")?;
    if !rest.trim_ascii().is_empty() {
        return Err("something follows it");
    }
    let (rest, request) =
        X509CertificationRequest::from_der(&pem.contents).map_err(|_| "it is no certification request")?;
    if !rest.is_empty() {
        return Err("something follows it");
    }
    request
        .verify_signature()
        .map_err(|_| "its key did not sign it")?;
    Ok(look(&request))
}
