//! Connections of the pool's hosts: accepted, shaken hands with, and known by the
//! name in their certificate. Handed to the gRPC server by `mesh`.
//!
//! What always holds: no byte of a connection reaches the server before its
//! certificate is verified; a peer that says nothing is hung up on, at once when others
//! need its place; hosts that were here before do not stand among strangers, and none
//! has more than its own few connections; a connection ends with the certificate that it
//! was made with.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use bounds::{
    Acquainted, Bounds, Budget, End, Gate, Level, Path, Place, Rule, Seldom, Shared, Step,
    door::{Places, Queue},
};

use futures::Stream;
use pool_agent_api::HostName;
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use x509_parser::prelude::{FromDer, X509Certificate};

use super::metrics::Metrics;
use crate::{
    incoming::{Arrived, Incoming},
    pool_tls::{NotExpected, PoolTls},
};

/// Open connections: a pool has fewer hosts, and each needs one or two.
const MAX_CONNECTIONS: u32 = 2048;
/// Of one host: those of an agent that ended may not be gone yet.
const HOSTS_CONNECTIONS: u32 = 8;

/// Handshakes at a time, of strangers and again of addresses that a host came from
/// before. Beyond, the oldest of the address with the most is hung up on.
const HANDSHAKES: Places = Places { all: 256, of_one: 32 };

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that were refused, in the log, every ten seconds.
const TOLD: u32 = 50;

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
    #[error("others came, and it had not said who it is")]
    Displaced,
    #[error("the {level}'s share of connections is used up, called by {host}")]
    Share { host: HostName, level: Level },
}

/// A host's connection.
pub struct HostStream {
    tls: TlsStream<TcpStream>,
    host: HostName,
    end: End,
    _place: Place<HostName>,
}

/// Who is at the door, and who is through it. Cheap to clone.
#[derive(Clone)]
struct Doorway {
    gate: Gate<IpAddr>,
    connections: Shared<HostName>,
    acquainted: Arc<Mutex<Acquainted<HostName, IpAddr>>>,
}

impl Doorway {
    fn new(shown: &Bounds) -> Self {
        let doorway = Self {
            gate: Gate::new(HANDSHAKES, HANDSHAKES),
            connections: Shared::new(Budget::new(MAX_CONNECTIONS, 0)),
            acquainted: Arc::default(),
        };
        shown.show("handshakes", doorway.gate.clone());
        shown.show("connections", doorway.connections.clone());
        doorway
    }

    fn acquainted(&self) -> MutexGuard<'_, Acquainted<HostName, IpAddr>> {
        // Nothing that can panic runs under it.
        self.acquainted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn admit(&self, tcp: TcpStream, from: IpAddr, tls: &PoolTls) -> Result<HostStream, Refused> {
        let queue = if self.acquainted().knows(&from) {
            Queue::Known
        } else {
            Queue::Stranger
        };
        let guest = self.gate.come(queue, from);
        let (tls, host, left) = tokio::select! {
            shaken = shake_hands(tcp, tls) => shaken?,
            () = guest.displaced() => return Err(Refused::Displaced),
        };
        let step = Step {
            key: host.clone(),
            level: Level::Peer,
            rule: Rule {
                limit: HOSTS_CONNECTIONS,
                ..Rule::FAIR
            },
        };
        let path = Path {
            trunk: Arc::from([step]),
            leaf: None,
        };
        let place = self.connections.take(path).map_err(|level| Refused::Share {
            host: host.clone(),
            level,
        })?;
        self.acquainted().meet(host.clone(), from);
        Ok(HostStream {
            tls,
            host,
            end: End::new(left, CancellationToken::new()),
            _place: place,
        })
    }
}

/// Accepts for as long as the answer is polled and not dropped.
pub fn accept(
    mut incoming: Incoming,
    tls: Arc<PoolTls>,
    metrics: Arc<Metrics>,
    shown: &Bounds,
) -> impl Stream<Item = io::Result<HostStream>> + use<> {
    let doorway = Doorway::new(shown);
    // The server takes connections at once; the bound is what it may lag behind.
    let (accepted, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        let (not_accepted, refused) = (Seldom::default(), Arc::new(Seldom::allowing(TOLD)));
        loop {
            let next = tokio::select! {
                next = incoming.accept() => next,
                () = accepted.closed() => return,
            };
            let Arrived { socket, from } = match next {
                Ok(next) => next,
                Err(error) => {
                    if let Some(left_out) = not_accepted.due(Instant::now()) {
                        tracing::warn!(%error, left_out, "mesh connection not accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, metrics, accepted) = (Arc::clone(&tls), Arc::clone(&metrics), accepted.clone());
            let (doorway, refused) = (doorway.clone(), Arc::clone(&refused));
            tokio::spawn(async move {
                match doorway.admit(socket, from.ip(), &tls).await {
                    // The server is gone: so is the connection.
                    Ok(stream) => {
                        accepted.send(Ok(stream)).await.ok();
                    }
                    Err(reason) => refuse(from, &reason, &metrics, &refused),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

fn refuse(from: SocketAddr, reason: &Refused, metrics: &Metrics, told: &Seldom) {
    if let Some(left_out) = told.due(Instant::now()) {
        tracing::warn!(%from, %reason, left_out, "mesh connection refused");
    }
    metrics.connection_refused();
}

async fn shake_hands(
    tcp: TcpStream,
    tls: &PoolTls,
) -> Result<(TlsStream<TcpStream>, HostName, Duration), Refused> {
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
    let left = time_left(stream.get_ref().1.peer_certificates());
    Ok((stream, host, left))
}

/// How long the certificate is good for yet that a verified peer has shown; no time if
/// that does not read.
fn time_left(shown: Option<&[CertificateDer<'_>]>) -> Duration {
    let ends = shown.and_then(<[_]>::first).and_then(|leaf| {
        let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
        u64::try_from(parsed.validity().not_after.timestamp()).ok()
    });
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(ends.unwrap_or(0));
    ends.duration_since(SystemTime::now()).unwrap_or_default()
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
        if self.end.has_come(cx) {
            return Poll::Ready(Err(End::error()));
        }
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
