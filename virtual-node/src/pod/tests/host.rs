//! A host that exists only here: it keeps the contract of `pool-agent/api` as an
//! agent does, runs nothing, and does to its sandboxes what a test says.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{Stream, StreamExt, stream};
use hyper_util::rt::TokioIo;
use pool_agent_api::{
    SandboxKey,
    wire::{
        self, ContainerState, ContainerStatus, MeshState, SandboxState, SandboxStatus,
        container_state::State, pool_agent_server::PoolAgent, start_sandbox_response::Outcome,
        watch_event::Event,
    },
};
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    sync::watch,
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

use super::world::Journal;

/// What a host does with a start.
#[derive(Debug, Clone)]
pub(super) enum Start {
    Take,
    Refuse(wire::RefusalReason),
    Fail(tonic::Code),
    /// No answer until this changes.
    Wait,
    /// It is taken, and the answer is lost.
    TakeUnanswered,
}

#[derive(Default)]
struct Sandboxes {
    all: BTreeMap<SandboxKey, SandboxStatus>,
    /// By pod UID: attempts up to here do not start.
    fences: BTreeMap<String, u32>,
    changes: Vec<Event>,
    revision: u64,
}

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Host {
    name: &'static str,
    sandboxes: Arc<Mutex<Sandboxes>>,
    start: watch::Sender<Start>,
    /// Nothing passes while it is false.
    reachable: watch::Sender<bool>,
    journal: Journal,
}

impl Host {
    pub(super) fn new(name: &'static str, journal: Journal) -> Self {
        Self {
            name,
            sandboxes: Arc::default(),
            start: watch::Sender::new(Start::Take),
            reachable: watch::Sender::new(true),
            journal,
        }
    }

