//! Security settings of the whole pod.

use std::collections::BTreeMap;

use crate::wire;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSecurity {
    /// Group that owns the volumes and is added to every process.
    pub fs_group: Option<i64>,
    /// Leave a volume alone if its root already belongs to `fs_group`.
    pub fs_group_on_root_mismatch_only: bool,
    pub supplemental_groups: Vec<i64>,
    pub sysctls: BTreeMap<String, String>,
}

impl From<wire::PodSecurity> for PodSecurity {
    fn from(s: wire::PodSecurity) -> Self {
        Self {
            fs_group: s.fs_group,
            fs_group_on_root_mismatch_only: s.fs_group_on_root_mismatch_only,
            supplemental_groups: s.supplemental_groups,
            sysctls: s.sysctls.into_iter().collect(),
        }
    }
}

impl From<PodSecurity> for wire::PodSecurity {
    fn from(s: PodSecurity) -> Self {
        Self {
            fs_group: s.fs_group,
            fs_group_on_root_mismatch_only: s.fs_group_on_root_mismatch_only,
            supplemental_groups: s.supplemental_groups,
            sysctls: s.sysctls.into_iter().collect(),
        }
    }
}
