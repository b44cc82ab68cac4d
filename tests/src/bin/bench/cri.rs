//! The container runtime by itself: a sandbox, one container in it, started.
//! The least that any node has to do for a pod.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::Instant};
use tonic::transport::{Channel, Endpoint};

use proto::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxPodSandboxConfig,
    ListPodSandboxRequest, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest,
    runtime_service_client::RuntimeServiceClient,
};

/// Kubernetes' Container Runtime Interface, as pool-agent speaks it.
#[expect(unreachable_pub, reason = "generated")]
#[expect(clippy::all, reason = "generated")]
mod proto {
    tonic::include_proto!("runtime.v1");
}

/// Longer than any start takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// One that was started.
pub(crate) struct Sandbox(String);

#[derive(Clone)]
pub(crate) struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    cgroup_parent: String,
}

impl Cri {
    /// What it starts goes below `cgroup_parent`.
    pub(crate) async fn connect(socket: &Path, cgroup_parent: &str) -> Result<Self> {
        let path = socket.to_owned();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not looked at: the connector knows the socket.
        let channel = Endpoint::from_static("http://containerd")
            .timeout(LIMIT)
            .connect_with_connector(connect)
            .await
            .with_context(|| format!("cannot reach containerd at {}", socket.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel),
            cgroup_parent: cgroup_parent.to_owned(),
        })
    }

    /// Starts a pod of one container: its sandbox, and how long it took.
    pub(crate) async fn start(
        &self,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> Result<(Sandbox, Duration)> {
        let mut runtime = self.runtime.clone();
        let sandbox_config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "bench".into(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/{name}", self.cgroup_parent),
                ..Default::default()
            }),
            ..Default::default()
        };
        let since = Instant::now();
        let run = RunPodSandboxRequest {
            config: Some(sandbox_config.clone()),
            ..Default::default()
        };
        let sandbox = runtime.run_pod_sandbox(run).await?.into_inner().pod_sandbox_id;
        let create = CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: "main".into(),
                    attempt: 0,
                }),
                image: Some(ImageSpec {
                    image: image.to_owned(),
                    ..Default::default()
                }),
                command: command.iter().map(|word| (*word).to_owned()).collect(),
                ..Default::default()
            }),
            sandbox_config: Some(sandbox_config),
        };
        let container_id = runtime.create_container(create).await?.into_inner().container_id;
        runtime
            .start_container(StartContainerRequest { container_id })
            .await?;
        Ok((Sandbox(sandbox), since.elapsed()))
    }

    pub(crate) async fn remove(&self, Sandbox(pod_sandbox_id): Sandbox) -> Result<()> {
        let mut runtime = self.runtime.clone();
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        runtime.stop_pod_sandbox(stop).await?;
        runtime
            .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })
            .await?;
        Ok(())
    }

    /// Waits until no sandbox of the namespace runs: what goes on being removed
    /// after the API server has forgotten a pod would slow whoever is next.
    pub(crate) async fn wait_idle(&self, namespace: &str) -> Result<()> {
        let until = Instant::now() + LIMIT;
        loop {
            let listed = self
                .runtime
                .clone()
                .list_pod_sandbox(ListPodSandboxRequest::default())
                .await?;
            let running = listed.into_inner().items.into_iter().filter(|sandbox| {
                sandbox.state() == PodSandboxState::SandboxReady
                    && sandbox
                        .metadata
                        .as_ref()
                        .is_some_and(|pod| pod.namespace == namespace)
            });
            match running.count() {
                0 => return Ok(()),
                count if Instant::now() > until => bail!("{count} sandboxes of {namespace} did not end"),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}
