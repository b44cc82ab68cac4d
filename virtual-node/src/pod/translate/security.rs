//! Who a pod's processes are and what they may do. What no host gives is refused
//! here; what a host's operator may allow goes to the host, which decides. Nothing
//! is left out.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    AppArmorProfile as PodAppArmor, Container, PodSecurityContext, PodSpec, SeccompProfile as PodSeccomp,
};
use pool_agent_api::spec::{AppArmorProfile, ContainerSecurity, PodSecurity, SeLinuxOptions, SeccompProfile};

use super::Untranslatable;

pub(super) fn pod_security(spec: &PodSpec) -> Result<PodSecurity, Untranslatable> {
    let Some(context) = &spec.security_context else {
        return Ok(PodSecurity {
            host_users: spec.host_users,
            ..Default::default()
        });
    };
    let at = "spec.securityContext";
    if context.windows_options.is_some() {
        return Err(Untranslatable::unsupported(
            format!("{at}.windowsOptions"),
            "hosts of the pool run linux",
        ));
    }
    let strict_supplemental_groups = match context.supplemental_groups_policy.as_deref() {
        None | Some("" | "Merge") => false,
        Some("Strict") => true,
        Some(other) => {
            return Err(Untranslatable::unsupported(
                format!("{at}.supplementalGroupsPolicy"),
                format_args!("{other:?} is not Merge or Strict"),
            ));
        }
    };
    Ok(PodSecurity {
        fs_group: context.fs_group,
        fs_group_on_root_mismatch_only: context.fs_group_change_policy.as_deref() == Some("OnRootMismatch"),
        supplemental_groups: context.supplemental_groups.clone().unwrap_or_default(),
        strict_supplemental_groups,
        sysctls: sysctls(context, at)?,
        host_users: spec.host_users,
    })
}

/// Those that the kernel keeps apart for each pod; which of them are allowed is for
/// the host to say.
fn sysctls(context: &PodSecurityContext, at: &str) -> Result<BTreeMap<String, String>, Untranslatable> {
    const NAMESPACED: [&str; 5] = ["net.", "kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
    let sysctls = context.sysctls.iter().flatten().enumerate();
    sysctls
        .map(|(i, s)| {
            // Kubernetes takes slashes for dots.
            let name = s.name.replace('/', ".");
            if NAMESPACED.iter().any(|known| name.starts_with(known)) {
                Ok((name, s.value.clone()))
            } else {
                Err(Untranslatable::unsupported(
                    format!("{at}.sysctls[{i}].name"),
                    format_args!("{:?} is of the host, which other pods share", s.name),
                ))
            }
        })
        .collect()
}

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
    let app_armor = armor.map(|profile| app_armor(profile, &at)).transpose()?;
    let labels = own.se_linux_options.as_ref().or(pod.se_linux_options.as_ref());
    let se_linux = labels.map(|options| SeLinuxOptions {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        kind: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    });
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
        // Of a runtime class only its hosts know how far it confines.
        if spec.runtime_class_name.is_none() && HOST_CAPABILITIES.contains(&name.as_str()) {
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
        app_armor,
        se_linux,
    })
}

fn app_armor(profile: &PodAppArmor, at: &str) -> Result<AppArmorProfile, Untranslatable> {
    match (profile.type_.as_str(), &profile.localhost_profile) {
        ("RuntimeDefault", _) => Ok(AppArmorProfile::RuntimeDefault),
        ("Unconfined", _) => Ok(AppArmorProfile::Unconfined),
        ("Localhost", Some(name)) if !name.is_empty() => Ok(AppArmorProfile::Localhost(name.clone())),
        (other, _) => Err(Untranslatable::unsupported(
            format!("{at}.appArmorProfile"),
            format_args!("{other:?} is not RuntimeDefault, Unconfined or a named profile"),
        )),
    }
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
