//! One pod's task: the [`lifecycle`](super::lifecycle) and what it decides, done.
//!
//! ```text
//!  object, reports ──▶ events ──▶ Lifecycle::step ──▶ work (one call at a time)
//!                                     │                    │ its answer is an event
//!                                     ▼                    ▼
//!                               status::status ──▶ PATCH /status (one at a time, only what differs)
//! ```
//!
//! Here is the loop and what leads from an event to an effect. What comes in is in
//! [`object`] (the API server's) and [`reports`] (the hosts'); what goes out in
//! [`room`], [`start`], [`end`], [`handover`], [`telling`] (the status) and [`upkeep`]
//! (volumes).
//!
//! What always holds: at most one piece of work and one status write are in
//! flight, and one that ends the other attempt of a handover; work whose stage has passed is dropped; a status write is refused by
//! the API server for a later pod of the same name; every call has an end.

mod end;
mod handover;
mod object;
mod reports;
mod retries;
mod room;
mod silence;
mod start;
mod telling;
mod upkeep;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, Client, ResourceExt};
use objects::Lenient;
use pool_agent_api::{PodUid, Refusal, SandboxKey, SandboxStatus, status::Severity};
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument, debug, info, info_span, warn};

use self::{
    end::{forget, stop},
    handover::Leaving,
    object::Look,
    reports::Synced,
    room::{Sought, Told},
    silence::Silence,
    start::{Preparation, RecordError, Start},
    telling::Telling,
    upkeep::Upkeep,
};
use super::{
    Heard, Inputs,
    budget::Permit,
    lifecycle::{Effect, Event, Intent, Lifecycle, Place, Stage},
    record::Record,
    status::{Holdup, Verdict},
    translate::NodeFacts,
};
use crate::{
    event::{Happening, Object, Recorder},
    placement::{Placer, Waiting},
    pool::{CallError, Pool},
};

/// What all drivers share.
pub(crate) struct Tools {
    pub(crate) client: Client,
    pub(crate) pool: Pool,
    pub(crate) placer: Placer,
    pub(crate) recorder: Recorder,
    pub(crate) facts: watch::Receiver<NodeFacts>,
    /// This node as the API server has it; None until it was first seen.
    pub(crate) node: watch::Receiver<Option<Arc<Node>>>,
    pub(crate) metrics: super::metrics::Metrics,
    pub(crate) budgets: super::budget::Budgets,
}

/// How work ended.
enum Done {
    Sought(Sought),
    Prepared(Box<Preparation>),
    Started(Result<Result<(), Refusal>, CallError>),
    /// The stop was taken, or the host does not know the sandbox.
    Stopped {
        place: Place,
        known: bool,
    },
    Forgotten(Place),
    Removed,
    /// None: nothing was to be written any more.
    Switched(Box<Option<Result<Pod, RecordError>>>),
}

pub(crate) struct Driver {
    tools: Arc<Tools>,
    uid: PodUid,
    born: Instant,
    inputs: watch::Receiver<Inputs>,
    heard: watch::Receiver<Heard>,

    /// The newest version that was seen or came back from a write.
    object: Option<Arc<Pod>>,
    /// The watch does not have it. A reason to look, not a proof.
    absent: bool,
    look: Look,
    reports: BTreeMap<Place, Arc<SandboxStatus>>,
    synced: Option<Synced>,

    lifecycle: Lifecycle,
    /// Where it was placed last, as the API server has it.
    record: Option<Record>,
    verdict: Option<Verdict>,
    holdup: Option<Holdup>,

    work: Option<BoxFuture<'static, Done>>,
    /// The end of the other attempt of a handover.
    second_work: Option<BoxFuture<'static, Done>>,
    leaving: Option<Leaving>,
    /// To be away for a while, of the tenant's disruption budgets.
    permit: Option<Permit>,
    evictions: FuturesUnordered<BoxFuture<'static, Place>>,
    evicting: BTreeSet<Place>,
    room: Told,
    room_beside: Told,
    silence: Silence,
    /// Why it waits for a host, once that is worth telling.
    waiting: watch::Receiver<Option<Waiting>>,
    start: Start,
    telling: Telling,
    upkeep: Upkeep,
}

