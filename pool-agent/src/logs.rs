//! Containers' logs as the runtime writes them (CRI's format, one file a run),
//! read as the kubelet API serves them, and rotated. Called by the service, by
//! `perform` (last words) and by the agent's housekeeping.
//!
//! What always holds: a reader holds one block of a file at a time, however long
//! the log; the last lines are found from the end.

mod line;
mod rotation;
mod tail;

use std::{
    ffi::OsStr,
    io::{self, SeekFrom},
    os::unix::fs::MetadataExt,
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
    sync::mpsc,
};

use crate::confined::Directory;
use line::Writer;
pub use rotation::{remove, rotate};

/// Read and sent at a time.
const BLOCK: usize = 64 << 10;
/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What of a log is wanted.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub follow: bool,
    pub timestamps: bool,
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
    pub since: Option<Timestamp>,
}

/// Sends the log until its end, or, followed, until `running` says that the run is
/// over and all has been sent. Ends early when nobody receives any more.
pub async fn stream(
    path: &Path,
    request: Request,
    running: impl Fn() -> bool,
    to: mpsc::Sender<io::Result<Bytes>>,
) {
    if let Err(error) = copy(path, request, running, &to).await
        && to.send(Err(error)).await.is_err()
    {
        tracing::debug!("whoever read a log has gone");
    }
}

async fn copy(
    path: &Path,
    request: Request,
    running: impl Fn() -> bool,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let mut writer = Writer::new(request.timestamps, request.since, request.limit_bytes);
    let mut file = open_off_the_workers(path).await?;
    if let Some(lines) = request.tail_lines {
        let from = path.to_owned();
        let start = tokio::task::spawn_blocking(move || {
            let mut file = open(&from)?;
            let length = file.metadata()?.len();
            tail::start_of(&mut file, length, lines)
        })
        .await
        .map_err(io::Error::other)??;
        file.seek(SeekFrom::Start(start)).await?;
    }
    let mut block = vec![0; BLOCK];
    loop {
        // Asked before reading: what was written before it ended is then read.
        let over = !running();
        let read = file.read(&mut block).await?;
        if read > 0 {
            let done = writer.push(&block[..read]);
            let bytes = writer.take();
            if !bytes.is_empty() && to.send(Ok(bytes)).await.is_err() {
                return Ok(());
            }
            if done {
                return Ok(());
            }
            continue;
        }
        if !request.follow {
            break;
        }
        if replaced(path, &file).await {
            // Rotated; what is in the old file has been read.
            file = open_off_the_workers(path).await?;
            continue;
        }
        if over {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = to.closed() => return Ok(()),
        }
    }
    writer.finish();
    let bytes = writer.take();
    if !bytes.is_empty() && to.send(Ok(bytes)).await.is_err() {
        tracing::debug!("whoever read a log has gone");
    }
    Ok(())
}

/// A log is a regular file in its container's own directory, and nothing else is read
/// in its place.
fn open(path: &Path) -> io::Result<std::fs::File> {
    let (directory, name) = in_its_directory(path)?;
    directory.file(name)
}

fn in_its_directory(path: &Path) -> io::Result<(Directory, &OsStr)> {
    let (directory, name) = path
        .parent()
        .zip(path.file_name())
        .ok_or(io::ErrorKind::InvalidInput)?;
    Ok((Directory::open(directory)?, name))
}

async fn open_off_the_workers(path: &Path) -> io::Result<File> {
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || open(&path)).await;
    Ok(File::from_std(opened.map_err(io::Error::other)??))
}

/// Whether another file has taken the path of an open one.
async fn replaced(path: &Path, file: &File) -> bool {
    match (tokio::fs::symlink_metadata(path).await, file.metadata().await) {
        (Ok(there), Ok(open)) => (there.dev(), there.ino()) != (open.dev(), open.ino()),
        _ => false,
    }
}

/// The last lines of a log without times: what stands in for a termination message.
pub fn last_lines(path: &Path, lines: usize, bytes: usize) -> String {
    let read = || -> io::Result<Vec<u8>> {
        use std::io::{Read, Seek};
        let mut file = open(path)?;
        let length = file.metadata()?.len();
        let lines = u64::try_from(lines).unwrap_or(u64::MAX);
        let start = tail::start_of(&mut file, length, lines)?;
        file.seek(SeekFrom::Start(start))?;
        let mut writer = Writer::new(false, None, None);
        let mut kept: Vec<u8> = vec![];
        let mut block = vec![0; BLOCK];
        loop {
            let read = file.read(&mut block)?;
            if read == 0 {
                break;
            }
            writer.push(&block[..read]);
            kept.extend(writer.take());
            let excess = kept.len().saturating_sub(bytes);
            kept.drain(..excess);
        }
        Ok(kept)
    };
    read()
        .map(|kept| String::from_utf8_lossy(&kept).into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
