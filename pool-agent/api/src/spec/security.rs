//! Security settings of the whole pod.

use std::collections::BTreeMap;

use crate::{Invalid, wire};

/// The longest value of a sysctl that is taken: lists of ports are the longest in use.
const SYSCTL_VALUE_BYTES: usize = 1024;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSecurity {
    /// Group that owns the volumes and is added to every process.
    pub fs_group: Option<i64>,
    /// Leave a volume alone if its root already belongs to `fs_group`.
    pub fs_group_on_root_mismatch_only: bool,
    pub supplemental_groups: Vec<i64>,
    /// No group that the image's `/etc/group` gives its user.
    pub strict_supplemental_groups: bool,
    /// By names with dots, each part of which is a plain file name.
    pub sysctls: BTreeMap<String, String>,
    /// None: a user namespace of its own wherever the host can.
    pub host_users: Option<bool>,
}

/// A name is a path below /proc/sys to whoever writes it: nothing that leads out of
/// there may be in it.
fn sysctl(name: &str, value: &str) -> Result<(), Invalid> {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
    };
    if name.len() > 253 || name.split('.').count() < 2 || !name.split('.').all(part) {
        return Err(Invalid::new(
            "name",
            format_args!("{name:?} is not a sysctl such as net.ipv4.tcp_syncookies"),
        ));
    }
    if value.len() > SYSCTL_VALUE_BYTES || value.bytes().any(|c| c < b' ' && c != b'\t') {
        return Err(Invalid::new(
            name,
            format_args!("its value must be one line of at most {SYSCTL_VALUE_BYTES} characters"),
        ));
    }
    Ok(())
}

impl TryFrom<wire::PodSecurity> for PodSecurity {
    type Error = Invalid;

    fn try_from(s: wire::PodSecurity) -> Result<Self, Invalid> {
        for (name, value) in &s.sysctls {
            sysctl(name, value).map_err(|e| e.within("sysctls"))?;
        }
        Ok(Self {
            fs_group: s.fs_group,
            fs_group_on_root_mismatch_only: s.fs_group_on_root_mismatch_only,
            supplemental_groups: s.supplemental_groups,
            strict_supplemental_groups: s.strict_supplemental_groups,
            sysctls: s.sysctls.into_iter().collect(),
            host_users: s.host_users,
        })
    }
}

impl From<PodSecurity> for wire::PodSecurity {
    fn from(s: PodSecurity) -> Self {
        Self {
            fs_group: s.fs_group,
            fs_group_on_root_mismatch_only: s.fs_group_on_root_mismatch_only,
            supplemental_groups: s.supplemental_groups,
            strict_supplemental_groups: s.strict_supplemental_groups,
            sysctls: s.sysctls.into_iter().collect(),
            host_users: s.host_users,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysctls_name_leads_nowhere_else_and_its_value_is_one_line() {
        let parse = |name: &str, value: &str| {
            PodSecurity::try_from(wire::PodSecurity {
                sysctls: [(name.to_owned(), value.to_owned())].into(),
                ..Default::default()
            })
        };
        for name in [
            "",
            "net",
            "net.",
            "net..kernel.core_pattern",
            "net/../kernel/core_pattern",
            "net./../../sysrq-trigger",
            "net.ipv4.conf/eth0",
            "net.\0",
        ] {
            assert!(parse(name, "1").is_err(), "{name:?}");
        }
        assert!(parse("net.ipv4.tcp_rmem", "4096 131072 6291456").is_ok());
        assert!(parse("net.ipv4.tcp_rmem", "1\n2").is_err());
        assert!(parse("net.ipv4.tcp_rmem", &"1".repeat(2000)).is_err());
    }
}
