//! The hands of a sandbox's driver: every effect of the lifecycle, done for real
//! against the runtime, the network, the mesh and the disk. Nothing is decided
//! here; what fails is told in words for the user.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use jiff::Timestamp;
use mesh_runtime::{
    off_limits::OffLimits,
    runtime::{AttachError, Attachment},
};
use pool_agent_api::{
    HostName, Pressure, SandboxKey, SandboxSpec,
    spec::{Container, Hook, Volume},
    status::{MeshState, Terminated},
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    clock::Clock,
    driver::{Perform, UpdateError},
    event::{
        ContainerId, Effect, Event, HookKind, ProbeKind, Pulled, SandboxId, Slot, StartFailure, Started,
        Teardown, Trouble,
    },
    eviction::Counts,
};
use crate::{
    allowance::Allowance,
    attachment::{Mesh, reported},
    causes::described,
    cgroup::Cgroups,
    cni::{Add, Desk, Joined},
    confined::Directory,
    cri::{
        CriError, ImageUser, LEFTOVER_POLL, LEFTOVER_POLLS, Labels, ReportedState, Runtime,
        config::{self, HostMount, Placement, Qos},
        wire,
    },
    fence::Fence,
    image::{Held, ImageError, Images, Wanted},
    layout::{Layout, SandboxDirs},
    logs,
    network::{POD_GATEWAY, Router},
    policy::{self, room::HostRoom},
    probes::{self, Dialler, Prober, Vantage},
    right::Node,
    spec_file,
    usage::Meter,
    user_ids::IdRange,
    volumes,
};

/// Most that is read of a container's last words, as a kubelet does.
const MESSAGE_BYTES: usize = 4096;
/// And of its log in their place.
const FALLBACK_LINES: usize = 80;
const FALLBACK_BYTES: usize = 2048;

/// What every sandbox's hands reach for.
pub struct Workshop {
    pub host: HostName,
    pub address: IpAddr,
    /// How the host is shared out.
    pub room: HostRoom,
    /// The range that this host's pods have their addresses of.
    pub pod_range: Ipv4Net,
    /// Whose addresses are whose in the pool.
    pub off_limits: Arc<OffLimits>,
    pub runtime: Runtime,
    pub mesh: Mesh,
    pub desk: Desk,
    pub layout: Layout,
    pub cgroups: Cgroups,
    /// What the runtime counts of this host's containers, from time to time.
    pub counts: watch::Sender<Arc<Counts>>,
    /// What the host is short of.
    pub pressure: watch::Sender<Pressure>,
    /// Images that nobody uses have to go now.
    pub disk_is_short: Notify,
    /// Where images and writable layers lie, as the runtime says.
    pub image_directories: watch::Sender<Vec<String>>,
    pub clock: Clock,
    /// What a pod may have the host hold for it.
    pub files: policy::files::Files,
    pub images: Images,
    /// Told what pods use.
    pub usage: Meter,
    /// Who may run until when.
    pub fence: Fence,
    /// Of the host's current run.
    pub boot_id: String,
}

pub struct Hands {
    shop: Arc<Workshop>,
    spec: Arc<SandboxSpec>,
    dirs: SandboxDirs,
    address: Ipv4Addr,
    user_ids: Option<IdRange>,
    router: Router,
    mesh: watch::Sender<MeshState>,
    found: Mutex<Learnt>,
    /// No container starts any more: what only a start waits for is given up.
    ending: CancellationToken,
}

/// What one effect found out and another needs.
#[derive(Default)]
struct Learnt {
    /// Held on the host as long as the sandbox lives.
    images: HashMap<Slot, Held>,
    /// Follows the attachment's state while there is one.
    follower: Option<AbortOnDropHandle<()>>,
}

impl Hands {
    pub fn new(
        shop: Arc<Workshop>,
        spec: Arc<SandboxSpec>,
        address: Ipv4Addr,
        user_ids: Option<IdRange>,
        router: Router,
        mesh: watch::Sender<MeshState>,
    ) -> Self {
        let dirs = shop.layout.sandbox(&spec.key);
        Self {
            shop,
            spec,
            dirs,
            address,
            user_ids,
            router,
            mesh,
            found: Mutex::default(),
            ending: CancellationToken::new(),
        }
    }

