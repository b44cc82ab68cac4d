//! The hosts of the pool, as this virtual node reaches them.
//!
//! One [`link`] task a host keeps a session: it says who the tenant is, follows
//! the host's `Watch` and pings it. What hosts report of sandboxes goes to the
//! pods' supervisor as [`PoolEvent`]s; what hosts are and have goes into the
//! [`HostTable`], read by the placer and by the Node's status. Pod drivers call
//! hosts through [`Pool::host`].
//!
//! Which hosts there are is told by a [`Named`]: what the configuration lists, or what
//! the claims in the cell name, which comes and goes.
//!
//! What always holds: a peer is the host whose name its certificate bears, or
//! there is no connection; a sandbox that a host does not list in a snapshot is
//! reported as [`News::Missing`] before that snapshot's `Synced`.

mod channel;
mod link;
mod links;
mod right;

pub(crate) use channel::channel;
pub(crate) use right::Rights;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use pool_agent_api::{
    Host, HostName, Invalid, Refusal, SandboxKey, SandboxSpec, SandboxStatus, TenantId, spec::Volume,
    status::PodEvent, tenant::MeshControl, wire,
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
    /// The host is not of the pool any more.
    Gone,
}

/// Which hosts there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Named {
    /// Where each one's agent serves; None: it is not known yet.
    pub(crate) hosts: BTreeMap<HostName, Option<SocketAddr>>,
    /// Whoever is not named is none. Before that, absent is not gone.
    pub(crate) complete: bool,
}

impl Named {
    /// Those of a list, and no others.
    pub(crate) fn listed(hosts: &[config::PoolHost]) -> Self {
        Self {
            hosts: hosts.iter().map(|h| (h.name.clone(), Some(h.address))).collect(),
            complete: true,
        }
    }
}

/// What is known of each host of the pool.
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
    rights: Rights,
    hosts: watch::Receiver<Arc<Hosts>>,
}

/// The hosts that can be called.
#[derive(Debug, Clone, Default)]
struct Hosts {
    /// None: it is a host of the pool, and where it serves is not known yet.
    clients: BTreeMap<HostName, Option<HostClient>>,
    complete: bool,
}

/// Who the pool's sessions speak for.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    pub(crate) tenant: TenantId,
    pub(crate) node_name: String,
    pub(crate) cluster: config::Cluster,
    pub(crate) mesh: MeshControl,
    /// What this process grants to hosts.
    pub(crate) rights: Rights,
}

impl Pool {
    /// Starts a link to each host that is named, over the channel that `connect` makes
    /// to it, and ends it a while after the host is named no more. All end when the
    /// receiver of the events is dropped.
    pub(crate) fn start<C>(
        mut named: watch::Receiver<Named>,
        connect: C,
        membership: Membership,
    ) -> (Self, mpsc::Receiver<PoolEvent>, watch::Receiver<HostTable>)
    where
        C: Fn(&HostName, SocketAddr) -> Channel + Send + 'static,
    {
        let (events, receiver) = mpsc::channel(EVENTS);
        let (table, table_receiver) = watch::channel(HostTable::default());
        let (hosts, hosts_receiver) = watch::channel(Arc::default());
        let rights = membership.rights.clone();
        let mut links = links::Links::new(connect, membership, events, table, hosts);
        // What is listed can be called as soon as this returns.
        links.follow(&named.borrow_and_update());
        tokio::spawn(links.run(named));
        let pool = Self {
            rights,
            hosts: hosts_receiver,
        };
        (pool, receiver, table_receiver)
    }

    pub(crate) fn rights(&self) -> &Rights {
        &self.rights
    }

    /// None if the pool has no such host (any more), or none that can be called yet.
    pub(crate) fn host(&self, name: &HostName) -> Option<HostClient> {
        self.hosts.borrow().clients.get(name).cloned().flatten()
    }

    /// Waits until it is certain. None: the pool has no such host (any more).
    pub(crate) async fn find(&self, name: &HostName) -> Option<HostClient> {
        let mut hosts = self.hosts.clone();
        let found = hosts
            .wait_for(|hosts| match hosts.clients.get(name) {
                Some(client) => client.is_some(),
                None => hosts.complete,
            })
            .await
            .map(|hosts| hosts.clients.get(name).cloned().flatten());
        match found {
            Ok(found) => found,
            // The process is stopping: nothing is certain any more.
            Err(_) => std::future::pending().await,
        }
    }

    /// False once it is certain that the pool has no such host (any more).
    pub(crate) fn may_have(&self, name: &HostName) -> bool {
        let hosts = self.hosts.borrow();
        !hosts.complete || hosts.clients.contains_key(name)
    }

    pub(crate) fn hosts(&self) -> Vec<HostClient> {
        self.hosts.borrow().clients.values().flatten().cloned().collect()
    }
}

/// One host's agent. Cheap to clone; connects, and connects again, by itself.
#[derive(Debug, Clone)]
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

    async fn grant<S>(&self, grants: S) -> Result<Streaming<wire::GrantResponse>, CallError>
    where
        S: futures::Stream<Item = wire::GrantRequest> + Send + 'static,
    {
        let mut client = self.client.clone();
        self.call(client.grant(grants)).await
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
