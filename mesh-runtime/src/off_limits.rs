//! Where nothing may be sent or dialled for a pod: what is local to its host or
//! router, and what is the pool's and not its tenant's. Pure, but for [`host_addresses`].
//!
//! Whoever dials for a pod (the proxy, the agent's probes) stands where the host's
//! addresses are its own, so it would open the host's services to the tenant; and all
//! that a tenant says of its cluster (a Service's address, an EndpointSlice, a
//! probe's host, a name server) may name whatever it likes. So whose an address is,
//! the pool's operator says: [`OffLimits`], the same in `redirect`'s kernel programs,
//! which hold what is dialled here as well as what pods send themselves.
//!
//! ```text
//!  off limits             hosts, infrastructure, metadata services      but for what is allowed
//!  the pool's pods        all tenants', over all hosts                  but for the tenant's workloads
//!  everything else        the world
//! ```

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
};

use ipnet::Ipv4Net;

use crate::{
    netns::Netns,
    redirect::{GATEWAY, MAX_ALLOWED, MAX_OFF_LIMITS, MAX_POOL_RANGES},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no pod may reach what is local to the host")]
    HostLocal,
    #[error("the address is not one that a connection can go to")]
    NotUnicast,
    #[error("the address is off limits for pods of this pool")]
    OffLimits,
}

/// Where clouds serve a machine's own credentials and settings, outside link-local.
const METADATA: [Ipv4Addr; 3] = [
    // Alibaba Cloud's.
    Ipv4Addr::new(100, 100, 100, 200),
    // Azure's wire server, which is its resolver too.
    Ipv4Addr::new(168, 63, 129, 16),
    // Oracle Cloud's.
    Ipv4Addr::new(192, 0, 0, 192),
];

/// Whose addresses are whose in the pool, as its operator says. The default knows of
/// no pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OffLimits {
    pool: Vec<Ipv4Net>,
    off_limits: Vec<Ipv4Net>,
    allowed: BTreeSet<SocketAddrV4>,
    /// None: nobody said where tenants' control planes are, and none is refused.
    control_planes: Option<Vec<Ipv4Net>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    #[error(
        "{0} ranges of pods, more than the {MAX_POOL_RANGES} there is room for: join what lies side by side"
    )]
    Pool(usize),
    #[error(
        "{0} ranges off limits, more than the {MAX_OFF_LIMITS} there is room for: join what lies side by side"
    )]
    OffLimits(usize),
    #[error("{0} addresses allowed, more than the {MAX_ALLOWED} there is room for")]
    Allowed(usize),
}

impl OffLimits {
    /// `pool`: the ranges of pods, over all hosts. `underlay`: hosts and
    /// infrastructure. Of two that overlap the longer prefix counts. `allowed`: what
    /// pods may reach though it lies in `underlay`.
    pub fn new(
        pool: &[Ipv4Net],
        underlay: &[Ipv4Net],
        allowed: impl IntoIterator<Item = SocketAddrV4>,
    ) -> Result<Self, TooMuch> {
        let pool = Ipv4Net::aggregate(&pool.to_vec());
        let kept = underlay.iter().copied().chain(METADATA.map(Ipv4Net::from));
        let off_limits: Vec<_> = kept
            .flat_map(|range| {
                let holes = pool
                    .iter()
                    .filter(|pods| range.contains(*pods) && range != **pods);
                holes.fold(vec![range], |left, hole| {
                    left.into_iter().flat_map(|part| without(part, *hole)).collect()
                })
            })
            .collect();
        let all = Self {
            off_limits: Ipv4Net::aggregate(&off_limits),
            pool,
            allowed: allowed.into_iter().collect(),
            control_planes: None,
        };
        if all.pool.len() > MAX_POOL_RANGES {
            return Err(TooMuch::Pool(all.pool.len()));
        }
        if all.off_limits.len() > MAX_OFF_LIMITS {
            return Err(TooMuch::OffLimits(all.off_limits.len()));
        }
        if all.allowed.len() > MAX_ALLOWED {
            return Err(TooMuch::Allowed(all.allowed.len()));
        }
        Ok(all)
    }

