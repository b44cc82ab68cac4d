//! One sandbox: what shall happen to it ([`lifecycle`], pure), the task that owns
//! it ([`driver`]) and the hands of that task ([`perform`]).
//!
//! ```text
//!  host ──Command──▶ driver ──Event──▶ lifecycle ──Effect──▶ perform ──▶ CRI, network,
//!   ▲                  │  ▲                                    │          volumes, mesh
//!   └── status, events ┘  └────────────── Event ───────────────┘
//! ```

mod backoff;
pub mod clock;
mod container;
pub mod driver;
pub mod event;
pub mod eviction;
pub mod lifecycle;
pub mod perform;
pub mod status;

pub use lifecycle::Lifecycle;
