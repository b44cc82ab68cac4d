//! A pod's status, from what its host reports: what `kubectl get pod` shows.
//!
//! Pure; called by the pod's driver whenever something changed. [`status`]
//! computes the whole status, [`patch()`] what has to be written of it.
//!
//! What always holds:
//! - a phase never leaves `Succeeded` or `Failed`, and never falls back from
//!   `Running` to `Pending`;
//! - conditions of others, `qosClass` and everything this module does not know
//!   are left as they are;
//! - a condition's transition time changes only with its status.

mod patch;
mod phase;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState as PodContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus as PodContainerStatus, HostIP, Pod, PodCondition, PodIP,
        PodSpec, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
pub(crate) use patch::patch;
pub(crate) use phase::Phase;
use pool_agent_api::{
    SandboxStatus,
    spec::MeshMode,
    status::{ContainerState, ContainerStatus, MeshState, SandboxState, Terminated},
};

use super::record::{self, Record};
use crate::placement::Waiting;

/// The end of a pod that was decided here, not by its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// Why a container that no host has yet is waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holdup {
    /// None: all of them.
    pub(crate) container: Option<String>,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// What is known of the pod now.
pub(crate) struct Observed<'a> {
    pub(crate) pod: &'a Pod,
    /// Where it was placed, if it was.
    pub(crate) record: Option<&'a Record>,
    /// The current attempt's report.
    pub(crate) sandbox: Option<&'a SandboxStatus>,
    pub(crate) verdict: Option<&'a Verdict>,
    pub(crate) holdup: Option<&'a Holdup>,
    /// Why it has no host yet, if that is worth telling.
    pub(crate) waiting: Option<Waiting>,
    /// The host of the sandbox has not been heard for a while.
    pub(crate) host_lost: bool,
    /// Nobody has decided yet that what its containers came to is its result: until
    /// then the phase is not final.
    pub(crate) unsettled: bool,
    /// Nothing of it runs, and nothing will: the phase has to be final.
    pub(crate) ended: bool,
    pub(crate) now: Timestamp,
}

const PENDING: &str = "ContainerCreating";
const INITIALIZING: &str = "PodInitializing";

/// The pod's whole status as it should be.
pub(crate) fn status(observed: &Observed<'_>) -> PodStatus {
    let pod = observed.pod;
    let before = pod.status.clone().unwrap_or_default();
    let spec = pod.spec.clone().unwrap_or_default();
    let old_phase = Phase::parse(before.phase.as_deref());
    let reported = observed.sandbox;

    let mut init = containers(
        spec.init_containers.as_deref().unwrap_or_default(),
        reported.map(|s| s.init_containers.as_slice()),
        before.init_container_statuses.as_deref(),
        observed.holdup,
        true,
        false,
    );
    let mut app = containers(
        &spec.containers,
        reported.map(|s| s.containers.as_slice()),
        before.container_statuses.as_deref(),
        observed.holdup,
        false,
        !init.is_empty(),
    );
    if observed.ended {
        settle(&mut init, &mut app, observed.now);
    }
    let computed = match observed.verdict {
        Some(_) => Phase::Failed,
        None if reported.is_some_and(ended_by_host) => Phase::Failed,
        None => phase::phase(&spec, &init, &app, observed.ended),
    };
    let phase = if computed.is_final() && observed.unsettled && observed.verdict.is_none() {
        old_phase
    } else {
        old_phase.advance(computed)
    };
    if observed.host_lost && !phase.is_final() {
        for container in init.iter_mut().chain(&mut app) {
            container.ready = false;
        }
    }
    if phase.is_final() {
        for container in &mut app {
            container.ready = false;
        }
    }

    let mut next = before.clone();
    next.phase = Some(phase.as_str().to_owned());
    match (observed.verdict, reported) {
        // A final phase keeps what was said when it was reached.
        _ if old_phase.is_final() => {}
        (Some(verdict), _) => {
            next.reason = Some(verdict.reason.clone());
            next.message = Some(verdict.message.clone());
        }
        (None, Some(sandbox)) => {
            next.reason = filled(&sandbox.reason);
            next.message = filled(&sandbox.message);
        }
        (None, None) => {}
    }
    if let Some(sandbox) = reported {
        let host = sandbox.host_ip.to_string();
        next.host_ips = Some(vec![HostIP { ip: host.clone() }]);
        next.host_ip = Some(host);
        if let Some(ip) = sandbox.pod_ip {
            let ip = ip.to_string();
            next.pod_ips = Some(vec![PodIP { ip: ip.clone() }]);
            next.pod_ip = Some(ip);
        }
    }
    if next.start_time.is_none() {
        next.start_time = Some(Time(whole_seconds(
            reported.map_or(observed.now, |sandbox| sandbox.accepted_at),
        )));
    }
    next.observed_generation = pod.metadata.generation;
    next.conditions = Some(conditions(observed, &before, &spec, phase, &init, &app));
    // A pod that was refused never had containers: a kubelet reports none either.
    if observed.verdict.is_none() || reported.is_some() {
        if !init.is_empty() {
            next.init_container_statuses = Some(init);
        }
        next.container_statuses = Some(app);
    }
    next
}

