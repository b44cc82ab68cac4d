//! The router's part of the way into the proxy: a policy route that delivers
//! marked packets locally, and the settings of its IP stack that the kernel
//! programs count on. Put there at the start, and put back whenever something
//! takes them away.
//!
//! Called by [`super::router`]. Speaks netlink on a socket of the router's
//! namespace.
//!
//! Should the route be missing, marked packets meet the rule after it, which
//! drops them; should both be, the program on the uplink's egress does.

use std::{fs, io, net::Ipv4Addr};

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteScope, RouteType},
        rule::RuleAction,
    },
    sys::SocketAddr,
};

use super::abi::MARK;
use crate::netns::Netns;

/// Holds one route: everything is local.
const TABLE: u32 = 100;
/// Of the rule that sends marked packets to [`TABLE`]; before the main table's
/// (32766), after the local table's (0).
const DELIVER: u32 = 10;
/// Of the rule that drops marked packets for which there was no such route.
const CATCH: u32 = 11;
/// `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// Ports for the proxy's connections in pods' names. A pod's kernel takes its
/// own from 32768 up, so the two do not meet.
pub(super) const PROXY_PORTS: [u16; 2] = [10240, 32767];

#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    #[error("cannot open a netlink socket in {netns}")]
    Open { netns: String, source: io::Error },
    #[error("cannot set {name} in the router")]
    Sysctl { name: &'static str, source: io::Error },
    #[error("cannot {action} in the router")]
    Netlink {
        action: &'static str,
        source: rtnetlink::Error,
    },
}

/// What the watcher saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// A rule or a route of ours may be gone.
    Routing,
    /// This device may be gone, or have lost its program.
    Device(u32),
    /// The kernel could not keep up telling: anything may have changed.
    Unknown,
}

pub(super) struct Routing {
    handle: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Routing {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Routing {
    /// A netlink socket of the router, subscribed to changes.
    pub(super) fn open(router: &Netns) -> Result<Self, RoutingError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Tc,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
        ];
        let (connection, handle, messages) = router
            .enter(|| rtnetlink::new_multicast_connection(&groups))
            .map_err(|source| RoutingError::Open {
                netns: router.path().display().to_string(),
                source,
            })?;
        Ok(Self {
            handle,
            messages,
            connection: tokio::spawn(connection),
        })
    }

    /// Puts in what is missing.
    pub(super) async fn ensure(&self) -> Result<(), RoutingError> {
        let loopback = LinkUnspec::new_with_index(LOOPBACK).up().build();
        let up = self.handle.link().set(loopback).execute().await;
        done("bring up lo", up)?;

        // First the catch, so that at no moment a marked packet is forwarded.
        let mut catch = self
            .handle
            .rule()
            .add()
            .v4()
            .priority(CATCH)
            .fw_mark(MARK)
            .action(RuleAction::Blackhole);
        // A rule that drops names no table.
        catch.message_mut().header.table = 0;
        done("add the rule that drops marked packets", catch.execute().await)?;

        let everything = RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(LOOPBACK)
            .build();
        let added = self.handle.route().add(everything).execute().await;
        done("add the route that delivers locally", added)?;

        let deliver = self
            .handle
            .rule()
            .add()
            .v4()
            .priority(DELIVER)
            .fw_mark(MARK)
            .table_id(TABLE)
            .action(RuleAction::ToTable);
        done("add the rule for marked packets", deliver.execute().await)
    }

    /// Waits for the next change that matters. None once the socket is broken.
    pub(super) async fn changed(&mut self) -> Option<Change> {
        loop {
            let (message, _) = self.messages.next().await?;
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::DelRule(_) | RouteNetlinkMessage::DelRoute(_),
                ) => return Some(Change::Routing),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                    return Some(Change::Device(link.header.index));
                }
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::DelQueueDiscipline(hook)
                    | RouteNetlinkMessage::DelTrafficFilter(hook),
                ) => return Some(Change::Device(hook.header.index.unsigned_abs())),
                NetlinkPayload::Overrun(_) => return Some(Change::Unknown),
                _ => {}
            }
        }
    }
}

/// That it was there already is as good.
fn done(action: &'static str, result: Result<(), rtnetlink::Error>) -> Result<(), RoutingError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => Ok(()),
        Err(source) => Err(RoutingError::Netlink { action, source }),
        Ok(()) => Ok(()),
    }
}

/// Sets what the kernel programs count on. The calling thread stands in the
/// router.
pub(super) fn set_sysctls() -> Result<(), RoutingError> {
    let [first, last] = PROXY_PORTS;
    for (name, value) in [
        ("ip_local_port_range", format!("{first} {last}")),
        // The mark is for the way in only: on what the proxy answers, it would
        // bring the answer back here.
        ("tcp_fwmark_accept", "0".to_owned()),
        ("fwmark_reflect", "0".to_owned()),
    ] {
        // Of the namespace in which this thread stands.
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value)
            .map_err(|source| RoutingError::Sysctl { name, source })?;
    }
    Ok(())
}
