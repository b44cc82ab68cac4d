//! How much of this host's data path a pod, a peer, a tenant and the host may hold.
//! The agent's operator says so; `runtime` gets it, and makes one [`Shares`] of it for
//! all tenants of the process, from which `proxy` and `dns` take before they serve.
//!
//! A place among the connections is worth two descriptors: a client's socket and its
//! server's. Tunnels and their streams, which have one each, count as one place too.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bounds::{
    Bounds, Budget, Gate, Guest, Holding, Level, Path, Rule, Seldom, Shared, Step,
    door::{Places, Queue},
};
use mesh_api::Identity;

use crate::pod::PodRecord;

/// See [`bounds::budget`]: a tenant that is alone may hold four fifths of what is not
/// promised, a pod two thirds of what its tenant may, four fifths of that one way, and
/// a peer two thirds of what comes to the pod.
const TENANT_GREED: u32 = 4;
const POD_GREED: u32 = 2;
const WAY_GREED: u32 = 4;
const PEER_GREED: u32 = 2;

/// Bytes of mesh state that one place stands for.
pub(crate) const STATE_PAGE: usize = 64 << 10;

/// Counts are connections and the like; all of the host's tenants together unless
/// it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Pods that are promised something: as many as the host takes.
    pub pods: u32,
    pub connections: u32,
    pub connections_per_tenant: u32,
    pub connections_per_pod: u32,
    /// Of one peer (an identity, or an address in plaintext) to one pod.
    pub connections_per_peer: u32,
    /// Set aside for each pod, once for those it opens and once for those to it.
    pub connections_promised: u32,
    /// Tunnels whose peer has not proved yet who it is, from addresses of workloads.
    pub handshakes: Places,
    /// The same from addresses that no workload has.
    pub strangers: Places,
    /// DNS questions under way, and TCP connections to ask them.
    pub questions: u32,
    pub questions_per_tenant: u32,
    pub questions_per_pod: u32,
    pub questions_promised: u32,
    /// MiB of what tenants' control planes told of their meshes, as it was sent and
    /// something more for each resource.
    pub state_mib: u32,
    pub state_mib_per_tenant: u32,
    /// A connection that carries nothing for this long is cut, at the latest after
    /// twice as long.
    pub idle: Duration,
    /// The same once one side has said its last.
    pub half_closed: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pods: 110,
            connections: 32_768,
            connections_per_tenant: u32::MAX,
            connections_per_pod: 16_384,
            connections_per_peer: 8192,
            connections_promised: 8,
            handshakes: Places {
                all: 1024,
                of_one: 128,
            },
            strangers: Places { all: 256, of_one: 16 },
            questions: 768,
            questions_per_tenant: 512,
            questions_per_pod: 64,
            questions_promised: 2,
            // A hundred thousand workloads take about 100.
            state_mib: 512,
            state_mib_per_tenant: 128,
            // What a node's conntrack has under kube-proxy.
            idle: Duration::from_secs(86_400),
            half_closed: Duration::from_secs(3600),
        }
    }
}

/// An account, by plain numbers: each tenant and pod gets one when it comes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Account {
    Tenant(u64),
    Pod(u64),
    Outbound(u64),
    Inbound(u64),
    Peer(u64, Peer),
}

/// Who is at the other end of a connection to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Peer {
    Identity(Identity),
    Address(IpAddr),
}

pub type Place = bounds::Place<Account>;
/// Addresses mean something within their tenant alone.
pub type Source = (u64, IpAddr);

/// What the process has, for all tenants.
pub struct Shares {
    pub(crate) limits: Limits,
    next: AtomicU64,
    connections: Shared<Account>,
    questions: Shared<Account>,
    handshakes: Gate<Source>,
    state: Shared<Account>,
}

fn state_pages(mib: u32) -> u32 {
    mib.saturating_mul(((1 << 20) / STATE_PAGE) as u32)
}

impl Shares {
    pub(crate) fn new(limits: Limits, shown: &Bounds) -> Arc<Self> {
        let promised = |each: u32| limits.pods.saturating_mul(each);
        let connections = Shared::new(Budget::new(
            limits.connections,
            promised(limits.connections_promised.saturating_mul(2)),
        ));
        let questions = Shared::new(Budget::new(limits.questions, promised(limits.questions_promised)));
        let handshakes = Gate::new(limits.handshakes, limits.strangers);
        let state = Shared::new(Budget::new(state_pages(limits.state_mib), 0));
        shown.show("state_pages", state.clone());
        shown.show("connections", connections.clone());
        shown.show("questions", questions.clone());
        shown.show("handshakes", handshakes.clone());
        Arc::new(Self {
            limits,
            next: AtomicU64::new(0),
            connections,
            questions,
            handshakes,
            state,
        })
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn tenant(self: &Arc<Self>) -> TenantShares {
        TenantShares {
            shares: self.clone(),
            number: self.number(),
        }
    }
}

/// A tenant's accounts.
pub(crate) struct TenantShares {
    shares: Arc<Shares>,
    number: u64,
}

impl TenantShares {
    pub(crate) fn limits(&self) -> &Limits {
        &self.shares.limits
    }

    /// Room for what the tenant's control plane tells, in [`STATE_PAGE`]s.
    pub(crate) fn state(&self) -> Holding<Account> {
        let tenant = Step {
            key: Account::Tenant(self.number),
            level: Level::Tenant,
            rule: Rule {
                promised: 0,
                limit: state_pages(self.shares.limits.state_mib_per_tenant),
                greed: TENANT_GREED,
            },
        };
        let path = Path {
            trunk: Arc::from([tenant]),
            leaf: None,
        };
        Holding::new(self.shares.state.clone(), path)
    }

