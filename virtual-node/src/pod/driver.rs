//! One pod's task: the [`lifecycle`](super::lifecycle) and what it decides, done.
//!
//! ```text
//!  inputs, heard ──▶ events ──▶ Lifecycle::step ──▶ work (one call at a time)
//!                                     │                    │ its answer is an event
//!                                     ▼                    ▼
//!                               status::status ──▶ PATCH /status (one at a time, only what differs)
//! ```
//!
//! What always holds: at most one piece of work and one status write are in
//! flight; work whose stage has passed is dropped; a status write is refused by
//! the API server for a later pod of the same name.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use pool_agent_api::{
    Attempt, HostName, Namespace, PodName, PodUid, Refusal, RefusalReason, Resources, SandboxKey,
    SandboxSpec, SandboxStatus,
    spec::{MeshMode, Volume, VolumeSource},
    status::Severity,
    wire,
};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument, debug, info, info_span, warn};

use super::{
    HOST_GRACE, Heard, Inputs, Origin,
    lifecycle::{Effect, Event, Intent, Lifecycle, Place, Room, Stage},
    references::{Resolved, Token, TokenSlot},
    resolve::{Extent, ReadError, resolve},
    status::{self, Holdup, Observed, Phase, Verdict},
    translate::{self, NodeFacts, Translated, Untranslatable},
};
use crate::{
    event::{Happening, Object, Recorder},
    placement::{Ask, Placement, Placer, Shortage, Unplaced},
    pool::{CallError, Pool},
};

/// A change of status that nobody waits for is held back this long, so that a
/// pod that starts at once is written once.
const QUIET: Duration = Duration::from_millis(300);
/// How often volumes are looked up again, and other slow changes noticed.
const HOUSEKEEPING: Duration = Duration::from_secs(45);
/// What was looked up is looked up again if the start comes later than this.
const PREPARED_FOR: Duration = Duration::from_secs(120);

/// What all drivers share.
pub(crate) struct Tools {
    pub(crate) client: Client,
    pub(crate) pool: Pool,
    pub(crate) placer: Placer,
    pub(crate) recorder: Recorder,
    pub(crate) facts: watch::Receiver<NodeFacts>,
    pub(crate) metrics: super::metrics::Metrics,
}

/// How work ended.
enum Done {
    Prepared(Box<(Resolved, Translated)>),
    Unprepared(Unprepared),
    Claimed(Result<HostName, Shortage>),
    Started(Result<Result<(), Refusal>, CallError>),
    /// The stop was taken, or the host does not know the sandbox.
    Stopped {
        place: Place,
        known: bool,
    },
    Forgotten(Place),
    Removed,
    /// The process is stopping.
    Abandoned,
}

enum Unprepared {
    Read(ReadError),
    Translate(Untranslatable),
}

struct Prepared {
    resolved: Resolved,
    spec: SandboxSpec,
    at: Instant,
}

/// What the driver last told the placer.
#[derive(PartialEq, Eq)]
enum Told {
    Nothing,
    Wanted,
    Held(Placement),
}

/// A status write in flight or due.
struct Write {
    patch: Value,
    done: BoxFuture<'static, Result<Pod, kube::Error>>,
}

pub(crate) struct Driver {
    tools: Arc<Tools>,
    uid: PodUid,
    origin: Origin,
    born: Instant,
    inputs: watch::Receiver<Inputs>,
    heard: watch::Receiver<Heard>,

    /// The newest version that was seen or came back from a write.
    object: Option<Arc<Pod>>,
    reports: BTreeMap<Place, Arc<SandboxStatus>>,
    lifecycle: Lifecycle,
    verdict: Option<Verdict>,
    holdup: Option<Holdup>,

    work: Option<BoxFuture<'static, Done>>,
    evictions: FuturesUnordered<BoxFuture<'static, Place>>,
    evicting: BTreeSet<Place>,
    prepared: Option<Prepared>,
    retry: ExponentialBackoff,
    enrolled: Option<bool>,
    told: Told,
    /// The host that just refused it, until the placer knows.
    refused_by: Option<HostName>,
    /// How often the placement's host had reported everything when it took the pod.
    syncs_at_place: Option<(Place, u64)>,

    write: Option<Write>,
    /// When the status that differs is to be written.
    write_at: Option<Instant>,
    write_retry: ExponentialBackoff,
    /// After a failed write.
    write_not_before: Option<Instant>,
    /// The last patch that was taken, and the version it made: the same again
    /// would change nothing.
    written: Option<(Value, Option<String>)>,

    /// A live read of the object.
    look: Option<BoxFuture<'static, Result<Option<Pod>, kube::Error>>>,
    look_retry: ExponentialBackoff,
    absent: bool,

