//! How many connections, calls and descriptors a pod, a peer, a tenant and the host
//! may hold. `[policy.bounds]` of the agent's configuration; what is absent has a
//! default that suits tenants who do not know each other.
//!
//! ```toml
//! [policy.bounds]
//! descriptors_reserved = 2048    # for the agent's own work
//! connections_per_host = 131072  # fewer where RLIMIT_NOFILE allows fewer
//! connections_per_pod = 16384
//! ```
//!
//! Two rules go before these numbers (`bounds::budget`): what is promised to a pod is
//! set aside for it, and beyond that nobody holds more than a fixed share of what he
//! leaves to the others. The limits here only bound further.
//!
//! The number of descriptors decides how much there is: the agent raises its
//! RLIMIT_NOFILE to the hard limit (to `fs.nr_open` where it has CAP_SYS_RESOURCE),
//! sets aside what it needs itself, and [`Bounds::share_out`] gives the rest to
//! connections. Where a service manager sets the limit, set it high
//! (`LimitNOFILE=1048576`): with 20,000 a host carries about 6,800 connections, of
//! which one pod may hold some 2,000.

use std::time::Duration;

use bounds::door::Places;
use mesh_runtime::limits::Limits;
use serde::Deserialize;

/// `[policy.bounds]`. Counts of connections are pairs of a client's and a server's
/// socket; a tunnel, and each stream in it, counts as one too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Given")]
pub struct Bounds(Given);

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Given {
    /// Descriptors that no pod and no caller can take: for containerd, the CNI plugin,
    /// the ledger, logs and devices.
    descriptors_reserved: u32,
    connections_per_host: u32,
    connections_per_tenant: u32,
    connections_per_pod: u32,
    /// Of one peer, an identity or in plaintext an address, to one pod.
    connections_per_peer: u32,
    /// Set aside for each pod, once for those it opens and once for those to it.
    connections_promised_per_pod: u32,
    /// Tunnels whose far end has not proved yet who it is, from addresses of
    /// workloads: on the host, and of one address.
    handshakes_per_host: u32,
    handshakes_per_peer: u32,
    /// The same from addresses that no workload has.
    handshakes_of_strangers: u32,
    handshakes_per_stranger: u32,
    /// DNS questions under way.
    questions_per_host: u32,
    questions_per_tenant: u32,
    questions_per_pod: u32,
    /// Seconds until a connection that carries nothing is cut, and one of which a
    /// side has said its last.
    idle_seconds: u32,
    half_closed_seconds: u32,
    /// Virtual nodes' connections to the agent, and those that have not shown a
    /// certificate yet: on the host, and of one tenant or address.
    callers_per_host: u32,
    callers_per_tenant: u32,
    callers_handshaking: u32,
    callers_handshaking_per_address: u32,
    /// A tenant's calls under way.
    calls_per_tenant: u32,
    watches_per_tenant: u32,
    logs_per_tenant: u32,
    splices_per_tenant: u32,
    /// MiB of messages of calls under way, on the host and of one tenant. Each is in
    /// memory twice while it is parsed.
    message_mib_per_host: u32,
    message_mib_per_tenant: u32,
}

