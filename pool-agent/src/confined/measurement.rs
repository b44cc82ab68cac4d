//! How much a tree takes, counted as `du` counts: blocks, each inode once, nothing
//! that is mounted below or linked to. The tree is a pod's, which changes it
//! meanwhile: what vanishes or moves is counted or not.

use std::{collections::HashSet, io, ops::ControlFlow, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, Stat, fstat, openat, openat2, statat},
    io::Errno,
};

use super::{CONFINED, DIRECTORY, Directory, slices::Work};

/// What `st_blocks` counts in (inode(7)).
const BLOCK: u64 = 512;
/// Levels whose directories are held open. From one further down the way back is by
/// its "..", if that is still the directory it was.
const HELD: usize = 32;
/// Inodes with several names that are remembered, to count each once: 1 MiB. A tree
/// with more of them is said to take more than it does, to its own pod's harm.
const SHARED: usize = 1 << 16;

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// On the disk, or in memory.
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Debug)]
pub struct Measurement {
    /// From the root to where it is: 64 bytes for a level. Its directory costs the pod more.
    levels: Vec<Level>,
    shared: HashSet<u64>,
    usage: Usage,
    /// It need not be known by how much more than this it takes, of either.
    enough: Usage,
}

#[derive(Debug)]
struct Level {
    /// Open in the first levels and in the last.
    dir: Option<Dir>,
    device: u64,
    inode: u64,
    /// Where to go on, as the directory itself says.
    offset: i64,
}

impl Level {
    fn new(fd: OwnedFd) -> Result<(Self, Stat), Errno> {
        let stat = fstat(&fd)?;
        let level = Self {
            dir: Some(Dir::new(fd)?),
            device: stat.st_dev,
            inode: stat.st_ino,
            offset: 0,
        };
        Ok((level, stat))
    }
}

impl Measurement {
    /// Of a directory whose path only root can change. Looks no further once it has
    /// found more than `enough` bytes or inodes.
    pub fn of(path: &Path, enough: Usage) -> io::Result<Self> {
        let (root, stat) = Level::new(Directory::open(path)?.fd)?;
        let mut measurement = Self {
            levels: vec![root],
            shared: HashSet::new(),
            usage: Usage::default(),
            enough,
        };
        measurement.count(&stat);
        Ok(measurement)
    }

    /// Directories that are open.
    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.levels.iter().filter(|level| level.dir.is_some()).count()
    }

    fn count(&mut self, stat: &Stat) {
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        self.usage.bytes = self.usage.bytes.saturating_add(blocks.saturating_mul(BLOCK));
        self.usage.inodes = self.usage.inodes.saturating_add(1);
    }

    /// Looks at one entry. False: there is none left.
    fn step(&mut self) -> bool {
        let Some(level) = self.levels.last_mut() else {
            return false;
        };
        let Some(dir) = &mut level.dir else {
            // Its directory could not be found again.
            self.levels.pop();
            return true;
        };
        let Some(Ok(entry)) = dir.read() else {
            self.up();
            return true;
        };
        level.offset = entry.offset();
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return true;
        }
        let Ok(fd) = dir.fd() else {
            return true;
        };
        if entry.file_type() != FileType::Directory {
            let Ok(stat) = statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) else {
                return true;
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                let shared = stat.st_nlink > 1;
                if !shared
                    || !self.shared.contains(&stat.st_ino)
                        && (self.shared.len() >= SHARED || self.shared.insert(stat.st_ino))
                {
                    self.count(&stat);
                }
                return true;
            }
        }
        if let Ok((below, stat)) = openat2(fd, name, DIRECTORY, Mode::empty(), CONFINED).and_then(Level::new)
        {
            self.count(&stat);
            if self.levels.len() > HELD
                && let Some(above) = self.levels.last_mut()
            {
                above.dir = None;
            }
            self.levels.push(below);
        }
        true
    }

    /// Back to the directory above, where it was left.
    fn up(&mut self) {
        let from = self.levels.pop().and_then(|level| level.dir);
        let (Some(from), Some(above)) = (from, self.levels.last_mut()) else {
            return;
        };
        if above.dir.is_some() {
            return;
        }
        let (device, inode, offset) = (above.device, above.inode, above.offset);
        let back = || -> Result<Dir, Errno> {
            // Confinement does not let "..": so it has to be what it was come from.
            let fd = openat(from.fd()?, "..", DIRECTORY, Mode::empty())?;
            let stat = fstat(&fd)?;
            if (stat.st_dev, stat.st_ino) != (device, inode) {
                return Err(Errno::STALE);
            }
            let mut dir = Dir::new(fd)?;
            dir.seek(offset)?;
            Ok(dir)
        };
        above.dir = back().ok();
    }
}

impl Work for Measurement {
    type Output = Usage;

    fn go_on(&mut self, entries: usize) -> ControlFlow<Usage> {
        for _ in 0..entries {
            let enough = self.usage.bytes > self.enough.bytes || self.usage.inodes > self.enough.inodes;
            if enough || !self.step() {
                return ControlFlow::Break(self.usage);
            }
        }
        ControlFlow::Continue(())
    }
}
