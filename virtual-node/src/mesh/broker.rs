//! Who gets a certificate: `IstioCertificateService`, as istiod serves it, for the
//! hosts of the pool.
//!
//! What always holds: a host is granted an identity only while an enrolled pod with
//! that service account is placed on it, in its current attempt or in the other one of a
//! handover. So a host that was
//! taken over has the identities of the pods it runs, and no others. A refusal names
//! the host and the identity, and is logged once.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_api::{
    Identity,
    istio::certificate::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::IstioCertificateService,
    },
};
use pool_agent_api::HostName;
use prost_types::{Struct, value::Kind};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{
    ca::Authority,
    csr::Csr,
    listener::PeerHost,
    metrics::{Metrics, Outcome},
    rate::Rates,
};
use crate::placement::Placements;

/// Istio's metadata key: the identity that is asked for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// Why a well-formed request is not granted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("host {host} asked for {identity}: not of the trust domain {trust_domain:?}")]
    TrustDomain {
        host: HostName,
        identity: Identity,
        trust_domain: String,
    },
    #[error("host {host} asked for {identity} but its metadata says {named:?}")]
    Metadata {
        host: HostName,
        identity: Identity,
        named: String,
    },
    #[error("host {host} asked for {identity}: no enrolled pod of that identity is placed on it")]
    NotPlaced { host: HostName, identity: Identity },
    /// Absent is not gone: ask again.
    #[error("host {host} asked for {identity}: not all placements are known yet")]
    NotKnown { host: HostName, identity: Identity },
}

/// The decision. `named` is what the request's metadata says is asked for.
pub fn decide(
    host: &HostName,
    identity: &Identity,
    named: Option<&str>,
    trust_domain: &str,
    placements: &Placements,
) -> Result<(), Refusal> {
    let (host, identity) = (host.clone(), identity.clone());
    if let Some(named) = named
        && named != identity.to_string()
    {
        return Err(Refusal::Metadata {
            // A host may write anything there.
            named: named.chars().take(256).collect(),
            host,
            identity,
        });
    }
    if identity.trust_domain() != trust_domain {
        return Err(Refusal::TrustDomain {
            host,
            identity,
            trust_domain: trust_domain.to_owned(),
        });
    }
    let placed = placements
        .pods
        .values()
        .chain(placements.beside.values())
        .any(|pod| {
            pod.enrolled
                && pod.host == host
                && pod.namespace.as_str() == identity.namespace()
                && pod.service_account.as_str() == identity.service_account()
        });
    if placed {
        Ok(())
    } else if placements.complete {
        Err(Refusal::NotPlaced { host, identity })
    } else {
        Err(Refusal::NotKnown { host, identity })
    }
}

/// The service.
pub struct Broker {
    authority: Authority,
    trust_domain: String,
    placements: watch::Receiver<Arc<Placements>>,
    rates: Mutex<Rates>,
    metrics: Arc<Metrics>,
}

impl Broker {
    pub fn new(
        authority: Authority,
        trust_domain: String,
        placements: watch::Receiver<Arc<Placements>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            authority,
            trust_domain,
            placements,
            rates: Mutex::default(),
            metrics,
        }
    }

    fn refuse(
        &self,
        host: &HostName,
        identity: Option<&Identity>,
        outcome: Outcome,
        status: Status,
    ) -> Status {
        let identity = identity.map(Identity::to_string).unwrap_or_default();
        let reason = status.message();
        match outcome {
            Outcome::Retry => tracing::info!(%host, identity, reason, "CSR put off"),
            _ => tracing::warn!(%host, identity, reason, "CSR refused"),
        }
        self.metrics.certificate(outcome);
        status
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Broker {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let Some(PeerHost(host)) = request.extensions().get().cloned() else {
            return Err(Status::unauthenticated(
                "the connection has no host's certificate",
            ));
        };
        let request = request.into_inner();
        let allowed = self
            .rates
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(&host, Instant::now());
        if !allowed {
            let status = Status::resource_exhausted(format!("host {host} asks for too many certificates"));
            return Err(self.refuse(&host, None, Outcome::Refused, status));
        }
        let csr = Csr::parse(&request.csr).map_err(|error| {
            let status = Status::invalid_argument(with_source(&error));
            self.refuse(&host, None, Outcome::Refused, status)
        })?;
        let named = request.metadata.as_ref().and_then(named);
        let decision = decide(
            &host,
            &csr.identity,
            named,
            &self.trust_domain,
            &self.placements.borrow(),
        );
        if let Err(refusal) = decision {
            let (outcome, status) = match &refusal {
                Refusal::NotKnown { .. } => (Outcome::Retry, Status::unavailable(refusal.to_string())),
                _ => (Outcome::Refused, Status::permission_denied(refusal.to_string())),
            };
            return Err(self.refuse(&host, Some(&csr.identity), outcome, status));
        }
        let ttl = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
        let cert_chain = self
            .authority
            .sign(&csr, ttl, SystemTime::now())
            .map_err(|error| {
                tracing::error!(%host, error = with_source(&error), "certificate not signed");
                self.metrics.certificate(Outcome::Failed);
                Status::internal(error.to_string())
            })?;
        tracing::debug!(%host, identity = %csr.identity, "certificate signed");
        self.metrics.certificate(Outcome::Signed);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The identity that the metadata names. A value that is no text names nothing that
/// any CSR could ask for.
fn named(metadata: &Struct) -> Option<&str> {
    match &metadata.fields.get(IMPERSONATED)?.kind {
        Some(Kind::StringValue(named)) => Some(named),
        _ => Some(""),
    }
}

/// The message and its cause on one line, for a peer that sees only this.
fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
