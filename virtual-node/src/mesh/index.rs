//! The cluster's objects joined into the mesh's resources, kept up to date a
//! change at a time: what a change touches is translated again, nothing else.
//! Pure; owned by one task of `sources::kubernetes`.
//!
//! What always holds: nothing is published before each kind of object has been
//! listed once (absent is not gone), and what is published is what translating
//! all objects anew would give, in whichever order they came.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Cluster,
    object::{DataplaneMode, Key, Namespace, NetworkMode, Pod, Service, Slice, Target},
    snapshot::{Resource, Snapshot},
    translate::{Membership, Tunnel},
};
use crate::placement::Placements;

/// What a source saw.
#[derive(Debug, Clone)]
pub enum Event {
    Pod(Change<Key, Pod>),
    Service(Change<Key, Service>),
    Slice(Change<Key, Slice>),
    Namespace(Change<Arc<str>, Namespace>),
    Placements(Arc<Placements>),
}

#[derive(Debug, Clone)]
pub enum Change<K, T> {
    /// All there are. Others are gone.
    Listed(BTreeMap<K, T>),
    Set(K, T),
    Gone(K),
}

pub struct Index {
    cluster: Cluster,
    /// The Node whose pods are ours.
    node: Arc<str>,
    pods: Kind<Key, Pod>,
    services: Kind<Key, Service>,
    slices: Kind<Key, Slice>,
    namespaces: Kind<Arc<str>, Namespace>,
    placements: Arc<Placements>,
    /// Names of slices in the same namespace, by their Service.
    of_service: Reverse,
    /// And by the pods that are in them.
    of_pod: Reverse,
    /// Resources made of a slice's own addresses.
    endpoints: BTreeMap<Key, BTreeSet<Arc<str>>>,
    stale: BTreeSet<Stale>,
    snapshot: Arc<Snapshot>,
    published: bool,
}

/// Objects of one kind.
struct Kind<K, T> {
    objects: BTreeMap<K, T>,
    listed: bool,
}

type Reverse = BTreeMap<Key, BTreeSet<Arc<str>>>;

/// What has to be translated again.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stale {
    Pod(Key),
    Service(Key),
    Slice(Key),
}

impl<K: Ord + Clone, T: PartialEq> Kind<K, T> {
    fn new() -> Self {
        Self {
            objects: BTreeMap::new(),
            listed: false,
        }
    }

    /// Takes the change up. Answers what really changed: the key, and what was there.
    fn take(&mut self, change: Change<K, T>) -> Vec<(K, Option<T>)> {
        match change {
            Change::Set(key, new) => {
                if self.objects.get(&key) == Some(&new) {
                    return Vec::new();
                }
                let old = self.objects.insert(key.clone(), new);
                vec![(key, old)]
            }
            Change::Gone(key) => match self.objects.remove(&key) {
                Some(old) => vec![(key, Some(old))],
                None => Vec::new(),
            },
            Change::Listed(all) => {
                self.listed = true;
                let gone: Vec<K> = self
                    .objects
                    .keys()
                    .filter(|key| !all.contains_key(key))
                    .cloned()
                    .collect();
                let gone = gone.into_iter().map(Change::Gone);
                let set = all.into_iter().map(|(key, new)| Change::Set(key, new));
                gone.chain(set).flat_map(|change| self.take(change)).collect()
            }
        }
    }
}

