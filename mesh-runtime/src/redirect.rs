//! Takes a pod's connections at the host side of its device and hands them to
//! the proxy's listeners, with no NAT: a captured socket's own addresses are
//! the original source (`peer_addr`) and destination (`local_addr`).
//!
//! One [`Router`] for each tenant's network namespace on this host. Called by
//! `runtime`; the only module that calls aya, and that has unsafe code.
//!
//! ```text
//!  pod ──▶ its device ── tcx ingress: not this pod's? unknown? ──▶ dropped, counted
//!                            │ marked                  │ passed (UDP, ICMP to outside)
//!                            ▼                         ▼
//!             rule: marked is local        the router's own routes ──▶ uplink
//!                            ▼                                      (egress: never marked)
//!           a connection of the proxy's? ──▶ that socket
//!                            │ none yet
//!                            ▼
//!                 socket look-up ──▶ listener in the pinned map, or dropped
//!
//!  uplink ── tcx ingress: no pod of this host? ──▶ dropped, counted; else the same way
//! ```
//!
//! What always holds:
//! - everything the kernel needs is pinned: when this process dies, new
//!   connections are dropped, and nothing is let through for lack of it;
//! - a device that no pod is known on gets nothing through;
//! - past its deadline a pod gets nothing through, whether or not this process lives.
#![allow(unsafe_code)]

#[path = "../ebpf/src/abi.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "compiled for the kernel too, where the rest is used"
)]
mod abi;
#[cfg(test)]
mod classification;
#[cfg(test)]
#[path = "../ebpf/src/classify.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "compiled for the kernel too; here only to be tested"
)]
mod classify;
mod deadline;
mod drops;
mod listeners;
mod programs;
mod router;
mod routing;

pub use abi::{MAX_ALLOWED, MAX_OFF_LIMITS, MAX_POOL_RANGES, Reason};
pub use deadline::{BootTime, Deadline};
pub use drops::Drops;
pub use listeners::{Listeners, OpenListenerError};
pub use programs::{Device, ProgramsError};
pub use router::{GATEWAY, Router, RouterConfig, RouterError};
pub use routing::RoutingError;
