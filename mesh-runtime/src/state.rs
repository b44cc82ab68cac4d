//! What this host knows of a tenant's mesh: workloads, services and policies,
//! as the control plane last told.
//!
//! `xds` is the only writer: it applies each push as one step, and readers see
//! all of a push or nothing of it. `proxy` and `dns` read a [`Snapshot`] without
//! locks. Snapshots share what did not change: a push of one workload copies
//! the paths to it and the list of pointers of the services it is in, whatever
//! the number of workloads.
//!
//! State outlives the control plane's absence; it is only ever replaced.

mod intern;
mod service;
mod snapshot;
mod workload;

pub use intern::Interner;
pub use service::{
    Balance, InvalidService, Mode, Scope, Service, ServiceKey, ServicePort, ServiceView, UnhealthyEndpoints,
    Vip, Visibility,
};
pub use snapshot::{Change, Snapshot, State};
pub use workload::{
    Health, InvalidWorkload, Kind, Locality, Membership, NetworkMode, PortMap, Reach, Unsupported, Workload,
};

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;

/// The readers' side. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reader {
    current: Arc<ArcSwap<Snapshot>>,
    version: watch::Receiver<u64>,
    service_addresses: watch::Receiver<Arc<BTreeSet<Ipv4Addr>>>,
    workload_addresses: watch::Receiver<Arc<BTreeSet<Ipv4Addr>>>,
}

impl Reader {
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Waits until `found` finds something in a snapshot. For ever, if it never
    /// does: the caller holds the clock.
    pub async fn wait_for<T>(&self, mut found: impl FnMut(&Snapshot) -> Option<T>) -> T {
        if let Some(t) = found(&self.current.load()) {
            return t;
        }
        let mut version = self.version.clone();
        loop {
            version.borrow_and_update();
            if let Some(t) = found(&self.current.load()) {
                return t;
            }
            if version.changed().await.is_err() {
                // The writer is gone, so nothing will be found any more.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Counts the pushes that may change a decision on a live connection.
    pub fn policy_epoch(&self) -> u64 {
        self.current.load().policy_epoch()
    }

    /// The IPv4 addresses of all services, when they change.
    pub fn service_addresses(&self) -> watch::Receiver<Arc<BTreeSet<Ipv4Addr>>> {
        self.service_addresses.clone()
    }

    /// The IPv4 addresses of all workloads, when they change.
    pub fn workload_addresses(&self) -> watch::Receiver<Arc<BTreeSet<Ipv4Addr>>> {
        self.workload_addresses.clone()
    }

    /// Is told of every push.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.clone()
    }
}

/// The writer's side, owned by one task.
#[derive(Debug)]
pub struct Writer {
    state: State,
    current: Arc<ArcSwap<Snapshot>>,
    version: watch::Sender<u64>,
    service_addresses: watch::Sender<Arc<BTreeSet<Ipv4Addr>>>,
    workload_addresses: watch::Sender<Arc<BTreeSet<Ipv4Addr>>>,
}

/// An empty state.
pub fn open() -> (Writer, Reader) {
    let current = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let (version, watch) = watch::channel(0);
    let (service_addresses, of_services) = watch::channel(Arc::default());
    let (workload_addresses, of_workloads) = watch::channel(Arc::default());
    let reader = Reader {
        current: current.clone(),
        version: watch,
        service_addresses: of_services,
        workload_addresses: of_workloads,
    };
    let writer = Writer {
        state: State::default(),
        current,
        version,
        service_addresses,
        workload_addresses,
    };
    (writer, reader)
}

impl Writer {
    /// Applies a push and publishes the result.
    pub fn apply(&mut self, changes: Vec<Change>) {
        let of_services = changes
            .iter()
            .any(|change| matches!(change, Change::Service(_) | Change::RemoveAddress(_)));
        let of_workloads = changes
            .iter()
            .any(|change| matches!(change, Change::Workload(_) | Change::RemoveAddress(_)));
        self.state.apply(changes);
        self.current.store(Arc::new(self.state.snapshot().clone()));
        self.version.send_modify(|v| *v += 1);
        if of_services {
            let now = self.state.snapshot().service_addresses().collect();
            publish(&self.service_addresses, now);
        }
        if of_workloads {
            let now = self.state.snapshot().workload_addresses().collect();
            publish(&self.workload_addresses, now);
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }
}

fn publish(addresses: &watch::Sender<Arc<BTreeSet<Ipv4Addr>>>, now: BTreeSet<Ipv4Addr>) {
    addresses.send_if_modified(|before| {
        let changed = **before != now;
        if changed {
            *before = Arc::new(now);
        }
        changed
    });
}
