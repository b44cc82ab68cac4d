//! The hosts of the pool, as this virtual node reaches them.
//!
//! One [`link`] task a host keeps a session: it says who the tenant is, follows
//! the host's `Watch` and pings it. What hosts report of sandboxes goes to the
//! pods' supervisor as [`PoolEvent`]s; what hosts are and have goes into the
//! [`HostTable`], read by the placer and by the Node's status. Pod drivers call
//! hosts through [`Pool::host`].
//!
//! What always holds: a peer is the host whose name its certificate bears, or
//! there is no connection; a sandbox that a host does not list in a snapshot is
//! reported as [`News::Missing`] before that snapshot's `Synced`.

mod channel;
mod link;

pub(crate) use channel::channel;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pool_agent_api::{
    Host, HostName, Invalid, Refusal, SandboxKey, SandboxSpec, SandboxStatus, TenantId, spec::Volume,
    status::PodEvent, wire,
};
use tokio::sync::{mpsc, watch};
use tonic::{Code, Streaming, transport::Channel};

use crate::config;

/// One call that returns at once. Longer, and the answer is treated as lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Reports on their way to the pods' supervisor; a full queue holds the host's
/// stream back, which HTTP/2 passes on to the host.
pub(crate) const EVENTS: usize = 256;
/// A spec carries whole ConfigMaps and Secrets, each up to 1 MiB.
const MESSAGE_LIMIT: usize = 32 << 20;

/// What a host said, in the order it said it.
#[derive(Debug, Clone)]
pub(crate) struct PoolEvent {
    pub(crate) host: HostName,
    pub(crate) news: News,
}

#[derive(Debug, Clone)]
pub(crate) enum News {
    Sandbox(Box<SandboxStatus>),
    /// The host does not know this sandbox (any more).
    Missing(SandboxKey),
    PodEvent(Box<PodEvent>),
    /// Everything the host has of this node has been reported.
    Synced,
    /// Nothing more is heard of the host until the next snapshot.
    Lost,
}

/// What is known of each configured host.
pub(crate) type HostTable = BTreeMap<HostName, HostView>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostView {
    /// Whether a session is open and in sync.
    pub(crate) reachable: bool,
    /// What it last said of itself; None until it was first heard.
    pub(crate) host: Option<Arc<Host>>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The host has no such sandbox (or container).
    #[error("host {host} does not know it: {message}")]
    NotFound { host: HostName, message: String },
    /// The message itself is wrong: no repetition will help.
    #[error("host {host} calls it invalid: {message}")]
    Invalid { host: HostName, message: String },
    /// The host understood and refused.
    #[error("host {host} refused the call: {message}")]
    Refused { host: HostName, message: String },
    /// Whether the call took effect is not known.
    #[error("host {host} did not answer")]
    Unanswered {
        host: HostName,
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("host {host} answered what cannot be understood: {invalid}")]
    Malformed { host: HostName, invalid: Invalid },
}

impl CallError {
    fn new(host: &HostName, status: tonic::Status) -> Self {
        let host = host.clone();
        match status.code() {
            Code::NotFound => Self::NotFound {
                host,
                message: status.message().to_owned(),
            },
            Code::InvalidArgument => Self::Invalid {
                host,
                message: status.message().to_owned(),
            },
            Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
            | Code::OutOfRange => Self::Refused {
                host,
                message: status.message().to_owned(),
            },
            _ => Self::Unanswered {
                host,
                source: Box::new(status),
            },
        }
    }
}

/// All hosts. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pool {
    hosts: Arc<BTreeMap<HostName, HostClient>>,
}

/// Who the pool's sessions speak for.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    pub(crate) tenant: TenantId,
    pub(crate) node_name: String,
    pub(crate) cluster: config::Cluster,
    pub(crate) mesh: config::Mesh,
}

impl Pool {
    /// Starts a link to each host, over the channel that `connect` makes to it. They
    /// end when the receiver of the events is dropped.
    pub(crate) fn start(
        hosts: &[config::PoolHost],
        connect: impl Fn(&config::PoolHost) -> Channel,
        membership: &Membership,
    ) -> (Self, mpsc::Receiver<PoolEvent>, watch::Receiver<HostTable>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let table: HostTable = hosts
            .iter()
            .map(|h| (h.name.clone(), HostView::default()))
            .collect();
        let (table, table_receiver) = watch::channel(table);
        let table = Arc::new(table);
        let mut clients = BTreeMap::new();
        for host in hosts {
            let client = HostClient::new(host.name.clone(), connect(host));
            let link = link::Link::new(client.clone(), membership, events.clone(), table.clone());
            tokio::spawn(link.run());
            clients.insert(host.name.clone(), client);
        }
        let pool = Self {
            hosts: Arc::new(clients),
        };
        (pool, receiver, table_receiver)
    }

