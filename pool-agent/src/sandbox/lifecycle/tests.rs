use std::collections::{BTreeMap, BTreeSet};

use pool_agent_api::{spec::SandboxParts, status::ContainerState};
use proptest::prelude::*;

use super::{
    tests_support::{container, spec},
    *,
};
use crate::sandbox::event::{Pulled, Started};

const STARTED_AT: i64 = 1_700_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(STARTED_AT + seconds).unwrap()
}

fn end(exit_code: i32, finished: Timestamp) -> Terminated {
    Terminated {
        exit_code,
        signal: 0,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.into(),
        message: String::new(),
        started_at: Some(finished),
        finished_at: finished,
        container_id: String::new(),
    }
}

fn trouble(reason: &'static str) -> Trouble {
    Trouble::new(reason, "it did not work")
}

/// A lifecycle with a world that does at once what it is asked, unless told not to.
struct Story {
    lifecycle: Lifecycle,
    now: Timestamp,
    /// Everything asked for, in order.
    asked: Vec<Effect>,
    /// Images that are not on the host, and what a pull of them says.
    missing: BTreeMap<usize, Result<(), Trouble>>,
    /// Effects whose answers are kept back.
    keep_back: fn(&Effect) -> bool,
    kept: Vec<Effect>,
    runs: u32,
}

impl Story {
    fn of(change: impl FnOnce(&mut SandboxParts)) -> Self {
        Self {
            lifecycle: Lifecycle::new(Arc::new(spec("u-1", change)), at(0)),
            now: at(0),
            asked: vec![],
            missing: BTreeMap::new(),
            keep_back: |_| false,
            kept: vec![],
            runs: 0,
        }
    }

    /// Admitted, attached, and as far as it goes by itself.
    fn begun(mut self) -> Self {
        self.tell(Event::Begin);
        self.tell(Event::Attachment(MeshState::Serving));
        self
    }

    fn tell(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let (next, effects) = self.lifecycle.clone().step(event, self.now);
            self.lifecycle = next;
            for effect in effects {
                self.asked.push(effect.clone());
                if (self.keep_back)(&effect) {
                    self.kept.push(effect);
                } else {
                    events.extend(self.answer(effect));
                }
            }
        }
    }

    fn answer(&mut self, effect: Effect) -> Option<Event> {
        Some(match effect {
            Effect::PrepareVolumes => Event::VolumesPrepared(Ok(())),
            Effect::RunSandbox => Event::SandboxRan(Ok(SandboxId("s".into()))),
            Effect::CheckImage(slot) => Event::ImageChecked(
                slot,
                Ok((!self.missing.contains_key(&slot.0)).then(|| "sha256:1".into())),
            ),
            Effect::PullImage(slot) => Event::ImagePulled(
                slot,
                self.missing
                    .get(&slot.0)
                    .cloned()
                    .unwrap_or(Ok(()))
                    .map(|()| Pulled {
                        image_id: "sha256:2".into(),
                        took: Duration::from_secs(1),
                        bytes: 7,
                    }),
            ),
            Effect::StartContainer { slot, .. } => {
                self.runs += 1;
                Event::ContainerStarted(
                    slot,
                    Ok(Started {
                        id: ContainerId(format!("c{}", self.runs)),
                        image_id: "sha256:1".into(),
                        started_at: self.now,
                    }),
                )
            }
            Effect::RunHook { slot, id, kind, .. } => Event::HookRan(slot, id, kind, Ok(())),
            Effect::StopContainer { slot, id, .. } => Event::ContainerExited(slot, id, end(143, self.now)),
            Effect::RemoveContainer { .. } => Event::ContainerRemoved,
            Effect::TearDown(what) => Event::TornDown(what, Ok(())),
            Effect::Remove => Event::Removed(Ok(())),
            Effect::Announce(_) => return None,
        })
    }

    fn release(&mut self) {
        self.keep_back = |_| false;
        for effect in std::mem::take(&mut self.kept) {
            if let Some(event) = self.answer(effect) {
                self.tell(event);
            }
        }
    }

    fn pass(&mut self, seconds: u64) {
        let until = after(self.now, Duration::from_secs(seconds));
        while let Some(due) = self.lifecycle.wake_at(self.now).filter(|due| *due <= until) {
            self.now = due;
            self.tell(Event::Tick);
        }
        self.now = until;
        self.tell(Event::Tick);
    }

    fn exits(&mut self, slot: usize, code: i32) {
        let (id, _) = self.lifecycle.run_of(Slot(slot)).unwrap();
        let now = self.now;
        self.tell(Event::ContainerExited(Slot(slot), id, end(code, now)));
    }

    fn starts(&self) -> Vec<usize> {
        self.asked
            .iter()
            .filter_map(|e| match e {
                Effect::StartContainer { slot, .. } => Some(slot.0),
                _ => None,
            })
            .collect()
    }

    fn stops(&self) -> Vec<(usize, u64)> {
        self.asked
            .iter()
            .filter_map(|e| match e {
                Effect::StopContainer { slot, grace, .. } => Some((slot.0, grace.as_secs())),
                _ => None,
            })
            .collect()
    }

    fn told(&self) -> Vec<&'static str> {
        self.asked
            .iter()
            .filter_map(|e| match e {
                Effect::Announce(a) => Some(a.reason),
                _ => None,
            })
            .collect()
    }

    fn shows(&self, slot: usize) -> String {
        let status = self.lifecycle.status(&crate::sandbox::status::Addressing {
            pod_ip: "10.0.0.2".parse().unwrap(),
            host_ip: "192.0.2.1".parse().unwrap(),
            identity: None,
        });
        let all: Vec<_> = status.init_containers.iter().chain(&status.containers).collect();
        match &all[slot].state {
            ContainerState::Waiting { reason, .. } => reason.clone(),
            ContainerState::Running { .. } => "running".into(),
            ContainerState::Terminated(t) => format!("terminated {}", t.exit_code),
        }
    }
}

