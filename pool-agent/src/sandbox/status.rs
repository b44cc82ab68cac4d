//! A sandbox as its virtual node sees it: the lifecycle's state in the words of
//! the contract, with a kubelet's reasons. Pure; called by [`super::driver`]
//! after each step, which numbers the revisions.

use std::net::IpAddr;

use jiff::Timestamp;
use pool_agent_api::{
    SandboxStatus,
    spec::MeshMode,
    status::{ContainerState, ContainerStatus, MeshState},
};

use super::{
    Lifecycle,
    backoff::Backoff,
    container::{Container, Image, PostStart, Run},
    event::{Slot, Trouble},
};

/// What a status says that the lifecycle does not know.
#[derive(Debug, Clone)]
pub struct Addressing {
    pub pod_ip: IpAddr,
    pub host_ip: IpAddr,
    /// SPIFFE id; None for a pod outside the mesh.
    pub identity: Option<String>,
}

impl Lifecycle {
    /// The status but for its revision, which is 0.
    pub fn status(&self, addressing: &Addressing) -> SandboxStatus {
        let inits = self.init_count();
        let all: Vec<ContainerStatus> = self
            .slots()
            .map(|(slot, _)| self.container_status(slot))
            .collect();
        let (init_containers, containers) = {
            let mut all = all;
            let apps = all.split_off(inits);
            (all, apps)
        };
        SandboxStatus {
            key: self.spec.key.clone(),
            namespace: self.spec.namespace.clone(),
            name: self.spec.name.clone(),
            node_name: self.spec.node_name.clone(),
            revision: 0,
            state: self.state(),
            reason: self.reason.to_owned(),
            message: self.message.clone(),
            pod_ip: self.sandbox_id().map(|_| addressing.pod_ip),
            host_ip: addressing.host_ip,
            accepted_at: self.accepted_at,
            mesh: match self.spec.mesh {
                MeshMode::Enrolled => self.mesh,
                MeshMode::Unmeshed => MeshState::Detached,
            },
            identity: addressing.identity.clone(),
            init_containers,
            containers,
            notice: None,
        }
    }

    fn container_status(&self, slot: Slot) -> ContainerStatus {
        let spec = self.container_spec(slot);
        let container = &self.containers[slot.0];
        let waiting = |reason: &str, message: &str| ContainerState::Waiting {
            reason: reason.to_owned(),
            message: message.to_owned(),
        };
        let mut last_terminated = container.last.clone();
        let state = match &container.run {
            Run::Running(running) => ContainerState::Running {
                started_at: running.started_at,
            },
            Run::Absent | Run::Starting => self.not_yet(slot, container),
            Run::Refused { trouble, .. } => waiting(trouble.reason, &trouble.message),
            Run::Exited(end) if self.state_ends() || !self.restarts(slot, end) => {
                ContainerState::Terminated(end.clone())
            }
            Run::Exited(end) => match &container.image {
                Image::Failed { .. } => {
                    last_terminated = Some(end.clone());
                    self.not_yet(slot, container)
                }
                _ if container.crashes.delay(end.finished_at).is_zero() => {
                    ContainerState::Terminated(end.clone())
                }
                _ => {
                    last_terminated = Some(end.clone());
                    waiting(
                        "CrashLoopBackOff",
                        &format!(
                            "back-off {}s restarting failed container={} pod={}_{}({})",
                            container.crashes.delay(end.finished_at).as_secs(),
                            spec.name,
                            self.spec.name,
                            self.spec.namespace,
                            self.spec.key.pod
                        ),
                    )
                }
            },
        };
        let container_id = match (&container.run, container.dead.back()) {
            (Run::Running(running), _) => format!("containerd://{}", running.id),
            (_, Some((id, _))) => format!("containerd://{id}"),
            (_, None) => String::new(),
        };
        // An init container that did its work is ready; others are while they run.
        let done = |end: &pool_agent_api::status::Terminated| {
            slot.0 < self.init_count() && !spec.restartable_init && end.exit_code == 0
        };
        let up = container.running().filter(|r| r.post_start == PostStart::Done);
        let started = up.is_some_and(|r| r.started);
        let ready = match &container.run {
            Run::Exited(end) => done(end),
            _ => up.is_some_and(|r| r.started && (spec.readiness_probe.is_none() || r.ready)),
        };
        ContainerStatus {
            name: spec.name.clone(),
            image: spec.image.clone(),
            image_id: container.image_id.clone(),
            container_id,
            restart_count: container.restarts,
            ready,
            started,
            state,
            last_terminated,
        }
    }

    /// Why a container that has no run has none.
    fn not_yet(&self, slot: Slot, container: &Container) -> ContainerState {
        let (reason, message) = match &container.image {
            Image::Failed { trouble, .. }
                if container.announced_backoff && trouble.reason == "ErrImagePull" =>
            {
                let image = &self.container_spec(slot).image;
                (
                    "ImagePullBackOff",
                    format!(
                        "Back-off pulling image \"{image}\": ErrImagePull: {}",
                        trouble.message
                    ),
                )
            }
            Image::Failed {
                trouble: Trouble { reason, message },
                ..
            } => (*reason, message.clone()),
            // A pull that is tried again reads as it did before.
            Image::Pulling if container.pulls != Backoff::default() => (
                "ImagePullBackOff",
                format!("Back-off pulling image \"{}\"", self.container_spec(slot).image),
            ),
            _ if self.init_count() > 0 => ("PodInitializing", String::new()),
            _ => ("ContainerCreating", String::new()),
        };
        ContainerState::Waiting {
            reason: reason.to_owned(),
            message,
        }
    }

    /// What ended stays as it ended.
    fn state_ends(&self) -> bool {
        use pool_agent_api::status::SandboxState;
        matches!(self.state(), SandboxState::Stopping | SandboxState::Stopped)
    }

    /// When the sandbox was accepted.
    pub fn accepted_at(&self) -> Timestamp {
        self.accepted_at
    }
}
