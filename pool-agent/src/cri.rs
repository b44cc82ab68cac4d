//! The container runtime on this host, over CRI v1: one connection to its socket,
//! with a time limit on every call. Called by sandboxes' `perform`, by the agent's
//! start and by the service (streams, stats). Translates: what leaves here is in
//! the agent's own words.

pub mod config;
pub mod events;
mod leftover;

use std::{collections::HashMap, future::Future, path::Path, time::Duration};

use backon::{ConstantBuilder, Retryable};
use jiff::Timestamp;
use pool_agent_api::{ContainerName, SandboxKey, status::Terminated};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

use crate::sandbox::event::{ContainerId, SandboxId};

#[allow(unreachable_pub, clippy::all)]
pub mod wire {
    tonic::include_proto!("runtime.v1");
}

use leftover::Leftovers;
use wire::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};

/// Labels that mark what is ours. The kubelet's names where it has one, so that
/// crictl and whoever knows it can read them.
pub const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
pub const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
pub const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const LABEL_CONTAINER: &str = "io.kubernetes.container.name";
pub const LABEL_ATTEMPT: &str = "spindrift.dev/attempt";
pub const LABEL_HOST: &str = "spindrift.dev/host";

/// For calls that only look or make small changes.
const QUICK: Duration = Duration::from_secs(30);
/// For those that run processes: RunPodSandbox, create, start.
const SLOW: Duration = Duration::from_secs(120);
/// How often, and how many times, what an earlier try left in the runtime's hands
/// is looked at again: ten seconds in all. containerd may take half of that to give
/// up a start whose caller has died.
pub const LEFTOVER_POLL: Duration = Duration::from_millis(100);
pub const LEFTOVER_POLLS: usize = 100;
/// Lists of everything on a full host; the default of 4 MiB is too small.
const MAX_MESSAGE: usize = 32 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// The runtime's own words; they are shown to users.
    #[error("{message}")]
    Answer {
        call: &'static str,
        code: tonic::Code,
        message: String,
    },
    #[error("{call} was not answered in {} s", limit.as_secs())]
    Timeout { call: &'static str, limit: Duration },
    #[error("{call} was answered without {field}")]
    Incomplete { call: &'static str, field: &'static str },
}

impl CriError {
    pub fn not_found(&self) -> bool {
        matches!(self, Self::Answer { code, .. } if *code == tonic::Code::NotFound)
    }

    /// Of a sandbox or a container that an earlier try made, or is still making: a
    /// call goes on in the runtime for a moment when its caller has died.
    pub fn name_is_taken(&self) -> bool {
        matches!(self, Self::Answer { message, .. } if message.contains("failed to reserve"))
    }

    /// It is just being started, and can be removed only when that is over.
    fn is_starting(&self) -> bool {
        matches!(self, Self::Answer { message, .. } if message.contains("starting state"))
    }
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    leftovers: Leftovers,
}

/// A sandbox of ours that the runtime knows.
#[derive(Debug, Clone)]
pub struct KnownSandbox {
    pub id: SandboxId,
    pub key: SandboxKey,
    pub ready: bool,
}

/// One run of a container of ours.
#[derive(Debug, Clone)]
pub struct KnownContainer {
    pub id: ContainerId,
    pub sandbox: SandboxId,
    pub key: SandboxKey,
    pub container: ContainerName,
    pub restart: u32,
    pub state: wire::ContainerState,
}

#[derive(Debug, Clone)]
pub struct ContainerReport {
    pub id: ContainerId,
    pub image_id: String,
    pub restart: u32,
    pub created_at: Timestamp,
    pub state: ReportedState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportedState {
    Created,
    Running { started_at: Timestamp },
    Exited(Terminated),
}

#[derive(Debug, Clone)]
pub struct ImageInfo {
    pub id: String,
    pub bytes: u64,
    pub user: ImageUser,
    /// Whoever imported it said that it stays.
    pub pinned: bool,
}

/// Whom an image runs as unless told otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUser {
    Root,
    Uid(i64),
    /// A name only the image's own passwd can resolve.
    Name(String),
}