impl Default for Given {
    fn default() -> Self {
        Self {
            descriptors_reserved: 2048,
            // Each costs some 4 KiB of memory.
            connections_per_host: 131_072,
            connections_per_tenant: 131_072,
            connections_per_pod: 16_384,
            connections_per_peer: 8192,
            connections_promised_per_pod: 8,
            handshakes_per_host: 1024,
            handshakes_per_peer: 128,
            handshakes_of_strangers: 256,
            handshakes_per_stranger: 16,
            questions_per_host: 768,
            questions_per_tenant: 512,
            questions_per_pod: 64,
            // What a node's conntrack has under kube-proxy: a day, and an hour.
            idle_seconds: 86_400,
            half_closed_seconds: 3600,
            callers_per_host: 512,
            callers_per_tenant: 16,
            callers_handshaking: 256,
            callers_handshaking_per_address: 16,
            calls_per_tenant: 256,
            watches_per_tenant: 16,
            logs_per_tenant: 128,
            splices_per_tenant: 128,
            // The largest has 32.
            message_mib_per_host: 256,
            message_mib_per_tenant: 64,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBounds {
    #[error("{field}: must be at least {least}")]
    TooSmall { field: &'static str, least: u32 },
    #[error("{inner}: must be at most {outer}")]
    NotWithin {
        inner: &'static str,
        outer: &'static str,
    },
    #[error(
        "RLIMIT_NOFILE is {limit}, and at least {needed} is needed for {pods} pods: raise it (LimitNOFILE in a unit file), or lower capacity.sandboxes or descriptors_reserved"
    )]
    TooFewDescriptors { limit: u64, needed: u64, pods: u32 },
}

impl TryFrom<Given> for Bounds {
    type Error = InvalidBounds;

    fn try_from(given: Given) -> Result<Self, InvalidBounds> {
        let g = &given;
        let least = [
            ("descriptors_reserved", g.descriptors_reserved, 256),
            ("connections_per_host", g.connections_per_host, 1024),
            ("connections_per_tenant", g.connections_per_tenant, 1),
            ("connections_per_pod", g.connections_per_pod, 1),
            ("connections_per_peer", g.connections_per_peer, 1),
            ("connections_promised_per_pod", g.connections_promised_per_pod, 1),
            ("handshakes_per_host", g.handshakes_per_host, 16),
            ("handshakes_per_peer", g.handshakes_per_peer, 1),
            ("handshakes_of_strangers", g.handshakes_of_strangers, 1),
            ("handshakes_per_stranger", g.handshakes_per_stranger, 1),
            ("questions_per_host", g.questions_per_host, 64),
            ("questions_per_tenant", g.questions_per_tenant, 1),
            ("questions_per_pod", g.questions_per_pod, 1),
            // A connection that is only slow is not idle.
            ("idle_seconds", g.idle_seconds, 60),
            ("half_closed_seconds", g.half_closed_seconds, 10),
            ("callers_per_host", g.callers_per_host, 16),
            ("callers_per_tenant", g.callers_per_tenant, 2),
            ("callers_handshaking", g.callers_handshaking, 16),
            (
                "callers_handshaking_per_address",
                g.callers_handshaking_per_address,
                1,
            ),
            ("calls_per_tenant", g.calls_per_tenant, 16),
            ("watches_per_tenant", g.watches_per_tenant, 2),
            ("logs_per_tenant", g.logs_per_tenant, 1),
            ("splices_per_tenant", g.splices_per_tenant, 1),
            // Of the largest message, with its head.
            ("message_mib_per_host", g.message_mib_per_host, 64),
            ("message_mib_per_tenant", g.message_mib_per_tenant, 33),
        ];
        for (field, value, least) in least {
            if value < least {
                return Err(InvalidBounds::TooSmall { field, least });
            }
        }
        let within = [
            (
                ("half_closed_seconds", g.half_closed_seconds),
                ("idle_seconds", g.idle_seconds),
            ),
            (
                ("message_mib_per_tenant", g.message_mib_per_tenant),
                ("message_mib_per_host", g.message_mib_per_host),
            ),
            (
                ("handshakes_per_peer", g.handshakes_per_peer),
                ("handshakes_per_host", g.handshakes_per_host),
            ),
            (
                ("handshakes_per_stranger", g.handshakes_per_stranger),
                ("handshakes_of_strangers", g.handshakes_of_strangers),
            ),
        ];
        for ((inner, a), (outer, b)) in within {
            if a > b {
                return Err(InvalidBounds::NotWithin { inner, outer });
            }
        }
        Ok(Self(given))
    }
}

/// Who may call the agent, and how much at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Callers {
    pub per_host: u32,
    pub per_tenant: u32,
    pub handshaking: Places,
    pub calls_per_tenant: u32,
    pub watches_per_tenant: u32,
    pub logs_per_tenant: u32,
    pub splices_per_tenant: u32,
    pub message_mib: u32,
    pub message_mib_per_tenant: u32,
}

/// Calls of one kind under way, of all tenants: what each may have this many times,
/// but streams cost descriptors.
pub const STREAMS_PER_HOST: u32 = 512;

impl Bounds {
    /// What the data path may hold of `descriptors`, for a host that takes `pods`
    /// pods.
    pub fn share_out(&self, descriptors: u64, pods: u32) -> Result<Limits, InvalidBounds> {
        let g = &self.0;
        let handshakes = u64::from(g.handshakes_per_host) + u64::from(g.handshakes_of_strangers);
        // A question over TCP has a socket on either side.
        let questions = 2 * u64::from(g.questions_per_host);
        // Connections of callers, known and not yet, and their logs and splices.
        let callers = u64::from(g.callers_per_host)
            + 2 * u64::from(g.callers_handshaking)
            + 2 * u64::from(STREAMS_PER_HOST);
        let own = u64::from(g.descriptors_reserved) + handshakes + questions + callers;
        // Half of it at least is for whoever wants it.
        let promised = 2 * u64::from(g.connections_promised_per_pod) * u64::from(pods);
        let needed = own + 2 * 2 * promised.max(64);
        if descriptors < needed {
            return Err(InvalidBounds::TooFewDescriptors {
                limit: descriptors,
                needed,
                pods,
            });
        }
        let connections = u32::try_from((descriptors - own) / 2).unwrap_or(u32::MAX);
        let places = |all: u32, of_one: u32| Places {
            all: all as usize,
            of_one: of_one as usize,
        };
        Ok(Limits {
            pods,
            connections: connections.min(g.connections_per_host),
            connections_per_tenant: g.connections_per_tenant,
            connections_per_pod: g.connections_per_pod,
            connections_per_peer: g.connections_per_peer,
            connections_promised: g.connections_promised_per_pod,
            handshakes: places(g.handshakes_per_host, g.handshakes_per_peer),
            strangers: places(g.handshakes_of_strangers, g.handshakes_per_stranger),
            questions: g.questions_per_host,
            questions_per_tenant: g.questions_per_tenant,
            questions_per_pod: g.questions_per_pod,
            idle: Duration::from_secs(g.idle_seconds.into()),
            half_closed: Duration::from_secs(g.half_closed_seconds.into()),
            ..Limits::default()
        })
    }

