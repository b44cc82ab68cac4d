//! One tenant of this host, open: its router's redirection and its proxy over
//! the same listeners.

use std::{
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

/// How long to wait before Service addresses that the kernel refused are tried
/// again.
const RETRY_SERVICES: Duration = Duration::from_secs(5);

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
    _services: AbortOnDropHandle<()>,
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
        let services = follow_services(id.clone(), Arc::clone(&router), proxy.service_addresses());
        Ok(Self {
            tenant: tenant.clone(),
            inode,
            uplink: uplink.to_owned(),
            router,
            proxy,
            _services: AbortOnDropHandle::new(tokio::spawn(services)),
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

/// Tells the kernel the tenant's Service addresses, whenever they change.
async fn follow_services(
    tenant: TenantId,
    router: Arc<Router>,
    mut services: tokio::sync::watch::Receiver<Arc<std::collections::BTreeSet<Ipv4Addr>>>,
) {
    services.mark_changed();
    while services.changed().await.is_ok() {
        let addresses = Arc::clone(&services.borrow_and_update());
        if let Err(error) = router.set_services(addresses.iter().copied()).await {
            if matches!(error, RouterError::Closed) {
                return;
            }
            tracing::warn!(
                %tenant,
                error = &error as &dyn std::error::Error,
                "cannot tell the kernel the Services' addresses"
            );
            tokio::time::sleep(RETRY_SERVICES).await;
            services.mark_changed();
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
