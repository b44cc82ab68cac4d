//! The mesh's wire: Istio's workload, authorization and certificate messages
//! (own words, the wire's numbers), and the SPIFFE identities they speak of.
//! Used by both ends: the control plane in `virtual-node` and the client in
//! `mesh-runtime`. Nothing here does I/O.

mod identity;

pub use identity::{Identity, InvalidIdentity};

/// Type URL of [`istio::workload::Address`] in delta xDS.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`istio::security::Authorization`] in delta xDS.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// The port on which every meshed workload's host takes HBONE.
pub const HBONE_PORT: u16 = 15008;

/// The generated messages, by Istio's package names.
#[allow(unreachable_pub, clippy::all)]
pub mod istio {
    pub mod workload {
        tonic::include_proto!("istio.workload");
    }
    pub mod security {
        tonic::include_proto!("istio.security");
    }
    pub mod certificate {
        tonic::include_proto!("istio.v1.auth");
    }
}
