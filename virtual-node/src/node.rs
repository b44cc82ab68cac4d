//! The Node that the tenant sees: registered, adopted or made again, its status
//! kept current, its Lease renewed.
//!
//! One task. [`manifest`] says what the Node should be (pure), [`lease`] renews.
//! What others wrote on the Node (labels, annotations, conditions, cordons)
//! stays: every write is a patch of what is ours and differs.
//!
//! Over hosts that are listed, the Lease is renewed only while one of them is in
//! reach: a node without a pool is to be seen as dead, and its pods' endpoints with
//! it. Over a cell there may be no host at all, until a pod asks for one: the node is
//! ready once the cell has said what the tenant may use, and stays so while the cell
//! is away.

mod lease;
mod manifest;

use std::{net::IpAddr, sync::Arc, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
pub(crate) use manifest::allocatable;
use manifest::{Shape, Standing};
use pool_agent_api::{Resources, TenantId, status::Severity};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    api_server::answered,
    config,
    event::{Happening, Object, Recorder},
    pool::HostTable,
};

/// How often the status is computed.
const COMPUTE: Duration = Duration::from_secs(10);
/// How often it is written though nothing changed.
const HEARTBEAT: Duration = Duration::from_secs(300);

#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) tenant: TenantId,
    pub(crate) address: IpAddr,
    pub(crate) kubelet_port: u16,
    pub(crate) settings: config::Node,
}

/// What the Node offers.
#[derive(Clone)]
pub(crate) enum Offer {
    /// What its hosts have, or the configured quota.
    Hosts,
    /// The quota in the cell; None until that has been read.
    Quota(watch::Receiver<Option<Resources>>),
}

impl Offer {
    pub(crate) fn quota(&mut self) -> Option<Resources> {
        match self {
            Self::Hosts => None,
            Self::Quota(quota) => *quota.borrow_and_update(),
        }
    }

    /// When the quota is another. Never for hosts.
    pub(crate) async fn changed(&mut self) {
        let told = match self {
            Self::Hosts => false,
            Self::Quota(quota) => quota.changed().await.is_ok(),
        };
        if !told {
            std::future::pending().await
        }
    }
}

pub(crate) struct Registration {
    api: Api<Node>,
    client: Client,
    identity: Identity,
    hosts: watch::Receiver<HostTable>,
    offer: Offer,
    /// Whether the node lives, for its Lease.
    alive: watch::Sender<bool>,
    recorder: Recorder,
    /// As last seen or written.
    node: Option<Node>,
    /// The same, for those who admit pods.
    told: watch::Sender<Option<Arc<Node>>>,
    written_at: Option<Instant>,
    ready: Option<bool>,
}

impl Registration {
    /// The receiver tells what the Node is; None until it was first seen.
    pub(crate) fn new(
        client: Client,
        identity: Identity,
        hosts: watch::Receiver<HostTable>,
        offer: Offer,
        recorder: Recorder,
    ) -> (Self, watch::Receiver<Option<Arc<Node>>>) {
        let (told, node) = watch::channel(None);
        let registration = Self {
            api: Api::all(client.clone()),
            client,
            identity,
            hosts,
            offer,
            alive: watch::Sender::new(false),
            recorder,
            node: None,
            told,
            written_at: None,
            ready: None,
        };
        (registration, node)
    }

