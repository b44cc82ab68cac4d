//! The connection to a tenant's mesh control plane (its virtual node), over the
//! pool's own mutual TLS. `identity` asks it for certificates, `xds` for state.
//!
//! The far end must hold a certificate of the pool's CA whose only URI name is
//! that tenant's virtual node: one tenant's control plane can't speak for
//! another. Names and addresses prove nothing here.
//!
//! The tenant says where that is, and it is dialled in the host's own network: nothing is
//! dialled that is local to the host, or the pool's but for what its operator names
//! ([`OffLimits`]).

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
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

use crate::{
    identity::verify::{Expected, InvalidRoots, Verifier},
    off_limits::OffLimits,
};

/// A control plane that does not answer is given up after this long; the next
/// attempt begins anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent connection is probed this often, and closed when a probe goes
/// unanswered for `PING_TIMEOUT`.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The host's own credentials in the pool. They may be replaced at any time:
/// each connection is made with the newest.
#[derive(Debug)]
pub struct PoolTls {
    current: ArcSwap<Credentials>,
    trust_domain: String,
}

#[derive(Debug)]
struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Vec<CertificateDer<'static>>,
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
        Ok(Self {
            current: ArcSwap::from_pointee(Credentials::from_pem(certificate, key, ca)?),
            trust_domain: trust_domain.into(),
        })
    }

    /// For connections that are made from now on. What does not read changes nothing.
    pub fn replace(&self, certificate: &[u8], key: &[u8], ca: &[u8]) -> Result<(), InvalidPoolTls> {
        self.current
            .store(Arc::new(Credentials::from_pem(certificate, key, ca)?));
        Ok(())
    }

    /// What a connection to that peer is made with now.
    fn client_config(&self, peer: &PeerId) -> Result<ClientConfig, OpenControlError> {
        let current = self.current.load();
        let verifier = Verifier::new(&current.roots, Expected::Uri(peer.to_string()))
            .map_err(OpenControlError::Roots)?;
        let mut config = ClientConfig::builder_with_provider(crate::identity::crypto::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(OpenControlError::Credentials)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(current.chain.clone(), current.key.clone_key())
            .map_err(OpenControlError::Credentials)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        Ok(config)
    }
}

