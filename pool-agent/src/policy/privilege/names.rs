//! Names of the kernel's that a policy lists, checked where they are read.

use serde::Deserialize;

/// What containerd gives a container that asks for nothing: Pod Security's
/// "baseline", and NET_RAW.
const DEFAULTS: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The others of capabilities(7).
const OTHERS: [&str; 27] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "DAC_READ_SEARCH",
    "IPC_LOCK",
    "IPC_OWNER",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "NET_ADMIN",
    "NET_BROADCAST",
    "PERFMON",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];
const ALL: &str = "ALL";

/// A capability without `CAP_`, or ALL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Capability(String);

impl Capability {
    pub(super) fn defaults() -> Vec<Self> {
        DEFAULTS.map(|name| Self(name.into())).to_vec()
    }

    /// Whether a container that adds `name` adds no more than this.
    pub(super) fn covers(&self, name: &str) -> bool {
        self.0 == name || self.0 == ALL
    }
}

impl TryFrom<String> for Capability {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let known = name == ALL || DEFAULTS.contains(&name.as_str()) || OTHERS.contains(&name.as_str());
        if known {
            Ok(Self(name))
        } else {
            Err(format!(
                "{name:?} is not a capability such as \"NET_ADMIN\" (without CAP_), nor \"ALL\""
            ))
        }
    }
}

/// A kubelet's safe set: of the pod's own namespaces, and without effect on others.
const SAFE_SYSCTLS: [&str; 14] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_slow_start_after_idle",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

pub(super) fn is_safe(sysctl: &str) -> bool {
    SAFE_SYSCTLS.contains(&sysctl)
}

/// What the kernel keeps apart for each pod: its network, and its IPC.
const NAMESPACED: [&str; 4] = ["net.", "kernel.shm", "kernel.msg", "fs.mqueue."];
const NAMESPACED_WHOLE: &str = "kernel.sem";

/// A sysctl, or the beginning of some with `*` at the end.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct SysctlPattern {
    beginning: String,
    open: bool,
}

impl SysctlPattern {
    pub(super) fn matches(&self, name: &str) -> bool {
        if self.open {
            name.starts_with(&self.beginning)
        } else {
            name == self.beginning
        }
    }
}

impl TryFrom<String> for SysctlPattern {
    type Error = String;

    fn try_from(pattern: String) -> Result<Self, String> {
        let (beginning, open) = match pattern.strip_suffix('*') {
            Some(beginning) => (beginning, true),
            None => (pattern.as_str(), false),
        };
        if beginning.contains('*') {
            return Err(format!("{pattern:?}: * may stand at the end only"));
        }
        let apart = NAMESPACED.iter().any(|known| beginning.starts_with(known))
            || beginning == NAMESPACED_WHOLE && !open;
        if !apart {
            return Err(format!(
                "{pattern:?} is not kept apart for each pod: only net.*, kernel.shm*, kernel.msg*, \
                 kernel.sem and fs.mqueue.* are"
            ));
        }
        Ok(Self {
            beginning: beginning.into(),
            open,
        })
    }
}
