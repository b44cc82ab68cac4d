//! Workload identities of this host's pods: keys made here, in memory, and
//! certificates from the tenant's broker.
//!
//! ```text
//!            wanted                fetched               half of its life gone
//! (unknown) ───────▶ Pending ─────────────────▶ Held ──────────────────────────▶ Held (fetching)
//!                      ▲ failed: wait, again      │ expired                          │ fetched: Held
//!                      └──────────────────────────┴──────────────────────────────────┘ failed: wait, again
//! ```
//!
//! `proxy` wants an identity when the first pod with it is added, reads its
//! [`CertificateState`] for each handshake, and releases it with the last pod.

pub mod tls;
pub mod verify;

use std::{sync::Arc, time::SystemTime};

use mesh_api::Identity;

/// A certificate that passed every check, and what is built of it.
#[derive(Debug)]
pub struct Certificate {
    pub identity: Identity,
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub tls: tls::Tls,
}

/// What stands for an identity now.
#[derive(Debug, Clone, Default)]
pub enum CertificateState {
    /// None yet, or the last one expired. Connections wait for a while.
    #[default]
    Pending,
    /// The newest. It stays while its successor is fetched.
    Held(Arc<Certificate>),
}
