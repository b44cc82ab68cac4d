//! When the host is short of something, and which pod goes for it: a kubelet's eviction
//! manager, decided. Pure; [`crate::host`] observes, evicts and tells.
//!
//! What always holds:
//! - memory is looked after first, then the disk, then tasks; one pod goes at a time;
//! - whose pod goes is decided by what tenants take beyond what they have claimed; a
//!   priority, which is a tenant's own word, ranks that tenant's pods alone. With one
//!   tenant on a host this is a kubelet's order;
//! - a pressure is told for a while after it was last seen, so that a pod that comes
//!   back at once does not bring it back.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use pool_agent_api::{ContainerName, Pressure, Resources, SandboxKey, TenantId};

use crate::{
    cri::config::Qos,
    policy::room::{Eviction, Threshold},
    sandbox::{clock::since, eviction::quantity},
    volumes::usage::Usage,
};

/// In the order in which they are looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Memory,
    Disk,
    Inodes,
    Tasks,
}

impl Resource {
    /// As a kubelet calls it towards users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Inodes => "inodes",
            Self::Tasks => "pids",
        }
    }

    fn threshold(self, eviction: &Eviction) -> Threshold {
        match self {
            Self::Memory => eviction.memory_available,
            Self::Disk => eviction.nodefs_available,
            Self::Inodes => eviction.nodefs_inodes_free,
            Self::Tasks => eviction.pids_available,
        }
    }
}

/// How much there is of something: of the host's, or of what all pods may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    pub resource: Resource,
    pub available: u64,
    pub all: u64,
}

/// A level below its threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    pub resource: Resource,
    pub available: u64,
    pub threshold: u64,
}

/// What is short, the most urgent first.
pub fn shortages(levels: &[Level], eviction: &Eviction) -> Vec<Shortage> {
    let mut short: Vec<Shortage> = levels
        .iter()
        .map(|level| Shortage {
            resource: level.resource,
            available: level.available,
            threshold: level.resource.threshold(eviction).of(level.all),
        })
        .filter(|short| short.available < short.threshold)
        .collect();
    short.sort_by_key(|short| (short.resource, short.available));
    short
}

/// How long the removal of unused images may take before a pod goes instead.
const RECLAIM: Duration = Duration::from_secs(20);

/// What to do about what is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Nothing,
    /// Have images removed that nobody uses.
    Reclaim,
    Evict(Shortage),
}

/// Before a pod goes for the disk, images go: also before the next one, since the pod
/// before it may have left some.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reclaim {
    /// Images are going since then.
    begun: Option<Instant>,
}

impl Reclaim {
    /// `short` as [`shortages`] gives it.
    pub fn step(mut self, short: &[Shortage], now: Instant) -> (Self, Next) {
        let of_disk = |s: &Shortage| matches!(s.resource, Resource::Disk | Resource::Inodes);
        if !short.iter().any(of_disk) {
            self.begun = None;
        }
        let next = match (short.first(), self.begun) {
            (None, _) => Next::Nothing,
            (Some(first), _) if !of_disk(first) => Next::Evict(*first),
            (Some(_), None) => {
                self.begun = Some(now);
                Next::Reclaim
            }
            (Some(_), Some(begun)) if now.saturating_duration_since(begun) < RECLAIM => Next::Nothing,
            (Some(first), Some(_)) => {
                self.begun = None;
                Next::Evict(*first)
            }
        };
        (self, next)
    }
}

/// When each pressure was last seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    memory: Option<Timestamp>,
    disk: Option<Timestamp>,
    tasks: Option<Timestamp>,
}

impl Seen {
    pub fn step(mut self, short: &[Shortage], now: Timestamp, told_for: Duration) -> (Self, Pressure) {
        for shortage in short {
            let seen = match shortage.resource {
                Resource::Memory => &mut self.memory,
                Resource::Disk | Resource::Inodes => &mut self.disk,
                Resource::Tasks => &mut self.tasks,
            };
            *seen = Some(now);
        }
        let told = |seen: Option<Timestamp>| seen.is_some_and(|at| at == now || since(now, at) < told_for);
        let pressure = Pressure {
            memory: told(self.memory),
            disk: told(self.disk),
            pids: told(self.tasks),
        };
        (self, pressure)
    }
}

