//! Shares of what is scarce on a host: descriptors, handshakes, questions, calls.
//!
//! The data path (`mesh-runtime`), the agent's own edge (`pool-agent`) and the
//! virtual node's listeners take from here before they serve anybody. Two pure cores
//! decide, keyed by whatever names their users give:
//!
//! - [`budget`]: who is known, in accounts within accounts (a pod's within its
//!   tenant's within the host's);
//! - [`door`]: who is not known yet, by the address that he comes from.
//!
//! [`intake`] has a caller's messages paid for as they arrive.
//!
//! [`Shared`] and [`Gate`] are those two behind a lock that is held for one decision,
//! never for a byte; [`Bounds`] shows them as metrics, [`Seldom`] keeps the log from
//! being flooded with what they refuse.
//!
//! What always holds: what was taken comes back when its guard is dropped, however
//! that comes; an account that is empty is forgotten, so memory follows what is held;
//! a refusal names the [`Level`] whose share was used up.

mod acquainted;
pub mod budget;
pub mod descriptors;
pub mod door;
mod end;
mod gate;
pub mod intake;
mod metrics;
mod seldom;
mod shared;

pub use acquainted::Acquainted;
pub use budget::{Budget, Rule, Step};
pub use door::Door;
pub use end::End;
pub use gate::{Gate, Guest};
pub use metrics::{Bounds, Reading};
pub use seldom::Seldom;
pub use shared::{Holding, Path, Place, Shared};

/// Whose share was used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// One peer's, address's or caller's.
    Peer,
    Pod,
    Tenant,
    Host,
}

impl Level {
    pub const ALL: [Self; 4] = [Self::Peer, Self::Pod, Self::Tenant, Self::Host];

    pub fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Pod => "pod",
            Self::Tenant => "tenant",
            Self::Host => "host",
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
