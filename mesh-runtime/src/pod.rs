//! One pod of this host as the mesh knows it. Made by the agent's sandbox
//! driver, read by `redirect` (addresses and mode) and `proxy` (identity).

use std::net::Ipv4Addr;

use mesh_api::{Identity, InvalidIdentity};
use pool_agent_api::{Namespace, PodName, SandboxKey, ServiceAccountName, TenantId};

/// Whether a pod is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// All its TCP goes through the proxy, under its own identity.
    Enrolled,
    /// It opted out (`istio.io/dataplane-mode=none`): it has no identity and
    /// its traffic passes, still anti-spoofed. Cluster DNS and Service
    /// addresses, which only the proxy can serve, work all the same.
    Unmeshed,
}

/// What holds for a pod as long as its sandbox lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    pub key: SandboxKey,
    pub tenant: TenantId,
    pub namespace: Namespace,
    pub name: PodName,
    pub service_account: ServiceAccountName,
    /// The pod's only address. One of another attempt of the same pod differs.
    pub address: Ipv4Addr,
    pub mode: Mode,
}

impl PodRecord {
    /// The pod's identity in `trust_domain`. An unmeshed pod must not be given it.
    pub fn identity(&self, trust_domain: &str) -> Result<Identity, InvalidIdentity> {
        Identity::new(
            trust_domain,
            self.namespace.as_str(),
            self.service_account.as_str(),
        )
    }
}
