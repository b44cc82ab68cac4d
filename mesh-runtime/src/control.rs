//! The connection to a tenant's mesh control plane (its virtual node), over the
//! pool's own mutual TLS. `identity` asks it for certificates, `xds` for state.
//!
//! The far end must hold a certificate of the pool's CA whose only URI name is
//! that tenant's virtual node: one tenant's control plane can't speak for
//! another. Names and addresses prove nothing here.

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use pool_agent_api::{Peer, PeerId, Tenant};
use rustls::{
    ClientConfig,
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName,
        pem::{self, PemObject},
    },
};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::identity::verify::{Expected, InvalidRoots, Verifier};

/// A control plane that does not answer is given up after this long; the next
/// attempt begins anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent connection is probed this often, and closed when a probe goes
/// unanswered for `PING_TIMEOUT`.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The host's own credentials in the pool.
#[derive(Debug)]
pub struct PoolTls {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    trust_domain: String,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidPoolTls {
    #[error("cannot read the host's certificate")]
    Certificate(#[source] pem::Error),
    #[error("the host's certificate file holds no certificate")]
    NoCertificate,
    #[error("cannot read the host's key")]
    Key(#[source] pem::Error),
    #[error("cannot read the pool's CA")]
    Ca(#[source] pem::Error),
}

impl PoolTls {
    /// Parses PEM. Whether key, certificate and CA fit shows when the first channel is made.
    pub fn from_pem(
        certificate: &[u8],
        key: &[u8],
        ca: &[u8],
        trust_domain: impl Into<String>,
    ) -> Result<Self, InvalidPoolTls> {
        let chain = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(InvalidPoolTls::Certificate)?;
        if chain.is_empty() {
            return Err(InvalidPoolTls::NoCertificate);
        }
        Ok(Self {
            chain,
            key: PrivateKeyDer::from_pem_slice(key).map_err(InvalidPoolTls::Key)?,
            roots: CertificateDer::pem_slice_iter(ca)
                .collect::<Result<Vec<_>, _>>()
                .map_err(InvalidPoolTls::Ca)?,
            trust_domain: trust_domain.into(),
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenControlError {
    #[error("the pool's CA cannot be used")]
    Roots(#[source] InvalidRoots),
    #[error("the host's certificate and key cannot be used")]
    Credentials(#[source] rustls::Error),
    #[error("the control plane's address {address:?} cannot be used")]
    Address {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
}

/// A channel that dials when it is first used, and again after a break.
pub(crate) fn connect(tenant: &Tenant, tls: &PoolTls) -> Result<Channel, OpenControlError> {
    let virtual_node = PeerId {
        trust_domain: tls.trust_domain.clone(),
        peer: Peer::VirtualNode(tenant.id.clone()),
    };
    let verifier = Verifier::new(&tls.roots, Expected::Uri(virtual_node.to_string()))
        .map_err(OpenControlError::Roots)?;
    let mut config = ClientConfig::builder_with_provider(crate::identity::crypto::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(OpenControlError::Credentials)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(tls.chain.clone(), tls.key.clone_key())
        .map_err(OpenControlError::Credentials)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));

    let address: Arc<str> = tenant.mesh_control.address.as_str().into();
    // The scheme is for tonic's eyes; the TLS is made by the connector below.
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|source| OpenControlError::Address {
            address: address.to_string(),
            source,
        })?;
    let connect = tower::service_fn(move |_: http::Uri| {
        let (address, connector) = (address.clone(), connector.clone());
        async move {
            let tcp = TcpStream::connect(&*address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("virtual-node").map_err(io::Error::other)?;
            let stream = connector.connect(name, tcp).await?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(connect))
}
