//! What this host can do for its pods: asked of the runtime and the kernel once, when
//! the agent starts.

use std::path::Path;

use crate::{cri::Features, layout::Layout, policy::privilege::Abilities};

/// File systems whose mounts can be given other owners (mount_setattr(2)). A volume
/// on another, as overlayfs or NFS, would belong to nobody in a user namespace.
const IDMAPPED: [(&str, i64); 5] = [
    ("tmpfs", 0x0102_1994),
    ("ext4", 0xef53),
    ("xfs", 0x5846_5342),
    ("btrfs", 0x9123_683e),
    ("f2fs", 0xf2f5_2010),
];
/// The first kernel whose tmpfs can, the last of those above.
const KERNEL: (u32, u32) = (6, 3);

/// By runtime handler.
#[derive(Debug, Clone)]
pub(super) struct HostAbilities {
    runtime: Features,
    /// The kernel and the disks; the runtime says for itself.
    idmapped_volumes: Result<(), String>,
    app_armor: bool,
    se_linux: bool,
}

impl HostAbilities {
    pub(super) fn detect(runtime: Features, layout: &Layout) -> Self {
        let armor = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let found = Self {
            runtime,
            idmapped_volumes: idmapped_volumes(&release, layout),
            app_armor: armor.is_ok_and(|on| on.trim() == "Y"),
            se_linux: Path::new("/sys/fs/selinux/enforce").exists(),
        };
        if let Err(why) = found.user_namespaces(None) {
            tracing::warn!(
                why,
                "pods have no user namespaces here: root in a pod is root on the host"
            );
        }
        found
    }

    /// Whether there is such a handler; a runtime that does not say may have it.
    pub(super) fn has(&self, handler: &str) -> bool {
        let known = &self.runtime.handlers;
        known.is_empty() || known.iter().any(|h| h.name == handler)
    }

    pub(super) fn of(&self, handler: Option<&str>) -> Abilities {
        Abilities {
            user_namespaces: self.user_namespaces(handler).is_ok(),
            app_armor: self.app_armor,
            se_linux: self.se_linux,
            strict_supplemental_groups: self.runtime.supplemental_groups_policy,
        }
    }

    /// Err says what is missing.
    fn user_namespaces(&self, handler: Option<&str>) -> Result<(), String> {
        let name = handler.unwrap_or_default();
        let known = self.runtime.handlers.iter().find(|h| h.name == name);
        if !known.is_some_and(|h| h.user_namespaces) {
            return Err("the runtime cannot: it takes runc 1.2 and containerd 2.0, or newer".into());
        }
        self.idmapped_volumes.clone()
    }
}

fn idmapped_volumes(release: &str, layout: &Layout) -> Result<(), String> {
    if version(release).is_none_or(|version| version < KERNEL) {
        return Err(format!(
            "the kernel cannot: it takes {}.{} or newer",
            KERNEL.0, KERNEL.1
        ));
    }
    for path in layout.roots() {
        let kind = nix::sys::statfs::statfs(&path)
            .map_err(|e| format!("looking at {}: {e}", path.display()))?
            .filesystem_type()
            .0;
        if !IDMAPPED.iter().any(|(_, known)| *known == kind) {
            let names = IDMAPPED.map(|(name, _)| name).join(", ");
            return Err(format!("{} is on none of {names}", path.display()));
        }
    }
    Ok(())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Handler;

    fn able(idmapped_volumes: Result<(), String>) -> HostAbilities {
        let handler = |name: &str, user_namespaces| Handler {
            name: name.into(),
            user_namespaces,
        };
        HostAbilities {
            runtime: Features {
                handlers: vec![handler("", true), handler("runc", true), handler("old", false)],
                supplemental_groups_policy: true,
            },
            idmapped_volumes,
            app_armor: false,
            se_linux: false,
        }
    }

    #[test]
    fn a_pod_has_users_of_its_own_if_its_runtime_the_kernel_and_the_disks_can() {
        let host = able(Ok(()));
        assert!(host.of(None).user_namespaces && host.of(Some("runc")).user_namespaces);
        assert!(!host.of(Some("old")).user_namespaces && !host.of(Some("other")).user_namespaces);
        assert!(!able(Err("no".into())).of(None).user_namespaces);
        assert!(host.has("old") && !host.has("other"));
    }

    #[test]
    fn a_kernel_that_is_too_old_and_a_disk_that_cannot_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = Layout::new(directory.path().join("none"), directory.path().join("none"));
        for (release, says) in [
            ("6.2.1", "6.3"),
            ("5.15.0-1", "6.3"),
            ("odd", "6.3"),
            ("6.3.0", "none"),
        ] {
            let why = idmapped_volumes(release, &missing).unwrap_err();
            assert!(why.contains(says), "{release}: {why}");
        }
    }
}