    tokens: BTreeMap<TokenSlot, Token>,
    refresh: Option<BoxFuture<'static, Result<Refreshed, RefreshError>>>,
    refresh_at: Instant,
    /// Of the files the host has, to tell whether it needs an update.
    volumes: Option<Digest>,
    /// Whether the status that says Ready has been seen.
    was_ready: bool,
}

struct Refreshed {
    tokens: BTreeMap<TokenSlot, Token>,
    volumes: Digest,
}

#[derive(Debug, thiserror::Error)]
enum RefreshError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the pod's volumes cannot be made any more")]
    Translate(#[from] Untranslatable),
    #[error(transparent)]
    Call(#[from] CallError),
}

/// SHA-256 of file volumes: their contents are not kept.
type Digest = [u8; 32];

fn digest(volumes: &[Volume]) -> Digest {
    use prost::Message;
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    for volume in volumes {
        hash.update(wire::Volume::from(volume.clone()).encode_length_delimited_to_vec());
    }
    hash.finalize().into()
}

fn of_files(volumes: Vec<Volume>) -> Vec<Volume> {
    volumes
        .into_iter()
        .filter(|v| matches!(v.source, VolumeSource::Files(_)))
        .collect()
}

fn retries() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(15))
        .with_jitter()
        .without_max_times()
        .build()
}

/// The next delay of a back-off that never ends.
fn pause(retries: &mut ExponentialBackoff) -> Duration {
    retries.next().unwrap_or(Duration::from_secs(15))
}

impl Driver {
    pub(crate) fn new(
        tools: Arc<Tools>,
        uid: PodUid,
        origin: Origin,
        inputs: watch::Receiver<Inputs>,
        heard: watch::Receiver<Heard>,
    ) -> Self {
        Self {
            tools,
            uid,
            origin,
            born: Instant::now(),
            inputs,
            heard,
            object: None,
            reports: BTreeMap::new(),
            lifecycle: Lifecycle::new(Intent::Run),
            verdict: None,
            holdup: None,
            work: None,
            evictions: FuturesUnordered::new(),
            evicting: BTreeSet::new(),
            prepared: None,
            retry: retries(),
            enrolled: None,
            told: Told::Nothing,
            refused_by: None,
            syncs_at_place: None,
            write: None,
            write_at: None,
            write_retry: retries(),
            write_not_before: None,
            written: None,
            look: None,
            look_retry: retries(),
            absent: false,
            tokens: BTreeMap::new(),
            refresh: None,
            refresh_at: Instant::now() + HOUSEKEEPING.mul_f64(rand::random_range(0.1..1.0)),
            volumes: None,
            was_ready: false,
        }
    }

    /// Returns when nothing of the pod is left anywhere.
    pub(crate) async fn run(mut self) {
        let span = info_span!(
            "pod",
            pod.uid = %self.uid,
            pod.namespace = tracing::field::Empty,
            pod.name = tracing::field::Empty,
        );
        self.drive().instrument(span).await;
    }

