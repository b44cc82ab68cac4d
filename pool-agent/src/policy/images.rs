//! Which images may be pulled, from where, and how much of that at a time.

use serde::Deserialize;

/// `[policy.images]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Images {}
