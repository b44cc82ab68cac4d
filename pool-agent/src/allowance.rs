//! What one pod may use of its host, whatever its containers say. Pure: computed in
//! one place from the claim, the spec and the host's policy, so that where the claim
//! comes from can change without anybody else's doing.
//!
//! ```text
//!  CPU      weight by the claim; a quota only by the containers' own limits: idle time is free
//!  memory   the sum of the containers' limits, never more than ratio × claim (or the least bound)
//!  disk     likewise
//!  tasks    the host's bound
//! ```
//!
//! What always holds: containers that request more than was claimed, or whose limits
//! are more than the claim allows, are refused by name; a pod without limits is held
//! to what its claim allows. See docs/decisions/room-on-a-host.md.

use pool_agent_api::{
    Invalid, Resources, SandboxSpec,
    spec::{Container, ContainerResources},
};

use crate::{cri::config::Qos, policy::room::HostRoom};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    pub qos: Qos,
    /// What was claimed: usage beyond it makes a pod the first to be evicted.
    pub claim: Resources,
    /// None: what the others leave idle.
    pub cpu_limit_millis: Option<u64>,
    pub memory_bytes: u64,
    pub pids: u64,
    pub ephemeral_storage_bytes: u64,
    /// The sum of the containers' own limits, if one has any.
    pub ephemeral_storage_limit_bytes: Option<u64>,
}

impl Allowance {
    pub fn of(claim: Resources, spec: &SandboxSpec, room: &HostRoom) -> Result<Self, Invalid> {
        covers(claim, spec)?;
        let allowed_memory =
            allowed(claim.memory_bytes, room.memory_ratio, room.least_memory_bytes).min(room.memory_bytes);
        let allowed_storage = allowed(
            claim.ephemeral_storage_bytes,
            room.ephemeral_storage_ratio,
            room.least_ephemeral_storage_bytes,
        )
        .min(room.allocatable.ephemeral_storage_bytes);
        for (field, index, container) in containers(spec) {
            let limits = container.resources;
            fits(
                &format!("{field}[{index}].resources.memory_limit_bytes"),
                limits.memory_limit_bytes,
                claim.memory_bytes,
                allowed_memory,
            )?;
            fits(
                &format!("{field}[{index}].resources.ephemeral_storage_limit_bytes"),
                limits.ephemeral_storage_limit_bytes,
                claim.ephemeral_storage_bytes,
                allowed_storage,
            )?;
        }
        let memory_limit = together(spec, |r| r.memory_limit_bytes.filter(|&n| n > 0));
        let storage_limit = any_together(spec, |r| r.ephemeral_storage_limit_bytes.filter(|&n| n > 0));
        fits(
            "containers: the sum of resources.memory_limit_bytes",
            memory_limit,
            claim.memory_bytes,
            allowed_memory,
        )?;
        fits(
            "containers: the sum of resources.ephemeral_storage_limit_bytes",
            storage_limit,
            claim.ephemeral_storage_bytes,
            allowed_storage,
        )?;
        // What was claimed beyond the containers' requests is the runtime's.
        let overhead = |claim: u64, requests: Option<u64>| claim.saturating_sub(requests.unwrap_or(0));
        let memory_overhead = overhead(claim.memory_bytes, together(spec, memory_request));
        let cpu_overhead = overhead(claim.cpu_millis, together(spec, cpu_request));
        Ok(Self {
            qos: Qos::of(spec),
            claim,
            cpu_limit_millis: together(spec, |r| r.cpu_limit_millis.filter(|&n| n > 0))
                .map(|limit| limit.saturating_add(cpu_overhead)),
            memory_bytes: memory_limit
                .map_or(allowed_memory, |limit| limit.saturating_add(memory_overhead))
                .min(allowed_memory),
            pids: room.pod_pids,
            ephemeral_storage_bytes: storage_limit.unwrap_or(allowed_storage).min(allowed_storage),
            ephemeral_storage_limit_bytes: storage_limit,
        })
    }
}

/// How far a claim may be exceeded.
fn allowed(claim: u64, ratio: u64, least: u64) -> u64 {
    claim.saturating_mul(ratio).max(least)
}

fn fits(field: &str, limit: Option<u64>, claim: u64, allowed: u64) -> Result<(), Invalid> {
    match limit {
        Some(limit) if limit > allowed => Err(Invalid::new(
            field,
            format_args!(
                "{limit} is more than this host lets a claim of {claim} use, which is {allowed}: raise the request, or lower the limit"
            ),
        )),
        _ => Ok(()),
    }
}

/// Requests decide a pod's class and its shares: what was not claimed is not granted.
fn covers(claim: Resources, spec: &SandboxSpec) -> Result<(), Invalid> {
    for (field, claimed, request) in [
        ("claim.cpu_millis", claim.cpu_millis, together(spec, cpu_request)),
        (
            "claim.memory_bytes",
            claim.memory_bytes,
            together(spec, memory_request),
        ),
        (
            "claim.ephemeral_storage_bytes",
            claim.ephemeral_storage_bytes,
            together(spec, |r| {
                Some(
                    r.ephemeral_storage_request_bytes
                        .or(r.ephemeral_storage_limit_bytes)
                        .unwrap_or(0),
                )
            }),
        ),
    ] {
        let requested = request.unwrap_or(0);
        if requested > claimed {
            return Err(Invalid::new(
                field,
                format_args!("{claimed} is less than the {requested} that the containers request"),
            ));
        }
    }
    Ok(())
}

/// A bare limit counts as the request, as the API server defaults it.
fn cpu_request(r: &ContainerResources) -> Option<u64> {
    Some(r.cpu_request_millis.or(r.cpu_limit_millis).unwrap_or(0))
}

fn memory_request(r: &ContainerResources) -> Option<u64> {
    Some(r.memory_request_bytes.or(r.memory_limit_bytes).unwrap_or(0))
}

fn containers(spec: &SandboxSpec) -> impl Iterator<Item = (&'static str, usize, &Container)> {
    let inits = spec.init_containers.iter().enumerate();
    let apps = spec.containers.iter().enumerate();
    inits
        .map(|(i, c)| ("init_containers", i, c))
        .chain(apps.map(|(i, c)| ("containers", i, c)))
}

/// The most that runs together: app containers and sidecars, or an init container
/// beside the sidecars before it. None if a container has none.
fn together(spec: &SandboxSpec, pick: impl Fn(&ContainerResources) -> Option<u64>) -> Option<u64> {
    let mut sidecars = 0_u64;
    let mut peak = 0_u64;
    for init in &spec.init_containers {
        let amount = pick(&init.resources)?;
        if init.restartable_init {
            sidecars = sidecars.saturating_add(amount);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(amount));
        }
    }
    let mut apps = sidecars;
    for app in &spec.containers {
        apps = apps.saturating_add(pick(&app.resources)?);
    }
    Some(peak.max(apps))
}

/// The same of those that have one; None if none has.
fn any_together(spec: &SandboxSpec, pick: impl Fn(&ContainerResources) -> Option<u64>) -> Option<u64> {
    let any = spec.all_containers().any(|c| pick(&c.resources).is_some());
    together(spec, |r| Some(pick(r).unwrap_or(0))).filter(|_| any)
}

#[cfg(test)]
pub(crate) mod tests;