#[test]
fn a_pod_starts_once_volumes_sandbox_and_mesh_are_there() {
    let mut story = Story::of(|_| {});
    story.tell(Event::Begin);
    assert_eq!(story.starts(), [0; 0]);
    assert_eq!(story.shows(0), "ContainerCreating");
    for state in [MeshState::Redirected, MeshState::Identified] {
        story.tell(Event::Attachment(state));
        assert_eq!(story.starts(), [0; 0]);
    }
    assert_eq!(story.lifecycle.state(), SandboxState::Preparing);
    story.tell(Event::Attachment(MeshState::Serving));
    assert_eq!(story.starts(), [0]);
    assert_eq!(story.lifecycle.state(), SandboxState::Running);
    assert_eq!(story.told(), ["Pulled", "Created", "Started"]);
}

#[test]
fn no_container_starts_again_while_its_attachment_does_not_serve() {
    let mut story = Story::of(|_| {}).begun();
    story.tell(Event::Attachment(MeshState::Redirected));
    story.exits(0, 1);
    story.pass(60);
    assert_eq!(story.starts(), [0]);
    story.tell(Event::Attachment(MeshState::Serving));
    assert_eq!(story.starts(), [0, 0]);
}

#[test]
fn init_containers_run_one_by_one_and_a_sidecar_only_has_to_be_started() {
    let mut story = Story::of(|parts| {
        let mut sidecar = container("proxy");
        sidecar.restartable_init = true;
        parts.init_containers = vec![container("first"), sidecar, container("second")];
        parts.containers.push(container("other"));
    })
    .begun();
    assert_eq!(story.starts(), [0]);
    assert_eq!(story.shows(3), "PodInitializing");
    story.exits(0, 0);
    assert_eq!(story.starts(), [0, 1, 2]);
    story.exits(2, 0);
    assert_eq!(story.starts(), [0, 1, 2, 3, 4]);
}

