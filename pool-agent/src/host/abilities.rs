//! What this host can do for its pods: asked of the runtime and the kernel once, when
//! the agent starts.

use std::path::Path;

use crate::{cri::Features, policy::privilege::Abilities};

/// By runtime handler.
#[derive(Debug, Clone)]
pub(super) struct HostAbilities {
    runtime: Features,
    app_armor: bool,
    se_linux: bool,
}

impl HostAbilities {
    pub(super) fn detect(runtime: Features) -> Self {
        let armor = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        Self {
            runtime,
            app_armor: armor.is_ok_and(|on| on.trim() == "Y"),
            se_linux: Path::new("/sys/fs/selinux/enforce").exists(),
        }
    }

    /// Whether there is such a handler; a runtime that does not say may have it.
    pub(super) fn has(&self, handler: &str) -> bool {
        let known = &self.runtime.handlers;
        known.is_empty() || known.iter().any(|h| h.name == handler)
    }

    pub(super) fn of(&self, _handler: Option<&str>) -> Abilities {
        Abilities {
            user_namespaces: false,
            app_armor: self.app_armor,
            se_linux: self.se_linux,
            strict_supplemental_groups: self.runtime.supplemental_groups_policy,
        }
    }
}
