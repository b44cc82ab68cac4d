//! HBONE: TCP connections as CONNECT streams of HTTP/2 over mutual TLS, between
//! the hosts of two pods. The wire is Istio's.
//!
//! [`client`] makes tunnels, [`pool`] shares them among a pod's connections,
//! [`server`] takes those of others, [`request`] reads and writes what one asks
//! the other.

pub(crate) mod client;
pub(crate) mod pool;
mod read_ahead;
pub(crate) mod request;
pub(crate) mod server;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use h2::{Ping, PingPong};
use mesh_api::Identity;
use x509_parser::prelude::{FromDer, X509Certificate};

pub(crate) use pool::Pool;

use super::dial::DialError;
use crate::{limits::UsedUp, telemetry::Flag};

/// What a receiver buffers at most for one stream whose application does not
/// read.
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;
/// The same for a whole tunnel. Many times a stream's, so that a few stalled
/// applications do not stall the others.
pub(crate) const TUNNEL_WINDOW: u32 = 16 << 20;
/// Larger frames save headers; they cost the receiver a buffer each.
pub(crate) const MAX_FRAME: u32 = 1 << 20;
/// What is encrypted at most before it is written: more than a piece that is sent
/// at once, with its frame's header, or rustls would cut it in two writes.
const TLS_BUFFER: usize = 256 << 10;
/// What a sender buffers for one stream beyond what the window takes.
pub(crate) const SEND_BUFFER: usize = 256 << 10;
/// Streams a peer may have open in one tunnel to us.
pub(crate) const MAX_SERVER_STREAMS: u32 = 200;
pub(crate) const MAX_HEADERS: u32 = 16 << 10;

/// TCP connect apart, a peer has this long to finish TLS, and as long again for
/// HTTP/2. A byte at a time does not extend it.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A tunnel is probed this often, and given up when a probe is not answered.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no tunnel, or no longer. One failure is told to all who waited
/// for the same tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    #[error("cannot dial")]
    Dial(#[from] DialError),
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    #[error("TLS took too long")]
    TlsTimeout,
    #[error("the far end is {found} where {expected} is needed")]
    WrongPeer { found: Identity, expected: Identity },
    #[error("the far end's certificate cannot be read")]
    Certificate(#[source] rustls::Error),
    #[error("HTTP/2 failed")]
    Http2(#[source] h2::Error),
    #[error("HTTP/2 took too long")]
    Http2Timeout,
    #[error("{0}")]
    Share(#[from] UsedUp),
    #[error("the pod is going")]
    Closed,
    /// A defect in the dialling task.
    #[error("the attempt died")]
    Died,
}

impl TunnelError {
    pub(crate) fn flag(&self) -> Flag {
        match self {
            Self::Dial(_) | Self::Share(_) | Self::Closed | Self::Died => Flag::Connect,
            Self::Tls(_) | Self::TlsTimeout | Self::WrongPeer { .. } | Self::Certificate(_) => Flag::Tls,
            Self::Http2(_) | Self::Http2Timeout => Flag::Http2Handshake,
        }
    }

    /// Whether it says something of the far end.
    pub(crate) fn is_the_peers(&self) -> bool {
        match self {
            Self::Dial(error) => error.is_the_peers(),
            Self::Share(_) | Self::Closed | Self::Died => false,
            Self::Tls(_)
            | Self::TlsTimeout
            | Self::WrongPeer { .. }
            | Self::Certificate(_)
            | Self::Http2(_)
            | Self::Http2Timeout => true,
        }
    }
}

/// Returns when the peer no longer answers. TCP's own keepalive would not see a
/// process that hangs.
async fn keepalive(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        // It is there on a connection's first call, and there is no second.
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // A broken connection is told to its driver better than here.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// The identity at the far end of a finished handshake.
fn peer_identity(session: &rustls::CommonState) -> Result<Identity, TunnelError> {
    match session.peer_certificates().and_then(<[_]>::first) {
        Some(leaf) => crate::identity::verify::peer_identity(leaf).map_err(TunnelError::Certificate),
        None => Err(TunnelError::Certificate(rustls::Error::NoCertificatesPresented)),
    }
}

/// How long the certificate at the far end is good for yet; no time if that does not
/// read.
fn time_left(session: &rustls::CommonState) -> Duration {
    let leaf = session.peer_certificates().and_then(<[_]>::first);
    let ends = leaf.and_then(|leaf| {
        let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
        u64::try_from(parsed.validity().not_after.timestamp()).ok()
    });
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(ends.unwrap_or(0));
    ends.duration_since(SystemTime::now()).unwrap_or_default()
}

/// Shared by those who wait for one tunnel.
pub(crate) type SharedTunnelError = Arc<TunnelError>;