#[test]
fn an_app_container_waits_for_the_post_start_hook_of_the_one_before() {
    let mut story = Story::of(|parts| {
        parts.containers[0].post_start = Some(Hook::Sleep(Duration::from_secs(1)));
        parts.containers.push(container("other"));
    });
    story.keep_back = |e| matches!(e, Effect::RunHook { .. });
    let mut story = story.begun();
    assert_eq!(story.starts(), [0]);
    story.release();
    assert_eq!(story.starts(), [0, 1]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let mut story = Story::of(|parts| {
        parts.init_containers = vec![container("first")];
        parts.restart_policy = RestartPolicy::Never;
    })
    .begun();
    story.exits(0, 3);
    assert_eq!(story.lifecycle.state(), SandboxState::Stopped);
    assert_eq!(story.starts(), [0]);
    assert_eq!(story.shows(0), "terminated 3");
}

#[test]
fn a_crashing_container_starts_again_at_once_and_then_backs_off() {
    let mut story = Story::of(|_| {}).begun();
    story.exits(0, 1);
    assert_eq!(story.starts(), [0, 0]);
    story.exits(0, 1);
    assert_eq!(story.starts(), [0, 0]);
    assert_eq!(story.shows(0), "CrashLoopBackOff");
    story.pass(9);
    assert_eq!(story.starts(), [0, 0]);
    story.pass(1);
    assert_eq!(story.starts(), [0, 0, 0]);
    story.exits(0, 1);
    story.pass(19);
    assert_eq!(story.starts().len(), 3);
    story.pass(1);
    assert_eq!(story.starts().len(), 4);
    assert_eq!(story.told().iter().filter(|r| **r == "BackOff").count(), 2);
    let removed = story
        .asked
        .iter()
        .filter(|e| matches!(e, Effect::RemoveContainer { .. }));
    assert_eq!(removed.count(), 2, "of the dead runs one is kept for its log");
}

#[test]
fn what_restarts_follows_the_policy() {
    for (policy, code, starts, state) in [
        (RestartPolicy::Always, 0, 2, SandboxState::Running),
        (RestartPolicy::OnFailure, 1, 2, SandboxState::Running),
        (RestartPolicy::OnFailure, 0, 1, SandboxState::Stopped),
        (RestartPolicy::Never, 1, 1, SandboxState::Stopped),
    ] {
        let mut story = Story::of(|parts| parts.restart_policy = policy).begun();
        story.exits(0, code);
        assert_eq!(
            (story.starts().len(), story.lifecycle.state()),
            (starts, state),
            "{policy:?} {code}"
        );
    }
}

#[test]
fn a_pull_that_fails_reads_as_kubectl_users_know_it() {
    let mut story = Story::of(|_| {});
    story.missing.insert(0, Err(trouble("ErrImagePull")));
    let mut story = story.begun();
    assert_eq!(story.shows(0), "ErrImagePull");
    assert_eq!(story.told(), ["Pulling", "Failed", "Failed"]);
    story.pass(3);
    assert_eq!(story.shows(0), "ImagePullBackOff");
    assert_eq!(story.told()[3..], ["BackOff", "Failed"]);
    story.missing.insert(0, Ok(()));
    story.pass(10);
    assert_eq!(story.shows(0), "running");
}

#[test]
fn an_image_that_may_not_be_pulled_says_so() {
    let mut story = Story::of(|parts| parts.containers[0].pull_policy = PullPolicy::Never);
    story.missing.insert(0, Ok(()));
    let story = story.begun();
    assert_eq!(story.shows(0), "ErrImageNeverPull");
    assert!(!story.asked.iter().any(|e| matches!(e, Effect::PullImage(_))));
}

#[test]
fn a_pull_that_the_pods_end_cuts_off_is_no_failure() {
    let mut story = Story::of(|parts| parts.containers[0].pull_policy = PullPolicy::Always);
    story.keep_back = |e| matches!(e, Effect::PullImage(_));
    let mut story = story.begun();
    story.tell(Event::Stop {
        grace: Duration::from_secs(1),
    });
    story.tell(Event::ImagePulled(Slot(0), Err(trouble("ErrImagePull"))));
    assert_eq!(story.told(), ["Pulling"]);
}

#[test]
fn a_container_that_cannot_be_made_disturbs_no_other() {
    let mut story = Story::of(|parts| parts.containers.push(container("other")));
    story.keep_back = |e| matches!(e, Effect::StartContainer { slot: Slot(0), .. });
    let mut story = story.begun();
    story.keep_back = |_| false;
    story.kept.clear();
    let refused = StartFailure::NotCreated(trouble("CreateContainerConfigError"));
    story.tell(Event::ContainerStarted(Slot(0), Err(refused)));
    assert_eq!(story.shows(0), "CreateContainerConfigError");
    assert_eq!(story.shows(1), "running");
    story.pass(10);
    assert_eq!(story.shows(0), "running");
}

fn probe() -> Probe {
    Probe {
        action: pool_agent_api::spec::Action::Tcp { host: None, port: 1 },
        initial_delay: Duration::ZERO,
        period: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        thresholds: pool_agent_api::spec::Thresholds {
            success: 1,
            failure: 1,
        },
        termination_grace: Some(Duration::from_secs(5)),
    }
}

#[test]
fn a_startup_probe_holds_back_the_others_and_liveness_restarts() {
    let mut story = Story::of(|parts| {
        let app = &mut parts.containers[0];
        app.startup_probe = Some(probe());
        app.liveness_probe = Some(probe());
        app.readiness_probe = Some(probe());
    })
    .begun();
    let kinds = |story: &Story| -> BTreeSet<ProbeKind> {
        story
            .lifecycle
            .probes()
            .into_iter()
            .map(|(_, _, kind)| kind)
            .collect()
    };
    assert_eq!(kinds(&story), BTreeSet::from([ProbeKind::Startup]));
    let id = ContainerId("c1".into());
    story.tell(Event::Probed(
        Slot(0),
        id.clone(),
        ProbeKind::Startup,
        Verdict::Passing,
    ));
    assert_eq!(
        kinds(&story),
        BTreeSet::from([ProbeKind::Liveness, ProbeKind::Readiness])
    );
    story.tell(Event::Probed(
        Slot(0),
        id.clone(),
        ProbeKind::Liveness,
        Verdict::Failing,
    ));
    assert_eq!(story.stops(), [(0, 5)]);
    assert_eq!(story.starts(), [0, 0]);
    // A verdict on the run before counts for nothing.
    story.tell(Event::Probed(Slot(0), id, ProbeKind::Liveness, Verdict::Failing));
    assert_eq!(story.stops().len(), 1);
}

#[test]
fn a_stop_runs_the_hook_within_the_grace_and_sidecars_go_last_in_reverse() {
    let mut story = Story::of(|parts| {
        let sidecar = |name| {
            let mut sidecar = container(name);
            sidecar.restartable_init = true;
            sidecar
        };
        parts.init_containers = vec![sidecar("a"), sidecar("b")];
        parts.containers[0].pre_stop = Some(Hook::Sleep(Duration::from_secs(3)));
    })
    .begun();
    story.keep_back = |e| matches!(e, Effect::RunHook { .. });
    story.tell(Event::Stop {
        grace: Duration::from_secs(30),
    });
    assert_eq!(story.stops(), []);
    story.pass(3);
    story.release();
    assert_eq!(story.stops(), [(2, 27), (1, 27), (0, 27)]);
    assert_eq!(story.lifecycle.state(), SandboxState::Stopped);
    let torn: Vec<_> = story
        .asked
        .iter()
        .filter_map(|e| match e {
            Effect::TearDown(what) => Some(*what),
            _ => None,
        })
        .collect();
    assert_eq!(
        torn,
        [
            Teardown::Sandbox,
            Teardown::Attachment,
            Teardown::Network,
            Teardown::Volumes
        ]
    );
}

#[test]
fn a_hook_that_outlasts_the_grace_leaves_the_container_two_seconds() {
    let mut story = Story::of(|parts| {
        parts.containers[0].pre_stop = Some(Hook::Sleep(Duration::from_secs(60)));
    })
    .begun();
    story.keep_back = |e| matches!(e, Effect::RunHook { .. });
    story.tell(Event::Stop {
        grace: Duration::from_secs(10),
    });
    story.pass(10);
    assert_eq!(story.stops(), [(0, 2)]);
}

#[test]
fn a_fence_ends_a_pod_at_once_whatever_grace_it_was_given_and_says_why() {
    let mut fenced = Story::of(|_| {}).begun();
    fenced.tell(Event::Fence);
    assert_eq!(fenced.stops(), [(0, 0)]);
    assert_eq!(fenced.lifecycle.reason, "Fenced");
    assert_eq!(fenced.lifecycle.state(), SandboxState::Stopped);

    let mut story = Story::of(|_| {}).begun();
    story.keep_back = |e| matches!(e, Effect::StopContainer { .. });
    story.tell(Event::Stop {
        grace: Duration::from_secs(600),
    });
    story.tell(Event::Fence);
    assert_eq!(story.stops(), [(0, 600), (0, 0)]);
    assert_eq!(story.lifecycle.reason, "", "it was ending already");
}

#[test]
fn a_shorter_grace_hastens_and_a_longer_one_does_not_slow() {
    let mut story = Story::of(|_| {}).begun();
    story.keep_back = |e| matches!(e, Effect::StopContainer { .. });
    for (grace, stops) in [
        (30, vec![(0, 30)]),
        (60, vec![(0, 30)]),
        (5, vec![(0, 30), (0, 5)]),
    ] {
        story.tell(Event::Stop {
            grace: Duration::from_secs(grace),
        });
        assert_eq!(story.stops(), stops);
    }
    story.tell(Event::Forget);
    assert_eq!(story.stops().last(), Some(&(0, 0)), "forgotten: killed at once");
    story.release();
    assert!(story.lifecycle.gone());
}

#[test]
fn a_stop_that_the_runtime_refuses_is_asked_again() {
    let mut story = Story::of(|_| {}).begun();
    story.keep_back = |e| matches!(e, Effect::StopContainer { .. });
    story.tell(Event::Stop {
        grace: Duration::ZERO,
    });
    let id = ContainerId("c1".into());
    story.tell(Event::StopAnswered(Slot(0), id, Err(trouble("FailedKillPod"))));
    story.pass(1);
    assert_eq!(story.stops().len(), 2);
}

#[test]
fn a_pod_past_its_deadline_ends_with_that_reason() {
    let mut story = Story::of(|parts| parts.active_deadline = Some(Duration::from_secs(100))).begun();
    story.pass(99);
    assert_eq!(story.lifecycle.state(), SandboxState::Running);
    story.pass(1);
    assert_eq!(story.lifecycle.state(), SandboxState::Stopped);
    assert_eq!(story.lifecycle.reason, "DeadlineExceeded");
}

#[test]
fn a_teardown_that_fails_is_tried_again_where_it_stopped() {
    let mut story = Story::of(|_| {}).begun();
    story.keep_back = |e| matches!(e, Effect::TearDown(Teardown::Network));
    story.tell(Event::Stop {
        grace: Duration::ZERO,
    });
    story.kept.clear();
    story.keep_back = |_| false;
    story.tell(Event::TornDown(Teardown::Network, Err(trouble("FailedKillPod"))));
    assert_eq!(story.lifecycle.state(), SandboxState::Stopping);
    story.pass(1);
    assert_eq!(story.lifecycle.state(), SandboxState::Stopped);
}

fn found(state: FoundState, ready: bool) -> FoundRun {
    FoundRun {
        slot: Slot(0),
        id: ContainerId("c9".into()),
        restart: 3,
        image_id: "sha256:1".into(),
        created_at: at(0),
        state,
        was_started: true,
        was_ready: ready,
    }
}

#[test]
fn a_running_container_is_taken_over_as_it_was() {
    let found = Found {
        sandbox: Some(SandboxId("s".into())),
        had_run: true,
        stop_by: None,
        runs: vec![found(FoundState::Running { started_at: at(0) }, true)],
    };
    let mut story = Story::of(|_| {});
    story.lifecycle = Lifecycle::adopt(Arc::new(spec("u-1", |_| {})), at(0), found, at(5));
    story.now = at(5);
    assert_eq!(story.lifecycle.state(), SandboxState::Running);
    let mut story = story.begun();
    assert_eq!(story.starts(), [0; 0]);
    assert_eq!(story.shows(0), "running");
    story.exits(0, 1);
    assert_eq!(
        story.shows(0),
        "CrashLoopBackOff",
        "its fourth start has a back-off"
    );
}

#[test]
fn a_sandbox_that_died_with_the_agent_away_ends_unless_it_had_done_its_work() {
    for (policy, reason) in [(RestartPolicy::Always, "SandboxLost"), (RestartPolicy::Never, "")] {
        let spec = Arc::new(spec("u-1", |parts| parts.restart_policy = policy));
        let found = Found {
            sandbox: None,
            had_run: true,
            stop_by: None,
            runs: vec![found(FoundState::Exited(end(0, at(1))), false)],
        };
        let mut story = Story::of(|_| {});
        story.lifecycle = Lifecycle::adopt(spec, at(0), found, at(5));
        let story = story.begun();
        assert_eq!(story.lifecycle.state(), SandboxState::Stopped, "{policy:?}");
        assert_eq!(story.lifecycle.reason, reason, "{policy:?}");
        assert_eq!(story.starts(), [0; 0]);
    }
}

#[test]
fn a_stop_that_was_asked_for_goes_on_after_a_restart() {
    let found = Found {
        sandbox: Some(SandboxId("s".into())),
        had_run: true,
        stop_by: Some(at(20)),
        runs: vec![found(FoundState::Running { started_at: at(0) }, true)],
    };
    let mut story = Story::of(|_| {});
    story.now = at(5);
    story.lifecycle = Lifecycle::adopt(Arc::new(spec("u-1", |_| {})), at(0), found, at(5));
    let story = story.begun();
    assert_eq!(story.stops(), [(0, 15)]);
    assert_eq!(story.lifecycle.state(), SandboxState::Stopped);
}

/// What the outside may do at any moment.
#[derive(Debug, Clone)]
enum Turn {
    /// One of the effects under way is answered, well or badly.
    Answer(prop::sample::Index, bool),
    Exit(prop::sample::Index, bool),
    Mesh(MeshState),
    Probe(prop::sample::Index, bool),
    Lost,
    Stop(u64),
    Forget,
    Pass(u16),
}

fn turn() -> impl Strategy<Value = Turn> {
    let mesh = prop::sample::select(vec![
        MeshState::Detached,
        MeshState::Redirected,
        MeshState::Identified,
        MeshState::Serving,
        MeshState::Serving,
        MeshState::Serving,
        MeshState::Draining,
    ]);
    prop_oneof![
        14 => (any::<prop::sample::Index>(), prop::bool::weighted(0.8)).prop_map(|(i, ok)| Turn::Answer(i, ok)),
        4 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(i, ok)| Turn::Exit(i, ok)),
        3 => mesh.prop_map(Turn::Mesh),
        2 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(i, ok)| Turn::Probe(i, ok)),
        1 => Just(Turn::Lost),
        1 => (0u64..60).prop_map(Turn::Stop),
        1 => Just(Turn::Forget),
        4 => (0u16..400).prop_map(Turn::Pass),
    ]
}

