//! What the agent does by the clock: keeps the last statuses on disk, rotates
//! logs, and lets images go that nobody uses when the disk fills.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use pool_agent_api::{ContainerName, SandboxKey, status::ContainerState, wire};
use prost::Message;

use crate::{
    board::Change,
    cri,
    host::Host,
    layout::SandboxDirs,
    logs,
    sandbox::eviction::{self, Counted, Counts},
    volumes::{usage::Usage, write_file},
};

const ROTATE: Duration = Duration::from_secs(10);
const COLLECT: Duration = Duration::from_secs(300);
/// A kubelet's thresholds: begun above the first, until below the second.
const IMAGES_BEGIN: f64 = 0.85;
const IMAGES_END: f64 = 0.80;
/// An image this young may be for a container that is about to start.
const IMAGE_YOUTH: Duration = Duration::from_secs(120);

/// Writes each status beside the sandbox's spec, so that an agent that starts
/// again reports no less. Not fsync'd: without it a pod is merely probed anew.
pub async fn record_statuses(host: Host) {
    let mut reader = host.board().reader(None);
    loop {
        match reader.take() {
            Ok(changes) => {
                let layout = host.shop().layout.clone();
                let written = tokio::task::spawn_blocking(move || {
                    for change in changes {
                        let Change::Status(status) = change else {
                            continue;
                        };
                        let dirs = layout.sandbox(&status.key);
                        // Removed while this was on its way.
                        if !dirs.spec().exists() {
                            continue;
                        }
                        let bytes = wire::SandboxStatus::from((*status).clone()).encode_to_vec();
                        if let Err(error) = write_file(&dirs.status(), &bytes, 0o600) {
                            tracing::warn!(pod.uid = %status.key.pod, error = %error, "a status was not kept");
                        }
                    }
                });
                if let Err(error) = written.await {
                    tracing::warn!(error = %error, "keeping statuses broke off");
                }
            }
            Err(_) => reader = host.board().reader(None),
        }
        if !reader.changed().await {
            return;
        }
    }
}

pub async fn rotate_logs(host: Host) {
    let mut ticks = tokio::time::interval(ROTATE);
    loop {
        ticks.tick().await;
        for (_, status) in host.board().all() {
            let logs = host.shop().layout.sandbox(&status.key).logs();
            for container in status.init_containers.iter().chain(&status.containers) {
                if !matches!(container.state, ContainerState::Running { .. }) {
                    continue;
                }
                let path = logs.join(SandboxDirs::log_name(&container.name, container.restart_count));
                let id = container
                    .container_id
                    .strip_prefix("containerd://")
                    .unwrap_or(&container.container_id);
                let id = crate::sandbox::event::ContainerId(id.to_owned());
                let now = host.shop().clock.now();
                if let Err(error) = logs::rotate(&host.shop().runtime, &id, &path, now).await {
                    tracing::warn!(pod.uid = %status.key.pod, error = %error, "a log was not rotated");
                }
            }
        }
    }
}

/// Asks the runtime what containers take; whoever decides by it reads the workshop's
/// copy.
pub async fn count_containers(host: Host) {
    let mut ticks = tokio::time::interval(eviction::PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        count_now(&host).await;
    }
}

pub(crate) async fn count_now(host: &Host) {
    match host.shop().runtime.container_stats().await {
        Ok(stats) => {
            let mut counts = Counts::default();
            for (key, name, counted) in stats.into_iter().filter_map(counted) {
                counts.entry(key).or_default().insert(name, counted);
            }
            host.shop().counts.send_replace(Arc::new(counts));
        }
        Err(error) => tracing::warn!(error = %error, "the runtime did not say what containers take"),
    }
}

