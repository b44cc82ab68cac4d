//! Whoever takes more than his share of connections, descriptors or questions.

use crate::e2e::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    vec![]
}
