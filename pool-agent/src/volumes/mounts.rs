//! Mounts: tmpfs, binds of what was opened safely, and the removal of all.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::confined::{Directory, Owned, removal::Removal, slices::at_once, through};

/// How much a tmpfs may hold; None: half of the host's memory.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Room {
    pub(super) bytes: Option<u64>,
    pub(super) inodes: Option<u64>,
}

/// Mounts a tmpfs that holds no devices and no programs that gain rights.
pub(super) fn tmpfs(on: &Directory, room: Room, root: Owned) -> io::Result<()> {
    let mut options = format!("mode={:o},uid={},gid={}", root.mode, root.uid, root.gid);
    if let Some(bytes) = room.bytes {
        // The kernel counts in pages and takes 0 for "no limit".
        options.push_str(&format!(",size={}", bytes.max(4096)));
    }
    if let Some(inodes) = room.inodes {
        options.push_str(&format!(",nr_inodes={}", inodes.max(1)));
    }
    mount(
        Some("tmpfs"),
        &through(&on.as_fd()),
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

/// Mounts what was opened under a name, in place of what an earlier run had there.
pub(super) fn bind(opened: &OwnedFd, place: &Path, name: &str) -> io::Result<PathBuf> {
    let target = place.join(name);
    unmount_below(&target)?;
    let place = Directory::ensure(place)?;
    // Empty: it was mounted over.
    Removal::of(&place, name).and_then(at_once)?;
    let source = through(opened);
    if fs::metadata(&source)?.is_dir() {
        place.make(name, Owned::ours(0o700))?;
    } else {
        place.create(name, b"", Owned::ours(0o600))?;
    }
    mount(
        Some(&source),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(target)
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
