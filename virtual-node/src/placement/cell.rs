//! The placer by claims in the pool's own cluster, its cell: the task around the
//! pure [`claims`](super::claims).
//!
//! One watch of the tenant's claims and one of its quotas, whatever the number of
//! pods. A start costs one call here, its end one more. While the cell is away
//! nothing of what runs is touched: new claims wait, and what was seen stays.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use objects::Lenient;
use pool_agent_api::{HostName, Invalid, PodUid, Resources, SandboxKey, TenantId};
use pool_cell::{Claim, ClaimParts, LONGEST_GRACE, OwnerUid, names};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use super::{
    Ask, Claimed, Request, Seat, Waiting,
    board::Board,
    claims::{Claims, Effect},
    image, quota,
};
use crate::{
    api_server::answered,
    config,
    pool::{HostTable, Named},
};

/// Creations and reads in flight; more of a burst wait their turn. As many as an API
/// server's fairness gives one user without queueing.
const CALLS: usize = 32;
/// Deletions in flight, which do not wait for those: fewer, since what ends has more
/// time than what begins. A namespace that is emptied has hundreds at once.
const DELETES: usize = 16;
/// How often what has to be tried again is looked for.
const TICK: Duration = Duration::from_secs(1);
/// Between attempts to create a claim: doubles.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Claims that are tried again, oldest first, when quota has become free: each that
/// succeeds changes the quota again.
const PER_QUOTA_CHANGE: usize = 16;
/// How often claims that nobody has asked for are looked into.
const SWEEP: Duration = Duration::from_secs(30);
/// From the notice of a claim's end to its sandbox's stop, on top of the pod's own
/// grace: for the next attempt to become ready, or for disruption budgets to allow a
/// stop. Half of the two minutes that a spot machine is told before it goes.
const HANDOVER: Duration = Duration::from_secs(60);

/// Where the claims are made, and what is shared with the rest of the process.
pub(crate) struct Cell {
    pub(crate) client: Client,
    /// Of the tenant's own cluster, to look for pods.
    pub(crate) tenants_client: Client,
    pub(crate) settings: config::Claims,
    pub(crate) tenant: TenantId,
    pub(crate) node_name: String,
    /// The hosts that claims name, for the pool to reach.
    pub(crate) named: watch::Sender<Named>,
    /// What the tenant may use; None until the cell has said.
    pub(crate) quota: watch::Sender<Option<Resources>>,
}

/// How a call ended.
enum Done {
    Created(Claim, Result<Pod, kube::Error>),
    Looked(SandboxKey, Result<Option<Pod>, kube::Error>),
    LookedForPod(PodUid, Result<Option<Pod>, kube::Error>),
    Witnessed(SandboxKey, Result<Option<Pod>, kube::Error>),
}

struct Asking {
    answer: oneshot::Sender<Claimed>,
    waiting: watch::Sender<Option<Waiting>>,
}

struct Retry {
    at: Instant,
    pause: Duration,
    /// It waits for quota.
    quota: bool,
    /// Order of arrival.
    turn: u64,
}

pub(super) struct Task {
    cell: Cell,
    api: Api<Pod>,
    board: Board,
    claims: Claims,
    asking: BTreeMap<PodUid, Asking>,
    /// Who is told that what was given up is over.
    giving_up: BTreeMap<SandboxKey, oneshot::Sender<()>>,
    retries: BTreeMap<PodUid, Retry>,
    turns: u64,
    queue: VecDeque<Effect>,
    calls: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Each goes on until it is answered.
    deletions: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Requests of theirs that may be under way.
    deletes: Arc<Semaphore>,
    swept: Instant,
    away: bool,
}

impl Task {
    pub(super) fn new(cell: Cell, board: Board) -> Self {
        let namespace = cell.settings.namespace.as_str();
        Self {
            api: Api::namespaced(cell.client.clone(), namespace),
            claims: Claims::new(cell.node_name.clone()),
            cell,
            board,
            asking: BTreeMap::new(),
            giving_up: BTreeMap::new(),
            retries: BTreeMap::new(),
            turns: 0,
            queue: VecDeque::new(),
            calls: FuturesUnordered::new(),
            deletions: FuturesUnordered::new(),
            deletes: Arc::new(Semaphore::new(DELETES)),
            swept: Instant::now(),
            away: false,
        }
    }

