//! The network of a lab: which namespaces there are and how they are joined.
//!
//! ```text
//! machine's namespace    kubectl → 127.0.0.1:PORT   (a relay: listens here, dials inside `lab`)
//! └─ lab                 bridge br0: API server .1, virtual-node .2, the cell's API server .4
//!    ├─ host-a   .11     eth0 on the bridge: containerd, pool-agent
//!    └─ host-b   .12     the same; each routes the other's pods over the bridge
//! ```
//!
//! Addresses are the same in every instance: none of them exists outside its
//! namespaces, and the machine's own namespace gets no route, device or address.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::{instance::Layout, netns::Namespace, tool::ToolError};

/// Of the API server, and what pods reach as `kubernetes.default.svc`.
pub const API_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const API_SERVER_PORT: u16 = 6443;
/// Of the API server of the pool's own cell, where an instance has one.
pub const CELL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 4);
/// Of the image registry, where an instance has one.
pub const REGISTRY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
pub const VIRTUAL_NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// What hosts and control planes are in.
pub const UNDERLAY: &str = "192.0.2.0/24";
pub const POD_RANGE: &str = "10.77.0.0/16";
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// Kubernetes wants one; nothing of the cell is reached by a Service.
pub const CELL_SERVICE_RANGE: &str = "10.97.0.0/24";
/// The API server's own Service: the first address of the range.
pub const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// A host's device to the bridge.
pub const UPLINK: &str = "eth0";
const BRIDGE: &str = "br0";
/// Said, it stays: else it is that of some port, and when that host goes all others
/// send to nobody until they ask again.
const BRIDGE_ADDRESS: &str = "02:00:c0:00:02:01";

/// One pool host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `host-a`, `host-b`, …
    pub name: String,
    pub address: Ipv4Addr,
    /// Of the addresses it gives to pods and routers.
    pub pod_range: String,
    pub namespace: Namespace,
}

#[derive(Clone, Debug)]
pub struct Topology {
    pub lab: Namespace,
    pub hosts: Vec<Host>,
}

#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    #[error("a lab has one to {most} hosts, not {0}", most = Topology::MOST_HOSTS)]
    Hosts(usize),
    #[error("cannot lay out the network")]
    Tool(#[from] ToolError),
    #[error("cannot set {setting} in {namespace}")]
    Setting {
        setting: &'static str,
        namespace: String,
        #[source]
        source: std::io::Error,
    },
}

impl Topology {
    /// Each has a letter, or a slot.
    pub const MOST_HOSTS: usize = 26;

    pub fn new(layout: &Layout, hosts: usize) -> Result<Self, TopologyError> {
        if !(1..=Self::MOST_HOSTS).contains(&hosts) {
            return Err(TopologyError::Hosts(hosts));
        }
        let host = |(slot, letter)| Self::host_in(layout, &format!("host-{letter}"), slot);
        Ok(Self {
            hosts: (0u8..).zip('a'..='z').take(hosts).map(host).collect(),
            ..Self::elastic(layout)
        })
    }

    /// Of a lab whose hosts come and go.
    pub fn elastic(layout: &Layout) -> Self {
        Self {
            lab: Namespace::named(layout.namespace("lab")),
            hosts: vec![],
        }
    }

    /// The host of that name with the addresses of the slot, of which there are
    /// [`MOST_HOSTS`](Self::MOST_HOSTS).
    pub fn host_in(layout: &Layout, name: &str, slot: u8) -> Host {
        Host {
            address: Self::address(slot),
            pod_range: Self::pod_range(slot),
            namespace: Namespace::named(layout.namespace(name)),
            name: name.to_owned(),
        }
    }

