//! A sandbox and its containers in the runtime's words. Pure: called by
//! `perform` with what it has found out.

use std::{collections::HashMap, net::IpAddr, path::PathBuf};

use pool_agent_api::{
    HostName, SandboxSpec,
    spec::{AppArmorProfile, Container, ContainerResources, SeccompProfile},
};

use super::{
    LABEL_ATTEMPT, LABEL_CONTAINER, LABEL_HOST, LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID,
    wire::{self, security_profile::ProfileType},
};
use crate::{layout::SandboxDirs, policy::privilege::IDS_OF_A_POD, user_ids::IdRange};

/// What of /proc and /sys a container may not read or write. As a kubelet asks for
/// it: the runtime's own defaults are not applied when nothing is asked.
const MASKED_PATHS: [&str; 13] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/sys/dev/block",
];
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The period CPU limits are counted in, in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// The least quota the kernel takes.
const LEAST_QUOTA: u64 = 1_000;

/// How the node treats a pod when memory is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// By Kubernetes' rule: guaranteed if every container limits CPU and memory to
    /// what it requests; best effort if none asks for anything.
    pub fn of(spec: &SandboxSpec) -> Self {
        let all = || spec.all_containers().map(|c| c.resources);
        let asks = |r: ContainerResources| {
            [
                r.cpu_request_millis,
                r.cpu_limit_millis,
                r.memory_request_bytes,
                r.memory_limit_bytes,
            ]
            .into_iter()
            .flatten()
            .any(|n| n > 0)
        };
        let fixed = |request: Option<u64>, limit: Option<u64>| {
            limit.is_some_and(|limit| limit > 0 && request.is_none_or(|request| request == limit))
        };
        if !all().any(asks) {
            Self::BestEffort
        } else if all().all(|r| {
            fixed(r.cpu_request_millis, r.cpu_limit_millis)
                && fixed(r.memory_request_bytes, r.memory_limit_bytes)
        }) {
            Self::Guaranteed
        } else {
            Self::Burstable
        }
    }

    /// What the kernel adds to a process's badness, as a kubelet sets it.
    pub fn oom_score_adj(self, resources: ContainerResources, host_memory: u64) -> i64 {
        match self {
            Self::Guaranteed => -997,
            Self::BestEffort => 1000,
            Self::Burstable => {
                let request = resources
                    .memory_request_bytes
                    .or(resources.memory_limit_bytes)
                    .unwrap_or(0);
                let share = u128::from(request) * 1000 / u128::from(host_memory.max(1));
                1000_i64
                    .saturating_sub(i64::try_from(share).unwrap_or(1000))
                    .clamp(3, 999)
            }
        }
    }
}

/// Weight of a CPU request in cgroup v1's shares; 2 is the kernel's least.
pub fn cpu_shares(millis: u64) -> i64 {
    i64::try_from((u128::from(millis) * 1024 / 1000).clamp(2, 262_144)).unwrap_or(262_144)
}

/// Microseconds of CPU in each period.
pub fn cpu_quota(millis: u64) -> i64 {
    let quota = u128::from(millis) * u128::from(CPU_PERIOD) / 1000;
    i64::try_from(quota.max(LEAST_QUOTA.into())).unwrap_or(i64::MAX)
}

pub fn sandbox(
    spec: &SandboxSpec,
    host: &HostName,
    dirs: &SandboxDirs,
    cgroup_parent: &str,
    user_ids: Option<IdRange>,
) -> wire::PodSandboxConfig {
    wire::PodSandboxConfig {
        metadata: Some(wire::PodSandboxMetadata {
            name: spec.name.to_string(),
            uid: spec.key.pod.to_string(),
            namespace: spec.namespace.to_string(),
            attempt: spec.key.attempt.get(),
        }),
        hostname: spec.network.hostname.clone(),
        log_directory: dirs.logs().display().to_string(),
        dns_config: Some(wire::DnsConfig {
            servers: spec.network.nameservers.iter().map(IpAddr::to_string).collect(),
            searches: spec.network.searches.clone(),
            options: spec.network.dns_options.clone(),
        }),
        labels: labels(spec, host),
        annotations: HashMap::new(),
        linux: Some(wire::LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(wire::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(spec, user_ids)),
                // The pause process needs no more than nobody has.
                run_as_user: Some(wire::Int64Value { value: 65535 }),
                run_as_group: Some(wire::Int64Value { value: 65535 }),
                readonly_rootfs: true,
                supplemental_groups: groups(spec),
                supplemental_groups_policy: groups_policy(spec).into(),
                privileged: false,
                seccomp: Some(profile(ProfileType::RuntimeDefault)),
            }),
            sysctls: spec.security.sysctls.clone().into_iter().collect(),
            overhead: None,
            resources: None,
        }),
    }
}

