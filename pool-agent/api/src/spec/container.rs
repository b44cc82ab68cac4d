//! One container of a sandbox.

use std::fmt;

use super::{Hook, Probe, Text};
use crate::{
    ContainerName, Invalid, VolumeName,
    invalid::{each, required},
    wire,
};

#[derive(Clone, PartialEq, Eq)]
pub struct EnvVar {
    pub name: String,
    pub value: Text,
}

/// Values may come from Secrets: they never reach a log.
impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EnvVar").field(&self.name).finish()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub volume: VolumeName,
    /// Absolute.
    pub mount_path: String,
    pub read_only: bool,
    /// A path within the volume; checked again once rendered.
    pub sub_path: Option<Text>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum SeccompProfile {
    #[default]
    RuntimeDefault,
    Unconfined,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AppArmorProfile {
    RuntimeDefault,
    Unconfined,
    /// One that is loaded on the host, by its name.
    Localhost(String),
}

/// Empty: not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct SeLinuxOptions {
    pub user: String,
    pub role: String,
    pub kind: String,
    pub level: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerSecurity {
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    /// Refuse to start as UID 0, also if the image says so.
    pub run_as_non_root: bool,
    pub read_only_root_filesystem: bool,
    pub no_new_privileges: bool,
    /// Without the `CAP_` prefix.
    pub add_capabilities: Vec<String>,
    /// Without the `CAP_` prefix; `ALL` is allowed.
    pub drop_capabilities: Vec<String>,
    pub seccomp: SeccompProfile,
    /// None: the runtime's default where the host has AppArmor, and nothing elsewhere.
    pub app_armor: Option<AppArmorProfile>,
    /// None: as the runtime labels it.
    pub se_linux: Option<SeLinuxOptions>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContainerResources {
    pub cpu_request_millis: Option<u64>,
    pub cpu_limit_millis: Option<u64>,
    pub memory_request_bytes: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
    pub ephemeral_storage_request_bytes: Option<u64>,
    pub ephemeral_storage_limit_bytes: Option<u64>,
}

/// Where the last words of a container are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TerminationMessage {
    /// Absolute path in the container.
    pub path: String,
    pub fallback_to_logs: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    pub name: ContainerName,
    pub image: String,
    pub pull_policy: PullPolicy,
    /// Empty: the image's entrypoint.
    pub command: Vec<Text>,
    pub args: Vec<Text>,
    /// None: the image's.
    pub working_dir: Option<String>,
    /// In order; the later of one name wins.
    pub env: Vec<EnvVar>,
    pub mounts: Vec<Mount>,
    pub security: ContainerSecurity,
    pub resources: ContainerResources,
    pub startup_probe: Option<Probe>,
    pub liveness_probe: Option<Probe>,
    pub readiness_probe: Option<Probe>,
    pub post_start: Option<Hook>,
    pub pre_stop: Option<Hook>,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    pub termination_message: TerminationMessage,
    /// An init container with restartPolicy Always: a sidecar.
    pub restartable_init: bool,
    /// E.g. `SIGTERM`; None: the image's.
    pub stop_signal: Option<String>,
}

fn absolute(field: &str, path: &str) -> Result<(), Invalid> {
    if !path.starts_with('/') || path.len() > 4096 || path.bytes().any(|c| c == 0) {
        return Err(Invalid::new(
            field,
            format_args!("{path:?} must be an absolute path of at most 4096 characters"),
        ));
    }
    Ok(())
}

fn capability(name: String) -> Result<String, Invalid> {
    if name.is_empty()
        || name.len() > 32
        || !name
            .bytes()
            .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'_')
    {
        return Err(Invalid::new(
            "name",
            format_args!("{name:?} is not a capability such as NET_ADMIN"),
        ));
    }
    if name.starts_with("CAP_") {
        return Err(Invalid::new(
            "name",
            format_args!("{name:?}: write it without CAP_"),
        ));
    }
    Ok(name)
}

fn app_armor(profile: wire::AppArmorProfile, localhost: String) -> Result<Option<AppArmorProfile>, Invalid> {
    use wire::AppArmorProfile as W;
    if (profile == W::Localhost) == localhost.is_empty() {
        return Err(Invalid::new(
            "app_armor_localhost",
            "is the name of the profile if app_armor is LOCALHOST, and empty otherwise",
        ));
    }
    Ok(match profile {
        W::Unspecified => None,
        W::RuntimeDefault => Some(AppArmorProfile::RuntimeDefault),
        W::Unconfined => Some(AppArmorProfile::Unconfined),
        W::Localhost => Some(AppArmorProfile::Localhost(localhost)),
    })
}

