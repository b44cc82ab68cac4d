//! One certificate with its key, as rustls configurations for either end of
//! HBONE. Built once when the certificate arrives, shared by every connection.

use std::sync::{Arc, LazyLock};

use mesh_api::Identity;
use rustls::{
    CipherSuite, ClientConfig, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::NoServerSessionStorage,
};

use super::verify::{Expected, InvalidRoots, Verifier};

/// AES with 128-bit keys comes first: it is as safe as any, and takes ten rounds
/// for a block where 256-bit keys take fourteen.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
});

/// The cryptography of every TLS connection of this crate, whatever the
/// process' default is.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

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
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(BuildTlsError::Certificate)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(chain.to_vec(), key.clone_key())
            .map_err(BuildTlsError::Certificate)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider())
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
