//! Connections of the pool's hosts: accepted, shaken hands with, and known by the
//! name in their certificate. Handed to the gRPC server by `mesh`.
//!
//! What always holds: no byte of a connection reaches the server before its
//! certificate is verified; a peer that says nothing is hung up on.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use pool_agent_api::HostName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::metrics::Metrics;
use crate::pool_tls::{NotExpected, PoolTls};

/// Open connections: a pool has fewer hosts, and each needs one or two.
const MAX_CONNECTIONS: usize = 2048;

/// Handshakes at a time. A stranger who holds them all open keeps hosts out for as
/// long as a handshake may take.
const MAX_HANDSHAKES: usize = 256;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// After an accept that failed, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The host at the other end; an extension of each of its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerHost(pub HostName);

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("no TLS handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Silent,
    #[error("TLS handshake: {0}")]
    Handshake(io::Error),
    #[error(transparent)]
    Peer(NotExpected),
}

/// A host's connection.
pub struct HostStream {
    tls: TlsStream<TcpStream>,
    host: HostName,
    _connection: OwnedSemaphorePermit,
}

/// Accepts for as long as the answer is polled and not dropped.
pub fn accept(
    listener: TcpListener,
    tls: Arc<PoolTls>,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = io::Result<HostStream>> {
    // The server takes connections at once; the bound is what it may lag behind.
    let (accepted, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        let open = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let shaking = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        loop {
            // Neither semaphore is ever closed.
            let (Ok(connection), Ok(handshake)) = (
                Arc::clone(&open).acquire_owned().await,
                Arc::clone(&shaking).acquire_owned().await,
            ) else {
                return;
            };
            let next = tokio::select! {
                next = listener.accept() => next,
                () = accepted.closed() => return,
            };
            let (tcp, from) = match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "mesh connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, metrics, accepted) = (Arc::clone(&tls), Arc::clone(&metrics), accepted.clone());
            tokio::spawn(async move {
                match shake_hands(tcp, &tls).await {
                    Ok((tls, host)) => {
                        drop(handshake);
                        let stream = HostStream {
                            tls,
                            host,
                            _connection: connection,
                        };
                        // The server is gone: so is the connection.
                        accepted.send(Ok(stream)).await.ok();
                    }
                    Err(reason) => refuse(from, &reason, &metrics),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

fn refuse(from: SocketAddr, reason: &Refused, metrics: &Metrics) {
    tracing::warn!(%from, %reason, "mesh connection refused");
    metrics.connection_refused();
}

async fn shake_hands(tcp: TcpStream, tls: &PoolTls) -> Result<(TlsStream<TcpStream>, HostName), Refused> {
    // Small messages are answered by small messages.
    tcp.set_nodelay(true).map_err(Refused::Handshake)?;
    let acceptor = TlsAcceptor::from(tls.server());
    let stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp))
        .await
        .map_err(|_| Refused::Silent)?
        .map_err(Refused::Handshake)?;
    let host = tls
        .host(stream.get_ref().1.peer_certificates())
        .map_err(Refused::Peer)?;
    Ok((stream, host))
}

impl Connected for HostStream {
    type ConnectInfo = PeerHost;

    fn connect_info(&self) -> PeerHost {
        PeerHost(self.host.clone())
    }
}

impl AsyncRead for HostStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for HostStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}
