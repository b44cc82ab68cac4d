//! The pool's mutual TLS, as the agent serves it: a caller must hold a certificate
//! of the pool's CA whose one URI name is a virtual node of this pool. DNS names
//! and addresses prove nothing here.
//!
//! What always holds: a handshake has [`PATIENCE`], and at most [`HANDSHAKES`] are
//! under way; files that change ([`files`]) are taken up for new connections.

mod files;

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use pool_agent_api::{Peer, PeerId, TenantId};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use super::Caller;
pub use files::{Credentials, Pem, TlsError, follow};

const PATIENCE: Duration = Duration::from_secs(10);
/// Callers are a few virtual nodes; strangers wait for each other.
const HANDSHAKES: usize = 64;
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
}

/// Accepts callers until the agent ends; each comes with the tenant it is.
pub fn accept(
    listener: TcpListener,
    trust_domain: String,
    credentials: watch::Receiver<Arc<Credentials>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (accepted, stream) = mpsc::channel(ACCEPTED);
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else {
                return;
            };
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(error = %error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let acceptor = TlsAcceptor::from(credentials.borrow().server.clone());
            let (accepted, trust_domain) = (accepted.clone(), trust_domain.clone());
            tokio::spawn(async move {
                match shake_hands(acceptor, stream, &trust_domain).await {
                    Ok(connection) => {
                        if accepted.send(Ok(connection)).await.is_err() {
                            tracing::debug!("a caller came as the agent ended");
                        }
                    }
                    Err(stranger) => {
                        let cause = std::error::Error::source(&stranger).map(ToString::to_string);
                        tracing::warn!(from = %from, error = %stranger, cause, "a caller was turned away");
                    }
                }
                drop(permit);
            });
        }
    });
    ReceiverStream::new(stream)
}

async fn shake_hands(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    trust_domain: &str,
) -> Result<Connection, Stranger> {
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
    Ok(Connection { stream, tenant })
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
        Peer::Host(_) => Err(Stranger::Role(peer)),
    }
}

/// A caller's connection.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    tenant: TenantId,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller(self.tenant.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
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
