//! How much disk a directory takes, counted as `du` counts: blocks, each inode
//! once, nothing that is mounted below or linked to.
//!
//! The tree is a pod's, which changes it meanwhile: every directory is opened
//! below the root without following a link, so that nothing leads out of it.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirEntryExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// What `st_blocks` counts in (inode(7)).
const BLOCK: u64 = 512;

/// Whether the tree takes more than `limit` bytes; looks no further once it does.
/// What vanishes meanwhile, or lies deeper than a path can say, is not counted.
pub fn exceeds(root: &Path, limit: u64) -> io::Result<bool> {
    let opened = File::open(root)?;
    let mut used = opened.metadata()?.blocks() * BLOCK;
    // By inode: those with several names, which count once.
    let mut shared: HashSet<u64> = HashSet::new();
    let mut left = vec![PathBuf::from(".")];
    while let Some(directory) = left.pop() {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        let Ok(fd) = openat2(&opened, &directory, how) else {
            continue;
        };
        let Ok(entries) = fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd())) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                left.push(directory.join(entry.file_name()));
            } else if metadata.nlink() > 1 && !shared.insert(entry.ino()) {
                continue;
            }
            used = used.saturating_add(metadata.blocks() * BLOCK);
            if used > limit {
                return Ok(true);
            }
        }
    }
    Ok(used > limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once_and_nothing_outside_is() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("volume");
        fs::create_dir_all(root.join("a/b")).unwrap();
        assert!(!exceeds(&root, 64 << 10).unwrap());
        // Sparse: it has a length, but takes no blocks.
        File::create(root.join("sparse"))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        // Linked to, and outside.
        fs::write(directory.path().join("other"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../other", root.join("link")).unwrap();
        std::os::unix::fs::symlink("..", root.join("up")).unwrap();
        assert!(!exceeds(&root, 64 << 10).unwrap());
        fs::write(root.join("a/b/file"), vec![1; 100 << 10]).unwrap();
        fs::hard_link(root.join("a/b/file"), root.join("a/again")).unwrap();
        assert!(exceeds(&root, 64 << 10).unwrap());
        assert!(
            !exceeds(&root, 190 << 10).unwrap(),
            "two names of one file count once"
        );
        assert!(exceeds(&root.join("none"), 1).is_err());
    }
}
