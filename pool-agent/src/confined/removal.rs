//! Removing a tree that a pod has made, and may still be making.
//!
//! A directory within a directory is moved up into the tree's root, where its turn
//! comes later: so nothing lies deeper than two levels when it is removed, and a tree
//! of any depth costs two descriptors, no path and no stack.
//!
//! ```text
//! tree/a/b/c      → tree/a, tree/.removed-0/c      → tree/.removed-0, tree/.removed-1 → …
//! ```
//!
//! What always holds: only what is below the tree's descriptor is touched; a link is
//! removed, not what it leads to; a mount point stays, and is told of.

use std::{
    ffi::{CStr, CString, OsStr},
    io,
    ops::ControlFlow,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{
        AtFlags, Dir, DirEntry, FileType, IFlags, Mode, RenameFlags, fstat, ioctl_getflags, ioctl_setflags,
        openat2, renameat_with, unlinkat,
    },
    io::Errno,
};

use super::{CONFINED, DIRECTORY, Directory, HANDLE, one_name, slices::Work, through};

/// How often the root is gone through. One pass removes a tree that nobody disturbs;
/// a full disk, or a directory that may hold no more, takes a few. A pod that fills
/// what is being removed is not raced for ever.
const PASSES: u32 = 64;
/// Names that are tried for a directory that is moved up. They are this process's
/// own, so that one is taken only by what an earlier process of its number left.
const NAMES: u32 = 1024;
/// Tells the names of one removal from those of another.
static REMOVALS: AtomicU64 = AtomicU64::new(0);

/// Removes one name of a directory with all that is below it.
#[derive(Debug)]
pub struct Removal {
    parent: OwnedFd,
    name: CString,
    state: State,
}

#[derive(Debug)]
enum State {
    Begin,
    Emptying(Box<Tree>),
}

#[derive(Debug)]
struct Tree {
    root: OwnedFd,
    listing: Dir,
    /// The directory below the root that is being emptied.
    inner: Option<Inner>,
    /// Numbers of those moved up: `done` of `made` have been seen to.
    made: u64,
    done: u64,
    prefix: String,
    passes: u32,
    /// Something went away in this pass.
    progress: bool,
    /// The first that could not be removed in this pass.
    trouble: Option<io::Error>,
}

#[derive(Debug)]
struct Inner {
    name: CString,
    dir: Dir,
}

impl Removal {
    /// Fine if nothing has the name.
    pub fn of(parent: &Directory, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let name = CString::new(one_name(name.as_ref())?.as_bytes())?;
        Ok(Self {
            parent: parent.fd.try_clone()?,
            name,
            state: State::Begin,
        })
    }

    /// What is removed, within its directory.
    pub fn name(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(self.name.to_bytes()))
    }

    fn begin(&mut self) -> ControlFlow<io::Result<()>> {
        match without_flags(self.parent.as_fd(), &self.name, || {
            unlinkat(&self.parent, &self.name, AtFlags::empty())
        }) {
            Ok(()) | Err(Errno::NOENT) => return ControlFlow::Break(Ok(())),
            Err(Errno::ISDIR) => {}
            Err(error) => return ControlFlow::Break(Err(named(&self.name, error))),
        }
        match Tree::open(self.parent.as_fd(), &self.name) {
            Ok(tree) => {
                self.state = State::Emptying(Box::new(tree));
                ControlFlow::Continue(())
            }
            Err(Errno::NOENT) => ControlFlow::Break(Ok(())),
            Err(error) => ControlFlow::Break(Err(named(&self.name, error))),
        }
    }
}

impl Work for Removal {
    type Output = io::Result<()>;

