//! Keeps the host from running short: looks at what there is, tells of a pressure, and
//! has a pod evicted for it. What is short and who goes is [`crate::pressure`]'s.
//!
//! What always holds: one pod goes at a time, and the next when it has stopped or had
//! its time; where the disk is short, images that nobody uses go before each pod.

use std::{path::Path, sync::Arc, time::Duration};

use nix::sys::statvfs::statvfs;
use pool_agent_api::{SandboxSpec, spec::Container};
use tokio::time::Instant;

use super::{Host, Resident, tell};
use crate::{
    cri::config::Qos,
    housekeeping,
    pressure::{self, Candidate, ContainerUse, Level, Next, Reclaim, Resource, Seen, Shortage},
    sandbox::{
        driver::Command,
        event::Event,
        eviction::{Disk, EVICTED},
        perform::Workshop,
    },
};

/// A kubelet looks every 10 s, and is woken by the kernel between.
const PERIOD: Duration = Duration::from_secs(2);
/// How long an evicted pod may take to be gone before another goes.
const CLEANUP: Duration = Duration::from_secs(30);

impl Host {
    pub async fn keep_room(self) {
        let shop = self.inner.shop.clone();
        let told_for = Duration::from_secs(shop.room.eviction.pressure_seconds);
        let mut seen = Seen::default();
        let mut reclaim = Reclaim::default();
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let images = shop.image_directories.borrow().clone();
            let looking = shop.clone();
            let levels = match tokio::task::spawn_blocking(move || levels(&looking, &images)).await {
                Ok(levels) => levels,
                Err(error) => {
                    tracing::warn!(error = %error, "looking at the host's room broke off");
                    continue;
                }
            };
            let short = pressure::shortages(&levels, &shop.room.eviction);
            let pressure;
            (seen, pressure) = seen.step(&short, shop.clock.now(), told_for);
            shop.pressure.send_if_modified(|told| {
                let changed = *told != pressure;
                if changed {
                    tracing::warn!(?pressure, "the host's pressure changed");
                }
                *told = pressure;
                changed
            });
            let next;
            (reclaim, next) = reclaim.step(&short, Instant::now().into_std());
            if let Next::Reclaim = next {
                tracing::warn!("the disk is short: unused images go");
                shop.disk_is_short.notify_one();
            }
            if let Next::Evict(shortage) = next {
                self.evict_for(shortage).await;
            }
        }
    }

    async fn evict_for(&self, shortage: Shortage) {
        // A container may have grown since the runtime was asked last.
        housekeeping::count_now(self).await;
        let residents: Vec<(Arc<SandboxSpec>, Resident)> = {
            let state = self.state();
            state
                .residents
                .iter()
                .filter(|(_, resident)| !resident.progress.borrow().stopped)
                .filter_map(|(key, resident)| Some((state.admission.spec(key)?, resident.clone())))
                .collect()
        };
        let shop = self.inner.shop.clone();
        let ranked = tokio::task::spawn_blocking(move || {
            let candidates: Vec<Candidate> = residents
                .iter()
                .map(|(spec, resident)| candidate(&shop, spec, &resident.disk.borrow()))
                .collect();
            let goes = pressure::first_to_go(shortage.resource, &candidates)?;
            let resident = residents.into_iter().find(|(spec, _)| spec.key == goes.key)?;
            Some((resident, pressure::message(shortage, goes)))
        });
        let ((spec, resident), message) = match ranked.await {
            Ok(Some(ranked)) => ranked,
            Ok(None) => {
                tracing::warn!(?shortage, "the host is short and has no pod to evict for it");
                return;
            }
            Err(error) => {
                tracing::warn!(error = %error, "ranking pods broke off");
                return;
            }
        };
        tracing::warn!(
            pod.uid = %spec.key.pod, attempt = %spec.key.attempt, tenant = %spec.tenant,
            pod.namespace = %spec.namespace, pod.name = %spec.name,
            resource = shortage.resource.name(), available = shortage.available, threshold = shortage.threshold,
            "evicting a pod"
        );
        let evict = Command::Event(Event::Evict(EVICTED, message));
        let stopped = async {
            tell(&resident, evict).await;
            // An error tells that its driver has ended.
            let mut progress = resident.progress.clone();
            progress.wait_for(|p| p.stopped || p.gone).await.is_ok()
        };
        if tokio::time::timeout(CLEANUP, stopped).await.is_err() {
            tracing::warn!(pod.uid = %spec.key.pod, "an evicted pod takes long to stop");
        }
    }
}

fn candidate(shop: &Workshop, spec: &SandboxSpec, disk: &Disk) -> Candidate {
    let cgroup = shop.cgroups.parent(&spec.key, Qos::of(spec));
    let usage = shop.cgroups.usage(&cgroup).unwrap_or_default();
    let counts = shop.counts.borrow().get(&spec.key).cloned().unwrap_or_default();
    let container = |container: &Container| {
        let name = container.name.clone();
        let of = |parts: &std::collections::BTreeMap<_, crate::volumes::usage::Usage>| {
            parts.get(&name).map_or(0, |part| part.bytes)
        };
        let used = ContainerUse {
            memory_bytes: counts.get(&name).map_or(0, |counted| counted.working_set_bytes),
            memory_request_bytes: container.resources.memory_request_bytes.unwrap_or(0),
            disk_bytes: of(&disk.logs).saturating_add(of(&disk.layers)),
            disk_request_bytes: container.resources.ephemeral_storage_request_bytes.unwrap_or(0),
        };
        (name.clone(), used)
    };
    Candidate {
        key: spec.key.clone(),
        tenant: spec.tenant.clone(),
        priority: spec.priority,
        claim: spec.claim,
        memory_bytes: usage.working_set_bytes,
        tasks: usage.tasks,
        disk: disk.total(),
        containers: spec.all_containers().map(container).collect(),
    }
}

/// What there is now. What cannot be read is left out: no pod goes for it.
fn levels(shop: &Workshop, images: &[String]) -> Vec<Level> {
    let mut levels = vec![];
    let mut level = |resource, available: Option<u64>, all: Option<u64>| {
        if let (Some(available), Some(all)) = (available, all) {
            levels.push(Level {
                resource,
                available,
                all,
            });
        }
    };
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |field: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    level(Resource::Memory, kib("MemAvailable:"), kib("MemTotal:"));
    let slots = crate::agent::task_slots();
    level(
        Resource::Tasks,
        tasks().map(|tasks| slots.saturating_sub(tasks)),
        Some(slots),
    );
    // What all pods together are held to, as a kubelet has it for memory.
    if let Some((usage, limits)) = shop.cgroups.usage("").zip(shop.cgroups.limits()) {
        let left = limits.memory_bytes.saturating_sub(usage.working_set_bytes);
        level(Resource::Memory, Some(left), Some(limits.memory_bytes));
        let left = limits.tasks.saturating_sub(usage.tasks);
        level(Resource::Tasks, Some(left), Some(limits.tasks));
    }
    let images = images.iter().map(Path::new);
    for path in images.chain([shop.layout.state()]) {
        let Ok(fs) = statvfs(path) else { continue };
        let bytes = |blocks: u64| Some(blocks.saturating_mul(fs.fragment_size()));
        level(Resource::Disk, bytes(fs.blocks_available()), bytes(fs.blocks()));
        // Some file systems have no table of inodes.
        if fs.files() > 0 {
            level(Resource::Inodes, Some(fs.files_available()), Some(fs.files()));
        }
    }
    levels
}

/// Tasks of the whole host: the last part of `running/all` (proc_loadavg(5)).
fn tasks() -> Option<u64> {
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    load.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}
