//! The agent of one pool host: it takes sandboxes from virtual nodes, runs them
//! in containerd, gives each an address and a mesh attachment, and reports.
//!
//! The binary is a thin shell around [`agent::run`]. Who calls whom:
//!
//! ```text
//!  virtual-node ──gRPC──▶ service ──▶ host ──▶ admission (pure), ledger (disk)
//!                            ▲          │
//!                            │          ▼ one task each
//!                          board ◀── sandbox: driver ▸ lifecycle (pure) ▸ perform
//!                                                                            │
//!  containerd ──CNI shim──▶ cni ◀── expected by ─────────────────────────────┤
//!  containerd ◀──── cri ◀────────────────────────────────────────────────────┤
//!  kernel ◀── network, volumes, cgroup ◀─────────────────────────────────────┤
//!  operator's collector ◀── usage ◀─ what host and perform tell, cgroups ────┤
//!  mesh-runtime ◀── attachment ◀─────────────────────────────────────────────┘
//! ```
//!
//! What always holds:
//! - what an admitted sandbox needs to survive the agent is on disk before the
//!   virtual node is told that it was accepted;
//! - no container is started before its sandbox's attachment is `Serving`;
//! - the agent's death stops no container and opens no hole.

pub mod admission;
pub mod agent;
pub mod allowance;
pub mod attachment;
pub mod board;
mod causes;
pub mod cell;
pub mod cgroup;
pub mod cni;
pub mod config;
pub mod confined;
pub mod cri;
pub mod fence;
pub mod host;
pub mod housekeeping;
pub mod image;
pub mod layout;
pub mod ledger;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod policy;
pub mod pressure;
pub mod probes;
pub mod right;
pub mod sandbox;
pub mod service;
pub mod spec_file;
pub mod usage;
pub mod user_ids;
pub mod volumes;