impl Index {
    pub fn new(cluster: Cluster, node: &str) -> Self {
        Self {
            cluster,
            node: node.into(),
            pods: Kind::new(),
            services: Kind::new(),
            slices: Kind::new(),
            namespaces: Kind::new(),
            placements: Arc::default(),
            of_service: Reverse::new(),
            of_pod: Reverse::new(),
            endpoints: BTreeMap::new(),
            stale: BTreeSet::new(),
            snapshot: Arc::default(),
            published: false,
        }
    }

    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Pod(change) => {
                for (key, _) in self.pods.take(change) {
                    self.stale.insert(Stale::Pod(key));
                }
            }
            Event::Service(change) => {
                for (key, _) in self.services.take(change) {
                    for slice in names(&self.of_service, &key) {
                        self.slice_is_stale(&slice);
                    }
                    self.stale.insert(Stale::Service(key));
                }
            }
            Event::Slice(change) => {
                for (key, old) in self.slices.take(change) {
                    if let Some(old) = old {
                        self.link(&old, unlink);
                    }
                    if let Some(new) = self.slices.objects.get(&key).cloned() {
                        self.link(&new, link);
                    }
                    self.stale.insert(Stale::Slice(key));
                }
            }
            Event::Namespace(change) => {
                for (name, _) in self.namespaces.take(change) {
                    self.stale.extend(
                        self.pods
                            .objects
                            .keys()
                            .filter(|pod| pod.namespace == name)
                            .cloned()
                            .map(Stale::Pod),
                    );
                }
            }
            Event::Placements(new) => self.place(new),
        }
    }

    /// The snapshot, if there is a new one to be published.
    pub fn publish(&mut self) -> Option<Arc<Snapshot>> {
        let listed = self.pods.listed && self.services.listed && self.slices.listed && self.namespaces.listed;
        if !listed {
            return None;
        }
        let mut changed = !self.published;
        for stale in std::mem::take(&mut self.stale) {
            changed |= match stale {
                Stale::Pod(key) => self.translate_pod(&key),
                Stale::Service(key) => self.translate_service(&key),
                Stale::Slice(key) => self.translate_slice(&key),
            };
        }
        self.published = true;
        changed.then(|| Arc::clone(&self.snapshot))
    }

    fn translate_pod(&mut self, key: &Key) -> bool {
        let resource = self.pods.objects.get(key).map(|pod| {
            let memberships: Vec<_> = names(&self.of_pod, key)
                .iter()
                .filter_map(|slice| self.membership(slice))
                .filter(|membership| membership.slice.endpoints.iter().any(|e| is_of(&e.target, pod)))
                .collect();
            self.cluster.pod(pod, self.tunnel(pod), &memberships)
        });
        match resource {
            Some(resource) => self.set(resource),
            None => self.remove(&self.cluster.pod_name(key)),
        }
    }

    fn translate_service(&mut self, key: &Key) -> bool {
        match self.services.objects.get(key) {
            Some(service) => self.set(self.cluster.service(service)),
            None => self.remove(&self.cluster.service_name(key)),
        }
    }

    fn translate_slice(&mut self, key: &Key) -> bool {
        let mut resources = BTreeMap::new();
        if let Some(membership) = self.membership(key) {
            for endpoint in &membership.slice.endpoints {
                if let Some(resource) = self.cluster.endpoint(membership, endpoint) {
                    // An address that stands twice in a slice is one endpoint: the first.
                    resources.entry(Arc::clone(&resource.name)).or_insert(resource);
                }
            }
        }
        let before = self.endpoints.remove(key).unwrap_or_default();
        let mut changed = false;
        for gone in before.iter().filter(|name| !resources.contains_key(*name)) {
            changed |= self.remove(gone);
        }
        if !resources.is_empty() {
            self.endpoints
                .insert(key.clone(), resources.keys().cloned().collect());
        }
        for resource in resources.into_values() {
            changed |= self.set(resource);
        }
        changed
    }

    /// True if that changed anything; the snapshot, which others hold, is copied only then.
    fn set(&mut self, resource: Resource) -> bool {
        let changed = self
            .snapshot
            .get(&resource.name)
            .is_none_or(|old| **old != resource);
        if changed {
            Arc::make_mut(&mut self.snapshot).set(resource);
        }
        changed
    }

    fn remove(&mut self, name: &str) -> bool {
        let changed = self.snapshot.get(name).is_some();
        if changed {
            Arc::make_mut(&mut self.snapshot).remove(name);
        }
        changed
    }

    fn membership(&self, slice: &Key) -> Option<Membership<'_>> {
        let slice = self.slices.objects.get(slice)?;
        let service = self.services.objects.get(&service_of(slice))?;
        Some(Membership { service, slice })
    }

    fn tunnel(&self, pod: &Pod) -> Tunnel {
        if pod.node == self.node && pod.network == NetworkMode::Pod && self.enrolled(pod) {
            Tunnel::Hbone
        } else {
            Tunnel::Plain
        }
    }

    /// What its host was told when it started counts: labels that change later move
    /// no running pod in or out. Where that is not known yet, the labels.
    fn enrolled(&self, pod: &Pod) -> bool {
        match self.placements.pods.get(&pod.uid) {
            Some(placement) => placement.enrolled,
            None => DataplaneMode::enrols(
                pod.mode,
                self.namespaces
                    .objects
                    .get(&pod.key.namespace)
                    .and_then(|ns| ns.mode),
            ),
        }
    }

    fn place(&mut self, new: Arc<Placements>) {
        let old = std::mem::replace(&mut self.placements, new);
        let differs = |a: &Placements, b: &Placements| -> Vec<Key> {
            a.pods
                .iter()
                .filter(|(uid, placement)| b.pods.get(uid).map(|p| p.enrolled) != Some(placement.enrolled))
                .map(|(_, placement)| Key::new(placement.namespace.as_str(), placement.name.as_str()))
                .collect()
        };
        let keys = differs(&old, &self.placements)
            .into_iter()
            .chain(differs(&self.placements, &old));
        self.stale.extend(keys.map(Stale::Pod));
    }

    fn slice_is_stale(&mut self, key: &Key) {
        if let Some(slice) = self.slices.objects.get(key) {
            self.stale.extend(pods_of(slice).map(Stale::Pod));
            self.stale.insert(Stale::Slice(key.clone()));
        }
    }

    /// Adds the slice to the reverse indexes or takes it out, and marks its pods.
    fn link(&mut self, slice: &Slice, change: fn(&mut Reverse, Key, &Slice)) {
        change(&mut self.of_service, service_of(slice), slice);
        for pod in pods_of(slice) {
            change(&mut self.of_pod, pod.clone(), slice);
            self.stale.insert(Stale::Pod(pod));
        }
    }
}

