//! This host in its pool's cell (`docs/decisions/the-cell.md`): a Node that the agent
//! keeps, and claims without which no sandbox is taken. Absent from a host whose
//! configuration has no `[cell]`: then all a virtual node asks for is its claim.
//!
//! ```text
//!  enrol ──▶ client ─┬─▶ member  its certificate in the pool
//!                    ├─▶ node    what the host is, and whether it is cordoned
//!                    ├─▶ lease   that it lives
//!                    └─▶ claims ◀── host: may this sandbox start?
//!                          │
//!                          ▼
//!                        upkeep  claims' status, notice, end
//! ```
//!
//! What always holds:
//! - a sandbox is taken only for a claim that the cell says is bound to this host;
//! - absent is not gone: a sandbox loses its room only after a live read of the cell
//!   said that no claim for it is bound here;
//! - a cell that is away stops nothing and starts nothing;
//! - a machine that has a host's identity and not its Node (a copy, a host that was
//!   replaced) renews nothing and takes nothing.

pub mod claims;

mod duty;
mod enrol;
mod lease;
mod node;
mod upkeep;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use certificates::member::{self, Member, MemberError};
use jiff::Timestamp;
use pool_agent_api::{HostName, Peer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use claims::{Claims, Unclaimed};
pub use duty::Standing;
pub use node::Station;

use crate::{causes::described, cell::claims::Index, host::Host};

/// Longer than the API server takes for anything that is asked of it here. A request
/// that is lost with its connection would be waited for until TCP gives up.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How this host finds its cell and what it says of itself there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Names the API server and its authority, and has the token to join with.
    pub bootstrap_kubeconfig: PathBuf,
    pub zone: Option<String>,
    pub region: Option<String>,
    pub class: Option<String>,
    pub provider_id: Option<String>,
    /// Key and effect, beside the pool's own.
    pub taints: Vec<(String, String)>,
    /// How long the Lease holds after it was renewed.
    pub lease: Duration,
}

/// A client with this host's identity; None until it has one.
type Clients = watch::Receiver<Option<kube::Client>>;

/// What the parts of the cell share.
#[derive(Clone)]
struct Cell {
    host: Host,
    name: HostName,
    /// None also while the Node of this host's name is another machine's: its Lease and
    /// its claims are not this host's then.
    clients: Clients,
    index: Arc<Index>,
    /// Where virtual nodes reach this agent.
    agent: SocketAddr,
}

/// This host as an applicant: what of it needs nothing but its name and a directory.
#[derive(Clone)]
pub struct Enrolment {
    name: HostName,
    clients: Clients,
    member: Member,
}

impl Enrolment {
    /// Joins the cell, and keeps its identity there until `shutdown`. `directory` keeps
    /// its key and certificate.
    pub fn start(
        settings: &Settings,
        directory: PathBuf,
        name: HostName,
        shutdown: &CancellationToken,
    ) -> Self {
        let (clients, seen) = watch::channel(None);
        let machine_id = node::machine_id();
        let member = Member {
            directory: directory.join("pool"),
            peer: Peer::Host(name.clone()),
            machine_id: Some(machine_id.clone()),
        };
        let keep = enrol::keep(
            settings.bootstrap_kubeconfig.clone(),
            directory,
            name.clone(),
            machine_id,
            clients,
        );
        keep_until(shutdown, "enrolment", keep);
        Self {
            name,
            clients: seen,
            member,
        }
    }

    /// The files of this host's certificate in the pool, which the cell signs: those
    /// that are there, or once it has. They are kept current until `shutdown`.
    pub async fn certificate(&self, shutdown: &CancellationToken) -> Result<member::Files, MemberError> {
        let mut clients = self.clients.clone();
        let mut delays = certificates::pauses();
        let files = match self.member.files(Timestamp::now())? {
            Some(files) => files,
            None => loop {
                match self.member.join(&client(&mut clients).await).await {
                    Ok(files) => break files,
                    Err(error) => {
                        let error = described(&error);
                        tracing::warn!(error, "the cell has signed no certificate of the pool yet");
                        tokio::time::sleep(delays.next().unwrap_or(TIMEOUT)).await;
                    }
                }
            },
        };
        let (member, clients) = (self.member.clone(), self.clients.clone());
        keep_until(shutdown, "certificate", async move {
            let newest = || {
                let mut clients = clients.clone();
                async move { client(&mut clients).await }
            };
            member.keep(newest).await;
        });
        Ok(files)
    }
}

fn keep_until(
    shutdown: &CancellationToken,
    part: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) {
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        if shutdown.run_until_cancelled(task).await.is_some() {
            tracing::error!(part, "a part of the cell has ended by itself");
        }
    });
}

/// Keeps this host in its cell until `shutdown`.
pub fn start(
    settings: Settings,
    enrolment: Enrolment,
    host: Host,
    index: Arc<Index>,
    agent: SocketAddr,
    station: Station,
    shutdown: &CancellationToken,
) {
    let Enrolment { name, clients, .. } = enrolment;
    let (ours, admitted) = watch::channel(None);
    index.reach(admitted.clone());
    let lease = settings.lease;
    let cell = Cell {
        host,
        name,
        clients: admitted,
        index,
        agent,
    };
    keep_until(shutdown, "lease", lease::renew(cell.clone(), lease));
    let node = node::keep(cell.clone(), clients, ours, settings, station);
    keep_until(shutdown, "node", node);
    keep_until(shutdown, "claims", claims::watch(cell.clone(), lease));
    keep_until(shutdown, "upkeep", upkeep::keep(cell));
}

/// The answer, or an error once it is late. Whether a write that was not answered
/// took effect is not known.
async fn answered<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(elapsed.into())),
    }
}

/// The HTTP status of a refusal; None if the API server did not answer.
fn refused_with(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Waits for an identity in the cell.
async fn client(clients: &mut Clients) -> kube::Client {
    loop {
        if let Some(client) = clients.borrow_and_update().clone() {
            return client;
        }
        if clients.changed().await.is_err() {
            // Enrolment goes on for as long as the agent does.
            std::future::pending::<()>().await;
        }
    }
}
