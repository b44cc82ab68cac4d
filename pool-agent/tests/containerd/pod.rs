//! A sandbox under test: its spec in few words, and what becomes of it.

use anyhow::{Context, ensure};
use pool_agent_api::{
    SandboxKey, SandboxStatus,
    status::{ContainerState, ContainerStatus, PodEvent, SandboxState, Terminated},
    wire,
};
use spindrift_local::images::BUSYBOX_IMAGE;

use super::host::{Host, PATIENCE, Tenant, wait};

/// A spec that is taken: outside the mesh, which nothing here is about.
pub(super) fn pod(containers: Vec<wire::Container>) -> wire::SandboxSpec {
    wire::SandboxSpec {
        node_name: "node".into(),
        namespace: "shop".into(),
        name: "web".into(),
        service_account: "web".into(),
        mesh: wire::MeshMode::None.into(),
        network: Some(wire::PodNetwork {
            hostname: "web".into(),
            ..Default::default()
        }),
        security: Some(wire::PodSecurity::default()),
        restart_policy: wire::RestartPolicy::Always.into(),
        termination_grace_seconds: 1,
        claim: Some(wire::Resources {
            sandboxes: 1,
            ..Default::default()
        }),
        containers,
        ..Default::default()
    }
}

/// One that is not started again.
pub(super) fn job(containers: Vec<wire::Container>) -> wire::SandboxSpec {
    wire::SandboxSpec {
        restart_policy: wire::RestartPolicy::Never.into(),
        ..pod(containers)
    }
}

pub(super) fn text(literal: &str) -> wire::Text {
    wire::Text {
        segments: vec![wire::Segment {
            part: Some(wire::segment::Part::Literal(literal.into())),
        }],
    }
}

/// A container of the busybox that is on the host.
pub(super) fn running(name: &str, command: &[&str]) -> wire::Container {
    wire::Container {
        name: name.into(),
        image: BUSYBOX_IMAGE.reference.into(),
        pull_policy: wire::PullPolicy::Never.into(),
        command: command.iter().map(|word| text(word)).collect(),
        security: Some(wire::ContainerSecurity {
            seccomp: wire::SeccompProfile::RuntimeDefault.into(),
            ..Default::default()
        }),
        termination_message_path: "/dev/termination-log".into(),
        ..Default::default()
    }
}

pub(super) fn shell(name: &str, script: &str) -> wire::Container {
    running(name, &["sh", "-c", script])
}

/// Does nothing, and ends at once when told to.
pub(super) fn idle(name: &str) -> wire::Container {
    shell(name, "trap exit TERM; while :; do sleep 1000 & wait; done")
}

pub(super) fn mounting(mut container: wire::Container, volume: &str, path: &str) -> wire::Container {
    container.mounts.push(wire::Mount {
        volume: volume.into(),
        mount_path: path.into(),
        ..Default::default()
    });
    container
}

pub(super) fn empty_dir(name: &str, memory: bool, limit: Option<u64>) -> wire::Volume {
    wire::Volume {
        name: name.into(),
        source: Some(wire::volume::Source::EmptyDir(wire::EmptyDir {
            memory,
            size_limit_bytes: limit,
        })),
    }
}

pub(super) fn files(name: &str, sensitive: bool, files: &[(&str, &str, u32)]) -> wire::Volume {
    let file = |(path, content, mode): &(&str, &str, u32)| wire::File {
        path: (*path).into(),
        content: (*content).into(),
        mode: *mode,
        owner: None,
    };
    wire::Volume {
        name: name.into(),
        source: Some(wire::volume::Source::Files(wire::Files {
            files: files.iter().map(file).collect(),
            sensitive,
        })),
    }
}

/// A sandbox that was accepted.
pub(super) struct Pod<'a> {
    host: &'a Host,
    tenant: &'a Tenant,
    pub(super) key: SandboxKey,
}

impl<'a> Pod<'a> {
    pub(super) fn new(host: &'a Host, tenant: &'a Tenant, key: SandboxKey) -> Self {
        Self { host, tenant, key }
    }

    fn wire_key(&self) -> Option<wire::SandboxKey> {
        Some((&self.key).into())
    }