    fn key(&self) -> &SandboxKey {
        &self.spec.key
    }

    fn container(&self, slot: Slot) -> Option<&Container> {
        self.spec.all_containers().nth(slot.0)
    }

    fn with<T>(&self, f: impl FnOnce(&mut Learnt) -> T) -> T {
        f(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    // ---- the sandbox

    fn sandbox_config(&self) -> wire::PodSandboxConfig {
        let parent = self.cgroup();
        config::sandbox(&self.spec, &self.shop.host, &self.dirs, &parent, self.user_ids)
    }

    /// The pod's own.
    fn cgroup(&self) -> String {
        self.shop.cgroups.parent(self.key(), Qos::of(&self.spec))
    }

    async fn prepare_volumes(&self) -> Result<(), Trouble> {
        const REASON: &str = "FailedMount";
        let dirs = self.dirs.clone();
        // The contents are on disk alone; see `admission::slim`.
        let spec = blocking(move || spec_file::read(&dirs))
            .await?
            .map_err(|e| Trouble::new(REASON, e))?;
        volumes::prepare(spec, self.dirs.clone(), self.shop.files)
            .await
            .map_err(|e| Trouble::new(REASON, e))
    }

    async fn run_sandbox(&self) -> Result<SandboxId, Trouble> {
        const REASON: &str = "FailedCreatePodSandBox";
        let config = self.sandbox_config();
        let logs = self.dirs.logs();
        let cgroups = self.shop.cgroups.clone();
        let parent = self.cgroup();
        // Admission has asked the same; the policy may have changed since.
        let allowance = Allowance::of(self.spec.claim, &self.spec, &self.shop.room)
            .map_err(|e| Trouble::new(REASON, e))?;
        blocking(move || {
            Directory::ensure(&logs)?;
            cgroups.create(&parent, &allowance)
        })
        .await?
        .map_err(|e| Trouble::new(REASON, format_args!("making the pod's cgroup: {e}")))?;

        let mut tries = 0..LEFTOVER_POLLS;
        loop {
            let error = match self.run_once(config.clone()).await {
                Ok(id) => return Ok(id),
                Err(error) => error,
            };
            // Its name may be held by what an earlier try left behind, or by a try of
            // an agent that has died, which the runtime is giving up.
            if let Err(error) = self.remove_sandboxes().await {
                tracing::debug!(error = %error, "what a failed start left could not be removed");
            }
            if !error.name_is_taken() || tries.next().is_none() {
                return Err(Trouble::new(REASON, error));
            }
            tokio::time::sleep(LEFTOVER_POLL).await;
        }
    }

    /// Asks for the sandbox, and joins it to its network when containerd asks back.
    async fn run_once(&self, config: wire::PodSandboxConfig) -> Result<SandboxId, CriError> {
        let mut expectation = self.shop.desk.expect(&self.key().pod);
        let running = self
            .shop
            .runtime
            .run_sandbox(config, self.spec.runtime_handler.as_deref());
        let mut running = std::pin::pin!(running);
        loop {
            tokio::select! {
                result = &mut running => return result,
                Some(add) = expectation.next() => {
                    let Add { netns, answer, .. } = add;
                    let joined = self.join(&netns).await;
                    if answer.send(joined).is_err() {
                        tracing::warn!("the runtime did not wait for the pod's network");
                    }
                }
            }
        }
    }

    /// Address, device, routes and the mesh, in one step: what CNI's ADD stands for.
    async fn join(&self, netns: &std::path::Path) -> Result<Joined, String> {
        let handed_over = Instant::now();
        // An earlier try's attachment is of another device.
        self.leave_mesh().await;
        let device = self
            .router
            .plug(self.key(), self.address, netns)
            .await
            .map_err(|e| described(&e))?;
        let attachment = self.attach(&device).await.map_err(|e| described(&e))?;
        self.router.raise(&device).await.map_err(|e| described(&e))?;
        self.shop.mesh.time(&attachment, handed_over);
        Ok(Joined {
            address: device.address,
            gateway: POD_GATEWAY,
            mac: device.mac,
            mtu: device.mtu,
        })
    }

    async fn attach(&self, device: &crate::network::PodDevice) -> Result<Attachment, AttachError> {
        let node = Node::new(&self.spec.tenant, &self.spec.node_name);
        let deadline = self.shop.fence.deadline(&node);
        let attachment = self.shop.mesh.attach(&self.spec, device, deadline).await?;
        self.shop.usage.carried(self.key(), attachment.carried());
        let mut state = attachment.state();
        let mesh = self.mesh.clone();
        mesh.send_replace(reported(*state.borrow_and_update()));
        let follower = tokio::spawn(async move {
            while state.changed().await.is_ok() {
                mesh.send_replace(reported(*state.borrow_and_update()));
            }
        });
        self.with(|found| found.follower = Some(AbortOnDropHandle::new(follower)));
        Ok(attachment)
    }

    fn vantage(&self) -> Vantage {
        Vantage {
            netns: self.router.netns().clone(),
            pod: self.address.into(),
            local_pods: self.shop.pod_range,
            off_limits: self.shop.off_limits.clone(),
            of: Dialler {
                tenant: self.spec.tenant.clone(),
                key: self.spec.key.clone(),
            },
        }
    }

    async fn leave_mesh(&self) {
        let attached = self.with(|found| found.follower.take());
        self.shop.mesh.detach(self.key()).await;
        drop(attached);
        self.mesh.send_if_modified(|state| {
            let changed = *state != MeshState::Detached;
            *state = MeshState::Detached;
            changed
        });
    }

    /// Takes over the device and the attachment of a sandbox an earlier agent
    /// started. False: they are not there.
    pub async fn adopt(&self) -> Result<bool, String> {
        let device = self
            .router
            .adopt(self.key(), self.address)
            .await
            .map_err(|e| described(&e))?;
        let Some(device) = device else {
            return Ok(false);
        };
        self.attach(&device).await.map_err(|e| described(&e))?;
        self.router.raise(&device).await.map_err(|e| described(&e))?;
        Ok(true)
    }

    async fn remove_sandboxes(&self) -> Result<(), CriError> {
        for sandbox in self.shop.runtime.sandboxes(Labels::Of(self.key())).await? {
            self.shop.runtime.stop_sandbox(&sandbox.id).await?;
            self.shop.runtime.remove_sandbox(&sandbox.id).await?;
        }
        Ok(())
    }

    async fn tear_down(&self, what: Teardown) -> Result<(), Trouble> {
        self.ending.cancel();
        match what {
            Teardown::Sandbox => {
                let failed = |e: CriError| Trouble::new("FailedKillPod", e);
                let all = self
                    .shop
                    .runtime
                    .sandboxes(Labels::Of(self.key()))
                    .await
                    .map_err(failed)?;
                for sandbox in all {
                    self.shop
                        .runtime
                        .stop_sandbox(&sandbox.id)
                        .await
                        .map_err(failed)?;
                }
                Ok(())
            }
            Teardown::Attachment => {
                self.leave_mesh().await;
                Ok(())
            }
            Teardown::Network => self
                .router
                .unplug(self.key(), self.address)
                .await
                .map_err(|e| Trouble::new("FailedKillPod", described(&e))),
            Teardown::Volumes => volumes::release(&self.dirs)
                .await
                .map_err(|e| Trouble::new("FailedUnmount", e)),
        }
    }

    async fn remove(&self) -> Result<(), Trouble> {
        self.remove_sandboxes()
            .await
            .map_err(|e| Trouble::new("FailedKillPod", e))?;
        // What it counted goes with it.
        self.shop.usage.settle().await;
        let cgroups = self.shop.cgroups.clone();
        let parent = self.cgroup();
        blocking(move || cgroups.remove(&parent))
            .await?
            .map_err(|e| Trouble::new("FailedKillPod", format_args!("removing the pod's cgroup: {e}")))?;
        volumes::remove(&self.dirs)
            .await
            .map_err(|e| Trouble::new("FailedKillPod", e))
    }

    // ---- images

    /// What a container's image is asked for by; None if there is no such container.
    fn wanted(&self, slot: Slot) -> Option<Wanted<'_>> {
        self.container(slot).map(|container| Wanted {
            tenant: &self.spec.tenant,
            name: &container.image,
            handler: self.spec.runtime_handler.as_deref(),
            credentials: &self.spec.registry_credentials,
        })
    }

    /// An image's error, by the field that names the image.
    fn image_trouble(&self, slot: Slot, error: &ImageError) -> Trouble {
        let inits = self.spec.init_containers.len();
        let field = match slot.0.checked_sub(inits) {
            Some(app) => format!("spec.containers[{app}].image"),
            None => format!("spec.initContainers[{}].image", slot.0),
        };
        match error {
            ImageError::NamedAstray(_) | ImageError::ResolvedAstray(_) => {
                Trouble::new(error.reason(), format_args!("{field}: {error}"))
            }
            _ => Trouble::new(error.reason(), error),
        }
    }

    async fn check_image(&self, slot: Slot) -> Result<Option<String>, Trouble> {
        let Some(wanted) = self.wanted(slot) else {
            return Ok(None);
        };
        let present = self.shop.images.present(wanted).await;
        let held = present.map_err(|e| self.image_trouble(slot, &e))?;
        Ok(held.map(|held| {
            let id = held.info.id.clone();
            self.with(|found| found.images.insert(slot, held));
            id
        }))
    }

    async fn pull_image(&self, slot: Slot) -> Result<Pulled, Trouble> {
        let Some(wanted) = self.wanted(slot) else {
            return Err(Trouble::new("ErrImagePull", "there is no such container"));
        };
        let pull = self.shop.images.pull(wanted, self.sandbox_config());
        let (held, took) = tokio::select! {
            pulled = pull => pulled.map_err(|e| self.image_trouble(slot, &e))?,
            () = self.ending.cancelled() => {
                return Err(Trouble::new("ErrImagePull", "the pod ended before its image was pulled"));
            }
        };
        let pulled = Pulled {
            image_id: held.info.id.clone(),
            took,
            bytes: held.info.bytes,
        };
        self.with(|found| found.images.insert(slot, held));
        Ok(pulled)
    }

    // ---- containers

    async fn start_container(
        &self,
        slot: Slot,
        sandbox: &SandboxId,
        restart: u32,
    ) -> Result<(Started, Option<Terminated>), StartFailure> {
        let refused = |reason, e: &dyn std::fmt::Display| StartFailure::NotCreated(Trouble::new(reason, e));
        let image = self.with(|found| found.images.get(&slot).map(|held| held.info.clone()));
        let (Some(container), Some(image)) = (self.container(slot), image) else {
            return Err(refused("CreateContainerError", &"its image is not known"));
        };
        check_user(container, &image.user).map_err(|e| refused("CreateContainerConfigError", &e))?;
        let placement = Placement {
            restart,
            image: image.id,
            pod_ip: self.address.into(),
            host_ip: self.shop.address,
            host_memory: self.shop.room.capacity.memory_bytes,
            kill_as_a_whole: self.shop.cgroups.can_kill_as_a_whole(),
            user_ids: self.user_ids,
            mounts: self
                .mounts(slot, restart)
                .await
                .map_err(|e| refused("CreateContainerConfigError", &e))?,
        };
        let config = config::container(&self.spec, container, &self.shop.host, &placement);
        let runtime = &self.shop.runtime;
        let id = runtime
            .create_container(sandbox, self.key(), config, self.sandbox_config())
            .await
            .map_err(|e| refused("CreateContainerError", &e))?;
        if let Err(error) = runtime.start_container(&id).await {
            let trouble = Trouble::new("RunContainerError", &error);
            return Err(match runtime.report(&id).await.map(|report| report.state) {
                Ok(ReportedState::Exited(end)) => StartFailure::Died { trouble, id, end },
                _ => {
                    if let Err(error) = runtime.remove_container(&id).await {
                        tracing::debug!(error = %error, "a container that did not start stays for now");
                    }
                    StartFailure::NotCreated(trouble)
                }
            });
        }
        // A run may be over before it is looked at; its event came too early to count.
        let (image_id, started_at, end) = match runtime.report(&id).await {
            Ok(report) => match report.state {
                ReportedState::Running { started_at } => (report.image_id, started_at, None),
                ReportedState::Exited(end) => {
                    let started_at = end.started_at.unwrap_or(end.finished_at);
                    let end = self.with_last_words(slot, restart, end).await;
                    (report.image_id, started_at, Some(end))
                }
                ReportedState::Created => (report.image_id, self.shop.clock.now(), None),
            },
            Err(_) => (placement.image, self.shop.clock.now(), None),
        };
        let started = Started {
            id,
            image_id,
            started_at,
        };
        Ok((started, end))
    }

    async fn mounts(&self, slot: Slot, restart: u32) -> Result<Vec<HostMount>, Trouble> {
        let spec = self.spec.clone();
        let dirs = self.dirs.clone();
        let addresses = (self.address, self.shop.address);
        let bounds = self.shop.files;
        blocking(move || match spec.all_containers().nth(slot.0) {
            Some(container) => volumes::mounts(&spec, container, restart, &dirs, addresses, bounds)
                .map_err(|e| Trouble::new("CreateContainerConfigError", e)),
            None => Ok(vec![]),
        })
        .await?
    }

    /// How a run ended, with its last words; None while it goes on.
    async fn ended(&self, slot: Slot, id: &ContainerId) -> Option<Terminated> {
        match self.shop.runtime.report(id).await {
            Ok(report) => match report.state {
                ReportedState::Exited(end) => Some(self.with_last_words(slot, report.restart, end).await),
                ReportedState::Created | ReportedState::Running { .. } => None,
            },
            Err(error) if error.not_found() => Some(vanished(id, self.shop.clock.now())),
            Err(error) => {
                tracing::warn!(error = %error, "a container could not be looked at");
                None
            }
        }
    }

    /// The end of a run with what it left to be read.
    pub async fn with_last_words(&self, slot: Slot, restart: u32, end: Terminated) -> Terminated {
        let Some(container) = self.container(slot) else {
            return end;
        };
        let messages = self.dirs.messages();
        let message = SandboxDirs::message_name(&container.name, restart);
        let log = self
            .dirs
            .logs()
            .join(SandboxDirs::log_name(&container.name, restart));
        let from_log = container.termination_message.fallback_to_logs && end.exit_code != 0;
        let words = blocking(move || {
            let words = last_words(&messages, &message);
            if words.is_empty() && from_log {
                return logs::last_lines(&log, FALLBACK_LINES, FALLBACK_BYTES);
            }
            words
        });
        match words.await {
            Ok(words) if !words.is_empty() => Terminated {
                message: words,
                ..end
            },
            _ => end,
        }
    }

    async fn run_hook(
        &self,
        slot: Slot,
        id: &ContainerId,
        kind: HookKind,
        limit: Option<Duration>,
    ) -> Result<(), String> {
        let Some(container) = self.container(slot) else {
            return Ok(());
        };
        let hook = match kind {
            HookKind::PostStart => &container.post_start,
            HookKind::PreStop => &container.pre_stop,
        };
        let Some(hook) = hook else {
            return Ok(());
        };
        let work = async {
            match hook {
                Hook::Sleep(time) => {
                    tokio::time::sleep(*time).await;
                    Ok(())
                }
                Hook::Exec { command } => {
                    let output = self
                        .shop
                        .runtime
                        .exec(id, command, limit)
                        .await
                        .map_err(|e| e.to_string())?;
                    if output.exit_code == 0 {
                        Ok(())
                    } else {
                        Err(format!("command exited with {}", output.exit_code))
                    }
                }
                Hook::Http(action) => probes::http_hook(&self.vantage(), action).await,
                Hook::Tcp { host, port } => probes::tcp_hook(&self.vantage(), host.as_deref(), *port).await,
            }
        };
        match limit {
            Some(limit) => tokio::time::timeout(limit, work)
                .await
                .unwrap_or_else(|_| Err("the grace period ran out before it ended".into())),
            None => work.await,
        }
    }
}

impl Perform for Hands {
    async fn perform(&self, effect: Effect) -> Vec<Event> {
        match effect {
            Effect::PrepareVolumes => vec![Event::VolumesPrepared(self.prepare_volumes().await)],
            Effect::RunSandbox => vec![Event::SandboxRan(self.run_sandbox().await)],
            Effect::CheckImage(slot) => vec![Event::ImageChecked(slot, self.check_image(slot).await)],
            Effect::PullImage(slot) => vec![Event::ImagePulled(slot, self.pull_image(slot).await)],
            Effect::StartContainer {
                slot,
                sandbox,
                restart,
            } => match self.start_container(slot, &sandbox, restart).await {
                Ok((started, end)) => {
                    let id = started.id.clone();
                    let mut events = vec![Event::ContainerStarted(slot, Ok(started))];
                    events.extend(end.map(|end| Event::ContainerExited(slot, id, end)));
                    events
                }
                Err(failure) => vec![Event::ContainerStarted(slot, Err(failure))],
            },
            Effect::RunHook {
                slot,
                id,
                kind,
                limit,
            } => {
                let result = self.run_hook(slot, &id, kind, limit).await;
                vec![Event::HookRan(slot, id, kind, result)]
            }
            Effect::StopContainer { slot, id, grace } => {
                let result = self
                    .shop
                    .runtime
                    .stop_container(&id, grace)
                    .await
                    .map_err(|e| Trouble::new("FailedKillPod", e));
                let mut events = vec![Event::StopAnswered(slot, id.clone(), result)];
                if let Some(end) = self.ended(slot, &id).await {
                    events.push(Event::ContainerExited(slot, id, end));
                }
                events
            }
            Effect::RemoveContainer { slot, id, restart } => {
                if let Err(error) = self.shop.runtime.remove_container(&id).await {
                    tracing::warn!(error = %error, "a dead container stays until its sandbox goes");
                }
                if let Some(container) = self.container(slot) {
                    let log = self
                        .dirs
                        .logs()
                        .join(SandboxDirs::log_name(&container.name, restart));
                    let messages = self.dirs.messages();
                    let message = SandboxDirs::message_name(&container.name, restart);
                    let removal = blocking(move || {
                        logs::remove(&log);
                        if let Err(error) = Directory::open(&messages).and_then(|m| m.unlink(&message)) {
                            tracing::debug!(error = %error, "old last words stay until their sandbox goes");
                        }
                    });
                    if let Err(trouble) = removal.await {
                        tracing::debug!(error = trouble.message, "an old log stays until its sandbox goes");
                    }
                }
                vec![Event::ContainerRemoved]
            }
            Effect::TearDown(what) => vec![Event::TornDown(what, self.tear_down(what).await)],
            Effect::Remove => {
                let result = self.remove().await;
                if let Err(trouble) = &result {
                    // Nobody else is told: it has ended as far as its tenant is concerned.
                    tracing::warn!(
                        error = trouble.message,
                        "what is left of a sandbox cannot be removed yet"
                    );
                }
                vec![Event::Removed(result)]
            }
            Effect::Announce(_) => vec![],
        }
    }