/// A world in which everything goes its own way, and what must hold of it.
struct World {
    lifecycle: Lifecycle,
    now: Timestamp,
    under_way: Vec<Effect>,
    mesh: MeshState,
    sandbox: bool,
    volumes: bool,
    ending: bool,
    alive: BTreeMap<usize, ContainerId>,
    done_inits: BTreeSet<usize>,
    torn: Vec<Teardown>,
    runs: u32,
}

impl World {
    fn step(&mut self, event: Event) -> Result<(), TestCaseError> {
        let (next, effects) = self.lifecycle.clone().step(event, self.now);
        self.lifecycle = next;
        for effect in effects {
            self.holds(&effect)?;
            if !matches!(effect, Effect::Announce(_)) {
                self.under_way.push(effect);
            }
        }
        if let Some(due) = self.lifecycle.wake_at(self.now) {
            prop_assert!(due > self.now, "a timer that is already due would spin");
        }
        Ok(())
    }

    fn holds(&self, effect: &Effect) -> Result<(), TestCaseError> {
        match effect {
            Effect::StartContainer { slot, .. } => {
                prop_assert_eq!(self.mesh, MeshState::Serving, "started before it serves");
                prop_assert!(self.sandbox && self.volumes && !self.ending);
                prop_assert!(!self.alive.contains_key(&slot.0), "two runs of {:?}", slot);
                let starting = |e: &Effect| matches!(e, Effect::StartContainer { slot: s, .. } if s == slot);
                prop_assert!(!self.under_way.iter().any(starting), "started twice");
                let inits = self.lifecycle.init_count();
                for init in 0..slot.0.min(inits) {
                    let sidecar = self.lifecycle.spec.init_containers[init].restartable_init;
                    prop_assert!(
                        sidecar || self.done_inits.contains(&init),
                        "{:?} before init container {} was done",
                        slot,
                        init
                    );
                }
            }
            Effect::TearDown(what) => {
                prop_assert!(self.alive.is_empty(), "torn down over a live container");
                let starting = |e: &Effect| matches!(e, Effect::StartContainer { .. } | Effect::RunSandbox);
                prop_assert!(!self.under_way.iter().any(starting));
                let next = self
                    .torn
                    .last()
                    .map_or(Some(Teardown::Sandbox), |last| last.next());
                prop_assert_eq!(Some(*what), next, "out of order");
            }
            Effect::Remove => prop_assert_eq!(self.torn.last(), Some(&Teardown::Volumes)),
            _ => {}
        }
        Ok(())
    }

