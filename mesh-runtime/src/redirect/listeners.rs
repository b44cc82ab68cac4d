//! The sockets of the proxy that a tenant router's connections are steered to.
//!
//! They are transparent. Those of TCP are bound to loopback addresses of the
//! router, which no packet from a device can name: a connection arrives only if
//! the socket look-up chose the listener, never by its bound address.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections the kernel completes before the proxy accepts them, for each
/// listener; a burst beyond it waits for the client's SYN retry.
const BACKLOG: i32 = 4096;

const DNS_PORT: u16 = 53;

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
    /// Datagrams of local pods to port 53 of the cluster DNS address. What is
    /// sent on it comes from that address and port.
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
    /// Opens all of them in the namespace the calling thread stands in. An old
    /// and a new process can hold theirs at the same time.
    pub(super) fn open(dns: Ipv4Addr) -> Result<Self, OpenListenerError> {
        let tcp = |name| match listen() {
            Ok(socket) => Ok(TcpListener::from(socket)),
            Err(source) => Err(OpenListenerError { name, source }),
        };
        Ok(Self {
            outbound: tcp("outbound")?,
            inbound: tcp("inbound")?,
            hbone: tcp("HBONE")?,
            dns_udp: datagrams(SocketAddrV4::new(dns, DNS_PORT))
                .map_err(|source| OpenListenerError {
                    name: "DNS over UDP",
                    source,
                })?
                .into(),
            dns_tcp: tcp("DNS over TCP")?,
        })
    }
}

/// On a loopback port of the kernel's choice.
fn listen() -> io::Result<Socket> {
    let socket = transparent(Type::STREAM, Protocol::TCP)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// On the address that is asked, which no device here has: so answers come from
/// it. Two processes may have it; the kernel's map says whose turn it is.
fn datagrams(address: SocketAddrV4) -> io::Result<Socket> {
    let socket = transparent(Type::DGRAM, Protocol::UDP)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Transparent before it is bound: the kernel looks at it when the address is
/// taken, and accepted sockets inherit it, so that they answer from whatever
/// address was called.
fn transparent(kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind.nonblocking().cloexec(), Some(protocol))?;
    setsockopt(&socket, sockopt::IpTransparent, &true)?;
    Ok(socket)
}
