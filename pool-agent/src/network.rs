//! The pods' devices, addresses and routes, made over netlink in this process.
//! Called at the start, by `host` for each tenant, and by a sandbox's `perform`
//! when containerd hands over the network namespace.
//!
//! ```text
//!  host namespace            tenant's router namespace               pod's namespace
//!  uplink                    uplink: an address of the range, /32
//!  <pod> via 169.254.1.2     default via 169.254.1.3 dev uplink      default via 169.254.1.1 dev eth0
//!  sdr… ────────veth──────── uplink     sdp… ──────────veth───────── eth0: <address>/32
//!  169.254.1.3               169.254.1.2     169.254.1.1
//! ```
//!
//! One range is the host's; its configuration says which. Each pod and each router has
//! an address of it (`admission` gives them), and the host a route to each by the
//! router it is in: two tenants' addresses lie between each other, their packets in
//! namespaces apart.
//!
//! What always holds:
//! - neighbours are static on both ends of every pair: no ARP is needed, and none
//!   is believed;
//! - the host's end of a pod's pair is down until the mesh is attached to it;
//! - an address of the range that nobody has is unreachable on the host, not a loop;
//!   one that is another tenant's is unreachable in a router, not the host's to pass on;
//! - every step may be repeated, and what an earlier agent made is adopted.

mod netlink;
mod router;

use std::{
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
};

use ipnet::Ipv4Net;
use mesh_runtime::netns::Netns;
use pool_agent_api::{SandboxKey, TenantId};
use sha2::{Digest, Sha256};

use crate::layout::Layout;
use netlink::{Netlink, Via};
pub use router::Router;

/// The gateway a pod sees. It is no device's address: the neighbour is static.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The router as the host's route names it, and the host as the router's does.
const ROUTER_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);
const HOST_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 3);
/// Locally administered. Each pair is a link of its own, so they may repeat.
const GATEWAY_MAC: [u8; 6] = [0x02, 0x53, 0x44, 0x00, 0x00, 0x01];
const ROUTER_MAC: [u8; 6] = [0x02, 0x53, 0x44, 0x00, 0x00, 0x02];
const HOST_MAC: [u8; 6] = [0x02, 0x53, 0x44, 0x00, 0x00, 0x03];
/// The router's device towards the host.
pub const ROUTER_UPLINK: &str = "uplink";
/// The pod's device.
pub const POD_DEVICE: &str = "eth0";
/// How the host's ends of pods' pairs begin.
const POD_PREFIX: &str = "sdp";

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("opening network namespace {path}")]
    Namespace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{action}")]
    Kernel {
        action: String,
        #[source]
        source: io::Error,
    },
    #[error("setting {path}")]
    Setting {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("this host has no device {0}: correct `uplink`")]
    NoUplink(String),
    #[error(
        "pod_range {range} holds {address}, which this host's device {device} has: give the pods another"
    )]
    RangeTaken {
        range: Ipv4Net,
        address: Ipv4Addr,
        device: String,
    },
}

/// A pod's pair, made but with the host's end still down.
#[derive(Debug, Clone)]
pub struct PodDevice {
    /// The host's end, in the router.
    pub name: String,
    pub address: Ipv4Addr,
    /// The pod's end.
    pub mac: [u8; 6],
    pub mtu: u32,
}

#[derive(Debug)]
pub struct Network {
    layout: Layout,
    host: Arc<Netlink>,
    /// Of all addresses that are given out here.
    range: Ipv4Net,
    mtu: u32,
}

impl Network {
    pub async fn open(layout: Layout, uplink: &str, range: Ipv4Net) -> Result<Self, NetworkError> {
        let host = Arc::new(Netlink::here()?);
        let Some(device) = host.find(uplink).await? else {
            return Err(NetworkError::NoUplink(uplink.to_owned()));
        };
        let taken = own_addresses()?
            .into_iter()
            .map(|(device, network)| (device, network.addr()))
            .find(|(_, address)| range.contains(address));
        if let Some((device, address)) = taken {
            return Err(NetworkError::RangeTaken {
                range,
                address,
                device,
            });
        }
        netlink::set_here("net/ipv4/ip_forward", "1")?;
        host.add_route(range, Via::Unreachable, None).await?;
        Ok(Self {
            layout,
            host,
            range,
            mtu: device.mtu,
        })
    }

    /// The tenant's router on this host, with this address; made if need be.
    pub async fn router(&self, tenant: &TenantId, address: Ipv4Addr) -> Result<Router, NetworkError> {
        Router::open(self, tenant, address).await
    }

    /// Removes the host's routes to pods and routers other than those with these
    /// addresses.
    pub async fn sweep(&self, keep: impl IntoIterator<Item = Ipv4Addr>) -> Result<(), NetworkError> {
        let keep = keep.into_iter().map(Ipv4Net::from).chain([self.range]);
        self.host.sweep_routes(&keep.collect()).await
    }
}

/// The networks that a device of the host is in.
pub fn networks(device: &str) -> Result<Vec<Ipv4Net>, NetworkError> {
    let own = own_addresses()?.into_iter().filter(|(name, _)| name == device);
    Ok(own.map(|(_, network)| network.trunc()).collect())
}

