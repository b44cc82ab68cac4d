//! One certificate with its key, as rustls configurations for either end of
//! HBONE. Built once when the certificate arrives, shared by every connection.

use std::sync::Arc;

use mesh_api::Identity;
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::NoServerSessionStorage,
};

use super::{
    crypto,
    verify::{Expected, InvalidRoots, Verifier},
};

/// Both ends' configurations for one identity and one certificate.
///
/// TLS 1.3 only, both ends verified, ALPN `h2`, no SNI, no resumption: a
/// resumed session would outlive the certificate that it was verified by.
#[derive(Debug)]
pub struct Tls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

#[derive(Debug, thiserror::Error)]
pub enum BuildTlsError {
    #[error("the roots cannot be used")]
    Roots(#[source] InvalidRoots),
    #[error("the certificate and its key cannot be used")]
    Certificate(#[source] rustls::Error),
}

impl Tls {
    pub fn new(
        identity: &Identity,
        chain: &[CertificateDer<'static>],
        key: &PrivateKeyDer<'static>,
        roots: &[CertificateDer<'_>],
    ) -> Result<Self, BuildTlsError> {
        let expected = Expected::TrustDomain(identity.trust_domain().to_owned());
        let verifier = Arc::new(Verifier::new(roots, expected).map_err(BuildTlsError::Roots)?);
        let mut client = ClientConfig::builder_with_provider(crypto::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(BuildTlsError::Certificate)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(chain.to_vec(), key.clone_key())
            .map_err(BuildTlsError::Certificate)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(crypto::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(BuildTlsError::Certificate)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.to_vec(), key.clone_key())
            .map_err(BuildTlsError::Certificate)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}
