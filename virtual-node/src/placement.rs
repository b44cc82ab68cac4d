//! Where each pod runs, as the rest of the process reads it.

use std::collections::{BTreeMap, BTreeSet};

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
///
/// A placement is published before `StartSandbox` is called for it: the agent
/// asks for the pod's certificate as soon as it has accepted the sandbox, and the
/// certificate broker looks here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placements {
    pub pods: BTreeMap<PodUid, Placement>,
    /// Hosts whose agents have told what they run since this process started.
    /// Of any other host, absent is not gone.
    pub known_hosts: BTreeSet<HostName>,
}
