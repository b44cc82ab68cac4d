//! What the mesh has to know of the cluster's objects, and no more: a cluster has
//! thousands of pods, and this process has 40 MB. Parsed once from what the API
//! server sends (by `sources::kubernetes`), read by `translate`.

mod namespace;
mod pod;
mod service;
mod slice;

use std::{fmt, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use namespace::{DataplaneMode, Namespace};
pub use pod::{NetworkMode, Pod, Readiness};
pub use service::{Service, ServicePort};
pub use slice::{Endpoint, Slice, Target};

/// Namespace and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// None for an object without a namespace or name, which the API server never sends.
    pub fn of(meta: &ObjectMeta) -> Option<Self> {
        Some(Self::new(meta.namespace.as_deref()?, meta.name.as_deref()?))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
