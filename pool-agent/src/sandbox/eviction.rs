//! A pod that takes more of the disk than it may has to go, as with a kubelet. One
//! task for each sandbox, spawned by `host`; the end itself is the lifecycle's.
//!
//! What a pod takes: its emptyDirs on disk and its logs, which are walked here, and its
//! containers' writable layers, which the runtime counts ([`super::super::housekeeping`]
//! asks it).
//!
//! What always holds: trees are walked in turns, so that a large one keeps no other
//! from being measured; one that takes long to walk is walked less often; none is
//! walked further than its pod may have files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use pool_agent_api::{ContainerName, SandboxKey, SandboxSpec, VolumeName};
use tokio::sync::{mpsc, watch};

use super::{
    driver::{Command, Progress},
    event::Event,
};
use crate::{
    allowance::Allowance,
    layout::SandboxDirs,
    volumes::{
        self,
        usage::{self, Usage},
    },
};

/// As often as a kubelet looks.
pub const PERIOD: Duration = Duration::from_secs(10);
/// A walk takes at most this part of the time.
const SHARE: u32 = 10;
/// Bytes that a pod may have on the disk for each file that it may have there: whatever
/// a file holds, looking at it takes time, and its inode is one of few. Most file systems
/// are made with one for each 16 KiB.
const BYTES_FOR_A_FILE: u64 = 4096;
/// Files that any pod may have.
const LEAST_FILES: u64 = 65_536;
/// What a kubelet gives as the reason.
pub const EVICTED: &str = "Evicted";

/// What the runtime counts of a container that runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    pub writable_layer: Usage,
    pub working_set_bytes: u64,
}

/// Of all containers of this host, as of the last time the runtime was asked.
pub type Counts = BTreeMap<SandboxKey, BTreeMap<ContainerName, Counted>>;

/// What one sandbox takes of the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    pub volumes: BTreeMap<VolumeName, Usage>,
    pub logs: BTreeMap<ContainerName, Usage>,
    pub layers: BTreeMap<ContainerName, Usage>,
}

impl Disk {
    pub fn total(&self) -> Usage {
        let parts = self.volumes.values().chain(self.logs.values());
        parts
            .chain(self.layers.values())
            .fold(Usage::default(), |all, part| sum(all, *part))
    }

    fn of_container(&self, name: &ContainerName) -> u64 {
        let bytes = |parts: &BTreeMap<ContainerName, Usage>| parts.get(name).map_or(0, |part| part.bytes);
        bytes(&self.logs).saturating_add(bytes(&self.layers))
    }
}

/// Where a sandbox's disk is, and how much of it may be used.
#[derive(Debug, Clone)]
pub struct Bounds {
    key: SandboxKey,
    volumes: Vec<(VolumeName, PathBuf, Option<u64>)>,
    logs: Vec<(ContainerName, PathBuf)>,
    /// Of app containers and sidecars: others have ended when it counts.
    containers: Vec<(ContainerName, u64)>,
    /// The sum of the containers' own limits.
    limit: Option<u64>,
    /// What the host allows in any case, and what was claimed.
    allowed: Usage,
    claimed: u64,
}

impl Bounds {
    pub fn of(spec: &SandboxSpec, allowance: &Allowance, dirs: &SandboxDirs) -> Self {
        let lasting = spec.init_containers.iter().filter(|c| c.restartable_init);
        Self {
            key: spec.key.clone(),
            volumes: volumes::on_disk(spec, dirs),
            logs: spec
                .all_containers()
                .map(|c| (c.name.clone(), dirs.logs().join(c.name.as_str())))
                .collect(),
            containers: lasting
                .chain(&spec.containers)
                .filter_map(|c| {
                    let limit = c.resources.ephemeral_storage_limit_bytes.filter(|&n| n > 0)?;
                    Some((c.name.clone(), limit))
                })
                .collect(),
            limit: allowance.ephemeral_storage_limit_bytes,
            allowed: Usage {
                bytes: allowance.ephemeral_storage_bytes,
                inodes: (allowance.ephemeral_storage_bytes / BYTES_FOR_A_FILE).max(LEAST_FILES),
            },
            claimed: allowance.claim.ephemeral_storage_bytes,
        }
    }

