//! The virtual node: a Kubernetes node whose pods run on a pool of hosts. A
//! library beside its thin binary, so that tests can stand in for `main`.
//! [`process`] wires the parts together; each part says for itself what it is.

mod api_server;
mod assembly;
pub mod config;
mod event;
pub mod fleet;
pub mod incoming;
mod kubelet;
pub mod mesh;
mod metrics;
mod node;
pub mod placement;
mod pod;
mod pool;
pub mod pool_tls;
pub mod process;
use pool_cell::quantity;
