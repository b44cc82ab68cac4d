//! A sandbox's volumes and the small files every pod gets. Called by `perform`,
//! on a thread that may block.
//!
//! What always holds:
//! - contents that are sensitive are on a tmpfs only;
//! - the files of a volume change all at once, as a kubelet changes them: readers
//!   follow the link `..data`, which is replaced in one rename;
//! - a sub-path is opened without leaving its volume, once, and what was opened is
//!   what is mounted, whatever a pod does to links meanwhile;
//! - every step may be repeated.

pub mod change;
mod files;
mod given;
mod mounts;
mod ownership;
pub mod usage;

use std::{
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use pool_agent_api::{
    SandboxSpec, VolumeName,
    spec::{Container, EmptyDir, Mount, PodSecurity, Volume, VolumeSource},
};

use crate::{
    confined::{Directory, Owned, removal::Removal, slices::in_slices},
    cri::config::HostMount,
    layout::SandboxDirs,
    policy::files::Files as Bounds,
};
use files::Staged;
use ownership::{InvalidId, Ownership};

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("{action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        // Shown above too: this text goes to the pod's Events, without its sources.
        source: io::Error,
    },
    #[error("volume {volume}: {source}")]
    Volume {
        volume: VolumeName,
        source: Box<VolumeError>,
    },
    #[error("securityContext.fsGroup: {0}")]
    Group(#[from] InvalidId),
    #[error("the work broke off")]
    BrokeOff,
    #[error("subPath {path:?} of volume {volume}: {problem}")]
    SubPath {
        volume: VolumeName,
        path: String,
        problem: String,
    },
}

pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::File { action, path, source }
}

fn within(volume: &Volume) -> impl FnOnce(VolumeError) -> VolumeError {
    let volume = volume.name.clone();
    move |source| VolumeError::Volume {
        volume,
        source: Box::new(source),
    }
}

/// Makes every volume of the spec, with contents.
pub async fn prepare(spec: SandboxSpec, dirs: SandboxDirs, bounds: Bounds) -> Result<(), VolumeError> {
    let left = blocking(move || {
        given::mounted(&dirs, bounds.given_bytes)?;
        for volume in &spec.volumes {
            if let VolumeSource::EmptyDir(empty) = &volume.source {
                make_empty(volume, *empty, &spec, &dirs).map_err(within(volume))?;
            }
        }
        if spec.volumes.iter().any(in_memory) {
            mount_memory(&dirs, bounds)?;
        }
        Stage::set(&spec.volumes, &spec.security, &dirs)?.commit()
    })
    .await?;
    clear_away(left).await
}

/// New contents of file volumes, beside what they hold. Nothing a program sees has
/// changed, and dropping it changes nothing.
#[derive(Debug)]
pub struct Stage {
    volumes: Vec<(PathBuf, Volume, Staged)>,
}

impl Stage {
    /// Lays out the contents of those that are file volumes: all of them, or none.
    pub fn set(volumes: &[Volume], security: &PodSecurity, dirs: &SandboxDirs) -> Result<Self, VolumeError> {
        let ownership = Ownership::of(security)?;
        let mut stage = Self { volumes: vec![] };
        for volume in volumes {
            let VolumeSource::Files(files) = &volume.source else {
                continue;
            };
            let path = place(volume, dirs);
            let parent = path.parent().unwrap_or(&path);
            let staged = Directory::ensure(parent)
                .and_then(|parent| parent.make_or_open(volume.name.as_str(), Owned::ours(0o755)))
                .and_then(|directory| files::stage(directory, files, ownership))
                .map_err(|source| within(volume)(at("writing", &path)(source)));
            match staged {
                Ok(staged) => stage.volumes.push((path, volume.clone(), staged)),
                Err(error) => {
                    stage.discard();
                    return Err(error);
                }
            }
        }
        Ok(stage)
    }

    /// Puts the contents in place. What they were is left to be removed.
    pub fn commit(self) -> Result<Vec<Removal>, VolumeError> {
        let mut left = vec![];
        for (path, volume, staged) in self.volumes {
            let old = staged
                .commit()
                .map_err(|source| within(&volume)(at("replacing", &path)(source)))?;
            left.extend(old);
        }
        Ok(left)
    }

    pub fn discard(self) {
        for (_, _, staged) in self.volumes {
            staged.discard();
        }
    }
}

/// Removes what is left over, in turns: all that can be, and tells of the first that
/// cannot.
pub async fn clear_away(left: Vec<Removal>) -> Result<(), VolumeError> {
    let mut result = Ok(());
    for removal in left {
        let name = removal.name();
        let removed = in_slices(removal).await.and_then(|done| done);
        result = result.and(removed.map_err(at("removing", &name)));
    }
    result
}