/// What is known of a container only once it is about to start.
#[derive(Debug, Clone)]
pub struct Placement {
    pub restart: u32,
    /// The image's id on this host.
    pub image: String,
    pub pod_ip: IpAddr,
    pub host_ip: IpAddr,
    pub host_memory: u64,
    /// As the sandbox has them.
    pub user_ids: Option<IdRange>,
    /// The kernel can end all of a container when its memory is short.
    pub kill_as_a_whole: bool,
    pub mounts: Vec<HostMount>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    pub host_path: PathBuf,
    pub container_path: String,
    pub read_only: bool,
}

pub fn container(
    spec: &SandboxSpec,
    container: &Container,
    host: &HostName,
    placement: &Placement,
) -> wire::ContainerConfig {
    let render = |text: &pool_agent_api::spec::Text| text.render(placement.pod_ip, placement.host_ip);
    // The later of one name wins, in the earlier one's place, as in a kubelet.
    let mut env: Vec<(String, String)> = vec![];
    for variable in &container.env {
        let value = render(&variable.value);
        match env.iter_mut().find(|(name, _)| *name == variable.name) {
            Some(known) => known.1 = value,
            None => env.push((variable.name.clone(), value)),
        }
    }
    let security = &container.security;
    let mut labels = labels(spec, host);
    labels.insert(LABEL_CONTAINER.into(), container.name.to_string());
    wire::ContainerConfig {
        metadata: Some(wire::ContainerMetadata {
            name: container.name.to_string(),
            attempt: placement.restart,
        }),
        image: Some(wire::ImageSpec {
            image: placement.image.clone(),
            user_specified_image: container.image.clone(),
            runtime_handler: spec.runtime_handler.clone().unwrap_or_default(),
        }),
        command: container.command.iter().map(render).collect(),
        args: container.args.iter().map(render).collect(),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: env
            .into_iter()
            .map(|(key, value)| wire::KeyValue { key, value })
            .collect(),
        mounts: placement
            .mounts
            .iter()
            .map(|m| wire::Mount {
                container_path: m.container_path.clone(),
                host_path: m.host_path.display().to_string(),
                readonly: m.read_only,
                propagation: wire::MountPropagation::PropagationPrivate.into(),
                // The pod's own ids are those on disk: a volume needs no other owners
                // than without a user namespace.
                uid_mappings: placement.user_ids.map(mapping).into_iter().collect(),
                gid_mappings: placement.user_ids.map(mapping).into_iter().collect(),
            })
            .collect(),
        labels,
        annotations: HashMap::new(),
        log_path: SandboxDirs::log_name(&container.name, placement.restart),
        stdin: container.stdin,
        stdin_once: container.stdin_once,
        tty: container.tty,
        linux: Some(wire::LinuxContainerConfig {
            resources: Some(resources(spec, container.resources, placement)),
            security_context: Some(wire::LinuxContainerSecurityContext {
                capabilities: Some(wire::Capability {
                    add_capabilities: security.add_capabilities.clone(),
                    drop_capabilities: security.drop_capabilities.clone(),
                }),
                privileged: false,
                namespace_options: Some(namespaces(spec, placement.user_ids)),
                run_as_user: security.run_as_user.map(|value| wire::Int64Value { value }),
                run_as_group: security
                    .run_as_group
                    // The runtime takes a group only beside a user.
                    .filter(|_| security.run_as_user.is_some())
                    .map(|value| wire::Int64Value { value }),
                run_as_username: String::new(),
                readonly_rootfs: security.read_only_root_filesystem,
                supplemental_groups: groups(spec),
                supplemental_groups_policy: groups_policy(spec).into(),
                no_new_privs: security.no_new_privileges,
                masked_paths: MASKED_PATHS.map(Into::into).to_vec(),
                readonly_paths: READONLY_PATHS.map(Into::into).to_vec(),
                seccomp: Some(profile(match security.seccomp {
                    SeccompProfile::RuntimeDefault => ProfileType::RuntimeDefault,
                    SeccompProfile::Unconfined => ProfileType::Unconfined,
                })),
                // Nothing asked is the runtime's default where the host has AppArmor.
                apparmor: security.app_armor.as_ref().map(|asked| match asked {
                    AppArmorProfile::RuntimeDefault => profile(ProfileType::RuntimeDefault),
                    AppArmorProfile::Unconfined => profile(ProfileType::Unconfined),
                    AppArmorProfile::Localhost(name) => wire::SecurityProfile {
                        localhost_ref: name.clone(),
                        ..profile(ProfileType::Localhost)
                    },
                }),
                selinux_options: security.se_linux.clone().map(|asked| wire::SeLinuxOption {
                    user: asked.user,
                    role: asked.role,
                    r#type: asked.kind,
                    level: asked.level,
                }),
            }),
        }),
        stop_signal: container
            .stop_signal
            .as_deref()
            .and_then(stop_signal)
            .unwrap_or_default()
            .into(),
    }
}

