//! What a pod's containers may be to the kernel: capabilities, sysctls, profiles,
//! users. Pure; asked by [`crate::host`] before anything of a pod is kept or made.
//!
//! ```toml
//! [policy.privilege]                 # what is not said has these values
//! # Beside the runtime's default set a container may add these. "ALL": any.
//! capabilities = ["AUDIT_WRITE", "CHOWN", …]     # the default set itself
//! # And these if the pod has a user namespace: they reach no further than the
//! # pod's own network and files, but open parts of the kernel that are closed
//! # otherwise.
//! user_namespace_capabilities = []
//! # Beside a kubelet's safe set; as `--allowed-unsafe-sysctls`, `*` at the end only.
//! unsafe_sysctls = []
//! unconfined_seccomp = false         # seccompProfile Unconfined
//! unconfined_app_armor = false       # appArmorProfile Unconfined
//! app_armor_profiles = []            # appArmorProfile Localhost, by name
//! se_linux_options = false           # seLinuxOptions of any kind
//! privilege_escalation = true        # false: allowPrivilegeEscalation must be false
//! share_process_namespace = true
//! host_users = false                 # hostUsers: true
//! # True: a pod is refused rather than run without a user namespace.
//! require_user_namespaces = false
//!
//! # Ids of this host that belong to pods alone, 65536 to a pod.
//! user_ids = { first = 1879048192, pods = 4096 }
//!
//! [policy.privilege.classes.gvisor]  # a runtime handler: what differs there
//! capabilities = ["ALL"]
//! ```
//!
//! Nobody allows what the contract has no words for: privileged containers, a
//! host's namespaces, devices, paths and ports, unmasked /proc.

use std::{collections::BTreeMap, fmt};

use pool_agent_api::{
    RefusalReason, SandboxSpec,
    spec::{AppArmorProfile, Container, SeccompProfile, VolumeSource},
};
use serde::Deserialize;

mod names;

use names::{Capability, SysctlPattern};

/// Ids that one pod has in its user namespace: 0 to 65535, as under a kubelet.
pub const IDS_OF_A_POD: u32 = 65536;

/// `[policy.privilege]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct Privilege {
    pub user_ids: UserIds,
    default: Class,
    classes: BTreeMap<String, Class>,
}

/// Which of the host's user and group ids are for pods: nobody else's, and below
/// 2^31, where some programs begin to take ids for negative numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserIds {
    /// A multiple of 65536, and not 0.
    pub first: u32,
    /// Pods that may have processes at a time.
    pub pods: u32,
}

impl Default for UserIds {
    /// What systemd's table of ids leaves unused below 2^31.
    fn default() -> Self {
        Self {
            first: 0x7000_0000,
            pods: 4096,
        }
    }
}

/// What pods of one runtime handler may be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Class {
    capabilities: Vec<Capability>,
    user_namespace_capabilities: Vec<Capability>,
    unsafe_sysctls: Vec<SysctlPattern>,
    unconfined_seccomp: bool,
    unconfined_app_armor: bool,
    app_armor_profiles: Vec<String>,
    se_linux_options: bool,
    privilege_escalation: bool,
    share_process_namespace: bool,
    host_users: bool,
    require_user_namespaces: bool,
}

impl Default for Class {
    fn default() -> Self {
        Self {
            capabilities: Capability::defaults(),
            user_namespace_capabilities: vec![],
            unsafe_sysctls: vec![],
            unconfined_seccomp: false,
            unconfined_app_armor: false,
            app_armor_profiles: vec![],
            se_linux_options: false,
            privilege_escalation: true,
            share_process_namespace: true,
            host_users: false,
            require_user_namespaces: false,
        }
    }
}

/// What a host can do for the pods of a runtime handler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abilities {
    /// The runtime and the kernel, volumes included.
    pub user_namespaces: bool,
    pub app_armor: bool,
    pub se_linux: bool,
    pub strict_supplemental_groups: bool,
}

/// Whose ids a pod's processes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Users {
    /// A range of the host's, which nothing else has.
    Own,
    Host,
}

/// What a pod may not be here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Denied {
    pub reason: RefusalReason,
    /// Path in the spec, e.g. `spec.containers[0].security.add_capabilities[1]`.
    pub field: String,
    pub problem: String,
}