/// An emptyDir that is in use is left alone: its modes are the pod's own.
fn make_empty(
    volume: &Volume,
    empty: EmptyDir,
    spec: &SandboxSpec,
    dirs: &SandboxDirs,
) -> Result<(), VolumeError> {
    let path = place(volume, dirs);
    let owned = Ownership::of(&spec.security)?.empty_dir();
    let name = volume.name.as_str();
    let parent = Directory::ensure(path.parent().unwrap_or(&path)).map_err(at("making", &path))?;
    if empty.memory {
        // Mounted by an agent that died before it went on: opening it would cross into it.
        if mounts::is_mount_point(&path) {
            return Ok(());
        }
        let on = parent
            .make_or_open(name, Owned::ours(0o700))
            .map_err(at("making", &path))?;
        let bytes = [empty.size_limit_bytes, memory_limit(spec)]
            .into_iter()
            .flatten()
            .min();
        let room = mounts::Room { bytes, inodes: None };
        return mounts::tmpfs(&on, room, owned).map_err(at("mounting", &path));
    }
    let make = || {
        if parent.kind(name)?.is_some() {
            return parent.directory(name).map(drop);
        }
        // It has its name only once it is whole. No volume has a name like this.
        let beside = format!(".{name}");
        parent.make_or_open(&beside, owned)?.own(owned)?;
        parent.rename_to_new(&beside, name)
    };
    make().map_err(at("making", &path))
}

/// What all containers together may use, if each has a limit: as a kubelet sizes what
/// has no limit of its own.
fn memory_limit(spec: &SandboxSpec) -> Option<u64> {
    spec.all_containers()
        .map(|container| container.resources.memory_limit_bytes.filter(|&bytes| bytes > 0))
        .try_fold(0_u64, |sum, limit| Some(sum.saturating_add(limit?)))
}

fn in_memory(volume: &Volume) -> bool {
    matches!(&volume.source, VolumeSource::Files(files) if files.sensitive())
}

/// The pod's tmpfs for contents that must not reach a disk.
fn mount_memory(dirs: &SandboxDirs, bounds: Bounds) -> Result<(), VolumeError> {
    let path = dirs.memory();
    let on = Directory::ensure(&path).map_err(at("making", &path))?;
    if mounts::is_mount_point(&path) {
        return Ok(());
    }
    // There are two versions for a moment.
    let bytes = bounds.contents_bytes.saturating_mul(2);
    let room = mounts::Room {
        bytes: Some(bytes),
        inodes: Some(bytes / crate::policy::files::PAGE),
    };
    mounts::tmpfs(&on, room, Owned::ours(0o755)).map_err(at("mounting", &path))
}

/// The emptyDirs on disk, with their limits (0 is none). Those in memory are held to
/// theirs by the kernel.
pub fn on_disk(spec: &SandboxSpec, dirs: &SandboxDirs) -> Vec<(VolumeName, PathBuf, Option<u64>)> {
    spec.volumes
        .iter()
        .filter_map(|volume| match &volume.source {
            VolumeSource::EmptyDir(empty) if !empty.memory => Some((
                volume.name.clone(),
                place(volume, dirs),
                empty.size_limit_bytes.filter(|&limit| limit > 0),
            )),
            _ => None,
        })
        .collect()
}

/// The directory that is a volume.
fn place(volume: &Volume, dirs: &SandboxDirs) -> PathBuf {
    match &volume.source {
        VolumeSource::EmptyDir(empty) if empty.memory => dirs.memory_volume(&volume.name),
        VolumeSource::EmptyDir(_) => dirs.disk_volume(&volume.name),
        VolumeSource::Files(files) if files.sensitive() => dirs.memory().join(volume.name.as_str()),
        VolumeSource::Files(_) => dirs.disk_volume(&volume.name),
    }
}

/// What a container mounts: its volumes, the small files it is given, and where its
/// last words go. Makes what has to exist before the runtime mounts it.
pub fn mounts(
    spec: &SandboxSpec,
    container: &Container,
    restart: u32,
    dirs: &SandboxDirs,
    addresses: (Ipv4Addr, std::net::IpAddr),
    bounds: Bounds,
) -> Result<Vec<HostMount>, VolumeError> {
    let given = given::mounted(dirs, bounds.given_bytes)?;
    mounts_beside(&given, spec, container, restart, dirs, addresses)
}