impl From<wire::SeLinuxOptions> for SeLinuxOptions {
    fn from(o: wire::SeLinuxOptions) -> Self {
        Self {
            user: o.user,
            role: o.role,
            kind: o.r#type,
            level: o.level,
        }
    }
}

impl From<SeLinuxOptions> for wire::SeLinuxOptions {
    fn from(o: SeLinuxOptions) -> Self {
        Self {
            user: o.user,
            role: o.role,
            r#type: o.kind,
            level: o.level,
        }
    }
}

impl Mount {
    fn parse(m: wire::Mount) -> Result<Self, Invalid> {
        absolute("mount_path", &m.mount_path)?;
        Ok(Self {
            volume: VolumeName::parse("volume", m.volume)?,
            mount_path: m.mount_path,
            read_only: m.read_only,
            sub_path: m
                .sub_path
                .map(Text::try_from)
                .transpose()
                .map_err(|e| e.within("sub_path"))?,
        })
    }

    /// Refused if a rendered `sub_path` would leave the volume.
    pub fn check_sub_path(path: &str) -> Result<(), Invalid> {
        super::volume::relative_path("sub_path", path)
    }
}

impl TryFrom<wire::Container> for Container {
    type Error = Invalid;

    fn try_from(c: wire::Container) -> Result<Self, Invalid> {
        let pull_policy = match c.pull_policy() {
            wire::PullPolicy::Always => PullPolicy::Always,
            wire::PullPolicy::IfNotPresent => PullPolicy::IfNotPresent,
            wire::PullPolicy::Never => PullPolicy::Never,
            wire::PullPolicy::Unspecified => return Err(Invalid::missing("pull_policy")),
        };
        if c.image.is_empty() {
            return Err(Invalid::missing("image"));
        }
        let security = required("security", c.security)?;
        let seccomp = match security.seccomp() {
            wire::SeccompProfile::RuntimeDefault => SeccompProfile::RuntimeDefault,
            wire::SeccompProfile::Unconfined => SeccompProfile::Unconfined,
            wire::SeccompProfile::Unspecified => return Err(Invalid::missing("security.seccomp")),
        };
        // A number that is unknown here would be read as nothing asked for.
        let armor = wire::AppArmorProfile::try_from(security.app_armor).map_err(|_| {
            Invalid::new(
                "security.app_armor",
                format_args!("{} is no profile", security.app_armor),
            )
        })?;
        let armor =
            app_armor(armor, security.app_armor_localhost.clone()).map_err(|e| e.within("security"))?;
        if !c.working_dir.is_empty() {
            absolute("working_dir", &c.working_dir)?;
        }
        absolute("termination_message_path", &c.termination_message_path)?;
        let resources = c.resources.unwrap_or_default();
        let probe = |field: &str, p: Option<wire::Probe>| {
            p.map(Probe::try_from).transpose().map_err(|e| e.within(field))
        };
        let hook = |field: &str, h: Option<wire::Hook>| {
            h.map(Hook::try_from).transpose().map_err(|e| e.within(field))
        };
        Ok(Self {
            name: ContainerName::parse("name", c.name)?,
            image: c.image,
            pull_policy,
            command: each("command", c.command, Text::try_from)?,
            args: each("args", c.args, Text::try_from)?,
            working_dir: Some(c.working_dir).filter(|d| !d.is_empty()),
            env: each("env", c.env, |env| {
                if env.name.is_empty() || env.name.contains(['=', '\0']) {
                    return Err(Invalid::new(
                        "name",
                        format_args!("{:?} must be non-empty, without '='", env.name),
                    ));
                }
                let value = env
                    .value
                    .unwrap_or_default()
                    .try_into()
                    .map_err(|e: Invalid| e.within("value"))?;
                Ok(EnvVar {
                    name: env.name,
                    value,
                })
            })?,
            mounts: each("mounts", c.mounts, Mount::parse)?,
            security: ContainerSecurity {
                run_as_user: security.run_as_user,
                run_as_group: security.run_as_group,
                run_as_non_root: security.run_as_non_root,
                read_only_root_filesystem: security.read_only_root_filesystem,
                no_new_privileges: security.no_new_privileges,
                add_capabilities: each("security.add_capabilities", security.add_capabilities, capability)?,
                drop_capabilities: each(
                    "security.drop_capabilities",
                    security.drop_capabilities,
                    capability,
                )?,
                seccomp,
                app_armor: armor,
                se_linux: security.se_linux.map(Into::into),
            },
            resources: ContainerResources {
                cpu_request_millis: resources.cpu_request_millis,
                cpu_limit_millis: resources.cpu_limit_millis,
                memory_request_bytes: resources.memory_request_bytes,
                memory_limit_bytes: resources.memory_limit_bytes,
                ephemeral_storage_request_bytes: resources.ephemeral_storage_request_bytes,
                ephemeral_storage_limit_bytes: resources.ephemeral_storage_limit_bytes,
            },
            startup_probe: probe("startup_probe", c.startup_probe)?,
            liveness_probe: probe("liveness_probe", c.liveness_probe)?,
            readiness_probe: probe("readiness_probe", c.readiness_probe)?,
            post_start: hook("post_start", c.post_start)?,
            pre_stop: hook("pre_stop", c.pre_stop)?,
            stdin: c.stdin,
            stdin_once: c.stdin_once,
            tty: c.tty,
            termination_message: TerminationMessage {
                path: c.termination_message_path,
                fallback_to_logs: c.termination_message_fallback_to_logs,
            },
            restartable_init: c.restartable_init,
            stop_signal: c.stop_signal,
        })
    }
}