    pub(super) async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut hosts: watch::Receiver<HostTable>,
    ) {
        let namespace = self.cell.settings.namespace.as_str();
        let claims = Api::namespaced(self.cell.client.clone(), namespace);
        let mut claims = objects::watch::<Pod>(claims, watcher::Config::default())
            .default_backoff()
            .boxed();
        let quotas = Api::namespaced(self.cell.client.clone(), namespace);
        let mut quotas = objects::watch::<ResourceQuota>(quotas, watcher::Config::default())
            .default_backoff()
            .boxed();
        let mut known = quota::Quotas::default();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.begin_calls();
            if self.claims.names_a_new_host() {
                self.name_hosts();
            }
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.take(request),
                    None => return,
                },
                Some(event) = claims.next() => self.watched(event),
                Some(event) = quotas.next() => match event {
                    Ok(event) => {
                        if known.take(event) {
                            self.quota_changed(&known);
                        }
                    }
                    Err(error) => debug!(error = &error as &dyn std::error::Error, "the watch of quotas failed"),
                },
                Some(done) = self.calls.next(), if !self.calls.is_empty() => self.called(done),
                Some(()) = self.deletions.next(), if !self.deletions.is_empty() => {}
                changed = hosts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let reachable = hosts
                        .borrow_and_update()
                        .iter()
                        .filter(|(_, view)| view.reachable)
                        .map(|(name, _)| name.clone())
                        .collect::<BTreeSet<HostName>>();
                    let effects = self.claims.set_reachable(reachable);
                    self.perform(effects);
                }
                _ = tick.tick() => self.look_around(),
            }
        }
    }

    // ---- what comes in

    fn take(&mut self, request: Request) {
        match request {
            Request::Expect { pods } => self.board.expect(pods),
            Request::Claim {
                pod,
                seat,
                attempt,
                ask,
                answer,
                waiting,
                // The cell's own quota admits, and a claim beyond it waits.
                arrival: _,
            } => {
                if seat == Seat::Pod {
                    self.board.publish(&pod, None);
                }
                self.retries.remove(&pod);
                let key = SandboxKey {
                    pod: pod.clone(),
                    attempt,
                };
                match self.claim(key, *ask) {
                    Ok(claim) => {
                        self.asking.insert(pod.clone(), Asking { answer, waiting });
                        let effects = self.claims.want(seat, claim);
                        self.perform(effects);
                    }
                    // The driver may have ended meanwhile.
                    Err(invalid) => drop(answer.send(Claimed::Unfit(invalid))),
                }
                self.board.tells(pod);
            }
            Request::Hold {
                pod,
                seat,
                placement,
                published,
                ..
            } => {
                self.stop_asking(&pod);
                let effects = self
                    .claims
                    .keep(seat, &pod, placement.attempt, placement.host.clone());
                match seat {
                    Seat::Pod => self.board.publish(&pod, Some(placement)),
                    Seat::Beside => self.board.publish_beside(&pod, Some(placement)),
                }
                let _gone = published.send(()).is_err();
                self.perform(effects);
                self.board.tells(pod);
            }
            Request::Exchange {
                pod,
                placement,
                beside,
                published,
                ..
            } => {
                let effects = self.claims.exchange(
                    &pod,
                    (placement.attempt, placement.host.clone()),
                    (beside.attempt, beside.host.clone()),
                );
                self.board.publish_both(&pod, Some(placement), Some(beside));
                let _gone = published.send(()).is_err();
                self.perform(effects);
            }
            // The cell counts claims, and knows from their hosts which are over.
            Request::Finished { .. } => {}
            Request::Leave { pod, host, attempt } => {
                self.stop_asking(&pod);
                self.board.publish(&pod, None);
                let effects = self.claims.keep(Seat::Pod, &pod, attempt, host);
                self.perform(effects);
                self.board.tells(pod);
            }
            Request::GiveUp { key, proof, over } => {
                // The latest asker is the driver that there is.
                self.giving_up.insert(key.clone(), over);
                let effects = self.claims.give_up(&key, proof);
                self.perform(effects);
            }
            // The next attempt is another claim; nobody passes a host over but the
            // scheduler.
            Request::Release {
                pod,
                seat: Seat::Beside,
            } => {
                self.stop_asking(&pod);
                self.board.publish_beside(&pod, None);
                let effects = self.claims.release(Seat::Beside, &pod);
                self.perform(effects);
            }
            Request::Refused { pod, .. } | Request::Release { pod, .. } => {
                self.stop_asking(&pod);
                self.board.publish(&pod, None);
                let effects = self.claims.release(Seat::Pod, &pod);
                self.perform(effects);
                self.board.tells(pod);
            }
        }
    }

    fn stop_asking(&mut self, pod: &PodUid) {
        self.asking.remove(pod);
        self.retries.remove(pod);
        self.giving_up.retain(|_, over| !over.is_closed());
    }

    fn claim(&self, key: SandboxKey, ask: Ask) -> Result<Claim, Invalid> {
        let settings = &self.cell.settings;
        Claim::new(ClaimParts {
            tenant: self.cell.tenant.clone(),
            key,
            namespace: ask.namespace,
            name: ask.name,
            node_name: self.cell.node_name.clone(),
            // The overhead of a runtime that has a class is the cell's to add.
            requests: match &ask.runtime {
                Some(_) => ask.requests,
                None => ask.claim,
            },
            images: images(&ask.images),
            runtime_class: ask.runtime,
            priority_class: settings.priority_class.clone(),
            owner: ask
                .owner
                .map(|owner| OwnerUid::parse("metadata.ownerReferences.uid", owner))
                .transpose()?,
            zone: settings.zone.clone(),
            class: settings.class.clone(),
            arch: settings.arch.clone(),
            grace: ask.grace.saturating_add(HANDOVER).min(LONGEST_GRACE),
        })
    }

    fn watched(&mut self, event: watcher::Result<watcher::Event<Pod>>) {
        let effects = match event {
            Ok(event) => {
                if std::mem::take(&mut self.away) {
                    info!("the cell is in reach again");
                }
                match event {
                    watcher::Event::Init => {
                        self.claims.begin_listing();
                        vec![]
                    }
                    watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => self.claims.seen(&pod),
                    watcher::Event::InitDone => self.claims.end_listing(),
                    watcher::Event::Delete(pod) => self.claims.deleted(&pod),
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.away, true) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the watch of the cell's claims failed; what runs goes on"
                    );
                }
                vec![]
            }
        };
        self.perform(effects);
    }

    fn quota_changed(&mut self, known: &quota::Quotas) {
        let offered = known.offered(self.cell.settings.priority_class.as_deref());
        self.cell.quota.send_if_modified(|quota| {
            let before = quota.replace(offered);
            before != Some(offered)
        });
        let mut waiting: Vec<(u64, PodUid)> = self
            .retries
            .iter()
            .filter(|(_, retry)| retry.quota)
            .map(|(pod, retry)| (retry.turn, pod.clone()))
            .collect();
        waiting.sort();
        for (_, pod) in waiting.into_iter().take(PER_QUOTA_CHANGE) {
            self.try_again(&pod);
        }
    }

    /// What nobody tells: that time has passed.
    fn look_around(&mut self) {
        let now = Instant::now();
        let due: Vec<PodUid> = self
            .retries
            .iter()
            .filter(|(_, retry)| retry.at <= now)
            .map(|(pod, _)| pod.clone())
            .collect();
        for pod in due {
            self.try_again(&pod);
        }
        if self.board.is_complete() && self.swept.elapsed() >= SWEEP {
            self.swept = now;
            let effects = self.claims.orphans();
            self.perform(effects);
        }
        let effects = self.claims.unwitnessed();
        self.perform(effects);
        self.name_hosts();
    }

    fn try_again(&mut self, pod: &PodUid) {
        if !self.waits(pod) {
            self.retries.remove(pod);
            return;
        }
        if let Some(retry) = self.retries.get_mut(pod) {
            // Until the answer says otherwise.
            retry.at = Instant::now() + RETRY_MOST;
            let effects = self.claims.again(pod);
            self.perform(effects);
        }
    }

    fn name_hosts(&mut self) {
        let named = self.claims.hosts();
        self.cell.named.send_if_modified(|known| {
            let changed = *known != named;
            if changed {
                *known = named;
            }
            changed
        });
    }

    // ---- what goes out

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Room(pod, host) => {
                    debug!(pod.uid = %pod, host = %host, "a claim is bound");
                    self.answer(&pod, Claimed::Room(host));
                }
                Effect::Lost(pod) => self.answer(&pod, Claimed::Lost),
                Effect::Tell(pod, waiting) => {
                    if let Some(asking) = self.asking.get(&pod) {
                        asking.waiting.send_replace(Some(waiting));
                    }
                }
                Effect::Again(pod) => self.pause(&pod, false),
                Effect::Delete(key) => {
                    let (api, turns) = (self.api.clone(), self.deletes.clone());
                    self.deletions
                        .push(delete(api, key, DeleteParams::default(), turns).boxed());
                }
                Effect::Remove(key) => {
                    let (api, turns) = (self.api.clone(), self.deletes.clone());
                    let at_once = DeleteParams::default().grace_period(0);
                    self.deletions.push(delete(api, key, at_once, turns).boxed());
                }
                Effect::Over(key) => {
                    info!(
                        pod.uid = %key.pod, attempt = %key.attempt,
                        "a pod's attempt on a silent host has no right to run any more"
                    );
                    if let Some(over) = self.giving_up.remove(&key) {
                        // The driver may have heard of the host again.
                        let _gone = over.send(()).is_err();
                    }
                }
                Effect::Witness(_) if self.queue.contains(&effect) => {}
                Effect::Create(_) | Effect::Look(_) | Effect::LookForPod { .. } | Effect::Witness(_) => {
                    self.queue.push_back(effect);
                }
            }
        }
    }

    fn answer(&mut self, pod: &PodUid, claimed: Claimed) {
        self.retries.remove(pod);
        if let Some(asking) = self.asking.remove(pod) {
            // The driver changed its mind; it releases what it may hold.
            drop(asking.answer.send(claimed));
        }
    }

    fn begin_calls(&mut self) {
        while self.calls.len() < CALLS
            && let Some(effect) = self.queue.pop_front()
        {
            let api = self.api.clone();
            let namespace = self.cell.settings.namespace.as_str();
            let call = match effect {
                Effect::Create(claim) => async move {
                    let made = answered(api.create(&PostParams::default(), &claim.to_pod())).await;
                    Done::Created(claim, made)
                }
                .boxed(),
                Effect::Look(key) => {
                    let claims = Api::namespaced(self.cell.client.clone(), namespace);
                    async move {
                        let found = read(&claims, &names::claim_name(&key)).await;
                        Done::Looked(key, found)
                    }
                    .boxed()
                }
                Effect::Witness(key) => {
                    let claims = Api::namespaced(self.cell.client.clone(), namespace);
                    async move {
                        let found = read(&claims, &names::claim_name(&key)).await;
                        Done::Witnessed(key, found)
                    }
                    .boxed()
                }
                Effect::LookForPod { key, namespace, name } => {
                    let pods = Api::namespaced(self.cell.tenants_client.clone(), namespace.as_str());
                    async move {
                        let found = read(&pods, name.as_str()).await;
                        Done::LookedForPod(key.pod, found)
                    }
                    .boxed()
                }
                _ => continue,
            };
            self.calls.push(call);
        }
    }

    fn called(&mut self, done: Done) {
        let effects = match done {
            Done::Created(claim, Ok(pod)) => {
                let effects = self.claims.answered(&pod);
                let again = |effect: &Effect| matches!(effect, Effect::Again(_));
                if !effects.iter().any(again) {
                    self.retries.remove(&claim.key.pod);
                }
                effects
            }
            Done::Created(claim, Err(error)) => self.not_created(&claim, &error),
            Done::Looked(_, Ok(Some(pod))) => self.claims.answered(&pod),
            Done::Looked(key, Ok(None)) => self.claims.looked_in_vain(&key),
            Done::Looked(key, Err(error)) => {
                debug!(error = &error as &dyn std::error::Error, "a claim was not read");
                self.pause(&key.pod, false);
                vec![]
            }
            Done::Witnessed(_, Ok(Some(pod))) => self.claims.witnessed(&pod),
            Done::Witnessed(key, Ok(None)) => self.claims.looked_in_vain(&key),
            Done::Witnessed(_, Err(error)) => {
                debug!(error = &error as &dyn std::error::Error, "a claim is read again");
                vec![]
            }
            Done::LookedForPod(uid, Ok(found)) => {
                let there = found.is_some_and(|pod| pod.metadata.uid.as_deref() == Some(uid.as_str()));
                if there {
                    vec![]
                } else {
                    info!(pod.uid = %uid, "the pod of a claim is gone: the claim goes, too");
                    self.claims.orphaned(&uid)
                }
            }
            Done::LookedForPod(_, Err(error)) => {
                debug!(
                    error = &error as &dyn std::error::Error,
                    "the pod of a claim was not read"
                );
                vec![]
            }
        };
        self.perform(effects);
    }

    fn not_created(&mut self, claim: &Claim, error: &kube::Error) -> Vec<Effect> {
        let key = &claim.key;
        let why = match error {
            kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists" => {
                self.pause(&key.pod, false);
                return self.claims.exists(key);
            }
            kube::Error::Api(status) if status.code == 403 && status.message.contains("exceeded quota") => {
                self.pause(&key.pod, true);
                return self.claims.not_created(key, over_quota(&status.message));
            }
            kube::Error::Api(status)
                if (400..500).contains(&status.code) && ![409, 429].contains(&status.code) =>
            {
                warn!(pod.uid = %key.pod, error = %error, "the cell refuses a claim");
                Waiting::refused(format!("The pool does not take the pod: {}", status.message))
            }
            error => {
                debug!(pod.uid = %key.pod, error = error as &dyn std::error::Error, "a claim was not made");
                Waiting::for_host("The pool's control plane is out of reach")
            }
        };
        self.pause(&key.pod, false);
        self.claims.not_created(key, why)
    }

    /// The pod waits for something that has to be asked for again: an attempt that has
    /// no room yet, or whether the claim of one that runs is there.
    fn waits(&self, pod: &PodUid) -> bool {
        self.asking.contains_key(pod) || self.claims.misses(pod)
    }

    fn pause(&mut self, pod: &PodUid, quota: bool) {
        if !self.waits(pod) {
            return;
        }
        self.turns += 1;
        let turn = self.turns;
        let retry = self.retries.entry(pod.clone()).or_insert(Retry {
            at: Instant::now(),
            pause: RETRY_FIRST,
            quota,
            turn,
        });
        retry.quota = quota;
        retry.at = Instant::now() + retry.pause;
        retry.pause = (retry.pause * 2).min(RETRY_MOST);
    }
}