    /// Runs until `shutdown`. The Node stays, so that its pods do.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let (uid, uids) = watch::channel(None);
        let renewal = lease::renew(
            self.client.clone(),
            self.identity.name.clone(),
            uids,
            self.alive.subscribe(),
            shutdown.clone(),
        );
        tokio::spawn(renewal);
        let mut seen = watcher::watch_object(self.api.clone(), &self.identity.name)
            .default_backoff()
            .boxed();
        let mut compute = tokio::time::interval(COMPUTE);
        compute.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reachable = self.reachable();
        loop {
            if let Offer::Quota(_) = self.offer {
                let before = || self.node.as_ref().and_then(manifest::offered);
                // While the cell is away: what an earlier process has told.
                let known = self.identity.settings.quota.or_else(before);
                self.identity.settings.quota = self.offer.quota().or(known);
            }
            let alive = self.standing().is_ready();
            self.alive
                .send_if_modified(|known| std::mem::replace(known, alive) != alive);
            let changed = tokio::select! {
                () = shutdown.cancelled() => return,
                seen = seen.next() => match seen {
                    Some(Ok(node)) => {
                        self.node = node;
                        true
                    }
                    Some(Err(error)) => {
                        warn!(error = &error as &dyn std::error::Error, "the watch of the node failed");
                        false
                    }
                    None => return,
                },
                changed = self.hosts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let before = std::mem::replace(&mut reachable, self.reachable());
                    // What is free changes all the time and is not ours to tell.
                    before != reachable
                }
                () = self.offer.changed() => true,
                _ = compute.tick() => true,
            };
            if !changed {
                continue;
            }
            if let Err(error) = self.converge().await {
                warn!(error = &error as &dyn std::error::Error, "cannot write the node");
            }
            self.told.send_replace(self.node.clone().map(Arc::new));
            let now = self.node.as_ref().and_then(|n| n.metadata.uid.clone());
            uid.send_if_modified(|uid| std::mem::replace(uid, now.clone()) != now);
        }
    }

    fn reachable(&mut self) -> Vec<bool> {
        self.hosts
            .borrow_and_update()
            .values()
            .map(|h| h.reachable)
            .collect()
    }

    /// Makes the Node what it should be.
    async fn converge(&mut self) -> Result<(), kube::Error> {
        let name = self.identity.name.clone();
        if self.node.is_none() {
            // The watch may not have told yet.
            self.node = match answered(self.api.get_opt(&name)).await? {
                Some(node) => Some(node),
                None => {
                    let node = self.shape(&Node::default()).node();
                    let made = answered(self.api.create(&PostParams::default(), &node)).await?;
                    info!(node = name, "node registered");
                    Some(made)
                }
            };
        }
        let Some(node) = &self.node else { return Ok(()) };
        let shape = self.shape(node);
        if let Some(patch) = shape.metadata_patch(node) {
            let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&patch));
            let patched = answered(self.api.patch(&name, &parameters, &patch)).await?;
            self.node = Some(patched);
        }
        let Some(node) = &self.node else { return Ok(()) };
        let due = self.written_at.is_none_or(|at| at.elapsed() >= HEARTBEAT);
        if let Some(patch) = shape.status_patch(node, due) {
            let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&patch));
            let patched = answered(self.api.patch_status(&name, &parameters, &patch)).await?;
            self.written_at = Some(Instant::now());
            self.announce(&patched, shape.ready());
            self.node = Some(patched);
        }
        Ok(())
    }

    fn standing(&self) -> Standing {
        match &self.offer {
            Offer::Hosts => Standing::of_hosts(&self.hosts.borrow()),
            Offer::Quota(_) => Standing::of_quota(self.identity.settings.quota),
        }
    }

    fn shape(&self, node: &Node) -> Shape {
        let standing = self.standing();
        Shape::new(
            &self.identity,
            &self.hosts.borrow(),
            &standing,
            node,
            Timestamp::now(),
        )
    }

    fn announce(&mut self, node: &Node, ready: bool) {
        let before = self.ready.replace(ready);
        // It begins not ready: nothing to tell before it first is.
        if before == Some(ready) || before.is_none() && !ready {
            return;
        }
        let (reason, word) = if ready {
            ("NodeReady", "NodeReady")
        } else {
            ("NodeNotReady", "NodeNotReady")
        };
        info!(ready, "the node's readiness changed");
        self.recorder.record(Happening {
            object: Object::node(node),
            severity: Severity::Normal,
            reason: reason.into(),
            message: format!("Node {} status is now: {word}", self.identity.name),
            at: Timestamp::now(),
        });
    }
}
