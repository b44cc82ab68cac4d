//! Mesh identity for the pods of one host, as a library that `pool-agent` embeds.

pub mod netns;
pub mod pod;
pub mod redirect;
