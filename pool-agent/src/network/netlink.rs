//! rtnetlink in one network namespace: the few requests this agent makes, each
//! of which may be repeated.

use std::{
    collections::HashSet,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
};

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use mesh_runtime::netns::Netns;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoVeth, LinkAttribute},
        neighbour::NeighbourState,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

use super::NetworkError;

/// By this number this agent's routes are told from others', as `ip route` shows:
/// `proto 83`. Not one of those that iproute2 names.
const OURS: RouteProtocol = RouteProtocol::Other(83);

/// A netlink socket in one namespace, with the task that serves it.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub index: u32,
    pub mtu: u32,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Via {
    /// A gateway on the link of a device, reached by a static neighbour.
    Gateway(Ipv4Addr, u32),
    Device(u32),
    /// Nowhere: refused with "host unreachable".
    Unreachable,
}

impl Netlink {
    /// In the agent's own namespace.
    pub(super) fn here() -> Result<Self, NetworkError> {
        Self::open().map_err(|source| NetworkError::Kernel {
            action: "opening a netlink socket".into(),
            source,
        })
    }

    pub(super) fn within(netns: &Netns) -> Result<Self, NetworkError> {
        netns.enter(Self::open).map_err(|source| NetworkError::Kernel {
            action: format!("opening a netlink socket in {}", netns.path().display()),
            source,
        })
    }

    fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            task: tokio::spawn(connection),
        })
    }

    pub(super) async fn find(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(found) => Ok(found.map(|link| Link {
                index: link.header.index,
                mtu: link
                    .attributes
                    .iter()
                    .find_map(|a| match a {
                        LinkAttribute::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    })
                    .unwrap_or(1500),
            })),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(failed(format!("looking for device {name}"), error)),
        }
    }

    pub(super) async fn names(&self) -> Result<Vec<String>, NetworkError> {
        let links: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("listing devices".into(), e))?;
        Ok(links
            .into_iter()
            .filter_map(|link| {
                link.attributes.into_iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                })
            })
            .collect())
    }

    /// A pair: `near` here and down, `far` straight in another namespace.
    pub(super) async fn add_pair(
        &self,
        near: (&str, [u8; 6]),
        far: (&str, [u8; 6]),
        netns: &File,
        mtu: u32,
    ) -> Result<(), NetworkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(far.0.to_owned())
            .address(far.1.to_vec())
            .mtu(mtu)
            .setns_by_fd(netns.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(near.0, far.0)
            .address(near.1.to_vec())
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.handle
            .link()
            .add(pair)
            .execute()
            .await
            .map_err(|e| failed(format!("making the pair {} and {}", near.0, far.0), e))
    }

    /// Whether there was one.
    pub(super) async fn delete(&self, name: &str) -> Result<bool, NetworkError> {
        let Some(link) = self.find(name).await? else {
            return Ok(false);
        };
        match self.handle.link().del(link.index).execute().await {
            Ok(()) => Ok(true),
            // It went with its namespace while we looked.
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(failed(format!("deleting device {name}"), error)),
        }
    }

    pub(super) async fn raise(&self, index: u32) -> Result<(), NetworkError> {
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .set(up)
            .execute()
            .await
            .map_err(|e| failed(format!("raising device {index}"), e))
    }

    pub(super) async fn add_address(&self, index: u32, address: Ipv4Addr) -> Result<(), NetworkError> {
        self.handle
            .address()
            .add(index, IpAddr::V4(address), 32)
            .replace()
            .execute()
            .await
            .map_err(|e| failed(format!("adding address {address}"), e))
    }

    /// Makes `address` the device's only one.
    pub(super) async fn set_address(&self, index: u32, address: Ipv4Addr) -> Result<(), NetworkError> {
        self.add_address(index, address).await?;
        let all: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed(format!("listing the addresses of device {index}"), e))?;
        let own = AddressAttribute::Local(IpAddr::V4(address));
        for other in all.into_iter().filter(|a| !a.attributes.contains(&own)) {
            match self.handle.address().del(other).execute().await {
                Err(error) if errno(&error) != Some(libc::EADDRNOTAVAIL) => {
                    return Err(failed(format!("removing an address of device {index}"), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) async fn add_neighbour(
        &self,
        index: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), NetworkError> {
        self.handle
            .neighbours()
            .add(index, IpAddr::V4(address))
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(|e| failed(format!("adding neighbour {address}"), e))
    }

    pub(super) async fn add_route(
        &self,
        to: Ipv4Net,
        via: Via,
        source: Option<Ipv4Addr>,
    ) -> Result<(), NetworkError> {
        self.handle
            .route()
            .add(route(to, via, source))
            .replace()
            .execute()
            .await
            .map_err(|e| failed(format!("adding the route to {to}"), e))
    }

    /// Removes this agent's route to `to` by that way. Nothing to do if there is none.
    pub(super) async fn remove_route(&self, to: Ipv4Net, via: Via) -> Result<(), NetworkError> {
        self.delete_route(to, route(to, via, None)).await
    }

    /// Removes those of this agent's routes in the main table that lead to none of
    /// `keep`. What others have put there stays.
    pub(super) async fn sweep_routes(&self, keep: &HashSet<Ipv4Net>) -> Result<(), NetworkError> {
        let everything = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let all: Vec<RouteMessage> = self
            .handle
            .route()
            .get(everything)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("listing the routes".into(), e))?;
        for route in all {
            if let Some(to) = destination(&route)
                && route.header.protocol == OURS
                && !keep.contains(&to)
            {
                tracing::info!(%to, "removing a route to nobody");
                self.delete_route(to, route).await?;
            }
        }
        Ok(())
    }

    async fn delete_route(&self, to: Ipv4Net, route: RouteMessage) -> Result<(), NetworkError> {
        match self.handle.route().del(route).execute().await {
            // It went with its device.
            Err(error) if errno(&error) != Some(libc::ESRCH) && errno(&error) != Some(libc::ENODEV) => {
                Err(failed(format!("removing the route to {to}"), error))
            }
            _ => Ok(()),
        }
    }
}

fn route(to: Ipv4Net, via: Via, source: Option<Ipv4Addr>) -> RouteMessage {
    let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(to.addr(), to.prefix_len())
        .protocol(OURS);
    route = match via {
        Via::Gateway(gateway, index) => route.gateway(gateway).output_interface(index).onlink(),
        Via::Device(index) => route.output_interface(index).scope(RouteScope::Link),
        Via::Unreachable => route.kind(RouteType::Unreachable),
    };
    if let Some(source) = source {
        route = route.pref_source(source);
    }
    route.build()
}

fn destination(route: &RouteMessage) -> Option<Ipv4Net> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => {
            Ipv4Net::new(*address, route.header.destination_prefix_length).ok()
        }
        _ => None,
    })
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

fn failed(action: String, error: rtnetlink::Error) -> NetworkError {
    NetworkError::Kernel {
        action,
        source: match errno(&error) {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::other(error.to_string()),
        },
    }
}

/// Writes a setting under /proc/sys, which shows the namespace of who opens it.
pub(super) fn set_here(setting: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/{setting}");
    std::fs::write(&path, value).map_err(|source| NetworkError::Setting { path, source })
}

pub(super) fn set_within(netns: &Netns, setting: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/{setting}");
    netns
        .enter(|| std::fs::write(&path, value))
        .map_err(|source| NetworkError::Setting { path, source })
}
