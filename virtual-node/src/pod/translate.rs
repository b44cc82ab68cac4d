//! A Pod and what it refers to, as a [`SandboxSpec`]: everything resolved,
//! nothing left for the host to look up.
//!
//! Pure; called by the pod's driver. A pod that asks for what cannot be given
//! is refused by the name of the field, never run without it: whoever wrote
//! `privileged: true` must not get something else. What a pool's operator may allow
//! is for the host to refuse, which knows its policy.
//!
//! Beside the fields below, what Kubernetes' own API server has defaulted or
//! refused is relied on, but checked again by [`SandboxSpec`]'s parser.

mod claim;
mod container;
mod downward;
mod env;
mod expansion;
mod network;
mod probe;
mod security;
mod volume;

use std::{fmt, net::IpAddr, time::Duration};

pub(crate) use claim::claim;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use pool_agent_api::{
    Invalid, Namespace, PodName, Resources, SandboxKey, SandboxSpec, ServiceAccountName, TenantId,
    spec::{MeshMode, RestartPolicy, SandboxParts, Volume},
    wire,
};

use super::references::Resolved;

/// What a pod may be told of where it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    pub(crate) tenant: TenantId,
    pub(crate) node_name: String,
    pub(crate) cluster_domain: String,
    pub(crate) dns_address: IpAddr,
    pub(crate) upstream_nameservers: Vec<IpAddr>,
    /// What a limit that is not set amounts to.
    pub(crate) allocatable: Resources,
}

/// Why there is no spec (yet).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untranslatable {
    /// For good: the pod asks for what this node does not give.
    #[error("{0}")]
    Unsupported(Invalid),
    /// For now: the environment of a container refers to what is not there.
    #[error("{message}")]
    MissingForContainer { container: String, message: String },
    /// For now: a volume refers to what is not there.
    #[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
    MissingForVolume { volume: String, message: String },
    /// For now: the pod's runtime class is not there.
    #[error("RuntimeClass {name:?} not found")]
    MissingRuntimeClass { name: String },
}

impl Untranslatable {
    fn unsupported(field: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self::Unsupported(Invalid::new(field, problem))
    }
}

impl From<Invalid> for Untranslatable {
    fn from(invalid: Invalid) -> Self {
        Self::Unsupported(invalid)
    }
}

/// A spec, and what the user should be told beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Translated {
    pub(crate) spec: SandboxSpec,
    /// Keys that could not become environment variables: one message a container.
    pub(crate) skipped_variables: Vec<String>,
}

/// The whole spec of one attempt. `mesh` is what is on the pod's record.
pub(crate) fn translate(
    pod: &Pod,
    key: SandboxKey,
    mesh: MeshMode,
    resolved: &Resolved,
    facts: &NodeFacts,
) -> Result<Translated, Untranslatable> {
    let meta = &pod.metadata;
    let spec = pod
        .spec
        .as_ref()
        .ok_or_else(|| Untranslatable::unsupported("spec", "is required"))?;
    refuse_unsupported(spec)?;
    let runtime_handler = match (&spec.runtime_class_name, &resolved.runtime_handler) {
        (None, _) => None,
        (Some(_), Some(handler)) => handler.clone(),
        (Some(name), None) => return Err(Untranslatable::MissingRuntimeClass { name: name.clone() }),
    };
    let mut skipped_variables = vec![];
    let mut containers = |list: &[k8s_openapi::api::core::v1::Container], field: &str| {
        list.iter()
            .enumerate()
            .map(|(i, c)| {
                let at = format!("spec.{field}[{i}]");
                let (container, skipped) = container::container(pod, spec, c, resolved, facts, &at)?;
                skipped_variables.extend(skipped);
                Ok(container)
            })
            .collect::<Result<Vec<_>, Untranslatable>>()
    };
    let init_containers = containers(
        spec.init_containers.as_deref().unwrap_or_default(),
        "initContainers",
    )?;
    let app_containers = containers(&spec.containers, "containers")?;
    let parts = SandboxParts {
        key,
        tenant: facts.tenant.clone(),
        node_name: facts.node_name.clone(),
        namespace: Namespace::parse("metadata.namespace", meta.namespace.clone().unwrap_or_default())?,
        name: PodName::parse("metadata.name", meta.name.clone().unwrap_or_default())?,
        service_account: service_account(pod)?,
        labels: meta.labels.clone().unwrap_or_default(),
        annotations: meta.annotations.clone().unwrap_or_default(),
        mesh,
        runtime_handler,
        network: network::network(pod, spec, facts)?,
        security: security::pod_security(spec)?,
        restart_policy: restart_policy(spec)?,
        termination_grace: grace(spec),
        claim: claim(spec)?,
        volumes: volumes(pod, resolved, facts)?,
        init_containers,
        containers: app_containers,
        registry_credentials: container::credentials(spec, resolved),
        share_process_namespace: spec.share_process_namespace == Some(true),
        active_deadline: spec
            .active_deadline_seconds
            .and_then(|s| u64::try_from(s).ok())
            .map(Duration::from_secs),
        priority: spec.priority.unwrap_or(0),
    };
    // The host parses what it is sent; what it would refuse is refused here.
    let wire = wire::SandboxSpec::from(SandboxSpec::new(parts)?);
    Ok(Translated {
        spec: SandboxSpec::try_from(wire)?,
        skipped_variables,
    })
}

