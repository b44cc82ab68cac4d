//! Mounts: tmpfs, binds of what was opened safely, and the removal of all.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::MetadataExt},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, mkdirat},
};

/// A tmpfs that holds no devices and no programs that gain rights.
pub(super) fn tmpfs(path: &Path, bytes: Option<u64>, mode: u32) -> io::Result<()> {
    let mut options = format!("mode={mode:o}");
    if let Some(bytes) = bytes {
        // The kernel counts in pages and takes 0 for "no limit".
        options.push_str(&format!(",size={}", bytes.max(4096)));
    }
    mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )?;
    Ok(())
}

/// Whether something is mounted right there.
pub(super) fn is_mount_point(path: &Path) -> bool {
    let device = |p: &Path| fs::symlink_metadata(p).map(|m| m.dev());
    match (device(path), path.parent().map(device)) {
        (Ok(here), Some(Ok(above))) => here != above,
        _ => false,
    }
}

/// Opens a path below a directory, making directories that are missing. Links
/// are followed as long as they stay below it.
pub(super) fn open_beneath(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let how = || {
        OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    let root = File::open(root)?;
    match openat2(&root, path, how()) {
        Ok(fd) => return Ok(fd),
        Err(Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let mut at: OwnedFd = root.into();
    for part in path.components() {
        let Component::Normal(name) = part else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        at = openat2(&at, name, how())?;
    }
    Ok(at)
}

/// Mounts what was opened at `target`, in place of what an earlier run had there.
pub(super) fn bind(opened: &OwnedFd, target: &Path) -> io::Result<()> {
    unmount_below(target)?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    if let Some(directory) = target.parent() {
        fs::create_dir_all(directory)?;
    }
    if fs::metadata(&source)?.is_dir() {
        fs::create_dir_all(target)?;
    } else {
        File::create(target)?;
    }
    mount(
        Some(&source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(())
}

/// Unmounts whatever is mounted at or below a path, the innermost first.
pub(super) fn unmount_below(path: &Path) -> io::Result<()> {
    let mounts = fs::read("/proc/self/mountinfo")?;
    let mut below: Vec<PathBuf> = mounts
        .split(|&b| b == b'\n')
        // The fifth field is the mount point (proc_pid_mountinfo(5)).
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .map(unescape)
        .filter(|at| at.starts_with(path))
        .collect();
    below.reverse();
    for at in below {
        match umount2(&at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // Gone with the one above it.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = vec![];
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            digits.iter().try_fold(0_u32, |n, d| {
                (b'0'..=b'7').contains(d).then(|| n * 8 + u32::from(d - b'0'))
            })
        };
        match (first, tail.get(..3).and_then(octal)) {
            (b'\\', Some(code)) => {
                bytes.push(u8::try_from(code & 0xff).unwrap_or(b'?'));
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_read_as_the_kernel_escapes_it() {
        assert_eq!(unescape(br"/a\040b\134c"), PathBuf::from(r"/a b\c"));
        assert_eq!(unescape(br"/a\9"), PathBuf::from(r"/a\9"));
    }
}