/// `SIGTERM` and its like, as the wire numbers them; None for a name it has not.
pub fn stop_signal(name: &str) -> Option<wire::Signal> {
    let wire_name = name
        .replace("RTMIN+", "RTMINPLUS")
        .replace("RTMAX-", "RTMAXMINUS");
    wire::Signal::from_str_name(&format!("SIGNAL_{wire_name}"))
}

fn resources(
    spec: &SandboxSpec,
    of: ContainerResources,
    placement: &Placement,
) -> wire::LinuxContainerResources {
    let request = of.cpu_request_millis.or(of.cpu_limit_millis).unwrap_or(0);
    let memory = of
        .memory_limit_bytes
        .map_or(0, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    // As a kubelet does unless told otherwise (singleProcessOOMKill).
    let unified = match placement.kill_as_a_whole {
        true => HashMap::from([("memory.oom.group".into(), "1".into())]),
        false => HashMap::new(),
    };
    wire::LinuxContainerResources {
        cpu_period: i64::try_from(CPU_PERIOD).unwrap_or_default(),
        cpu_quota: of.cpu_limit_millis.filter(|&m| m > 0).map_or(0, cpu_quota),
        cpu_shares: cpu_shares(request),
        memory_limit_in_bytes: memory,
        oom_score_adj: Qos::of(spec).oom_score_adj(of, placement.host_memory),
        unified,
        memory_swap_limit_in_bytes: memory,
    }
}

fn labels(spec: &SandboxSpec, host: &HostName) -> HashMap<String, String> {
    HashMap::from([
        (LABEL_POD_UID.into(), spec.key.pod.to_string()),
        (LABEL_POD_NAME.into(), spec.name.to_string()),
        (LABEL_POD_NAMESPACE.into(), spec.namespace.to_string()),
        (LABEL_ATTEMPT.into(), spec.key.attempt.to_string()),
        (LABEL_HOST.into(), host.to_string()),
    ])
}

fn namespaces(spec: &SandboxSpec, user_ids: Option<IdRange>) -> wire::NamespaceOption {
    wire::NamespaceOption {
        network: wire::NamespaceMode::Pod.into(),
        pid: if spec.share_process_namespace {
            wire::NamespaceMode::Pod
        } else {
            wire::NamespaceMode::Container
        }
        .into(),
        ipc: wire::NamespaceMode::Pod.into(),
        userns_options: user_ids.map(|ids| wire::UserNamespace {
            mode: wire::NamespaceMode::Pod.into(),
            uids: vec![mapping(ids)],
            gids: vec![mapping(ids)],
        }),
    }
}

fn mapping(ids: IdRange) -> wire::IdMapping {
    wire::IdMapping {
        host_id: ids.first,
        container_id: 0,
        length: IDS_OF_A_POD,
    }
}

fn profile(kind: ProfileType) -> wire::SecurityProfile {
    wire::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: String::new(),
    }
}

fn groups_policy(spec: &SandboxSpec) -> wire::SupplementalGroupsPolicy {
    match spec.security.strict_supplemental_groups {
        true => wire::SupplementalGroupsPolicy::Strict,
        false => wire::SupplementalGroupsPolicy::Merge,
    }
}

fn groups(spec: &SandboxSpec) -> Vec<i64> {
    let mut groups = spec.security.supplemental_groups.clone();
    groups.extend(spec.security.fs_group.filter(|g| !groups.contains(g)));
    groups
}

#[cfg(test)]
mod tests;
