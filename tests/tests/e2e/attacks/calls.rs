//! Calls that are cut off, repeated, or come when the disk is full.

use crate::e2e::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    vec![]
}
