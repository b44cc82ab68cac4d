//! A claim as it stands in the cell: what it claims, and what became of it.

use std::{net::SocketAddr, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{HostName, Resources};

use super::{Claim, ClaimPhase, NotAClaim, shape};
use crate::{lapse, names};

/// A claim that is in the cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub claim: Claim,
    /// Of the Pod in the cell, not of the tenant's.
    pub uid: String,
    pub resource_version: String,
    /// The host it is bound to; None while the scheduler looks for one.
    pub host: Option<HostName>,
    /// What the cell's RuntimeClass adds to the requests.
    pub overhead: Resources,
    pub phase: ClaimPhase,
    pub reason: String,
    pub message: String,
    /// Where the host's agent serves; None until it has seen the claim.
    pub agent: Option<SocketAddr>,
    /// When the cell last said that its host's Lease has lapsed, while it was being
    /// deleted.
    pub lapsed: Option<Timestamp>,
    /// Somebody has deleted it.
    pub deletion: Option<Deletion>,
}

/// Notice that a claim ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deletion {
    /// When the grace is over.
    pub deadline: Timestamp,
    /// The whole of it.
    pub grace: Duration,
}

impl Deletion {
    /// None of a Pod that nobody has deleted.
    pub fn read(pod: &Pod) -> Option<Self> {
        let meta = &pod.metadata;
        meta.deletion_timestamp.as_ref().map(|at| Self {
            // The API server has counted the grace in already.
            deadline: at.0,
            grace: meta
                .deletion_grace_period_seconds
                .and_then(|s| u64::try_from(s).ok())
                .map(Duration::from_secs)
                .unwrap_or_default(),
        })
    }
}

impl Placed {
    pub fn parse(pod: &Pod) -> Result<Self, NotAClaim> {
        let claim = Claim::parse(pod)?;
        let missing = |field: &str| NotAClaim {
            field: field.to_owned(),
            problem: "is missing".into(),
        };
        let meta = &pod.metadata;
        let spec = pod.spec.as_ref().ok_or_else(|| missing("spec"))?;
        let host = match &spec.node_name {
            Some(name) => Some(HostName::parse("spec.nodeName", name.as_str())?),
            None => None,
        };
        let overhead = match &spec.overhead {
            Some(overhead) => shape::amounts("spec.overhead", overhead)?,
            None => Resources::default(),
        };
        let lapsed = lapse::statement(pod);
        let status = pod.status.clone().unwrap_or_default();

        Ok(Self {
            claim,
            uid: meta.uid.clone().ok_or_else(|| missing("metadata.uid"))?,
            resource_version: meta.resource_version.clone().unwrap_or_default(),
            host,
            overhead,
            phase: ClaimPhase::read(status.phase.as_deref()),
            reason: status.reason.unwrap_or_default(),
            message: status.message.unwrap_or_default(),
            // What does not read was not written by an agent of this pool.
            agent: meta
                .annotations
                .as_ref()
                .and_then(|a| a.get(names::AGENT)?.parse().ok()),
            lapsed,
            deletion: Deletion::read(pod),
        })
    }

    /// What the sandbox may use in all: requests and overhead.
    pub fn room(&self) -> Resources {
        self.claim.requests.saturating_add(self.overhead)
    }
}
