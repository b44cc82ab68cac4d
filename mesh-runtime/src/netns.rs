//! A network namespace, held open, in which sockets can be made.
//!
//! A socket belongs for life to the namespace its maker stood in, so the proxy
//! serves many tenants from one process: it steps in, makes the socket, and
//! steps back. Used by `redirect` (listeners, links) and `proxy` (upstreams).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};

/// Cheap to clone; the namespace lives as long as the last clone.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Netns {
    /// Opens a bind-mounted namespace (`/run/netns/…`) or `/proc/PID/ns/net`.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        Ok(Self {
            file: Arc::new(File::open(&path)?),
            path,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves this thread into the namespace for good. For a thread of its own;
    /// never one of an executor, whose other tasks would be moved along.
    pub fn stay(&self) -> io::Result<()> {
        Ok(setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `f` with this thread in the namespace, and steps back. `f` must not
    /// await: it is a plain function so that it cannot.
    ///
    /// A thread that cannot step back would put other tenants' sockets into
    /// this namespace, so the process ends instead.
    pub fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        struct Back(File);
        impl Drop for Back {
            fn drop(&mut self) {
                if setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).is_err() {
                    tracing::error!(fd = self.0.as_raw_fd(), "cannot return to own network namespace");
                    std::process::abort();
                }
            }
        }
        let back = Back(File::open("/proc/thread-self/ns/net")?);
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let result = f();
        drop(back);
        result
    }
}
