//! All resources of one xDS type at one moment, immutable and shared by all
//! connections. Made by `index`, read by `subscription`.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    sync::Arc,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};

/// A resource's version: a hash of its contents, so that it is the same after a
/// restart, and a client that reconnects is sent only what changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version(u64);

impl Version {
    pub fn of(body: &[u8]) -> Self {
        let digest = Sha256::digest(body);
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self(u64::from_be_bytes(first))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A version that is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignVersion;

impl FromStr for Version {
    type Err = ForeignVersion;

    fn from_str(text: &str) -> Result<Self, ForeignVersion> {
        let number = u64::from_str_radix(text, 16).map_err(|_| ForeignVersion)?;
        let version = Self(number);
        (version.to_string() == text)
            .then_some(version)
            .ok_or(ForeignVersion)
    }
}

/// One resource, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub name: Arc<str>,
    pub version: Version,
    /// The protobuf message, without its type URL.
    pub body: Bytes,
    /// Other names a client may ask for it by.
    pub aliases: Box<[Arc<str>]>,
    /// Resources that this one belongs to: who subscribes to one of them gets this
    /// one too, as a service's subscriber gets its endpoints.
    pub groups: Box<[Arc<str>]>,
}

impl Resource {
    pub fn new(name: impl Into<Arc<str>>, body: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            version: Version::of(&body),
            body: body.into(),
            aliases: Box::default(),
            groups: Box::default(),
        }
    }

    fn is_called(&self, names: &BTreeSet<String>) -> bool {
        names.contains(&*self.name) || self.aliases.iter().any(|alias| names.contains(&**alias))
    }
}

/// Resources by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    resources: BTreeMap<Arc<str>, Arc<Resource>>,
}

impl Snapshot {
    pub fn get(&self, name: &str) -> Option<&Arc<Resource>> {
        self.resources.get(name)
    }

    pub fn len(&self) -> usize {
        self.resources.len()
    }

    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// In the order of names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    /// What the names stand for: resources so called, and the members of those.
    pub fn select(&self, names: &BTreeSet<String>) -> BTreeMap<Arc<str>, Arc<Resource>> {
        if names.is_empty() {
            return BTreeMap::new();
        }
        let mut selected: BTreeMap<_, _> = self
            .resources
            .iter()
            .filter(|(_, resource)| resource.is_called(names))
            .map(|(name, resource)| (Arc::clone(name), Arc::clone(resource)))
            .collect();
        let members: Vec<_> = self
            .iter()
            .filter(|resource| resource.groups.iter().any(|group| selected.contains_key(group)))
            .cloned()
            .collect();
        selected.extend(members.into_iter().map(|r| (Arc::clone(&r.name), r)));
        selected
    }

    /// Those of the names that nothing is called by.
    pub fn unknown(&self, mut names: BTreeSet<String>) -> BTreeSet<String> {
        if !names.is_empty() {
            for resource in self.iter() {
                names.remove(&*resource.name);
                for alias in &resource.aliases {
                    names.remove(&**alias);
                }
            }
        }
        names
    }

    /// What is new or changed since `old`, and the names that are gone. One pass over
    /// both; what they share is told by its address.
    pub fn since(&self, old: &Self) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        let (mut new, mut old) = (self.iter().peekable(), old.iter().peekable());
        loop {
            let order = match (new.peek(), old.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(n), Some(o)) if Arc::ptr_eq(n, o) => Ordering::Equal,
                (Some(n), Some(o)) => n.name.cmp(&o.name),
            };
            match order {
                Ordering::Less => changed.extend(new.next().cloned()),
                Ordering::Greater => gone.extend(old.next().map(|r| Arc::clone(&r.name))),
                Ordering::Equal => {
                    if let (Some(new), Some(old)) = (new.next(), old.next())
                        && new.version != old.version
                    {
                        changed.push(Arc::clone(new));
                    }
                }
            }
        }
        (changed, gone)
    }

    pub fn set(&mut self, resource: Resource) {
        self.resources
            .insert(Arc::clone(&resource.name), Arc::new(resource));
    }

    pub fn remove(&mut self, name: &str) {
        self.resources.remove(name);
    }
}

impl FromIterator<Resource> for Snapshot {
    fn from_iter<I: IntoIterator<Item = Resource>>(resources: I) -> Self {
        let mut snapshot = Self::default();
        for resource in resources {
            snapshot.set(resource);
        }
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_by_its_contents_alone() {
        assert_eq!(Version::of(b"a"), Version::of(b"a"));
        assert_ne!(Version::of(b"a"), Version::of(b"b"));
        let version = Version::of(b"a");
        assert_eq!(version.to_string().parse(), Ok(version));
        for foreign in ["", "1", "x", "+000000000000001", "00000000000000AB"] {
            assert_eq!(foreign.parse::<Version>(), Err(ForeignVersion), "{foreign:?}");
        }
    }

    #[test]
    fn a_subscriber_of_a_service_gets_its_endpoints_too() {
        let pod = |name: &str, ip: &str, group: &str| Resource {
            aliases: [ip.into()].into(),
            groups: [group.into()].into(),
            ..Resource::new(name, name.as_bytes().to_vec())
        };
        let snapshot: Snapshot = [
            pod("pod/a", "/10.0.0.1", "shop/web"),
            pod("pod/b", "/10.0.0.2", "shop/web"),
            pod("pod/c", "/10.0.0.3", "shop/db"),
            Resource {
                aliases: ["/10.96.0.1".into()].into(),
                ..Resource::new("shop/web", vec![1])
            },
        ]
        .into_iter()
        .collect();
        let selected = |names: &[&str]| -> Vec<String> {
            let names = names.iter().map(|&n| n.to_owned()).collect();
            snapshot.select(&names).keys().map(|n| n.to_string()).collect()
        };
        assert_eq!(selected(&[]), Vec::<String>::new());
        assert_eq!(selected(&["pod/c", "nothing"]), ["pod/c"]);
        assert_eq!(selected(&["/10.0.0.2"]), ["pod/b"]);
        assert_eq!(selected(&["/10.96.0.1"]), ["pod/a", "pod/b", "shop/web"]);
    }
}
