//! What the end-to-end tests and the benches share: one lab for a process, a
//! Kubernetes namespace for each test, and ways to look at and to trouble what
//! runs there.
//!
//! ```text
//! Stage   the lab of this process: made by who needs it first, removed at the end
//! └─ Scope   one test on it: a namespace of the cluster, gone when the test ends
//!    ├─ workload    Pods, Services, Deployments to create, and what to read off them
//!    ├─ kubectl     what a person would type
//!    ├─ capture     the packets between the hosts
//!    ├─ containers  what containerd runs, whatever anybody claims
//!    ├─ journal     what the components have logged
//!    └─ stranger    TLS, HTTP/2 and gRPC as somebody who means no good
//! ```

pub mod capture;
pub mod containers;
pub mod journal;
pub mod kubectl;
pub mod program;
pub mod scope;
pub mod stage;
pub mod stranger;
pub mod workload;

pub use scope::Scope;
pub use stage::{Company, Stage};
