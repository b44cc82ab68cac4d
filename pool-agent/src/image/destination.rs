//! Where an image's name may lead. The runtime that follows it stands on the host,
//! where loopback is the host's own and link-local may be a cloud's credentials.
//!
//! Pure but for [`Destinations::of_host`], which reads the host's addresses once,
//! and [`Destinations::check`] and [`Destinations::reach`], which ask its resolver.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_runtime::off_limits;

use super::Reference;
use crate::policy::images::{self, Registry};

/// A resolver's answer that takes longer is none.
const RESOLVE: Duration = Duration::from_secs(15);
/// Where a registry's name has no port: HTTPS.
const HTTPS: u16 = 443;

/// Clouds serve a machine's own credentials and settings here; others than at a
/// link-local address: AWS, Google and Scaleway in IPv6, Alibaba, Azure.
const METADATA: [IpAddr; 5] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];
const CLOUD_LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Carrier-grade NAT, which pools and clouds use inside.
const SHARED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
/// An IPv4 address in its last four bytes, for a translator on the way.
const NAT64: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

/// What is wrong with a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    #[error("a name of the host itself")]
    LocalName,
    #[error("a number that is no address")]
    Number,
    #[error("a loopback address")]
    Loopback,
    #[error("the unspecified address")]
    Unspecified,
    #[error("an address that serves a machine's own credentials")]
    Metadata,
    #[error("a link-local address")]
    LinkLocal,
    #[error("a multicast address")]
    Multicast,
    #[error("an address that no connection can go to")]
    NotUnicast,
    #[error("an address of the host")]
    Host,
    #[error("an address of the pool")]
    Pool,
    #[error("a private address")]
    Private,
}

/// Why a registry is not asked. Shown to users, so it says no more than they said: what
/// the host's resolver made of a name is in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "registry {registry} {}, where no image is pulled from on this host unless its operator \
     allows it (policy.images)",
    leads(.address, .forbidden)
)]
pub struct LeadsAstray {
    pub registry: String,
    /// Of several that the resolver gave, the one that is forbidden; None where the
    /// name alone says it.
    pub address: Option<IpAddr>,
    pub forbidden: Forbidden,
}

fn leads(resolved: &Option<IpAddr>, forbidden: &Forbidden) -> String {
    match resolved {
        None => format!("is {forbidden}"),
        Some(_) => "leads to an address".to_owned(),
    }
}

/// Why nothing may be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoWay {
    Astray(LeadsAstray),
    /// The resolver does not know the name, or says nothing.
    Unknown,
}

/// What the operator and the host's own network say.
#[derive(Debug, Clone, Default)]
pub struct Destinations {
    allow_registries: Vec<Registry>,
    allow_networks: Vec<IpNet>,
    /// The host's own addresses.
    host: Vec<IpAddr>,
    /// The networks it is on, and what else the operator calls the pool's.
    pool: Vec<IpNet>,
}

/// What a registry's name says by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// The operator allows it, wherever it leads.
    Allowed,
    Address(SocketAddr),
    /// Only a resolver knows.
    Name(String, u16),
}

impl Destinations {
    pub fn of_host(policy: &images::Images) -> io::Result<Self> {
        let mut destinations = Self {
            allow_registries: policy.allow_registries.clone(),
            allow_networks: policy.allow_networks.clone(),
            host: vec![],
            pool: policy.deny_networks.clone(),
        };
        for interface in nix::ifaddrs::getifaddrs()? {
            let ip = |address: &nix::sys::socket::SockaddrStorage| {
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            };
            let Some(address) = interface.address.as_ref().and_then(ip) else {
                continue;
            };
            destinations.host.push(address);
            let mask = interface.netmask.as_ref().and_then(ip);
            if let Some(network) = mask.and_then(|mask| IpNet::with_netmask(address, mask).ok()) {
                destinations.pool.push(network.trunc());
            }
        }
        Ok(destinations)
    }