fn mounts_beside(
    given: &Directory,
    spec: &SandboxSpec,
    container: &Container,
    restart: u32,
    dirs: &SandboxDirs,
    (pod_ip, host_ip): (Ipv4Addr, std::net::IpAddr),
) -> Result<Vec<HostMount>, VolumeError> {
    let mut all = vec![];
    for (i, mount) in container.mounts.iter().enumerate() {
        let Some(volume) = spec.volumes.iter().find(|v| v.name == mount.volume) else {
            // A spec with such a mount is refused where it enters.
            continue;
        };
        let root = place(volume, dirs);
        let host_path = match &mount.sub_path {
            None => root,
            Some(text) => {
                let sub_path = text.render(pod_ip.into(), host_ip);
                let place = dirs.sub_paths().join(container.name.as_str());
                sub_path_mount(mount, &root, &sub_path, &place, &i.to_string())?
            }
        };
        all.push(HostMount {
            host_path,
            container_path: mount.mount_path.clone(),
            // Files come from the cluster: a pod cannot write back.
            read_only: mount.read_only || matches!(volume.source, VolumeSource::Files(_)),
        });
    }
    let mounted = |path: &str| container.mounts.iter().any(|m| m.mount_path == path);
    given::write(given, spec, pod_ip, dirs)?;
    for (host_path, container_path) in [
        (dirs.hosts(), "/etc/hosts"),
        (dirs.hostname(), "/etc/hostname"),
        (dirs.resolver(), "/etc/resolv.conf"),
    ] {
        if !mounted(container_path) {
            all.push(HostMount {
                host_path,
                container_path: container_path.into(),
                read_only: container.security.read_only_root_filesystem,
            });
        }
    }
    let message_path = &container.termination_message.path;
    if !message_path.is_empty() && !mounted(message_path) {
        given::message(given, &container.name, restart, dirs)?;
        all.push(HostMount {
            host_path: dirs.message(&container.name, restart),
            container_path: message_path.clone(),
            read_only: false,
        });
    }
    Ok(all)
}

/// What was opened is what is mounted, at a place of the host's own: that is what the
/// runtime is told of, so that nothing can be swapped under it.
fn sub_path_mount(
    mount: &Mount,
    root: &Path,
    sub_path: &str,
    place: &Path,
    name: &str,
) -> Result<PathBuf, VolumeError> {
    let refuse = |problem: String| VolumeError::SubPath {
        volume: mount.volume.clone(),
        path: sub_path.to_owned(),
        problem,
    };
    Mount::check_sub_path(sub_path).map_err(|e| refuse(e.problem))?;
    let opened = Directory::open(root)
        .and_then(|root| root.sub_path(Path::new(sub_path)))
        .map_err(|e| refuse(e.to_string()))?;
    mounts::bind(&opened, place, name).map_err(at("mounting", &place.join(name)))
}

/// Unmounts the volumes and removes their contents. Fine if nothing is there. What
/// containers were given stays: their last words are read later.
pub async fn release(dirs: &SandboxDirs) -> Result<(), VolumeError> {
    let volumes = [
        dirs.sub_paths(),
        dirs.memory(),
        dirs.memory_volumes(),
        dirs.disk_volumes(),
    ];
    unmount(volumes.to_vec()).await?;
    for path in &volumes {
        remove_directory(path).await?;
    }
    Ok(())
}

/// Removes both directories of a sandbox.
pub async fn remove(dirs: &SandboxDirs) -> Result<(), VolumeError> {
    unmount(vec![dirs.run().to_owned()]).await?;
    remove_directory(dirs.disk()).await?;
    remove_directory(dirs.run()).await
}

/// Takes the two directories of a sandbox out of the way at once, and leaves what was
/// in them to be removed.
pub fn put_aside(dirs: &SandboxDirs) -> Result<Vec<Removal>, VolumeError> {
    mounts::unmount_below(dirs.run()).map_err(at("unmounting below", dirs.run()))?;
    let mut left = vec![];
    for path in [dirs.disk(), dirs.run()] {
        left.extend(aside(path).map_err(at("putting aside", path))?);
    }
    Ok(left)
}

/// What names of what was put aside begin with; no sandbox's does.
pub const ASIDE: &str = ".aside-";

fn aside(path: &Path) -> io::Result<Option<Removal>> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else {
        return Ok(None);
    };
    let parent = match Directory::open(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        parent => parent?,
    };
    let name = name.to_string_lossy();
    if parent.kind(&*name)?.is_none() {
        return Ok(None);
    }
    let aside = format!("{ASIDE}{name}");
    match parent.rename_to_new(&name, &aside) {
        Ok(()) => Ok(Some(Removal::of(&parent, &aside)?)),
        // Put aside before, and not yet gone: it goes where it is.
        Err(_) => Ok(Some(Removal::of(&parent, &*name)?)),
    }
}

async fn unmount(paths: Vec<PathBuf>) -> Result<(), VolumeError> {
    blocking(move || {
        paths
            .iter()
            .try_for_each(|path| mounts::unmount_below(path).map_err(at("unmounting below", path)))
    })
    .await
}

async fn remove_directory(path: &Path) -> Result<(), VolumeError> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else {
        return Ok(());
    };
    let removal = match Directory::open(parent).and_then(|parent| Removal::of(&parent, name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removal => removal.map_err(at("removing", path))?,
    };
    in_slices(removal)
        .await
        .and_then(|done| done)
        .map_err(at("removing", path))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(VolumeError::BrokeOff))
}

/// Writes a file of the host's own whole: a reader sees the old one or the new one.
pub(crate) fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<(), VolumeError> {
    let Some((directory, name)) = path.parent().zip(path.file_name()) else {
        return Err(at("writing", path)(io::ErrorKind::InvalidInput.into()));
    };
    Directory::ensure(directory)
        .and_then(|directory| directory.replace(&name.to_string_lossy(), content, Owned::ours(mode)))
        .map_err(at("writing", path))
}

#[cfg(test)]
mod tests;