    fn go_on(&mut self, entries: usize) -> ControlFlow<io::Result<()>> {
        for _ in 0..entries {
            match &mut self.state {
                State::Begin => self.begin()?,
                State::Emptying(tree) => {
                    if tree.step() {
                        continue;
                    }
                    let gone = without_flags(self.parent.as_fd(), &self.name, || {
                        unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR)
                    });
                    match gone {
                        Ok(()) | Err(Errno::NOENT) => return ControlFlow::Break(Ok(())),
                        Err(error) => tree.again(named(&self.name, error)).map_break(Err)?,
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }
}

impl Tree {
    fn open(parent: BorrowedFd<'_>, name: &CStr) -> Result<Self, Errno> {
        let root = openat2(parent, name, DIRECTORY, Mode::empty(), CONFINED)?;
        let listing = Dir::new(openat2(&root, ".", DIRECTORY, Mode::empty(), CONFINED)?)?;
        let number = REMOVALS.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            root,
            listing,
            inner: None,
            made: 0,
            done: 0,
            prefix: format!(".removed-{}-{number}-", std::process::id()),
            passes: 0,
            progress: false,
            trouble: None,
        })
    }

    /// Sees to one entry. False: the pass is over.
    fn step(&mut self) -> bool {
        if let Some(inner) = &mut self.inner {
            match inner.dir.read() {
                Some(Ok(entry)) => self.take_inner(&entry),
                Some(Err(error)) => {
                    self.note(named(c"a directory", error));
                    self.leave();
                }
                None => self.leave(),
            }
            return true;
        }
        if self.done < self.made {
            let name = self.moved_up(self.done);
            self.done += 1;
            self.enter(&name);
            return true;
        }
        match self.listing.read() {
            Some(Ok(entry)) => {
                if !is_dots(&entry) && !self.unlinked(None, &entry) {
                    self.enter(entry.file_name());
                }
                true
            }
            Some(Err(error)) => {
                self.note(named(c"a directory", error));
                false
            }
            None => false,
        }
    }

    /// Begins another pass, or gives up.
    fn again(&mut self, error: io::Error) -> ControlFlow<io::Error> {
        self.passes += 1;
        if !self.progress || self.passes >= PASSES {
            return ControlFlow::Break(self.trouble.take().unwrap_or(error));
        }
        self.progress = false;
        self.trouble = None;
        self.listing.rewind();
        ControlFlow::Continue(())
    }

    fn take_inner(&mut self, entry: &DirEntry) {
        let Some(inner) = self.inner.take() else {
            return;
        };
        if !is_dots(entry) {
            let name = entry.file_name();
            if !self.unlinked(Some(&inner), entry) {
                match inner.dir.fd() {
                    Ok(fd) => match without_flags(fd, name, || unlinkat(fd, name, AtFlags::REMOVEDIR)) {
                        Ok(()) => self.progress = true,
                        Err(Errno::NOENT) => {}
                        Err(Errno::NOTEMPTY | Errno::EXIST) => self.move_up(fd, name),
                        Err(error) => self.note(named(name, error)),
                    },
                    Err(error) => self.note(named(name, error)),
                }
            }
        }
        self.inner = Some(inner);
    }

    /// Removes what is no directory. False: it is one.
    fn unlinked(&mut self, inner: Option<&Inner>, entry: &DirEntry) -> bool {
        if entry.file_type() == FileType::Directory {
            return false;
        }
        let name = entry.file_name();
        let fd = match inner.map(|inner| inner.dir.fd()).transpose() {
            Ok(fd) => fd.unwrap_or(self.root.as_fd()),
            Err(error) => {
                self.trouble.get_or_insert(named(name, error));
                return true;
            }
        };
        match without_flags(fd, name, || unlinkat(fd, name, AtFlags::empty())) {
            Ok(()) => self.progress = true,
            Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => return false,
            Err(error) => {
                self.trouble.get_or_insert(named(name, error));
            }
        }
        true
    }

    /// Goes into a directory of the root's, to empty it.
    fn enter(&mut self, name: &CStr) {
        let opened = openat2(&self.root, name, DIRECTORY, Mode::empty(), CONFINED).and_then(Dir::new);
        match opened {
            Ok(dir) => {
                self.inner = Some(Inner {
                    name: name.to_owned(),
                    dir,
                });
            }
            // Gone, or something else by now: the next pass sees it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(Errno::XDEV) => self.note(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("{}: something is mounted there", name.to_string_lossy()),
            )),
            Err(error) => self.note(named(name, error)),
        }
    }

    /// Removes the directory that has been emptied.
    fn leave(&mut self) {
        let Some(inner) = self.inner.take() else {
            return;
        };
        let name = &inner.name;
        match without_flags(self.root.as_fd(), name, || {
            unlinkat(&self.root, name, AtFlags::REMOVEDIR)
        }) {
            Ok(()) => self.progress = true,
            Err(Errno::NOENT) => {}
            Err(error) => self.note(named(name, error)),
        }
    }

    fn move_up(&mut self, from: BorrowedFd<'_>, name: &CStr) {
        for _ in 0..NAMES {
            let to = self.moved_up(self.made);
            let moved = without_flags(from, name, || {
                without_flags(self.root.as_fd(), c".", || {
                    renameat_with(from, name, &self.root, &to, RenameFlags::NOREPLACE)
                })
            });
            match moved {
                Ok(()) => {
                    self.made += 1;
                    return;
                }
                Err(Errno::EXIST) => self.made += 1,
                Err(Errno::NOENT) => return,
                Err(error) => return self.note(named(name, error)),
            }
        }
        self.note(named(name, Errno::EXIST));
    }

    fn moved_up(&self, number: u64) -> CString {
        // The prefix has no NUL.
        CString::new(format!("{}{number}", self.prefix)).unwrap_or_default()
    }

    fn note(&mut self, error: io::Error) {
        self.trouble.get_or_insert(error);
    }
}

fn is_dots(entry: &DirEntry) -> bool {
    matches!(entry.file_name().to_bytes(), b"." | b"..")
}

fn named(name: &CStr, error: Errno) -> io::Error {
    let source = io::Error::from(error);
    io::Error::new(source.kind(), format!("{}: {source}", name.to_string_lossy()))
}

/// Does something to a name; where that is not permitted, takes the flags that forbid
/// it (chattr(1): immutable, append only) from the directory and from what is named.
fn without_flags(
    directory: BorrowedFd<'_>,
    name: &CStr,
    act: impl Fn() -> Result<(), Errno>,
) -> Result<(), Errno> {
    match act() {
        Err(Errno::PERM | Errno::ACCESS) => {}
        done => return done,
    }
    // Neither has to be the one that forbids it, and not every file system has flags.
    if take_flags(directory) | take_flags_of(directory, name) {
        act()
    } else {
        Err(Errno::PERM)
    }
}

fn take_flags_of(directory: BorrowedFd<'_>, name: &CStr) -> bool {
    let Ok(handle) = openat2(directory, name, HANDLE, Mode::empty(), CONFINED) else {
        return false;
    };
    // To open a device would be to use it.
    let plain = fstat(&handle).is_ok_and(|stat| {
        matches!(
            FileType::from_raw_mode(stat.st_mode),
            FileType::RegularFile | FileType::Directory
        )
    });
    plain && std::fs::File::open(through(&handle)).is_ok_and(|opened| take_flags(opened.as_fd()))
}

fn take_flags(fd: BorrowedFd<'_>) -> bool {
    let forbidding = IFlags::IMMUTABLE | IFlags::APPEND;
    match ioctl_getflags(fd) {
        Ok(flags) if flags.intersects(forbidding) => ioctl_setflags(fd, flags - forbidding).is_ok(),
        _ => false,
    }
}
