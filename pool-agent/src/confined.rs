//! Directories that root works in although a pod can write them: volumes, logs, the
//! small files that a container writes on the host's behalf. Called by `volumes`,
//! `logs`, `sandbox` and whoever else reads or removes what a pod may have made.
//!
//! What always holds:
//! - what is reached is reached from the descriptor of a directory, by openat2(2) with
//!   `RESOLVE_BENEATH`: nothing leads above it, whatever links and renames a pod
//!   makes meanwhile. No path is looked at first and used later;
//! - no symbolic link is followed, but in [`Directory::sub_path`], and there none that
//!   leads out;
//! - no mount point is crossed;
//! - a file is opened only once it is known to be a regular one: a fifo would make
//!   the host wait, a device would act;
//! - a tree costs no stack frame for its depth and no memory for its width, and is
//!   worked through [in slices](slices).

pub mod measurement;
pub mod removal;
pub mod slices;

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, OpenOptionsExt},
        },
    },
    path::{Component, Path, PathBuf},
};

use nix::unistd::{getegid, geteuid};
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid, fchmod, fchown,
        fstat, mkdirat, openat2, readlinkat, renameat, renameat_with, statat, symlinkat, unlinkat,
    },
    io::Errno,
};

/// Nothing is led out of a directory, and nothing in it leads elsewhere.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);
/// The same, but links that stay below are followed.
const LED: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// A name without what it names: opening it does nothing to it.
const HANDLE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// The kernel gives up a walk through ".." that a rename disturbs; a pod may rename
/// for as long as it likes.
const UNDISTURBED: usize = 32;

/// Whose a file is, and who may what with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    pub uid: u32,
    pub gid: u32,
    /// Permission bits and the three above them (0o0000 to 0o7777).
    pub mode: u32,
}

impl Owned {
    /// The agent's own: root's.
    pub fn ours(mode: u32) -> Self {
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            mode,
        }
    }

    /// Makes an open file or directory so. The owner first: a change of it clears bits.
    fn give(self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let stat = fstat(fd)?;
        if (stat.st_uid, stat.st_gid) != (self.uid, self.gid) {
            fchown(fd, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        }
        Ok(fchmod(fd, Mode::from_raw_mode(self.mode))?)
    }

    fn is_of(self, stat: &Stat) -> bool {
        (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (self.uid, self.gid, self.mode)
    }
}

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
}

