//! Mesh identity for the pods of one host, as a library that `pool-agent` embeds.

pub mod attachment;
pub mod balance;
pub mod control;
pub mod dns;
pub mod identity;
pub mod limits;
pub mod netns;
pub mod off_limits;
pub mod pod;
pub mod policy;
pub mod proxy;
pub mod redirect;
pub mod runtime;
pub mod state;
pub mod telemetry;
pub mod xds;
