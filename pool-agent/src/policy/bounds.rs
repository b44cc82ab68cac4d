//! How many connections, calls and descriptors a pod, a peer, a tenant and the host may hold.

use serde::Deserialize;

/// `[policy.bounds]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {}
