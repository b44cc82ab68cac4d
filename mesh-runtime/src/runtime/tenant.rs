//! One tenant of this host, open: its router's redirection and its proxy over
//! the same listeners.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr},
    os::linux::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};
use pool_agent_api::{Tenant, TenantId};
use tokio_util::task::AbortOnDropHandle;

use super::MeshRuntime;
use crate::{
    netns::Netns,
    off_limits,
    proxy::{StartProxyError, TenantProxy, TenantProxyConfig},
    redirect::{Router, RouterConfig, RouterError},
};

/// How long to wait before addresses that the kernel refused are tried again.
const RETRY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum OpenTenantError {
    #[error("cannot open {router} as the router of tenant {tenant}")]
    Netns {
        tenant: TenantId,
        router: String,
        source: io::Error,
    },
    #[error("{field} of tenant {tenant} is IPv6, which is not supported yet")]
    Ipv6 { tenant: TenantId, field: &'static str },
    #[error("cannot list the host's addresses")]
    Addresses { source: io::Error },
    #[error("cannot set up redirection in the router of tenant {tenant}")]
    Router { tenant: TenantId, source: RouterError },
    #[error("cannot start the proxy of tenant {tenant}")]
    Proxy {
        tenant: TenantId,
        source: StartProxyError,
    },
    #[error("tenant {tenant} is open with another {what}: close it first")]
    Changed { tenant: TenantId, what: &'static str },
}

pub(super) struct OpenTenant {
    tenant: Tenant,
    /// Of the namespace's file: tells a router from another of the same name.
    inode: u64,
    uplink: String,
    pub(super) router: Arc<Router>,
    pub(super) proxy: TenantProxy,
    _addresses: [AbortOnDropHandle<()>; 2],
}

impl OpenTenant {
    pub(super) async fn open(
        runtime: &MeshRuntime,
        tenant: &Tenant,
        path: &Path,
        uplink: &str,
    ) -> Result<Self, OpenTenantError> {
        let id = &tenant.id;
        let netns_error = |source| OpenTenantError::Netns {
            tenant: id.clone(),
            router: path.display().to_string(),
            source,
        };
        let cluster_pods = ipv4(id, "cluster_pod_range", tenant.cluster_pod_range)?;
        let local_pods = runtime.local_pods;
        let IpAddr::V4(dns) = tenant.dns_address else {
            return Err(OpenTenantError::Ipv6 {
                tenant: id.clone(),
                field: "dns_address",
            });
        };

        let inode = inode(path).map_err(netns_error)?;
        let netns = Netns::open(path).map_err(netns_error)?;
        let host_addresses =
            off_limits::host_addresses(&netns).map_err(|source| OpenTenantError::Addresses { source })?;

        let (router, listeners) = Router::open(RouterConfig {
            router: netns.clone(),
            uplink: uplink.to_owned(),
            bpffs: runtime.bpffs.clone(),
            tenant: id.to_string(),
            cluster_pods,
            local_pods,
            dns,
            host_addresses: host_addresses.iter().filter_map(only_ipv4).collect(),
            off_limits: Arc::clone(&runtime.off_limits),
        })
        .await
        .map_err(|source| OpenTenantError::Router {
            tenant: id.clone(),
            source,
        })?;
        let router = Arc::new(router);
        runtime.metrics.watch_drops(id, router.drops());

        let proxy = TenantProxy::start(TenantProxyConfig {
            tenant: tenant.clone(),
            host: runtime.host.clone(),
            local_pods,
            off_limits: Arc::clone(&runtime.off_limits),
            host_addresses,
            router: netns,
            listeners,
            pool_tls: Arc::clone(&runtime.pool_tls),
            metrics: Arc::clone(&runtime.traffic),
            shares: Arc::clone(&runtime.shares),
        })
        .map_err(|source| OpenTenantError::Proxy {
            tenant: id.clone(),
            source,
        })?;
        let services = follow(id.clone(), "Services", proxy.service_addresses(), {
            let router = Arc::clone(&router);
            async move |addresses: &BTreeSet<Ipv4Addr>| router.set_services(addresses.iter().copied()).await
        });
        let limits = Arc::clone(&runtime.off_limits);
        let workloads = follow(id.clone(), "workloads", proxy.workload_addresses(), {
            let router = Arc::clone(&router);
            // What the tenant says of addresses that are not the pool's opens nothing, and
            // would only take room.
            async move |addresses: &BTreeSet<Ipv4Addr>| {
                let pods = addresses.iter().copied().filter(|a| limits.is_pods((*a).into()));
                router.set_workloads(pods).await
            }
        });
        Ok(Self {
            tenant: tenant.clone(),
            inode,
            uplink: uplink.to_owned(),
            router,
            proxy,
            _addresses: [tokio::spawn(services), tokio::spawn(workloads)].map(AbortOnDropHandle::new),
        })
    }

    /// Whether it is open with just these settings.
    pub(super) fn check_same(
        &self,
        tenant: &Tenant,
        path: &Path,
        uplink: &str,
    ) -> Result<(), OpenTenantError> {
        let inode = inode(path).map_err(|source| OpenTenantError::Netns {
            tenant: tenant.id.clone(),
            router: path.display().to_string(),
            source,
        })?;
        let what = if self.inode != inode {
            "router"
        } else if self.uplink != uplink {
            "uplink"
        } else if self.tenant != *tenant {
            "configuration"
        } else {
            return Ok(());
        };
        Err(OpenTenantError::Changed {
            tenant: tenant.id.clone(),
            what,
        })
    }

    pub(super) async fn close(self) -> Result<(), RouterError> {
        let Self { router, proxy, .. } = self;
        proxy.shutdown(Duration::ZERO).await;
        router.close().await
    }
}

/// Tells the kernel the addresses of the tenant's Services, or workloads, whenever they
/// change.
async fn follow(
    tenant: TenantId,
    of: &'static str,
    mut told: tokio::sync::watch::Receiver<Arc<BTreeSet<Ipv4Addr>>>,
    tell: impl AsyncFn(&BTreeSet<Ipv4Addr>) -> Result<(), RouterError>,
) {
    told.mark_changed();
    while told.changed().await.is_ok() {
        let addresses = Arc::clone(&told.borrow_and_update());
        if let Err(error) = tell(&addresses).await {
            if matches!(error, RouterError::Closed) {
                return;
            }
            tracing::warn!(
                %tenant,
                of,
                error = &error as &dyn std::error::Error,
                "cannot tell the kernel the addresses"
            );
            tokio::time::sleep(RETRY).await;
            told.mark_changed();
        }
    }
}

fn ipv4(tenant: &TenantId, field: &'static str, net: IpNet) -> Result<Ipv4Net, OpenTenantError> {
    match net {
        IpNet::V4(net) => Ok(net),
        IpNet::V6(_) => Err(OpenTenantError::Ipv6 {
            tenant: tenant.clone(),
            field,
        }),
    }
}

fn inode(path: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(path)?.st_ino())
}

fn only_ipv4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}