    fn address(slot: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, 11 + slot)
    }

    fn pod_range(slot: u8) -> String {
        format!("10.77.{}.0/24", slot + 1)
    }

    /// Makes what is missing and leaves what is there.
    pub async fn ensure(&self) -> Result<(), TopologyError> {
        self.lab.ensure().await?;
        if !self.lab.has_device(BRIDGE).await {
            let add = format!("link add {BRIDGE} address {BRIDGE_ADDRESS} type bridge");
            self.lab.ip(&add).await?;
        }
        self.lab.ip(&format!("link set {BRIDGE} up")).await?;
        for address in [API_SERVER, VIRTUAL_NODE, REGISTRY, CELL] {
            self.lab
                .ip(&format!("addr replace {address}/24 dev {BRIDGE}"))
                .await?;
        }
        forward(&self.lab)?;
        for host in &self.hosts {
            self.join(host).await?;
        }
        for host in &self.hosts {
            let route = format!("route replace {} via {}", host.pod_range, host.address);
            self.lab.ip(&route).await?;
            for other in self.hosts.iter().filter(|other| other.name != host.name) {
                other.namespace.ip(&format!("{route} dev {UPLINK}")).await?;
            }
        }
        Ok(())
    }

    /// Puts one host on the bridge. Those of the pool are on it already; this is
    /// for one beside them.
    pub async fn join(&self, host: &Host) -> Result<(), TopologyError> {
        let (namespace, name) = (&host.namespace, &host.name);
        namespace.ensure().await?;
        if !namespace.has_device(UPLINK).await {
            let add = format!(
                "link add {name} type veth peer name {UPLINK} netns {}",
                namespace.name()
            );
            self.lab.ip(&add).await?;
        }
        self.lab
            .ip(&format!("link set {name} master {BRIDGE} up"))
            .await?;
        namespace
            .ip(&format!("addr replace {}/24 dev {UPLINK}", host.address))
            .await?;
        namespace.ip(&format!("link set {UPLINK} up")).await?;
        // The way out ends at the bridge's namespace, which says "unreachable"
        // at once: nothing of a lab talks to the world.
        namespace
            .ip(&format!("route replace default via {API_SERVER}"))
            .await?;
        forward(namespace)
    }

    /// Leads the host to the pods of every slot, whether or not a host has it just now,
    /// and the lab to this one's.
    pub async fn lead(&self, layout: &Layout, host: &Host) -> Result<(), TopologyError> {
        let own = format!("route replace {} via {}", host.pod_range, host.address);
        self.lab.ip(&own).await?;
        let mut routes = String::new();
        for slot in 0..Self::MOST_HOSTS as u8 {
            let (range, address) = (Self::pod_range(slot), Self::address(slot));
            if address != host.address {
                routes += &format!("route replace {range} via {address} dev {UPLINK}\n");
            }
        }
        let file = layout.host_state(&host.name).join("routes");
        std::fs::create_dir_all(layout.host_state(&host.name))
            .and_then(|()| std::fs::write(&file, routes))
            .map_err(|source| TopologyError::Setting {
                setting: "the routes to other hosts",
                namespace: host.namespace.name().to_owned(),
                source,
            })?;
        host.namespace.ip_batch(&file).await?;
        Ok(())
    }

    /// Takes a host that is gone off the bridge.
    pub async fn part(&self, host: &Host) -> Result<(), TopologyError> {
        if self.lab.has_device(&host.name).await {
            self.lab.ip(&format!("link del {}", host.name)).await?;
        }
        let route = format!("route show {}", host.pod_range);
        if !self.lab.ip(&route).await?.trim().is_empty() {
            self.lab.ip(&format!("route del {}", host.pod_range)).await?;
        }
        Ok(())
    }

    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name == name)
    }

    /// The host whose slice holds the pod address.
    pub fn host_of(&self, pod: IpAddr) -> Option<&Host> {
        let IpAddr::V4(pod) = pod else { return None };
        self.hosts.iter().find(|host| {
            let slice = host
                .pod_range
                .split('/')
                .next()
                .and_then(|start| start.parse::<Ipv4Addr>().ok());
            slice.is_some_and(|slice| slice.octets()[..3] == pod.octets()[..3])
        })
    }

    /// Every namespace it makes.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.hosts.iter().map(|host| &host.namespace).chain([&self.lab])
    }
}

fn forward(namespace: &Namespace) -> Result<(), TopologyError> {
    let setting = "net/ipv4/ip_forward";
    namespace
        .set(setting, "1")
        .map_err(|source| TopologyError::Setting {
            setting,
            namespace: namespace.name().to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_has_its_own_address_and_slice() {
        let topology = Topology::new(&Layout::new("x".parse().unwrap()), 3).unwrap();
        let told: Vec<_> = topology
            .hosts
            .iter()
            .map(|h| format!("{} {} {}", h.name, h.address, h.pod_range))
            .collect();
        assert_eq!(
            told,
            [
                "host-a 192.0.2.11 10.77.1.0/24",
                "host-b 192.0.2.12 10.77.2.0/24",
                "host-c 192.0.2.13 10.77.3.0/24"
            ]
        );
        assert_eq!(
            topology.host_of("10.77.2.9".parse().unwrap()).unwrap().name,
            "host-b"
        );
        assert_eq!(topology.host_of("10.77.9.9".parse().unwrap()), None);
    }

    #[test]
    fn a_pool_without_hosts_is_refused() {
        assert!(Topology::new(&Layout::new("x".parse().unwrap()), 0).is_err());
    }
}