fn link(index: &mut Reverse, key: Key, slice: &Slice) {
    index.entry(key).or_default().insert(Arc::clone(&slice.key.name));
}

fn unlink(index: &mut Reverse, key: Key, slice: &Slice) {
    if let std::collections::btree_map::Entry::Occupied(mut entry) = index.entry(key) {
        entry.get_mut().remove(&slice.key.name);
        if entry.get().is_empty() {
            entry.remove();
        }
    }
}

/// Keys of the slices under `key`.
fn names(index: &Reverse, key: &Key) -> Vec<Key> {
    index
        .get(key)
        .into_iter()
        .flatten()
        .map(|name| Key {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(name),
        })
        .collect()
}

fn service_of(slice: &Slice) -> Key {
    Key {
        namespace: Arc::clone(&slice.key.namespace),
        name: Arc::clone(&slice.service),
    }
}

fn pods_of(slice: &Slice) -> impl Iterator<Item = Key> {
    slice
        .endpoints
        .iter()
        .filter_map(|endpoint| match &endpoint.target {
            Target::Pod { name, .. } => Some(Key {
                namespace: Arc::clone(&slice.key.namespace),
                name: Arc::clone(name),
            }),
            Target::Address(_) => None,
        })
}

/// Names are reused: an endpoint of the last pod of this name is not this one's.
fn is_of(target: &Target, pod: &Pod) -> bool {
    match target {
        Target::Pod { name, uid } => *name == pod.key.name && uid.as_ref().is_none_or(|uid| *uid == pod.uid),
        Target::Address(_) => false,
    }
}

#[cfg(test)]
mod tests;
