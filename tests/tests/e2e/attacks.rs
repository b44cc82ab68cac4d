//! Attacks of docs/security.md that need the whole lab. Most are played nearer to what
//! they attack: by the agent's host suite, the proxy's and the kernel's tests, the lab's.

pub(crate) mod objects;
pub(crate) mod room;

use super::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    let mut all = room::tests();
    all.extend(objects::tests());
    all
}