    pub fn callers(&self) -> Callers {
        let g = &self.0;
        Callers {
            per_host: g.callers_per_host,
            per_tenant: g.callers_per_tenant,
            handshaking: Places {
                all: g.callers_handshaking as usize,
                of_one: g.callers_handshaking_per_address as usize,
            },
            calls_per_tenant: g.calls_per_tenant,
            watches_per_tenant: g.watches_per_tenant,
            logs_per_tenant: g.logs_per_tenant,
            splices_per_tenant: g.splices_per_tenant,
            message_mib: g.message_mib_per_host,
            message_mib_per_tenant: g.message_mib_per_tenant,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Bounds, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_absent_has_a_default_and_what_is_wrong_is_refused_by_field() {
        assert_eq!(parse("").unwrap(), Bounds::default());
        assert_ne!(parse("connections_per_pod = 100").unwrap(), Bounds::default());
        for (text, says) in [
            (
                "connections_per_pod = 0",
                "connections_per_pod: must be at least 1",
            ),
            ("idle_seconds = 3", "idle_seconds: must be at least 60"),
            (
                "half_closed_seconds = 90000",
                "half_closed_seconds: must be at most idle_seconds",
            ),
            ("connections_per_pods = 5", "unknown field"),
            ("questions_per_pod = -1", "invalid value"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(Bounds::try_from(Given::default()).is_ok(), "the defaults hold");
    }

    #[test]
    fn all_that_pods_and_callers_can_hold_leaves_the_agent_its_reserve() {
        for descriptors in [20_000, 65_536, 1_048_576] {
            let bounds = Bounds::default();
            let limits = bounds.share_out(descriptors, 110).unwrap();
            let callers = bounds.callers();
            let held = 2 * u64::from(limits.connections)
                + (limits.handshakes.all + limits.strangers.all) as u64
                + 2 * u64::from(limits.questions)
                + u64::from(callers.per_host)
                + 2 * callers.handshaking.all as u64
                + 2 * u64::from(STREAMS_PER_HOST);
            assert!(held + 2048 <= descriptors, "{held} of {descriptors}");
            assert!(limits.connections >= 2 * 2 * 110 * limits.connections_promised);
        }
    }

    #[test]
    fn too_few_descriptors_are_told_with_what_to_do() {
        let error = Bounds::default().share_out(1024, 110).unwrap_err().to_string();
        assert!(
            error.contains("RLIMIT_NOFILE is 1024") && error.contains("LimitNOFILE"),
            "{error}"
        );
    }
}
