//! Where nothing may be dialled for a pod: what is local to its host or router.
//!
//! Whoever dials for a pod (the proxy, the agent's probes) stands where those
//! addresses are its own, so it would open the host's services to the tenant.

use std::{io, net::IpAddr};

use crate::{netns::Netns, redirect::GATEWAY};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no pod may reach what is local to the host")]
    HostLocal,
    #[error("the address is not one that a connection can go to")]
    NotUnicast,
}

/// Whether nothing may be dialled at `ip` on a host that has the addresses `host`.
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
