//! A host that says nothing: its pods are not ready any more, and when it is certain that
//! it has fenced them they begin elsewhere.
//!
//! ```text
//!  silent ──▶ not ready ──▶ no grant of ours is live, nor its Lease as far as can be told
//!                                  │ who may be replaced, or is to end: its claim is deleted
//!                                  ▼
//!                           the placer has proof ──▶ Lapsed
//! ```
//!
//! Pods that may be replaced before it is known that nothing of them runs are those of a
//! ReplicaSet, which tolerates it; all others are at most once: they wait for their
//! host, or for the pool's word that there is none.
//!
//! In a handover either of the two attempts may be on a host that is silent, or both: each
//! is given up by itself. One that is to take the pod over, which is being written, is
//! given up once it has.

use std::{collections::BTreeMap, task::Poll, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;
use tracing::warn;

use super::{
    super::lifecycle::{Intent, Place, Stage, Step},
    Driver,
};
use crate::placement::Proof;

/// From a host's last word until its pods count as not ready. An agent that is
/// replaced is back before that; whoever looks for endpoints does not wait longer.
const PATIENCE: Duration = Duration::from_secs(13);

pub(super) struct Silence {
    /// At most the two attempts that there are.
    giving_up: BTreeMap<Place, BoxFuture<'static, ()>>,
}

impl Silence {
    pub(super) fn new() -> Self {
        Self {
            giving_up: BTreeMap::new(),
        }
    }

    /// What was given up and is over, or never.
    pub(super) async fn over(&mut self) -> Place {
        let place = std::future::poll_fn(|context| {
            let mut given_up = self.giving_up.iter_mut();
            let over =
                given_up.find_map(|(place, over)| over.poll_unpin(context).is_ready().then_some(place));
            over.cloned().map_or(Poll::Pending, Poll::Ready)
        })
        .await;
        self.giving_up.remove(&place);
        place
    }
}

impl Driver {
    /// When the host there, which is silent, has been so for too long; None: it is not
    /// silent.
    fn lost_at(&self, place: &Place) -> Option<Instant> {
        let host = &place.host;
        let silent = *self.heard.borrow().silent.get(host)?;
        // What broke may have been noticed late.
        let last = self.tools.pool.rights().heard(host).unwrap_or(silent);
        Some(last.min(silent) + PATIENCE)
    }

    pub(super) fn is_lost_at(&self, place: &Place) -> bool {
        self.lost_at(place).is_some_and(|at| at <= Instant::now())
    }

    pub(super) fn is_host_lost(&self) -> bool {
        self.lifecycle.place().is_some_and(|place| self.is_lost_at(place))
    }

    /// Where it runs or may run, and with a handover there are two.
    fn may_run_at(&self) -> impl Iterator<Item = &Place> {
        let placed = match self.lifecycle.stage() {
            Stage::Recorded { place }
            | Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Forgetting { place } => Some(place),
            _ => None,
        };
        let second = self
            .lifecycle
            .handover()
            .and_then(|handover| match &handover.step {
                Step::Switching { .. } => None,
                _ => handover.place(),
            });
        placed.into_iter().chain(second)
    }

    /// What is to be given up, and when.
    fn to_give_up(&self) -> Vec<(&Place, Proof, Instant)> {
        let proof = match (self.may_be_replaced(), self.lifecycle.intent()) {
            (true, _) => Proof::Lapsed,
            // It waits for its host.
            (false, Intent::Run) => return vec![],
            (false, _) => Proof::Gone,
        };
        let heard = self.heard.borrow();
        self.may_run_at()
            .filter(|place| heard.is_silent(&place.host))
            // The placer knows what is held, and nothing of what it was not told.
            .filter(|place| self.room.names(place) || self.room_beside.names(place))
            .map(|place| (place, proof, self.tools.pool.rights().may_be_over(&place.host)))
            .collect()
    }

    /// When silence has to be looked at again though nothing happens.
    pub(super) fn silence_due(&self) -> Option<Instant> {
        let now = Instant::now();
        let second = self.lifecycle.second();
        let lost = self.lifecycle.place().into_iter().chain(second);
        let lost = lost.filter_map(|place| self.lost_at(place));
        let give_up = self.to_give_up().into_iter().map(|(_, _, at)| at);
        lost.chain(give_up).filter(|at| *at > now).min()
    }

    pub(super) fn consider_silence(&mut self) {
        let now = Instant::now();
        let wanted: BTreeMap<Place, Proof> = self
            .to_give_up()
            .into_iter()
            .filter(|(_, _, at)| *at <= now)
            .map(|(place, proof, _)| (place.clone(), proof))
            .collect();
        // It was heard again, or is over: what was asked is not believed any more.
        self.silence
            .giving_up
            .retain(|place, _| wanted.contains_key(place));
        for (place, proof) in wanted {
            if self.silence.giving_up.contains_key(&place) {
                continue;
            }
            warn!(host = %place.host, attempt = %place.attempt, ?proof, "the pod's host is silent: its claim there is given up");
            let (placer, key) = (self.tools.placer.clone(), self.key(&place));
            let giving_up = async move { placer.give_up(key, proof).await };
            self.silence.giving_up.insert(place, giving_up.boxed());
        }
    }

    /// Whether another may run before it is known that nothing of this one does.
    fn may_be_replaced(&self) -> bool {
        self.object.as_deref().is_some_and(is_of_replica_set)
    }
}

fn is_of_replica_set(pod: &Pod) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    controllers.any(|owner| owner.kind == "ReplicaSet" && owner.api_version.starts_with("apps/"))
}
