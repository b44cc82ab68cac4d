//! Connections as they come in: from a listener of one's own, or handed over by
//! whoever listens for many (`fleet`).

use std::{io, net::SocketAddr};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// A connection, and where it comes from: that is not always its own other end, since
/// another replica may have handed it on.
#[derive(Debug)]
pub struct Arrived {
    pub socket: TcpStream,
    pub from: SocketAddr,
}

#[derive(Debug)]
pub enum Incoming {
    Listener(TcpListener),
    Handed(mpsc::Receiver<Arrived>),
}

impl Incoming {
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self::Listener)
    }

    /// The next one. Cancel-safe. What is handed over may end; then nothing comes any
    /// more, and this waits for ever.
    pub async fn accept(&mut self) -> io::Result<Arrived> {
        match self {
            Self::Listener(listener) => {
                let (socket, from) = listener.accept().await?;
                Ok(Arrived {
                    socket,
                    from: SocketAddr::new(from.ip().to_canonical(), from.port()),
                })
            }
            Self::Handed(arrived) => match arrived.recv().await {
                Some(arrived) => Ok(arrived),
                None => std::future::pending().await,
            },
        }
    }

    /// Where it listens; fails for what is handed over.
    pub fn address(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Listener(listener) => listener.local_addr(),
            Self::Handed(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
