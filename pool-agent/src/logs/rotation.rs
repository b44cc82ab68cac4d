//! Keeping a container's log from filling the disk: past a size the file is put
//! aside and the runtime opens a new one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use crate::{
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
    if !fs::metadata(path).is_ok_and(|m| m.len() > LARGEST) {
        return Ok(());
    }
    let moving = |source| RotateError::Move {
        path: path.to_owned(),
        source,
    };
    let mut old = aside(path).map_err(moving)?;
    // The one being written, and the one it becomes.
    while old.len() + 2 > KEPT {
        fs::remove_file(old.remove(0)).map_err(moving)?;
    }
    let mut name = path.as_os_str().to_owned();
    // Sorts by time.
    name.push(format!(".{}", now.as_nanosecond()));
    let put_aside = PathBuf::from(name);
    fs::rename(path, &put_aside).map_err(moving)?;
    if let Err(source) = runtime.reopen_log(id).await {
        // It still writes to the file we moved.
        fs::rename(&put_aside, path).map_err(moving)?;
        return Err(RotateError::Reopen {
            path: path.to_owned(),
            source,
        });
    }
    Ok(())
}

/// Files put aside, the oldest first.
fn aside(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(vec![]);
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut found: Vec<PathBuf> = fs::read_dir(directory)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(&prefix))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// Removes a log with what was put aside of it.
pub fn remove(path: &Path) {
    for old in aside(path).unwrap_or_default() {
        if let Err(error) = fs::remove_file(&old) {
            tracing::debug!(path = %old.display(), error = %error, "an old log stays");
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), error = %error, "an old log stays");
        }
        _ => {}
    }
}
