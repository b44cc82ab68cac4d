//! Images that are another tenant's, or that lead to where no image is.

use crate::e2e::suite::Case;

pub(crate) fn tests() -> Vec<Case> {
    vec![]
}
