//! The cryptography of every TLS connection of this crate, whatever the process'
//! default is.

use std::sync::{Arc, LazyLock};

use rustls::{CipherSuite, crypto::CryptoProvider};

/// AES with 128-bit keys comes first: it is as safe as any, and takes ten rounds
/// for a block where 256-bit keys take fourteen.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
});

pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}
