//! How much a pod's directories take: for limits, eviction and the host's figures.

use std::{io, path::Path, time::Duration};

pub use crate::confined::measurement::Usage;
use crate::confined::{measurement::Measurement, slices::in_slices_timed};

/// What a tree takes, mounts below it left out; looks no further once it is more than
/// `enough` bytes or inodes. Its own path has to be one that only root can change. With
/// the time that it took, other trees' turns left out.
pub async fn measure(root: &Path, enough: Usage) -> io::Result<(Usage, Duration)> {
    in_slices_timed(Measurement::of(root, enough)?).await
}
