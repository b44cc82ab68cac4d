//! This host's Node: registered, kept current, and read for what others decide.

use std::{path::Path, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::watcher,
};
use pool_cell::{HostNode, HostRecord, NodeFacts, host::HostImage};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};

use super::{Cell, Clients, Settings, answered, client};
use crate::causes::described;

/// How often the Node is compared with the host.
const COMPARE: Duration = Duration::from_secs(10);
/// How often it is written though nothing changed.
const HEARTBEAT: Duration = Duration::from_secs(300);
/// How often the runtime is asked for its images.
const IMAGES: Duration = Duration::from_secs(60);
/// A runtime that has not answered by then counts as down.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(10);

/// What does not change while the host is up.
#[derive(Debug, Clone)]
pub struct Station {
    pub facts: NodeFacts,
}

impl Station {
    pub fn detect(facts: &crate::service::Facts, architecture: &str) -> Self {
        let read = |path: &str| {
            let text = std::fs::read_to_string(Path::new(path)).unwrap_or_default();
            text.trim().to_owned()
        };
        Self {
            facts: NodeFacts {
                boot_id: facts.boot_id.clone(),
                machine_id: machine_id(),
                system_uuid: read("/sys/class/dmi/id/product_uuid"),
                kernel_version: facts.kernel_version.clone(),
                os_image: facts.os_image.clone(),
                runtime_version: facts.runtime_version.clone(),
                architecture: architecture.to_owned(),
            },
        }
    }
}

/// `machine-id(5)`; empty where there is none.
pub(super) fn machine_id() -> String {
    let text = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    text.trim().to_owned()
}

struct Keeper {
    cell: Cell,
    settings: Settings,
    station: Station,
    /// As last seen or written.
    node: Option<Node>,
    /// It has been seen: it is not made again under sandboxes that are here, since
    /// whoever deleted it takes this host for gone.
    registered: bool,
    written_at: Option<Instant>,
    images: Vec<HostImage>,
    images_at: Option<Instant>,
    /// A client for the other parts, while the Node is this machine's.
    ours: watch::Sender<Option<Client>>,
    /// What was last said there, of the client in use.
    told: Option<bool>,
}

pub(super) async fn keep(
    cell: Cell,
    mut clients: Clients,
    ours: watch::Sender<Option<Client>>,
    settings: Settings,
    station: Station,
) {
    let mut keeper = Keeper {
        cell,
        settings,
        station,
        node: None,
        registered: false,
        written_at: None,
        images: vec![],
        images_at: None,
        ours,
        told: None,
    };
    let mut ticks = tokio::time::interval(COMPARE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let client = client(&mut clients).await;
        keeper.told = None;
        let api: Api<Node> = Api::all(client.clone());
        let mut seen = watcher::watch_object(api, keeper.cell.name.as_str()).boxed();
        loop {
            tokio::select! {
                event = seen.next() => match event {
                    Some(Ok(node)) => keeper.node = node,
                    Some(Err(error)) => {
                        tracing::warn!(error = described(&error), "the watch of this host's node failed");
                        tokio::time::sleep(COMPARE).await;
                        break;
                    }
                    None => break,
                },
                renewed = clients.changed() => {
                    if renewed.is_err() {
                        return;
                    }
                    break;
                }
                _ = ticks.tick() => {}
            }
            if let Err(error) = keeper.converge(&client).await {
                tracing::warn!(
                    error = described(&error),
                    "this host's node is not as it should be"
                );
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum NodeError {
    #[error("the cell refused")]
    Api(#[from] kube::Error),
    #[error(
        "a node of this name is there, of machine {theirs} and not {ours}: delete it if this host replaces it"
    )]
    Foreign { theirs: String, ours: String },
    #[error("the node was deleted: this host is made a node again when its last sandbox has gone")]
    Deleted,
}

impl Keeper {
    async fn converge(&mut self, client: &Client) -> Result<(), NodeError> {
        let api: Api<Node> = Api::all(client.clone());
        let name = self.cell.name.to_string();
        let shape = self.shape().await;
        let now = Timestamp::now();
        let node = match self.node.take() {
            Some(node) => node,
            // The watch may not have told yet.
            None => match answered(api.get_opt(&name)).await? {
                Some(node) => node,
                None if self.registered && !self.cell.host.residents().is_empty() => {
                    return Err(NodeError::Deleted);
                }
                None => {
                    let made = answered(api.create(&PostParams::default(), &shape.node(now))).await?;
                    tracing::info!(node = name, "this host is a node of the cell");
                    made
                }
            },
        };
        let record = HostRecord::read(&node);
        let ours = self.station.facts.machine_id.clone();
        if !record.machine_id.is_empty() && record.machine_id != ours {
            self.node = Some(node);
            self.tell(None);
            return Err(NodeError::Foreign {
                theirs: record.machine_id,
                ours,
            });
        }
        self.tell(Some(client));
        self.registered = true;
        self.cell.host.cordon(record.unschedulable);
        let node = match shape.metadata_patch(&node) {
            None => node,
            Some(patch) => {
                let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
                answered(api.patch(&name, &parameters, &patch)).await?
            }
        };
        let due = self.written_at.is_none_or(|at| at.elapsed() >= HEARTBEAT);
        let node = match shape.status_patch(&node, now, due) {
            None => node,
            Some(patch) => {
                let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
                let written = answered(api.patch_status(&name, &parameters, &patch)).await?;
                self.written_at = Some(Instant::now());
                written
            }
        };
        self.node = Some(node);
        Ok(())
    }

    /// Whether the Node is this machine's.
    fn tell(&mut self, client: Option<&Client>) {
        if self.told.replace(client.is_some()) != Some(client.is_some()) {
            self.ours.send_replace(client.cloned());
        }
    }

    async fn shape(&mut self) -> HostNode {
        let runtime = &self.cell.host.shop().runtime;
        let alive = tokio::time::timeout(RUNTIME_PATIENCE, runtime.version()).await;
        let unready = match alive {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(format!("the container runtime: {}", described(&error))),
            Err(_) => Some("the container runtime does not answer".into()),
        };
        if self.images_at.is_none_or(|at| at.elapsed() >= IMAGES)
            && let Ok(Ok(images)) = tokio::time::timeout(RUNTIME_PATIENCE, runtime.images()).await
        {
            let mut images: Vec<HostImage> = images
                .into_iter()
                .map(|image| HostImage {
                    names: image.repo_tags.into_iter().chain(image.repo_digests).collect(),
                    bytes: image.size,
                })
                .filter(|image| !image.names.is_empty())
                .collect();
            // The largest matter most to whoever looks for a host that has them.
            images.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.names.cmp(&b.names)));
            self.images = images;
            self.images_at = Some(Instant::now());
        }
        let host = &self.cell.host;
        HostNode {
            name: self.cell.name.clone(),
            address: self.cell.agent.ip(),
            zone: self.settings.zone.clone(),
            region: self.settings.region.clone(),
            class: self.settings.class.clone(),
            provider_id: self.settings.provider_id.clone(),
            taints: self.settings.taints.clone(),
            capacity: host.capacity(),
            allocatable: host.allocatable(),
            unready,
            pressure: *host.shop().pressure.borrow(),
            facts: self.station.facts.clone(),
            images: self.images.clone(),
        }
    }
}
