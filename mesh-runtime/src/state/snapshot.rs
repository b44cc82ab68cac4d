use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use rpds::HashTrieMapSync;

use super::{NetworkMode, Service, ServiceKey, ServiceView, Visibility, Workload};
use crate::policy::{self, Policy};

/// One step of a push.
#[derive(Debug, Clone)]
pub enum Change {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Arc<Policy>),
    /// Of a workload (by uid) or a service (`<namespace>/<hostname>`).
    RemoveAddress(Arc<str>),
    /// Of a policy: `<namespace>/<name>`.
    RemovePolicy(Arc<str>),
}

/// All that is known, at one moment. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    workloads: HashTrieMapSync<Arc<str>, Arc<Workload>>,
    /// More than one while an address changes hands: the newest is last.
    by_address: HashTrieMapSync<IpAddr, Arc<[Arc<Workload>]>>,
    services: HashTrieMapSync<ServiceKey, ServiceView>,
    by_vip: HashTrieMapSync<IpAddr, Arc<[ServiceKey]>>,
    by_hostname: HashTrieMapSync<Arc<str>, Arc<[ServiceKey]>>,
    /// Services that have a range among their addresses: few, so looked through.
    ranges: Arc<BTreeSet<ServiceKey>>,
    policies: policy::Set,
    policy_epoch: u64,
}

impl Snapshot {
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address
            .get(&address)?
            .iter()
            .rev()
            .find(|w| &*w.network == network)
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&ServiceView> {
        self.services.get(key)
    }

    /// The service that `address` stands for, as a client in `namespace` sees
    /// it: its own namespace's before the canonical one before any other, and
    /// single addresses before ranges, longer prefixes before shorter.
    pub fn service_at(&self, network: &str, address: IpAddr, namespace: &str) -> Option<&ServiceView> {
        let exact = self
            .by_vip
            .get(&address)
            .into_iter()
            .flat_map(|keys| keys.iter())
            .filter_map(|key| self.services.get(key))
            .filter(|view| {
                view.service
                    .vips
                    .iter()
                    .any(|vip| &*vip.network == network && vip.single() == Some(address))
            });
        if let Some(found) = preferred(exact, namespace) {
            return Some(found);
        }
        let rank = |view: &ServiceView| {
            view.service
                .vips
                .iter()
                .filter(|vip| &*vip.network == network && vip.net.contains(&address))
                .map(|vip| vip.net.prefix_len())
                .max()
        };
        self.ranges
            .iter()
            .filter_map(|key| self.services.get(key))
            .filter(|view| visible(view, namespace))
            .filter_map(|view| Some((*view.service.key.namespace == *namespace, rank(view)?, view)))
            .max_by_key(|&(own, length, _)| (own, length))
            .map(|(_, _, view)| view)
    }

    /// The service with this host name (in lower case, without the last dot), as
    /// a client in `namespace` sees it.
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&ServiceView> {
        let named = self
            .by_hostname
            .get(hostname)
            .into_iter()
            .flat_map(|keys| keys.iter())
            .filter_map(|key| self.services.get(key));
        preferred(named, namespace)
    }

    pub fn policies(&self) -> &policy::Set {
        &self.policies
    }

    /// Rises with every push that may change a decision on a live connection.
    pub fn policy_epoch(&self) -> u64 {
        self.policy_epoch
    }

    /// Of all services, ranges left out.
    pub fn service_addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.by_vip.keys().filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    }

    /// Of all workloads that have an address of their own.
    pub fn workload_addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.by_address.keys().filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    }

    pub fn counts(&self) -> (usize, usize) {
        (self.workloads.size(), self.services.size())
    }
}

fn visible(view: &ServiceView, namespace: &str) -> bool {
    view.service.visibility == Visibility::Public || *view.service.key.namespace == *namespace
}

fn preferred<'a>(views: impl Iterator<Item = &'a ServiceView>, namespace: &str) -> Option<&'a ServiceView> {
    let mut best: Option<(u8, &ServiceView)> = None;
    for view in views.filter(|view| visible(view, namespace)) {
        let rank = if *view.service.key.namespace == *namespace {
            2
        } else {
            u8::from(view.service.canonical)
        };
        // Among equals the first by key, so that all hosts agree.
        let better = best.is_none_or(|(r, b)| {
            (rank, std::cmp::Reverse(&view.service.key)) > (r, std::cmp::Reverse(&b.service.key))
        });
        if better {
            best = Some((rank, view));
        }
    }
    best.map(|(_, view)| view)
}

/// The snapshot, and what only the writer needs to build the next one.
#[derive(Debug, Default)]
pub struct State {
    snapshot: Snapshot,
    /// Endpoints by service, whether or not the service is known yet: its
    /// workloads may be told of first.
    members: HashMap<ServiceKey, BTreeMap<Arc<str>, Arc<Workload>>>,
}