fn counted(stats: cri::wire::ContainerStats) -> Option<(SandboxKey, ContainerName, Counted)> {
    let labels = stats.attributes?.labels;
    let name = ContainerName::parse("label", labels.get(cri::LABEL_CONTAINER)?.as_str()).ok()?;
    let value = |v: Option<cri::wire::UInt64Value>| v.map_or(0, |v| v.value);
    let layer = stats.writable_layer.unwrap_or_default();
    let counted = Counted {
        writable_layer: Usage {
            bytes: value(layer.used_bytes),
            inodes: value(layer.inodes_used),
        },
        working_set_bytes: value(stats.memory.and_then(|m| m.working_set_bytes)),
    };
    Some((cri::key_of(&labels)?, name, counted))
}

/// Removes images that were pulled here and that no container uses, those unused the
/// longest first. Others, and those that are pinned, are the operator's.
pub async fn collect_images(host: Host) {
    let mut ticks = tokio::time::interval(COLLECT);
    // When an image was last seen in use, or first seen at all.
    let mut last_used: BTreeMap<String, Timestamp> = BTreeMap::new();
    loop {
        let fill = tokio::select! {
            _ = ticks.tick() => Fill { begin: IMAGES_BEGIN, end: IMAGES_END },
            // Pods are evicted next: all that can go, goes.
            () = host.shop().disk_is_short.notified() => Fill { begin: 0.0, end: 0.0 },
        };
        if let Err(error) = collect_once(&host, &mut last_used, fill).await {
            tracing::warn!(error = %error, "images could not be looked through");
        }
    }
}

/// How full a disk is when images begin to go, and when no more do.
struct Fill {
    begin: f64,
    end: f64,
}

async fn collect_once(
    host: &Host,
    last_used: &mut BTreeMap<String, Timestamp>,
    fill: Fill,
) -> Result<(), crate::cri::CriError> {
    let shop = host.shop();
    let images = shop.runtime.images().await?;
    let now = shop.clock.now();
    let used: HashSet<String> = host
        .board()
        .all()
        .iter()
        .flat_map(|(_, s)| {
            s.init_containers
                .iter()
                .chain(&s.containers)
                .flat_map(|c| [c.image.clone(), c.image_id.clone()])
                .collect::<Vec<_>>()
        })
        .collect();
    let in_use = |image: &crate::cri::wire::Image| {
        used.contains(&image.id)
            || image
                .repo_tags
                .iter()
                .chain(&image.repo_digests)
                .any(|name| used.contains(name))
    };
    last_used.retain(|id, _| images.iter().any(|image| image.id == *id));
    for image in &images {
        if in_use(image) {
            last_used.insert(image.id.clone(), now);
        } else {
            last_used.entry(image.id.clone()).or_insert(now);
        }
    }
    shop.images.tidy(&images).await?;
    let directories = shop.runtime.image_directories().await?;
    shop.image_directories.send_if_modified(|known| {
        let changed = *known != directories;
        known.clone_from(&directories);
        changed
    });
    let fullness = || {
        directories
            .iter()
            .filter_map(|d| nix::sys::statvfs::statvfs(d.as_str()).ok())
            .map(|fs| 1.0 - fs.blocks_available() as f64 / (fs.blocks().max(1)) as f64)
            .fold(0.0, f64::max)
    };
    if fullness() < fill.begin {
        return Ok(());
    }
    let mut idle: Vec<_> = shop
        .images
        .removable(&images)
        .into_iter()
        .filter(|image| !images.iter().any(|i| i.id == image.name && in_use(i)))
        .filter_map(|image| last_used.get(&image.name).map(|at| (*at, image)))
        .filter(|(at, _)| crate::sandbox::clock::since(now, *at) >= IMAGE_YOUTH)
        .collect();
    idle.sort_by_key(|(at, _)| *at);
    for (_, image) in idle {
        if fullness() < fill.end {
            break;
        }
        if shop.images.remove(&image).await? {
            tracing::info!(
                image = image.name,
                bytes = image.bytes,
                "an image nobody uses was removed"
            );
        }
    }
    Ok(())
}