impl From<Container> for wire::Container {
    fn from(c: Container) -> Self {
        let (armor, armor_localhost) = match c.security.app_armor {
            None => (wire::AppArmorProfile::Unspecified, String::new()),
            Some(AppArmorProfile::RuntimeDefault) => (wire::AppArmorProfile::RuntimeDefault, String::new()),
            Some(AppArmorProfile::Unconfined) => (wire::AppArmorProfile::Unconfined, String::new()),
            Some(AppArmorProfile::Localhost(name)) => (wire::AppArmorProfile::Localhost, name),
        };
        let texts = |texts: Vec<Text>| texts.into_iter().map(Into::into).collect();
        Self {
            name: c.name.into(),
            image: c.image,
            pull_policy: match c.pull_policy {
                PullPolicy::Always => wire::PullPolicy::Always,
                PullPolicy::IfNotPresent => wire::PullPolicy::IfNotPresent,
                PullPolicy::Never => wire::PullPolicy::Never,
            }
            .into(),
            command: texts(c.command),
            args: texts(c.args),
            working_dir: c.working_dir.unwrap_or_default(),
            env: c
                .env
                .into_iter()
                .map(|e| wire::EnvVar {
                    name: e.name,
                    value: Some(e.value.into()),
                })
                .collect(),
            mounts: c
                .mounts
                .into_iter()
                .map(|m| wire::Mount {
                    volume: m.volume.into(),
                    mount_path: m.mount_path,
                    read_only: m.read_only,
                    sub_path: m.sub_path.map(Into::into),
                })
                .collect(),
            security: Some(wire::ContainerSecurity {
                run_as_user: c.security.run_as_user,
                run_as_group: c.security.run_as_group,
                run_as_non_root: c.security.run_as_non_root,
                read_only_root_filesystem: c.security.read_only_root_filesystem,
                no_new_privileges: c.security.no_new_privileges,
                add_capabilities: c.security.add_capabilities,
                drop_capabilities: c.security.drop_capabilities,
                seccomp: match c.security.seccomp {
                    SeccompProfile::RuntimeDefault => wire::SeccompProfile::RuntimeDefault,
                    SeccompProfile::Unconfined => wire::SeccompProfile::Unconfined,
                }
                .into(),
                app_armor: armor.into(),
                app_armor_localhost: armor_localhost,
                se_linux: c.security.se_linux.map(Into::into),
            }),
            resources: Some(wire::ContainerResources {
                cpu_request_millis: c.resources.cpu_request_millis,
                cpu_limit_millis: c.resources.cpu_limit_millis,
                memory_request_bytes: c.resources.memory_request_bytes,
                memory_limit_bytes: c.resources.memory_limit_bytes,
                ephemeral_storage_request_bytes: c.resources.ephemeral_storage_request_bytes,
                ephemeral_storage_limit_bytes: c.resources.ephemeral_storage_limit_bytes,
            }),
            startup_probe: c.startup_probe.map(Into::into),
            liveness_probe: c.liveness_probe.map(Into::into),
            readiness_probe: c.readiness_probe.map(Into::into),
            post_start: c.post_start.map(Into::into),
            pre_stop: c.pre_stop.map(Into::into),
            stdin: c.stdin,
            stdin_once: c.stdin_once,
            tty: c.tty,
            termination_message_path: c.termination_message.path,
            termination_message_fallback_to_logs: c.termination_message.fallback_to_logs,
            restartable_init: c.restartable_init,
            stop_signal: c.stop_signal,
        }
    }
}
