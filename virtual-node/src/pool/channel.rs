//! A channel to one host: TCP and TLS by our own connector, because a host is
//! known by the URI name in its certificate, which tonic does not compare.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use pool_agent_api::HostName;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

use crate::pool_tls::{LoadError, PoolTls};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How soon a silent peer is noticed: interval, then timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("the pool credentials cannot be used")]
    Credentials(#[from] LoadError),
    #[error("cannot connect to {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("TLS with {address} failed")]
    Handshake {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// Connects at the first call, and again when the connection broke.
pub(crate) fn channel(host: &HostName, address: SocketAddr, tls: Arc<PoolTls>) -> Channel {
    let name = host.clone();
    // The URI only carries the authority of the requests; the connector knows where to go.
    Endpoint::from_static("http://pool-agent")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1 << 20)
        .connect_with_connector_lazy(tower::service_fn(move |_| {
            let (name, tls) = (name.clone(), tls.clone());
            async move { connect(address, &name, &tls).await.map(TokioIo::new) }
        }))
}

async fn connect(
    address: SocketAddr,
    name: &HostName,
    tls: &PoolTls,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let config = tls.client(name)?;
    let unconnected = |source| ConnectError::Connect { address, source };
    let tcp = TcpStream::connect(address).await.map_err(unconnected)?;
    tcp.set_nodelay(true).map_err(unconnected)?;
    TlsConnector::from(Arc::new(config))
        .connect(ServerName::IpAddress(address.ip().into()), tcp)
        .await
        .map_err(|source| ConnectError::Handshake { address, source })
}
