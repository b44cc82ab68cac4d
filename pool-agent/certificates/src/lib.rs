//! Certificates that a cluster's signers give for a CertificateSigningRequest
//! (`certificates.k8s.io/v1`), [`held`] in a file, renewed; those of a pool's
//! [`member`]s among them. A key is made and stays where it is asked for.

pub mod held;
pub mod member;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
pub use held::{Held, HeldError, Name};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

/// A request that nobody has signed yet is looked at this often.
const POLL: Duration = Duration::from_millis(500);
/// The next wait after so many failures: from a second to a minute.
pub fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(60))
        .with_jitter()
        .without_max_times()
        .build()
}

/// A call that is lost with its connection would be waited for until TCP gives up.
const CALL: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub signer: &'static str,
    /// Of the object; None: the API server makes one up.
    pub name: Option<String>,
    pub annotations: BTreeMap<String, String>,
    /// As `certificates.k8s.io` has them, e.g. `client auth`.
    pub usages: &'static [&'static str],
    pub organization: Option<&'static str>,
    pub common_name: String,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub uris: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    #[error("making a key and a request")]
    Make(#[from] rcgen::Error),
    #[error("the API server did not take the request, or does not show it")]
    Api(#[source] kube::Error),
    #[error("the request {name} was {verdict}: {message}")]
    Refused {
        name: String,
        /// `denied` or `failed`.
        verdict: String,
        message: String,
    },
    #[error("the request {0} is not signed yet")]
    Unsigned(String),
    #[error("what was signed is not text")]
    Text,
}

/// The request as an object, for that key.
pub fn request(wanted: &Wanted, key: &KeyPair) -> Result<CertificateSigningRequest, CsrError> {
    let mut subject = DistinguishedName::new();
    if let Some(organization) = wanted.organization {
        subject.push(DnType::OrganizationName, organization);
    }
    if !wanted.common_name.is_empty() {
        subject.push(DnType::CommonName, &wanted.common_name);
    }
    let mut parameters = CertificateParams::new(wanted.dns_names.clone())?;
    parameters.distinguished_name = subject;
    let names = &mut parameters.subject_alt_names;
    names.extend(
        wanted
            .addresses
            .iter()
            .map(|address| SanType::IpAddress(*address)),
    );
    for uri in &wanted.uris {
        names.push(SanType::URI(uri.as_str().try_into()?));
    }
    let pem = parameters.serialize_request(key)?.pem()?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta {
            name: wanted.name.clone(),
            generate_name: wanted.name.is_none().then(|| "csr-".into()),
            annotations: (!wanted.annotations.is_empty()).then(|| wanted.annotations.clone()),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: wanted.signer.into(),
            usages: Some(wanted.usages.iter().map(|usage| (*usage).to_owned()).collect()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// Asks, and waits until it is signed, refused, or `patience` is over. A request of
/// that name which is there already is gone on with. The chain as PEM, the leaf first.
pub async fn obtain(
    client: &Client,
    wanted: &Wanted,
    key: &KeyPair,
    patience: Duration,
) -> Result<String, CsrError> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let object = request(wanted, key)?;
    let name = match answered(api.create(&PostParams::default(), &object)).await {
        Ok(made) => {
            let name = made.metadata.name.unwrap_or_default();
            tracing::info!(
                request = name,
                signer = wanted.signer,
                "a certificate is asked for"
            );
            name
        }
        Err(kube::Error::Api(status)) if status.code == 409 && wanted.name.is_some() => {
            wanted.name.clone().unwrap_or_default()
        }
        Err(error) => return Err(CsrError::Api(error)),
    };
    tokio::time::timeout(patience, signed(&api, &name))
        .await
        .unwrap_or(Err(CsrError::Unsigned(name)))
}

async fn signed(api: &Api<CertificateSigningRequest>, name: &str) -> Result<String, CsrError> {
    loop {
        let shown = answered(api.get(name)).await.map_err(CsrError::Api)?;
        if let Some(outcome) = outcome(name, &shown) {
            return outcome;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// None: nobody has decided or signed it yet.
fn outcome(name: &str, request: &CertificateSigningRequest) -> Option<Result<String, CsrError>> {
    let status = request.status.as_ref()?;
    let refusal = status
        .conditions
        .iter()
        .flatten()
        .find(|c| matches!(c.type_.as_str(), "Denied" | "Failed") && c.status == "True");
    if let Some(condition) = refusal {
        return Some(Err(CsrError::Refused {
            name: name.to_owned(),
            verdict: condition.type_.to_lowercase(),
            message: condition.message.clone().unwrap_or_default(),
        }));
    }
    let ByteString(pem) = status.certificate.clone()?;
    Some(String::from_utf8(pem).map_err(|_| CsrError::Text))
}

async fn answered<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(elapsed.into())),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestStatus,
    };

    use super::*;

    fn shown(condition: Option<&str>, certificate: Option<&[u8]>) -> CertificateSigningRequest {
        CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                certificate: certificate.map(|pem| ByteString(pem.to_vec())),
                conditions: condition.map(|kind| {
                    vec![CertificateSigningRequestCondition {
                        type_: kind.into(),
                        status: "True".into(),
                        message: Some("as the test has it".into()),
                        ..CertificateSigningRequestCondition::default()
                    }]
                }),
            }),
            ..CertificateSigningRequest::default()
        }
    }

    #[test]
    fn a_request_is_waited_for_until_it_is_signed_or_refused() {
        assert!(outcome("r", &CertificateSigningRequest::default()).is_none());
        assert!(
            outcome("r", &shown(Some("Approved"), None)).is_none(),
            "approved is not signed"
        );
        let signed = outcome("r", &shown(Some("Approved"), Some(b"chain"))).unwrap();
        assert_eq!(signed.unwrap(), "chain");
        for (kind, verdict) in [("Denied", "denied"), ("Failed", "failed")] {
            let refused = outcome("r", &shown(Some(kind), None)).unwrap().unwrap_err();
            assert_eq!(
                refused.to_string(),
                format!("the request r was {verdict}: as the test has it")
            );
        }
        let garbage = outcome("r", &shown(None, Some(&[0xff]))).unwrap();
        assert!(matches!(garbage, Err(CsrError::Text)));
    }

    #[test]
    fn a_request_says_what_is_wanted_and_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let named = Wanted {
            signer: "example.com/signer",
            name: Some("mine".into()),
            usages: &["client auth"],
            common_name: "somebody".into(),
            ..Wanted::default()
        };
        let made = request(&named, &key).unwrap();
        assert_eq!(made.metadata.name.as_deref(), Some("mine"));
        assert_eq!(made.metadata.generate_name, None);
        assert_eq!(made.spec.signer_name, "example.com/signer");
        assert_eq!(made.spec.usages, Some(vec!["client auth".to_owned()]));
        let nameless = Wanted { name: None, ..named };
        let made = request(&nameless, &key).unwrap();
        assert_eq!(made.metadata.generate_name.as_deref(), Some("csr-"));
    }
}
