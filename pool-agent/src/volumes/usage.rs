//! How much a pod's directories take: for limits, eviction and the host's figures.

use std::{io, path::Path};

pub use crate::confined::measurement::Usage;
use crate::confined::{measurement::Measurement, slices::in_slices};

/// What a tree takes, mounts below it left out; looks no further once it is more than
/// `enough` bytes. Its own path has to be one that only root can change.
pub async fn measure(root: &Path, enough: u64) -> io::Result<Usage> {
    in_slices(Measurement::of(root, enough)?).await
}