    pub(crate) fn pool(&self) -> &[Ipv4Net] {
        &self.pool
    }

    pub(crate) fn off_limits(&self) -> &[Ipv4Net] {
        &self.off_limits
    }

    pub(crate) fn allowed(&self) -> impl Iterator<Item = SocketAddrV4> {
        self.allowed.iter().copied()
    }

    /// Whether it is a pod's of the pool, whosever.
    pub fn is_pods(&self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(ip) => holds(&self.pool, ip) && !holds(&self.off_limits, ip),
            IpAddr::V6(_) => false,
        }
    }

    /// Of the addresses that are off limits for pods, tenants' control planes may be in
    /// these alone.
    pub fn with_control_planes(self, ranges: Vec<Ipv4Net>) -> Self {
        Self {
            control_planes: Some(ranges),
            ..self
        }
    }

    /// Whether a host that has the addresses `host` may not dial `to` as a tenant's
    /// control plane. Where that is, the tenant says, and it is dialled from where the
    /// host's own services answer.
    pub fn refuse_control_plane(&self, host: &[IpAddr], to: SocketAddr) -> Option<Refused> {
        let ranges = self.control_planes.as_deref()?;
        let named = |ip: IpAddr| matches!(ip.to_canonical(), IpAddr::V4(v4) if holds(ranges, v4));
        refuse(host, to.ip()).or_else(|| {
            let off_limits = self.refuse(to).is_some() || self.is_pods(to.ip());
            (off_limits && !named(to.ip())).then_some(Refused::OffLimits)
        })
    }

    /// Whether nobody may reach `to` for a pod, whosever the pod is. Of an address that
    /// [`Self::is_pods`] the caller has to know whose it is.
    pub fn refuse(&self, to: SocketAddr) -> Option<Refused> {
        let refused = match to.ip().to_canonical() {
            IpAddr::V4(ip) => {
                holds(&self.off_limits, ip) && !self.allowed.contains(&SocketAddrV4::new(ip, to.port()))
            }
            // Clouds have metadata services among them; a pool's own are IPv4.
            IpAddr::V6(ip) => ip.is_unique_local(),
        };
        refused.then_some(Refused::OffLimits)
    }
}

fn holds(ranges: &[Ipv4Net], ip: Ipv4Addr) -> bool {
    ranges.iter().any(|range| range.contains(&ip))
}

/// What is left of `range` beside `hole`, which lies in it.
fn without(range: Ipv4Net, hole: Ipv4Net) -> Vec<Ipv4Net> {
    if hole.contains(&range) {
        return vec![];
    }
    if !range.contains(&hole) {
        return vec![range];
    }
    let halves = range.subnets(range.prefix_len() + 1);
    halves
        .into_iter()
        .flatten()
        .flat_map(|half| without(half, hole))
        .collect()
}

