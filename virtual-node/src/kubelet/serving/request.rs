//! Asks the cluster for a serving certificate: a CertificateSigningRequest for
//! the signer `kubernetes.io/kubelet-serving`, which somebody approves
//! (`kubectl certificate approve`), renewed before it expires.

use std::{net::IpAddr, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use rand::RngExt;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tracing::{info, warn};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The signer's own name in Kubernetes.
const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// A request is looked at this often while nobody has approved it.
const POLL: Duration = Duration::from_secs(2);
/// A request that nobody approved by then is made anew.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("cannot make a key and a request")]
    Make(#[from] rcgen::Error),
    #[error("the API server did not take the request, or does not show it")]
    Api(#[from] kube::Error),
    #[error("request {name} was {verdict}: {message}")]
    Refused {
        name: String,
        verdict: String,
        message: String,
    },
    #[error("request {name} was not approved within {} min", PATIENCE.as_secs() / 60)]
    Unapproved { name: String },
    #[error("what was signed is not a PEM certificate")]
    Pem(#[source] rustls_pki_types::pem::Error),
    #[error("what was signed has no readable end")]
    Unreadable,
    #[error("what was signed does not fit the key")]
    Unfit(#[source] rustls::Error),
}

pub(crate) struct Requester {
    client: Client,
    node_name: String,
    address: IpAddr,
}

impl Requester {
    pub(crate) fn new(client: Client, node_name: &str, address: IpAddr) -> Self {
        Self {
            client,
            node_name: node_name.to_owned(),
            address,
        }
    }

    /// Hands each signed certificate to `take`, a new one well before the old ends.
    pub(super) async fn keep(&self, take: impl Fn(CertifiedKey)) {
        let backoff = ExponentialBuilder::new()
            .with_min_delay(Duration::from_secs(1))
            .with_max_delay(Duration::from_secs(60))
            .with_jitter()
            .without_max_times();
        let mut delays = backoff.build();
        loop {
            let wait = match self.obtain().await {
                Ok((certificate, ends)) => {
                    take(certificate);
                    delays = backoff.build();
                    let renew = renewal(Timestamp::now(), ends, rand::rng().random_range(0.7..0.9));
                    info!(%ends, "kubelet API's certificate signed");
                    renew
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, "no serving certificate for the kubelet API yet");
                    delays.next().unwrap_or(Duration::from_secs(60))
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn obtain(&self) -> Result<(CertifiedKey, Timestamp), RequestError> {
        let (chain, key) = self.signed().await?;
        pair(&chain, &key)
    }

    /// A signed chain, PEM, and its key.
    pub(crate) async fn signed(&self) -> Result<(Vec<u8>, KeyPair), RequestError> {
        let key = KeyPair::generate()?;
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let made = api.create(&PostParams::default(), &self.request(&key)?).await?;
        let name = made.metadata.name.unwrap_or_default();
        info!(
            request = name,
            "serving certificate asked for: approve it with kubectl certificate approve"
        );
        let polling = async {
            loop {
                // Not its status: a node may read the request and no part of it.
                let status = api.get(&name).await?.status.unwrap_or_default();
                let refusal = status
                    .conditions
                    .iter()
                    .flatten()
                    .find(|c| matches!(c.type_.as_str(), "Denied" | "Failed") && c.status == "True");
                if let Some(condition) = refusal {
                    return Err(RequestError::Refused {
                        name: name.clone(),
                        verdict: condition.type_.to_lowercase(),
                        message: condition.message.clone().unwrap_or_default(),
                    });
                }
                if let Some(ByteString(pem)) = status.certificate {
                    return Ok(pem);
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let pem = tokio::time::timeout(PATIENCE, polling)
            .await
            .map_err(|_| RequestError::Unapproved { name: name.clone() })??;
        Ok((pem, key))
    }

    /// Subject and names as the signer demands them: anything else it refuses.
    fn request(&self, key: &KeyPair) -> Result<CertificateSigningRequest, RequestError> {
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, format!("system:node:{}", self.node_name));
        let mut parameters = CertificateParams::new(vec![self.node_name.clone()])?;
        parameters
            .subject_alt_names
            .push(SanType::IpAddress(self.address));
        parameters.distinguished_name = subject;
        let request = parameters.serialize_request(key)?.pem()?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta {
                generate_name: Some("csr-".into()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.into_bytes()),
                signer_name: SIGNER.into(),
                usages: Some(vec!["digital signature".into(), "server auth".into()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        })
    }
}

/// The chain and its key as TLS uses them, and when the certificate ends.
pub(crate) fn pair(pem: &[u8], key: &KeyPair) -> Result<(CertifiedKey, Timestamp), RequestError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(RequestError::Pem)?;
    let leaf = chain.first().ok_or(RequestError::Unreadable)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| RequestError::Unreadable)?;
    let ends = Timestamp::from_second(parsed.validity().not_after.timestamp())
        .map_err(|_| RequestError::Unreadable)?;
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let certified = CertifiedKey::from_der(chain, private, &aws_lc_rs::default_provider())
        .map_err(RequestError::Unfit)?;
    Ok((certified, ends))
}

/// How long to wait before asking again: a share of what is left, so that many
/// nodes do not ask at once; never at once, never for over a month.
fn renewal(now: Timestamp, ends: Timestamp, share: f64) -> Duration {
    let left = Duration::try_from(ends.duration_since(now)).unwrap_or_default();
    left.mul_f64(share)
        .clamp(Duration::from_secs(60), Duration::from_secs(30 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_before_it_ends() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let in_seconds = |s: i64| Timestamp::from_second(1_000_000 + s).unwrap();
        assert_eq!(renewal(now, in_seconds(10_000), 0.8), Duration::from_secs(8_000));
        assert_eq!(renewal(now, in_seconds(-5), 0.8), Duration::from_secs(60));
        assert_eq!(
            renewal(now, in_seconds(10 * 365 * 24 * 3600), 0.8),
            Duration::from_secs(30 * 24 * 3600)
        );
    }
}