    /// What can be said of a registry without asking a resolver.
    pub fn named(&self, registry: &str) -> Result<Named, LeadsAstray> {
        // The proxy is asked for `HOST:PORT`, whatever the image's name says.
        let asked = place(registry);
        if self
            .allow_registries
            .iter()
            .any(|allowed| place(allowed.as_str()) == asked)
        {
            return Ok(Named::Allowed);
        }
        let astray = |forbidden| LeadsAstray {
            registry: registry.to_owned(),
            address: None,
            forbidden,
        };
        let (host, port) = split(registry);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return match self.refuse(ip) {
                Some(forbidden) => Err(astray(forbidden)),
                None => Ok(Named::Address(SocketAddr::new(ip, port))),
            };
        }
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        let last = name.rsplit('.').next().unwrap_or_default();
        if last == "localhost" {
            return Err(astray(Forbidden::LocalName));
        }
        // 127.1, 0x7f.0.0.1 and the like are addresses to some resolvers and to no
        // others; no top-level domain is a number.
        let number = last.strip_prefix("0x").unwrap_or(last);
        if last.bytes().all(|c| c.is_ascii_digit())
            || (last.len() != number.len() && number.bytes().all(|c| c.is_ascii_hexdigit()))
        {
            return Err(astray(Forbidden::Number));
        }
        Ok(Named::Name(name, port))
    }

    /// Whether the runtime may be told to ask the image's registry. A name that the
    /// resolver does not know leads nowhere, and the runtime says so better; it may
    /// also have a mirror for it.
    pub async fn check(&self, reference: &Reference) -> Result<(), LeadsAstray> {
        // Docker's name is not where its registry is.
        let registry = match reference.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            registry => registry,
        };
        if self.named(registry)? == Named::Allowed {
            return Ok(());
        }
        match self.reach(registry).await {
            Err(NoWay::Astray(astray)) => Err(astray),
            Ok(_) | Err(NoWay::Unknown) => Ok(()),
        }
    }

    /// Where a registry is. One that leads astray by any of its addresses is not
    /// asked at all: it chooses which of them is tried.
    pub async fn reach(&self, registry: &str) -> Result<Vec<SocketAddr>, NoWay> {
        let (name, port, trusted) = match self.named(registry).map_err(NoWay::Astray)? {
            Named::Address(address) => return Ok(vec![address]),
            Named::Name(name, port) => (name, port, false),
            Named::Allowed => {
                let (name, port) = split(registry);
                let name = name.trim_start_matches('[').trim_end_matches(']');
                (name.to_owned(), port, true)
            }
        };
        let found = tokio::time::timeout(RESOLVE, tokio::net::lookup_host((name.as_str(), port))).await;
        let found: Vec<SocketAddr> = match found {
            Ok(Ok(found)) => found.collect(),
            _ => return Err(NoWay::Unknown),
        };
        for address in &found {
            if let (false, Some(forbidden)) = (trusted, self.refuse(address.ip())) {
                let ip = address.ip();
                tracing::info!(registry, address = %ip, reason = %forbidden, "a registry leads astray");
                return Err(NoWay::Astray(LeadsAstray {
                    registry: registry.to_owned(),
                    address: Some(ip),
                    forbidden,
                }));
            }
        }
        Ok(found)
    }

    /// What is wrong with an address, if anything is.
    pub fn refuse(&self, ip: IpAddr) -> Option<Forbidden> {
        let ip = plain(ip);
        if self.allow_networks.iter().any(|network| network.contains(&ip)) {
            return None;
        }
        if METADATA.contains(&ip) || ip == IpAddr::V4(CLOUD_LINK_LOCAL) {
            return Some(Forbidden::Metadata);
        }
        let link_local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let kinds = [
            (ip.is_loopback(), Forbidden::Loopback),
            (ip.is_unspecified(), Forbidden::Unspecified),
            (ip.is_multicast(), Forbidden::Multicast),
            (link_local, Forbidden::LinkLocal),
            (self.host.contains(&ip), Forbidden::Host),
        ];
        if let Some((_, kind)) = kinds.into_iter().find(|(is, _)| *is) {
            return Some(kind);
        }
        // Whatever else may not be dialled for a pod.
        if off_limits::refuse(&self.host, ip).is_some() {
            return Some(Forbidden::NotUnicast);
        }
        if self.pool.iter().any(|network| network.contains(&ip)) {
            return Some(Forbidden::Pool);
        }
        let private = match ip {
            IpAddr::V4(v4) => v4.is_private() || SHARED.contains(&v4),
            IpAddr::V6(v6) => v6.is_unique_local(),
        };
        private.then_some(Forbidden::Private)
    }
}