/// Why a new pod is not taken under a pressure, in a kubelet's words: short of memory
/// only those that claim none, otherwise all.
pub fn refuses(pressure: Pressure, claim: Resources, qos: Qos) -> Option<String> {
    let conditions: Vec<&str> = [
        (pressure.memory, "MemoryPressure"),
        (pressure.disk, "DiskPressure"),
        (pressure.pids, "PIDPressure"),
    ]
    .into_iter()
    .filter_map(|(holds, name)| holds.then_some(name))
    .collect();
    let spared = !pressure.disk && !pressure.pids && qos != Qos::BestEffort && claim.memory_bytes > 0;
    (pressure.any() && !spared).then(|| format!("The node had condition: [{}]. ", conditions.join(" ")))
}

/// A pod that could go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub key: SandboxKey,
    pub tenant: TenantId,
    pub priority: i32,
    pub claim: Resources,
    pub memory_bytes: u64,
    pub tasks: u64,
    pub disk: Usage,
    /// Containers with what they use, and request, of memory and of disk.
    pub containers: BTreeMap<ContainerName, ContainerUse>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContainerUse {
    pub memory_bytes: u64,
    pub memory_request_bytes: u64,
    pub disk_bytes: u64,
    pub disk_request_bytes: u64,
}

impl Candidate {
    /// What it takes of the resource beyond its claim. Nobody claims tasks or inodes.
    fn excess(&self, resource: Resource) -> i128 {
        let (taken, claimed) = match resource {
            Resource::Memory => (self.memory_bytes, self.claim.memory_bytes),
            Resource::Disk => (self.disk.bytes, self.claim.ephemeral_storage_bytes),
            Resource::Inodes => (self.disk.inodes, 0),
            Resource::Tasks => (self.tasks, 0),
        };
        i128::from(taken) - i128::from(claimed)
    }

    /// A kubelet's order: beyond its claim, then the lower priority, then by how much.
    /// Short of tasks there is no claim, and the priority comes first.
    fn rank(&self, resource: Resource) -> (bool, i64, i128) {
        let excess = self.excess(resource);
        (excess > 0, -i64::from(self.priority), excess)
    }
}

/// The pod that goes for the shortage.
pub fn first_to_go(resource: Resource, candidates: &[Candidate]) -> Option<&Candidate> {
    let mut tenants: BTreeMap<&TenantId, (i128, i128)> = BTreeMap::new();
    for candidate in candidates {
        let excess = candidate.excess(resource);
        let (beyond, all) = tenants.entry(&candidate.tenant).or_insert((0, i128::MIN));
        *beyond = match resource {
            Resource::Memory | Resource::Disk => beyond.saturating_add(excess.max(0)),
            // Every pod has some: the one with the most is what stands out.
            Resource::Inodes | Resource::Tasks => (*beyond).max(excess),
        };
        *all = (*all).max(excess);
    }
    let (tenant, _) = tenants.into_iter().max_by_key(|(_, taken)| *taken)?;
    candidates
        .iter()
        .filter(|candidate| candidate.tenant == *tenant)
        .max_by_key(|candidate| (candidate.rank(resource), candidate.key.clone()))
}

/// What the pod is told, in a kubelet's words.
pub fn message(shortage: Shortage, candidate: &Candidate) -> String {
    let resource = shortage.resource.name();
    let amount = |n: u64| match shortage.resource {
        Resource::Memory | Resource::Disk => quantity(n),
        Resource::Inodes | Resource::Tasks => n.to_string(),
    };
    let mut message = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        amount(shortage.threshold),
        amount(shortage.available)
    );
    for (name, taken) in &candidate.containers {
        let (used, request) = match shortage.resource {
            Resource::Memory => (taken.memory_bytes, taken.memory_request_bytes),
            Resource::Disk => (taken.disk_bytes, taken.disk_request_bytes),
            Resource::Inodes | Resource::Tasks => continue,
        };
        if used > request {
            message.push_str(&format!(
                "Container {name} was using {}, request is {}, has larger consumption of {resource}. ",
                quantity(used),
                quantity(request)
            ));
        }
    }
    message
}

#[cfg(test)]
mod tests;
