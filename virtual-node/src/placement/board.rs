//! What is told of all placements, and when they count as complete. Owned by the
//! placer's task, whichever it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use pool_agent_api::PodUid;
use tokio::sync::watch;
use tracing::info;

use super::{Placement, Placements};

pub(super) struct Board {
    /// Pods whose drivers have told something. Empty once all is complete.
    told: BTreeSet<PodUid>,
    /// None until it is known which pods were there at the start.
    expected: Option<BTreeSet<PodUid>>,
    placements: Arc<Placements>,
    published: watch::Sender<Arc<Placements>>,
}

impl Board {
    pub(super) fn new() -> (Self, watch::Receiver<Arc<Placements>>) {
        let (published, placements) = watch::channel(Arc::default());
        let board = Self {
            told: BTreeSet::new(),
            expected: None,
            placements: Arc::default(),
            published,
        };
        (board, placements)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.placements.complete
    }

    pub(super) fn expect(&mut self, pods: BTreeSet<PodUid>) {
        self.expected = Some(pods);
        self.complete();
    }

    /// The pod's driver has told what it takes.
    pub(super) fn tells(&mut self, pod: PodUid) {
        if !self.placements.complete {
            self.told.insert(pod);
            self.complete();
        }
    }

    fn complete(&mut self) {
        let Some(expected) = &self.expected else { return };
        if self.placements.complete || !expected.is_subset(&self.told) {
            return;
        }
        info!(pods = expected.len(), "the placements of all pods are known");
        self.told.clear();
        Arc::make_mut(&mut self.placements).complete = true;
        self.published.send_replace(self.placements.clone());
    }

    pub(super) fn publish(&mut self, pod: &PodUid, placement: Option<Placement>) {
        let beside = self.placements.beside.get(pod).cloned();
        self.publish_both(pod, placement, beside);
    }

    pub(super) fn publish_beside(&mut self, pod: &PodUid, beside: Option<Placement>) {
        let placement = self.placements.pods.get(pod).cloned();
        self.publish_both(pod, placement, beside);
    }

    /// At once: nobody sees the one without the other.
    pub(super) fn publish_both(
        &mut self,
        pod: &PodUid,
        placement: Option<Placement>,
        beside: Option<Placement>,
    ) {
        let now = &self.placements;
        if now.pods.get(pod) == placement.as_ref() && now.beside.get(pod) == beside.as_ref() {
            return;
        }
        let placements = Arc::make_mut(&mut self.placements);
        set(&mut placements.pods, pod, placement);
        set(&mut placements.beside, pod, beside);
        self.published.send_replace(self.placements.clone());
    }
}

fn set(all: &mut BTreeMap<PodUid, Placement>, pod: &PodUid, placement: Option<Placement>) {
    match placement {
        Some(placement) => all.insert(pod.clone(), placement),
        None => all.remove(pod),
    };
}
