//! The pool's mutual TLS, as the agent serves it: a caller must hold a certificate
//! of the pool's CA whose one URI name is a virtual node of this pool. DNS names
//! and addresses prove nothing here.
//!
//! What always holds: a handshake has [`PATIENCE`], and strangers who hold theirs open
//! keep nobody out ([`Door`](bounds::door)): callers that were here before do not stand
//! among them. A tenant has a share of the connections. Files that change ([`files`])
//! are taken up for new ones. A connection ends with the certificate that it was made
//! with, or when a root is taken away.

mod files;

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use bounds::{
    Acquainted, Bounds, Budget, End, Gate, Guest, Level, Path, Place, Rule, Seldom, Shared, Step, door::Queue,
};
use pool_agent_api::{Peer, PeerId, TenantId};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use super::Caller;
use crate::policy::bounds::Callers;
pub use files::{Credentials, Pem, TlsError, follow};

const PATIENCE: Duration = Duration::from_secs(10);
/// A tenant that is alone may hold this many times the connections it leaves.
const GREED: u32 = 4;
/// Callers that were turned away, in the log, every ten seconds: whoever floods the
/// port does not flood it too.
const TOLD: u32 = 50;
/// After an accept that failed, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait to be served.
const ACCEPTED: usize = 16;

/// Why a caller with a certificate of the pool was turned away.
#[derive(Debug, thiserror::Error)]
enum Stranger {
    #[error("the handshake took too long")]
    Slow,
    #[error("the handshake failed")]
    Handshake(#[source] io::Error),
    #[error("it has no certificate that reads")]
    Certificate,
    #[error("its certificate has {0} URI names, not one")]
    Names(usize),
    #[error("its name: {0}")]
    Name(pool_agent_api::Invalid),
    #[error("{0} is not of trust domain {1}")]
    TrustDomain(PeerId, String),
    #[error("{0} is not a virtual node")]
    Role(PeerId),
    #[error("others came, and it had not said who it is")]
    Displaced,
    #[error("the {level}'s share of connections is used up, called by tenant {tenant}")]
    Share { tenant: TenantId, level: Level },
}

/// Who is at the agent's door, and who is through it. Cheap to clone.
#[derive(Clone)]
pub struct Doorway {
    limits: Callers,
    gate: Gate<IpAddr>,
    connections: Shared<TenantId>,
    acquainted: Arc<Mutex<Acquainted<TenantId, IpAddr>>>,
}

impl Doorway {
    pub fn new(limits: Callers, shown: &Bounds) -> Self {
        let doorway = Self {
            limits,
            gate: Gate::new(limits.handshaking, limits.handshaking),
            connections: Shared::new(Budget::new(limits.per_host, 0)),
            acquainted: Arc::default(),
        };
        shown.show("caller_handshakes", doorway.gate.clone());
        shown.show("callers", doorway.connections.clone());
        doorway
    }

    fn acquainted(&self) -> MutexGuard<'_, Acquainted<TenantId, IpAddr>> {
        // Nothing that can panic runs under it.
        self.acquainted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn come(&self, address: IpAddr) -> Guest<IpAddr> {
        let queue = if self.acquainted().knows(&address) {
            Queue::Known
        } else {
            Queue::Stranger
        };
        self.gate.come(queue, address)
    }

    fn enter(&self, tenant: &TenantId) -> Result<Place<TenantId>, Stranger> {
        let step = Step {
            key: tenant.clone(),
            level: Level::Tenant,
            rule: Rule {
                promised: 0,
                limit: self.limits.per_tenant,
                greed: GREED,
            },
        };
        let path = Path {
            trunk: Arc::from([step]),
            leaf: None,
        };
        self.connections.take(path).map_err(|level| Stranger::Share {
            tenant: tenant.clone(),
            level,
        })
    }

    async fn admit(
        &self,
        acceptor: TlsAcceptor,
        stream: TcpStream,
        from: IpAddr,
        trust_domain: &str,
        revoked: CancellationToken,
    ) -> Result<Connection, Stranger> {
        let guest = self.come(from);
        let (stream, tenant, left) = tokio::select! {
            shaken = shake_hands(acceptor, stream, trust_domain) => shaken?,
            () = guest.displaced() => return Err(Stranger::Displaced),
        };
        let place = self.enter(&tenant)?;
        self.acquainted().meet(tenant.clone(), from);
        Ok(Connection {
            stream,
            tenant,
            end: End::new(left, revoked),
            _place: place,
        })
    }
}

/// Roots that callers are verified by, and what ends the connections that were.
struct Roots {
    pem: Vec<u8>,
    revoked: CancellationToken,
}

impl Roots {
    fn new(credentials: &Credentials) -> Self {
        Self {
            pem: credentials.pem.ca.clone(),
            revoked: CancellationToken::new(),
        }
    }