impl Directory {
    /// Opens one by a path that is the host's own: only root can change what is above it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(flag_bits(OFlags::DIRECTORY | OFlags::NOFOLLOW))
            .open(path)?;
        Ok(Self { fd: opened.into() })
    }

    /// The same, made with all above it if it is not there: root's alone.
    pub fn ensure(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        Self::open(path)
    }

    /// Opens a directory below.
    pub fn directory(&self, path: impl AsRef<Path>) -> io::Result<Self> {
        let fd = openat2(&self.fd, path.as_ref(), DIRECTORY, Mode::empty(), CONFINED)?;
        Ok(Self { fd })
    }

    /// Makes a directory that must not be there yet.
    pub fn make(&self, name: &str, owned: Owned) -> io::Result<Self> {
        mkdirat(&self.fd, one_name(name)?, Mode::RWXU)?;
        let made = self.directory(name)?;
        owned.give(made.fd.as_fd())?;
        Ok(made)
    }

    /// Makes this directory somebody's.
    pub fn own(&self, owned: Owned) -> io::Result<()> {
        owned.give(self.fd.as_fd())
    }

    /// Makes a directory, or opens the one there is and leaves it as it is.
    pub fn make_or_open(&self, name: &str, owned: Owned) -> io::Result<Self> {
        match self.make(name, owned) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.directory(name),
            made => made,
        }
    }

    /// Opens a regular file below, for reading.
    pub fn file(&self, path: impl AsRef<Path>) -> io::Result<fs::File> {
        let handle = openat2(&self.fd, path.as_ref(), HANDLE, Mode::empty(), CONFINED)?;
        if FileType::from_raw_mode(fstat(&handle)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        // What was looked at is what is opened.
        fs::OpenOptions::new()
            .read(true)
            .custom_flags(flag_bits(OFlags::NONBLOCK))
            .open(through(&handle))
    }

    /// Whether a regular file below is owned like this and holds exactly this. Reads
    /// no more than `content` has.
    pub fn holds(&self, path: impl AsRef<Path>, content: &[u8], owned: Owned) -> io::Result<bool> {
        let mut file = match self.file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let stat = fstat(&file)?;
        if !owned.is_of(&stat) || u64::try_from(stat.st_size).ok() != u64::try_from(content.len()).ok() {
            return Ok(false);
        }
        let mut block = [0; 16 << 10];
        let mut left = content;
        while !left.is_empty() {
            let most = block.len().min(left.len());
            let read = file.read(&mut block[..most])?;
            let Some((wanted, rest)) = left.split_at_checked(read).filter(|_| read > 0) else {
                return Ok(false);
            };
            if block[..read] != *wanted {
                return Ok(false);
            }
            left = rest;
        }
        Ok(true)
    }

    /// Makes a file that must not be there yet.
    pub fn create(&self, name: &str, content: &[u8], owned: Owned) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat2(
            &self.fd,
            one_name(name)?,
            flags,
            Mode::RUSR | Mode::WUSR,
            CONFINED,
        )?;
        let mut file = fs::File::from(fd);
        file.write_all(content)?;
        owned.give(file.as_fd())
    }

    /// Writes a file whole, in place of what has its name: a reader sees the old one
    /// or the new one.
    pub fn replace(&self, name: &str, content: &[u8], owned: Owned) -> io::Result<()> {
        let beside = format!("{name}.new");
        self.unlink(&beside)?;
        self.create(&beside, content, owned)?;
        self.rename(&beside, name)
    }

    /// Removes a name that is no directory. Fine if there is none.
    pub fn unlink(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        match unlinkat(&self.fd, one_name(name.as_ref())?, AtFlags::empty()) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What has the name; None if nothing has.
    pub fn kind(&self, name: impl AsRef<OsStr>) -> io::Result<Option<FileType>> {
        match statat(&self.fd, one_name(name.as_ref())?, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Where a link leads; None if the name is not there or is no link.
    pub fn link(&self, name: &str) -> io::Result<Option<PathBuf>> {
        match readlinkat(&self.fd, one_name(name)?, Vec::new()) {
            Ok(target) => Ok(Some(PathBuf::from(OsStr::from_bytes(target.as_bytes())))),
            Err(Errno::NOENT | Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub fn symlink(&self, target: &Path, name: &str) -> io::Result<()> {
        Ok(symlinkat(target, &self.fd, one_name(name)?)?)
    }

    /// Gives something another name here, in place of what has that name.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, one_name(from)?, &self.fd, one_name(to)?)?)
    }

    /// The same, refused if something has the name.
    pub fn rename_to_new(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (one_name(from)?, one_name(to)?);
        Ok(renameat_with(
            &self.fd,
            from,
            &self.fd,
            to,
            RenameFlags::NOREPLACE,
        )?)
    }

    /// What is in it, one after the other, without "." and "..".
    pub fn entries(&self) -> io::Result<Entries> {
        Ok(Entries {
            dir: Dir::new(openat2(&self.fd, ".", DIRECTORY, Mode::empty(), CONFINED)?)?,
        })
    }

    /// Opens a path below for being mounted, and makes directories that are missing,
    /// with the mode of this one. Links that are there are followed as long as they
    /// stay below; nothing is made through one.
    pub fn sub_path(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(fstat(&self.fd)?.st_mode & 0o7777);
        let mut known = PathBuf::new();
        let mut parts = path.components().peekable();
        let mut at = self.fd.try_clone()?;
        // As far as it is there.
        while let Some(part) = parts.peek() {
            let Component::Normal(name) = part else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            known.push(name);
            match undisturbed(|| openat2(&self.fd, &known, flags, Mode::empty(), LED)) {
                Ok(fd) => at = fd,
                Err(Errno::NOENT) => break,
                Err(error) => return Err(error.into()),
            }
            parts.next();
        }
        for part in parts {
            let Component::Normal(name) = part else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            match mkdirat(&at, name, Mode::RWXU) {
                Ok(()) => {
                    let made = openat2(&at, name, DIRECTORY, Mode::empty(), CONFINED)?;
                    fchmod(&made, mode)?;
                    at = made;
                }
                // Another container of the pod was quicker.
                Err(Errno::EXIST) => at = openat2(&at, name, flags, Mode::empty(), CONFINED)?,
                Err(error) => return Err(error.into()),
            }
        }
        match FileType::from_raw_mode(fstat(&at)?.st_mode) {
            FileType::CharacterDevice | FileType::BlockDevice => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a device"))
            }
            _ => Ok(at),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Names in a directory, as bytes: not all are UTF-8.
#[derive(Debug)]
pub struct Entries {
    dir: Dir,
}

impl Iterator for Entries {
    type Item = io::Result<std::ffi::OsString>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.dir.read()? {
                Ok(entry) => match entry.file_name().to_bytes() {
                    b"." | b".." => {}
                    name => return Some(Ok(OsStr::from_bytes(name).to_owned())),
                },
                Err(error) => return Some(Err(error.into())),
            }
        }
    }
}

/// The path by which the kernel finds what is open.
pub fn through(opened: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

/// A name within a directory, not a path.
fn one_name<N: AsRef<OsStr> + ?Sized>(name: &N) -> io::Result<&OsStr> {
    let name = name.as_ref();
    let bytes = name.as_bytes();
    if bytes.is_empty() || matches!(bytes, b"." | b"..") || bytes.contains(&b'/') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a name within a directory",
        ));
    }
    Ok(name)
}

fn undisturbed<T>(mut walk: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..UNDISTURBED {
        match walk() {
            Err(Errno::AGAIN) => {}
            done => return done,
        }
    }
    walk()
}

fn flag_bits(flags: OFlags) -> i32 {
    // The kernel's flags fit: the type is an int in open(2).
    i32::try_from(flags.bits()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
