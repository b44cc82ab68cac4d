//! What `pool-agent` holds of the mesh: the tenants of this host, and the
//! attachments of their pods.
//!
//! Joins `redirect` (the kernel's part) and `proxy` (the connections' part). For
//! a tenant it opens both over the same listeners (`tenant`); for a pod, one
//! task carries out what `attachment` orders and from then on follows the pod's
//! certificate (`drive`).
//!
//! What always holds:
//! - dropping a [`MeshRuntime`], or the process' death, takes nothing out of the
//!   kernel: pods' new connections are dropped until the next one takes over;
//! - an older attempt never takes the place of a newer one.

mod drive;
mod metrics;
mod tenant;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bounds::Bounds;
use ipnet::Ipv4Net;
use mesh_api::InvalidIdentity;
use pool_agent_api::{Attempt, HostName, SandboxKey, Tenant, TenantId};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::tenant::OpenTenantError;
use self::{drive::Drain, metrics::RuntimeMetrics, tenant::OpenTenant};
use crate::{
    attachment::AttachmentState,
    control::{InvalidPoolTls, PoolTls},
    limits::{Limits, Shares},
    off_limits::OffLimits,
    pod::PodRecord,
    redirect::{Deadline, Device, Router, RouterError},
    telemetry::{Carried, Metrics},
};

/// What holds for the whole host.
pub struct Config {
    /// This host, as its certificate in the pool names it.
    pub host: HostName,
    /// A mounted BPF file system, or a directory of one; this host's alone.
    pub bpffs: PathBuf,
    /// The range that this host's pods have their addresses of, all tenants' alike.
    pub local_pods: Ipv4Net,
    /// Whose addresses are whose in the pool.
    pub off_limits: Arc<OffLimits>,
    /// The host's credentials towards tenants' mesh control planes.
    pub pool_tls: PoolTls,
    /// What pods, peers and tenants may hold of it.
    pub limits: Limits,
}

/// A pod to be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAttachment {
    pub pod: PodRecord,
    /// Name, in the tenant's router, of the host side of its device.
    pub device: String,
    /// Of the pod's side: the source of every frame it may send.
    pub mac: [u8; 6],
    /// Until when it may send and be sent to, unless it is attached already: then what
    /// stands in the kernel stays. [`MeshRuntime::set_deadlines`] moves it.
    pub deadline: Deadline,
}

/// An attached pod. Cheap to clone; dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct Attachment {
    key: SandboxKey,
    state: watch::Receiver<AttachmentState>,
    carried: Arc<Carried>,
}

impl Attachment {
    pub fn key(&self) -> &SandboxKey {
        &self.key
    }

    /// What the mesh carried for the pod. Counts on while connections drain, and stays
    /// readable when the pod is detached.
    pub fn carried(&self) -> Arc<Carried> {
        self.carried.clone()
    }

    /// How far it is. No container may start before it is `Serving`. Closed
    /// once the pod is detached.
    pub fn state(&self) -> watch::Receiver<AttachmentState> {
        self.state.clone()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("tenant {tenant} is not open on this host")]
    NoTenant { tenant: TenantId },
    #[error("attempt {attempt} of pod {pod} is fenced by attempt {newer}", pod = key.pod, attempt = key.attempt)]
    Fenced { key: SandboxKey, newer: Attempt },
    #[error("sandbox {key} is attached already, with another address, device or account")]
    Conflict { key: SandboxKey },
    #[error("sandbox {key} is being detached")]
    Draining { key: SandboxKey },
    #[error("sandbox {key} cannot have an identity")]
    Identity {
        key: SandboxKey,
        source: InvalidIdentity,
    },
    #[error("cannot redirect sandbox {key}")]
    Redirect { key: SandboxKey, source: RouterError },
    /// Another caller's attempt to attach it failed and told that caller why.
    #[error("sandbox {key} was not attached")]
    Failed { key: SandboxKey },
}

#[derive(Debug, thiserror::Error)]
pub enum CloseTenantError {
    #[error("tenant {tenant} still has pods attached")]
    InUse { tenant: TenantId },
    #[error("cannot take the redirection of tenant {tenant} out of the kernel")]
    Router { tenant: TenantId, source: RouterError },
}

/// See the module.
pub struct MeshRuntime {
    host: HostName,
    bpffs: PathBuf,
    local_pods: Ipv4Net,
    off_limits: Arc<OffLimits>,
    pool_tls: Arc<PoolTls>,
    traffic: Arc<Metrics>,
    metrics: Arc<RuntimeMetrics>,
    shares: Arc<Shares>,
    /// One for each tenant that was ever opened here.
    tenants: Mutex<HashMap<TenantId, Slot>>,
    attached: Arc<Attached>,
}

