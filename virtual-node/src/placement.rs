//! Where each pod runs, as the rest of the process reads it, and the placer
//! that decides it.
//!
//! The table belongs to one task ([`Placer::start`]); pod drivers ask it for
//! room and tell it what they hold, the mesh control plane reads the published
//! [`Placements`]. The rules are in [`table`], pure. Nothing is stored: after a
//! restart drivers tell again what the hosts report.

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
use tracing::debug;

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
/// A placement is published before `StartSandbox` is called for it: the agent
/// asks for the pod's certificate as soon as it has accepted the sandbox, and the
/// certificate broker looks here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placements {
    pub pods: BTreeMap<PodUid, Placement>,
    /// Hosts whose agents have told what they run since this process started.
    /// Of any other host, absent is not gone.
    pub known_hosts: BTreeSet<HostName>,
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
    Claim {
        pod: PodUid,
        ask: Ask,
        placement: Unplaced,
        answer: oneshot::Sender<Result<HostName, Shortage>>,
    },
    Hold {
        pod: PodUid,
        ask: Ask,
        placement: Placement,
    },
    Release {
        pod: PodUid,
    },
    Refused {
        pod: PodUid,
        host: HostName,
    },
}

/// A placement that only lacks its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unplaced {
    pub(crate) attempt: Attempt,
    pub(crate) namespace: Namespace,
    pub(crate) name: PodName,
    pub(crate) service_account: ServiceAccountName,
    pub(crate) enrolled: bool,
}

impl Unplaced {
    pub(crate) fn on(self, host: HostName) -> Placement {
        Placement {
            host,
            attempt: self.attempt,
            namespace: self.namespace,
            name: self.name,
            service_account: self.service_account,
            enrolled: self.enrolled,
        }
    }
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
            placements: Arc::default(),
            published,
        };
        tokio::spawn(task.run(receiver, hosts));
        (Self { requests }, placements)
    }

    /// Room on a host, as soon as there is some. The placement is published
    /// before this returns. A claim that is dropped unanswered has to be released.
    pub(crate) async fn claim(
        &self,
        pod: PodUid,
        ask: Ask,
        placement: Unplaced,
    ) -> Result<Result<HostName, Shortage>, Stopped> {
        let (answer, answered) = oneshot::channel();
        let request = Request::Claim {
            pod,
            ask,
            placement,
            answer,
        };
        self.requests.send(request).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// The pod runs there, whoever decided it.
    pub(crate) async fn hold(&self, pod: PodUid, ask: Ask, placement: Placement) {
        // Fails only when the process stops.
        let _gone = self
            .requests
            .send(Request::Hold { pod, ask, placement })
            .await
            .is_err();
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

struct Waiting {
    placement: Unplaced,
    answer: oneshot::Sender<Result<HostName, Shortage>>,
}

struct Task {
    table: Table,
    waiting: BTreeMap<PodUid, Waiting>,
    placements: Arc<Placements>,
    published: watch::Sender<Arc<Placements>>,
}

impl Task {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>, mut hosts: watch::Receiver<HostTable>) {
        let now_hosts = hosts.borrow_and_update().clone();
        self.heard(&now_hosts);
        self.table.set_hosts(&now_hosts);
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
                    let now_hosts = hosts.borrow_and_update().clone();
                    self.heard(&now_hosts);
                    let answers = self.table.set_hosts(&now_hosts);
                    self.answer(answers);
                }
            }
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Claim {
                pod,
                ask,
                placement,
                answer,
            } => {
                self.publish(&pod, None);
                self.waiting.insert(pod.clone(), Waiting { placement, answer });
                let answers = self.table.claim(pod, ask);
                self.answer(answers);
            }
            Request::Hold { pod, ask, placement } => {
                self.waiting.remove(&pod);
                let answers = self.table.hold(pod.clone(), ask, placement.host.clone());
                self.publish(&pod, Some(placement));
                self.answer(answers);
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
                    self.publish(&pod, Some(waiting.placement.on(host.clone())));
                    waiting.answer.send(Ok(host))
                }
                Answer::Never(shortage) => waiting.answer.send(Err(shortage)),
            };
            // The driver changed its mind; it releases what it may hold.
            drop(answered);
        }
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

    /// Hosts that have told what they run, once at least.
    fn heard(&mut self, hosts: &HostTable) {
        let known = hosts
            .iter()
            .filter(|(_, view)| view.reachable)
            .map(|(name, _)| name);
        let new: Vec<HostName> = known
            .filter(|h| !self.placements.known_hosts.contains(*h))
            .cloned()
            .collect();
        if new.is_empty() {
            return;
        }
        Arc::make_mut(&mut self.placements).known_hosts.extend(new);
        self.published.send_replace(self.placements.clone());
    }
}
