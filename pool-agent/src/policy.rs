//! What this host's operator allows, whoever asks: the `policy` table of the
//! agent's configuration file. Pure.
//!
//! A virtual node checks a pod for a friendly error; the host decides. A caller's
//! word never widens what is allowed here, and what a part of the policy refuses is
//! refused by name at admission, before anything of it is kept or made.
//!
//! ```toml
//! [policy.privilege]
//! [policy.room]
//! [policy.images]
//! [policy.network]
//! [policy.bounds]
//! [policy.files]
//! ```

pub mod bounds;
pub mod files;
pub mod images;
pub mod network;
pub mod privilege;
pub mod room;

use serde::Deserialize;

/// Each part has defaults that are safe for tenants who do not know each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    pub privilege: privilege::Privilege,
    pub room: room::Room,
    pub images: images::Images,
    pub network: network::Network,
    pub bounds: bounds::Bounds,
    pub files: files::Files,
}