    pub(crate) fn pod(&self) -> PodShares {
        let limits = &self.shares.limits;
        let number = self.shares.number();
        let tenant = |limit| Step {
            key: Account::Tenant(self.number),
            level: Level::Tenant,
            rule: Rule {
                promised: 0,
                limit,
                greed: TENANT_GREED,
            },
        };
        let pod = |key, promised, limit, greed| Step {
            key,
            level: Level::Pod,
            rule: Rule {
                promised,
                limit,
                greed,
            },
        };
        // A flood to a pod does not keep it from dialling, nor the other way round.
        let way = |key| {
            Arc::from([
                tenant(limits.connections_per_tenant),
                pod(Account::Pod(number), 0, limits.connections_per_pod, POD_GREED),
                pod(key, limits.connections_promised, u32::MAX, WAY_GREED),
            ])
        };
        PodShares {
            shares: self.shares.clone(),
            number,
            outbound: way(Account::Outbound(number)),
            inbound: way(Account::Inbound(number)),
            questions: Arc::from([
                tenant(limits.questions_per_tenant),
                pod(
                    Account::Pod(number),
                    limits.questions_promised,
                    limits.questions_per_pod,
                    POD_GREED,
                ),
            ]),
            told: Seldom::default(),
        }
    }

    /// Somebody at port 15008 who has not proved who he is.
    pub(crate) fn come(&self, address: IpAddr, known: bool) -> Guest<Source> {
        let queue = if known { Queue::Known } else { Queue::Stranger };
        self.shares.handshakes.come(queue, (self.number, address))
    }
}

/// A pod's accounts.
pub(crate) struct PodShares {
    shares: Arc<Shares>,
    number: u64,
    outbound: Arc<[Step<Account>]>,
    inbound: Arc<[Step<Account>]>,
    questions: Arc<[Step<Account>]>,
    told: Seldom,
}

/// A share is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {level}'s share of {what} is used up")]
pub(crate) struct UsedUp {
    pub(crate) what: &'static str,
    pub(crate) level: Level,
}

impl PodShares {
    /// For a connection of the pod, or a tunnel that it needs.
    pub(crate) fn outbound(&self) -> Result<Place, UsedUp> {
        let path = Path {
            trunk: self.outbound.clone(),
            leaf: None,
        };
        self.shares.connections.take(path).map_err(|level| UsedUp {
            what: "connections",
            level,
        })
    }

    /// For a connection to the pod, a tunnel to it, or a tunnel's stream.
    pub(crate) fn inbound(&self, peer: Peer) -> Result<Place, UsedUp> {
        let leaf = Step {
            key: Account::Peer(self.number, peer),
            level: Level::Peer,
            rule: Rule {
                promised: 0,
                limit: self.shares.limits.connections_per_peer,
                greed: PEER_GREED,
            },
        };
        let path = Path {
            trunk: self.inbound.clone(),
            leaf: Some(leaf),
        };
        self.shares.connections.take(path).map_err(|level| UsedUp {
            what: "connections",
            level,
        })
    }

    pub(crate) fn question(&self) -> Result<Place, UsedUp> {
        let path = Path {
            trunk: self.questions.clone(),
            leaf: None,
        };
        self.shares.questions.take(path).map_err(|level| UsedUp {
            what: "DNS questions",
            level,
        })
    }

    /// Names the pod in the log, now and then.
    pub(crate) fn tell(&self, pod: &PodRecord, used_up: UsedUp, peer: Option<IpAddr>) {
        let Some(left_out) = self.told.due(Instant::now()) else {
            return;
        };
        tracing::warn!(
            tenant = %pod.tenant,
            pod.uid = %pod.key.pod,
            pod.namespace = %pod.namespace,
            pod.name = %pod.name,
            peer = peer.map(tracing::field::display),
            what = used_up.what,
            level = %used_up.level,
            left_out,
            "refused: a share is used up"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(limits: Limits) -> Arc<Shares> {
        Shares::new(limits, &Bounds::default())
    }

    #[test]
    fn a_pod_that_takes_all_it_can_leaves_to_its_peers_its_tenant_and_the_others_theirs() {
        let shares = shares(Limits {
            connections: 4000,
            ..Limits::default()
        });
        let (acme, other) = (shares.tenant(), shares.tenant());
        let (greedy, beside, elsewhere) = (acme.pod(), acme.pod(), other.pod());
        let mut held = Vec::new();
        let refused = loop {
            match greedy.outbound() {
                Ok(place) => held.push(place),
                Err(used_up) => break used_up,
            }
        };
        assert_eq!(refused.level, Level::Pod);
        assert!(held.len() > 900, "{}: it was alone", held.len());
        // What comes to it is not what it opened.
        let promised = Limits::default().connections_promised;
        for _ in 0..promised * 4 {
            let peer = || Peer::Address("10.0.0.1".parse().unwrap());
            held.push(greedy.inbound(peer()).unwrap());
            held.push(beside.outbound().unwrap());
            held.push(elsewhere.inbound(peer()).unwrap());
        }
        held.clear();
        assert_eq!(shares.connections.held(), 0);
    }

    #[test]
    fn a_pods_questions_are_not_its_connections() {
        let shares = shares(Limits::default());
        let tenant = shares.tenant();
        let (greedy, modest) = (tenant.pod(), tenant.pod());
        let asked: Vec<_> = std::iter::from_fn(|| greedy.question().ok()).collect();
        assert_eq!(asked.len(), Limits::default().questions_per_pod as usize);
        assert!(modest.question().is_ok() && greedy.outbound().is_ok());
    }
}