impl Driver {
    pub(crate) fn new(
        tools: Arc<Tools>,
        uid: PodUid,
        inputs: watch::Receiver<Inputs>,
        heard: watch::Receiver<Heard>,
    ) -> Self {
        Self {
            tools,
            uid,
            born: Instant::now(),
            inputs,
            heard,
            object: None,
            absent: false,
            look: Look::new(),
            reports: BTreeMap::new(),
            synced: None,
            lifecycle: Lifecycle::new(Intent::Run),
            record: None,
            verdict: None,
            holdup: None,
            work: None,
            second_work: None,
            leaving: None,
            permit: None,
            evictions: FuturesUnordered::new(),
            evicting: BTreeSet::new(),
            room: Told::Unsaid,
            room_beside: Told::Nothing,
            silence: Silence::new(),
            waiting: nothing_to_wait_for(),
            start: Start::new(),
            telling: Telling::new(),
            upkeep: Upkeep::new(),
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
            self.consider_leaving();
            self.settle_room().await;
            if self.is_without_host() {
                continue;
            }
            self.consider_silence();
            self.consider_status();
            if self.is_over() {
                return;
            }
            let write_due = self.write_due();
            let silence_due = self.silence_due();
            let upkeep_due = self.upkeep.due();
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
                done = optional(&mut self.second_work) => {
                    self.second_work = None;
                    self.take_done(done);
                }
                asked = handover::asked(&mut self.leaving) => self.take_asked(asked),
                Some(place) = self.evictions.next(), if !self.evictions.is_empty() => {
                    self.evicting.remove(&place);
                }
                written = self.telling.written() => self.take_written(written),
                () = told(&mut self.waiting) => {}
                looked = self.look.looked() => self.take_looked(looked),
                refreshed = self.upkeep.refreshed() => self.take_refreshed(refreshed),
                () = sleep_until(write_due) => self.begin_write(),
                // What has come is seen with the next turn.
                () = sleep_until(silence_due) => {}
                over = self.silence.over() => self.step(Event::Lapsed(over)),
                () = tokio::time::sleep_until(upkeep_due) => self.housekeep(),
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
        self.take_syncs(&heard);
    }

    fn take_done(&mut self, done: Done) {
        match done {
            Done::Sought(sought) => self.sought(sought),
            Done::Prepared(preparation) => self.prepared(*preparation),
            Done::Started(outcome) => self.started(outcome),
            Done::Stopped { known: true, .. } => {}
            Done::Stopped { place, known: false } => self.step(Event::StopUnknown(place)),
            Done::Forgotten(place) => self.step(Event::Forgotten(place)),
            Done::Switched(written) => self.switched(*written),
            Done::Removed => {
                info!("pod removed");
                self.step(Event::Removed);
            }
        }
    }

    fn step(&mut self, event: Event) {
        let before = self.lifecycle.clone();
        let (after, effects) = before.clone().step(event);
        self.lifecycle = after;
        // The answer of work would be about a stage that has passed.
        let stage_passed = before.stage() != self.lifecycle.stage();
        let step_passed = before.handover() != self.lifecycle.handover();
        let begins = |core: &Lifecycle| core.handover().is_some_and(|h| h.step.begins());
        if stage_passed {
            debug!(from = ?before.stage(), to = ?self.lifecycle.stage(), "the pod moved on");
            if !matches!(self.lifecycle.stage(), Stage::Claiming { .. }) {
                self.waiting = nothing_to_wait_for();
            }
        }
        if step_passed {
            debug!(from = ?before.handover(), to = ?self.lifecycle.handover(), "a handover moved on");
            self.second_work = None;
            self.follow_handover();
        }
        if stage_passed || step_passed && (begins(&before) || begins(&self.lifecycle)) {
            self.work = None;
            self.start.follow(&self.lifecycle);
        }
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        let (pool, uid) = (self.tools.pool.clone(), self.uid.clone());
        match effect {
            Effect::Prepare(_) => self.prepare(),
            Effect::Start { place, again } => self.start(place, again),
            Effect::Stop { place, grace } => {
                info!(host = %place.host, attempt = %place.attempt, grace_seconds = grace.as_secs(), "stopping the pod");
                if self.lifecycle.second() == Some(&place) {
                    let linger = self.linger();
                    let stopping = async move {
                        sleep(linger).await;
                        stop(pool, uid, place, grace).await
                    };
                    self.second_work = Some(stopping.boxed());
                } else {
                    self.work = Some(stop(pool, uid, place, grace).boxed());
                }
            }
            Effect::Forget(place) => {
                let second = self.lifecycle.second() == Some(&place);
                let forgotten = async move {
                    forget(pool, uid, &place).await;
                    Done::Forgotten(place)
                };
                if second {
                    self.second_work = Some(forgotten.boxed());
                } else {
                    self.work = Some(forgotten.boxed());
                }
            }
            Effect::Evict(place) => {
                if self.evicting.insert(place.clone()) {
                    warn!(
                        host = %place.host,
                        attempt = %place.attempt,
                        "evicting a sandbox that is not the one on record"
                    );
                    let evicted = async move {
                        forget(pool, uid, &place).await;
                        place
                    };
                    self.evictions.push(evicted.boxed());
                }
            }
            Effect::Switch(_) => self.switch_after(Duration::ZERO),
            Effect::Remove => self.remove(),
        }
    }

    /// It is decided that the pod has failed.
    fn conclude(&mut self, verdict: Verdict) {
        warn!(
            reason = verdict.reason,
            detail = verdict.message,
            "the pod cannot run"
        );
        self.happened(Severity::Warning, &verdict.reason, &verdict.message);
        self.verdict = Some(verdict);
        self.holdup = None;
        self.step(Event::Intended(Intent::Finish));
    }

    fn key(&self, place: &Place) -> SandboxKey {
        SandboxKey {
            pod: self.uid.clone(),
            attempt: place.attempt,
        }
    }

    /// An event on the pod.
    fn happened(&self, severity: Severity, reason: &str, message: &str) {
        if let Some(pod) = &self.object {
            self.happened_to(Object::pod(pod), severity, reason, message);
        }
    }

    fn happened_to(&self, object: Object, severity: Severity, reason: &str, message: &str) {
        self.tools.recorder.record(Happening {
            object,
            severity,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
        });
    }
}

fn api(client: &Client, pod: &Pod) -> Api<Lenient<Pod>> {
    Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default())
}

/// The answer of the slot's future, or never.
async fn optional<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn nothing_to_wait_for() -> watch::Receiver<Option<Waiting>> {
    watch::channel(None).1
}

/// Once there is something new to tell.
async fn told(waiting: &mut watch::Receiver<Option<Waiting>>) {
    if waiting.changed().await.is_err() {
        // Nobody waits (any more).
        std::future::pending().await
    }
}

/// Until then, or for ever. What is due is due now: even a timer that has passed
/// rings only with the next millisecond.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) if at <= Instant::now() => {}
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn sleep(delay: Duration) {
    sleep_until(Some(Instant::now() + delay)).await;
}