    fn answer(&mut self, effect: Effect, well: bool) -> Result<(), TestCaseError> {
        let bad = || trouble("ErrImagePull");
        let event = match effect {
            Effect::PrepareVolumes => {
                self.volumes |= well;
                Event::VolumesPrepared(well.then_some(()).ok_or_else(bad))
            }
            Effect::RunSandbox => {
                self.sandbox |= well;
                Event::SandboxRan(well.then(|| SandboxId("s".into())).ok_or_else(bad))
            }
            Effect::CheckImage(slot) => Event::ImageChecked(slot, Ok(well.then(|| "i".into()))),
            Effect::PullImage(slot) => Event::ImagePulled(
                slot,
                well.then(|| Pulled {
                    image_id: "i".into(),
                    took: Duration::ZERO,
                    bytes: 0,
                })
                .ok_or_else(bad),
            ),
            Effect::StartContainer { slot, .. } if well => {
                self.runs += 1;
                let id = ContainerId(format!("c{}", self.runs));
                self.alive.insert(slot.0, id.clone());
                Event::ContainerStarted(
                    slot,
                    Ok(Started {
                        id,
                        image_id: "i".into(),
                        started_at: self.now,
                    }),
                )
            }
            Effect::StartContainer { slot, .. } => {
                Event::ContainerStarted(slot, Err(StartFailure::NotCreated(bad())))
            }
            Effect::RunHook { slot, id, kind, .. } => {
                Event::HookRan(slot, id, kind, well.then_some(()).ok_or_else(|| "no".into()))
            }
            Effect::StopContainer { slot, id, .. } => {
                if well && self.alive.get(&slot.0) == Some(&id) {
                    self.alive.remove(&slot.0);
                    let now = self.now;
                    self.step(Event::ContainerExited(slot, id.clone(), end(137, now)))?;
                }
                Event::StopAnswered(slot, id, well.then_some(()).ok_or_else(bad))
            }
            Effect::RemoveContainer { .. } => Event::ContainerRemoved,
            Effect::TearDown(what) => {
                if well {
                    self.torn.push(what);
                }
                Event::TornDown(what, well.then_some(()).ok_or_else(bad))
            }
            Effect::Remove => Event::Removed(well.then_some(()).ok_or_else(bad)),
            Effect::Announce(_) => return Ok(()),
        };
        self.step(event)
    }