/// A tenant, if it is open. Held while it is opened or closed, so that this happens once
/// and nobody else waits for it.
type Slot = Arc<tokio::sync::Mutex<Option<Arc<OpenTenant>>>>;

/// The attachments there are. Its tasks hold it weakly: when the runtime is
/// dropped their queues close, and they end without undoing anything.
#[derive(Default)]
struct Attached {
    entries: Mutex<HashMap<SandboxKey, Entry>>,
}

struct Entry {
    wanted: PodAttachment,
    carried: Arc<Carried>,
    drain: mpsc::Sender<Drain>,
    state: watch::Receiver<AttachmentState>,
    router: Arc<Router>,
}

impl Attached {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<SandboxKey, Entry>) -> T) -> T {
        f(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl MeshRuntime {
    /// Nothing is opened yet: what an earlier process left goes on dropping
    /// until [`Self::open_tenant`]. Registers the mesh's metrics.
    pub fn start(config: Config, registry: &mut Registry) -> Self {
        let bounds = Bounds::register(registry.sub_registry_with_prefix("mesh"));
        Self {
            host: config.host,
            bpffs: config.bpffs,
            local_pods: config.local_pods,
            off_limits: config.off_limits,
            pool_tls: Arc::new(config.pool_tls),
            traffic: Arc::new(Metrics::register(registry)),
            metrics: RuntimeMetrics::register(registry),
            shares: Shares::new(config.limits, &bounds),
            tenants: Default::default(),
            attached: Default::default(),
        }
    }

    /// Connections to tenants' control planes show these credentials from now on;
    /// those that stand are left alone.
    pub fn replace_pool_tls(&self, certificate: &[u8], key: &[u8], ca: &[u8]) -> Result<(), InvalidPoolTls> {
        self.pool_tls.replace(certificate, key, ca)
    }

    fn slot(&self, tenant: &TenantId) -> Slot {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        tenants.entry(tenant.clone()).or_default().clone()
    }

    /// Opens the tenant in its router, a network namespace whose device towards
    /// the host is `uplink`; takes over what an earlier process left there. Doing
    /// it again changes nothing.
    pub async fn open_tenant(
        &self,
        tenant: &Tenant,
        router: &Path,
        uplink: &str,
    ) -> Result<(), OpenTenantError> {
        let slot = self.slot(&tenant.id);
        let mut slot = slot.lock().await;
        if let Some(open) = &*slot {
            return open.check_same(tenant, router, uplink);
        }
        *slot = Some(Arc::new(OpenTenant::open(self, tenant, router, uplink).await?));
        tracing::info!(tenant = %tenant.id, "tenant opened");
        Ok(())
    }

    /// Redirects the pod and asks for its certificate. Returns once it is
    /// `Redirected`; what is left shows in [`Attachment::state`]. Doing it again
    /// gives the same attachment; after a restart of the process it takes over
    /// what is there.
    ///
    /// The device must not be up before this returns, unless it was attached
    /// before: a device without the program on it is not classified.
    pub async fn attach(&self, wanted: PodAttachment) -> Result<Attachment, AttachError> {
        let key = wanted.pod.key.clone();
        let no_tenant = || AttachError::NoTenant {
            tenant: wanted.pod.tenant.clone(),
        };
        let slot = {
            let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            tenants.get(&wanted.pod.tenant).cloned()
        };
        let slot = slot.ok_or_else(no_tenant)?;
        let tenant = slot.lock().await.clone().ok_or_else(no_tenant)?;

        let (attachment, attached) = self.attached.with(|entries| {
            if let Some(entry) = entries.get(&key) {
                if !entry.wanted.is_of(&wanted) {
                    return Err(AttachError::Conflict { key: key.clone() });
                }
                return Ok((
                    Attachment {
                        key: key.clone(),
                        state: entry.state.clone(),
                        carried: entry.carried.clone(),
                    },
                    None,
                ));
            }
            let newer = entries
                .keys()
                .filter(|k| k.pod == key.pod)
                .map(|k| k.attempt)
                .max();
            if let Some(newer) = newer.filter(|&newer| newer > key.attempt) {
                return Err(AttachError::Fenced {
                    key: key.clone(),
                    newer,
                });
            }
            let (entry, attached) = drive::start(
                wanted,
                tenant,
                Arc::downgrade(&self.attached),
                Arc::clone(&self.metrics),
            );
            let attachment = Attachment {
                key: key.clone(),
                state: entry.state.clone(),
                carried: entry.carried.clone(),
            };
            entries.insert(key.clone(), entry);
            Ok((attachment, Some(attached)))
        })?;
        match attached {
            Some(attached) => match attached.await {
                Ok(result) => result?,
                Err(_) => return Err(AttachError::Failed { key }),
            },
            None => {
                let mut state = attachment.state();
                let reached = state
                    .wait_for(|&state| state != AttachmentState::Detached)
                    .await
                    .map_err(|_| AttachError::Failed { key: key.clone() })?;
                if *reached == AttachmentState::Draining {
                    return Err(AttachError::Draining { key });
                }
            }
        }
        Ok(attachment)
    }

    /// Moves the deadlines of attached pods and returns which were; one that is not
    /// attached (any more) is passed over. A tenant's failure does not keep the others'
    /// from being moved.
    pub async fn set_deadlines(
        &self,
        deadlines: impl IntoIterator<Item = (SandboxKey, Deadline)>,
    ) -> Result<BTreeSet<SandboxKey>, RouterError> {
        let mut there = BTreeSet::new();
        let mut of_tenant: BTreeMap<TenantId, (Arc<Router>, BTreeMap<Ipv4Addr, Deadline>)> = BTreeMap::new();
        self.attached.with(|entries| {
            for (key, deadline) in deadlines {
                let Some(entry) = entries.get(&key) else { continue };
                let (_, addresses) = of_tenant
                    .entry(entry.wanted.pod.tenant.clone())
                    .or_insert_with(|| (Arc::clone(&entry.router), BTreeMap::new()));
                addresses.insert(entry.wanted.address(), deadline);
                if *entry.state.borrow() != AttachmentState::Detached {
                    there.insert(key);
                }
            }
        });
        let told = of_tenant
            .into_values()
            .map(|(router, deadlines)| async move { router.set_deadlines(deadlines).await });
        let told: Result<Vec<()>, RouterError> = futures::future::join_all(told).await.into_iter().collect();
        told.map(|_| there)
    }

    /// What stands in the kernel for the tenant's pod with this address, attached by this
    /// process or an earlier one. None if there is no such pod.
    pub async fn deadline(
        &self,
        tenant: &TenantId,
        address: Ipv4Addr,
    ) -> Result<Option<Deadline>, RouterError> {
        let slot = {
            let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            tenants.get(tenant).cloned()
        };
        let open = match slot {
            Some(slot) => slot.lock().await.clone(),
            None => None,
        };
        match open {
            Some(open) => open.router.deadline(address).await,
            None => Ok(None),
        }
    }

    /// Lets the pod's connections end for up to `drain`, then drops everything
    /// to and from it. Returns when that is done; at once if it is not attached.
    pub async fn detach(&self, key: &SandboxKey, drain: Duration) {
        let Some(queue) = self
            .attached
            .with(|entries| entries.get(key).map(|entry| entry.drain.clone()))
        else {
            return;
        };
        let (done, is_done) = oneshot::channel();
        if queue.send(Drain { limit: drain, done }).await.is_ok() {
            // An error tells that its task has ended, which is what was wanted.
            drop(is_done.await);
        }
    }

    /// Takes the tenant's programs out of the kernel; its router can then be
    /// deleted, and must be, for nothing in it is classified any more. Refused
    /// while pods are attached.
    pub async fn close_tenant(&self, id: &TenantId) -> Result<(), CloseTenantError> {
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let in_use = || CloseTenantError::InUse { tenant: id.clone() };
        if self
            .attached
            .with(|entries| entries.values().any(|entry| entry.wanted.pod.tenant == *id))
        {
            return Err(in_use());
        }
        let Some(open) = slot.take() else {
            return Ok(());
        };
        match Arc::try_unwrap(open) {
            Ok(open) => open.close().await.map_err(|source| CloseTenantError::Router {
                tenant: id.clone(),
                source,
            })?,
            // A pod of it is just being attached.
            Err(open) => {
                *slot = Some(open);
                return Err(in_use());
            }
        }
        self.metrics.forget_drops(id);
        tracing::info!(tenant = %id, "tenant closed");
        Ok(())
    }
}

impl PodAttachment {
    fn device(&self) -> Device {
        Device {
            name: self.device.clone(),
            mac: self.mac,
            address: self.pod.address,
            mode: self.pod.mode,
            deadline: self.deadline,
        }
    }

    /// Whether it is the same pod on the same device; its deadline moves.
    fn is_of(&self, other: &Self) -> bool {
        self.pod == other.pod && self.device == other.device && self.mac == other.mac
    }

    fn address(&self) -> Ipv4Addr {
        self.pod.address
    }
}
