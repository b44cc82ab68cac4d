//! What happens to a sandbox, decided: from admission to the last file removed.
//! Pure; [`super::driver`] runs it, performs its effects and brings their events.
//!
//! ```text
//!           Begin                    volumes ∧ sandbox ∧ Serving
//!  Waiting ───────▶ Preparing ───────────────────────────────────▶ Running
//!                       │                                             │
//!                       │  Stop, Forget, deadline, lost               │  … or every app container done
//!                       ▼                                             ▼
//!                    Stopping: apps ▸ sidecars in reverse ▸ sandbox ▸ attachment ▸ network ▸ volumes
//!                       ▼
//!                    Stopped ── Forget ──▶ removing ──▶ Gone
//! ```
//!
//! What always holds (and `tests` holds it to):
//! - no container is started unless the volumes are there, the sandbox runs and
//!   the attachment is `Serving` at that moment: [`Lifecycle::may_start`] is the
//!   one place that says so;
//! - a slot has at most one live run; nothing is started once the end has begun;
//! - a step of the teardown begins when the one before it has succeeded.

use std::{collections::HashSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use pool_agent_api::{
    SandboxSpec,
    spec::{Container as ContainerSpec, Hook, Probe, PullPolicy, RestartPolicy},
    status::{MeshState, SandboxState, Severity, Terminated},
};

use super::{
    backoff::Backoff,
    clock::{after, since},
    container::{Container, Image, PostStart, Run, Running, StopPhase, Stopping},
    event::{
        Announcement, ContainerId, Effect, Event, HookKind, ProbeKind, SandboxId, Slot, StartFailure,
        Teardown, Trouble, Verdict,
    },
};

/// A container that was given time to stop is given at least this much after its
/// preStop hook, as a kubelet does.
const LEAST_GRACE: Duration = Duration::from_secs(2);
/// How long a failed pull reads `ErrImagePull` before it reads `ImagePullBackOff`.
const SHOWN_AS_ERROR: Duration = Duration::from_secs(2);
/// A runtime that has not reported a death this long after SIGKILL is asked again.
const OVERDUE: Duration = Duration::from_secs(30);
/// Delays of steps that are not containers: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// Something done once, tried until it works.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step<T> {
    Waiting,
    InFlight { failures: u32 },
    Retry { at: Timestamp, failures: u32 },
    Done(T),
}

impl<T> Step<T> {
    fn done(&self) -> Option<&T> {
        match self {
            Self::Done(value) => Some(value),
            _ => None,
        }
    }

    /// Moves to in-flight if it may begin at `now`.
    fn begin(&mut self, now: Timestamp) -> bool {
        let failures = match *self {
            Self::Waiting => 0,
            Self::Retry { at, failures } if now >= at => failures,
            _ => return false,
        };
        *self = Self::InFlight { failures };
        true
    }

    fn settle(&mut self, result: Result<T, Trouble>, now: Timestamp) -> Option<Trouble> {
        let Self::InFlight { failures } = *self else {
            return None;
        };
        match result {
            Ok(value) => {
                *self = Self::Done(value);
                None
            }
            Err(trouble) => {
                let delay = RETRY_FIRST.saturating_mul(1 << failures.min(6)).min(RETRY_LAST);
                *self = Self::Retry {
                    at: after(now, delay),
                    failures: failures + 1,
                };
                Some(trouble)
            }
        }
    }

    fn wake_at(&self) -> Option<Timestamp> {
        match self {
            Self::Retry { at, .. } => Some(*at),
            _ => None,
        }
    }
}

/// The end, once it has been decided.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stop {
    deadline: Timestamp,
    /// What a container is left even when the deadline has passed.
    floor: Duration,
}

impl Stop {
    fn within(grace: Duration, now: Timestamp) -> Self {
        Self {
            deadline: after(now, grace),
            floor: grace.min(LEAST_GRACE),
        }
    }
}

/// What was found of a sandbox when the agent started again.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The sandbox if the runtime still runs it.
    pub sandbox: Option<SandboxId>,
    /// Containers were started in it before.
    pub had_run: bool,
    /// It had been asked to stop, by then.
    pub stop_by: Option<Timestamp>,
    pub runs: Vec<FoundRun>,
}

#[derive(Debug, Clone)]
pub struct FoundRun {
    pub slot: Slot,
    pub id: ContainerId,
    pub restart: u32,
    pub image_id: String,
    pub created_at: Timestamp,
    pub state: FoundState,
    /// As last reported: kept until a probe says otherwise, so that a restart of
    /// the agent takes no pod out of its Services.
    pub was_started: bool,
    pub was_ready: bool,
}