    /// Walks what is to be walked, each until it alone is more than is allowed. With the
    /// time that it took, other pods' turns left out.
    async fn measure(&self) -> (Disk, Duration) {
        let mut disk = Disk::default();
        let mut all = Duration::ZERO;
        for (name, path, _) in &self.volumes {
            let (usage, took) = taken(path, self.allowed).await;
            disk.volumes.insert(name.clone(), usage);
            all += took;
        }
        for (name, path) in &self.logs {
            let (usage, took) = taken(path, self.allowed).await;
            disk.logs.insert(name.clone(), usage);
            all += took;
        }
        (disk, all)
    }

    /// What is told of the first bound that is exceeded: a kubelet's order, and its words
    /// where it has any.
    fn exceeded(&self, disk: &Disk) -> Option<String> {
        for (name, _, limit) in &self.volumes {
            if let (Some(limit), Some(taken)) = (limit, disk.volumes.get(name))
                && taken.bytes > *limit
            {
                return Some(format!(
                    "Usage of EmptyDir volume \"{name}\" exceeds the limit \"{}\". ",
                    quantity(*limit)
                ));
            }
        }
        let Usage { bytes: total, inodes } = disk.total();
        if let Some(limit) = self.limit
            && total > limit
        {
            return Some(format!(
                "Pod ephemeral local storage usage exceeds the total limit of containers {}. ",
                quantity(limit)
            ));
        }
        for (name, limit) in &self.containers {
            if disk.of_container(name) > *limit {
                return Some(format!(
                    "Container {name} exceeded its local ephemeral storage limit \"{}\". ",
                    quantity(*limit)
                ));
            }
        }
        let over = if total > self.allowed.bytes {
            quantity(self.allowed.bytes)
        } else if inodes > self.allowed.inodes {
            format!("{} files", self.allowed.inodes)
        } else {
            return None;
        };
        Some(format!(
            "Pod ephemeral local storage usage exceeds {over}, what its host allows a request of {}. ",
            quantity(self.claimed)
        ))
    }
}

async fn taken(path: &Path, enough: Usage) -> (Usage, Duration) {
    usage::measure(path, enough).await.unwrap_or_else(|error| {
        // Not made yet, or gone already.
        tracing::debug!(path = %path.display(), error = %error, "a directory was not measured");
        Default::default()
    })
}

fn sum(a: Usage, b: Usage) -> Usage {
    Usage {
        bytes: a.bytes.saturating_add(b.bytes),
        inodes: a.inodes.saturating_add(b.inodes),
    }
}

/// Measures until something is too large or the sandbox has ended; what was measured
/// goes to `disk`.
pub async fn watch(
    bounds: Bounds,
    counts: watch::Receiver<Arc<Counts>>,
    disk: watch::Sender<Disk>,
    mut progress: watch::Receiver<Progress>,
    commands: mpsc::Sender<Command>,
) {
    let mut pause = PERIOD;
    loop {
        tokio::select! {
            // An error tells that the driver has gone.
            _ended = progress.wait_for(|p| p.stopped || p.gone) => return,
            () = tokio::time::sleep(pause) => {}
        }
        let (mut measured, took) = bounds.measure().await;
        measured.layers = match counts.borrow().get(&bounds.key) {
            Some(containers) => containers
                .iter()
                .map(|(name, counted)| (name.clone(), counted.writable_layer))
                .collect(),
            None => BTreeMap::new(),
        };
        let exceeded = bounds.exceeded(&measured);
        disk.send_replace(measured);
        if let Some(message) = exceeded {
            let evict = Command::Event(Event::Evict(EVICTED, message));
            if commands.send(evict).await.is_err() {
                tracing::debug!("the sandbox ended before it was evicted");
            }
            return;
        }
        pause = PERIOD.max(took * SHARE);
    }
}

/// An amount of bytes as Kubernetes would most likely have been given it: with the
/// largest suffix that leaves a whole number, a binary one first.
pub fn quantity(bytes: u64) -> String {
    const SUFFIXES: [(&str, u64); 8] = [
        ("Ti", 1 << 40),
        ("Gi", 1 << 30),
        ("Mi", 1 << 20),
        ("T", 1_000_000_000_000),
        ("G", 1_000_000_000),
        ("M", 1_000_000),
        ("Ki", 1 << 10),
        ("k", 1_000),
    ];
    SUFFIXES
        .iter()
        .find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit))
        .map_or_else(
            || bytes.to_string(),
            |(suffix, unit)| format!("{}{suffix}", bytes / unit),
        )
}

#[cfg(test)]
mod tests;
