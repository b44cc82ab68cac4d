//! Where each pod runs, as the rest of the process reads it, and the placer
//! that decides it.
//!
//! The table belongs to one task ([`Placer::start`]); pod drivers ask it for
//! room and tell it what they hold, the mesh control plane reads the published
//! [`Placements`]. The rules are in [`table`], pure. Nothing is stored: after a
//! restart drivers tell again what is on their pods' records.

mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use pool_agent_api::{Attempt, HostName, Namespace, PodName, PodUid, ServiceAccountName};
use table::{Answer, Table};
pub(crate) use table::{Ask, Shortage};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info};

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
    /// Whether the records of all pods that were there when this process started
    /// have been read. Before that, absent is not gone.
    pub complete: bool,
}

/// Requests on their way to the placer: a few for each pod that starts at once.
const REQUESTS: usize = 256;

/// How soon a host that refused a pod is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Asks the placer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Placer {
    requests: mpsc::Sender<Request>,
}

enum Request {
    /// These pods were there when the process started.
    Expect {
        pods: BTreeSet<PodUid>,
    },
    Claim {
        pod: PodUid,
        ask: Ask,
        answer: oneshot::Sender<Result<HostName, Shortage>>,
    },
    Hold {
        pod: PodUid,
        ask: Ask,
        placement: Placement,
        published: oneshot::Sender<()>,
    },
    Release {
        pod: PodUid,
    },
    Refused {
        pod: PodUid,
        host: HostName,
    },
}

/// The placer has ended: the process is stopping.
#[derive(Debug, thiserror::Error)]
#[error("the placer has stopped")]
pub(crate) struct Stopped;

impl Placer {
    /// Starts the task that owns the table. It ends when all clones are dropped.
    pub(crate) fn start(hosts: watch::Receiver<HostTable>) -> (Self, watch::Receiver<Arc<Placements>>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let (published, placements) = watch::channel(Arc::default());
        let task = Task {
            table: Table::default(),
            waiting: BTreeMap::new(),
            told: BTreeSet::new(),
            expected: None,
            placements: Arc::default(),
            published,
        };
        tokio::spawn(task.run(receiver, hosts));
        (Self { requests }, placements)
    }

    /// The pods that were there when the process started. Once the driver of each
    /// has told what it takes, the placements are complete.
    pub(crate) async fn expect(&self, pods: BTreeSet<PodUid>) {
        // Fails only when the process stops, as all of these.
        let _gone = self.requests.send(Request::Expect { pods }).await.is_err();
    }

    /// Room on a host, as soon as there is some. A claim that is dropped
    /// unanswered has to be released.
    pub(crate) async fn claim(&self, pod: PodUid, ask: Ask) -> Result<Result<HostName, Shortage>, Stopped> {
        let (answer, answered) = oneshot::channel();
        let request = Request::Claim { pod, ask, answer };
        self.requests.send(request).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// The pod runs there, or may. Returns once that is published.
    pub(crate) async fn hold(&self, pod: PodUid, ask: Ask, placement: Placement) {
        let (published, done) = oneshot::channel();
        let request = Request::Hold {
            pod,
            ask,
            placement,
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

    /// The pod takes no room (any more).
    pub(crate) async fn release(&self, pod: PodUid) {
        let _gone = self.requests.send(Request::Release { pod }).await.is_err();
    }
}

struct Task {
    table: Table,
    waiting: BTreeMap<PodUid, oneshot::Sender<Result<HostName, Shortage>>>,
    /// Pods whose drivers have told something. Empty once all is complete.
    told: BTreeSet<PodUid>,
    /// None until it is known which pods were there at the start.
    expected: Option<BTreeSet<PodUid>>,
    placements: Arc<Placements>,
    published: watch::Sender<Arc<Placements>>,
}

impl Task {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>, mut hosts: watch::Receiver<HostTable>) {
        self.table.set_hosts(&hosts.borrow_and_update());
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = retry.tick(), if !self.waiting.is_empty() => {
                    let answers = self.table.retry();
                    self.answer(answers);
                }
                request = requests.recv() => match request {
                    Some(request) => self.take(request),
                    None => return,
                },
                changed = hosts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let answers = self.table.set_hosts(&hosts.borrow_and_update());
                    self.answer(answers);
                }
            }
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Expect { pods } => {
                self.expected = Some(pods);
                self.complete();
            }
            Request::Claim { pod, ask, answer } => {
                self.publish(&pod, None);
                self.waiting.insert(pod.clone(), answer);
                let answers = self.table.claim(pod.clone(), ask);
                self.answer(answers);
                self.tells(pod);
            }
            Request::Hold {
                pod,
                ask,
                placement,
                published,
            } => {
                self.waiting.remove(&pod);
                let answers = self.table.hold(pod.clone(), ask, placement.host.clone());
                self.publish(&pod, Some(placement));
                // The driver may have ended meanwhile.
                let _gone = published.send(()).is_err();
                self.answer(answers);
                self.tells(pod);
            }
            Request::Refused { pod, host } => {
                self.publish(&pod, None);
                let answers = self.table.refused(&pod, host);
                self.answer(answers);
            }
            Request::Release { pod } => {
                self.waiting.remove(&pod);
                self.publish(&pod, None);
                let answers = self.table.release(&pod);
                self.answer(answers);
                self.tells(pod);
            }
        }
    }

    fn answer(&mut self, answers: Vec<(PodUid, Answer)>) {
        for (pod, answer) in answers {
            let Some(waiting) = self.waiting.remove(&pod) else {
                continue;
            };
            let answered = match answer {
                Answer::Room(host) => {
                    debug!(pod.uid = %pod, host = %host, "room claimed");
                    waiting.send(Ok(host))
                }
                Answer::Never(shortage) => waiting.send(Err(shortage)),
            };
            // The driver changed its mind; it releases what it may hold.
            drop(answered);
        }
    }

    fn tells(&mut self, pod: PodUid) {
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

    fn publish(&mut self, pod: &PodUid, placement: Option<Placement>) {
        if self.placements.pods.get(pod) == placement.as_ref() {
            return;
        }
        let placements = Arc::make_mut(&mut self.placements);
        match placement {
            Some(placement) => placements.pods.insert(pod.clone(), placement),
            None => placements.pods.remove(pod),
        };
        self.published.send_replace(self.placements.clone());
    }
}

#[cfg(test)]
mod tests;
