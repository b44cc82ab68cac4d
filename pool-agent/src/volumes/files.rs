//! A directory of given files, replaced all at once.
//!
//! ```text
//! volume/name          → ..data/name        what a program opens
//! volume/..data        → ..v3               replaced by one rename
//! volume/..v3/name                          the contents
//! ```
//!
//! A container has it mounted read-only; one that may mount makes that undone. So
//! nothing that is found in it is believed: a link other than these is replaced,
//! anything else removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use pool_agent_api::spec::{File, Files};

use super::ownership::{InvalidId, Ownership};
use crate::confined::{Directory, Owned, removal::Removal, slices::at_once};

const CURRENT: &str = "..data";
const NEXT: &str = "..data_tmp";
const VERSION: &str = "..v";
/// Names that are tried for a version: those that are taken are left over, or planted.
const NAMES: u64 = 1024;

/// A volume whose next contents lie beside the current ones.
#[derive(Debug)]
pub(super) struct Staged {
    volume: Directory,
    /// None: the current ones are these.
    version: Option<String>,
    /// Names in the volume's root, which link into the current version.
    names: BTreeSet<String>,
}

/// Puts the files beside what the volume holds. Nothing a program sees changes.
pub(super) fn stage(volume: Directory, files: &Files, ownership: Ownership) -> io::Result<Staged> {
    let names = files
        .iter()
        .map(|file| first_part(&file.path).to_owned())
        .collect();
    let current = current(&volume)?;
    if let Some(current) = &current
        && same(&volume, current, files, ownership)?
    {
        return Ok(Staged {
            volume,
            version: None,
            names,
        });
    }
    let (version, directory) = next_version(&volume, current.as_deref())?;
    let filled = fill(&directory, files, ownership);
    let staged = Staged {
        volume,
        version: Some(version),
        names,
    };
    match filled {
        Ok(()) => Ok(staged),
        Err(error) => {
            staged.discard();
            Err(error)
        }
    }
}

impl Staged {
    /// Makes the volume hold these files and no others. What is left over is removed
    /// by whoever has the time.
    pub(super) fn commit(self) -> io::Result<Vec<Removal>> {
        let volume = &self.volume;
        if let Some(version) = &self.version {
            clear(volume, NEXT)?;
            volume.symlink(Path::new(version), NEXT)?;
            put(volume, NEXT, CURRENT)?;
        }
        for name in &self.names {
            let target = Path::new(CURRENT).join(name);
            if volume.link(name)?.as_ref() != Some(&target) {
                clear(volume, NEXT)?;
                volume.symlink(&target, NEXT)?;
                put(volume, NEXT, name)?;
            }
        }
        let current = current(volume)?;
        let kept = |name: &OsString| {
            name.to_str().is_some_and(|name| {
                name == CURRENT || Some(name) == current.as_deref() || self.names.contains(name)
            })
        };
        let mut left = vec![];
        for name in volume.entries()? {
            let name = name?;
            if kept(&name) {
                continue;
            }
            // A link goes at once: nobody may open what is gone.
            if volume.unlink(&name).is_err() {
                left.push(Removal::of(volume, &name)?);
            }
            if left.len() >= LEFT {
                break;
            }
        }
        Ok(left)
    }

    /// Leaves the volume as it was.
    pub(super) fn discard(self) {
        let Some(version) = self.version else {
            return;
        };
        if let Err(error) = Removal::of(&self.volume, &version).and_then(at_once) {
            // The next change removes it.
            tracing::debug!(error = %error, "contents that were not used stay for now");
        }
    }
}

/// Directories that one change removes at most; there is one, unless a pod plants some.
const LEFT: usize = 16;

fn first_part(path: &str) -> &str {
    path.split('/').next().unwrap_or(path)
}

/// The name of the current version; None if the link is not one of ours.
fn current(volume: &Directory) -> io::Result<Option<String>> {
    let target = volume.link(CURRENT)?;
    Ok(target
        .as_ref()
        .and_then(|target| target.to_str())
        .filter(|target| number(target).is_some())
        .map(str::to_owned))
}

fn number(version: &str) -> Option<u64> {
    let digits = version.strip_prefix(VERSION)?;
    digits.parse().ok().filter(|n: &u64| n.to_string() == digits)
}

fn next_version(volume: &Directory, current: Option<&str>) -> io::Result<(String, Directory)> {
    let first = current.and_then(number).unwrap_or(0);
    for n in 1..=NAMES {
        let version = format!("{VERSION}{}", first.wrapping_add(n));
        match volume.make(&version, Owned::ours(0o755)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return Ok((version, made?)),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AlreadyExists,
        "every name for a version is taken",
    ))
}

fn fill(version: &Directory, files: &Files, ownership: Ownership) -> io::Result<()> {
    for (path, inside) in directories(files) {
        let directory = match path.to_str() {
            // The version itself.
            Some("") => version.directory(".")?,
            _ => version.directory(&path)?,
        };
        for name in inside.directories {
            directory.make(name, Owned::ours(0o755))?;
        }
        for (name, file) in inside.files {
            let owned = ownership.file(file).map_err(invalid)?;
            directory.create(name, &file.content, owned)?;
        }
    }
    // Only now the group's: what is made in a directory of a group is the group's too.
    for path in directories(files).keys() {
        let directory = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        version.directory(directory)?.own(ownership.directory())?;
    }
    Ok(())
}

#[derive(Default)]
struct Inside<'a> {
    directories: BTreeSet<&'a str>,
    files: Vec<(&'a str, &'a File)>,
}

/// What is in each directory, those above before those below.
fn directories(files: &Files) -> BTreeMap<PathBuf, Inside<'_>> {
    let mut all: BTreeMap<PathBuf, Inside<'_>> = BTreeMap::new();
    all.entry(PathBuf::new()).or_default();
    for file in files.iter() {
        let mut at = PathBuf::new();
        let mut parts = file.path.split('/').peekable();
        while let Some(part) = parts.next() {
            let inside = all.entry(at.clone()).or_default();
            if parts.peek().is_some() {
                inside.directories.insert(part);
                at.push(part);
                all.entry(at.clone()).or_default();
            } else {
                inside.files.push((part, file));
            }
        }
    }
    all
}

/// Whether a version holds exactly these files.
fn same(volume: &Directory, version: &str, files: &Files, ownership: Ownership) -> io::Result<bool> {
    let Ok(version) = volume.directory(version) else {
        return Ok(false);
    };
    for (path, inside) in directories(files) {
        let at = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &path
        };
        let Ok(directory) = version.directory(at) else {
            return Ok(false);
        };
        let mut there = 0;
        let wanted = inside.directories.len() + inside.files.len();
        for entry in directory.entries()? {
            entry?;
            there += 1;
            if there > wanted {
                return Ok(false);
            }
        }
        if there != wanted {
            return Ok(false);
        }
        for (name, file) in inside.files {
            let owned = ownership.file(file).map_err(invalid)?;
            if !directory.holds(name, &file.content, owned).unwrap_or(false) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Gives a link its name, whatever has it.
fn put(volume: &Directory, from: &str, to: &str) -> io::Result<()> {
    match volume.rename(from, to) {
        // A directory was planted there.
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
            clear(volume, to)?;
            volume.rename(from, to)
        }
        done => done,
    }
}

fn clear(volume: &Directory, name: &str) -> io::Result<()> {
    Removal::of(volume, name).and_then(at_once)
}

fn invalid(error: InvalidId) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