/// As it was told.
pub(crate) fn is_ready(status: &PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The host ended the pod for good, whatever its containers did.
pub(crate) fn ended_by_host(sandbox: &SandboxStatus) -> bool {
    sandbox.state == SandboxState::Stopped
        && ["DeadlineExceeded", "Evicted"].contains(&sandbox.reason.as_str())
}

fn filled(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|t| !t.is_empty())
}

/// Kubernetes writes times in seconds; finer ones would differ from what is
/// read back for ever.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn containers(
    specs: &[Container],
    reported: Option<&[ContainerStatus]>,
    before: Option<&[PodContainerStatus]>,
    holdup: Option<&Holdup>,
    init: bool,
    after_init: bool,
) -> Vec<PodContainerStatus> {
    specs
        .iter()
        .map(|spec| {
            let old = before.and_then(|list| list.iter().find(|c| c.name == spec.name));
            let new = reported.and_then(|list| list.iter().find(|c| c.name.as_str() == spec.name));
            match (new, old) {
                (Some(new), old) => container(new, spec, old, init),
                // It is known to have run: only its host may say otherwise.
                (None, Some(old)) if !waits(old) => old.clone(),
                (None, _) => waiting(spec, holdup, old, after_init),
            }
        })
        .collect()
}

fn waits(container: &PodContainerStatus) -> bool {
    container
        .state
        .as_ref()
        .is_none_or(|s| s.running.is_none() && s.terminated.is_none())
}

fn waiting(
    spec: &Container,
    holdup: Option<&Holdup>,
    old: Option<&PodContainerStatus>,
    after_init: bool,
) -> PodContainerStatus {
    let holdup = holdup.filter(|h| h.container.as_ref().is_none_or(|c| *c == spec.name));
    let (reason, message) = match holdup {
        Some(holdup) => (holdup.reason.as_str(), filled(&holdup.message)),
        None if after_init => (INITIALIZING, None),
        None => (PENDING, None),
    };
    PodContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        restart_count: old.map_or(0, |c| c.restart_count),
        last_state: Some(old.and_then(|c| c.last_state.clone()).unwrap_or_default()),
        started: Some(false),
        state: Some(PodContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.to_owned()),
                message,
            }),
            ..PodContainerState::default()
        }),
        ..PodContainerStatus::default()
    }
}

fn container(
    new: &ContainerStatus,
    spec: &Container,
    old: Option<&PodContainerStatus>,
    init: bool,
) -> PodContainerStatus {
    let state = match &new.state {
        ContainerState::Waiting { reason, message } => PodContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: filled(reason),
                message: filled(message),
            }),
            ..PodContainerState::default()
        },
        ContainerState::Running { started_at } => PodContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(Time(whole_seconds(*started_at))),
            }),
            ..PodContainerState::default()
        },
        ContainerState::Terminated(t) => terminated(t),
    };
    let finished = matches!(&new.state, ContainerState::Terminated(t) if t.exit_code == 0);
    let regular_init = init && spec.restart_policy.as_deref() != Some("Always");
    PodContainerStatus {
        name: spec.name.clone(),
        image: if new.image.is_empty() {
            spec.image.clone().unwrap_or_default()
        } else {
            new.image.clone()
        },
        image_id: new.image_id.clone(),
        container_id: filled(&new.container_id),
        // An init container is ready once it has done its work.
        ready: if regular_init { finished } else { new.ready },
        started: Some(new.started),
        // A new attempt counts from what was already told.
        restart_count: i32::try_from(new.restart_count)
            .unwrap_or(i32::MAX)
            .max(old.map_or(0, |c| c.restart_count)),
        state: Some(state),
        last_state: Some(match &new.last_terminated {
            Some(t) => terminated(t),
            None => PodContainerState::default(),
        }),
        resources: spec
            .resources
            .clone()
            .filter(|r| r.limits.is_some() || r.requests.is_some()),
        ..PodContainerStatus::default()
    }
}

fn terminated(t: &Terminated) -> PodContainerState {
    PodContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: filled(&t.container_id),
            exit_code: t.exit_code,
            signal: Some(t.signal).filter(|s| *s != 0),
            reason: filled(&t.reason),
            message: filled(&t.message),
            started_at: t.started_at.map(|at| Time(whole_seconds(at))),
            finished_at: Some(Time(whole_seconds(t.finished_at))),
        }),
        ..PodContainerState::default()
    }
}

