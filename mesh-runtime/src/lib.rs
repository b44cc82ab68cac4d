//! Mesh identity for the pods of one host, as a library that `pool-agent` embeds.

pub mod control;
pub mod identity;
pub mod netns;
pub mod pod;
pub mod proxy;
pub mod redirect;
pub mod telemetry;