/// Whether nothing may be dialled at `ip` on a host that has the addresses `host`,
/// whatever the operator allows.
pub fn refuse(host: &[IpAddr], ip: IpAddr) -> Option<Refused> {
    let ip = ip.to_canonical();
    let local = ip.is_loopback()
        || host.contains(&ip)
        || match ip {
            // Clouds serve a machine's own credentials at a link-local address.
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
    if local {
        return Some(Refused::HostLocal);
    }
    let nowhere = ip.is_unspecified()
        || ip.is_multicast()
        || match ip {
            // 0.0.0.0/8 is this host, 240.0.0.0/4 is nobody.
            IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.octets()[0] >= 240,
            IpAddr::V6(_) => false,
        };
    nowhere.then_some(Refused::NotUnicast)
}

/// The addresses of this process' own namespace, of a tenant's router on it, and
/// the one that pods see as their gateway.
pub fn host_addresses(router: &Netns) -> io::Result<Vec<IpAddr>> {
    let mut all = addresses()?;
    all.extend(router.enter(addresses)?);
    all.push(IpAddr::V4(GATEWAY));
    Ok(all)
}

/// Of all devices in the namespace the thread stands in, but not loopback's:
/// those no packet from a device can name.
fn addresses() -> io::Result<Vec<IpAddr>> {
    Ok(nix::ifaddrs::getifaddrs()?
        .filter_map(|interface| {
            let address = interface.address?;
            let ipv4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            ipv4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .filter(|address| !address.is_loopback())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(all: &[&str]) -> Vec<Ipv4Net> {
        all.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn to(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn of_a_pool_a_pod_reaches_nothing_but_what_is_allowed_and_pods_are_told_apart() {
        let allowed = "192.0.2.1:6443".parse().unwrap();
        let limits = OffLimits::new(&nets(&["10.77.0.0/16"]), &nets(&["192.0.2.0/24"]), [allowed]).unwrap();
        for (address, refused) in [
            ("192.0.2.1:6443", false),
            ("192.0.2.1:6444", true),
            ("192.0.2.11:6443", true),
            ("192.0.2.11:7443", true),
            ("[::ffff:192.0.2.11]:7443", true),
            ("192.0.3.1:7443", false),
            ("100.100.100.200:80", true),
            ("168.63.129.16:80", true),
            ("[fd00:ec2::254]:80", true),
            ("[fd20:ce::254]:80", true),
            ("[2001:db8::1]:80", false),
            ("10.77.1.2:80", false),
            ("203.0.113.5:443", false),
        ] {
            assert_eq!(limits.refuse(to(address)).is_some(), refused, "{address}");
        }
        for (address, pods) in [
            ("10.77.1.2", true),
            ("10.78.1.2", false),
            ("::ffff:10.77.1.2", true),
        ] {
            assert_eq!(limits.is_pods(address.parse().unwrap()), pods, "{address}");
        }
    }

    #[test]
    fn of_two_ranges_that_overlap_the_longer_prefix_counts() {
        // Hosts in a network of their own among the pods, and pods in the hosts'.
        for (pool, underlay, host, pod) in [
            ("10.0.0.0/8", "10.0.0.0/24", "10.0.0.11", "10.0.1.11"),
            ("10.77.0.0/16", "10.0.0.0/8", "10.76.0.1", "10.77.0.1"),
        ] {
            let limits = OffLimits::new(&nets(&[pool]), &nets(&[underlay]), []).unwrap();
            let (host, pod): (IpAddr, IpAddr) = (host.parse().unwrap(), pod.parse().unwrap());
            assert_eq!(
                limits.refuse((host, 1).into()),
                Some(Refused::OffLimits),
                "{host}"
            );
            assert!(!limits.is_pods(host), "{host}");
            assert_eq!(limits.refuse((pod, 1).into()), None, "{pod}");
            assert!(limits.is_pods(pod), "{pod}");
        }
    }

    #[test]
    fn what_lies_side_by_side_counts_once_and_too_much_is_refused() {
        let slices: Vec<Ipv4Net> = (0..=255)
            .map(|n| format!("10.77.{n}.0/24").parse().unwrap())
            .collect();
        let limits = OffLimits::new(&slices, &[], []).unwrap();
        assert_eq!(limits.pool(), nets(&["10.77.0.0/16"]));
        let apart: Vec<Ipv4Net> = (0..40)
            .map(|n| format!("10.{}.0.0/16", 2 * n).parse().unwrap())
            .collect();
        assert_eq!(OffLimits::new(&apart, &[], []), Err(TooMuch::Pool(40)));
        let hosts: Vec<Ipv4Net> = (0..80)
            .map(|n| format!("192.0.2.{}/32", 2 * n).parse().unwrap())
            .collect();
        assert!(matches!(
            OffLimits::new(&[], &hosts, []),
            Err(TooMuch::OffLimits(_))
        ));
    }
}
