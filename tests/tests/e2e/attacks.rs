//! The attacks that docs/security.md names, each played on the running system: as
//! root in a pod, as a tenant's virtual node, as a stolen host, as a stranger.

pub(crate) mod bounds;
pub(crate) mod calls;
pub(crate) mod cell;
pub(crate) mod files;
pub(crate) mod images;
pub(crate) mod network;
pub(crate) mod privilege;
pub(crate) mod room;

use super::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    [
        bounds::tests(),
        calls::tests(),
        cell::tests(),
        files::tests(),
        images::tests(),
        network::tests(),
        privilege::tests(),
        room::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
