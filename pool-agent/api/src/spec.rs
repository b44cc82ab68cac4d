//! A pod as a host needs it: everything it refers to resolved, nothing left to
//! look up. Built by `virtual-node` from a Pod, received by `pool-agent`.
//!
//! [`SandboxSpec::new`] is the only way to one, from either side, so whoever
//! holds a spec may rely on what it checks.

mod container;
mod network;
mod probe;
mod security;
mod text;
mod volume;

use std::{collections::BTreeMap, collections::HashSet, ops::Deref, time::Duration};

pub use container::{
    AppArmorProfile, Container, ContainerResources, ContainerSecurity, EnvVar, Mount, PullPolicy,
    SeLinuxOptions, SeccompProfile, TerminationMessage,
};
pub use network::{HostAlias, PodNetwork, PortMapping, Protocol};
pub use probe::{Action, Hook, HttpAction, HttpHeader, Probe, Thresholds};
pub use security::PodSecurity;
pub use text::{HostField, Segment, Text};
pub use volume::{EmptyDir, File, Files, Volume, VolumeSource};

use crate::{
    ContainerName, Invalid, Namespace, PodName, Resources, SandboxKey, ServiceAccountName, TenantId,
    VolumeName,
    invalid::{each, required},
    wire,
};

/// Whether the pod's traffic goes through the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MeshMode {
    Enrolled,
    /// `istio.io/dataplane-mode=none`: passes, still anti-spoofed.
    Unmeshed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// A registry's credentials, as in `.dockerconfigjson`.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryCredential {
    /// `host[:port][/path]`; the host may hold `*`.
    pub registry: String,
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for RegistryCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryCredential")
            .field("registry", &self.registry)
            .finish_non_exhaustive()
    }
}

/// The parts of a spec, before they are checked together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxParts {
    pub key: SandboxKey,
    pub tenant: TenantId,
    pub node_name: String,
    pub namespace: Namespace,
    pub name: PodName,
    pub service_account: ServiceAccountName,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub mesh: MeshMode,
    /// A containerd runtime; None for the host's default (runc).
    pub runtime_handler: Option<String>,
    pub network: PodNetwork,
    pub security: PodSecurity,
    pub restart_policy: RestartPolicy,
    pub termination_grace: Duration,
    /// What admission counts; `sandboxes` is 1.
    pub claim: Resources,
    pub volumes: Vec<Volume>,
    pub init_containers: Vec<Container>,
    pub containers: Vec<Container>,
    pub registry_credentials: Vec<RegistryCredential>,
    pub share_process_namespace: bool,
    /// From the start of the sandbox.
    pub active_deadline: Option<Duration>,
    /// Ranks the pods of one tenant when the host has to evict; the lowest go first.
    pub priority: i32,
}

/// A checked spec. Reads as its [`SandboxParts`].
///
/// Beyond what each part promises: there is a container; container names are
/// unique over init and app containers; volume names are unique; every mount
/// names a volume; only init containers are restartable-init; the claim is for
/// one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec(Box<SandboxParts>);

impl Deref for SandboxSpec {
    type Target = SandboxParts;

    fn deref(&self) -> &SandboxParts {
        &self.0
    }
}

impl SandboxSpec {
    pub fn new(parts: SandboxParts) -> Result<Self, Invalid> {
        if parts.containers.is_empty() {
            return Err(Invalid::new("containers", "must hold at least one"));
        }
        if parts.claim.sandboxes != 1 {
            return Err(Invalid::new("claim.sandboxes", "must be 1"));
        }
        let mut volumes = HashSet::<&VolumeName>::new();
        for (i, volume) in parts.volumes.iter().enumerate() {
            if !volumes.insert(&volume.name) {
                return Err(Invalid::new(
                    format!("volumes[{i}].name"),
                    format_args!("{:?} is taken by another volume", volume.name),
                ));
            }
        }
        let mut names = HashSet::<&ContainerName>::new();
        let all = [
            ("init_containers", &parts.init_containers),
            ("containers", &parts.containers),
        ];
        for (field, containers) in all {
            for (i, container) in containers.iter().enumerate() {
                if !names.insert(&container.name) {
                    return Err(Invalid::new(
                        format!("{field}[{i}].name"),
                        format_args!("{:?} is taken by another container", container.name),
                    ));
                }
                if container.restartable_init && field == "containers" {
                    return Err(Invalid::new(
                        format!("{field}[{i}].restartable_init"),
                        "is for init containers",
                    ));
                }
                for (j, mount) in container.mounts.iter().enumerate() {
                    if !volumes.contains(&mount.volume) {
                        return Err(Invalid::new(
                            format!("{field}[{i}].mounts[{j}].volume"),
                            format_args!("no volume is named {:?}", mount.volume),
                        ));
                    }
                }
            }
        }
        Ok(Self(Box::new(parts)))
    }

    /// Init and app containers, in that order.
    pub fn all_containers(&self) -> impl Iterator<Item = &Container> {
        self.init_containers.iter().chain(&self.containers)
    }

