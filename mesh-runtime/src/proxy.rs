//! The proxy of one tenant on this host: the data path of its pods.
//!
//! `runtime` starts one for each tenant, when the router's namespace and its
//! listeners stand, and adds and removes pods as sandboxes come and go. What
//! the listeners accept was put there by `redirect`; from then on a connection
//! belongs to one task here until both of its ends are closed.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use mesh_api::{Identity, InvalidIdentity};
use pool_agent_api::{HostName, SandboxKey, Tenant};
use tokio::sync::watch;

use crate::{
    control::{OpenControlError, PoolTls},
    identity::CertificateState,
    netns::Netns,
    pod::PodRecord,
    redirect::Listeners,
    telemetry::Metrics,
};

pub struct TenantProxyConfig {
    pub tenant: Tenant,
    /// This host, as the mesh control plane knows it.
    pub host: HostName,
    /// Addresses of the host and of the tenant's router. Pods may not reach
    /// them through the proxy, which stands where they are local.
    pub host_addresses: Vec<IpAddr>,
    /// The tenant router's namespace: upstream sockets are made here.
    pub router: Netns,
    pub listeners: Listeners,
    /// The host's credentials towards the tenant's mesh control plane.
    pub pool_tls: Arc<PoolTls>,
    /// Shared by all tenants of the process.
    pub metrics: Arc<Metrics>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartProxyError {
    #[error(transparent)]
    Control(#[from] OpenControlError),
    #[error("cannot take over the {name} listener")]
    Listener {
        name: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// A running proxy. Dropping it cuts every connection; [`TenantProxy::shutdown`]
/// lets them end first.
pub struct TenantProxy {
    tenant: Tenant,
    pods: std::sync::Mutex<std::collections::HashMap<SandboxKey, PodRecord>>,
    synced: watch::Sender<bool>,
    services: watch::Sender<Arc<BTreeSet<Ipv4Addr>>>,
}

impl TenantProxy {
    /// Takes the listeners into the current tokio runtime and begins to serve:
    /// accept loops, state and certificates from the control plane, DNS.
    pub fn start(config: TenantProxyConfig) -> Result<Self, StartProxyError> {
        let _channel = crate::control::connect(&config.tenant, &config.pool_tls)?;
        Ok(Self {
            tenant: config.tenant,
            pods: Default::default(),
            synced: watch::Sender::new(false),
            services: watch::Sender::default(),
        })
    }

    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// Serves the pod's connections from now on, and asks for its certificate.
    /// Idempotent. To be called before the pod's first packet is redirected:
    /// the connection of a pod that is not known here is reset.
    ///
    /// The state of its certificate is in the answer; None for an unmeshed pod.
    pub fn add_pod(
        &self,
        pod: PodRecord,
    ) -> Result<Option<watch::Receiver<CertificateState>>, InvalidIdentity> {
        let identity = pod.identity(&self.tenant.mesh_control.trust_domain)?;
        self.pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(pod.key.clone(), pod);
        Ok(Some(self.identified(&identity)))
    }

    /// The certificate of an identity of this host's pods; it stays `Pending`
    /// for one that no pod has.
    pub fn identified(&self, _identity: &Identity) -> watch::Receiver<CertificateState> {
        watch::Sender::new(CertificateState::Pending).subscribe()
    }

    /// Whether the control plane's first snapshot of workloads and services is
    /// here. It stays true through disconnects: stale state beats none.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// The IPv4 addresses of all Services of the tenant, again whenever they
    /// change: `runtime` gives them to the kernel, so that unmeshed pods' TCP to
    /// them comes to the outbound listener too.
    pub fn service_addresses(&self) -> watch::Receiver<Arc<BTreeSet<Ipv4Addr>>> {
        self.services.subscribe()
    }

    /// Takes no new connection of the pod or to it, tells its tunnels so
    /// (GOAWAY), and cuts what still lives after `drain`. Returns when nothing
    /// of the pod is left.
    pub async fn remove_pod(&self, key: &SandboxKey, _drain: Duration) {
        self.pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .remove(key);
    }

    /// The same for all pods, then ends the proxy's tasks.
    pub async fn shutdown(self, drain: Duration) {
        let keys: Vec<_> = self
            .pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .keys()
            .cloned()
            .collect();
        for key in keys {
            self.remove_pod(&key, drain).await;
        }
    }
}
