//! The pods of this node: one task ([`driver`]) for each, and the supervisor
//! that feeds them.
//!
//! The supervisor merges two sources by pod UID: the API server's watch of pods
//! bound to this node, and what the hosts of the pool report. It decides
//! nothing. A pod that only a host knows gets a driver too: it is reaped only
//! after the driver's own live read says that it is gone.
//!
//! ```text
//!  watch of pods ─┐                ┌─▶ driver of pod 1 ─▶ hosts, placer, API server
//!                 ├─▶ supervisor ──┼─▶ driver of pod 2
//!  hosts' reports ┘      ▲         └─▶ …
//!                        └── queries of the kubelet API
//! ```
//!
//! What a driver gets is the latest state, through a `watch`: a slow driver
//! sees fewer steps, never a stale one, and holds nobody up.

pub(crate) mod admission;
pub(crate) mod budget;
pub(crate) mod driver;
pub(crate) mod lifecycle;
pub(crate) mod metrics;
pub(crate) mod record;
pub(crate) mod references;
pub(crate) mod resolve;
pub(crate) mod status;
pub(crate) mod surge;
pub(crate) mod translate;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use driver::{Driver, Tools};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt, runtime::watcher};
use lifecycle::Place;
use pool_agent_api::{HostName, PodUid, SandboxStatus, status::PodEvent};
use record::Record;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    event::{Happening, Object},
    pool::{News, PoolEvent},
};

/// What is known of one pod; the latest of each.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    /// As last seen in the watch; None for a pod that only a host knows.
    pub(crate) object: Option<Arc<Pod>>,
    /// The watch no longer has it. A reason to look, not a proof.
    pub(crate) absent: bool,
    pub(crate) reports: BTreeMap<Place, Arc<SandboxStatus>>,
}

/// What is known of the hosts' reports as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    /// When each host has last reported all it has, in turns of all hosts together.
    pub(crate) syncs: BTreeMap<HostName, u64>,
    turns: u64,
    /// Hosts that are silent, and since when.
    pub(crate) silent: BTreeMap<HostName, Instant>,
}

impl Heard {
    fn syncs(&self, host: &HostName) -> u64 {
        self.syncs.get(host).copied().unwrap_or(0)
    }

    fn is_silent(&self, host: &HostName) -> bool {
        self.silent.contains_key(host)
    }
}

/// A pod as the kubelet API needs it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) pod: Arc<Pod>,
    /// What runs of it, where it is on record.
    pub(crate) sandbox: Option<(Place, Arc<SandboxStatus>)>,
}

/// Questions of the kubelet API.
#[derive(Debug)]
pub(crate) enum Query {
    Find {
        namespace: String,
        name: String,
        answer: oneshot::Sender<Option<Found>>,
    },
    All {
        answer: oneshot::Sender<Vec<Found>>,
    },
}

/// Questions waiting; each is answered at once.
const QUERIES: usize = 64;

/// Drivers of pods that are not here, beside those that are: each sees to the end of a
/// sandbox that a host tells of.
const STRANGERS: usize = 4096;

/// Asks the supervisor. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Directory {
    queries: mpsc::Sender<Query>,
}

impl Directory {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Query>) {
        let (queries, receiver) = mpsc::channel(QUERIES);
        (Self { queries }, receiver)
    }

    /// None if this node has no such pod, or is stopping.
    pub(crate) async fn find(&self, namespace: &str, name: &str) -> Option<Found> {
        let (answer, answered) = oneshot::channel();
        let query = Query::Find {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            answer,
        };
        self.queries.send(query).await.ok()?;
        answered.await.ok().flatten()
    }

    pub(crate) async fn all(&self) -> Vec<Found> {
        let (answer, answered) = oneshot::channel();
        if self.queries.send(Query::All { answer }).await.is_err() {
            return vec![];
        }
        answered.await.unwrap_or_default()
    }
}

/// The watch of the pods bound to a node.
pub(crate) fn watch_pods(
    client: Client,
    node_name: &str,
) -> impl Stream<Item = watcher::Result<watcher::Event<Pod>>> + Send + 'static {
    use kube::runtime::WatchStreamExt;
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    objects::watch(Api::all(client), config).backoff(backoff())
}

/// Between failed watches.
fn backoff() -> impl kube::runtime::utils::Backoff {
    kube::runtime::watcher::DefaultBackoff::default()
}

