//! Where each pod runs, as the rest of the process reads it, and the placer
//! that decides it.
//!
//! Pod drivers ask the placer for room and tell it what they hold, the mesh control
//! plane reads the published [`Placements`]. There are two placers behind one seam,
//! each a task: [`listed`], over hosts that the configuration lists, with its rules
//! in the pure [`table`] and [`admitted`]; and [`cell`], by claims in the pool's own cluster, with its
//! rules in the pure [`claims`]. Neither stores anything: after a restart drivers
//! tell again what is on their pods' records.

mod admitted;
mod board;
mod cell;
mod claims;
mod image;
mod listed;
mod quota;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

pub(crate) use admitted::Arrival;
use board::Board;
pub(crate) use cell::Cell;
pub(crate) use claims::Proof;

use pool_agent_api::{
    Attempt, HostName, Invalid, Namespace, PodName, PodUid, Resources, SandboxKey, ServiceAccountName,
};
pub(crate) use table::Shortage;
use tokio::sync::{mpsc, oneshot, watch};

use crate::pool::HostTable;

/// One pod's current placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub host: HostName,
    pub attempt: Attempt,
    pub namespace: Namespace,
    pub name: PodName,
    pub service_account: ServiceAccountName,
    /// False for a pod that opted out: it has no identity.
    pub enrolled: bool,
}

/// A snapshot of all placements, published through a `tokio::sync::watch`.
///
/// A placement is on the pod's record and published here before `StartSandbox` is
/// called for it: the agent asks for the pod's certificate as soon as it has
/// accepted the sandbox, and the certificate broker looks here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placements {
    pub pods: BTreeMap<PodUid, Placement>,
    /// The other attempts of pods that are being handed over from one host to another:
    /// they run, too, and are nobody's address.
    pub beside: BTreeMap<PodUid, Placement>,
    /// Whether the records of all pods that were there when this process started
    /// have been read. Before that, absent is not gone.
    pub complete: bool,
}

/// What a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) claim: Resources,
    /// What of it is the pod's own, without the overhead of its runtime.
    pub(crate) requests: Resources,
    /// The runtime's handler; None: the hosts' usual one.
    pub(crate) runtime: Option<String>,
    /// UID of the controller: its pods are spread over hosts.
    pub(crate) owner: Option<String>,
    pub(crate) namespace: Namespace,
    pub(crate) name: PodName,
    /// Distinct, in the order of the containers.
    pub(crate) images: Vec<String>,
    /// The pod's own, from being told to stop to its end.
    pub(crate) grace: Duration,
}

/// Which of a pod's attempts it is about: there are two in a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seat {
    /// The one that the pod's status tells of.
    Pod,
    Beside,
}

/// What a claim came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claimed {
    Room(HostName),
    /// No host could ever take it.
    Never(Shortage),
    /// It cannot be claimed at all: what is wrong with it.
    Unfit(Invalid),
    /// The room is not to be had under this attempt any more: ask with the next.
    Lost,
}

const QUOTA_EXCEEDED: &str = "QuotaExceeded";
const CLAIM_REFUSED: &str = "ClaimRefused";

/// What a claim waits for, in words for the tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// CamelCase: an event's and a condition's.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Waiting {
    /// There is no room for it in the tenant's quota, or the cell does not take it.
    pub(crate) fn is_refusal(&self) -> bool {
        [QUOTA_EXCEEDED, CLAIM_REFUSED].contains(&self.reason)
    }

    fn for_room() -> Self {
        Self {
            reason: "WaitingForRoom",
            message: "No host of the pool has room for the pod now; it starts when one has".into(),
        }
    }

    fn for_host(message: impl Into<String>) -> Self {
        Self {
            reason: "WaitingForHost",
            message: message.into(),
        }
    }

    fn for_quota(message: impl Into<String>) -> Self {
        Self {
            reason: QUOTA_EXCEEDED,
            message: message.into(),
        }
    }

    fn refused(message: impl Into<String>) -> Self {
        Self {
            reason: CLAIM_REFUSED,
            message: message.into(),
        }
    }
}

/// Requests on their way to the placer: a few for each pod that starts at once.
const REQUESTS: usize = 256;

/// Asks the placer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Placer {
    requests: mpsc::Sender<Request>,
    /// Two attempts of a pod may have room at once.
    overlaps: bool,
}

enum Request {
    /// These pods were there when the process started.
    Expect {
        pods: BTreeSet<PodUid>,
    },
    Claim {
        pod: PodUid,
        seat: Seat,
        attempt: Attempt,
        ask: Box<Ask>,
        arrival: Arrival,
        answer: oneshot::Sender<Claimed>,
        waiting: watch::Sender<Option<Waiting>>,
    },
    Hold {
        pod: PodUid,
        seat: Seat,
        ask: Box<Ask>,
        placement: Placement,
        published: oneshot::Sender<()>,
    },
    /// The attempt beside the pod's is the pod's now, and the other way round.
    Exchange {
        pod: PodUid,
        ask: Box<Ask>,
        placement: Placement,
        beside: Placement,
        published: oneshot::Sender<()>,
    },
    /// Its status is about to say that it is over.
    Finished {
        pod: PodUid,
    },
    /// Nothing runs any more; what is left is there.
    Leave {
        pod: PodUid,
        host: HostName,
        attempt: Attempt,
    },
    Release {
        pod: PodUid,
        seat: Seat,
    },
    Refused {
        pod: PodUid,
        host: HostName,
    },
    GiveUp {
        key: SandboxKey,
        proof: Proof,
        over: oneshot::Sender<()>,
    },
}

