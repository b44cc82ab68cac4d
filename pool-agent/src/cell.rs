//! This host in its pool's cell (`docs/decisions/the-cell.md`): a Node that the agent
//! keeps, and claims without which no sandbox is taken. Absent from a host whose
//! configuration has no `[cell]`: then all a virtual node asks for is its claim.
//!
//! ```text
//!  enrol ──▶ identity ──▶ client ─┬─▶ node    what the host is, and whether it is cordoned
//!                                 ├─▶ lease   that it lives
//!                                 └─▶ claims ◀── host: may this sandbox start?
//!                                       │
//!                                       ▼
//!                                     upkeep  claims' status, notice, end
//! ```
//!
//! What always holds:
//! - a sandbox is taken only for a claim that the cell says is bound to this host;
//! - absent is not gone: a sandbox loses its room only after a live read of the cell
//!   said that no claim for it is bound here;
//! - a cell that is away stops nothing and starts nothing.

pub mod claims;

mod duty;
mod enrol;
mod identity;
mod lease;
mod node;
mod upkeep;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use pool_agent_api::HostName;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use claims::{Claims, Unclaimed};
pub use duty::Standing;
pub use node::Station;

use crate::{cell::claims::Index, host::Host};

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
    clients: Clients,
    index: Arc<Index>,
    /// Where virtual nodes reach this agent.
    agent: SocketAddr,
}

/// Joins the cell and keeps this host in it until `shutdown`. `directory` keeps its
/// key and certificate.
pub fn start(
    settings: Settings,
    directory: PathBuf,
    host: Host,
    index: Arc<Index>,
    agent: SocketAddr,
    station: Station,
    shutdown: &CancellationToken,
) {
    let name = host.shop().host.clone();
    let (clients, seen) = watch::channel(None);
    index.reach(seen.clone());
    let cell = Cell {
        host,
        name: name.clone(),
        clients: seen,
        index,
        agent,
    };
    let parts: [(&str, futures::future::BoxFuture<'static, ()>); 5] = [
        (
            "enrolment",
            Box::pin(enrol::keep(
                settings.bootstrap_kubeconfig.clone(),
                directory,
                name,
                station.facts.machine_id.clone(),
                clients,
            )),
        ),
        ("lease", Box::pin(lease::renew(cell.clone(), settings.lease))),
        ("node", Box::pin(node::keep(cell.clone(), settings, station))),
        ("claims", Box::pin(claims::watch(cell.clone()))),
        ("upkeep", Box::pin(upkeep::keep(cell))),
    ];
    for (part, task) in parts {
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            if shutdown.run_until_cancelled(task).await.is_some() {
                tracing::error!(part, "a part of the cell has ended by itself");
            }
        });
    }
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