/// Feeds the drivers until `shutdown`. Pods go on running then: they are the hosts'.
pub(crate) struct Supervisor {
    tools: Arc<Tools>,
    objects: HashMap<PodUid, Arc<Pod>>,
    names: HashMap<(String, String), PodUid>,
    drivers: HashMap<PodUid, watch::Sender<Inputs>>,
    tasks: JoinSet<PodUid>,
    heard: watch::Sender<Heard>,
    /// UIDs of a listing in progress.
    listing: Option<BTreeSet<PodUid>>,
    /// The first listing is complete.
    listed: bool,
}

impl Supervisor {
    pub(crate) fn new(tools: Arc<Tools>) -> Self {
        let now = Instant::now();
        let heard = Heard {
            syncs: BTreeMap::new(),
            turns: 0,
            silent: tools
                .pool
                .hosts()
                .iter()
                .map(|h| (h.name().clone(), now))
                .collect(),
        };
        Self {
            tools,
            objects: HashMap::new(),
            names: HashMap::new(),
            drivers: HashMap::new(),
            tasks: JoinSet::new(),
            heard: watch::Sender::new(heard),
            listing: None,
            listed: false,
        }
    }

    pub(crate) async fn run(
        mut self,
        pods: impl Stream<Item = watcher::Result<watcher::Event<Pod>>>,
        mut reports: mpsc::Receiver<PoolEvent>,
        mut queries: mpsc::Receiver<Query>,
        shutdown: CancellationToken,
    ) {
        let mut pods = std::pin::pin!(pods);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                event = pods.next() => match event {
                    Some(Ok(event)) => self.watched(event).await,
                    Some(Err(error)) => {
                        warn!(error = &error as &dyn std::error::Error, "the watch of pods failed");
                    }
                    None => break,
                },
                event = reports.recv() => match event {
                    Some(event) => self.reported(event),
                    None => break,
                },
                Some(query) = queries.recv() => self.answer(query),
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(uid) => self.ended(&uid),
                    Err(error) => warn!(error = &error as &dyn std::error::Error, "a pod's driver broke"),
                },
            }
        }
        self.tasks.shutdown().await;
    }

    async fn watched(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.listing = Some(BTreeSet::new()),
            watcher::Event::InitApply(pod) => {
                if let Some(uid) = uid(&pod) {
                    if let Some(listing) = &mut self.listing {
                        listing.insert(uid.clone());
                    }
                    self.applied(uid, pod);
                }
            }
            watcher::Event::InitDone => {
                let listing = self.listing.take().unwrap_or_default();
                let gone: Vec<_> = self
                    .objects
                    .keys()
                    .filter(|uid| !listing.contains(*uid))
                    .cloned()
                    .collect();
                for uid in gone {
                    self.deleted(&uid);
                }
                // Known to a host, not to the API server: to be looked at.
                for driver in self.drivers.values() {
                    driver.send_if_modified(|inputs| {
                        let unknown = inputs.object.is_none() && !inputs.absent;
                        inputs.absent |= unknown;
                        unknown
                    });
                }
                if !std::mem::replace(&mut self.listed, true) {
                    self.tools.placer.expect(listing).await;
                }
            }
            watcher::Event::Apply(pod) => {
                if let Some(uid) = uid(&pod) {
                    self.applied(uid, pod);
                }
            }
            watcher::Event::Delete(pod) => {
                if let Some(uid) = uid(&pod) {
                    self.deleted(&uid);
                }
            }
        }
    }

    fn applied(&mut self, uid: PodUid, pod: Pod) {
        let pod = Arc::new(pod);
        self.objects.insert(uid.clone(), pod.clone());
        self.names.insert(key(&pod), uid.clone());
        self.change(&uid, |inputs| {
            inputs.object = Some(pod);
            inputs.absent = false;
        });
    }

    fn deleted(&mut self, uid: &PodUid) {
        if let Some(pod) = self.objects.remove(uid)
            && self.names.get(&key(&pod)) == Some(uid)
        {
            self.names.remove(&key(&pod));
        }
        if self.drivers.contains_key(uid) {
            self.change(uid, |inputs| inputs.absent = true);
        }
    }

    fn reported(&mut self, event: PoolEvent) {
        let host = event.host;
        match event.news {
            News::Sandbox(status) => {
                let uid = status.key.pod.clone();
                // Each gets a driver that sees to its removal. Hosts tell of few such.
                let known = self.drivers.contains_key(&uid) || self.objects.contains_key(&uid);
                if !known && self.drivers.len() >= self.objects.len() + STRANGERS {
                    warn!(%host, key = %status.key, "too many sandboxes of pods that are not here: left out");
                    return;
                }
                let place = Place {
                    host,
                    attempt: status.key.attempt,
                };
                let status = Arc::new(*status);
                self.change(&uid, |inputs| {
                    inputs.reports.insert(place, status);
                });
            }
            News::Missing(key) => {
                if self.drivers.contains_key(&key.pod) {
                    let place = Place {
                        host,
                        attempt: key.attempt,
                    };
                    self.change(&key.pod, |inputs| {
                        inputs.reports.remove(&place);
                    });
                }
            }
            News::PodEvent(event) => self.happened(&host, *event),
            News::Synced => {
                self.heard.send_modify(|heard| {
                    heard.silent.remove(&host);
                    heard.turns += 1;
                    let turn = heard.turns;
                    heard.syncs.insert(host, turn);
                });
            }
            News::Gone => {
                self.heard.send_modify(|heard| {
                    heard.silent.remove(&host);
                    heard.syncs.remove(&host);
                });
            }
            News::Lost => {
                self.heard.send_if_modified(|heard| {
                    let new = !heard.silent.contains_key(&host);
                    if new {
                        heard.silent.insert(host, Instant::now());
                    }
                    new
                });
            }
        }
    }

    fn happened(&self, host: &HostName, event: PodEvent) {
        // Of a pod that is gone: nobody would see it.
        let Some(pod) = self.objects.get(&event.key.pod) else {
            return;
        };
        let place = Place {
            host: host.clone(),
            attempt: event.key.attempt,
        };
        if Record::of(pod).is_some_and(|record| !record.names(&place)) {
            debug!(%host, key = %event.key, "an event of a host that the pod is not on was dropped");
            return;
        }
        let object = match &event.container {
            Some(container) => Object::container(pod, container.name.as_str(), container.init),
            None => Object::pod(pod),
        };
        self.tools.recorder.record(Happening {
            object,
            severity: event.severity,
            reason: event.reason,
            message: event.message,
            at: event.at,
        });
    }

    /// Hands the change to the pod's driver, which is started if there is none.
    fn change(&mut self, uid: &PodUid, change: impl FnOnce(&mut Inputs)) {
        match self.drivers.get(uid) {
            Some(driver) if !driver.is_closed() => driver.send_modify(change),
            _ => {
                let mut inputs = Inputs {
                    object: self.objects.get(uid).cloned(),
                    ..Inputs::default()
                };
                inputs.absent = inputs.object.is_none() && self.listed;
                change(&mut inputs);
                let (sender, receiver) = watch::channel(inputs);
                let driver = Driver::new(self.tools.clone(), uid.clone(), receiver, self.heard.subscribe());
                let uid = uid.clone();
                self.drivers.insert(uid.clone(), sender);
                self.tasks.spawn(async move {
                    driver.run().await;
                    uid
                });
            }
        }
    }

    fn ended(&mut self, uid: &PodUid) {
        // Unless another one has been started meanwhile.
        if self.drivers.get(uid).is_some_and(watch::Sender::is_closed) {
            self.drivers.remove(uid);
            debug!(pod.uid = %uid, "nothing is left of a pod");
        }
    }

    fn answer(&self, query: Query) {
        match query {
            Query::Find {
                namespace,
                name,
                answer,
            } => {
                let found = self.names.get(&(namespace, name)).and_then(|uid| self.found(uid));
                drop(answer.send(found));
            }
            Query::All { answer } => {
                let found = self.objects.keys().filter_map(|uid| self.found(uid)).collect();
                drop(answer.send(found));
            }
        }
    }

    fn found(&self, uid: &PodUid) -> Option<Found> {
        let pod = self.objects.get(uid)?.clone();
        // Another host may report it too, rightly or not.
        let sandbox = Record::of(&pod).and_then(|record| {
            let status = self
                .drivers
                .get(uid)?
                .borrow()
                .reports
                .get(&record.place)?
                .clone();
            Some((record.place, status))
        });
        Some(Found { pod, sandbox })
    }
}

/// None, with a warning, for an id that no API server makes.
fn uid(pod: &Pod) -> Option<PodUid> {
    match PodUid::parse("metadata.uid", pod.metadata.uid.clone().unwrap_or_default()) {
        Ok(uid) => Some(uid),
        Err(error) => {
            warn!(pod.name = pod.name_any(), error = %error, "a pod is ignored");
            None
        }
    }
}

fn key(pod: &Pod) -> (String, String) {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

#[cfg(test)]
mod tests;
