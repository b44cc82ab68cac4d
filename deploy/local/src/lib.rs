//! A cluster, a pool and a demo on one machine.
//!
//! The `spindrift-local` program makes it for a person, the tests for
//! themselves: a Kubernetes control plane, a virtual node and pool hosts, each
//! in network namespaces of the instance. See [`topology`] for the picture and
//! [`lab`] for where to start reading.
//!
//! It always holds that nothing is made in the machine's own network namespace
//! but one listener on loopback, and that `down` finds everything by the
//! instance's name.

pub mod artifacts;
pub mod burst;
pub mod cache;
pub mod cell;
pub mod cluster;
pub mod component;
pub mod containerd;
pub mod control_plane;
pub mod demo;
pub mod driver;
pub mod elastic;
mod file;
pub mod fleet;
pub mod images;
pub mod instance;
pub mod lab;
pub mod netns;
pub mod node;
mod packages;
pub mod pki;
pub mod pool;
pub mod process;
pub mod progress;
pub mod registry;
pub mod relay;
pub mod requirements;
pub mod status;
pub mod supervisor;
pub mod tool;
pub mod topology;
pub mod usage;

pub use instance::{InstanceName, Layout};
pub use lab::{Lab, Options};
pub use progress::Progress;
