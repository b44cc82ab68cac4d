//! Keeping a container's log from filling the disk: past a size the file is put
//! aside and the runtime opens a new one.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use crate::{
    confined::Directory,
    cri::{CriError, Runtime},
    sandbox::event::ContainerId,
};

/// As a kubelet: files of 10 MiB, five of them, the one being written included.
const LARGEST: u64 = 10 << 20;
const KEPT: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error("moving {path}")]
    Move {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("reopening {path}")]
    Reopen {
        path: PathBuf,
        #[source]
        source: CriError,
    },
}

/// Rotates the log of a running container if it has grown too large.
pub async fn rotate(
    runtime: &Runtime,
    id: &ContainerId,
    path: &Path,
    now: Timestamp,
) -> Result<(), RotateError> {
    let moving = |source| RotateError::Move {
        path: path.to_owned(),
        source,
    };
    if !super::open(path).is_ok_and(|log| log.metadata().is_ok_and(|m| m.len() > LARGEST)) {
        return Ok(());
    }
    let (directory, name) = super::in_its_directory(path).map_err(moving)?;
    let name = name.to_string_lossy();
    let mut old = aside(&directory, &name).map_err(moving)?;
    // The one being written, and the one it becomes.
    while old.len() + 2 > KEPT {
        directory.unlink(old.remove(0)).map_err(moving)?;
    }
    // Sorts by time.
    let put_aside = format!("{name}.{}", now.as_nanosecond());
    directory.rename(&name, &put_aside).map_err(moving)?;
    if let Err(source) = runtime.reopen_log(id).await {
        // It still writes to the file we moved.
        directory.rename(&put_aside, &name).map_err(moving)?;
        return Err(RotateError::Reopen {
            path: path.to_owned(),
            source,
        });
    }
    Ok(())
}

/// Files put aside, the oldest first.
fn aside(directory: &Directory, name: &str) -> io::Result<Vec<OsString>> {
    let prefix = format!("{name}.");
    let mut found: Vec<OsString> = directory
        .entries()?
        .flatten()
        .filter(|n| n.to_string_lossy().starts_with(&prefix))
        .collect();
    found.sort();
    Ok(found)
}

/// Removes a log with what was put aside of it.
pub fn remove(path: &Path) {
    let remove = || {
        let (directory, name) = super::in_its_directory(path)?;
        for old in aside(&directory, &name.to_string_lossy())? {
            directory.unlink(old)?;
        }
        directory.unlink(name)
    };
    match remove() {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), error = %error, "an old log stays");
        }
        _ => {}
    }
}
