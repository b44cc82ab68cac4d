//! The task that owns one sandbox. It feeds the lifecycle what happens, has its
//! effects performed, and publishes what came of it. It decides nothing.
//!
//! Spawned by `host`; ends when nothing of the sandbox is left. Dropping it (the
//! agent's end) leaves containers, network and mesh as they are.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    net::Ipv4Addr,
    sync::Arc,
};

use pool_agent_api::{
    Invalid, SandboxSpec, TenantId,
    spec::Volume,
    status::{EventContainer, MeshState, PodEvent, SandboxState},
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Lifecycle,
    clock::Clock,
    event::{
        Announcement, ContainerId, Effect, Event, ProbeKind, SandboxId, Slot, StartFailure, Teardown, Trouble,
    },
    status::Addressing,
};
use crate::{board::Board, cri::events::Sign};

/// Orders that wait for a busy driver: a stop, a hastened stop, a forget, a few
/// updates, and what the runtime's events say. Whoever sends more waits. Not for long:
/// a driver awaits nothing that a pod or a tenant can draw out.
pub const INBOX: usize = 32;
/// Updates of one sandbox that its driver has, one of them under way. Whoever asks for
/// more waits outside, where no stop stands behind.
pub const UPDATES: usize = 2;
/// Verdicts and failures of a sandbox's probes that wait for its driver.
const PROBE_EVENTS: usize = 64;

#[derive(Debug)]
pub enum Command {
    Event(Event),
    Update(Update),
    /// Something to look into.
    Sign(Sign),
}

/// Replaces contents of file volumes.
#[derive(Debug)]
pub struct Update {
    pub volumes: Vec<Volume>,
    pub done: oneshot::Sender<Result<(), UpdateError>>,
    /// One of [`UPDATES`].
    pub place: OwnedSemaphorePermit,
}

/// Why contents were not replaced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// Nothing was touched.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("{}", .0.message)]
    Failed(Trouble),
}

impl From<Trouble> for UpdateError {
    fn from(trouble: Trouble) -> Self {
        Self::Failed(trouble)
    }
}

/// The hands of a driver. The real ones are [`super::perform::Hands`].
pub trait Perform: Send + Sync + 'static {
    /// Does it, and says what came of it.
    fn perform(&self, effect: Effect) -> impl Future<Output = Vec<Event>> + Send;

    /// Asks the runtime whether a run has ended, or else (None) is still going.
    fn inspect(&self, slot: Slot, id: ContainerId) -> impl Future<Output = Option<Event>> + Send;

    /// Runs a probe until it is dropped.
    fn probe(
        &self,
        slot: Slot,
        id: ContainerId,
        kind: ProbeKind,
        events: mpsc::Sender<Event>,
    ) -> impl Future<Output = ()> + Send;

    fn update(&self, volumes: Vec<Volume>) -> impl Future<Output = Result<(), UpdateError>> + Send;
}

/// What others can see of a driver without asking it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    pub stopped: bool,
    pub gone: bool,
    pub sandbox: Option<SandboxId>,
    pub running: Vec<ContainerId>,
}

/// Where a driver's results go.
#[derive(Debug)]
pub struct Outlet {
    pub board: Board,
    pub tenant: TenantId,
    pub addressing: Addressing,
    pub progress: watch::Sender<Progress>,
    pub clock: Clock,
}

pub async fn run<P: Perform>(
    mut lifecycle: Lifecycle,
    hands: Arc<P>,
    mut inbox: mpsc::Receiver<Command>,
    mut mesh: watch::Receiver<MeshState>,
    outlet: Outlet,
) {
    let (probe_events, mut probed) = mpsc::channel(PROBE_EVENTS);
    let mut probes: HashMap<(Slot, ContainerId, ProbeKind), AbortOnDropHandle<()>> = HashMap::new();
    let mut work: JoinSet<Vec<Event>> = JoinSet::new();
    // One update is done at a time, and the volumes are not taken away meanwhile.
    let mut updating: JoinSet<()> = JoinSet::new();
    let mut updates: VecDeque<Update> = VecDeque::new();
    let mut held_back: Vec<Effect> = vec![];
    let mut events = vec![Event::Attachment(*mesh.borrow_and_update()), Event::Tick];
    loop {
        for event in events.drain(..) {
            let (next, effects) = lifecycle.step(event, outlet.clock.now());
            lifecycle = next;
            for effect in effects {
                match effect {
                    Effect::Announce(announcement) => outlet.announce(&lifecycle.spec, announcement),
                    Effect::TearDown(Teardown::Volumes) | Effect::Remove if !updating.is_empty() => {
                        held_back.push(effect);
                    }
                    effect => {
                        let hands = hands.clone();
                        work.spawn(performed(hands, effect));
                    }
                }
            }
        }
        if updating.is_empty() {
            for effect in held_back.drain(..) {
                work.spawn(performed(hands.clone(), effect));
            }
            begin_update(&lifecycle, &hands, &mut updates, &mut updating);
        }
        outlet.publish(&lifecycle);
        if lifecycle.gone() {
            return;
        }
        let wanted = lifecycle.probes();
        probes.retain(|probe, _| wanted.contains(probe));
        for (slot, id, kind) in wanted {
            probes.entry((slot, id.clone(), kind)).or_insert_with(|| {
                let hands = hands.clone();
                let events = probe_events.clone();
                AbortOnDropHandle::new(tokio::spawn(async move {
                    hands.probe(slot, id, kind, events).await;
                }))
            });
        }
        let due = lifecycle.wake_at(outlet.clock.now());
        tokio::select! {
            Some(done) = work.join_next() => match done {
                Ok(done) => events.extend(done),
                Err(error) => tracing::error!(error = %error, "a sandbox's work broke off"),
            },
            Some(ended) = updating.join_next() => if let Err(error) = ended {
                tracing::error!(error = %error, "an update broke off");
            },
            Some(command) = inbox.recv() => match command {
                Command::Event(event) => events.push(event),
                Command::Sign(sign) => look_into(&lifecycle, sign, &hands, &mut work, &mut events),
                Command::Update(update) => updates.push_back(update),
            },
            Ok(()) = mesh.changed() => events.push(Event::Attachment(*mesh.borrow_and_update())),
            Some(event) = probed.recv() => events.push(event),
            () = sleep_until(due.map(|at| outlet.clock.instant(at))) => events.push(Event::Tick),
        }
    }
}

