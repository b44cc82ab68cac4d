//! Whose addresses are whose: what a pod, a tenant and the underlay may reach. Read by
//! `agent`, which gives it to the mesh (kernel programs and proxy), to probes, and to
//! `host` for what a tenant's settings name.

use std::{collections::BTreeSet, net::SocketAddrV4};

use ipnet::Ipv4Net;
use mesh_runtime::off_limits::OffLimits;
use serde::Deserialize;

/// `[policy.network]`
///
/// ```toml
/// [policy.network]
/// pool_ranges = ["10.77.0.0/16"]
/// underlay = ["192.0.2.0/24"]
/// allow = ["192.0.2.1:6443"]
/// control_planes = ["192.0.2.2/32"]
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// The pods of the pool, of all tenants over all hosts. A pod reaches those of its
    /// own tenant and no others. Empty: this host's `pod_range`, as in a pool of one.
    pub pool_ranges: Vec<Ipv4Net>,
    /// Hosts and infrastructure: no pod reaches them. Not given: the networks of the
    /// host's uplink. Metadata services are kept from pods in any case. Of a range
    /// here and one of pods that overlap, the longer prefix counts.
    pub underlay: Option<Vec<Ipv4Net>>,
    /// What pods may reach for all that, each by address and port: a tenant's API
    /// server, a name server. Over TCP and UDP.
    pub allow: BTreeSet<SocketAddrV4>,
    /// Where in `underlay` tenants' virtual nodes serve their hosts (mesh state and
    /// certificates). Elsewhere in it, and on the host itself, this host dials nothing
    /// for a tenant; outside of it, whatever the tenant says.
    pub control_planes: Vec<Ipv4Net>,
}

impl Network {
    /// On a host whose pods have addresses of `pod_range` and whose uplink is in
    /// `networks`. An error names the field.
    pub fn off_limits(&self, pod_range: Ipv4Net, networks: &[Ipv4Net]) -> Result<OffLimits, String> {
        let own = [pod_range];
        let pool = if self.pool_ranges.is_empty() {
            &own
        } else {
            self.pool_ranges.as_slice()
        };
        let lists = [
            ("pool_ranges", pool),
            ("underlay", self.underlay.as_deref().unwrap_or(networks)),
            ("control_planes", self.control_planes.as_slice()),
        ];
        for (list, ranges) in lists {
            for (i, range) in ranges.iter().enumerate() {
                let at = |problem: String| Err(format!("policy.network.{list}[{i}]: {problem}"));
                if *range != range.trunc() {
                    return at(format!("has host bits set: write {}", range.trunc()));
                }
                if range.prefix_len() == 0 {
                    return at(format!("{range} is everything there is"));
                }
            }
        }
        if !pool.iter().any(|range| range.contains(&pod_range)) {
            return Err(format!(
                "policy.network.pool_ranges: this host's pod_range {pod_range} lies in none of them"
            ));
        }
        if let Some(pods) = self
            .allow
            .iter()
            .find(|to| pool.iter().any(|r| r.contains(to.ip())))
        {
            return Err(format!(
                "policy.network.allow: {pods} may be a pod's: whose pods reach it is not decided here"
            ));
        }
        let [(_, pool), (_, underlay), (_, control_planes)] = lists;
        OffLimits::new(pool, underlay, self.allow.iter().copied())
            .map(|limits| limits.with_control_planes(control_planes.to_vec()))
            .map_err(|problem| format!("policy.network: {problem}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off_limits(policy: &str) -> Result<OffLimits, String> {
        let policy: Network = toml::from_str(policy).map_err(|e| e.to_string())?;
        policy.off_limits(
            "10.77.1.0/24".parse().unwrap(),
            &["192.0.2.0/24".parse().unwrap()],
        )
    }

    #[test]
    fn without_a_word_the_hosts_own_networks_are_off_limits_and_its_range_is_the_pool() {
        let limits = off_limits("").unwrap();
        assert!(limits.refuse("192.0.2.12:7443".parse().unwrap()).is_some());
        assert!(limits.is_pods("10.77.1.9".parse().unwrap()));
        assert!(!limits.is_pods("10.77.2.9".parse().unwrap()));
        let limits = off_limits("underlay = []").unwrap();
        assert!(limits.refuse("192.0.2.12:7443".parse().unwrap()).is_none());
        assert!(
            limits.refuse("168.63.129.16:80".parse().unwrap()).is_some(),
            "not for taking away"
        );
    }

    #[test]
    fn a_control_plane_in_the_hosts_own_network_is_one_that_the_operator_names() {
        let refused = |policy: &str, to: &str| {
            let limits = off_limits(policy).unwrap();
            limits.refuse_control_plane(&[], to.parse().unwrap()).is_some()
        };
        let named = "control_planes = [\"192.0.2.2/32\"]";
        assert!(refused("", "192.0.2.2:7444") && refused(named, "192.0.2.3:7444"));
        assert!(!refused(named, "192.0.2.2:7444") && !refused("", "203.0.113.2:7444"));
    }

    #[test]
    fn a_policy_with_a_mistake_is_refused_by_field() {
        for (policy, says) in [
            (
                "pool_ranges = [\"10.77.0.1/16\"]",
                "policy.network.pool_ranges[0]: has host bits",
            ),
            (
                "pool_ranges = [\"10.78.0.0/16\"]",
                "policy.network.pool_ranges: this host's pod_range",
            ),
            (
                "underlay = [\"0.0.0.0/0\"]",
                "policy.network.underlay[0]: 0.0.0.0/0 is everything",
            ),
            ("allow = [\"10.77.1.2:80\"]", "policy.network.allow: 10.77.1.2:80"),
            ("allow = [\"192.0.2.1\"]", "invalid IPv4 socket address"),
            (
                "control_planes = [\"0.0.0.0/0\"]",
                "policy.network.control_planes[0]: 0.0.0.0/0 is everything",
            ),
            ("alow = []", "unknown field"),
        ] {
            let error = off_limits(policy).unwrap_err();
            assert!(error.contains(says), "{policy}: {error}");
        }
    }
}
