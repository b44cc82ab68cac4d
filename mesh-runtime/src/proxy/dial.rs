//! TCP connections that the proxy makes itself, in the tenant router's
//! namespace and in the name of whom they are for: a server sees its client's
//! own address, not the host's.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::netns::Netns;

/// A SYN is repeated after 1 and 3 s; who has not answered by then is given up,
/// so that another endpoint can be tried while the client still waits.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An application that vanished without a word is found out after about
/// `KEEPALIVE_IDLE` + 9 × `KEEPALIVE_INTERVAL`.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    router: Netns,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("cannot make a socket")]
    Socket(#[source] io::Error),
    #[error("cannot connect to {to} as {from}")]
    Connect {
        from: IpAddr,
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{to} does not answer")]
    Timeout { to: SocketAddr },
}

impl DialError {
    /// Whether it says something of who was dialled.
    pub(crate) fn is_the_peers(&self) -> bool {
        match self {
            Self::Socket(_) => false,
            Self::Connect { .. } | Self::Timeout { .. } => true,
        }
    }
}

impl Dialer {
    pub(crate) fn new(router: Netns) -> Self {
        Self { router }
    }

    /// Connects with `from` as the source address, whether or not it is one of
    /// the router's: answers to it are led back to the socket.
    pub(crate) async fn connect(&self, from: IpAddr, to: SocketAddr) -> Result<TcpStream, DialError> {
        let socket = self.socket(from).map_err(DialError::Socket)?;
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to)).await;
        let stream = connected
            .map_err(|_| DialError::Timeout { to })?
            .map_err(|source| DialError::Connect { from, to, source })?;
        Ok(stream)
    }

    fn socket(&self, from: IpAddr) -> io::Result<TcpSocket> {
        let socket = self.router.enter(|| {
            let kind = Type::STREAM.nonblocking().cloexec();
            Socket::new(
                Domain::for_address(SocketAddr::new(from, 0)),
                kind,
                Some(Protocol::TCP),
            )
        })?;
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
        // The port is chosen at connect, where it only has to be unique towards
        // that one destination.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SockAddr::from(SocketAddr::new(from, 0)))?;
        prepare(&socket)?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }
}

/// Options of every TCP socket of the data path, accepted or dialled.
pub(crate) fn prepare<'a>(socket: impl Into<socket2::SockRef<'a>>) -> io::Result<()> {
    fn set(socket: &socket2::SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_INTERVAL),
        )
    }
    set(&socket.into())
}