/// What a runtime says that it can do. What it does not say it cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Empty if it does not say (containerd 1.x). The default one is called "".
    pub handlers: Vec<Handler>,
    pub supplemental_groups_policy: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    pub name: String,
    /// With idmapped mounts.
    pub user_namespaces: bool,
}

pub struct ExecOutput {
    pub exit_code: i32,
    pub output: Vec<u8>,
}

impl Runtime {
    /// Connects on first use, and again whenever the runtime was restarted.
    pub fn at(socket: &Path) -> Self {
        let path = socket.to_owned();
        let channel = Endpoint::from_static("http://runtime").connect_with_connector_lazy(tower::service_fn(
            move |_| {
                let path = path.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(path).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                }
            },
        ));
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            leftovers: Leftovers::at(channel),
        }
    }

    // ---- the runtime itself

    /// E.g. `containerd://2.2.3`.
    pub async fn version(&self) -> Result<String, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::VersionRequest::default();
        let answer = within("Version", QUICK, client.version(request)).await?;
        Ok(format!("{}://{}", answer.runtime_name, answer.runtime_version))
    }

    /// What it can do.
    pub async fn features(&self) -> Result<Features, CriError> {
        let mut client = self.runtime.clone();
        let answer = within("Status", QUICK, client.status(wire::StatusRequest::default())).await?;
        let handler = |h: wire::RuntimeHandler| Handler {
            user_namespaces: h.features.is_some_and(|f| f.user_namespaces),
            name: h.name,
        };
        Ok(Features {
            handlers: answer.runtime_handlers.into_iter().map(handler).collect(),
            supplemental_groups_policy: answer.features.is_some_and(|f| f.supplemental_groups_policy),
        })
    }

    // ---- sandboxes

    pub async fn run_sandbox(
        &self,
        config: wire::PodSandboxConfig,
        handler: Option<&str>,
    ) -> Result<SandboxId, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.unwrap_or_default().to_owned(),
        };
        let answer = within("RunPodSandbox", SLOW, client.run_pod_sandbox(request)).await?;
        Ok(SandboxId(answer.pod_sandbox_id))
    }

    /// Kills what is left in it and takes its network away. Fine if it is gone.
    pub async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        let request = wire::StopPodSandboxRequest {
            pod_sandbox_id: id.0.clone(),
        };
        absent_is_fine(within("StopPodSandbox", SLOW, client.stop_pod_sandbox(request)).await)
    }

    /// Removes it with its containers. Fine if it is gone.
    pub async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        let request = wire::RemovePodSandboxRequest {
            pod_sandbox_id: id.0.clone(),
        };
        absent_is_fine(within("RemovePodSandbox", SLOW, client.remove_pod_sandbox(request)).await)?;
        self.leftovers.remove(&id.0).await
    }

    /// Our sandboxes: all of this host, or those of one key.
    pub async fn sandboxes(&self, of: Labels<'_>) -> Result<Vec<KnownSandbox>, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ListPodSandboxRequest {
            filter: Some(wire::PodSandboxFilter {
                id: String::new(),
                label_selector: of.selector(),
            }),
        };
        let answer = within("ListPodSandbox", QUICK, client.list_pod_sandbox(request)).await?;
        Ok(answer
            .items
            .into_iter()
            .filter_map(|item| {
                Some(KnownSandbox {
                    key: key_of(&item.labels)?,
                    ready: item.state() == wire::PodSandboxState::SandboxReady,
                    id: SandboxId(item.id),
                })
            })
            .collect())
    }

    // ---- containers

    /// Creates a container. One of the same number that an earlier try left behind
    /// is removed first.
    pub async fn create_container(
        &self,
        sandbox: &SandboxId,
        key: &SandboxKey,
        config: wire::ContainerConfig,
        sandbox_config: wire::PodSandboxConfig,
    ) -> Result<ContainerId, CriError> {
        let request = wire::CreateContainerRequest {
            pod_sandbox_id: sandbox.0.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let create = || async {
            let mut client = self.runtime.clone();
            within("CreateContainer", SLOW, client.create_container(request.clone())).await
        };
        let answer = match create().await {
            Err(error) if error.name_is_taken() => {
                let wanted = request.config.as_ref().and_then(|c| c.metadata.as_ref());
                for known in self.containers(Labels::Of(key)).await? {
                    let same = wanted
                        .is_some_and(|w| w.name == known.container.as_str() && w.attempt == known.restart);
                    if same {
                        self.clear_away(&known.id).await?;
                    }
                }
                create().await?
            }
            answer => answer?,
        };
        Ok(ContainerId(answer.container_id))
    }

    /// Kills and removes a container whatever it is doing.
    async fn clear_away(&self, id: &ContainerId) -> Result<(), CriError> {
        let clear = || async {
            self.stop_container(id, Duration::ZERO).await?;
            self.remove_container(id).await
        };
        let patience = ConstantBuilder::new()
            .with_delay(LEFTOVER_POLL)
            .with_max_times(LEFTOVER_POLLS);
        clear.retry(patience).when(CriError::is_starting).await
    }

    pub async fn start_container(&self, id: &ContainerId) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        let request = wire::StartContainerRequest {
            container_id: id.0.clone(),
        };
        within("StartContainer", SLOW, client.start_container(request))
            .await
            .map(drop)
    }

    /// The stop signal, then SIGKILL after `grace`; returns when it is dead. Fine
    /// if it is gone.
    pub async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        // The wire has whole seconds; none is cut off.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        let request = wire::StopContainerRequest {
            container_id: id.0.clone(),
            timeout: i64::try_from(seconds)
                .unwrap_or(i64::MAX / 1_000_000_000)
                .min(i64::MAX / 1_000_000_000),
        };
        let limit = grace.saturating_add(SLOW);
        absent_is_fine(within("StopContainer", limit, client.stop_container(request)).await)
    }

    pub async fn remove_container(&self, id: &ContainerId) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        let request = wire::RemoveContainerRequest {
            container_id: id.0.clone(),
        };
        absent_is_fine(within("RemoveContainer", QUICK, client.remove_container(request)).await)
    }

    pub async fn containers(&self, of: Labels<'_>) -> Result<Vec<KnownContainer>, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ListContainersRequest {
            filter: Some(wire::ContainerFilter {
                label_selector: of.selector(),
                ..Default::default()
            }),
        };
        let answer = within("ListContainers", QUICK, client.list_containers(request)).await?;
        Ok(answer
            .containers
            .into_iter()
            .filter_map(|item| {
                Some(KnownContainer {
                    key: key_of(&item.labels)?,
                    container: ContainerName::parse("label", item.labels.get(LABEL_CONTAINER)?.as_str())
                        .ok()?,
                    restart: item.metadata.as_ref()?.attempt,
                    state: item.state(),
                    id: ContainerId(item.id),
                    sandbox: SandboxId(item.pod_sandbox_id),
                })
            })
            .collect())
    }

    pub async fn report(&self, id: &ContainerId) -> Result<ContainerReport, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ContainerStatusRequest {
            container_id: id.0.clone(),
            verbose: false,
        };
        let answer = within("ContainerStatus", QUICK, client.container_status(request)).await?;
        let status = answer.status.ok_or(CriError::Incomplete {
            call: "ContainerStatus",
            field: "status",
        })?;
        Ok(report(status))
    }

    pub async fn reopen_log(&self, id: &ContainerId) -> Result<(), CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ReopenContainerLogRequest {
            container_id: id.0.clone(),
        };
        within("ReopenContainerLog", QUICK, client.reopen_container_log(request))
            .await
            .map(drop)
    }

    /// Runs a command in a container and waits for it.
    pub async fn exec(
        &self,
        id: &ContainerId,
        command: &[String],
        limit: Option<Duration>,
    ) -> Result<ExecOutput, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ExecSyncRequest {
            container_id: id.0.clone(),
            cmd: command.to_vec(),
            timeout: limit
                .map(|l| i64::try_from(l.as_secs().max(1)).unwrap_or(i64::MAX / 1_000_000_000))
                .unwrap_or(0),
        };
        let answer = match limit {
            Some(limit) => {
                // The runtime kills the command at its own limit; ours is for a runtime that hangs.
                let limit = limit.saturating_add(Duration::from_secs(5));
                within("ExecSync", limit, client.exec_sync(request)).await?
            }
            None => answered("ExecSync", client.exec_sync(request).await)?,
        };
        let mut output = answer.stdout;
        output.extend(answer.stderr);
        Ok(ExecOutput {
            exit_code: answer.exit_code,
            output,
        })
    }

    // ---- streams: URLs of the runtime's streaming server

    pub async fn exec_url(&self, request: wire::ExecRequest) -> Result<String, CriError> {
        let mut client = self.runtime.clone();
        Ok(within("Exec", QUICK, client.exec(request)).await?.url)
    }

    pub async fn attach_url(&self, request: wire::AttachRequest) -> Result<String, CriError> {
        let mut client = self.runtime.clone();
        Ok(within("Attach", QUICK, client.attach(request)).await?.url)
    }

    pub async fn port_forward_url(&self, sandbox: &SandboxId, ports: &[u16]) -> Result<String, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::PortForwardRequest {
            pod_sandbox_id: sandbox.0.clone(),
            port: ports.iter().map(|&p| p.into()).collect(),
        };
        Ok(within("PortForward", QUICK, client.port_forward(request))
            .await?
            .url)
    }

    /// Who makes the containers' cgroups; None of a runtime that does not say (before
    /// containerd 2).
    pub async fn cgroup_driver(&self) -> Result<Option<wire::CgroupDriver>, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::RuntimeConfigRequest {};
        match within("RuntimeConfig", QUICK, client.runtime_config(request)).await {
            Ok(answer) => Ok(answer.linux.map(|linux| linux.cgroup_driver())),
            Err(CriError::Answer {
                code: tonic::Code::Unimplemented,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    // ---- stats

    pub async fn container_stats(&self) -> Result<Vec<wire::ContainerStats>, CriError> {
        let mut client = self.runtime.clone();
        let request = wire::ListContainerStatsRequest::default();
        Ok(
            within("ListContainerStats", QUICK, client.list_container_stats(request))
                .await?
                .stats,
        )
    }

    // ---- images

    /// The image if it is on the host.
    pub async fn image(&self, image: &str, handler: Option<&str>) -> Result<Option<ImageInfo>, CriError> {
        let mut client = self.images.clone();
        let request = wire::ImageStatusRequest {
            image: Some(image_spec(image, handler)),
            verbose: false,
        };
        let answer = within("ImageStatus", QUICK, client.image_status(request)).await?;
        Ok(answer.image.map(|image| ImageInfo {
            bytes: image.size,
            pinned: image.pinned,
            user: match (image.uid, image.username.as_str()) {
                (Some(uid), _) if uid.value != 0 => ImageUser::Uid(uid.value),
                (_, "") | (_, "root") => ImageUser::Root,
                (_, name) => ImageUser::Name(name.to_owned()),
            },
            id: image.id,
        }))
    }

    /// Returns the image's id. The registry is asked for the manifest also when all
    /// is there. Dropped, the runtime gives it up.
    pub async fn pull(
        &self,
        image: &str,
        handler: Option<&str>,
        auth: Option<wire::AuthConfig>,
        sandbox: wire::PodSandboxConfig,
        limit: Duration,
    ) -> Result<String, CriError> {
        let mut client = self.images.clone();
        let request = wire::PullImageRequest {
            image: Some(image_spec(image, handler)),
            auth,
            sandbox_config: Some(sandbox),
        };
        Ok(within("PullImage", limit, client.pull_image(request))
            .await?
            .image_ref)
    }

    pub async fn images(&self) -> Result<Vec<wire::Image>, CriError> {
        let mut client = self.images.clone();
        let request = wire::ListImagesRequest::default();
        Ok(within("ListImages", QUICK, client.list_images(request))
            .await?
            .images)
    }

    pub async fn remove_image(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.images.clone();
        let request = wire::RemoveImageRequest {
            image: Some(image_spec(id, None)),
        };
        within("RemoveImage", SLOW, client.remove_image(request))
            .await
            .map(drop)
    }

    /// Where images lie.
    pub async fn image_directories(&self) -> Result<Vec<String>, CriError> {
        let mut client = self.images.clone();
        let answer = within(
            "ImageFsInfo",
            QUICK,
            client.image_fs_info(wire::ImageFsInfoRequest::default()),
        )
        .await?;
        Ok(answer
            .image_filesystems
            .into_iter()
            .filter_map(|fs| fs.fs_id.map(|id| id.mountpoint))
            .collect())
    }

    pub(crate) fn runtime_client(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }
}

/// Which of the runtime's sandboxes and containers are meant.
#[derive(Debug, Clone, Copy)]
pub enum Labels<'a> {
    /// All that a pool agent made for this host.
    Host(&'a pool_agent_api::HostName),
    Of(&'a SandboxKey),
}

impl Labels<'_> {
    fn selector(self) -> HashMap<String, String> {
        match self {
            Self::Host(host) => HashMap::from([(LABEL_HOST.into(), host.to_string())]),
            Self::Of(key) => HashMap::from([
                (LABEL_POD_UID.into(), key.pod.to_string()),
                (LABEL_ATTEMPT.into(), key.attempt.to_string()),
            ]),
        }
    }
}

/// The key that labels name; None for what is not ours.
pub fn key_of(labels: &HashMap<String, String>) -> Option<SandboxKey> {
    Some(SandboxKey {
        pod: pool_agent_api::PodUid::parse("label", labels.get(LABEL_POD_UID)?.as_str()).ok()?,
        attempt: pool_agent_api::Attempt::parse("label", labels.get(LABEL_ATTEMPT)?.parse().ok()?).ok()?,
    })
}

fn image_spec(image: &str, handler: Option<&str>) -> wire::ImageSpec {
    wire::ImageSpec {
        image: image.to_owned(),
        user_specified_image: image.to_owned(),
        runtime_handler: handler.unwrap_or_default().to_owned(),
    }
}

fn report(status: wire::ContainerStatus) -> ContainerReport {
    let state = match status.state() {
        wire::ContainerState::ContainerCreated => ReportedState::Created,
        wire::ContainerState::ContainerRunning => ReportedState::Running {
            started_at: time(status.started_at).unwrap_or(Timestamp::UNIX_EPOCH),
        },
        // A run the runtime lost track of has ended as far as anybody can tell.
        wire::ContainerState::ContainerExited | wire::ContainerState::ContainerUnknown => {
            ReportedState::Exited(Terminated {
                exit_code: status.exit_code,
                signal: 0,
                reason: status.reason.clone(),
                message: status.message.clone(),
                started_at: time(status.started_at),
                finished_at: time(status.finished_at)
                    .or(time(status.created_at))
                    .unwrap_or(Timestamp::UNIX_EPOCH),
                container_id: format!("containerd://{}", status.id),
            })
        }
    };
    ContainerReport {
        id: ContainerId(status.id),
        image_id: if status.image_ref.is_empty() {
            status.image_id
        } else {
            status.image_ref
        },
        restart: status.metadata.map_or(0, |m| m.attempt),
        created_at: time(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
        state,
    }
}

/// A time on this wire: nanoseconds of the Unix epoch, 0 for none.
fn time(nanos: i64) -> Option<Timestamp> {
    (nanos > 0)
        .then(|| Timestamp::from_nanosecond(nanos.into()).ok())
        .flatten()
}

async fn within<T>(
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CriError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answered(call, answer),
        Err(_) => Err(CriError::Timeout { call, limit }),
    }
}

fn answered<T>(call: &'static str, answer: Result<Response<T>, Status>) -> Result<T, CriError> {
    answer
        .map(Response::into_inner)
        .map_err(|status| CriError::Answer {
            call,
            code: status.code(),
            message: status.message().to_owned(),
        })
}

fn absent_is_fine<T>(answer: Result<T, CriError>) -> Result<(), CriError> {
    match answer {
        Err(error) if !error.not_found() => Err(error),
        _ => Ok(()),
    }
}