/// The IPv4 address that an IPv6 address stands for, if it does.
fn plain(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) if NAT64.contains(&v6) => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        // `::a.b.c.d`, given up long ago and still understood; `::` and `::1` are not.
        IpAddr::V6(v6) if v6.octets()[..12] == [0; 12] && !v6.is_unspecified() && !v6.is_loopback() => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        ip => ip,
    }
}

/// Host and port, one spelling for each: where a registry is.
fn place(registry: &str) -> (String, u16) {
    let (host, port) = split(registry);
    let host = match host.trim_end_matches('.').to_ascii_lowercase() {
        // Docker's name is not where its registry is.
        host if host == "docker.io" => "registry-1.docker.io".to_owned(),
        host => host,
    };
    (host, port)
}

/// Host and port of a registry's name.
fn split(registry: &str) -> (&str, u16) {
    match registry.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().unwrap_or(HTTPS)),
        _ => (registry, HTTPS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destinations() -> Destinations {
        Destinations {
            host: vec!["203.0.113.11".parse().unwrap(), "10.77.1.1".parse().unwrap()],
            pool: vec![
                "203.0.113.0/24".parse().unwrap(),
                "2001:db8:1::/48".parse().unwrap(),
            ],
            ..Destinations::default()
        }
    }

    #[test]
    fn every_kind_of_address_inside_the_pool_or_the_host_is_refused_by_its_kind() {
        for (address, kind) in [
            ("127.0.0.1", Forbidden::Loopback),
            ("127.9.9.9", Forbidden::Loopback),
            ("[::1]:5000", Forbidden::Loopback),
            ("[::ffff:127.0.0.1]", Forbidden::Loopback),
            ("[::127.0.0.1]", Forbidden::Loopback),
            ("[64:ff9b::7f00:1]", Forbidden::Loopback),
            ("0.0.0.0:5000", Forbidden::Unspecified),
            ("[::]", Forbidden::Unspecified),
            ("0.1.2.3", Forbidden::NotUnicast),
            ("255.255.255.255", Forbidden::NotUnicast),
            ("240.0.0.1", Forbidden::NotUnicast),
            ("169.254.169.254", Forbidden::Metadata),
            ("[fd00:ec2::254]", Forbidden::Metadata),
            ("[::ffff:169.254.169.254]", Forbidden::Metadata),
            ("[64:ff9b::a9fe:a9fe]", Forbidden::Metadata),
            ("100.100.100.200", Forbidden::Metadata),
            ("168.63.129.16", Forbidden::Metadata),
            ("169.254.1.1", Forbidden::LinkLocal),
            ("[fe80::1]", Forbidden::LinkLocal),
            ("224.0.0.1", Forbidden::Multicast),
            ("[ff02::1]", Forbidden::Multicast),
            ("203.0.113.11:5000", Forbidden::Host),
            ("203.0.113.12", Forbidden::Pool),
            ("[2001:db8:1::9]", Forbidden::Pool),
            ("10.0.0.1", Forbidden::Private),
            ("172.16.0.1", Forbidden::Private),
            ("192.168.1.1:5000", Forbidden::Private),
            ("100.64.0.1", Forbidden::Private),
            ("[fd12::1]", Forbidden::Private),
        ] {
            let found = destinations().named(address).map_err(|e| e.forbidden);
            assert_eq!(found, Err(kind), "{address}");
        }
        for (name, kind) in [
            ("localhost", Forbidden::LocalName),
            ("localhost:5000", Forbidden::LocalName),
            ("LOCALHOST", Forbidden::LocalName),
            ("a.localhost", Forbidden::LocalName),
            ("127.1:5000", Forbidden::Number),
            ("0x7f.0.0.0x1", Forbidden::Number),
            ("0177.0.0.01", Forbidden::Number),
        ] {
            let found = destinations().named(name).map_err(|e| e.forbidden);
            assert_eq!(found, Err(kind), "{name}");
        }
    }

    #[test]
    fn what_is_public_is_allowed_and_a_name_is_looked_up() {
        let destinations = destinations();
        for address in ["198.51.100.7:443", "[2001:db8:2::9]:443"] {
            let wanted = Named::Address(address.parse().unwrap());
            assert_eq!(destinations.named(address), Ok(wanted));
        }
        for (registry, host, port) in [
            ("docker.io", "docker.io", 443),
            ("Registry.Example:5000", "registry.example", 5000),
            ("4.example0x", "4.example0x", 443),
        ] {
            assert_eq!(destinations.named(registry), Ok(Named::Name(host.into(), port)));
        }
    }

    #[test]
    fn the_operator_may_allow_a_registry_or_a_network() {
        let mut destinations = destinations();
        destinations.allow_networks = vec!["203.0.113.3/32".parse().unwrap()];
        destinations.allow_registries = vec!["localhost:5000".to_owned().try_into().unwrap()];
        assert!(destinations.named("203.0.113.3:5000").is_ok());
        assert!(destinations.named("203.0.113.4:5000").is_err());
        assert_eq!(destinations.named("localhost:5000"), Ok(Named::Allowed));
        assert!(destinations.named("localhost:5001").is_err());
        assert!(destinations.named("localhost").is_err());
        // As the runtime's proxy is asked: with the port, in any spelling.
        let names = ["localhost", "Registry.Example", "docker.io"];
        destinations.allow_registries = names
            .map(|name| Registry::try_from(name.to_owned()).unwrap())
            .into();
        for allowed in [
            "LOCALHOST:443",
            "registry.example.:443",
            "registry-1.docker.io:443",
        ] {
            assert_eq!(destinations.named(allowed), Ok(Named::Allowed), "{allowed}");
        }
        for other in ["localhost:80", "localhost:5000", "a.localhost:443"] {
            assert!(destinations.named(other).is_err(), "{other}");
        }
    }

    #[test]
    fn the_host_knows_its_own_addresses() {
        let own = Destinations::of_host(&images::Images::default()).unwrap();
        assert!(own.host.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)), "{own:?}");
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_refused_and_the_address_is_not_told() {
        // Known to every host by its files, and not by its spelling.
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let name = name.trim();
        let reference = Reference {
            registry: format!("{name}:5000"),
            path: "a".into(),
            tag: None,
            digest: None,
        };
        let Ok(found) = tokio::net::lookup_host((name, 5000)).await else {
            eprintln!("this machine does not know its own name: not tested");
            return;
        };
        let found: Vec<IpAddr> = found.map(|a| a.ip()).collect();
        let own = Destinations::of_host(&images::Images::default()).unwrap();
        let refused = own.check(&reference).await.unwrap_err();
        assert!(refused.address.is_some_and(|a| found.contains(&a)), "{refused:?}");
        let told = refused.to_string();
        let tells = found.iter().find(|a| told.contains(&a.to_string()));
        assert!(
            tells.is_none() && !told.contains(&refused.forbidden.to_string()),
            "{told}"
        );
    }
}
