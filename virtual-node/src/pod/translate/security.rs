//! Who a pod's processes are and what they may do. Anything that would widen
//! their rights over the host is refused; anything that would narrow them and
//! cannot be done is refused too.

use k8s_openapi::api::core::v1::{Container, PodSecurityContext, PodSpec, SeccompProfile as PodSeccomp};
use pool_agent_api::spec::{ContainerSecurity, PodSecurity, SeccompProfile};

use super::Untranslatable;

pub(super) fn pod_security(spec: &PodSpec) -> Result<PodSecurity, Untranslatable> {
    let Some(context) = &spec.security_context else {
        return Ok(PodSecurity::default());
    };
    let at = "spec.securityContext";
    if context.supplemental_groups_policy.as_deref() == Some("Strict") {
        return Err(Untranslatable::unsupported(
            format!("{at}.supplementalGroupsPolicy"),
            "Strict is not supported",
        ));
    }
    if context.windows_options.is_some() {
        return Err(Untranslatable::unsupported(
            format!("{at}.windowsOptions"),
            "hosts of the pool run linux",
        ));
    }
    Ok(PodSecurity {
        fs_group: context.fs_group,
        fs_group_on_root_mismatch_only: context.fs_group_change_policy.as_deref() == Some("OnRootMismatch"),
        supplemental_groups: context.supplemental_groups.clone().unwrap_or_default(),
        sysctls: context
            .sysctls
            .iter()
            .flatten()
            .enumerate()
            .map(|(i, s)| {
                if SAFE_SYSCTLS.contains(&s.name.as_str()) {
                    Ok((s.name.clone(), s.value.clone()))
                } else {
                    Err(Untranslatable::unsupported(
                        format!("{at}.sysctls[{i}].name"),
                        format_args!("{:?} is not among the sysctls that are safe for a pod", s.name),
                    ))
                }
            })
            .collect::<Result<_, _>>()?,
    })
}

/// Kubernetes' safe set: namespaced, and without effect on other pods.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// The user that a container runs as, if the pod says so.
pub(super) fn run_as_user(spec: &PodSpec, container: &Container) -> Option<i64> {
    let own = container.security_context.as_ref().and_then(|c| c.run_as_user);
    own.or_else(|| spec.security_context.as_ref().and_then(|c| c.run_as_user))
}

pub(super) fn container_security(
    spec: &PodSpec,
    container: &Container,
    at: &str,
) -> Result<ContainerSecurity, Untranslatable> {
    let none = PodSecurityContext::default();
    let pod = spec.security_context.as_ref().unwrap_or(&none);
    let own = container.security_context.clone().unwrap_or_default();
    let at = format!("{at}.securityContext");
    if own.privileged == Some(true) {
        return Err(Untranslatable::unsupported(
            format!("{at}.privileged"),
            "privileged containers would own the host they share",
        ));
    }
    if own
        .proc_mount
        .as_deref()
        .is_some_and(|p| !p.is_empty() && p != "Default")
    {
        return Err(Untranslatable::unsupported(
            format!("{at}.procMount"),
            "only Default is supported",
        ));
    }
    if own.windows_options.is_some() {
        return Err(Untranslatable::unsupported(
            format!("{at}.windowsOptions"),
            "hosts of the pool run linux",
        ));
    }
    let armor = own.app_armor_profile.as_ref().or(pod.app_armor_profile.as_ref());
    if armor.is_some_and(|a| a.type_ == "Localhost") {
        return Err(Untranslatable::unsupported(
            format!("{at}.appArmorProfile"),
            "profiles of the host are not supported",
        ));
    }
    let seccomp = match own.seccomp_profile.as_ref().or(pod.seccomp_profile.as_ref()) {
        None => SeccompProfile::RuntimeDefault,
        Some(profile) => seccomp(profile, &at)?,
    };
    let names = |list: Option<&Vec<String>>| -> Vec<String> {
        list.into_iter()
            .flatten()
            .map(|name| {
                let name = name.to_ascii_uppercase();
                name.strip_prefix("CAP_").map(str::to_owned).unwrap_or(name)
            })
            .collect()
    };
    let capabilities = own.capabilities.as_ref();
    let add = names(capabilities.and_then(|c| c.add.as_ref()));
    for (i, name) in add.iter().enumerate() {
        if HOST_CAPABILITIES.contains(&name.as_str()) {
            return Err(Untranslatable::unsupported(
                format!("{at}.capabilities.add[{i}]"),
                format_args!("{name} reaches beyond the pod, into the host it shares"),
            ));
        }
    }
    Ok(ContainerSecurity {
        run_as_user: own.run_as_user.or(pod.run_as_user),
        run_as_group: own.run_as_group.or(pod.run_as_group),
        run_as_non_root: own.run_as_non_root.or(pod.run_as_non_root) == Some(true),
        read_only_root_filesystem: own.read_only_root_filesystem == Some(true),
        no_new_privileges: own.allow_privilege_escalation == Some(false),
        add_capabilities: add,
        drop_capabilities: names(capabilities.and_then(|c| c.drop.as_ref())),
        seccomp,
    })
}

/// Capabilities that no namespace confines: to add one is to hand over the host.
const HOST_CAPABILITIES: [&str; 16] = [
    "ALL",
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "BLOCK_SUSPEND",
    "BPF",
    "DAC_READ_SEARCH",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "PERFMON",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_TIME",
];

fn seccomp(profile: &PodSeccomp, at: &str) -> Result<SeccompProfile, Untranslatable> {
    match profile.type_.as_str() {
        "RuntimeDefault" => Ok(SeccompProfile::RuntimeDefault),
        "Unconfined" => Ok(SeccompProfile::Unconfined),
        other => Err(Untranslatable::unsupported(
            format!("{at}.seccompProfile.type"),
            format_args!("{other:?} is not supported: profiles of the host are out of reach"),
        )),
    }
}