fn forbidden(field: impl Into<String>, problem: impl fmt::Display) -> Denied {
    Denied {
        reason: RefusalReason::Forbidden,
        field: field.into(),
        problem: problem.to_string(),
    }
}

/// Another host may be able to.
fn unable(field: impl Into<String>, problem: impl fmt::Display) -> Denied {
    Denied {
        reason: RefusalReason::Unsupported,
        field: field.into(),
        problem: problem.to_string(),
    }
}

impl Privilege {
    /// Whether the pod may be what it asks to be, and whose ids it is given then.
    pub fn check(&self, spec: &SandboxSpec, host: Abilities) -> Result<Users, Denied> {
        // As the runtime names the default one.
        let handler = spec.runtime_handler.as_deref().unwrap_or("runc");
        let class = self.classes.get(handler).unwrap_or(&self.default);
        class.check(spec, host)
    }
}

impl Class {
    fn check(&self, spec: &SandboxSpec, host: Abilities) -> Result<Users, Denied> {
        let users = self.users(spec, host)?;
        self.check_pod(spec, host, users)?;
        let all = [
            ("init_containers", &spec.init_containers),
            ("containers", &spec.containers),
        ];
        for (field, containers) in all {
            for (i, container) in containers.iter().enumerate() {
                self.check_container(&format!("spec.{field}[{i}].security"), container, host, users)?;
            }
        }
        Ok(users)
    }

    fn users(&self, spec: &SandboxSpec, host: Abilities) -> Result<Users, Denied> {
        const FIELD: &str = "spec.security.host_users";
        match spec.security.host_users {
            Some(true) if self.host_users => Ok(Users::Host),
            Some(true) => Err(forbidden(FIELD, "pods of this pool have users of their own")),
            _ if host.user_namespaces => Ok(Users::Own),
            Some(false) => Err(unable(FIELD, "this host cannot give a pod users of its own")),
            None if self.require_user_namespaces => Err(unable(
                FIELD,
                "this host cannot give a pod users of its own, and has to",
            )),
            None => Ok(Users::Host),
        }
    }

    fn check_pod(&self, spec: &SandboxSpec, host: Abilities, users: Users) -> Result<(), Denied> {
        let security = &spec.security;
        for name in security.sysctls.keys() {
            if !names::is_safe(name) && !self.unsafe_sysctls.iter().any(|p| p.matches(name)) {
                return Err(forbidden(
                    "spec.security.sysctls",
                    format_args!("{name:?} is not among the sysctls that are allowed here"),
                ));
            }
        }
        if security.strict_supplemental_groups && !host.strict_supplemental_groups {
            return Err(unable(
                "spec.security.strict_supplemental_groups",
                "the runtime of this host cannot leave out an image's groups",
            ));
        }
        if spec.share_process_namespace && !self.share_process_namespace {
            return Err(forbidden(
                "spec.share_process_namespace",
                "containers of this pool do not share their processes",
            ));
        }
        let groups = security.supplemental_groups.iter().copied();
        for (i, group) in groups.enumerate() {
            check_id(&format!("spec.security.supplemental_groups[{i}]"), group, users)?;
        }
        if let Some(group) = security.fs_group {
            check_id("spec.security.fs_group", group, users)?;
        }
        for (i, volume) in spec.volumes.iter().enumerate() {
            if let VolumeSource::Files(files) = &volume.source {
                for owner in files.iter().filter_map(|file| file.owner) {
                    check_id(&format!("spec.volumes[{i}].files.owner"), owner, users)?;
                }
            }
        }
        Ok(())
    }

    fn check_container(
        &self,
        at: &str,
        container: &Container,
        host: Abilities,
        users: Users,
    ) -> Result<(), Denied> {
        let security = &container.security;
        for (i, name) in security.add_capabilities.iter().enumerate() {
            let listed = |list: &[Capability]| list.iter().any(|allowed| allowed.covers(name));
            let allowed = listed(&self.capabilities)
                || users == Users::Own && listed(&self.user_namespace_capabilities);
            if !allowed {
                return Err(forbidden(
                    format!("{at}.add_capabilities[{i}]"),
                    format_args!("{name} is not among the capabilities that are allowed here"),
                ));
            }
        }
        if security.seccomp == SeccompProfile::Unconfined && !self.unconfined_seccomp {
            return Err(forbidden(
                format!("{at}.seccomp"),
                "Unconfined is not allowed here: leave it out, or take RuntimeDefault",
            ));
        }
        self.check_labels(at, container, host)?;
        if !security.no_new_privileges && !self.privilege_escalation {
            return Err(forbidden(
                format!("{at}.no_new_privileges"),
                "has to be true here: set allowPrivilegeEscalation to false",
            ));
        }
        let ids = [
            ("run_as_user", security.run_as_user),
            ("run_as_group", security.run_as_group),
        ];
        for (field, id) in ids {
            if let Some(id) = id {
                check_id(&format!("{at}.{field}"), id, users)?;
            }
        }
        Ok(())
    }