    pub fn container(&self, name: &str) -> Option<&Container> {
        self.all_containers().find(|c| c.name.as_str() == name)
    }
}

/// Sysctls, labels and annotations arrive as hash maps; kept sorted so that two
/// equal specs are equal to the byte.
fn sorted(map: std::collections::HashMap<String, String>) -> BTreeMap<String, String> {
    map.into_iter().collect()
}

impl TryFrom<wire::SandboxSpec> for SandboxSpec {
    type Error = Invalid;

    fn try_from(spec: wire::SandboxSpec) -> Result<Self, Invalid> {
        // Whose it is comes first: whoever reads a refusal of another field can tell
        // which sandbox is meant.
        let key = SandboxKey::from_wire(spec.key.clone())?;
        let tenant = TenantId::parse("tenant", spec.tenant.as_str())?;
        let namespace = Namespace::parse("namespace", spec.namespace.as_str())?;
        let name = PodName::parse("name", spec.name.as_str())?;
        let service_account = ServiceAccountName::parse("service_account", spec.service_account.as_str())?;
        let mesh = match spec.mesh() {
            wire::MeshMode::Enrolled => MeshMode::Enrolled,
            wire::MeshMode::None => MeshMode::Unmeshed,
            wire::MeshMode::Unspecified => return Err(Invalid::missing("mesh")),
        };
        let restart_policy = match spec.restart_policy() {
            wire::RestartPolicy::Always => RestartPolicy::Always,
            wire::RestartPolicy::OnFailure => RestartPolicy::OnFailure,
            wire::RestartPolicy::Never => RestartPolicy::Never,
            wire::RestartPolicy::Unspecified => return Err(Invalid::missing("restart_policy")),
        };
        Self::new(SandboxParts {
            key,
            tenant,
            node_name: spec.node_name,
            namespace,
            name,
            service_account,
            labels: sorted(spec.labels),
            annotations: sorted(spec.annotations),
            mesh,
            runtime_handler: Some(spec.runtime_handler).filter(|h| !h.is_empty()),
            network: required("network", spec.network)?
                .try_into()
                .map_err(|e: Invalid| e.within("network"))?,
            security: required("security", spec.security)?
                .try_into()
                .map_err(|e: Invalid| e.within("security"))?,
            restart_policy,
            termination_grace: Duration::from_secs(spec.termination_grace_seconds),
            claim: required("claim", spec.claim)?.into(),
            volumes: each("volumes", spec.volumes, Volume::try_from)?,
            init_containers: each("init_containers", spec.init_containers, Container::try_from)?,
            containers: each("containers", spec.containers, Container::try_from)?,
            registry_credentials: spec
                .registry_credentials
                .into_iter()
                .map(|c| RegistryCredential {
                    registry: c.registry,
                    username: c.username,
                    password: c.password,
                })
                .collect(),
            share_process_namespace: spec.share_process_namespace,
            active_deadline: spec.active_deadline_seconds.map(Duration::from_secs),
            priority: spec.priority,
        })
    }
}

impl From<SandboxSpec> for wire::SandboxSpec {
    fn from(spec: SandboxSpec) -> Self {
        let parts = *spec.0;
        Self {
            key: Some(parts.key.into()),
            tenant: parts.tenant.into(),
            node_name: parts.node_name,
            namespace: parts.namespace.into(),
            name: parts.name.into(),
            service_account: parts.service_account.into(),
            labels: parts.labels.into_iter().collect(),
            annotations: parts.annotations.into_iter().collect(),
            mesh: match parts.mesh {
                MeshMode::Enrolled => wire::MeshMode::Enrolled,
                MeshMode::Unmeshed => wire::MeshMode::None,
            }
            .into(),
            runtime_handler: parts.runtime_handler.unwrap_or_default(),
            network: Some(parts.network.into()),
            security: Some(parts.security.into()),
            restart_policy: match parts.restart_policy {
                RestartPolicy::Always => wire::RestartPolicy::Always,
                RestartPolicy::OnFailure => wire::RestartPolicy::OnFailure,
                RestartPolicy::Never => wire::RestartPolicy::Never,
            }
            .into(),
            termination_grace_seconds: parts.termination_grace.as_secs(),
            claim: Some(parts.claim.into()),
            volumes: parts.volumes.into_iter().map(Into::into).collect(),
            init_containers: parts.init_containers.into_iter().map(Into::into).collect(),
            containers: parts.containers.into_iter().map(Into::into).collect(),
            registry_credentials: parts
                .registry_credentials
                .into_iter()
                .map(|c| wire::RegistryCredential {
                    registry: c.registry,
                    username: c.username,
                    password: c.password,
                })
                .collect(),
            share_process_namespace: parts.share_process_namespace,
            active_deadline_seconds: parts.active_deadline.map(|d| d.as_secs()),
            priority: parts.priority,
        }
    }
}

#[cfg(test)]
mod tests;