/// The pod's volumes alone: what is looked up again while the pod runs.
pub(crate) fn volumes(
    pod: &Pod,
    resolved: &Resolved,
    facts: &NodeFacts,
) -> Result<Vec<Volume>, Untranslatable> {
    let spec = pod
        .spec
        .as_ref()
        .ok_or_else(|| Untranslatable::unsupported("spec", "is required"))?;
    spec.volumes
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, v)| volume::volume(pod, spec, v, resolved, facts, &format!("spec.volumes[{i}]")))
        .collect()
}

pub(crate) fn service_account(pod: &Pod) -> Result<ServiceAccountName, Invalid> {
    let name = pod.spec.as_ref().and_then(|s| s.service_account_name.clone());
    let name = name.filter(|n| !n.is_empty()).unwrap_or_else(|| "default".into());
    ServiceAccountName::parse("spec.serviceAccountName", name)
}

/// How long the pod may take to stop when nobody says otherwise.
pub(crate) fn grace(spec: &PodSpec) -> Duration {
    const DEFAULT: i64 = 30;
    let seconds = spec.termination_grace_period_seconds.unwrap_or(DEFAULT);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

pub(crate) fn restart_policy(spec: &PodSpec) -> Result<RestartPolicy, Invalid> {
    match spec.restart_policy.as_deref() {
        None | Some("" | "Always") => Ok(RestartPolicy::Always),
        Some("OnFailure") => Ok(RestartPolicy::OnFailure),
        Some("Never") => Ok(RestartPolicy::Never),
        Some(other) => Err(Invalid::new(
            "spec.restartPolicy",
            format_args!("{other:?} is not Always, OnFailure or Never"),
        )),
    }
}

/// Pod-level fields that would be ignored otherwise.
fn refuse_unsupported(spec: &PodSpec) -> Result<(), Untranslatable> {
    let on = |flag: Option<bool>| flag == Some(true);
    let refusals = [
        (
            on(spec.host_network),
            "spec.hostNetwork",
            "pods have no access to the network of a host",
        ),
        (
            on(spec.host_pid),
            "spec.hostPID",
            "pods have no access to the processes of a host",
        ),
        (
            on(spec.host_ipc),
            "spec.hostIPC",
            "pods have no access to the memory of a host",
        ),
        (
            spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()),
            "spec.resourceClaims",
            "dynamic resources are not supported",
        ),
        (
            spec.resources
                .as_ref()
                .is_some_and(|r| r.limits.is_some() || r.requests.is_some()),
            "spec.resources",
            "resources of the whole pod are not supported: give them to its containers",
        ),
        (
            spec.os.as_ref().is_some_and(|os| os.name != "linux"),
            "spec.os.name",
            "hosts of the pool run linux",
        ),
    ];
    for (refused, field, why) in refusals {
        if refused {
            return Err(Untranslatable::unsupported(field, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