    /// A channel to it: a real gRPC connection over a pipe.
    pub(super) fn channel(&self) -> Channel {
        let host = self.clone();
        Endpoint::from_static("http://host")
            .http2_keep_alive_interval(std::time::Duration::from_secs(10))
            .keep_alive_timeout(std::time::Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(tower::service_fn(move |_| {
                let host = host.clone();
                async move { host.connect().map(TokioIo::new) }
            }))
    }

    fn connect(&self) -> std::io::Result<DuplexStream> {
        if !*self.reachable.borrow() {
            return Err(std::io::ErrorKind::HostUnreachable.into());
        }
        let (ours, mut near) = duplex(1 << 16);
        let (mut far, theirs) = duplex(1 << 16);
        let mut reachable = self.reachable.subscribe();
        tokio::spawn(async move {
            let silenced = async { reachable.wait_for(|reachable| !reachable).await.is_ok() };
            let silent = tokio::select! {
                _ = copy_bidirectional(&mut near, &mut far) => false,
                silenced = silenced => silenced,
            };
            if silent {
                // Silent, not closed: as a host whose cable was pulled.
                let _back = reachable.wait_for(|reachable| *reachable).await.is_ok();
            }
        });
        let agent = wire::pool_agent_server::PoolAgentServer::new(self.clone());
        let incoming = stream::iter([Ok::<_, std::io::Error>(theirs)]);
        tokio::spawn(Server::builder().add_service(agent).serve_with_incoming(incoming));
        Ok(ours)
    }

    fn sandboxes(&self) -> MutexGuard<'_, Sandboxes> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what tests do

    pub(super) fn on_start(&self, start: Start) {
        self.start.send_replace(start);
    }

    pub(super) fn set_reachable(&self, reachable: bool) {
        self.reachable.send_replace(reachable);
    }

    /// Its containers run and are ready.
    pub(super) fn run(&self, uid: &str) {
        let address = if self.name == "host-a" {
            "10.77.1.2"
        } else {
            "10.77.2.2"
        };
        self.change(uid, |status| {
            status.state = SandboxState::Running.into();
            status.mesh = MeshState::Serving.into();
            status.pod_ip = address.into();
            status.containers = vec![container(
                true,
                State::Running(wire::Running {
                    started_at: Some(prost_types::Timestamp::default()),
                }),
            )];
        });
    }

    /// Its container ended, and nothing of it is left to run.
    pub(super) fn exit(&self, uid: &str, exit_code: i32) {
        self.change(uid, |status| end(status, exit_code));
    }

    /// Its container ended, and its sandbox is still to be taken down.
    pub(super) fn finish(&self, uid: &str) {
        self.change(uid, |status| {
            end(status, 0);
            status.state = SandboxState::Running.into();
        });
    }

    /// Its claim is being deleted. The deadline is far off: nothing here waits for it.
    pub(super) fn notice(&self, uid: &str) {
        self.change(uid, |status| {
            status.notice = Some(wire::Notice {
                reason: "ClaimDeleted".into(),
                deadline: Some(prost_types::Timestamp {
                    seconds: 4_000_000_000,
                    nanos: 0,
                }),
            });
        });
    }

    /// Its container ended; what is left of the sandbox is being taken down.
    pub(super) fn wind_down(&self, uid: &str, exit_code: i32) {
        self.change(uid, |status| {
            end(status, exit_code);
            status.state = SandboxState::Stopping.into();
        });
    }

    /// Its sandbox died under it.
    pub(super) fn lose_sandbox(&self, uid: &str) {
        self.change(uid, |status| {
            end(status, 137);
            status.reason = "SandboxLost".into();
        });
    }

    /// It forgets the pod, fence and all: its disk was lost.
    pub(super) fn lose_everything(&self) {
        let mut sandboxes = self.sandboxes();
        let keys: Vec<SandboxKey> = sandboxes.all.keys().cloned().collect();
        for key in keys {
            sandboxes.all.remove(&key);
            sandboxes.changes.push(Event::Forgotten(key.into()));
        }
        sandboxes.fences.clear();
        drop(sandboxes);
        self.journal.stir();
    }

    /// It says that it runs what nobody asked it to.
    pub(super) fn claim(&self, uid: &str, attempt: u32) {
        let key = wire::SandboxKey {
            pod_uid: uid.into(),
            attempt,
        };
        self.sandboxes()
            .set(SandboxKey::from_wire(Some(key)).unwrap(), "shop", "web");
        self.run(uid);
    }

    /// It tells the user of the pod's attempt.
    pub(super) fn tell(&self, uid: &str, attempt: u32, reason: &str) {
        let event = wire::PodEvent {
            key: Some(wire::SandboxKey {
                pod_uid: uid.into(),
                attempt,
            }),
            reason: reason.into(),
            at: Some(prost_types::Timestamp::default()),
            ..wire::PodEvent::default()
        };
        self.sandboxes().changes.push(Event::PodEvent(event));
        self.journal.stir();
    }

    /// The attempts of the pod that it has.
    pub(super) fn attempts(&self, uid: &str) -> Vec<u32> {
        let sandboxes = self.sandboxes();
        let of = sandboxes.all.keys().filter(|key| key.pod.as_str() == uid);
        of.map(|key| key.attempt.get()).collect()
    }

    fn change(&self, uid: &str, change: impl FnOnce(&mut SandboxStatus)) {
        let mut sandboxes = self.sandboxes();
        let (key, mut status) = sandboxes
            .all
            .iter()
            .rfind(|(key, _)| key.pod.as_str() == uid)
            .map(|(key, status)| (key.clone(), status.clone()))
            .unwrap();
        change(&mut status);
        sandboxes.publish(key, status);
        drop(sandboxes);
        self.journal.stir();
    }

    fn note(&self, call: &str, key: &SandboxKey) {
        self.journal.note(format!("{} {call} {key}", self.name));
    }
}

fn end(status: &mut SandboxStatus, exit_code: i32) {
    status.state = SandboxState::Stopped.into();
    status.mesh = MeshState::Detached.into();
    let ended = wire::Terminated {
        exit_code,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.into(),
        finished_at: Some(prost_types::Timestamp::default()),
        ..wire::Terminated::default()
    };
    status.containers = vec![container(false, State::Terminated(ended))];
}

fn container(ready: bool, state: State) -> ContainerStatus {
    ContainerStatus {
        name: "app".into(),
        image: "app:1".into(),
        container_id: "containerd://1".into(),
        ready,
        started: ready,
        state: Some(ContainerState { state: Some(state) }),
        ..ContainerStatus::default()
    }
}

impl Sandboxes {
    fn publish(&mut self, key: SandboxKey, mut status: SandboxStatus) {
        self.revision += 1;
        status.revision = self.revision;
        self.changes.push(Event::Status(status.clone()));
        self.all.insert(key, status);
    }

