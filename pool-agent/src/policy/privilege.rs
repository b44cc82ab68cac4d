//! What a pod's containers may be to the kernel: capabilities, sysctls, seccomp, users.

use serde::Deserialize;

/// `[policy.privilege]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Privilege {}
