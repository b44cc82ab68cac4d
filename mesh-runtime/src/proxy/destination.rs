//! What a captured connection is for. Pure.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    off_limits::{self, OffLimits, Refused},
    state::{ServiceView, Snapshot, Workload},
};

/// What of the tenant's network does not change while the proxy runs.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// Istio's name of it; empty for the default.
    pub(crate) name: Arc<str>,
    /// Of all pods of the tenant's virtual node.
    pub(crate) cluster_pods: IpNet,
    /// Addresses of the host and the router. The proxy stands where they are
    /// local, so dialling them for a pod would open the host's own services.
    pub(crate) host: Box<[IpAddr]>,
    /// Whose addresses are whose in the pool, as its operator says.
    pub(crate) off_limits: Arc<OffLimits>,
}

#[derive(Debug)]
pub(crate) enum Destination<'a> {
    Service(&'a ServiceView),
    Workload(&'a Arc<Workload>),
    /// In a range of pods, but not known, or not yet. Never dialled as it is:
    /// between pods there is nothing but the mesh.
    UnknownPod,
    /// Outside the mesh: TCP as it is.
    Outside,
    Refused(Refused),
}

/// As a client in `namespace` sees it: a service's address before a pod's.
pub(crate) fn resolve<'a>(
    network: &Network,
    state: &'a Snapshot,
    namespace: &str,
    destination: SocketAddr,
) -> Destination<'a> {
    let ip = destination.ip().to_canonical();
    if let Some(refused) = off_limits::refuse(&network.host, ip) {
        return Destination::Refused(refused);
    }
    if let Some(view) = state.service_at(&network.name, ip, namespace) {
        return Destination::Service(view);
    }
    if let Some(workload) = state.workload_at(&network.name, ip) {
        return Destination::Workload(workload);
    }
    if network.cluster_pods.contains(&ip) || network.off_limits.is_pods(ip) {
        Destination::UnknownPod
    } else {
        Destination::Outside
    }
}

/// Whether `to` must not be dialled, whosever it is said to be. Endpoints are the
/// tenant's say: an EndpointSlice may name 127.0.0.1, or another host's agent.
pub(crate) fn refuse(network: &Network, to: SocketAddr) -> Option<Refused> {
    off_limits::refuse(&network.host, to.ip()).or_else(|| network.off_limits.refuse(to))
}

#[cfg(test)]
mod tests;