    async fn inspect(&self, slot: Slot, id: ContainerId) -> Option<Event> {
        let end = self.ended(slot, &id).await?;
        Some(Event::ContainerExited(slot, id, end))
    }

    async fn probe(&self, slot: Slot, id: ContainerId, kind: ProbeKind, events: mpsc::Sender<Event>) {
        let Some(container) = self.container(slot) else {
            return;
        };
        let probe = match kind {
            ProbeKind::Startup => &container.startup_probe,
            ProbeKind::Liveness => &container.liveness_probe,
            ProbeKind::Readiness => &container.readiness_probe,
        };
        if let Some(probe) = probe {
            let prober = Prober {
                runtime: self.shop.runtime.clone(),
                from: self.vantage(),
                container: id.clone(),
            };
            probes::run(prober, probe, kind, slot, id, events).await;
        }
    }

    async fn update(&self, volumes: Vec<Volume>) -> Result<(), UpdateError> {
        let failed = |e: &dyn std::fmt::Display| UpdateError::Failed(Trouble::new("FailedMount", e));
        volumes::change::check(&self.spec, &volumes)?;
        let dirs = self.dirs.clone();
        let security = self.spec.security.clone();
        let bounds = self.shop.files;
        let left = blocking(move || {
            let spec = spec_file::with(&dirs, &volumes).map_err(|e| failed(&e))?;
            bounds.check(&spec)?;
            let stage = volumes::Stage::set(&volumes, &security, &dirs).map_err(|e| failed(&e))?;
            if let Err(error) = spec_file::write(&dirs, spec) {
                stage.discard();
                return Err(failed(&error));
            }
            stage.commit().map_err(|e| failed(&e))
        })
        .await??;
        volumes::clear_away(left).await.map_err(|e| failed(&e))
    }
}

/// Whether a container may start as the user it would be.
fn check_user(container: &Container, image: &ImageUser) -> Result<(), String> {
    if !container.security.run_as_non_root {
        return Ok(());
    }
    match (container.security.run_as_user, image) {
        (Some(0), _) => Err("container's runAsUser breaks non-root policy".into()),
        (Some(_), _) | (None, ImageUser::Uid(_)) => Ok(()),
        (None, ImageUser::Root) => Err("container has runAsNonRoot and image will run as root".into()),
        (None, ImageUser::Name(name)) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
        )),
    }
}