/// Nothing runs any more: a container whose end nobody saw has ended all the same.
fn settle(init: &mut [PodContainerStatus], app: &mut [PodContainerStatus], now: Timestamp) {
    for container in init.iter_mut().chain(app) {
        container.ready = false;
        container.started = Some(false);
        let Some(state) = &container.state else { continue };
        let Some(running) = &state.running else { continue };
        container.state = Some(PodContainerState {
            terminated: Some(ContainerStateTerminated {
                container_id: container.container_id.clone(),
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".into()),
                message: Some("The container could not be located when the pod was terminated".into()),
                started_at: running.started_at.clone(),
                finished_at: Some(Time(whole_seconds(now))),
                signal: None,
            }),
            ..PodContainerState::default()
        });
    }
}

/// What this module decides of a condition.
struct Condition {
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
}

fn conditions(
    observed: &Observed<'_>,
    before: &PodStatus,
    spec: &PodSpec,
    phase: Phase,
    init: &[PodContainerStatus],
    app: &[PodContainerStatus],
) -> Vec<PodCondition> {
    let mut conditions = before.conditions.clone().unwrap_or_default();
    let containers_ready = containers_ready(observed, spec, phase, init, app);
    let ready = ready(spec, &conditions, &containers_ready);
    let ours = [
        ready_to_start(observed),
        initialized(spec, phase, init, app),
        containers_ready,
        ready,
    ];
    let generation = observed.pod.metadata.generation;
    // A newer attempt on record is another process's, and is never written over.
    let newest = Record::of(observed.pod).map(|r| r.place.attempt);
    let record = observed.record.filter(|r| Some(r.place.attempt) >= newest);
    let found = host_found(observed, before);
    for condition in ours
        .into_iter()
        .chain(record.map(placed))
        .chain(record.and_then(handed_over))
        .chain(found)
        .chain(disrupted(observed))
    {
        set(&mut conditions, condition, generation, observed.now);
    }
    conditions
}

/// The status with the placement on record in it.
pub(crate) fn on_record(mut status: PodStatus, record: &Record, pod: &Pod, now: Timestamp) -> PodStatus {
    let conditions = status.conditions.get_or_insert_default();
    set(conditions, placed(record), pod.metadata.generation, now);
    if let Some(other) = handed_over(record) {
        set(conditions, other, pod.metadata.generation, now);
    }
    status
}

fn set(conditions: &mut Vec<PodCondition>, new: Condition, generation: Option<i64>, now: Timestamp) {
    let status = if new.holds { "True" } else { "False" };
    let old = conditions.iter().position(|c| c.type_ == new.kind);
    let since = old
        .map(|i| &conditions[i])
        .filter(|c| c.status == status)
        .and_then(|c| c.last_transition_time.clone());
    let new = PodCondition {
        type_: new.kind.to_owned(),
        status: status.to_owned(),
        reason: filled(new.reason),
        message: filled(&new.message),
        last_transition_time: Some(since.unwrap_or_else(|| Time(whole_seconds(now)))),
        last_probe_time: None,
        observed_generation: generation,
    };
    match old {
        Some(i) => conditions[i] = new,
        None => conditions.push(new),
    }
}

fn placed(record: &Record) -> Condition {
    Condition {
        kind: record::CONDITION,
        holds: true,
        reason: record.reason(),
        message: record.message(),
    }
}

fn handed_over(record: &Record) -> Option<Condition> {
    let other = record.other.as_ref()?;
    Some(Condition {
        kind: record::HANDOVER,
        holds: other.beside.is_some(),
        reason: other.reason(),
        message: other.message(),
    })
}

/// The reason of a pod that its host had to give up, and that may not run again; a
/// kubelet's own word for what it ends when its machine shuts down.
pub(crate) const TERMINATED: &str = "Terminated";

/// Who looks after Jobs counts such an end as no failure of the pod's.
fn disrupted(observed: &Observed<'_>) -> Option<Condition> {
    let verdict = observed.verdict.filter(|verdict| verdict.reason == TERMINATED)?;
    Some(Condition {
        kind: "DisruptionTarget",
        holds: true,
        reason: "TerminationByKubelet",
        message: verdict.message.clone(),
    })
}

/// Says why there is no host for the pod. Written only of one that has waited for long
/// enough to be told so.
const HOST_FOUND: &str = "spindrift.dev/HostFound";

fn host_found(observed: &Observed<'_>, before: &PodStatus) -> Option<Condition> {
    if let Some(waiting) = &observed.waiting {
        return Some(Condition {
            kind: HOST_FOUND,
            holds: false,
            reason: waiting.reason,
            message: waiting.message.clone(),
        });
    }
    let waited = before.conditions.iter().flatten().any(|c| c.type_ == HOST_FOUND);
    (waited && observed.sandbox.is_some()).then(|| Condition {
        kind: HOST_FOUND,
        holds: true,
        reason: "HostFound",
        message: String::new(),
    })
}

