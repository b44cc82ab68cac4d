use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use pool_agent_api::{
    SandboxStatus,
    status::{ContainerState, Terminated},
};
use tokio::sync::Semaphore;

use super::*;
use crate::{
    board::{Change, Reader},
    sandbox::{
        event::{Pulled, Started, Verdict},
        lifecycle::tests_support::spec,
    },
};

/// A host where everything works, and that writes down what was asked of it.
struct Fake {
    asked: Mutex<Vec<String>>,
    /// An update waits for it.
    disk: Semaphore,
}

impl Fake {
    fn note(&self, what: impl Into<String>) {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what.into());
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn ended(code: i32) -> Terminated {
    Terminated {
        exit_code: code,
        signal: 0,
        reason: "Error".into(),
        message: String::new(),
        started_at: None,
        finished_at: Timestamp::now(),
        container_id: String::new(),
    }
}

impl Perform for Fake {
    async fn perform(&self, effect: Effect) -> Vec<Event> {
        match effect {
            Effect::PrepareVolumes => vec![Event::VolumesPrepared(Ok(()))],
            Effect::RunSandbox => {
                self.note("sandbox");
                tokio::time::sleep(Duration::from_millis(100)).await;
                vec![Event::SandboxRan(Ok(SandboxId("s".into())))]
            }
            Effect::CheckImage(slot) => vec![Event::ImageChecked(slot, Ok(None))],
            Effect::PullImage(slot) => {
                let pulled = Pulled {
                    image_id: "i".into(),
                    took: Duration::ZERO,
                    bytes: 1,
                };
                vec![Event::ImagePulled(slot, Ok(pulled))]
            }
            Effect::StartContainer { slot, restart, .. } => {
                self.note(format!("start {restart}"));
                let started = Started {
                    id: ContainerId(format!("c{restart}")),
                    image_id: "i".into(),
                    started_at: Timestamp::now(),
                };
                vec![Event::ContainerStarted(slot, Ok(started))]
            }
            Effect::RunHook { .. } => panic!("a fault in the agent"),
            Effect::StopContainer { slot, id, grace } => {
                self.note(format!("stop within {}s", grace.as_secs()));
                vec![
                    Event::StopAnswered(slot, id.clone(), Ok(())),
                    Event::ContainerExited(slot, id, ended(143)),
                ]
            }
            Effect::RemoveContainer { .. } => vec![Event::ContainerRemoved],
            Effect::TearDown(what) => {
                self.note(format!("{what:?}"));
                vec![Event::TornDown(what, Ok(()))]
            }
            Effect::Remove => vec![Event::Removed(Ok(()))],
            Effect::Announce(_) => vec![],
        }
    }

    async fn inspect(&self, slot: Slot, id: ContainerId) -> Option<Event> {
        Some(Event::ContainerExited(slot, id, ended(1)))
    }