impl State {
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Applies a push. Each service it touches is indexed once.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        let mut touched = BTreeSet::new();
        let mut policies_changed = false;
        for change in changes {
            match change {
                Change::Workload(new) => {
                    let old = self.remove_workload(&new.uid.clone(), &mut touched);
                    let before = old.as_ref().map_or(&[][..], |old| &old.policies);
                    policies_changed |= *before != *new.policies;
                    self.insert_workload(new, &mut touched);
                }
                Change::Service(new) => {
                    self.remove_service(&new.key.clone());
                    touched.insert(new.key.clone());
                    self.insert_service(new);
                }
                Change::Policy(policy) => {
                    self.snapshot.policies.insert(policy);
                    policies_changed = true;
                }
                Change::RemovePolicy(key) => {
                    policies_changed |= self.snapshot.policies.remove(&key);
                }
                Change::RemoveAddress(name) => {
                    if self.remove_workload(&name, &mut touched).is_none()
                        && let Some((namespace, hostname)) = name.split_once('/')
                    {
                        self.remove_service(&ServiceKey {
                            namespace: namespace.into(),
                            hostname: hostname.to_ascii_lowercase().into(),
                        });
                    }
                }
            }
        }
        for key in touched {
            self.index_endpoints(&key);
        }
        self.snapshot.policy_epoch += u64::from(policies_changed);
    }

    fn insert_workload(&mut self, new: Arc<Workload>, touched: &mut BTreeSet<ServiceKey>) {
        for membership in &new.services {
            self.members
                .entry(membership.service.clone())
                .or_default()
                .insert(new.uid.clone(), new.clone());
            touched.insert(membership.service.clone());
        }
        if new.network_mode == NetworkMode::Standard {
            for &address in &new.addresses {
                add(&mut self.snapshot.by_address, address, new.clone());
            }
        }
        self.snapshot.workloads.insert_mut(new.uid.clone(), new);
    }

    fn remove_workload(
        &mut self,
        uid: &Arc<str>,
        touched: &mut BTreeSet<ServiceKey>,
    ) -> Option<Arc<Workload>> {
        let old = self.snapshot.workloads.get(uid)?.clone();
        self.snapshot.workloads.remove_mut(uid);
        for membership in &old.services {
            if let Some(members) = self.members.get_mut(&membership.service) {
                members.remove(uid);
                if members.is_empty() {
                    self.members.remove(&membership.service);
                }
            }
            touched.insert(membership.service.clone());
        }
        for address in &old.addresses {
            take(&mut self.snapshot.by_address, address, |w| w.uid == old.uid);
        }
        Some(old)
    }

    fn insert_service(&mut self, new: Arc<Service>) {
        for vip in &new.vips {
            match vip.single() {
                Some(address) => add(&mut self.snapshot.by_vip, address, new.key.clone()),
                None => {
                    Arc::make_mut(&mut self.snapshot.ranges).insert(new.key.clone());
                }
            }
        }
        add(
            &mut self.snapshot.by_hostname,
            new.key.hostname.clone(),
            new.key.clone(),
        );
        self.snapshot.services.insert_mut(
            new.key.clone(),
            ServiceView {
                service: new,
                endpoints: Arc::new([]),
            },
        );
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.snapshot.services.get(key).map(|view| view.service.clone()) else {
            return;
        };
        self.snapshot.services.remove_mut(key);
        for vip in &old.vips {
            match vip.single() {
                Some(address) => take(&mut self.snapshot.by_vip, &address, |k| k == key),
                None => {
                    Arc::make_mut(&mut self.snapshot.ranges).remove(key);
                }
            }
        }
        take(&mut self.snapshot.by_hostname, &key.hostname, |k| k == key);
    }

    fn index_endpoints(&mut self, key: &ServiceKey) {
        let Some(view) = self.snapshot.services.get(key) else {
            return;
        };
        let endpoints = match self.members.get(key) {
            Some(members) => members.values().cloned().collect(),
            None => Arc::new([]) as Arc<[_]>,
        };
        let view = ServiceView {
            service: view.service.clone(),
            endpoints,
        };
        self.snapshot.services.insert_mut(key.clone(), view);
    }
}

/// Appends to the few values of a key.
fn add<K: std::hash::Hash + Eq, V: Clone + PartialEq>(
    map: &mut HashTrieMapSync<K, Arc<[V]>>,
    key: K,
    value: V,
) {
    let values = match map.get(&key) {
        Some(values) if values.contains(&value) => return,
        Some(values) => values.iter().cloned().chain([value]).collect(),
        None => Arc::new([value]) as Arc<[_]>,
    };
    map.insert_mut(key, values);
}

fn take<K: std::hash::Hash + Eq + Clone, V: Clone>(
    map: &mut HashTrieMapSync<K, Arc<[V]>>,
    key: &K,
    which: impl Fn(&V) -> bool,
) {
    let Some(values) = map.get(key) else { return };
    let left: Arc<[V]> = values.iter().filter(|v| !which(v)).cloned().collect();
    if left.is_empty() {
        map.remove_mut(key);
    } else {
        map.insert_mut(key.clone(), left);
    }
}

#[cfg(test)]
mod tests;