    async fn drive(&mut self) {
        self.take_inputs();
        loop {
            self.settle_room().await;
            self.consider_status();
            if self.is_over() {
                return;
            }
            let write_due = self
                .write_at
                .filter(|_| self.write.is_none() && !self.is_removing());
            tokio::select! {
                changed = self.inputs.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.take_inputs();
                }
                changed = self.heard.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.take_inputs();
                }
                done = optional(&mut self.work) => {
                    self.work = None;
                    self.take_done(done);
                }
                Some(place) = self.evictions.next(), if !self.evictions.is_empty() => {
                    self.evicting.remove(&place);
                }
                written = optional_write(&mut self.write) => self.take_written(written),
                looked = optional(&mut self.look) => {
                    self.look = None;
                    self.take_looked(looked);
                }
                refreshed = optional(&mut self.refresh) => {
                    self.refresh = None;
                    self.take_refreshed(refreshed);
                }
                () = sleep_until(write_due) => self.begin_write(),
                () = tokio::time::sleep_until(self.refresh_at) => self.housekeep(),
            }
        }
    }

    fn is_over(&self) -> bool {
        *self.lifecycle.stage() == Stage::Over
            && self.absent
            && self.reports.is_empty()
            && self.evictions.is_empty()
    }

    fn is_removing(&self) -> bool {
        matches!(self.lifecycle.stage(), Stage::Removing { .. })
    }

    // ---- what comes in

    fn take_inputs(&mut self) {
        // In this order: reports are in `inputs` before `heard` counts them.
        let heard = self.heard.borrow_and_update().clone();
        let inputs = self.inputs.borrow_and_update().clone();
        if let Some(object) = inputs.object {
            self.take_object(object);
        }
        if inputs.absent && !self.absent {
            self.absent = true;
            self.look_again();
        }
        self.absent = inputs.absent;
        self.take_reports(inputs.reports);
        // Before it is known what is wanted, nothing may be begun.
        let known = self.object.is_some() || self.lifecycle.intent() == Intent::Reap;
        if known && (heard.all || self.origin == Origin::New) && !self.lifecycle.is_settled() {
            self.step(Event::Settled);
        }
        self.take_syncs(&heard);
    }

    fn take_object(&mut self, object: Arc<Pod>) {
        let Some(known) = &self.object else {
            let span = tracing::Span::current();
            span.record("pod.namespace", object.namespace().unwrap_or_default());
            span.record("pod.name", object.name_any());
            self.object = Some(object);
            self.intend();
            return;
        };
        if Arc::ptr_eq(known, &object) || !newer(&object, known) {
            return;
        }
        let relabelled = known.metadata.labels != object.metadata.labels
            || known.metadata.annotations != object.metadata.annotations;
        if relabelled {
            // A volume of the downward API may show them.
            self.refresh_at = Instant::now();
        }
        self.object = Some(object);
        self.intend();
    }

    /// What the object wants now.
    fn intend(&mut self) {
        let Some(object) = &self.object else { return };
        let phase = Phase::parse(object.status.as_ref().and_then(|s| s.phase.as_deref()));
        let intent = if object.metadata.deletion_timestamp.is_some() {
            let grace = object.metadata.deletion_grace_period_seconds.unwrap_or(0);
            Intent::Delete {
                grace: Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
            }
        } else if phase.is_final() || self.verdict.is_some() {
            Intent::Finish
        } else {
            Intent::Run
        };
        self.step(Event::Intended(intent));
    }

    fn take_reports(&mut self, reports: BTreeMap<Place, Arc<SandboxStatus>>) {
        let before = std::mem::replace(&mut self.reports, reports);
        let changed: Vec<(Place, Arc<SandboxStatus>)> = self
            .reports
            .iter()
            .filter(|(place, status)| before.get(place).is_none_or(|old| !Arc::ptr_eq(old, status)))
            .map(|(place, status)| (place.clone(), status.clone()))
            .collect();
        for (place, status) in changed {
            self.judge(&place, &status);
            self.step(Event::Seen {
                place,
                state: status.state,
            });
        }
        let gone: Vec<Place> = before
            .into_keys()
            .filter(|place| !self.reports.contains_key(place))
            .collect();
        for place in gone {
            self.missing(place);
        }
    }

    /// A report that ends the pod is understood as such before the lifecycle
    /// could take a stopped sandbox for a lost one.
    fn judge(&mut self, place: &Place, status: &SandboxStatus) {
        let stray = self
            .lifecycle
            .place()
            .is_some_and(|current| current.attempt > place.attempt);
        if stray || self.lifecycle.intent() != Intent::Run {
            return;
        }
        let Some(pod) = self.object.clone() else { return };
        let computed = status::status(&Observed {
            sandbox: Some(status),
            ..self.observed(&pod)
        });
        if Phase::parse(computed.phase.as_deref()).is_final() {
            self.step(Event::Intended(Intent::Finish));
        }
    }

    /// The host says that it has no such sandbox.
    fn missing(&mut self, place: Place) {
        let ours = self.lifecycle.place() == Some(&place);
        if ours && self.lifecycle.intent() == Intent::Run && self.may_not_run_again() {
            self.conclude(Verdict {
                reason: "SandboxLost".into(),
                message: format!("Host {} no longer knows the pod", place.host),
            });
        }
        self.step(Event::Missing(place));
    }

    /// Its containers ran, and its policy lets them run only once.
    fn may_not_run_again(&self) -> bool {
        let Some(pod) = &self.object else { return false };
        let never = pod
            .spec
            .as_ref()
            .is_some_and(|s| s.restart_policy.as_deref() == Some("Never"));
        let ran = pod
            .status
            .iter()
            .flat_map(|s| s.container_statuses.iter().flatten())
            .any(|c| c.container_id.is_some());
        never && ran
    }

    /// A placement of which its host reports nothing, although it has reported
    /// everything since: the host lost it.
    fn take_syncs(&mut self, heard: &Heard) {
        let (Stage::Placed { place } | Stage::Stopping { place, .. }) = self.lifecycle.stage() else {
            self.syncs_at_place = None;
            return;
        };
        let place = place.clone();
        let count = heard.syncs.get(&place.host).copied().unwrap_or(0);
        match &self.syncs_at_place {
            Some((at, then)) if *at == place => {
                if count > *then && !self.reports.contains_key(&place) {
                    self.missing(place);
                }
            }
            _ => self.syncs_at_place = Some((place, count)),
        }
    }

    fn take_done(&mut self, done: Done) {
        match done {
            Done::Prepared(prepared) => {
                let (resolved, translated) = *prepared;
                self.retry = retries();
                self.holdup = None;
                for message in translated.skipped_variables {
                    self.record(Severity::Warning, "InvalidEnvironmentVariableNames", &message);
                }
                self.tokens = resolved.tokens.clone();
                self.enrolled = Some(translated.spec.mesh == MeshMode::Enrolled);
                self.prepared = Some(Prepared {
                    resolved,
                    spec: translated.spec,
                    at: Instant::now(),
                });
                self.step(Event::Prepared);
            }
            Done::Unprepared(why) => self.unprepared(why),
            Done::Claimed(Ok(host)) => {
                let stale = self
                    .prepared
                    .as_ref()
                    .is_none_or(|p| p.at.elapsed() > PREPARED_FOR);
                self.step(if stale { Event::Stale } else { Event::Claimed(host) });
            }
            Done::Claimed(Err(shortage)) => {
                self.told = Told::Nothing;
                self.conclude(out_of(&shortage));
            }
            Done::Started(outcome) => self.started(outcome),
            Done::Stopped { known: true, .. } => {}
            Done::Stopped { place, known: false } => self.step(Event::StopUnknown(place)),
            Done::Forgotten(place) => self.step(Event::Forgotten(place)),
            Done::Removed => {
                info!("pod removed");
                self.step(Event::Removed);
            }
            Done::Abandoned => {}
        }
    }

    fn unprepared(&mut self, why: Unprepared) {
        let delay = pause(&mut self.retry);
        match why {
            Unprepared::Read(error) => {
                // The first ones are the authorizer catching up with the binding.
                if delay > Duration::from_secs(2) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "a pod waits for what it refers to"
                    );
                    self.record(Severity::Warning, "FailedMount", &chain(&error));
                } else {
                    debug!(error = &error as &dyn std::error::Error, "a read is tried again");
                }
            }
            Unprepared::Translate(Untranslatable::Unsupported(invalid)) => {
                return self.conclude(Verdict {
                    reason: "PodFeatureUnsupported".into(),
                    message: format!("Pod was rejected: {invalid}"),
                });
            }
            Unprepared::Translate(why) => {
                let message = why.to_string();
                let holdup = match why {
                    Untranslatable::MissingForContainer { container, message } => {
                        self.record_container(
                            &container,
                            Severity::Warning,
                            "Failed",
                            &format!("Error: {message}"),
                        );
                        Holdup {
                            container: Some(container),
                            reason: "CreateContainerConfigError".into(),
                            message,
                        }
                    }
                    Untranslatable::MissingForVolume { .. } => {
                        self.record(Severity::Warning, "FailedMount", &message);
                        Holdup {
                            container: None,
                            reason: "ContainerCreating".into(),
                            message: String::new(),
                        }
                    }
                    Untranslatable::MissingRuntimeClass { .. } | Untranslatable::Unsupported(_) => {
                        self.record(Severity::Warning, "FailedCreatePodSandBox", &message);
                        Holdup {
                            container: None,
                            reason: "ContainerCreating".into(),
                            message: String::new(),
                        }
                    }
                };
                self.holdup = Some(holdup);
            }
        }
        self.prepare(delay);
    }

    fn started(&mut self, outcome: Result<Result<(), Refusal>, CallError>) {
        match outcome {
            Ok(Ok(())) => {
                self.retry = retries();
                self.volumes = self
                    .prepared
                    .take()
                    .map(|p| digest(&of_files(p.spec.volumes.clone())));
                self.step(Event::Accepted);
            }
            Ok(Err(refusal)) => {
                info!(reason = ?refusal.reason, detail = refusal.message, "the host refused the pod");
                if refusal.reason.another_host_may_accept()
                    && let Some(place) = self.lifecycle.place().cloned()
                {
                    self.refused_by = Some(place.host);
                }
                if refusal.reason == RefusalReason::SpecConflict {
                    self.prepared = None;
                }
                self.step(Event::Refused(refusal.reason));
            }
            // The spec itself was refused: no host will take it.
            Err(CallError::Invalid { message, .. }) => {
                self.conclude(Verdict {
                    reason: "UnexpectedAdmissionError".into(),
                    message: format!("Pod was rejected: {message}"),
                });
                self.step(Event::Refused(RefusalReason::Unsupported));
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "a start was not answered"
                );
                self.step(Event::Unanswered);
            }
        }
    }

    // ---- what goes out

    fn step(&mut self, event: Event) {
        let before = self.lifecycle.clone();
        let (after, effects) = before.clone().step(event);
        self.lifecycle = after;
        if before.stage() != self.lifecycle.stage() {
            debug!(from = ?before.stage(), to = ?self.lifecycle.stage(), "the pod moved on");
            // Its answer would be about a stage that has passed.
            self.work = None;
        }
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare => {
                self.retry = retries();
                self.prepare(Duration::ZERO);
            }
            Effect::Start { place, again } => self.start(place, again),
            Effect::Stop { place, grace } => {
                info!(host = %place.host, attempt = %place.attempt, grace_seconds = grace.as_secs(), "stopping the pod");
                self.work = Some(stop(self.tools.pool.clone(), self.uid.clone(), place, grace).boxed());
            }
            Effect::Forget(place) => {
                let (pool, uid) = (self.tools.pool.clone(), self.uid.clone());
                self.work = Some(
                    async move {
                        forget(pool, uid, &place).await;
                        Done::Forgotten(place)
                    }
                    .boxed(),
                );
            }
            Effect::Evict(place) => {
                if self.evicting.insert(place.clone()) {
                    warn!(host = %place.host, attempt = %place.attempt, "evicting a stray placement");
                    let (pool, uid) = (self.tools.pool.clone(), self.uid.clone());
                    self.evictions.push(
                        async move {
                            forget(pool, uid, &place).await;
                            place
                        }
                        .boxed(),
                    );
                }
            }
            Effect::Remove => self.remove(),
        }
    }

    fn prepare(&mut self, delay: Duration) {
        let (Some(pod), Stage::Preparing { next }) = (self.object.clone(), self.lifecycle.stage()) else {
            return;
        };
        let key = SandboxKey {
            pod: self.uid.clone(),
            attempt: *next,
        };
        let (tools, held) = (self.tools.clone(), self.tokens.clone());
        self.work = Some(
            async move {
                tokio::time::sleep(delay).await;
                let resolved =
                    match resolve(&tools.client, &pod, &held, Extent::Start, Timestamp::now()).await {
                        Ok(resolved) => resolved,
                        Err(error) => return Done::Unprepared(Unprepared::Read(error)),
                    };
                let facts = tools.facts.borrow().clone();
                match translate::translate(&pod, key, &resolved, &facts) {
                    Ok(translated) => Done::Prepared(Box::new((resolved, translated))),
                    Err(why) => Done::Unprepared(Unprepared::Translate(why)),
                }
            }
            .boxed(),
        );
    }

    fn start(&mut self, place: Place, again: bool) {
        let key = SandboxKey {
            pod: self.uid.clone(),
            attempt: place.attempt,
        };
        let (Some(pod), Some(prepared)) = (&self.object, &mut self.prepared) else {
            // Cannot be: it was prepared on the way here. Begin again.
            self.step(Event::Refused(RefusalReason::Unknown));
            return;
        };
        if prepared.spec.key != key {
            let facts = self.tools.facts.borrow().clone();
            match translate::translate(pod, key, &prepared.resolved, &facts) {
                Ok(translated) => prepared.spec = translated.spec,
                Err(why) => {
                    warn!(
                        error = &why as &dyn std::error::Error,
                        "a pod can no longer be translated"
                    );
                    self.step(Event::Refused(RefusalReason::Unknown));
                    return;
                }
            }
        }
        info!(host = %place.host, attempt = %place.attempt, again, "starting the pod");
        let delay = if again {
            pause(&mut self.retry)
        } else {
            Duration::ZERO
        };
        let (spec, pool) = (prepared.spec.clone(), self.tools.pool.clone());
        self.work = Some(
            async move {
                tokio::time::sleep(delay).await;
                match pool.host(&place.host) {
                    Some(host) => Done::Started(host.start(spec).await),
                    None => Done::Started(Ok(Err(Refusal {
                        reason: RefusalReason::Draining,
                        message: "the host is not of the pool any more".into(),
                        free: Resources::default(),
                    }))),
                }
            }
            .boxed(),
        );
    }

    /// The final status, then the object itself.
    fn remove(&mut self) {
        let Some(pod) = self.object.clone() else {
            self.step(Event::Removed);
            return;
        };
        let last = status::status(&self.observed(&pod));
        let pending = self.write.take().map(|w| w.done);
        let (client, uid) = (self.tools.client.clone(), self.uid.clone());
        self.work = Some(
            async move {
                let mut known = pod;
                if let Some(pending) = pending
                    && let Ok(written) = pending.await
                    && newer(&written, &known)
                {
                    known = Arc::new(written);
                }
                remove(client, uid, &known, &last).await;
                Done::Removed
            }
            .boxed(),
        );
    }

    /// It is decided that the pod has failed.
    fn conclude(&mut self, verdict: Verdict) {
        warn!(
            reason = verdict.reason,
            detail = verdict.message,
            "the pod cannot run"
        );
        self.record(Severity::Warning, &verdict.reason, &verdict.message);
        self.verdict = Some(verdict);
        self.holdup = None;
        self.step(Event::Intended(Intent::Finish));
    }

    /// Tells the placer what the pod takes, if that has changed.
    async fn settle_room(&mut self) {
        let Some(pod) = self.object.clone() else { return };
        if let Some(host) = self.refused_by.take() {
            self.tools.placer.refused(self.uid.clone(), host).await;
            self.told = Told::Nothing;
        }
        let room = match self.lifecycle.room() {
            Room::Nothing => Told::Nothing,
            Room::Wanted => Told::Wanted,
            Room::Held(place) => {
                let place = place.clone();
                match self.unplaced(&pod, place.attempt, &place) {
                    Some(unplaced) => Told::Held(unplaced.on(place.host)),
                    None => return,
                }
            }
        };
        if room == self.told {
            return;
        }
        match &room {
            Told::Nothing => self.tools.placer.release(self.uid.clone()).await,
            Told::Held(placement) => {
                if let Some(ask) = self.ask(&pod) {
                    self.tools
                        .placer
                        .hold(self.uid.clone(), ask, placement.clone())
                        .await;
                }
            }
            Told::Wanted => self.claim(&pod),
        }
        self.told = room;
    }

    fn claim(&mut self, pod: &Arc<Pod>) {
        let Stage::Claiming { next } = *self.lifecycle.stage() else {
            return;
        };
        let place = None;
        let (Some(ask), Some(unplaced)) = (self.ask(pod), self.unplaced_at(pod, next, place)) else {
            return;
        };
        let (tools, uid, object) = (self.tools.clone(), self.uid.clone(), Object::pod(pod));
        self.work = Some(
            async move {
                let mut claim = std::pin::pin!(tools.placer.claim(uid, ask, unplaced));
                let claimed = tokio::select! {
                    claimed = &mut claim => claimed,
                    () = tokio::time::sleep(Duration::from_secs(2)) => {
                        tools.recorder.record(Happening {
                            object,
                            severity: Severity::Warning,
                            reason: "WaitingForRoom".into(),
                            message: "No host of the pool has room for the pod now; it starts when one has".into(),
                            at: Timestamp::now(),
                        });
                        claim.await
                    }
                };
                match claimed {
                    Ok(answer) => Done::Claimed(answer),
                    Err(stopped) => {
                        debug!(error = &stopped as &dyn std::error::Error, "a claim was abandoned");
                        Done::Abandoned
                    }
                }
            }
            .boxed(),
        );
    }

    /// None for a pod whose claim was refused: it holds nothing.
    fn ask(&mut self, pod: &Pod) -> Option<Ask> {
        let spec = pod.spec.as_ref()?;
        let owner = pod
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|o| o.controller == Some(true))
            .map(|o| o.uid.clone());
        translate::claim(spec).ok().map(|claim| Ask { claim, owner })
    }

    fn unplaced(&self, pod: &Pod, attempt: Attempt, place: &Place) -> Option<Unplaced> {
        self.unplaced_at(pod, attempt, Some(place))
    }

    fn unplaced_at(&self, pod: &Pod, attempt: Attempt, place: Option<&Place>) -> Option<Unplaced> {
        let reported = place
            .and_then(|p| self.reports.get(p))
            .map(|s| s.identity.is_some());
        Some(Unplaced {
            attempt,
            namespace: Namespace::parse("metadata.namespace", pod.namespace()?).ok()?,
            name: PodName::parse("metadata.name", pod.name_any()).ok()?,
            service_account: translate::service_account(pod).ok()?,
            enrolled: self.enrolled.or(reported).unwrap_or(false),
        })
    }

    // ---- status

    fn observed<'a>(&'a self, pod: &'a Pod) -> Observed<'a> {
        let place = self.lifecycle.place();
        let sandbox = place.and_then(|place| self.reports.get(place)).map(Arc::as_ref);
        let lost = place.is_some_and(|place| {
            let heard = self.heard.borrow();
            heard
                .silent
                .get(&place.host)
                .is_some_and(|since| since.elapsed() > HOST_GRACE)
        });
        let finished = matches!(
            self.lifecycle.stage(),
            Stage::Vacant { .. } | Stage::Stopped { .. }
        ) && self.lifecycle.intent() == Intent::Finish;
        Observed {
            pod,
            sandbox,
            verdict: self.verdict.as_ref(),
            holdup: self.holdup.as_ref(),
            host_lost: lost,
            ended: finished || self.is_removing(),
            now: Timestamp::now(),
        }
    }

    /// Decides whether and when the status is to be written.
    fn consider_status(&mut self) {
        let done_with = matches!(self.lifecycle.intent(), Intent::Reap) || self.is_removing();
        let Some(pod) = self.object.clone().filter(|_| !done_with) else {
            self.write_at = None;
            return;
        };
        let wanted = status::status(&self.observed(&pod));
        let current = pod.status.clone().unwrap_or_default();
        match self.difference(&pod, &wanted) {
            None => self.write_at = None,
            Some(_) => {
                let urgent = wanted.phase != current.phase
                    || ready(&wanted) != ready(&current)
                    || self.holdup.is_some()
                    || self.verdict.is_some();
                let due = Instant::now() + if urgent { Duration::ZERO } else { QUIET };
                self.write_at = Some(self.write_at.map_or(due, |at| at.min(due)));
            }
        }
        // A write that failed has its own time.
        if let (Some(at), Some(not_before)) = (self.write_at, self.write_not_before) {
            self.write_at = Some(at.max(not_before));
        }
    }

    fn difference(&self, pod: &Pod, wanted: &PodStatus) -> Option<Value> {
        let current = pod.status.clone().unwrap_or_default();
        let patch = status::patch(self.uid.as_str(), &current, wanted)?;
        match &self.written {
            // The API server keeps something else than it was told.
            Some((last, version)) if *last == patch && *version == pod.metadata.resource_version => None,
            _ => Some(patch),
        }
    }

    fn begin_write(&mut self) {
        self.write_at = None;
        self.write_not_before = None;
        let Some(pod) = self.object.clone() else { return };
        let wanted = status::status(&self.observed(&pod));
        let Some(patch) = self.difference(&pod, &wanted) else {
            return;
        };
        if ready(&wanted) && !self.was_ready {
            self.was_ready = true;
            if self.origin == Origin::New {
                self.tools.metrics.started(self.born.elapsed());
            }
        }
        let api = api(&self.tools.client, &pod);
        let (name, body) = (pod.name_any(), patch.clone());
        let done = async move {
            api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(body))
                .await
        };
        self.write = Some(Write {
            patch,
            done: done.boxed(),
        });
    }

    fn take_written(&mut self, written: Result<Pod, kube::Error>) {
        let patch = self.write.take().map(|w| w.patch);
        match written {
            Ok(mut pod) => {
                self.write_retry = retries();
                pod.metadata.managed_fields = None;
                self.written = patch.map(|p| (p, pod.metadata.resource_version.clone()));
                self.take_object(Arc::new(pod));
            }
            Err(error) => {
                let delay = pause(&mut self.write_retry);
                self.write_not_before = Some(Instant::now() + delay);
                if is_gone(&error) {
                    debug!("the pod of a status write is not there any more");
                    self.look_again();
                } else {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot write a pod's status"
                    );
                }
            }
        }
    }

    // ---- is it still there?

    /// Reads the object itself: the watch is no proof of absence.
    fn look_again(&mut self) {
        let named = match &self.object {
            Some(pod) => Some((pod.namespace().unwrap_or_default(), pod.name_any())),
            None => self
                .inputs
                .borrow()
                .reports
                .values()
                .next()
                .map(|s| (String::from(&s.namespace), String::from(&s.name))),
        };
        let settled = matches!(self.lifecycle.intent(), Intent::Reap) || self.look.is_some();
        let Some((namespace, name)) = named.filter(|_| !settled) else {
            return;
        };
        let delay = pause(&mut self.look_retry);
        let api = Api::<Pod>::namespaced(self.tools.client.clone(), &namespace);
        self.look = Some(
            async move {
                tokio::time::sleep(delay).await;
                api.get_opt(&name).await
            }
            .boxed(),
        );
    }

    fn take_looked(&mut self, looked: Result<Option<Pod>, kube::Error>) {
        match looked {
            Ok(Some(pod)) if pod.metadata.uid.as_deref() == Some(self.uid.as_str()) => {
                self.take_object(Arc::new(pod));
                if self.absent {
                    self.look_again();
                }
            }
            Ok(_) => {
                info!("the pod is gone from the API server");
                self.step(Event::Intended(Intent::Reap));
                if !self.lifecycle.is_settled() {
                    self.step(Event::Settled);
                }
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot look whether a pod still exists"
                );
                self.look_again();
            }
        }
    }

    // ---- volumes of a running pod

    fn housekeep(&mut self) {
        self.refresh_at = Instant::now() + HOUSEKEEPING.mul_f64(rand::random_range(0.8..1.2));
        let (Some(pod), Stage::Placed { place }) = (self.object.clone(), self.lifecycle.stage()) else {
            return;
        };
        let has_files = pod
            .spec
            .iter()
            .flat_map(|s| s.volumes.iter().flatten())
            .any(|v| v.empty_dir.is_none());
        if !has_files || self.refresh.is_some() || self.lifecycle.intent() != Intent::Run {
            return;
        }
        let key = SandboxKey {
            pod: self.uid.clone(),
            attempt: place.attempt,
        };
        let (tools, host, held, current) = (
            self.tools.clone(),
            place.host.clone(),
            self.tokens.clone(),
            self.volumes,
        );
        self.refresh = Some(
            async move {
                let resolved = resolve(&tools.client, &pod, &held, Extent::Volumes, Timestamp::now()).await?;
                let facts = tools.facts.borrow().clone();
                let volumes = of_files(translate::volumes(&pod, &resolved, &facts)?);
                let new = digest(&volumes);
                if current != Some(new)
                    && let Some(host) = tools.pool.host(&host)
                {
                    host.update(&key, volumes).await?;
                    debug!("the pod's volumes were brought up to date");
                }
                Ok(Refreshed {
                    tokens: resolved.tokens,
                    volumes: new,
                })
            }
            .boxed(),
        );
    }

    fn take_refreshed(&mut self, refreshed: Result<Refreshed, RefreshError>) {
        match refreshed {
            Ok(refreshed) => {
                self.tokens = refreshed.tokens;
                self.volumes = Some(refreshed.volumes);
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot bring a pod's volumes up to date"
                );
                if let RefreshError::Translate(why) = &error {
                    self.record(Severity::Warning, "FailedMount", &why.to_string());
                }
            }
        }
    }

    // ---- events

    fn record(&self, severity: Severity, reason: &str, message: &str) {
        if let Some(pod) = &self.object {
            self.record_on(Object::pod(pod), severity, reason, message);
        }
    }

    fn record_container(&self, container: &str, severity: Severity, reason: &str, message: &str) {
        let Some(pod) = &self.object else { return };
        let init = pod
            .spec
            .iter()
            .flat_map(|s| s.init_containers.iter().flatten())
            .any(|c| c.name == container);
        self.record_on(Object::container(pod, container, init), severity, reason, message);
    }

    fn record_on(&self, object: Object, severity: Severity, reason: &str, message: &str) {
        self.tools.recorder.record(Happening {
            object,
            severity,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
        });
    }
}