    fn set(&mut self, key: SandboxKey, namespace: &str, name: &str) {
        let status = SandboxStatus {
            key: Some((&key).into()),
            state: SandboxState::Preparing.into(),
            mesh: MeshState::Detached.into(),
            identity: "spiffe://cluster.local/ns/shop/sa/default".into(),
            host_ip: "192.0.2.11".into(),
            accepted_at: Some(prost_types::Timestamp::default()),
            namespace: namespace.into(),
            name: name.into(),
            node_name: super::world::NODE.into(),
            ..SandboxStatus::default()
        };
        self.publish(key, status);
    }

    fn take(&mut self, spec: &wire::SandboxSpec) -> Result<(), wire::RefusalReason> {
        let key = SandboxKey::from_wire(spec.key.clone()).unwrap();
        if self.all.contains_key(&key) {
            return Ok(());
        }
        let fence = self.fences.get(key.pod.as_str()).copied().unwrap_or(0);
        if key.attempt.get() <= fence {
            return Err(wire::RefusalReason::EndedAttempt);
        }
        if self
            .all
            .keys()
            .any(|other| other.pod == key.pod && other.attempt > key.attempt)
        {
            return Err(wire::RefusalReason::OlderAttempt);
        }
        self.set(key, &spec.namespace, &spec.name);
        Ok(())
    }

