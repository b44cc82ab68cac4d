//! The sockets of the proxy that a tenant router's connections are steered to.
//!
//! They are transparent and bound to loopback addresses of the router, which no
//! packet from a device can name: a connection arrives only if the socket
//! lookup program chose the listener, never by its bound address.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections the kernel completes before the proxy accepts them, for each
/// listener; a burst beyond it waits for the client's SYN retry.
const BACKLOG: i32 = 4096;

/// One of each for a tenant's router on this host. All are nonblocking.
#[derive(Debug)]
pub struct Listeners {
    /// TCP of local pods. `peer_addr` is the pod's; an unmeshed pod's
    /// connection arrives here only if it goes to a Service's address.
    pub outbound: TcpListener,
    /// TCP to local enrolled pods on any port but 15008: plaintext from
    /// outside the mesh.
    pub inbound: TcpListener,
    /// TCP to local enrolled pods on port 15008.
    pub hbone: TcpListener,
    /// Datagrams of local pods to port 53 of the cluster DNS address, to be
    /// answered from that address (the socket is transparent).
    pub dns_udp: UdpSocket,
    /// The same over TCP.
    pub dns_tcp: TcpListener,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot open the {name} listener")]
pub struct OpenListenerError {
    name: &'static str,
    source: io::Error,
}

impl Listeners {
    /// Opens all of them in the namespace the calling thread stands in. Ports
    /// are the kernel's choice, so an old and a new process can hold theirs at
    /// the same time.
    pub(super) fn open() -> Result<Self, OpenListenerError> {
        let open = |name: &'static str, kind: Type, protocol: Protocol| {
            transparent(kind, protocol).map_err(|source| OpenListenerError { name, source })
        };
        let tcp = |name| open(name, Type::STREAM, Protocol::TCP).map(TcpListener::from);
        Ok(Self {
            outbound: tcp("outbound")?,
            inbound: tcp("inbound")?,
            hbone: tcp("HBONE")?,
            dns_udp: open("DNS over UDP", Type::DGRAM, Protocol::UDP)?.into(),
            dns_tcp: tcp("DNS over TCP")?,
        })
    }
}

fn transparent(kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind.nonblocking().cloexec(), Some(protocol))?;
    // Before bind: the kernel looks at it when the address is taken, and
    // accepted sockets inherit it, so that they may answer from any address.
    setsockopt(&socket, sockopt::IpTransparent, &true)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into())?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}