#[derive(Debug, Clone)]
pub enum FoundState {
    Running { started_at: Timestamp },
    Exited(Terminated),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    pub(super) spec: Arc<SandboxSpec>,
    pub(super) accepted_at: Timestamp,
    begun: bool,
    volumes: Step<()>,
    sandbox: Step<SandboxId>,
    pub(super) mesh: MeshState,
    /// Containers were allowed at least once.
    opened: bool,
    /// Init containers are over, and do not run again.
    initialized: bool,
    pub(super) containers: Vec<Container>,
    stop: Option<Stop>,
    teardown: Option<(Teardown, Step<()>)>,
    stopped: bool,
    forget: bool,
    removal: Step<()>,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Lifecycle {
    pub fn new(spec: Arc<SandboxSpec>, accepted_at: Timestamp) -> Self {
        let containers = spec.all_containers().map(|_| Container::new()).collect();
        Self {
            spec,
            accepted_at,
            begun: false,
            volumes: Step::Waiting,
            sandbox: Step::Waiting,
            mesh: MeshState::Detached,
            opened: false,
            initialized: false,
            containers,
            stop: None,
            teardown: None,
            stopped: false,
            forget: false,
            removal: Step::Waiting,
            reason: "",
            message: String::new(),
        }
    }

    /// The lifecycle of a sandbox that an earlier agent left behind. It goes on with
    /// `Begin`.
    pub fn adopt(spec: Arc<SandboxSpec>, accepted_at: Timestamp, found: Found, now: Timestamp) -> Self {
        let mut this = Self::new(spec, accepted_at);
        this.opened = found.had_run;
        let mut runs = found.runs;
        runs.sort_by_key(|run| (run.slot, run.restart));
        for run in runs {
            let Some(container) = this.containers.get_mut(run.slot.0) else {
                continue;
            };
            if let Run::Exited(end) = std::mem::replace(&mut container.run, Run::Absent) {
                container.last = Some(end);
            }
            container.restarts = run.restart;
            container.image_id = run.image_id;
            container.crashes = Backoff::resumed(run.restart, run.created_at);
            container.run = match run.state {
                FoundState::Running { started_at } => Run::Running(Running {
                    id: run.id,
                    started_at,
                    post_start: PostStart::Done,
                    started: run.was_started,
                    ready: run.was_ready,
                    stopping: None,
                }),
                FoundState::Exited(end) => {
                    container.dead.push_back((run.id, run.restart));
                    Run::Exited(end)
                }
            };
        }
        this.initialized = this.containers[this.init_count()..]
            .iter()
            .any(|c| c.run != Run::Absent);
        let lost = found.had_run && found.sandbox.is_none();
        if let Some(id) = found.sandbox {
            this.sandbox = Step::Done(id);
        }
        if let Some(by) = found.stop_by {
            this.end(Stop::within(since(by, now), now));
        } else if lost && !this.completed() {
            // Its address and its processes are gone: only a new attempt can follow. One
            // in which nothing has run yet just begins anew.
            this.lose(now);
        }
        this
    }

    // ---- what others ask

    pub fn state(&self) -> SandboxState {
        if self.stopped {
            SandboxState::Stopped
        } else if self.stop.is_some() {
            SandboxState::Stopping
        } else if self.opened {
            SandboxState::Running
        } else {
            SandboxState::Preparing
        }
    }

    /// Nothing is left; the driver ends.
    pub fn gone(&self) -> bool {
        self.removal.done().is_some()
    }

    pub fn sandbox_id(&self) -> Option<&SandboxId> {
        self.sandbox.done()
    }

    /// The volumes stand and their contents may be replaced.
    pub fn volumes_stand(&self) -> bool {
        self.volumes.done().is_some() && self.teardown.is_none()
    }

    /// The current or else the last run of a container, and its number.
    pub fn run_of(&self, slot: Slot) -> Option<(ContainerId, u32)> {
        let container = self.containers.get(slot.0)?;
        match &container.run {
            Run::Running(running) => Some((running.id.clone(), container.restarts)),
            _ => container.dead.back().cloned(),
        }
    }

    /// Running containers, for the shell that watches them.
    pub fn running(&self) -> impl Iterator<Item = (Slot, &ContainerId)> {
        self.containers
            .iter()
            .enumerate()
            .filter_map(|(i, c)| c.running().map(|r| (Slot(i), &r.id)))
    }

    /// Probes that should be going now.
    pub fn probes(&self) -> HashSet<(Slot, ContainerId, ProbeKind)> {
        let mut wanted = HashSet::new();
        for (slot, container) in self.slots() {
            let Some(running) = self.containers[slot.0].running() else {
                continue;
            };
            if running.post_start == PostStart::InFlight {
                continue;
            }
            let dying = self.stop.is_some() || running.stopping.is_some();
            let mut want = |probe: &Option<Probe>, kind| {
                if probe.is_some() {
                    wanted.insert((slot, running.id.clone(), kind));
                }
            };
            if !running.started {
                if !dying {
                    want(&container.startup_probe, ProbeKind::Startup);
                }
                continue;
            }
            want(&container.readiness_probe, ProbeKind::Readiness);
            if !dying {
                want(&container.liveness_probe, ProbeKind::Liveness);
            }
        }
        wanted
    }

    /// The next time after `now` at which something is due though nothing happens.
    /// What was due until now has been planned, or waits for an event.
    pub fn wake_at(&self, now: Timestamp) -> Option<Timestamp> {
        let mut due: Vec<Timestamp> = vec![];
        if self.stop.is_none() {
            due.extend(self.volumes.wake_at());
            due.extend(self.sandbox.wake_at());
            due.extend(self.spec.active_deadline.map(|d| after(self.accepted_at, d)));
        }
        due.extend(self.teardown.as_ref().and_then(|(_, step)| step.wake_at()));
        due.extend(self.removal.wake_at());
        for (slot, _) in self.slots() {
            let container = &self.containers[slot.0];
            match &container.run {
                Run::Running(running) => {
                    if let Some(stopping) = &running.stopping {
                        due.push(match stopping.phase {
                            StopPhase::PreStop | StopPhase::Waiting => stopping.deadline,
                            StopPhase::Signalled { kill_at, .. } => after(kill_at, OVERDUE),
                            StopPhase::Retry { at } => at,
                        });
                    }
                }
                _ if self.stop.is_some() => {}
                Run::Refused { until, .. } => due.push(*until),
                Run::Exited(end) if self.restarts(slot, end) => {
                    due.push(container.crashes.until(end.finished_at));
                }
                Run::Exited(_) | Run::Absent | Run::Starting => {}
            }
            if let (Image::Failed { since, until, .. }, true) = (&container.image, self.stop.is_none()) {
                if !container.announced_backoff {
                    due.push(*since);
                }
                due.push(*until);
            }
        }
        due.into_iter().filter(|at| *at > now).min()
    }

    // ---- the step

    pub fn step(mut self, event: Event, now: Timestamp) -> (Self, Vec<Effect>) {
        let mut effects = vec![];
        self.take(event, now, &mut effects);
        self.plan(now, &mut effects);
        (self, effects)
    }

    /// Takes note of what happened.
    fn take(&mut self, event: Event, now: Timestamp, effects: &mut Vec<Effect>) {
        match event {
            Event::Tick | Event::ContainerRemoved => {}
            Event::Begin => self.begun = true,
            Event::VolumesPrepared(result) => {
                if let Some(trouble) = self.volumes.settle(result, now) {
                    effects.push(warn(trouble.reason, trouble.message, None));
                }
            }
            Event::SandboxRan(result) => {
                if let Some(trouble) = self.sandbox.settle(result, now) {
                    let message = format!("Failed to create pod sandbox: {}", trouble.message);
                    effects.push(warn(trouble.reason, message, None));
                }
            }
            Event::SandboxLost => {
                if self.sandbox.done().is_some() && self.stop.is_none() && !self.completed() {
                    self.lose(now);
                    effects.push(warn("SandboxChanged", self.message.clone(), None));
                }
            }
            Event::Attachment(state) => self.mesh = state,
            Event::ImageChecked(slot, result) => self.image_checked(slot, result, now, effects),
            Event::ImagePulled(slot, result) => self.image_pulled(slot, result, now, effects),
            Event::ContainerStarted(slot, result) => self.container_started(slot, result, now, effects),
            Event::ContainerExited(slot, id, end) => self.container_exited(slot, &id, end),
            Event::HookRan(slot, id, kind, result) => self.hook_ran(slot, &id, kind, result, now, effects),
            Event::StopAnswered(slot, id, result) => self.stop_answered(slot, &id, result, now),
            Event::Probed(slot, id, kind, verdict) => self.probed(slot, &id, kind, verdict, now, effects),
            Event::ProbeFailed(slot, id, kind, message) => {
                if self.current(slot, &id).is_some() {
                    let message = format!("{kind} probe failed: {message}");
                    effects.push(warn("Unhealthy", message, Some(slot)));
                }
            }
            Event::Evict(reason, message) => {
                if self.stop.is_none() {
                    effects.push(warn(reason, message.clone(), None));
                    self.reason = reason;
                    self.message = message;
                    self.end(Stop::within(Duration::ZERO, now));
                }
            }
            Event::Fence => {
                // What was ending already ends for its own reason, and at once.
                if self.stop.is_none() {
                    self.reason = "Fenced";
                    self.message = "The host had lost touch with its pool and with the pod's virtual node; \
                                    the pod needs another"
                        .into();
                    effects.push(warn("Fenced", self.message.clone(), None));
                }
                self.end(Stop::within(Duration::ZERO, now));
            }
            Event::Stop { grace } => self.end(Stop::within(grace, now)),
            Event::Forget => {
                self.forget = true;
                self.end(Stop::within(Duration::ZERO, now));
            }
            Event::TornDown(what, result) => {
                if let Some((step, state)) = &mut self.teardown
                    && *step == what
                    && let Some(trouble) = state.settle(result, now)
                {
                    effects.push(warn(trouble.reason, trouble.message, None));
                }
            }
            Event::Removed(result) => {
                // Nobody is left to be told; it is tried again.
                let _untold = self.removal.settle(result, now);
            }
        }
    }

    /// Asks for whatever is due. Level-triggered: it looks at the state alone.
    fn plan(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        if self.stop.is_none() {
            let deadline = self.spec.active_deadline.map(|d| after(self.accepted_at, d));
            if self.completed() {
                self.end(Stop::within(self.spec.termination_grace, now));
            } else if deadline.is_some_and(|at| now >= at) {
                self.reason = "DeadlineExceeded";
                self.message = "Pod was active on the node longer than the specified deadline".into();
                effects.push(warn(self.reason, self.message.clone(), None));
                self.end(Stop::within(self.spec.termination_grace, now));
            }
        }
        if self.stop.is_some() {
            self.plan_end(now, effects);
        } else if self.begun {
            if self.volumes.begin(now) {
                effects.push(Effect::PrepareVolumes);
            }
            if self.sandbox.begin(now) {
                effects.push(Effect::RunSandbox);
            }
            self.opened |= self.may_start();
            self.plan_containers(now, effects);
        }
        self.plan_signals(now, effects);
    }

    // ---- containers

    /// The one gate before every start of a container.
    fn may_start(&self) -> bool {
        self.begun
            && self.stop.is_none()
            && self.volumes.done().is_some()
            && self.sandbox.done().is_some()
            && self.mesh == MeshState::Serving
    }

    fn plan_containers(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let inits = self.init_count();
        for i in 0..inits {
            let slot = Slot(i);
            let sidecar = self.container_spec(slot).restartable_init;
            if self.initialized {
                if sidecar {
                    self.drive(slot, true, now, effects);
                }
                continue;
            }
            if !sidecar
                && let Run::Exited(end) = &self.containers[i].run
                && end.exit_code == 0
            {
                continue;
            }
            self.drive(slot, true, now, effects);
            if !(sidecar && self.containers[i].started()) {
                return;
            }
        }
        self.initialized = true;
        // As a kubelet does, the next app container waits for the one before it to be
        // started, its postStart hook included: programs rely on it. Images needn't wait.
        let mut turn = true;
        for i in inits..self.containers.len() {
            self.drive(Slot(i), turn, now, effects);
            let container = &self.containers[i];
            let fetching = matches!(container.image, Image::Checking | Image::Pulling);
            turn &= !container.coming_up() && (container.alive() || !fetching);
        }
    }

    /// Brings one container closer to running.
    fn drive(&mut self, slot: Slot, turn: bool, now: Timestamp, effects: &mut Vec<Effect>) {
        let policy = self.container_spec(slot).pull_policy;
        let container = &self.containers[slot.0];
        match &container.run {
            Run::Starting | Run::Running(_) => return,
            Run::Refused { until, .. } if now < *until => return,
            Run::Exited(end) => {
                if !self.restarts(slot, end) {
                    return;
                }
                if now < container.crashes.until(end.finished_at) {
                    if !container.announced_backoff {
                        let message = format!(
                            "Back-off restarting failed container {} in pod {}_{}({})",
                            self.container_spec(slot).name,
                            self.spec.name,
                            self.spec.namespace,
                            self.spec.key.pod
                        );
                        effects.push(warn("BackOff", message, Some(slot)));
                        self.containers[slot.0].announced_backoff = true;
                    }
                    return;
                }
            }
            Run::Absent | Run::Refused { .. } => {}
        }
        let may_start = turn && self.may_start();
        let image = self.container_spec(slot).image.clone();
        let container = &mut self.containers[slot.0];
        if let Image::Failed {
            trouble,
            since,
            until,
        } = &container.image
        {
            if now >= *until {
                container.image = Image::Unknown;
            } else if trouble.reason == "ErrImagePull" && now >= *since && !container.announced_backoff {
                container.announced_backoff = true;
                effects.push(warn(
                    "BackOff",
                    format!("Back-off pulling image \"{image}\""),
                    Some(slot),
                ));
                effects.push(warn("Failed", "Error: ImagePullBackOff", Some(slot)));
            }
        }
        match container.image {
            Image::Unknown if policy == PullPolicy::Always => self.pull(slot, effects),
            Image::Unknown => {
                container.image = Image::Checking;
                effects.push(Effect::CheckImage(slot));
            }
            Image::Ready if may_start => {
                if let Run::Exited(end) = std::mem::replace(&mut container.run, Run::Starting) {
                    container.crashes.advance(end.finished_at, now);
                    container.restarts += 1;
                    container.last = Some(end);
                }
                container.announced_backoff = false;
                let restart = container.restarts;
                if let Some(sandbox) = self.sandbox.done().cloned() {
                    effects.push(Effect::StartContainer {
                        slot,
                        sandbox,
                        restart,
                    });
                }
            }
            Image::Ready | Image::Checking | Image::Pulling | Image::Failed { .. } => {}
        }
    }

    fn pull(&mut self, slot: Slot, effects: &mut Vec<Effect>) {
        self.containers[slot.0].image = Image::Pulling;
        let message = format!("Pulling image \"{}\"", self.container_spec(slot).image);
        effects.push(tell("Pulling", message, Some(slot)));
        effects.push(Effect::PullImage(slot));
    }

    fn image_checked(
        &mut self,
        slot: Slot,
        result: Result<Option<String>, Trouble>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let (policy, image) = {
            let spec = self.container_spec(slot);
            (spec.pull_policy, spec.image.clone())
        };
        let container = &mut self.containers[slot.0];
        if container.image != Image::Checking {
            return;
        }
        match result {
            Ok(Some(id)) => {
                container.image = Image::Ready;
                container.image_id = id;
                let message = format!(
                    "Container image \"{image}\" already present on machine and can be accessed by the pod"
                );
                effects.push(tell("Pulled", message, Some(slot)));
            }
            Ok(None) if self.stop.is_some() => container.image = Image::Unknown,
            Ok(None) if policy == PullPolicy::Never => {
                let message = format!("Container image \"{image}\" is not present with pull policy of Never");
                effects.push(warn("ErrImageNeverPull", message.clone(), Some(slot)));
                self.image_failed(slot, Trouble::new("ErrImageNeverPull", message), now, effects);
            }
            Ok(None) => self.pull(slot, effects),
            Err(trouble) => self.image_failed(slot, trouble, now, effects),
        }
    }

    fn image_pulled(
        &mut self,
        slot: Slot,
        result: Result<super::event::Pulled, Trouble>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let image = self.container_spec(slot).image.clone();
        let container = &mut self.containers[slot.0];
        if container.image != Image::Pulling {
            return;
        }
        match result {
            Ok(pulled) => {
                container.image = Image::Ready;
                container.image_id = pulled.image_id;
                container.pulls = Backoff::default();
                let message = format!(
                    "Successfully pulled image \"{image}\" in {:?}. Image size: {} bytes.",
                    Duration::from_millis(u64::try_from(pulled.took.as_millis()).unwrap_or(u64::MAX)),
                    pulled.bytes
                );
                effects.push(tell("Pulled", message, Some(slot)));
            }
            // It was given up; nobody waits for it.
            Err(_) if self.stop.is_some() => container.image = Image::Unknown,
            Err(trouble) => {
                let message = format!("Failed to pull image \"{image}\": {}", trouble.message);
                effects.push(warn("Failed", message, Some(slot)));
                self.image_failed(slot, trouble, now, effects);
            }
        }
    }

    fn image_failed(&mut self, slot: Slot, trouble: Trouble, now: Timestamp, effects: &mut Vec<Effect>) {
        // Why no pull came about was said before; what else kept it from one is said here.
        let message = match trouble.reason {
            reason @ ("ErrImagePull" | "ErrImageNeverPull") => format!("Error: {reason}"),
            _ => format!("Error: {}", trouble.message),
        };
        effects.push(warn("Failed", message, Some(slot)));
        let container = &mut self.containers[slot.0];
        container.pulls.advance(now, now);
        container.announced_backoff = false;
        container.image = Image::Failed {
            trouble,
            since: after(now, SHOWN_AS_ERROR),
            until: container.pulls.until(now),
        };
    }

    fn container_started(
        &mut self,
        slot: Slot,
        result: Result<super::event::Started, StartFailure>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let stopping = self.stop.is_some();
        let (startup, post_start) = {
            let spec = self.container_spec(slot);
            (spec.startup_probe.is_some(), spec.post_start.is_some())
        };
        let container = &mut self.containers[slot.0];
        if container.run != Run::Starting {
            return;
        }
        container.image = Image::Unknown;
        match result {
            Ok(started) => {
                effects.push(tell("Created", "Container created", Some(slot)));
                effects.push(tell("Started", "Container started", Some(slot)));
                container.image_id = started.image_id;
                container.run = Run::Running(Running {
                    id: started.id.clone(),
                    started_at: started.started_at,
                    post_start: if post_start && !stopping {
                        effects.push(Effect::RunHook {
                            slot,
                            id: started.id,
                            kind: HookKind::PostStart,
                            limit: None,
                        });
                        PostStart::InFlight
                    } else {
                        PostStart::Done
                    },
                    started: !startup,
                    ready: false,
                    stopping: None,
                });
                self.bury(slot, effects);
            }
            Err(StartFailure::NotCreated(trouble)) => {
                effects.push(warn("Failed", format!("Error: {}", trouble.message), Some(slot)));
                container.refusals.advance(now, now);
                container.run = Run::Refused {
                    until: container.refusals.until(now),
                    trouble,
                };
            }
            Err(StartFailure::Died { trouble, id, end }) => {
                effects.push(warn("Failed", format!("Error: {}", trouble.message), Some(slot)));
                container.dead.push_back((id, container.restarts));
                container.run = Run::Exited(end);
                self.bury(slot, effects);
            }
        }
    }

    /// Keeps one dead run for `kubectl logs --previous`; removes the others.
    fn bury(&mut self, slot: Slot, effects: &mut Vec<Effect>) {
        let container = &mut self.containers[slot.0];
        let keep = match container.run {
            Run::Running(_) => 1,
            _ => 2,
        };
        while container.dead.len() > keep {
            if let Some((id, restart)) = container.dead.pop_front() {
                effects.push(Effect::RemoveContainer { slot, id, restart });
            }
        }
    }

    fn container_exited(&mut self, slot: Slot, id: &ContainerId, end: Terminated) {
        if self.current(slot, id).is_none() {
            return;
        }
        let container = &mut self.containers[slot.0];
        container.dead.push_back((id.clone(), container.restarts));
        container.run = Run::Exited(end);
        container.image = Image::Unknown;
        container.announced_backoff = false;
    }

    fn probed(
        &mut self,
        slot: Slot,
        id: &ContainerId,
        kind: ProbeKind,
        verdict: Verdict,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let spec = self.container_spec(slot);
        let name = spec.name.clone();
        let probe = match kind {
            ProbeKind::Startup => &spec.startup_probe,
            ProbeKind::Liveness => &spec.liveness_probe,
            ProbeKind::Readiness => &spec.readiness_probe,
        };
        let grace = probe
            .as_ref()
            .and_then(|p| p.termination_grace)
            .unwrap_or(self.spec.termination_grace);
        let ending = self.stop.is_some();
        let Some(running) = self.current(slot, id) else {
            return;
        };
        match (kind, verdict) {
            (ProbeKind::Startup, Verdict::Passing) => running.started = true,
            (ProbeKind::Readiness, verdict) => running.ready = verdict == Verdict::Passing,
            (ProbeKind::Liveness, Verdict::Passing) => {}
            (ProbeKind::Startup | ProbeKind::Liveness, Verdict::Failing) => {
                if !ending && running.stopping.is_none() {
                    let probe = kind.to_string().to_lowercase();
                    let message = format!("Container {name} failed {probe} probe, will be restarted");
                    effects.push(tell("Killing", message, Some(slot)));
                    self.kill(slot, Stop::within(grace, now), now, effects);
                }
            }
        }
    }

    fn hook_ran(
        &mut self,
        slot: Slot,
        id: &ContainerId,
        kind: HookKind,
        result: Result<(), String>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let grace = self.spec.termination_grace;
        let Some(running) = self.current(slot, id) else {
            return;
        };
        match kind {
            HookKind::PostStart => {
                running.post_start = PostStart::Done;
                if let Err(message) = result {
                    let ending = running.stopping.is_some();
                    effects.push(warn(
                        "FailedPostStartHook",
                        format!("PostStartHook failed: {message}"),
                        Some(slot),
                    ));
                    if !ending {
                        effects.push(tell("Killing", "FailedPostStartHook", Some(slot)));
                        self.kill(slot, Stop::within(grace, now), now, effects);
                    }
                }
            }
            HookKind::PreStop => {
                if let Some(stopping) = &mut running.stopping
                    && stopping.phase == StopPhase::PreStop
                {
                    stopping.phase = StopPhase::Waiting;
                }
                if let Err(message) = result {
                    let message = format!("PreStopHook failed: {message}");
                    effects.push(warn("FailedPreStopHook", message, Some(slot)));
                }
            }
        }
    }

    fn stop_answered(&mut self, slot: Slot, id: &ContainerId, result: Result<(), Trouble>, now: Timestamp) {
        if let Some(running) = self.current(slot, id)
            && let Some(stopping) = &mut running.stopping
            && let StopPhase::Signalled { answered, .. } = &mut stopping.phase
        {
            match result {
                Ok(()) => *answered = true,
                Err(_) => {
                    stopping.phase = StopPhase::Retry {
                        at: after(now, RETRY_FIRST),
                    }
                }
            }
        }
    }

    // ---- the end

    /// Decides the end, or hastens it: of two deadlines the earlier holds.
    fn end(&mut self, stop: Stop) {
        match &mut self.stop {
            None => self.stop = Some(stop),
            Some(decided) if stop.deadline < decided.deadline => *decided = stop,
            Some(_) => {}
        }
    }

    fn lose(&mut self, now: Timestamp) {
        self.reason = "SandboxLost";
        self.message = "The sandbox ended on its host; the pod needs another".into();
        self.end(Stop::within(Duration::ZERO, now));
    }

    /// Nothing of the pod will run again: a run ended that is not to be repeated.
    fn completed(&self) -> bool {
        let over = |slot: Slot| match &self.containers[slot.0].run {
            Run::Exited(end) => !self.restarts(slot, end),
            _ => false,
        };
        let inits = self.init_count();
        let init_failed = !self.initialized
            && (0..inits).any(|i| {
                over(Slot(i)) && !matches!(&self.containers[i].run, Run::Exited(end) if end.exit_code == 0)
            });
        init_failed || (inits..self.containers.len()).all(|i| over(Slot(i)))
    }

    fn plan_end(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let Some(stop) = self.stop.clone() else {
            return;
        };
        for i in 0..self.containers.len() {
            let slot = Slot(i);
            let Some(running) = self.containers[i].running() else {
                continue;
            };
            let hastens = running
                .stopping
                .as_ref()
                .is_none_or(|stopping| stop.deadline < stopping.deadline);
            if hastens {
                if running.stopping.is_none() {
                    let message = format!("Stopping container {}", self.container_spec(slot).name);
                    effects.push(tell("Killing", message, Some(slot)));
                }
                self.kill(slot, stop.clone(), now, effects);
            }
        }
        let busy =
            matches!(self.sandbox, Step::InFlight { .. }) || matches!(self.volumes, Step::InFlight { .. });
        if busy || self.containers.iter().any(Container::alive) {
            return;
        }
        if !self.stopped {
            let (what, state) = self.teardown.get_or_insert((Teardown::Sandbox, Step::Waiting));
            if state.done().is_some() {
                match what.next() {
                    Some(next) => (*what, *state) = (next, Step::Waiting),
                    None => self.stopped = true,
                }
            }
            if let Some((what, state)) = &mut self.teardown
                && !self.stopped
                && state.begin(now)
            {
                effects.push(Effect::TearDown(*what));
            }
        }
        if self.stopped && self.forget && self.removal.begin(now) {
            effects.push(Effect::Remove);
        }
    }

    /// Begins to stop one container, or hastens it.
    fn kill(&mut self, slot: Slot, stop: Stop, now: Timestamp, effects: &mut Vec<Effect>) {
        let has_hook = self.container_spec(slot).pre_stop.is_some();
        let Run::Running(running) = &mut self.containers[slot.0].run else {
            return;
        };
        let id = running.id.clone();
        let phase = match &running.stopping {
            None if has_hook && stop.deadline > now => {
                effects.push(Effect::RunHook {
                    slot,
                    id,
                    kind: HookKind::PreStop,
                    limit: Some(since(stop.deadline, now)),
                });
                StopPhase::PreStop
            }
            None => StopPhase::Waiting,
            Some(Stopping {
                phase: StopPhase::PreStop,
                ..
            }) => StopPhase::PreStop,
            // Asked again, with less time.
            Some(_) => StopPhase::Waiting,
        };
        running.stopping = Some(Stopping {
            deadline: stop.deadline,
            floor: stop.floor,
            phase,
        });
    }

    /// Sends the signals that are due.
    fn plan_signals(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        for i in 0..self.containers.len() {
            let slot = Slot(i);
            let turn = self.stop.is_none() || self.turn_to_stop(slot);
            let Run::Running(running) = &mut self.containers[i].run else {
                continue;
            };
            let Some(stopping) = &mut running.stopping else {
                continue;
            };
            let over = now >= stopping.deadline;
            let due = match stopping.phase {
                StopPhase::PreStop => over,
                StopPhase::Waiting => turn || over,
                StopPhase::Retry { at } => now >= at,
                StopPhase::Signalled { kill_at, answered } => answered && now >= after(kill_at, OVERDUE),
            };
            if !due {
                continue;
            }
            let grace = match stopping.phase {
                StopPhase::Signalled { .. } => Duration::ZERO,
                _ => since(stopping.deadline, now).max(stopping.floor),
            };
            stopping.phase = StopPhase::Signalled {
                kill_at: after(now, grace),
                answered: false,
            };
            effects.push(Effect::StopContainer {
                slot,
                id: running.id.clone(),
                grace,
            });
        }
    }

    /// Sidecars outlive the app containers and stop in the reverse of their order.
    fn turn_to_stop(&self, slot: Slot) -> bool {
        if !self.container_spec(slot).restartable_init {
            return true;
        }
        !self.slots().any(|(other, spec)| {
            let later = other.0 >= self.init_count() || (spec.restartable_init && other > slot);
            later && self.containers[other.0].alive()
        })
    }

    // ---- small questions

    pub(super) fn init_count(&self) -> usize {
        self.spec.init_containers.len()
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &ContainerSpec)> {
        self.spec.all_containers().enumerate().map(|(i, c)| (Slot(i), c))
    }

    /// The spec of a slot. A slot is only ever made from an index of this spec.
    pub(super) fn container_spec(&self, slot: Slot) -> &ContainerSpec {
        let inits = self.init_count();
        if slot.0 < inits {
            &self.spec.init_containers[slot.0]
        } else {
            &self.spec.containers[slot.0 - inits]
        }
    }

    pub fn hook(&self, slot: Slot, kind: HookKind) -> Option<&Hook> {
        let spec = self.container_spec(slot);
        match kind {
            HookKind::PostStart => spec.post_start.as_ref(),
            HookKind::PreStop => spec.pre_stop.as_ref(),
        }
    }

    /// Whether a run that ended so is followed by another.
    pub(super) fn restarts(&self, slot: Slot, end: &Terminated) -> bool {
        let spec = self.container_spec(slot);
        if spec.restartable_init {
            return true;
        }
        let init = slot.0 < self.init_count();
        match self.spec.restart_policy {
            RestartPolicy::Always => !init || end.exit_code != 0,
            RestartPolicy::OnFailure => end.exit_code != 0,
            RestartPolicy::Never => false,
        }
    }

    fn current(&mut self, slot: Slot, id: &ContainerId) -> Option<&mut Running> {
        match &mut self.containers.get_mut(slot.0)?.run {
            Run::Running(running) if running.id == *id => Some(running),
            _ => None,
        }
    }
}

fn tell(reason: &'static str, message: impl Into<String>, slot: Option<Slot>) -> Effect {
    Effect::Announce(Announcement {
        severity: Severity::Normal,
        reason,
        message: message.into(),
        slot,
    })
}

fn warn(reason: &'static str, message: impl Into<String>, slot: Option<Slot>) -> Effect {
    Effect::Announce(Announcement {
        severity: Severity::Warning,
        reason,
        message: message.into(),
        slot,
    })
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tests_support;