    /// What the host's security modules make of the container.
    fn check_labels(&self, at: &str, container: &Container, host: Abilities) -> Result<(), Denied> {
        let armor = format!("{at}.app_armor");
        match &container.security.app_armor {
            None => {}
            Some(AppArmorProfile::Unconfined) if !self.unconfined_app_armor => {
                return Err(forbidden(
                    armor,
                    "Unconfined is not allowed here: leave it out, or take RuntimeDefault",
                ));
            }
            Some(AppArmorProfile::Localhost(name)) if !self.app_armor_profiles.contains(name) => {
                return Err(forbidden(
                    armor,
                    format_args!("{name:?} is not among the profiles that are allowed here"),
                ));
            }
            Some(AppArmorProfile::RuntimeDefault | AppArmorProfile::Localhost(_)) if !host.app_armor => {
                return Err(unable(armor, "this host has no AppArmor: leave it out"));
            }
            Some(_) => {}
        }
        if container.security.se_linux.is_some() {
            let field = format!("{at}.se_linux");
            if !self.se_linux_options {
                return Err(forbidden(
                    field,
                    "pods do not choose their labels here: leave it out",
                ));
            }
            if !host.se_linux {
                return Err(unable(field, "this host has no SELinux: leave it out"));
            }
        }
        Ok(())
    }
}

/// Whether a user or group is one that the pod has.
fn check_id(field: &str, id: i64, users: Users) -> Result<(), Denied> {
    let most = match users {
        Users::Own => i64::from(IDS_OF_A_POD) - 1,
        // Kubernetes' own bound.
        Users::Host => i64::from(i32::MAX),
    };
    if (0..=most).contains(&id) {
        Ok(())
    } else {
        Err(forbidden(
            field,
            format_args!("{id} is not an id that the pod has: 0 to {most}"),
        ))
    }
}

impl TryFrom<toml::Table> for Privilege {
    type Error = String;

    /// A class has what the table above it says, but for what it says itself.
    fn try_from(mut table: toml::Table) -> Result<Self, String> {
        let user_ids = match table.remove("user_ids") {
            None => UserIds::default(),
            Some(ids) => ids.try_into().map_err(|e| format!("user_ids: {e}"))?,
        };
        user_ids.check()?;
        let classes = match table.remove("classes") {
            None => toml::Table::new(),
            Some(toml::Value::Table(classes)) => classes,
            Some(_) => return Err("classes: must be a table of runtime handlers".into()),
        };
        let class = |table: toml::Table| table.try_into::<Class>().map_err(|e| e.to_string());
        let classes = classes
            .into_iter()
            .map(|(handler, own)| {
                let toml::Value::Table(own) = own else {
                    return Err(format!("classes.{handler}: must be a table"));
                };
                let mut whole = table.clone();
                whole.extend(own);
                let class = class(whole).map_err(|e| format!("classes.{handler}: {e}"))?;
                Ok((handler, class))
            })
            .collect::<Result<_, String>>()?;
        Ok(Self {
            user_ids,
            default: class(table)?,
            classes,
        })
    }
}

impl UserIds {
    fn check(self) -> Result<(), String> {
        let end = u64::from(self.first) + u64::from(self.pods) * u64::from(IDS_OF_A_POD);
        if self.first == 0 || !self.first.is_multiple_of(IDS_OF_A_POD) {
            return Err("user_ids.first: must be a multiple of 65536, and not 0".into());
        }
        if self.pods == 0 || end > 1 << 31 {
            return Err("user_ids.pods: must be at least 1, with the last id below 2147483648".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
