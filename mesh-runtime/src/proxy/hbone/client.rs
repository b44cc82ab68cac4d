//! One tunnel to a workload on another host: dialled, verified, and driven by
//! a task of its own until nobody uses it any more.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use h2::client::SendRequest;
use mesh_api::Identity;
use rustls::pki_types::ServerName;
use tokio::{sync::Notify, time::timeout};
use tokio_rustls::TlsConnector;

use super::{
    HANDSHAKE_TIMEOUT, MAX_FRAME, MAX_HEADERS, SEND_BUFFER, STREAM_WINDOW, TLS_BUFFER, TUNNEL_WINDOW,
    TunnelError, keepalive, peer_identity, read_ahead::ReadAhead,
};
use crate::{
    identity::Certificate,
    limits,
    proxy::dial::Dialer,
    telemetry::{Direction, Metrics},
};

/// Streams we put in one tunnel; the peer may allow fewer.
const MAX_STREAMS: usize = 100;

/// What makes two connections able to share a tunnel. The source, with its
/// identity and address, is the pool's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) to: SocketAddr,
    pub(crate) expected: Identity,
}

/// As whom a tunnel is opened.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) address: IpAddr,
    pub(crate) certificate: Arc<Certificate>,
}

/// An open tunnel. Its connection lives as long as it has streams or somebody
/// holds it.
pub(crate) struct Tunnel {
    requests: SendRequest<Bytes>,
    /// When the certificate that it was opened with was made.
    issued: SystemTime,
    streams: AtomicUsize,
    /// It takes no more streams: it broke, or the peer said so.
    spent: AtomicBool,
    /// Rung when the last stream ends, and when it is spent. The pool listens.
    idle: Notify,
    /// Among the pod's connections. None once another tunnel has it.
    place: Mutex<Option<limits::Place>>,
}

/// Room for one stream in a tunnel.
pub(crate) struct Place {
    tunnel: Arc<Tunnel>,
}

impl Tunnel {
    /// Dials `key` and verifies who is there.
    pub(crate) async fn open(
        dialer: &Dialer,
        key: &Key,
        source: &Source,
        metrics: &Metrics,
        place: limits::Place,
    ) -> Result<Arc<Self>, TunnelError> {
        let tcp = dialer.connect(source.address, key.to).await?;
        let connector = TlsConnector::from(source.certificate.tls.client.clone());
        // Never sent, never looked at: who is there is in the certificate.
        let name = ServerName::IpAddress(key.to.ip().into());
        let mut tls = timeout(HANDSHAKE_TIMEOUT, connector.connect(name, ReadAhead::from(tcp)))
            .await
            .map_err(|_| TunnelError::TlsTimeout)?
            .map_err(TunnelError::Tls)?;
        // Before a byte of anybody's traffic is sent.
        let found = peer_identity(tls.get_ref().1)?;
        if found != key.expected {
            return Err(TunnelError::WrongPeer {
                found,
                expected: key.expected.clone(),
            });
        }
        tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
        let handshake = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(TUNNEL_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADERS)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake(tls);
        let (requests, mut connection) = timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .map_err(|_| TunnelError::Http2Timeout)?
            .map_err(TunnelError::Http2)?;
        let tunnel = Arc::new(Self {
            requests,
            issued: source.certificate.not_before,
            streams: AtomicUsize::new(0),
            spent: AtomicBool::new(false),
            idle: Notify::new(),
            place: Mutex::new(Some(place)),
        });
        let open = metrics.tunnel(Direction::Outbound);
        let to = key.to;
        // The connection ends when nobody can make a request any more, so its
        // own task must not be one who can.
        let weak = Arc::downgrade(&tunnel);
        tokio::spawn(async move {
            let pings = connection.ping_pong();
            tokio::select! {
                closed = connection => if let Err(error) = closed {
                    tracing::debug!(%to, %error, "tunnel broke");
                },
                () = keepalive(pings) => tracing::info!(%to, "tunnel given up: its peer does not answer"),
            }
            drop(open);
            if let Some(tunnel) = weak.upgrade() {
                tunnel.spend();
            }
        });
        Ok(tunnel)
    }

    /// Room for another stream, unless the tunnel is full or spent.
    pub(crate) fn place(self: &Arc<Self>) -> Option<Place> {
        if self.spent.load(Ordering::Acquire) {
            return None;
        }
        let limit = MAX_STREAMS.min(self.requests.current_max_send_streams());
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
                (n < limit).then_some(n + 1)
            })
            .ok()
            .map(|_| Place { tunnel: self.clone() })
    }

    /// Whether it was opened before `certificate` was made.
    pub(crate) fn is_older_than(&self, certificate: &Certificate) -> bool {
        self.issued < certificate.not_before
    }

    pub(crate) fn streams(&self) -> usize {
        self.streams.load(Ordering::Acquire)
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Acquire)
    }

    pub(crate) fn spend(&self) {
        self.spent.store(true, Ordering::Release);
        self.idle.notify_one();
    }

    /// Ends it and hands its place to another.
    pub(crate) fn hand_over(&self) -> Option<limits::Place> {
        self.spend();
        self.place.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits for the last stream to end, or for the tunnel to be spent. For one
    /// listener.
    pub(crate) async fn idle(&self) {
        self.idle.notified().await;
    }
}

impl Place {
    /// A handle to send the one request with.
    pub(crate) async fn requests(&self) -> Result<SendRequest<Bytes>, h2::Error> {
        self.tunnel.requests.clone().ready().await
    }

    pub(crate) fn tunnel(&self) -> &Arc<Tunnel> {
        &self.tunnel
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.tunnel.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.tunnel.idle.notify_one();
        }
    }
}