/// KEP-3085: the sandbox has its network; here also: its mesh attachment serves.
fn ready_to_start(observed: &Observed<'_>) -> Condition {
    let holds = observed.sandbox.is_some_and(|s| {
        let attached = !outside_mesh(observed) && (s.identity.is_none() || s.mesh >= MeshState::Serving);
        s.pod_ip.is_some() && attached && matches!(s.state, SandboxState::Running | SandboxState::Stopping)
    });
    Condition {
        kind: "PodReadyToStartContainers",
        holds: holds && !observed.ended,
        reason: "",
        message: String::new(),
    }
}

/// Its host runs it without the identity it was placed with.
fn outside_mesh(observed: &Observed<'_>) -> bool {
    let enrolled = observed.record.is_some_and(|r| r.mesh == MeshMode::Enrolled);
    enrolled
        && observed
            .sandbox
            .is_some_and(|s| s.identity.is_none() && s.state == SandboxState::Running)
}

fn initialized(
    spec: &PodSpec,
    phase: Phase,
    init: &[PodContainerStatus],
    app: &[PodContainerStatus],
) -> Condition {
    let kind = "Initialized";
    let done = |holds, reason| Condition {
        kind,
        holds,
        reason,
        message: String::new(),
    };
    if phase == Phase::Succeeded {
        return done(true, "PodCompleted");
    }
    let specs = spec.init_containers.iter().flatten();
    let incomplete: Vec<&str> = specs
        .zip(init)
        .filter(|(spec, status)| {
            if spec.restart_policy.as_deref() == Some("Always") {
                status.started != Some(true)
            } else {
                let exited = status.state.as_ref().and_then(|s| s.terminated.as_ref());
                exited.is_none_or(|t| t.exit_code != 0)
            }
        })
        .map(|(_, status)| status.name.as_str())
        .collect();
    // App containers only start once initialised, so one that has started settles it.
    if incomplete.is_empty() || app.iter().any(|c| !waits(c) || c.restart_count > 0) {
        return done(true, "");
    }
    Condition {
        kind,
        holds: false,
        reason: "ContainersNotInitialized",
        message: format!("containers with incomplete status: [{}]", incomplete.join(" ")),
    }
}

fn containers_ready(
    observed: &Observed<'_>,
    spec: &PodSpec,
    phase: Phase,
    init: &[PodContainerStatus],
    app: &[PodContainerStatus],
) -> Condition {
    let kind = "ContainersReady";
    let not = |reason, message| Condition {
        kind,
        holds: false,
        reason,
        message,
    };
    match phase {
        Phase::Succeeded => return not("PodCompleted", String::new()),
        Phase::Failed => return not("PodFailed", String::new()),
        Phase::Pending | Phase::Running => {}
    }
    if observed.host_lost {
        return not("HostUnreachable", "the host of the pod has not been heard".into());
    }
    if outside_mesh(observed) {
        return not(
            "OutsideMesh",
            "the host of the pod reports no identity of it".into(),
        );
    }
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .zip(init)
        .filter(|(spec, _)| spec.restart_policy.as_deref() == Some("Always"))
        .map(|(_, status)| status);
    let unready: Vec<&str> = sidecars
        .chain(app)
        .filter(|c| !c.ready)
        .map(|c| c.name.as_str())
        .collect();
    if unready.is_empty() {
        Condition {
            kind,
            holds: true,
            reason: "",
            message: String::new(),
        }
    } else {
        not(
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        )
    }
}

/// Ready: its containers are, and so says every readiness gate.
fn ready(spec: &PodSpec, conditions: &[PodCondition], containers: &Condition) -> Condition {
    let mut ready = Condition {
        kind: "Ready",
        holds: containers.holds,
        reason: containers.reason,
        message: containers.message.clone(),
    };
    if !ready.holds {
        return ready;
    }
    let closed: Vec<String> = spec
        .readiness_gates
        .iter()
        .flatten()
        .filter_map(
            |gate| match conditions.iter().find(|c| c.type_ == gate.condition_type) {
                None => Some(format!(
                    "corresponding condition of pod readiness gate {:?} does not exist.",
                    gate.condition_type
                )),
                Some(c) if c.status != "True" => Some(format!(
                    "the status of pod readiness gate {:?} is not \"True\", but {}",
                    gate.condition_type, c.status
                )),
                Some(_) => None,
            },
        )
        .collect();
    if !closed.is_empty() {
        ready.holds = false;
        ready.reason = "ReadinessGatesNotReady";
        ready.message = closed.join(", ");
    }
    ready
}

#[cfg(test)]
mod tests;