/// The answer of the slot's future, or never.
async fn optional<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn optional_write(slot: &mut Option<Write>) -> Result<Pod, kube::Error> {
    match slot {
        Some(write) => (&mut write.done).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// One line in the log for a call that is repeated until it succeeds.
fn retried(error: &CallError, told: &mut bool, call: &'static str) {
    let error = error as &dyn std::error::Error;
    if std::mem::replace(told, true) {
        debug!(error, call, "a call is repeated again");
    } else {
        warn!(error, call, "a call is repeated until the host answers");
    }
}

/// Repeats until the host answers.
async fn stop(pool: Pool, uid: PodUid, place: Place, grace: Duration) -> Done {
    let key = SandboxKey {
        pod: uid,
        attempt: place.attempt,
    };
    let mut retries = retries();
    let mut told = false;
    loop {
        let Some(host) = pool.host(&place.host) else {
            return Done::Stopped { place, known: false };
        };
        match host.stop(&key, grace).await {
            Ok(()) => return Done::Stopped { place, known: true },
            Err(CallError::NotFound { .. }) => return Done::Stopped { place, known: false },
            Err(error) => retried(&error, &mut told, "stop"),
        }
        tokio::time::sleep(pause(&mut retries)).await;
    }
}

/// Repeats until the host answers. Afterwards it is gone there, and fenced.
async fn forget(pool: Pool, uid: PodUid, place: &Place) {
    let key = SandboxKey {
        pod: uid,
        attempt: place.attempt,
    };
    let mut retries = retries();
    let mut told = false;
    while let Some(host) = pool.host(&place.host) {
        match host.forget(&key).await {
            Ok(()) | Err(CallError::NotFound { .. }) => return,
            Err(error) => retried(&error, &mut told, "forget"),
        }
        tokio::time::sleep(pause(&mut retries)).await;
    }
}

/// Repeats until the object is gone, or is another pod's.
async fn remove(client: Client, uid: PodUid, pod: &Pod, last: &PodStatus) {
    let api = api(&client, pod);
    let name = pod.name_any();
    let current = pod.status.clone().unwrap_or_default();
    let mut patch = status::patch(uid.as_str(), &current, last);
    let delete = DeleteParams::default()
        .grace_period(0)
        .preconditions(Preconditions {
            uid: Some(uid.into()),
            resource_version: None,
        });
    let mut retries = retries();
    loop {
        let outcome = async {
            if let Some(body) = &patch {
                api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(body))
                    .await?;
                patch = None;
            }
            api.delete(&name, &delete).await
        };
        match outcome.await {
            Ok(_) => return,
            Err(error) if is_gone(&error) => return,
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "removing a pod is tried again"
                );
            }
        }
        tokio::time::sleep(pause(&mut retries)).await;
    }
}

fn api(client: &Client, pod: &Pod) -> Api<Pod> {
    Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default())
}

/// 404, or 409: the UID is another pod's.
fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}

/// Versions of one object are ordered numbers (KEP-5504).
fn newer(new: &Pod, old: &Pod) -> bool {
    let version = |pod: &Pod| {
        pod.metadata
            .resource_version
            .as_ref()
            .and_then(|v| v.parse::<u64>().ok())
    };
    match (version(new), version(old)) {
        (Some(new), Some(old)) => new > old,
        _ => true,
    }
}

fn ready(status: &PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// An error and its causes on one line, for the user.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// As a kubelet rejects a pod that cannot fit.
fn out_of(shortage: &Shortage) -> Verdict {
    Verdict {
        reason: format!("OutOf{}", shortage.resource),
        message: format!(
            "Pod was rejected: Node didn't have enough resource: {}, requested: {}, capacity of the largest host: {}",
            shortage.resource, shortage.requested, shortage.capacity
        ),
    }
}
