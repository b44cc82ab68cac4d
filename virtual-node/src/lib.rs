//! The virtual node: a Kubernetes node whose pods run on a pool of hosts. A
//! library beside the binary so that tests can stand in for `main`.

pub mod mesh;
pub mod placement;
pub mod pool_tls;