    async fn probe(&self, slot: Slot, id: ContainerId, kind: ProbeKind, events: mpsc::Sender<Event>) {
        self.note(format!("probe {id}"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let passed = Event::Probed(slot, id, kind, Verdict::Passing);
        events.send(passed).await.unwrap();
        std::future::pending::<()>().await;
    }

    async fn update(&self, _: Vec<Volume>) -> Result<(), UpdateError> {
        self.note("update");
        let _free = self.disk.acquire().await.unwrap();
        self.note("updated");
        Ok(())
    }
}

struct Rig {
    fake: Arc<Fake>,
    commands: mpsc::Sender<Command>,
    mesh: watch::Sender<MeshState>,
    reader: Reader,
    progress: watch::Receiver<Progress>,
    driver: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn new(change: impl FnOnce(&mut pool_agent_api::spec::SandboxParts)) -> Self {
        let board = Board::new(1);
        let tenant: TenantId = "demo".parse().unwrap();
        let (commands, inbox) = mpsc::channel(INBOX);
        let mesh = watch::Sender::new(MeshState::Detached);
        let progress = watch::Sender::new(Progress::default());
        let clock = Clock::start();
        let lifecycle = Lifecycle::new(Arc::new(spec("u-1", change)), clock.now());
        let fake = Arc::new(Fake {
            asked: Mutex::default(),
            disk: Semaphore::new(1),
        });
        let reader = board.reader(Some(tenant.clone()));
        let seen = progress.subscribe();
        let outlet = Outlet {
            board,
            tenant,
            addressing: addressing([10, 0, 0, 2].into(), [192, 0, 2, 1].into(), None),
            progress,
            clock,
        };
        Self {
            driver: tokio::spawn(run(lifecycle, fake.clone(), inbox, mesh.subscribe(), outlet)),
            fake,
            commands,
            mesh,
            reader,
            progress: seen,
        }
    }

    async fn tell(&self, event: Event) {
        self.commands.send(Command::Event(event)).await.unwrap();
    }

    /// The place for it has to be had before.
    async fn update(&self, places: &Arc<Semaphore>) -> oneshot::Receiver<Result<(), UpdateError>> {
        let place = places.clone().acquire_owned().await.unwrap();
        let (done, answer) = oneshot::channel();
        let update = Update {
            volumes: vec![],
            done,
            place,
        };
        self.commands.send(Command::Update(update)).await.unwrap();
        answer
    }

    async fn sign(&self, restart: u32) {
        let ended = Sign::Ended(ContainerId(format!("c{restart}")));
        self.commands.send(Command::Sign(ended)).await.unwrap();
    }

    /// The first status that is as wanted.
    async fn until(&mut self, wanted: impl Fn(&SandboxStatus) -> bool) -> SandboxStatus {
        let look = async {
            loop {
                for change in self.reader.take().unwrap() {
                    if let Change::Status(status) = change
                        && wanted(&status)
                    {
                        return (*status).clone();
                    }
                }
                assert!(self.reader.changed().await);
            }
        };
        tokio::time::timeout(Duration::from_secs(3600), look)
            .await
            .unwrap()
    }
}

fn running(status: &SandboxStatus) -> bool {
    matches!(status.containers[0].state, ContainerState::Running { .. })
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_lives_and_leaves_nothing() {
    let mut rig = Rig::new(|_| {});
    rig.tell(Event::Begin).await;
    rig.progress.wait_for(|p| p.sandbox.is_some()).await.unwrap();
    assert_eq!(rig.fake.asked(), ["sandbox"], "it waits for the mesh");
    rig.mesh.send_replace(MeshState::Serving);
    let status = rig.until(running).await;
    assert_eq!(status.pod_ip, Some([10, 0, 0, 2].into()));
    assert!(status.containers[0].ready);
    rig.tell(Event::Forget).await;
    rig.driver.await.unwrap();
    assert_eq!(
        rig.fake.asked()[2..],
        ["stop within 0s", "Sandbox", "Attachment", "Network", "Volumes"]
    );
    assert!(rig.progress.borrow().gone);
}

#[tokio::test(start_paused = true)]
async fn a_sign_that_a_run_ended_leads_to_the_next_run_after_its_back_off() {
    let mut rig = Rig::new(|_| {});
    rig.mesh.send_replace(MeshState::Serving);
    rig.tell(Event::Begin).await;
    for restart in 0..3_u32 {
        rig.until(|s| running(s) && s.containers[0].restart_count == restart)
            .await;
        // A second sign of the same end changes nothing.
        rig.sign(restart).await;
        rig.sign(restart).await;
    }
    let status = rig
        .until(|s| running(s) && s.containers[0].restart_count == 3)
        .await;
    let last = status.containers[0].last_terminated.as_ref();
    assert_eq!(last.map(|t| t.exit_code), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_probe_runs_as_long_as_its_run_and_its_verdict_shows() {
    let probe = pool_agent_api::spec::Probe {
        action: pool_agent_api::spec::Action::Tcp { host: None, port: 1 },
        initial_delay: Duration::ZERO,
        period: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        thresholds: pool_agent_api::spec::Thresholds {
            success: 1,
            failure: 1,
        },
        termination_grace: None,
    };
    let mut rig = Rig::new(|parts| parts.containers[0].readiness_probe = Some(probe));
    rig.mesh.send_replace(MeshState::Serving);
    rig.tell(Event::Begin).await;
    assert!(!rig.until(running).await.containers[0].ready);
    rig.until(|s| s.containers[0].ready).await;
    rig.sign(0).await;
    rig.until(|s| s.containers[0].restart_count == 1 && s.containers[0].ready)
        .await;
    let asked = rig.fake.asked();
    let probes: Vec<_> = asked.iter().filter(|a| a.starts_with("probe")).collect();
    assert_eq!(probes, ["probe c0", "probe c1"]);
}

#[tokio::test(start_paused = true)]
async fn an_effect_that_panics_has_failed_and_the_sandbox_goes_on() {
    let mut rig = Rig::new(|parts| {
        parts.containers[0].pre_stop = Some(pool_agent_api::spec::Hook::Sleep(Duration::from_secs(1)));
    });
    rig.mesh.send_replace(MeshState::Serving);
    rig.tell(Event::Begin).await;
    rig.until(running).await;
    let grace = Duration::from_secs(30);
    rig.tell(Event::Stop { grace }).await;
    rig.until(|s| s.state == SandboxState::Stopped).await;
    assert!(rig.fake.asked().iter().any(|a| a.starts_with("stop within")));
}

#[tokio::test(start_paused = true)]
async fn volumes_are_updated_while_they_stand_and_refused_after() {
    let mut rig = Rig::new(|_| {});
    rig.mesh.send_replace(MeshState::Serving);
    rig.tell(Event::Begin).await;
    rig.until(running).await;
    let places = Arc::new(Semaphore::new(UPDATES));
    assert_eq!(rig.update(&places).await.await.unwrap(), Ok(()));
    rig.tell(Event::Stop {
        grace: Duration::ZERO,
    })
    .await;
    rig.until(|s| s.state == SandboxState::Stopped).await;
    assert!(rig.update(&places).await.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_behind_updates_and_volumes_are_not_taken_away_under_one() {
    let mut rig = Rig::new(|_| {});
    rig.mesh.send_replace(MeshState::Serving);
    rig.tell(Event::Begin).await;
    rig.until(running).await;
    let stuck = rig.fake.disk.acquire().await.unwrap();
    let places = Arc::new(Semaphore::new(UPDATES));
    let (first, second) = (rig.update(&places).await, rig.update(&places).await);
    assert!(places.clone().try_acquire_owned().is_err(), "more wait outside");
    // Every command that comes is taken up, however long an update takes.
    let soon = Duration::from_secs(60);
    for _ in 0..INBOX * 2 {
        let told = rig.tell(Event::Evict("Evicted", "the host is short".into()));
        tokio::time::timeout(soon, told)
            .await
            .expect("it stands behind updates");
    }
    let until = tokio::time::timeout(soon, async {
        while !rig.fake.asked().iter().any(|asked| asked == "Network") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    until.await.expect("the pod goes");
    assert!(!rig.fake.asked().iter().any(|asked| asked == "Volumes"));
    drop(stuck);
    assert_eq!(first.await.unwrap(), Ok(()));
    assert!(second.await.unwrap().is_err(), "the sandbox is going");
    rig.tell(Event::Forget).await;
    rig.driver.await.unwrap();
    let asked = rig.fake.asked();
    let at = |what: &str| asked.iter().position(|asked| asked == what).unwrap();
    assert!(at("updated") < at("Volumes"));
}
