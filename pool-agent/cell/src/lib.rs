//! The contract of the *cell*, the Kubernetes cluster that holds a pool's shared
//! state: how a host stands there as a Node, and room for one attempt of one pod as
//! a Pod, the *claim*. `virtual-node` makes claims and reads what became of them;
//! `pool-agent` keeps its host's Node and takes only sandboxes that have a claim.
//! See `docs/decisions/the-cell.md`.
//!
//! Pure: nothing here talks to an API server or reads a clock.
//!
//! What always holds:
//! - a Pod is a claim only if it is exactly of the shape that [`Claim::to_pod`]
//!   makes, but for what the API server fills in: whatever else it says is refused
//!   by the name of the field ([`NotAClaim`]);
//! - amounts never shrink on their way through the cell.

pub mod claim;
pub mod host;
pub mod lapse;
pub mod names;
pub mod patch;
pub mod quantity;

pub use claim::{Claim, ClaimParts, ClaimPhase, ClaimStatus, LONGEST_GRACE, NotAClaim, OwnerUid, Placed};
pub use host::{HostNode, HostRecord, NodeFacts};
