//! Where each pod runs, as the rest of the process reads it.

use std::collections::BTreeMap;

use pool_agent_api::{Attempt, HostName, Namespace, PodName, PodUid, ServiceAccountName};

/// One pod's current placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub host: HostName,
    pub attempt: Attempt,
    pub namespace: Namespace,
    pub name: PodName,
    pub service_account: ServiceAccountName,
    /// False for a pod that opted out: it has no identity.
    pub enrolled: bool,
}

/// A snapshot of all placements, published through a `tokio::sync::watch`.
pub type Placements = BTreeMap<PodUid, Placement>;
