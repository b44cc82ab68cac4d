//! The pods of one tenant on this host. Written by `runtime` through
//! [`super::TenantProxy`], read without locks by every connection.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use pool_agent_api::SandboxKey;

use super::{hbone, live::Live};
use crate::{identity::Lease, limits::PodShares, pod::PodRecord, telemetry::Carried};

/// A pod of this host, with what its connections share.
pub(crate) struct LocalPod {
    pub(crate) record: PodRecord,
    /// Its workload's name in the mesh's state.
    pub(crate) uid: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
    /// None for a pod that opted out of the mesh.
    pub(crate) lease: Option<Lease>,
    pub(crate) shares: Arc<PodShares>,
    pub(crate) tunnels: hbone::Pool,
    pub(crate) live: Arc<Live>,
    /// Bytes from it and to it.
    pub(crate) carried: Arc<Carried>,
}

#[derive(Default)]
pub(crate) struct Pods {
    by_address: ArcSwap<HashMap<IpAddr, Arc<LocalPod>>>,
    /// Also the writers' lock.
    by_key: Mutex<HashMap<SandboxKey, Arc<LocalPod>>>,
}

impl Pods {
    pub(crate) fn at(&self, address: IpAddr) -> Option<Arc<LocalPod>> {
        self.by_address.load().get(&address).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<LocalPod>> {
        self.by_address.load().values().cloned().collect()
    }

    /// The pod of `key`, made if it is new.
    pub(crate) fn add<E>(
        &self,
        key: &SandboxKey,
        make: impl FnOnce() -> Result<LocalPod, E>,
    ) -> Result<Arc<LocalPod>, E> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = by_key.get(key) {
            return Ok(known.clone());
        }
        let pod = Arc::new(make()?);
        by_key.insert(key.clone(), pod.clone());
        self.publish(&by_key);
        Ok(pod)
    }

    pub(crate) fn remove(&self, key: &SandboxKey) -> Option<Arc<LocalPod>> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let pod = by_key.remove(key)?;
        self.publish(&by_key);
        Some(pod)
    }

    /// All of them, and leaves none.
    pub(crate) fn take(&self) -> Vec<Arc<LocalPod>> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let pods = by_key.drain().map(|(_, pod)| pod).collect();
        self.publish(&by_key);
        pods
    }

    /// Of two pods with one address, the later attempt has it: the other one's
    /// sandbox is going.
    fn publish(&self, by_key: &HashMap<SandboxKey, Arc<LocalPod>>) {
        let mut by_address: HashMap<IpAddr, Arc<LocalPod>> = HashMap::with_capacity(by_key.len());
        for pod in by_key.values() {
            let address = pod.record.address.into();
            let older = by_address
                .get(&address)
                .is_some_and(|other| other.record.key.attempt > pod.record.key.attempt);
            if !older {
                by_address.insert(address, pod.clone());
            }
        }
        self.by_address.store(Arc::new(by_address));
    }
}
