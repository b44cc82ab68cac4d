//! Whose addresses are whose: what a pod, a tenant and the underlay may reach.

use serde::Deserialize;

/// `[policy.network]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {}