/// The placer has ended: the process is stopping.
#[derive(Debug, thiserror::Error)]
#[error("the placer has stopped")]
pub(crate) struct Stopped;

impl Placer {
    /// Starts the placer over the hosts that there are; `quota` is what the node's pods
    /// may claim together. It ends when all clones are dropped.
    pub(crate) fn start(
        hosts: watch::Receiver<HostTable>,
        quota: Option<Resources>,
    ) -> (Self, watch::Receiver<Arc<Placements>>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let (board, placements) = Board::new();
        tokio::spawn(listed::Task::new(board, quota).run(receiver, hosts));
        let overlaps = false;
        (Self { requests, overlaps }, placements)
    }

    /// Starts the placer by claims in a cell. It ends when all clones are dropped.
    pub(crate) fn claim_in(
        cell: Cell,
        hosts: watch::Receiver<HostTable>,
    ) -> (Self, watch::Receiver<Arc<Placements>>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let (board, placements) = Board::new();
        tokio::spawn(cell::Task::new(cell, board).run(receiver, hosts));
        let overlaps = true;
        (Self { requests, overlaps }, placements)
    }

    /// Whether a second attempt of a pod can have room while the first runs.
    pub(crate) fn overlaps(&self) -> bool {
        self.overlaps
    }

    /// The pods that were there when the process started. Once the driver of each
    /// has told what it takes, the placements are complete.
    pub(crate) async fn expect(&self, pods: BTreeSet<PodUid>) {
        // Fails only when the process stops, as all of these.
        let _gone = self.requests.send(Request::Expect { pods }).await.is_err();
    }

    /// Room on a host, as soon as there is some; until then `waiting` says why. A
    /// claim that is dropped unanswered has to be released.
    pub(crate) async fn claim(
        &self,
        pod: PodUid,
        seat: Seat,
        attempt: Attempt,
        ask: Ask,
        arrival: Arrival,
        waiting: watch::Sender<Option<Waiting>>,
    ) -> Result<Claimed, Stopped> {
        let (answer, answered) = oneshot::channel();
        let request = Request::Claim {
            pod,
            seat,
            attempt,
            ask: Box::new(ask),
            arrival,
            answer,
            waiting,
        };
        self.requests.send(request).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// The pod runs there, or may. Returns once that is published.
    pub(crate) async fn hold(&self, pod: PodUid, seat: Seat, ask: Ask, placement: Placement) {
        let (published, done) = oneshot::channel();
        let request = Request::Hold {
            pod,
            seat,
            ask: Box::new(ask),
            placement,
            published,
        };
        if self.requests.send(request).await.is_ok() {
            let _gone = done.await.is_err();
        }
    }

    /// A handover has switched. Returns once that is published, both at once.
    pub(crate) async fn exchange(&self, pod: PodUid, ask: Ask, placement: Placement, beside: Placement) {
        let (published, done) = oneshot::channel();
        let request = Request::Exchange {
            pod,
            ask: Box::new(ask),
            placement,
            beside,
            published,
        };
        if self.requests.send(request).await.is_ok() {
            let _gone = done.await.is_err();
        }
    }

    /// The host did not take the pod that had room there: it is passed over for
    /// a while.
    pub(crate) async fn refused(&self, pod: PodUid, host: HostName) {
        let _gone = self.requests.send(Request::Refused { pod, host }).await.is_err();
    }

    /// The pod's status is about to say that it is over: from then on the scheduler
    /// counts it no more, and binds another in its stead. What its host still holds
    /// for it stays held.
    pub(crate) async fn finished(&self, pod: PodUid) {
        let _gone = self.requests.send(Request::Finished { pod }).await.is_err();
    }

    /// The pod's attempt, which is held, is on a host that is silent and has no live grant
    /// of ours. Returns once there is proof that it may run no more; with hosts of a list
    /// there never is.
    pub(crate) async fn give_up(&self, key: SandboxKey, proof: Proof) {
        let (over, is_over) = oneshot::channel();
        let request = Request::GiveUp { key, proof, over };
        if self.requests.send(request).await.is_err() || is_over.await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The pod runs no more; its logs are there.
    pub(crate) async fn leave(&self, pod: PodUid, host: HostName, attempt: Attempt) {
        let request = Request::Leave { pod, host, attempt };
        let _gone = self.requests.send(request).await.is_err();
    }

    /// Nothing of that attempt is on any host (any more).
    pub(crate) async fn release(&self, pod: PodUid, seat: Seat) {
        let request = Request::Release { pod, seat };
        let _gone = self.requests.send(request).await.is_err();
    }
}

#[cfg(test)]
mod tests;
