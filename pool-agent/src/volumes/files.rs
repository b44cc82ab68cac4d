//! A directory of given files, replaced all at once.
//!
//! ```text
//! volume/name          → ..data/name        what a program opens
//! volume/..data        → ..v3               replaced by one rename
//! volume/..v3/name                          the contents
//! ```

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use nix::unistd::{Uid, chown};
use pool_agent_api::spec::{File, Files};

use super::{VolumeError, at, change_group, make_directory, remove_directory};

const CURRENT: &str = "..data";
const NEXT: &str = "..data_tmp";
const VERSION: &str = "..v";

/// Makes `volume` hold these files and no others. Nothing is touched if it does.
pub(super) fn replace(volume: &Path, files: &Files, group: Option<i64>) -> Result<(), VolumeError> {
    let current = volume.join(CURRENT);
    if same(&current, files) {
        return tidy(volume, files);
    }
    let old = match fs::read_link(&current) {
        Ok(target) => Some(target),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(at("reading", &current)(error)),
    };
    let number = old
        .as_ref()
        .and_then(|target| target.to_str()?.strip_prefix(VERSION)?.parse::<u64>().ok())
        .unwrap_or(0)
        .wrapping_add(1);
    let version = format!("{VERSION}{number}");
    let directory = volume.join(&version);
    // A version that was begun and never used.
    remove_directory(&directory)?;
    make_directory(&directory)?;
    open_to_all(&directory)?;
    for file in files.iter() {
        write(&directory, file)?;
    }
    if let Some(group) = group {
        give_to_group(&directory, group)?;
    }
    let next = volume.join(NEXT);
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at("replacing", &next)(error)),
        _ => {}
    }
    symlink(&version, &next).map_err(at("linking", &next))?;
    fs::rename(&next, &current).map_err(at("replacing", &current))?;
    open_to_all(volume)?;
    tidy(volume, files)?;
    if let Some(old) = old {
        remove_directory(&volume.join(old))?;
    }
    Ok(())
}

/// Names in the volume's root, which link into the current version.
fn names(files: &Files) -> BTreeSet<&str> {
    files
        .iter()
        .map(|file| file.path.split('/').next().unwrap_or(&file.path))
        .collect()
}

/// Links what is new and unlinks what is gone.
fn tidy(volume: &Path, files: &Files) -> Result<(), VolumeError> {
    let names = names(files);
    for name in &names {
        let link = volume.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(CURRENT).join(name), &link).map_err(at("linking", &link))?;
        }
    }
    for entry in fs::read_dir(volume).map_err(at("reading", volume))? {
        let entry = entry.map_err(at("reading", volume))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !names.contains(name.as_ref()) {
            fs::remove_file(entry.path()).map_err(at("removing", &entry.path()))?;
        }
    }
    Ok(())
}

fn write(directory: &Path, file: &File) -> Result<(), VolumeError> {
    let path = directory.join(&file.path);
    let mut below = directory.to_owned();
    for part in Path::new(&file.path)
        .parent()
        .into_iter()
        .flat_map(Path::components)
    {
        below.push(part);
        make_directory(&below)?;
        open_to_all(&below)?;
    }
    fs::write(&path, &file.content).map_err(at("writing", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))
        .map_err(at("setting the mode of", &path))?;
    if let Some(owner) = file.owner {
        u32::try_from(owner)
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "an owner is a number from 0 to 4294967295",
                )
            })
            .and_then(|uid| chown(&path, Some(Uid::from_raw(uid)), None).map_err(Into::into))
            .map_err(at("setting the owner of", &path))?;
    }
    Ok(())
}

fn open_to_all(directory: &Path) -> Result<(), VolumeError> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
        .map_err(at("setting the mode of", directory))
}

/// Gives a tree to a group, as a kubelet does for `fsGroup` on volumes that are
/// only read: files become readable to it, directories enterable.
pub(super) fn give_to_group(path: &Path, group: i64) -> Result<(), VolumeError> {
    change_group(path, group)?;
    let metadata = fs::symlink_metadata(path).map_err(at("reading", path))?;
    let mode = metadata.permissions().mode();
    let wanted = if metadata.is_dir() {
        mode | 0o2550
    } else {
        mode | 0o440
    };
    fs::set_permissions(path, fs::Permissions::from_mode(wanted)).map_err(at("setting the mode of", path))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).map_err(at("reading", path))? {
            let entry = entry.map_err(at("reading", path))?;
            if !entry.file_type().map_err(at("reading", path))?.is_symlink() {
                give_to_group(&entry.path(), group)?;
            }
        }
    }
    Ok(())
}

/// Whether the current version holds exactly these contents.
fn same(current: &Path, files: &Files) -> bool {
    let mut wanted = 0;
    for file in files.iter() {
        wanted += 1;
        let path = current.join(&file.path);
        if !fs::read(&path).is_ok_and(|content| content == file.content) {
            return false;
        }
    }
    current.exists() && count(current).is_ok_and(|there| there == wanted)
}

fn count(directory: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        files += if entry.file_type()?.is_dir() {
            count(&entry.path())?
        } else {
            1
        };
    }
    Ok(files)
}