    /// More roots end nothing.
    fn follow(&mut self, credentials: &Credentials) {
        let of = |pem: &[u8]| -> Vec<CertificateDer<'static>> {
            CertificateDer::pem_slice_iter(pem)
                .filter_map(Result::ok)
                .collect()
        };
        let now = of(&credentials.pem.ca);
        let removed = of(&self.pem).iter().any(|root| !now.contains(root));
        self.pem.clone_from(&credentials.pem.ca);
        if removed {
            tracing::info!("a root of the pool is gone: all callers have to come again");
            std::mem::take(&mut self.revoked).cancel();
        }
    }
}

/// Accepts callers until the agent ends; each comes with the tenant it is.
pub fn accept(
    listener: TcpListener,
    trust_domain: String,
    mut credentials: watch::Receiver<Arc<Credentials>>,
    doorway: Doorway,
) -> ReceiverStream<io::Result<Connection>> {
    let (accepted, stream) = mpsc::channel(ACCEPTED);
    tokio::spawn(async move {
        let (not_accepted, turned_away) = (Seldom::default(), Arc::new(Seldom::allowing(TOLD)));
        let mut roots = Roots::new(&credentials.borrow_and_update());
        loop {
            let next = tokio::select! {
                next = listener.accept() => next,
                Ok(()) = credentials.changed() => {
                    roots.follow(&credentials.borrow_and_update());
                    continue;
                }
            };
            let (stream, from) = match next {
                Ok(accepted) => accepted,
                Err(error) => {
                    if let Some(left_out) = not_accepted.due(Instant::now()) {
                        tracing::warn!(error = %error, left_out, "a connection was not accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let current = credentials.borrow_and_update().clone();
            roots.follow(&current);
            let (acceptor, revoked) = (TlsAcceptor::from(current.server.clone()), roots.revoked.clone());
            let (accepted, trust_domain) = (accepted.clone(), trust_domain.clone());
            let (doorway, turned_away) = (doorway.clone(), turned_away.clone());
            tokio::spawn(async move {
                let from_ip = from.ip().to_canonical();
                match doorway
                    .admit(acceptor, stream, from_ip, &trust_domain, revoked)
                    .await
                {
                    Ok(connection) => {
                        if accepted.send(Ok(connection)).await.is_err() {
                            tracing::debug!("a caller came as the agent ended");
                        }
                    }
                    Err(stranger) => {
                        let Some(left_out) = turned_away.due(Instant::now()) else {
                            return;
                        };
                        let cause = std::error::Error::source(&stranger).map(ToString::to_string);
                        tracing::warn!(from = %from, error = %stranger, cause, left_out, "a caller was turned away");
                    }
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

async fn shake_hands(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    trust_domain: &str,
) -> Result<(TlsStream<TcpStream>, TenantId, Duration), Stranger> {
    stream.set_nodelay(true).map_err(Stranger::Handshake)?;
    let stream = tokio::time::timeout(PATIENCE, acceptor.accept(stream))
        .await
        .map_err(|_| Stranger::Slow)?
        .map_err(Stranger::Handshake)?;
    let leaf = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(Stranger::Certificate)?;
    let tenant = tenant_of(leaf, trust_domain)?;
    let left = time_left(leaf)?;
    Ok((stream, tenant, left))
}

/// How long a certificate is good for yet.
fn time_left(certificate: &CertificateDer<'_>) -> Result<Duration, Stranger> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate)
        .map_err(|_| Stranger::Certificate)?;
    let ends = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(ends);
    Ok(ends.duration_since(SystemTime::now()).unwrap_or_default())
}

/// The tenant whose virtual node a certificate names.
fn tenant_of(certificate: &CertificateDer<'_>, trust_domain: &str) -> Result<TenantId, Stranger> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate)
        .map_err(|_| Stranger::Certificate)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| Stranger::Certificate)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|san| &san.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else {
        return Err(Stranger::Names(uris.len()));
    };
    let peer: PeerId = uri.parse().map_err(Stranger::Name)?;
    if peer.trust_domain != trust_domain {
        return Err(Stranger::TrustDomain(peer, trust_domain.to_owned()));
    }
    match peer.peer {
        Peer::VirtualNode(tenant) => Ok(tenant),
        Peer::Host(_) | Peer::UsageCollector => Err(Stranger::Role(peer)),
    }
}

/// A caller's connection.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    tenant: TenantId,
    end: End,
    _place: Place<TenantId>,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller(self.tenant.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.end.has_come(cx) {
            return Poll::Ready(Err(End::error()));
        }
        Pin::new(&mut this.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