    fn event_after(&self, at: usize) -> Option<(wire::WatchEvent, usize)> {
        let event = self.changes.get(at)?.clone();
        Some((wire::WatchEvent { event: Some(event) }, at + 1))
    }
}

fn key(key: Option<wire::SandboxKey>) -> Result<SandboxKey, Status> {
    SandboxKey::from_wire(key).map_err(|invalid| Status::invalid_argument(invalid.to_string()))
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl PoolAgent for Host {
    type WatchStream = Events<wire::WatchEvent>;
    type GrantStream = Events<wire::GrantResponse>;
    type LogsStream = Events<wire::LogChunk>;
    type SpliceStream = Events<wire::SpliceFrame>;

    async fn get_host(&self, _: Request<wire::GetHostRequest>) -> Result<Response<wire::Host>, Status> {
        let capacity = wire::Resources {
            cpu_millis: 4000,
            memory_bytes: 1 << 32,
            ephemeral_storage_bytes: 1 << 36,
            sandboxes: 110,
        };
        Ok(Response::new(wire::Host {
            name: self.name.into(),
            version: "test".into(),
            boot_id: "1".into(),
            address: "192.0.2.11".into(),
            capacity: Some(capacity),
            allocatable: Some(capacity),
            free: Some(capacity),
            pressure: None,
            runtime_version: "containerd://2.2.3".into(),
            kernel_version: "6.18".into(),
            os_image: "test".into(),
            architecture: "amd64".into(),
        }))
    }

    async fn configure_tenant(
        &self,
        _: Request<wire::Tenant>,
    ) -> Result<Response<wire::ConfigureTenantResponse>, Status> {
        Ok(Response::new(wire::ConfigureTenantResponse {}))
    }

    async fn start_sandbox(
        &self,
        request: Request<wire::StartSandboxRequest>,
    ) -> Result<Response<wire::StartSandboxResponse>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        self.note("start", &key(spec.key.clone())?);
        let mut rule = self.start.subscribe();
        let decided = rule.wait_for(|start| !matches!(start, Start::Wait)).await;
        let start = decided
            .map_err(|_| Status::cancelled("the test is over"))?
            .clone();
        let refused = |reason: wire::RefusalReason| {
            Outcome::Refused(wire::Refused {
                reason: reason.into(),
                message: "as the test has it".into(),
                free: None,
            })
        };
        let outcome = match start {
            Start::Refuse(reason) => refused(reason),
            Start::Fail(code) => return Err(Status::new(code, "as the test has it")),
            Start::Take | Start::TakeUnanswered | Start::Wait => match self.sandboxes().take(&spec) {
                Ok(()) => Outcome::Accepted(wire::Accepted {}),
                Err(reason) => refused(reason),
            },
        };
        self.journal.stir();
        if let Start::TakeUnanswered = start {
            return Err(Status::unavailable("the answer is lost"));
        }
        Ok(Response::new(wire::StartSandboxResponse {
            outcome: Some(outcome),
        }))
    }

    async fn update_sandbox(
        &self,
        request: Request<wire::UpdateSandboxRequest>,
    ) -> Result<Response<wire::UpdateSandboxResponse>, Status> {
        self.note("update", &key(request.into_inner().key)?);
        Ok(Response::new(wire::UpdateSandboxResponse {}))
    }

    async fn stop_sandbox(
        &self,
        request: Request<wire::StopSandboxRequest>,
    ) -> Result<Response<wire::StopSandboxResponse>, Status> {
        let request = request.into_inner();
        let key = key(request.key)?;
        self.note(&format!("stop({})", request.grace_seconds), &key);
        let mut sandboxes = self.sandboxes();
        let Some(mut status) = sandboxes.all.get(&key).cloned() else {
            return Err(Status::not_found("no such sandbox"));
        };
        // With a grace, the test says when it is over.
        if request.grace_seconds == 0 {
            end(&mut status, 137);
        } else {
            status.state = SandboxState::Stopping.into();
        }
        sandboxes.publish(key, status);
        drop(sandboxes);
        self.journal.stir();
        Ok(Response::new(wire::StopSandboxResponse {}))
    }

    async fn forget_sandbox(
        &self,
        request: Request<wire::ForgetSandboxRequest>,
    ) -> Result<Response<wire::ForgetSandboxResponse>, Status> {
        let key = key(request.into_inner().key)?;
        self.note("forget", &key);
        let mut sandboxes = self.sandboxes();
        let fence = sandboxes.fences.entry(key.pod.to_string()).or_default();
        *fence = (*fence).max(key.attempt.get());
        if sandboxes.all.remove(&key).is_some() {
            sandboxes.changes.push(Event::Forgotten(key.into()));
        }
        drop(sandboxes);
        self.journal.stir();
        Ok(Response::new(wire::ForgetSandboxResponse {}))
    }

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (snapshot, from) = {
            let sandboxes = self.sandboxes();
            let all: Vec<Event> = sandboxes.all.values().cloned().map(Event::Status).collect();
            (all, sandboxes.changes.len())
        };
        let first = snapshot
            .into_iter()
            .chain([Event::Synced(wire::Synced {})])
            .map(|event| Ok(wire::WatchEvent { event: Some(event) }));
        let host = self.clone();
        let stirred = self.journal.subscribe();
        let later = stream::unfold(from, move |at| {
            let (host, mut stirred) = (host.clone(), stirred.clone());
            async move {
                loop {
                    stirred.borrow_and_update();
                    if let Some((event, next)) = host.sandboxes().event_after(at) {
                        return Some((Ok(event), next));
                    }
                    stirred.changed().await.ok()?;
                }
            }
        });
        Ok(Response::new(stream::iter(first).chain(later).boxed()))
    }

    async fn grant(
        &self,
        request: Request<Streaming<wire::GrantRequest>>,
    ) -> Result<Response<Self::GrantStream>, Status> {
        let answers = request.into_inner().map(|grant| {
            Ok(wire::GrantResponse {
                sequence: grant?.sequence,
                lease_millis: 40_000,
            })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn logs(&self, _: Request<wire::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        Err(Status::unimplemented("not of this test"))
    }

    async fn splice(
        &self,
        _: Request<Streaming<wire::SpliceFrame>>,
    ) -> Result<Response<Self::SpliceStream>, Status> {
        Err(Status::unimplemented("not of this test"))
    }

    async fn stats(&self, _: Request<wire::StatsRequest>) -> Result<Response<wire::StatsResponse>, Status> {
        Err(Status::unimplemented("not of this test"))
    }
}