/// The next that can be done; those that cannot any more are told so.
fn begin_update<P: Perform>(
    lifecycle: &Lifecycle,
    hands: &Arc<P>,
    updates: &mut VecDeque<Update>,
    updating: &mut JoinSet<()>,
) {
    while let Some(Update { volumes, done, place }) = updates.pop_front() {
        if lifecycle.volumes_stand() {
            let hands = hands.clone();
            updating.spawn(async move {
                answer(done, hands.update(volumes).await);
                drop(place);
            });
            return;
        }
        let trouble = Trouble::new("NotRunning", "the sandbox has no volumes to update at this time");
        answer(done, Err(trouble.into()));
    }
}

fn answer(done: oneshot::Sender<Result<(), UpdateError>>, result: Result<(), UpdateError>) {
    if done.send(result).is_err() {
        tracing::debug!("whoever asked for an update has gone");
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Performs an effect; one that panics has failed.
async fn performed<P: Perform>(hands: Arc<P>, effect: Effect) -> Vec<Event> {
    let doing = effect.clone();
    let task = AbortOnDropHandle::new(tokio::spawn(async move { hands.perform(doing).await }));
    match task.await {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(error = %error, "performing an effect broke off");
            broke_off(effect)
        }
    }
}

fn broke_off(effect: Effect) -> Vec<Event> {
    let trouble = || Trouble::new("InternalError", "the agent failed; its log says why");
    match effect {
        Effect::PrepareVolumes => vec![Event::VolumesPrepared(Err(trouble()))],
        Effect::RunSandbox => vec![Event::SandboxRan(Err(trouble()))],
        Effect::CheckImage(slot) => vec![Event::ImageChecked(slot, Err(trouble()))],
        Effect::PullImage(slot) => vec![Event::ImagePulled(slot, Err(trouble()))],
        Effect::StartContainer { slot, .. } => {
            vec![Event::ContainerStarted(
                slot,
                Err(StartFailure::NotCreated(trouble())),
            )]
        }
        Effect::RunHook { slot, id, kind, .. } => {
            vec![Event::HookRan(slot, id, kind, Err(trouble().message))]
        }
        Effect::StopContainer { slot, id, .. } => vec![Event::StopAnswered(slot, id, Err(trouble()))],
        Effect::RemoveContainer { .. } => vec![Event::ContainerRemoved],
        Effect::TearDown(what) => vec![Event::TornDown(what, Err(trouble()))],
        Effect::Remove => vec![Event::Removed(Err(trouble()))],
        Effect::Announce(_) => vec![],
    }
}

fn look_into<P: Perform>(
    lifecycle: &Lifecycle,
    sign: Sign,
    hands: &Arc<P>,
    work: &mut JoinSet<Vec<Event>>,
    events: &mut Vec<Event>,
) {
    match sign {
        Sign::Ended(id) => {
            let slot = lifecycle
                .running()
                .find(|(_, run)| **run == id)
                .map(|(slot, _)| slot);
            if let Some(slot) = slot {
                let hands = hands.clone();
                work.spawn(async move { hands.inspect(slot, id).await.into_iter().collect() });
            }
        }
        Sign::SandboxDown(id) => {
            if lifecycle.sandbox_id() == Some(&id) {
                events.push(Event::SandboxLost);
            }
        }
    }
}

impl Outlet {
    fn publish(&self, lifecycle: &Lifecycle) {
        let mut running: Vec<ContainerId> = lifecycle.running().map(|(_, id)| id.clone()).collect();
        running.sort();
        let progress = Progress {
            stopped: lifecycle.state() == SandboxState::Stopped,
            gone: lifecycle.gone(),
            sandbox: lifecycle.sandbox_id().cloned(),
            running,
        };
        // The status first: who waits for the progress may then read it.
        if !progress.gone {
            self.board
                .publish(&self.tenant, lifecycle.status(&self.addressing));
        }
        self.progress.send_if_modified(|known| {
            let changed = *known != progress;
            *known = progress;
            changed
        });
    }

    fn announce(&self, spec: &SandboxSpec, announcement: Announcement) {
        let inits = spec.init_containers.len();
        let container = announcement.slot.and_then(|slot| {
            spec.all_containers().nth(slot.0).map(|c| EventContainer {
                name: c.name.clone(),
                init: slot.0 < inits,
            })
        });
        tracing::info!(
            reason = announcement.reason,
            container = container.as_ref().map(|c| c.name.as_str()),
            detail = announcement.message,
            "pod event"
        );
        self.board.announce(
            &self.tenant,
            PodEvent {
                key: spec.key.clone(),
                severity: announcement.severity,
                reason: announcement.reason.to_owned(),
                message: announcement.message,
                container,
                at: self.clock.now(),
            },
        );
    }
}

/// An address as statuses carry it.
pub fn addressing(pod: Ipv4Addr, host: std::net::IpAddr, identity: Option<String>) -> Addressing {
    Addressing {
        pod_ip: pod.into(),
        host_ip: host,
        identity,
    }
}

#[cfg(test)]
mod tests;
