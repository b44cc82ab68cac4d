//! A named network namespace, and running things in it.
//!
//! Programs enter with `nsenter --net=`, never `ip netns exec`: that remounts
//! `/sys` and so hides the bpffs directories of the host agents.

use std::{
    ffi::OsString,
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use crate::tool::{Tool, ToolError};

/// Linux's `NSFS_MAGIC`, what a mounted namespace's file system says it is.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// Enters a namespace and becomes the program it is given.
const NSENTER: &str = "nsenter";

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// All that `ip netns` knows.
    pub fn existing() -> Vec<Namespace> {
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten();
        entries
            .filter_map(|entry| Some(Self::named(entry.ok()?.file_name().to_str()?)))
            .collect()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A file without a namespace behind it, as a crash may leave, is none.
    pub fn exists(&self) -> bool {
        nix::sys::statfs::statfs(&self.path()).is_ok_and(|fs| fs.filesystem_type().0 == NSFS_MAGIC)
    }

    /// Makes it unless it is there; its loopback is up.
    pub async fn ensure(&self) -> Result<(), ToolError> {
        if !self.exists() {
            if self.path().exists() {
                Tool::words("ip netns delete").arg(&self.name).run().await?;
            }
            Tool::words("ip netns add").arg(&self.name).run().await?;
        }
        self.ip("link set lo up").await?;
        Ok(())
    }

    /// Removes the name. The namespace itself goes with its last process and
    /// socket.
    pub async fn remove(&self) -> Result<(), ToolError> {
        if self.path().exists() {
            Tool::words("ip netns delete").arg(&self.name).run().await?;
        }
        Ok(())
    }

    /// Runs `ip ARGUMENTS` on it.
    pub async fn ip(&self, arguments: &str) -> Result<String, ToolError> {
        Tool::words("ip -n")
            .arg(&self.name)
            .args(arguments.split_whitespace())
            .run()
            .await
    }

    /// Runs `ip` on it for each line of the file.
    pub async fn ip_batch(&self, lines: &Path) -> Result<(), ToolError> {
        Tool::words("ip -n")
            .arg(&self.name)
            .arg("-batch")
            .arg(lines)
            .run()
            .await
            .map(drop)
    }

    /// Whether it has the device.
    pub async fn has_device(&self, device: &str) -> bool {
        Tool::words("ip -n")
            .arg(&self.name)
            .args(["link", "show", "dev", device])
            .succeeds()
            .await
    }

    /// The words before a command that put it into the namespace. `nsenter`
    /// becomes the command, so its process id is the command's.
    pub fn launcher(&self) -> Vec<OsString> {
        vec![NSENTER.into(), self.net_flag(), "--".into()]
    }

    fn net_flag(&self) -> OsString {
        let mut net = OsString::from("--net=");
        net.push(self.path());
        net
    }

    /// A program with its sockets in the namespace; see [`Tool::words`].
    pub fn tool(&self, line: &str) -> Tool {
        Tool::new(NSENTER)
            .arg(self.net_flag())
            .arg("--")
            .args(line.split_whitespace())
    }

    /// Sets a kernel setting of the namespace, such as `net/ipv4/ip_forward`.
    pub fn set(&self, setting: &str, value: &str) -> io::Result<()> {
        let path = Path::new("/proc/sys").join(setting);
        let value = value.to_owned();
        self.enter(move || std::fs::write(path, value))
    }

    /// Whether something accepts TCP connections at the address inside.
    pub fn accepts(&self, address: SocketAddr) -> bool {
        self.enter(move || TcpStream::connect_timeout(&address, Duration::from_millis(500)))
            .is_ok()
    }

    /// Runs `f` on a thread of its own that stands in the namespace and ends
    /// after, so nobody else's sockets can land there.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let namespace = File::open(self.path())?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
                f()
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }
}