    fn take(&mut self, turn: Turn) -> Result<(), TestCaseError> {
        match turn {
            Turn::Answer(which, well) if !self.under_way.is_empty() => {
                let effect = self.under_way.remove(which.index(self.under_way.len()));
                self.answer(effect, well)
            }
            Turn::Exit(which, well) if !self.alive.is_empty() => {
                let slot = *self.alive.keys().nth(which.index(self.alive.len())).unwrap();
                let id = self.alive.remove(&slot).unwrap();
                if well && slot < self.lifecycle.init_count() {
                    self.done_inits.insert(slot);
                }
                let end = end(i32::from(!well), self.now);
                self.step(Event::ContainerExited(Slot(slot), id, end))
            }
            Turn::Probe(which, well) if !self.alive.is_empty() => {
                let slot = *self.alive.keys().nth(which.index(self.alive.len())).unwrap();
                let id = self.alive[&slot].clone();
                let (kind, verdict) = if well {
                    (ProbeKind::Startup, Verdict::Passing)
                } else {
                    (ProbeKind::Liveness, Verdict::Failing)
                };
                self.step(Event::Probed(Slot(slot), id, kind, verdict))
            }
            Turn::Mesh(state) => {
                self.mesh = state;
                self.step(Event::Attachment(state))
            }
            Turn::Lost if self.sandbox => self.step(Event::SandboxLost),
            Turn::Stop(grace) => {
                self.ending = true;
                self.step(Event::Stop {
                    grace: Duration::from_secs(grace),
                })
            }
            Turn::Forget => {
                self.ending = true;
                self.step(Event::Forget)
            }
            Turn::Pass(seconds) => {
                self.now = after(self.now, Duration::from_secs(seconds.into()));
                self.step(Event::Tick)
            }
            Turn::Answer(..) | Turn::Exit(..) | Turn::Probe(..) | Turn::Lost => Ok(()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whatever_happens_nothing_starts_before_it_may_and_everything_ends(
        turns in proptest::collection::vec(turn(), 0..120),
        sidecar in any::<bool>(),
        policy in prop::sample::select(vec![RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never]),
    ) {
        let spec = spec("u-1", |parts| {
            let mut second = container("second");
            second.restartable_init = sidecar;
            parts.init_containers = vec![container("first"), second];
            parts.containers.push(container("other"));
            parts.containers[0].pre_stop = Some(Hook::Sleep(Duration::from_secs(1)));
            parts.containers[1].post_start = Some(Hook::Sleep(Duration::from_secs(1)));
            parts.restart_policy = policy;
        });
        let mut world = World {
            lifecycle: Lifecycle::new(Arc::new(spec), at(0)),
            now: at(0),
            under_way: vec![],
            mesh: MeshState::Detached,
            sandbox: false,
            volumes: false,
            ending: false,
            alive: BTreeMap::new(),
            done_inits: BTreeSet::new(),
            torn: vec![],
            runs: 0,
        };
        world.step(Event::Begin)?;
        for turn in turns {
            world.take(turn)?;
        }
        // However it stood, a world that works from now on sees it off.
        world.ending = true;
        world.step(Event::Forget)?;
        let mut rounds = 0;
        while !world.lifecycle.gone() {
            rounds += 1;
            prop_assert!(rounds < 500, "it does not end: {:?}", world.lifecycle);
            if world.under_way.is_empty() {
                let due = world.lifecycle.wake_at(world.now);
                prop_assert!(due.is_some(), "nothing is due, nothing under way: {:?}", world.lifecycle);
                world.now = due.unwrap_or(world.now);
                world.step(Event::Tick)?;
            } else {
                let effect = world.under_way.remove(0);
                world.answer(effect, true)?;
            }
        }
        prop_assert!(world.alive.is_empty());
    }
}
