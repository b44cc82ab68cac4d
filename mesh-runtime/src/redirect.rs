//! Takes a pod's connections at the host side of its device and hands them to
//! the proxy's listeners, with no NAT: a captured socket's own addresses are
//! the original source (`peer_addr`) and destination (`local_addr`).
//!
//! Called by `runtime`; the only module that calls aya.

mod listeners;

pub use listeners::{Listeners, OpenListenerError};
