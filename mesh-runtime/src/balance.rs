//! Which endpoint of a service a connection goes to. Pure: the draw is an
//! argument. `proxy` asks once a connection, and again without an endpoint that
//! could not be dialled.

use std::sync::Arc;

use crate::state::{Balance, Health, Mode, Scope, Service, UnhealthyEndpoints, Workload};

/// Where the client is, for what is preferred to be near.
#[derive(Debug, Clone, Default)]
pub struct Client {
    pub workload: Option<Arc<Workload>>,
    pub network: Arc<str>,
    pub cluster: Arc<str>,
    pub node: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen<'a> {
    pub endpoint: &'a Arc<Workload>,
    /// Where it takes connections to the service's port.
    pub port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("the service has no such port")]
    NoPort,
    #[error("the service has no endpoint")]
    None,
    #[error("no endpoint of the service is healthy")]
    NoneHealthy,
    #[error("no endpoint of the service is where the service wants it")]
    NoneNear,
    #[error("no endpoint of the service could be reached")]
    AllTried,
}

/// Chooses an endpoint for `port` of `service`. `draw` is uniform over all u64;
/// endpoints for which `tried` holds are left out.
pub fn choose<'a>(
    client: &Client,
    service: &Service,
    endpoints: &'a [Arc<Workload>],
    port: u16,
    draw: u64,
    tried: impl Fn(&Workload) -> bool,
) -> Result<Chosen<'a>, NoEndpoint> {
    if !service.ports.iter().any(|p| p.port == port) {
        return Err(NoEndpoint::NoPort);
    }
    if endpoints.is_empty() {
        return Err(NoEndpoint::None);
    }
    let balance = &service.balance;
    let candidates = || {
        endpoints.iter().filter(|w| {
            w.capacity > 0 && (w.health == Health::Healthy || balance.unhealthy == UnhealthyEndpoints::Taken)
        })
    };
    if candidates().next().is_none() {
        return Err(NoEndpoint::NoneHealthy);
    }
    // The nearest class that is left: an endpoint that could not be dialled
    // makes the next class the nearest, unless the service insists.
    let near = candidates()
        .filter(|w| !tried(w))
        .map(|w| rank(client, balance, w))
        .max()
        .ok_or(NoEndpoint::AllTried)?;
    if balance.mode == Mode::Strict && near < Rank(balance.scopes.len()) {
        return Err(NoEndpoint::NoneNear);
    }
    let class = || candidates().filter(|w| !tried(w) && rank(client, balance, w) == near);
    let total: u64 = class().map(|w| u64::from(w.capacity)).sum();
    // Multiplying maps the draw onto 0..total without the bias of a remainder.
    let mut point = ((u128::from(draw) * u128::from(total)) >> 64) as u64;
    for endpoint in class() {
        let weight = u64::from(endpoint.capacity);
        if point < weight {
            let port = endpoint.target_port(service, port).ok_or(NoEndpoint::NoPort)?;
            return Ok(Chosen { endpoint, port });
        }
        point -= weight;
    }
    Err(NoEndpoint::AllTried)
}

/// How many of the service's scopes an endpoint shares with the client, from
/// the first on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(usize);

fn rank(client: &Client, balance: &Balance, endpoint: &Workload) -> Rank {
    match balance.mode {
        Mode::Any | Mode::Passthrough => Rank(0),
        Mode::Strict | Mode::Failover => Rank(
            balance
                .scopes
                .iter()
                .take_while(|scope| shares(client, **scope, endpoint))
                .count(),
        ),
    }
}

fn shares(client: &Client, scope: Scope, endpoint: &Workload) -> bool {
    let own = client.workload.as_deref().map(|w| &w.locality);
    let there = &endpoint.locality;
    match scope {
        Scope::Network => client.network == endpoint.network,
        Scope::Cluster => client.cluster == endpoint.cluster,
        Scope::Node => client.node == endpoint.node,
        Scope::Region => own.is_some_and(|own| own.region == there.region),
        Scope::Zone => own.is_some_and(|own| own.region == there.region && own.zone == there.zone),
        Scope::Subzone => own.is_some_and(|own| own == there),
    }
}

#[cfg(test)]
mod tests;