/// A kubelet's words for a run the runtime knows nothing of any more.
fn vanished(id: &ContainerId, at: Timestamp) -> Terminated {
    Terminated {
        exit_code: 137,
        signal: 0,
        reason: "ContainerStatusUnknown".into(),
        message: "The container could not be located when the pod was terminated".into(),
        started_at: None,
        finished_at: at,
        container_id: format!("containerd://{id}"),
    }
}

fn last_words(messages: &std::path::Path, name: &str) -> String {
    use std::io::Read;
    let mut bytes = vec![];
    let limit = u64::try_from(MESSAGE_BYTES).unwrap_or(u64::MAX);
    let opened = Directory::open(messages).and_then(|messages| messages.file(name));
    match opened.and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

/// Work that may wait for the disk or the kernel, on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Trouble> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Trouble::new("InternalError", format_args!("the work broke off: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_those_of_a_file_and_of_nothing_it_leads_to() {
        let directory = tempfile::tempdir().unwrap();
        let messages = directory.path().join("messages");
        std::fs::create_dir(&messages).unwrap();
        std::fs::write(directory.path().join("secret"), "the host's own").unwrap();
        std::os::unix::fs::symlink("../secret", messages.join("led-0")).unwrap();
        std::fs::write(messages.join("long-0"), "x".repeat(2 * MESSAGE_BYTES)).unwrap();
        assert_eq!(last_words(&messages, "led-0"), "");
        assert_eq!(last_words(&messages, "../secret"), "");
        assert_eq!(last_words(&messages, "long-0").len(), MESSAGE_BYTES);
        std::os::unix::fs::symlink(&messages, directory.path().join("elsewhere")).unwrap();
        assert_eq!(last_words(&directory.path().join("elsewhere"), "long-0"), "");
    }

    #[test]
    fn a_container_that_must_not_be_root_is_held_to_it() {
        let spec = crate::sandbox::lifecycle::tests_support::spec("a", |_| {});
        let mut container = spec.containers[0].clone();
        container.security.run_as_non_root = true;
        for (user, image, fits) in [
            (None, ImageUser::Root, false),
            (None, ImageUser::Uid(1000), true),
            (None, ImageUser::Name("app".into()), false),
            (Some(0), ImageUser::Uid(1000), false),
            (Some(7), ImageUser::Root, true),
        ] {
            container.security.run_as_user = user;
            assert_eq!(check_user(&container, &image).is_ok(), fits, "{user:?} {image:?}");
        }
    }
}
