//! One container.

use k8s_openapi::api::core::v1::{
    Container as PodContainer, Pod, PodSpec, ResourceRequirements, VolumeMount,
};
use pool_agent_api::{
    ContainerName, VolumeName,
    spec::{Container, ContainerResources, Mount, PullPolicy, RegistryCredential, TerminationMessage, Text},
};

use super::{
    NodeFacts, Untranslatable,
    env::{Environment, environment},
    expansion::expand,
    probe, security,
};
use crate::{pod::references::Resolved, quantity};

/// The container, and messages on variables that could not be set.
pub(super) fn container(
    pod: &Pod,
    spec: &PodSpec,
    container: &PodContainer,
    resolved: &Resolved,
    facts: &NodeFacts,
    at: &str,
) -> Result<(Container, Vec<String>), Untranslatable> {
    refuse_unsupported(container, at)?;
    let mut env = environment(pod, container, resolved, facts, at)?;
    let skipped = std::mem::take(&mut env.skipped);
    let texts = |list: Option<&Vec<String>>| -> Vec<Text> {
        list.into_iter()
            .flatten()
            .map(|text| expand(text, |name| env.get(name)))
            .collect()
    };
    let probe = |probe: Option<&_>, field: &str| {
        probe
            .map(|p| probe::probe(container, p, &format!("{at}.{field}")))
            .transpose()
    };
    let lifecycle = container.lifecycle.as_ref();
    let hook = |hook: Option<&_>, field: &str| {
        hook.map(|h| probe::hook(container, h, &format!("{at}.lifecycle.{field}")))
            .transpose()
    };
    let (command, args) = (texts(container.command.as_ref()), texts(container.args.as_ref()));
    let mounts = container
        .volume_mounts
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, m)| mount(m, &env, &format!("{at}.volumeMounts[{i}]")))
        .collect::<Result<_, _>>()?;
    let parsed = Container {
        name: ContainerName::parse(&format!("{at}.name"), container.name.clone())?,
        image: container.image.clone().unwrap_or_default(),
        pull_policy: pull_policy(container, at)?,
        command,
        args,
        working_dir: container.working_dir.clone().filter(|d| !d.is_empty()),
        mounts,
        security: security::container_security(spec, container, at)?,
        resources: resources(container.resources.as_ref(), &format!("{at}.resources"))?,
        startup_probe: probe(container.startup_probe.as_ref(), "startupProbe")?,
        liveness_probe: probe(container.liveness_probe.as_ref(), "livenessProbe")?,
        readiness_probe: probe(container.readiness_probe.as_ref(), "readinessProbe")?,
        post_start: hook(lifecycle.and_then(|l| l.post_start.as_ref()), "postStart")?,
        pre_stop: hook(lifecycle.and_then(|l| l.pre_stop.as_ref()), "preStop")?,
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        termination_message: TerminationMessage {
            path: container
                .termination_message_path
                .clone()
                .filter(|p| !p.is_empty())
                .unwrap_or_else(|| "/dev/termination-log".into()),
            fallback_to_logs: container.termination_message_policy.as_deref()
                == Some("FallbackToLogsOnError"),
        },
        restartable_init: container.restart_policy.as_deref() == Some("Always"),
        stop_signal: lifecycle.and_then(|l| l.stop_signal.clone()),
        env: env.into_vars(),
    };
    let skipped = skipped
        .into_iter()
        .map(|m| format!("{m} (container {})", container.name))
        .collect();
    Ok((parsed, skipped))
}

fn refuse_unsupported(container: &PodContainer, at: &str) -> Result<(), Untranslatable> {
    let init = at.contains("initContainers");
    match container.restart_policy.as_deref() {
        None | Some("") => {}
        Some("Always") if init => {}
        Some(_) => {
            return Err(Untranslatable::unsupported(
                format!("{at}.restartPolicy"),
                "only Always, of an init container, is supported",
            ));
        }
    }
    if container
        .restart_policy_rules
        .as_ref()
        .is_some_and(|r| !r.is_empty())
    {
        return Err(Untranslatable::unsupported(
            format!("{at}.restartPolicyRules"),
            "restart rules of a container are not supported",
        ));
    }
    if container.volume_devices.as_ref().is_some_and(|d| !d.is_empty()) {
        return Err(Untranslatable::unsupported(
            format!("{at}.volumeDevices"),
            "block devices are not supported",
        ));
    }
    for (i, port) in container.ports.iter().flatten().enumerate() {
        if port.host_port.is_some_and(|p| p != 0) {
            return Err(Untranslatable::unsupported(
                format!("{at}.ports[{i}].hostPort"),
                "pods have no ports of a host",
            ));
        }
    }
    Ok(())
}

