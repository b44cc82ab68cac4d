//! Links, trees and sizes that a pod leaves where root works.

use crate::e2e::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    vec![]
}