    /// None if the pool has no such host (any more).
    pub(crate) fn host(&self, name: &HostName) -> Option<&HostClient> {
        self.hosts.get(name)
    }

    pub(crate) fn hosts(&self) -> impl Iterator<Item = &HostClient> {
        self.hosts.values()
    }
}

/// One host's agent. Cheap to clone; connects, and connects again, by itself.
#[derive(Clone)]
pub(crate) struct HostClient {
    name: HostName,
    client: wire::pool_agent_client::PoolAgentClient<Channel>,
}

impl HostClient {
    pub(crate) fn new(name: HostName, channel: Channel) -> Self {
        Self {
            name,
            client: wire::pool_agent_client::PoolAgentClient::new(channel)
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT),
        }
    }

    pub(crate) fn name(&self) -> &HostName {
        &self.name
    }

    /// One call with an answer, within [`CALL_TIMEOUT`].
    async fn call<T, F>(&self, call: F) -> Result<T, CallError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(CallError::new(&self.name, status)),
            Err(_) => Err(CallError::new(
                &self.name,
                tonic::Status::deadline_exceeded("no answer within 10 s"),
            )),
        }
    }

    async fn get_host(&self) -> Result<Host, CallError> {
        let mut client = self.client.clone();
        let host = self.call(client.get_host(wire::GetHostRequest {})).await?;
        Host::try_from(host).map_err(|invalid| self.malformed(invalid))
    }

    async fn configure_tenant(&self, tenant: wire::Tenant) -> Result<(), CallError> {
        let mut client = self.client.clone();
        self.call(client.configure_tenant(tenant)).await.map(drop)
    }

    async fn watch(&self) -> Result<Streaming<wire::WatchEvent>, CallError> {
        let mut client = self.client.clone();
        self.call(client.watch(wire::WatchRequest {})).await
    }

    /// `Ok(Err(_))` is the host's refusal to take the sandbox: it does not run there.
    pub(crate) async fn start(&self, spec: SandboxSpec) -> Result<Result<(), Refusal>, CallError> {
        use wire::start_sandbox_response::Outcome;
        let mut client = self.client.clone();
        let request = wire::StartSandboxRequest {
            spec: Some(spec.into()),
        };
        match self.call(client.start_sandbox(request)).await?.outcome {
            Some(Outcome::Accepted(_)) => Ok(Ok(())),
            Some(Outcome::Refused(refused)) => Ok(Err(refused.into())),
            None => Err(self.malformed(Invalid::new("outcome", "is required"))),
        }
    }

    pub(crate) async fn update(&self, key: &SandboxKey, volumes: Vec<Volume>) -> Result<(), CallError> {
        let mut client = self.client.clone();
        let request = wire::UpdateSandboxRequest {
            key: Some(key.into()),
            volumes: volumes.into_iter().map(Into::into).collect(),
        };
        self.call(client.update_sandbox(request)).await.map(drop)
    }

    pub(crate) async fn stop(&self, key: &SandboxKey, grace: Duration) -> Result<(), CallError> {
        let mut client = self.client.clone();
        let request = wire::StopSandboxRequest {
            key: Some(key.into()),
            grace_seconds: grace.as_secs(),
        };
        self.call(client.stop_sandbox(request)).await.map(drop)
    }

    pub(crate) async fn forget(&self, key: &SandboxKey) -> Result<(), CallError> {
        let mut client = self.client.clone();
        let request = wire::ForgetSandboxRequest {
            key: Some(key.into()),
        };
        self.call(client.forget_sandbox(request)).await.map(drop)
    }

    pub(crate) async fn logs(
        &self,
        request: wire::LogsRequest,
    ) -> Result<Streaming<wire::LogChunk>, CallError> {
        let mut client = self.client.clone();
        self.call(client.logs(request)).await
    }

    pub(crate) async fn splice<S>(&self, frames: S) -> Result<Streaming<wire::SpliceFrame>, CallError>
    where
        S: futures::Stream<Item = wire::SpliceFrame> + Send + 'static,
    {
        let mut client = self.client.clone();
        self.call(client.splice(frames)).await
    }

    pub(crate) async fn stats(&self) -> Result<Vec<wire::SandboxStats>, CallError> {
        let mut client = self.client.clone();
        let answer = self.call(client.stats(wire::StatsRequest {})).await?;
        Ok(answer.sandboxes)
    }

    /// What a stream of this host's ended with.
    pub(crate) fn refused(&self, status: tonic::Status) -> CallError {
        CallError::new(&self.name, status)
    }

    fn malformed(&self, invalid: Invalid) -> CallError {
        CallError::Malformed {
            host: self.name.clone(),
            invalid,
        }
    }
}
