//! How much a pod's directories take: for limits, eviction and the host's figures.

use std::{io, path::Path};

pub use crate::confined::measurement::Usage;
use crate::confined::{measurement::Measurement, slices::in_slices};

/// What a tree takes, mounts below it left out. Its own path has to be one that only
/// root can change.
pub async fn measure(root: &Path) -> io::Result<Usage> {
    in_slices(Measurement::of(root, u64::MAX)?).await
}

/// Whether the tree takes more than `limit` bytes; looks no further once it does.
pub async fn exceeds(root: &Path, limit: u64) -> io::Result<bool> {
    Ok(in_slices(Measurement::of(root, limit)?).await?.bytes > limit)
}