/// Distinct, as the runtime names them.
fn images(images: &[String]) -> Vec<String> {
    let mut distinct: Vec<String> = vec![];
    for image in images {
        let name = image::whole_name(image);
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}

/// Kubernetes' words without the claim's name, which says nothing to the tenant.
fn over_quota(message: &str) -> Waiting {
    let words = message
        .split_once("exceeded quota")
        .map_or(message, |(_, rest)| rest);
    Waiting::for_quota(format!(
        "The pod waits until the tenant's quota has room: exceeded quota{words}"
    ))
}

/// None if it is not there; one that does not read is there.
async fn read(api: &Api<Lenient<Pod>>, name: &str) -> kube::Result<Option<Pod>> {
    answered(api.get_opt(name)).await?.map(Lenient::whole).transpose()
}

/// Repeats until the claim is gone, or is going.
async fn delete(api: Api<Pod>, key: SandboxKey, how: DeleteParams, turns: Arc<Semaphore>) {
    let name = names::claim_name(&key);
    let mut pause = RETRY_FIRST;
    loop {
        let turn = turns.acquire().await;
        let deleted = answered(api.delete(&name, &how)).await;
        drop(turn);
        match deleted {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
            Err(error) => {
                debug!(
                    claim = name,
                    error = &error as &dyn std::error::Error,
                    "a claim is deleted again"
                );
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MOST);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::{Request as HttpRequest, Response};
    use http_body_util::Full;
    use kube::client::Body;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_namespace_that_is_emptied_asks_the_cell_a_few_at_a_time() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, highest) = (now.clone(), most.clone());
        let server = tower::service_fn(move |_: HttpRequest<Body>| {
            let (now, most) = (counted.clone(), highest.clone());
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                now.fetch_sub(1, Ordering::SeqCst);
                let pod = serde_json::to_vec(&Pod::default()).unwrap_or_default();
                Ok::<_, std::convert::Infallible>(Response::new(Full::new(bytes::Bytes::from(pod))))
            }
        });
        let api: Api<Pod> = Api::namespaced(Client::new(server, "default"), "tenant-demo");
        let turns = Arc::new(Semaphore::new(DELETES));
        let all = (1..=200).map(|attempt| {
            let key = SandboxKey {
                pod: PodUid::parse("pod", "u-1").unwrap(),
                attempt: pool_agent_api::Attempt::parse("attempt", attempt).unwrap(),
            };
            delete(api.clone(), key, DeleteParams::default(), turns.clone())
        });
        futures::future::join_all(all).await;
        assert_eq!(most.load(Ordering::SeqCst), DELETES);
    }
}