fn mount(mount: &VolumeMount, env: &Environment, at: &str) -> Result<Mount, Untranslatable> {
    if mount
        .mount_propagation
        .as_deref()
        .is_some_and(|p| !p.is_empty() && p != "None")
    {
        return Err(Untranslatable::unsupported(
            format!("{at}.mountPropagation"),
            "only None is supported",
        ));
    }
    if mount.recursive_read_only.as_deref() == Some("Enabled") {
        return Err(Untranslatable::unsupported(
            format!("{at}.recursiveReadOnly"),
            "Enabled is not supported",
        ));
    }
    if mount.bind_mount_options.as_ref().is_some_and(|o| !o.is_empty()) {
        return Err(Untranslatable::unsupported(
            format!("{at}.bindMountOptions"),
            "options of mounts are not supported",
        ));
    }
    let plain = mount
        .sub_path
        .as_deref()
        .filter(|p| !p.is_empty())
        .map(Text::from);
    let expanded = mount
        .sub_path_expr
        .as_deref()
        .filter(|p| !p.is_empty())
        .map(|p| expand(p, |name| env.get(name)));
    Ok(Mount {
        volume: VolumeName::parse(&format!("{at}.name"), mount.name.clone())?,
        mount_path: absolute(&mount.mount_path),
        read_only: mount.read_only == Some(true),
        sub_path: plain.or(expanded),
    })
}

/// Kubernetes lets a mount path begin without a slash; it means the same.
fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

fn pull_policy(container: &PodContainer, at: &str) -> Result<PullPolicy, Untranslatable> {
    match container.image_pull_policy.as_deref() {
        Some("Always") => Ok(PullPolicy::Always),
        Some("Never") => Ok(PullPolicy::Never),
        None | Some("" | "IfNotPresent") => Ok(PullPolicy::IfNotPresent),
        Some(other) => Err(Untranslatable::unsupported(
            format!("{at}.imagePullPolicy"),
            format_args!("{other:?} is not Always, IfNotPresent or Never"),
        )),
    }
}

fn resources(set: Option<&ResourceRequirements>, at: &str) -> Result<ContainerResources, Untranslatable> {
    let Some(set) = set else {
        return Ok(ContainerResources::default());
    };
    if set.claims.as_ref().is_some_and(|c| !c.is_empty()) {
        return Err(Untranslatable::unsupported(
            format!("{at}.claims"),
            "dynamic resources are not supported",
        ));
    }
    let amount = |kind: &str, map: Option<&std::collections::BTreeMap<String, _>>, name: &str| {
        map.and_then(|m| m.get(name))
            .map(|q: &k8s_openapi::apimachinery::pkg::api::resource::Quantity| {
                if name == "cpu" {
                    quantity::millis(&q.0)
                } else {
                    quantity::whole(&q.0)
                }
            })
            .transpose()
            .map_err(|e| Untranslatable::unsupported(format!("{at}.{kind}.{name}"), e))
    };
    Ok(ContainerResources {
        cpu_request_millis: amount("requests", set.requests.as_ref(), "cpu")?,
        cpu_limit_millis: amount("limits", set.limits.as_ref(), "cpu")?,
        memory_request_bytes: amount("requests", set.requests.as_ref(), "memory")?,
        memory_limit_bytes: amount("limits", set.limits.as_ref(), "memory")?,
        ephemeral_storage_request_bytes: amount("requests", set.requests.as_ref(), "ephemeral-storage")?,
        ephemeral_storage_limit_bytes: amount("limits", set.limits.as_ref(), "ephemeral-storage")?,
    })
}

/// Credentials of the pod's pull secrets, in order. A secret that is missing or
/// cannot be read is passed over, as a kubelet does: the pull then says what failed.
pub(super) fn credentials(spec: &PodSpec, resolved: &Resolved) -> Vec<RegistryCredential> {
    spec.image_pull_secrets
        .iter()
        .flatten()
        .filter_map(|reference| resolved.secrets.get(&reference.name)?.as_ref())
        .flat_map(|secret| {
            let data = secret.data.as_ref();
            let file = |key: &str| data.and_then(|d| d.get(key)).map(|bytes| bytes.0.as_slice());
            if let Some(json) = file(".dockerconfigjson") {
                registries(serde_json::from_slice::<DockerConfig>(json).ok().map(|c| c.auths))
            } else {
                registries(file(".dockercfg").and_then(|json| serde_json::from_slice(json).ok()))
            }
        })
        .collect()
}

#[derive(serde::Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(serde::Deserialize)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    /// base64 of `username:password`; wins over the two.
    #[serde(default)]
    auth: String,
}

fn registries(auths: Option<std::collections::BTreeMap<String, DockerAuth>>) -> Vec<RegistryCredential> {
    use base64::Engine;
    auths
        .into_iter()
        .flatten()
        .filter_map(|(registry, entry)| {
            let (username, password) = if entry.auth.is_empty() {
                (entry.username, entry.password)
            } else {
                let decoded = base64::engine::general_purpose::STANDARD
                    .decode(entry.auth.trim())
                    .ok()?;
                let text = String::from_utf8(decoded).ok()?;
                let (user, password) = text.split_once(':')?;
                (user.to_owned(), password.to_owned())
            };
            let registry = registry
                .trim_start_matches("https://")
                .trim_start_matches("http://")
                .trim_end_matches('/')
                .to_owned();
            Some(RegistryCredential {
                registry,
                username,
                password,
            })
        })
        .collect()
}