/// The IPv4 addresses of the host's devices, each with its network.
fn own_addresses() -> Result<Vec<(String, Ipv4Net)>, NetworkError> {
    let devices = nix::ifaddrs::getifaddrs().map_err(|source| NetworkError::Kernel {
        action: "listing the host's addresses".into(),
        source: source.into(),
    })?;
    Ok(devices
        .filter_map(|device| {
            let address = device.address?.as_sockaddr_in()?.ip();
            let mask = device.netmask.and_then(|mask| Some(mask.as_sockaddr_in()?.ip()));
            let network = match mask {
                Some(mask) => Ipv4Net::with_netmask(address, mask).ok()?,
                None => address.into(),
            };
            Some((device.interface_name, network))
        })
        .collect())
}

impl Router {
    /// Makes the pair of a pod and all of the pod's end. What is there of that pod
    /// from before is replaced.
    pub async fn plug(
        &self,
        key: &SandboxKey,
        address: Ipv4Addr,
        netns: &Path,
    ) -> Result<PodDevice, NetworkError> {
        let name = device_name(key);
        let mac = pod_mac(address);
        let pod_netns = Netns::open(netns).map_err(|source| NetworkError::Namespace {
            path: netns.to_owned(),
            source,
        })?;
        let pod = Netlink::within(&pod_netns)?;
        if self.netlink().delete(&name).await? {
            tracing::debug!(device = name, "replaced a device of an earlier try");
        }
        let file = std::fs::File::open(netns).map_err(|source| NetworkError::Namespace {
            path: netns.to_owned(),
            source,
        })?;
        self.netlink()
            .add_pair((&name, GATEWAY_MAC), (POD_DEVICE, mac), &file, self.mtu())
            .await?;
        netlink::set_within(
            &pod_netns,
            &format!("net/ipv6/conf/{POD_DEVICE}/disable_ipv6"),
            "1",
        )?;
        if let Some(lo) = pod.find("lo").await? {
            pod.raise(lo.index).await?;
        }
        let Some(eth0) = pod.find(POD_DEVICE).await? else {
            return Err(NetworkError::Kernel {
                action: format!("finding {POD_DEVICE} in the pod"),
                source: io::ErrorKind::NotFound.into(),
            });
        };
        pod.raise(eth0.index).await?;
        pod.add_address(eth0.index, address).await?;
        pod.add_neighbour(eth0.index, POD_GATEWAY, GATEWAY_MAC).await?;
        pod.add_route(Ipv4Net::default(), Via::Gateway(POD_GATEWAY, eth0.index), None)
            .await?;
        Ok(PodDevice {
            name,
            address,
            mac,
            mtu: self.mtu(),
        })
    }

    /// Opens the host's end, once the mesh is attached to it.
    pub async fn raise(&self, device: &PodDevice) -> Result<(), NetworkError> {
        let netlink = self.netlink();
        let Some(link) = netlink.find(&device.name).await? else {
            return Err(NetworkError::Kernel {
                action: format!("finding {} in the router", device.name),
                source: io::ErrorKind::NotFound.into(),
            });
        };
        netlink.raise(link.index).await?;
        netlink
            .add_neighbour(link.index, device.address, device.mac)
            .await?;
        netlink
            .add_route(
                Ipv4Net::from(device.address),
                Via::Device(link.index),
                Some(self.address()),
            )
            .await?;
        self.lead(device.address, &device.name).await
    }

    /// The device of a pod that an earlier agent connected, if it is still there.
    pub async fn adopt(
        &self,
        key: &SandboxKey,
        address: Ipv4Addr,
    ) -> Result<Option<PodDevice>, NetworkError> {
        let name = device_name(key);
        Ok(self.netlink().find(&name).await?.map(|link| PodDevice {
            name,
            address,
            mac: pod_mac(address),
            mtu: link.mtu,
        }))
    }

    /// Removes a pod's pair with its routes. Nothing to do if there is none.
    pub async fn unplug(&self, key: &SandboxKey, address: Ipv4Addr) -> Result<(), NetworkError> {
        let name = device_name(key);
        self.stop_leading(address, &name).await?;
        self.netlink().delete(&name).await.map(drop)
    }

    /// Removes pods' devices that belong to none of `keep`.
    pub async fn sweep(&self, keep: &[SandboxKey]) -> Result<(), NetworkError> {
        let keep: Vec<String> = keep.iter().map(device_name).collect();
        for name in self.netlink().names().await? {
            if name.starts_with(POD_PREFIX) && !keep.contains(&name) {
                tracing::info!(device = name, "removing a device no sandbox has");
                self.netlink().delete(&name).await?;
            }
        }
        Ok(())
    }
}

/// Device names have 15 characters; a sandbox's is a hash of its key.
fn device_name(key: &SandboxKey) -> String {
    short_name(POD_PREFIX, &key.to_string())
}

fn short_name(prefix: &str, of: &str) -> String {
    let digest = Sha256::digest(of.as_bytes());
    let hash: String = digest[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}{hash}")
}

/// Locally administered, and told by the address.
fn pod_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x54, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_fits_the_kernel_and_tells_attempts_apart() {
        let key = |attempt| SandboxKey {
            pod: "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f".parse().unwrap(),
            attempt: pool_agent_api::Attempt::parse("", attempt).unwrap(),
        };
        let (one, two) = (device_name(&key(1)), device_name(&key(2)));
        assert_eq!(one.len(), 15);
        assert_ne!(one, two);
    }
}