    /// The status once it is as wanted.
    pub(super) async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&SandboxStatus) -> bool,
    ) -> anyhow::Result<SandboxStatus> {
        let look = self
            .tenant
            .seen
            .until(|told| told.statuses.get(&self.key).filter(|s| wanted(s)).cloned());
        match tokio::time::timeout(PATIENCE, look).await {
            Ok(status) => Ok(status),
            Err(_) => {
                let last = self
                    .tenant
                    .seen
                    .look(|told| told.statuses.get(&self.key).cloned());
                anyhow::bail!("{} did not come to {what}; it is {last:#?}", self.key)
            }
        }
    }

    pub(super) async fn until_running(&self) -> anyhow::Result<SandboxStatus> {
        let up = |c: &ContainerStatus| matches!(c.state, ContainerState::Running { .. });
        self.until("run", |status| status.containers.iter().all(up)).await
    }

    pub(super) async fn until_ready(&self) -> anyhow::Result<SandboxStatus> {
        self.until("be ready", |status| status.containers.iter().all(|c| c.ready))
            .await
    }

    pub(super) async fn until_stopped(&self) -> anyhow::Result<SandboxStatus> {
        self.until("stop", |status| status.state == SandboxState::Stopped)
            .await
    }

    /// All that was told of it, oldest first.
    pub(super) fn history(&self) -> Vec<SandboxStatus> {
        self.tenant.seen.look(|told| {
            let own = told.history.iter().filter(|status| status.key == self.key);
            own.cloned().collect()
        })
    }

    pub(super) fn events(&self) -> Vec<PodEvent> {
        self.tenant.seen.look(|told| {
            let own = told.events.iter().filter(|event| event.key == self.key);
            own.cloned().collect()
        })
    }

    /// Waits for an event with this reason whose message has these words.
    pub(super) async fn event(&self, reason: &str, words: &str) -> anyhow::Result<PodEvent> {
        let fits = |event: &&PodEvent| {
            event.key == self.key && event.reason == reason && event.message.contains(words)
        };
        let look = self
            .tenant
            .seen
            .until(|told| told.events.iter().find(fits).cloned());
        match tokio::time::timeout(PATIENCE, look).await {
            Ok(event) => Ok(event),
            Err(_) => anyhow::bail!("no event {reason} with {words:?}"),
        }
    }

    pub(super) async fn stop(&self, grace_seconds: u64) -> anyhow::Result<()> {
        let request = wire::StopSandboxRequest {
            key: self.wire_key(),
            grace_seconds,
        };
        self.tenant.client().stop_sandbox(request).await?;
        Ok(())
    }

    pub(super) async fn update(&self, volumes: Vec<wire::Volume>) -> anyhow::Result<()> {
        let request = wire::UpdateSandboxRequest {
            key: self.wire_key(),
            volumes,
        };
        self.tenant.client().update_sandbox(request).await?;
        Ok(())
    }

    /// Forgets it, and checks that nothing of it is left on the host.
    pub(super) async fn forget(&self) -> anyhow::Result<()> {
        let request = wire::ForgetSandboxRequest { key: self.wire_key() };
        self.tenant.client().forget_sandbox(request).await?;
        for kind in ["sandbox", "container"] {
            let left = self.host.ids(kind, &self.key).await?;
            ensure!(left.is_empty(), "{kind} {left:?} of {} is left", self.key);
        }
        let dirs = self.host.files().sandbox(&self.key);
        for directory in [dirs.disk(), dirs.run()] {
            ensure!(!directory.exists(), "{} is left", directory.display());
        }
        Ok(())
    }

    /// What a command prints in a container that runs.
    pub(super) async fn exec(&self, container: &str, command: &[&str]) -> anyhow::Result<String> {
        let status = self.until_running().await?;
        let id = container_id(&status, container)?;
        // ctr may end before it has read all that was printed: what lacks its end is
        // asked again.
        const END: &str = "[whole]";
        for _ in 0..5 {
            let session = format!("exec-{}", self.host.next_uid());
            let mut arguments = vec!["tasks", "exec", "--exec-id", session.as_str(), id.as_str()];
            arguments.extend(["sh", "-c", "\"$@\"; code=$?; printf '[whole]'; exit $code", "sh"]);
            arguments.extend(command);
            let printed = self.host.ctr(&arguments).await?;
            if let Some(whole) = printed.trim().strip_suffix(END) {
                return Ok(whole.trim().to_owned());
            }
        }
        anyhow::bail!("{command:?} in {container} prints nothing whole")
    }

    /// A container's log from its beginning to now.
    pub(super) async fn log(&self, container: &str) -> anyhow::Result<String> {
        let request = wire::LogsRequest {
            key: self.wire_key(),
            container: container.into(),
            ..Default::default()
        };
        let mut stream = self.tenant.client().logs(request).await?.into_inner();
        let mut log = Vec::new();
        while let Some(chunk) = stream.message().await? {
            log.extend(chunk.data);
        }
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    pub(super) async fn log_until(
        &self,
        container: &str,
        what: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        wait(&format!("that the log of {container} {what}"), async || {
            let log = self.log(container).await.map_err(|error| format!("{error:#}"))?;
            if wanted(&log) { Ok(log) } else { Err(log) }
        })
        .await
    }
}

pub(super) fn container<'a>(status: &'a SandboxStatus, name: &str) -> anyhow::Result<&'a ContainerStatus> {
    let all = status.init_containers.iter().chain(&status.containers);
    all.into_iter()
        .find(|c| c.name.as_str() == name)
        .with_context(|| format!("there is no container {name}"))
}

pub(super) fn container_id(status: &SandboxStatus, name: &str) -> anyhow::Result<String> {
    let id = &container(status, name)?.container_id;
    Ok(id.trim_start_matches("containerd://").to_owned())
}

/// Why a container waits; empty if it does not.
pub(super) fn waits<'a>(status: &'a SandboxStatus, name: &str) -> (&'a str, &'a str) {
    match container(status, name).map(|c| &c.state) {
        Ok(ContainerState::Waiting { reason, message }) => (reason, message),
        _ => ("", ""),
    }
}

/// How a container ended.
pub(super) fn end<'a>(status: &'a SandboxStatus, name: &str) -> anyhow::Result<&'a Terminated> {
    match &container(status, name)?.state {
        ContainerState::Terminated(end) => Ok(end),
        other => anyhow::bail!("{name} has not ended: {other:?}"),
    }
}
