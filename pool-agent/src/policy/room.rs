//! How much of the host its pods may use, and what the host keeps for itself.

use serde::Deserialize;

/// `[policy.room]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Room {}
