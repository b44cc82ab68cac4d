//! Addresses that are somebody else's.

use crate::e2e::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    vec![]
}