impl Credentials {
    fn from_pem(certificate: &[u8], key: &[u8], ca: &[u8]) -> Result<Self, InvalidPoolTls> {
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
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenControlError {
    #[error("the pool's CA cannot be used")]
    Roots(#[source] InvalidRoots),
    #[error("the host's certificate and key cannot be used")]
    Credentials(#[source] rustls::Error),
    #[error("the address {address:?} cannot be used")]
    Address {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
}

/// Where a host may dial.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    pub(crate) off_limits: Arc<OffLimits>,
    /// The host's own addresses.
    pub(crate) host: Arc<[IpAddr]>,
}

impl Reach {
    /// What a name leads to is looked up once, and that is what is dialled.
    async fn dial(&self, address: &str) -> io::Result<TcpStream> {
        let mut failed = io::Error::other("the control plane's name has no address");
        for to in tokio::net::lookup_host(address).await? {
            failed = match self.off_limits.refuse_control_plane(&self.host, to) {
                Some(refused) => {
                    // Not to the tenant: what the host's resolver knows is not its.
                    tracing::warn!(name = address, %to, %refused, "a control plane is not dialled");
                    io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        "the control plane's address is not one that this host dials: its operator names them in policy.network.control_planes",
                    )
                }
                None => match TcpStream::connect(to).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => error,
                },
            };
        }
        Err(failed)
    }
}

/// A channel to the tenant's control plane, where the host may dial.
pub(crate) fn connect(
    tenant: &Tenant,
    tls: &Arc<PoolTls>,
    reach: Reach,
) -> Result<Channel, OpenControlError> {
    let virtual_node = Peer::VirtualNode(tenant.id.clone());
    dialled(&tenant.mesh_control.address, virtual_node, tls, Some(reach))
}

/// A channel to one peer of the pool, at the `HOST:PORT` that the operator says. Whoever
/// else answers there is not spoken to.
pub fn channel(address: &str, peer: Peer, tls: &Arc<PoolTls>) -> Result<Channel, OpenControlError> {
    dialled(address, peer, tls, None)
}

/// A channel that dials when it is first used, and again after a break; anywhere, if it
/// has no `reach`.
fn dialled(
    address: &str,
    peer: Peer,
    tls: &Arc<PoolTls>,
    reach: Option<Reach>,
) -> Result<Channel, OpenControlError> {
    let peer = PeerId {
        trust_domain: tls.trust_domain.clone(),
        peer,
    };
    // Credentials that cannot be used are told here, not at the first call.
    tls.client_config(&peer)?;
    let dialled = Arc::new((tls.clone(), peer, reach));

    let address: Arc<str> = address.into();
    // The scheme is for tonic's eyes; the TLS is made by the connector below.
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|source| OpenControlError::Address {
            address: address.to_string(),
            source,
        })?;
    let connect = tower::service_fn(move |_: http::Uri| {
        let (address, dialled) = (address.clone(), dialled.clone());
        async move {
            let (tls, peer, reach) = &*dialled;
            let config = tls.client_config(peer).map_err(io::Error::other)?;
            let tcp = match reach {
                Some(reach) => reach.dial(&address).await?,
                None => TcpStream::connect(&*address).await?,
            };
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("peer").map_err(io::Error::other)?;
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
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

#[cfg(test)]
mod tests {
    use mesh_api::istio::certificate::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    };
    use pool_agent_api::tenant::MeshControl;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
    use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
    use tokio::net::TcpListener;

    use super::*;
    use crate::identity::crypto::provider;

    struct Authority(Issuer<'static, KeyPair>, String);

    impl Authority {
        fn new() -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let pem = params.self_signed(&key).unwrap().pem();
            Self(Issuer::new(params, key), pem)
        }

        fn issue(&self, uri: &str) -> (String, String) {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
            (
                params.signed_by(&key, &self.0).unwrap().pem(),
                key.serialize_pem(),
            )
        }
    }

    fn anywhere() -> Reach {
        Reach {
            off_limits: Arc::default(),
            host: Arc::new([]),
        }
    }

    #[tokio::test]
    async fn what_is_local_to_the_host_is_not_dialled_whatever_a_tenant_calls_its_control_plane() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let nets = |all: &[&str]| -> Vec<ipnet::Ipv4Net> { all.iter().map(|n| n.parse().unwrap()).collect() };
        let limits = OffLimits::new(&nets(&["10.77.0.0/16"]), &nets(&["192.0.2.0/24"]), []).unwrap();
        let reach = |ranges: &[&str]| Reach {
            off_limits: Arc::new(limits.clone().with_control_planes(nets(ranges))),
            host: Arc::new(["198.51.100.1".parse().unwrap()]),
        };
        let closed = reach(&["127.0.0.0/8", "192.0.2.2/32"]);
        for name in [
            format!("127.0.0.1:{port}"),
            format!("localhost:{port}"),
            "169.254.169.254:80".into(),
            "198.51.100.1:10250".into(),
            "10.77.3.4:80".into(),
            "192.0.2.3:7444".into(),
        ] {
            let error = closed.dial(&name).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{name}: {error}");
            assert!(!error.to_string().contains("127.0.0.1"), "{error}");
        }
        let accepted = tokio::time::timeout(Duration::from_millis(200), listener.accept());
        assert!(accepted.await.is_err(), "it was dialled");
        let refuses = |reach: &Reach, to: &str| {
            let to = to.parse().unwrap();
            reach.off_limits.refuse_control_plane(&reach.host, to).is_some()
        };
        assert!(!refuses(&closed, "192.0.2.2:7444"), "the operator names it");
        assert!(!refuses(&closed, "203.0.113.9:7444"), "it is the world's");
        assert!(refuses(&reach(&[]), "192.0.2.2:7444"));
        // A host that was told of no pool.
        assert!(anywhere().dial(&format!("127.0.0.1:{port}")).await.is_ok());
    }

    fn tenant(address: std::net::SocketAddr) -> Tenant {
        Tenant {
            id: "demo".parse().unwrap(),
            cluster_pod_range: "10.77.0.0/16".parse().unwrap(),
            cluster_domain: "cluster.local".into(),
            dns_address: "10.96.0.10".parse().unwrap(),
            upstream_nameservers: vec![],
            mesh_control: MeshControl {
                address: address.to_string(),
                trust_domain: "cluster.local".into(),
                cluster_id: "Kubernetes".into(),
                network: String::new(),
            },
        }
    }

    /// Takes connections of this pool, tells whose certificate each showed, and
    /// closes them.
    async fn control_plane(pool: &Authority) -> (std::net::SocketAddr, tokio::sync::mpsc::Receiver<Vec<u8>>) {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(pool.1.as_bytes()).unwrap())
            .unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .unwrap();
        let (certificate, key) = pool.issue("spiffe://pool/tenant/demo/virtual-node");
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shown, seen) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(tcp).await {
                    let leaf = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
                    shown.send(leaf).await.unwrap();
                }
            }
        });
        (address, seen)
    }

    #[tokio::test]
    async fn a_new_connection_shows_the_newest_certificate() {
        let pool = Authority::new();
        let (address, mut seen) = control_plane(&pool).await;
        let (first, first_key) = pool.issue("spiffe://pool/host/host-a");
        let (second, second_key) = pool.issue("spiffe://pool/host/host-a");
        let ca = pool.1.as_bytes();
        let tls = PoolTls::from_pem(first.as_bytes(), first_key.as_bytes(), ca, "pool").unwrap();
        let tls = Arc::new(tls);
        let channel = connect(&tenant(address), &tls, anywhere()).unwrap();
        let dial = async || {
            let mut client = IstioCertificateServiceClient::new(channel.clone());
            // Fails, as the far end hangs up; that it dials is what matters.
            client
                .create_certificate(IstioCertificateRequest::default())
                .await
                .ok();
        };
        let shown = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        dial().await;
        assert_eq!(seen.recv().await.unwrap(), shown(&first));
        tls.replace(second.as_bytes(), second_key.as_bytes(), ca).unwrap();
        assert!(tls.replace(b"nothing", second_key.as_bytes(), ca).is_err());
        let newest = async {
            // One dial may have been under way.
            loop {
                dial().await;
                if seen.recv().await.unwrap() == shown(&second) {
                    break;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), newest)
            .await
            .unwrap();
    }
}
