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

mod files;
mod mounts;
pub mod usage;

use std::{
    fs,
    io::{self, Write},
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, chown};
use pool_agent_api::{
    SandboxSpec, VolumeName,
    spec::{Container, Mount, PodSecurity, Volume, VolumeSource},
};

use crate::{cri::config::HostMount, layout::SandboxDirs};

/// A tmpfs for Secrets and tokens: each is at most 1 MiB, and there are two
/// versions for a moment.
const SENSITIVE_BYTES: u64 = 64 << 20;

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

/// Makes every volume of the spec, with contents.
pub fn prepare(spec: &SandboxSpec, dirs: &SandboxDirs) -> Result<(), VolumeError> {
    for volume in &spec.volumes {
        prepare_one(volume, &spec.security, dirs).map_err(|source| VolumeError::Volume {
            volume: volume.name.clone(),
            source: Box::new(source),
        })?;
    }
    Ok(())
}

/// Replaces the contents of file volumes.
pub fn update(volumes: &[Volume], security: &PodSecurity, dirs: &SandboxDirs) -> Result<(), VolumeError> {
    for volume in volumes {
        if let VolumeSource::Files(_) = volume.source {
            prepare_one(volume, security, dirs).map_err(|source| VolumeError::Volume {
                volume: volume.name.clone(),
                source: Box::new(source),
            })?;
        }
    }
    Ok(())
}

fn prepare_one(volume: &Volume, security: &PodSecurity, dirs: &SandboxDirs) -> Result<(), VolumeError> {
    let path = place(volume, dirs);
    match &volume.source {
        VolumeSource::EmptyDir(empty) => {
            let new = !path.exists();
            make_directory(&path)?;
            if empty.memory && !mounts::is_mount_point(&path) {
                mounts::tmpfs(&path, empty.size_limit_bytes, 0o777).map_err(at("mounting", &path))?;
            } else if !new {
                // It is in use: its modes are the pod's own.
                return Ok(());
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777))
                .map_err(at("setting the mode of", &path))?;
            own_empty(&path, security)
        }
        VolumeSource::Files(files) => {
            if files.sensitive() {
                let memory = dirs.memory();
                make_directory(&memory)?;
                if !mounts::is_mount_point(&memory) {
                    mounts::tmpfs(&memory, Some(SENSITIVE_BYTES), 0o755).map_err(at("mounting", &memory))?;
                }
            }
            make_directory(&path)?;
            files::replace(&path, files, security.fs_group)
        }
    }
}

/// The emptyDirs on disk that have a limit (0 is none), with what it is. Those in
/// memory are held to theirs by the kernel.
pub fn limited(spec: &SandboxSpec, dirs: &SandboxDirs) -> Vec<(VolumeName, PathBuf, u64)> {
    let limit = |volume: &Volume| match &volume.source {
        VolumeSource::EmptyDir(empty) if !empty.memory => empty.size_limit_bytes.filter(|&limit| limit > 0),
        _ => None,
    };
    spec.volumes
        .iter()
        .filter_map(|volume| Some((volume.name.clone(), place(volume, dirs), limit(volume)?)))
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

/// A new emptyDir belongs to the pod's group, and so does what is made in it.
fn own_empty(path: &Path, security: &PodSecurity) -> Result<(), VolumeError> {
    let Some(group) = security.fs_group else {
        return Ok(());
    };
    let owned = fs::metadata(path).is_ok_and(|m| i64::from(m.gid()) == group);
    if owned && security.fs_group_on_root_mismatch_only {
        return Ok(());
    }
    files::give_to_group(path, group)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o2777)).map_err(at("setting the mode of", path))
}

/// What a container mounts: its volumes, the hosts file, and where its last words
/// go. Makes what has to exist before the runtime mounts it.
pub fn mounts(
    spec: &SandboxSpec,
    container: &Container,
    restart: u32,
    dirs: &SandboxDirs,
    pod_ip: Ipv4Addr,
    host_ip: std::net::IpAddr,
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
                let target = dirs.sub_paths().join(container.name.as_str()).join(i.to_string());
                sub_path_mount(mount, &root, &sub_path, &target)?
            }
        };
        all.push(HostMount {
            host_path,
            container_path: mount.mount_path.clone(),
            // Files come from the cluster: a pod cannot write back.
            read_only: mount.read_only || matches!(volume.source, VolumeSource::Files(_)),
        });
    }
    let given = |path: &str| container.mounts.iter().any(|m| m.mount_path == path);
    if !given("/etc/hosts") {
        let hosts = dirs.hosts();
        if !hosts.exists() {
            write_file(&hosts, hosts_file(spec, pod_ip).as_bytes(), 0o644)?;
        }
        all.push(HostMount {
            host_path: hosts,
            container_path: "/etc/hosts".into(),
            read_only: container.security.read_only_root_filesystem,
        });
    }
    let message_path = &container.termination_message.path;
    if !message_path.is_empty() && !given(message_path) {
        let path = dirs.message(&container.name, restart);
        if !path.exists() {
            write_file(&path, b"", 0o666)?;
        }
        all.push(HostMount {
            host_path: path,
            container_path: message_path.clone(),
            read_only: false,
        });
    }
    Ok(all)
}

fn sub_path_mount(mount: &Mount, root: &Path, sub_path: &str, target: &Path) -> Result<PathBuf, VolumeError> {
    let refuse = |problem: String| VolumeError::SubPath {
        volume: mount.volume.clone(),
        path: sub_path.to_owned(),
        problem,
    };
    Mount::check_sub_path(sub_path).map_err(|e| refuse(e.problem))?;
    let opened = mounts::open_beneath(root, Path::new(sub_path)).map_err(|e| refuse(e.to_string()))?;
    mounts::bind(&opened, target).map_err(at("mounting", target))?;
    Ok(target.to_owned())
}

/// As a kubelet writes it.
fn hosts_file(spec: &SandboxSpec, pod_ip: Ipv4Addr) -> String {
    let network = &spec.network;
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    match &network.domainname {
        Some(domain) => text.push_str(&format!(
            "{pod_ip}\t{host}.{domain}\t{host}\n",
            host = network.hostname
        )),
        None => text.push_str(&format!("{pod_ip}\t{}\n", network.hostname)),
    }
    if !network.host_aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in &network.host_aliases {
            text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.join("\t")));
        }
    }
    text
}

/// Unmounts everything and removes the contents. Fine if nothing is there.
pub fn release(dirs: &SandboxDirs) -> Result<(), VolumeError> {
    mounts::unmount_below(dirs.run()).map_err(at("unmounting below", dirs.run()))?;
    let gone = [
        dirs.sub_paths(),
        dirs.memory(),
        dirs.run().join("emptydirs"),
        dirs.disk().join("volumes"),
    ];
    for path in gone {
        remove_directory(&path)?;
    }
    Ok(())
}

/// Removes both directories of a sandbox.
pub fn remove(dirs: &SandboxDirs) -> Result<(), VolumeError> {
    release(dirs)?;
    remove_directory(dirs.disk())?;
    remove_directory(dirs.run())
}

fn remove_directory(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("removing", path)(error)),
        _ => Ok(()),
    }
}

pub(crate) fn make_directory(path: &Path) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(at("making", path))
}

/// Writes a file whole: a reader sees the old one or the new one.
pub(crate) fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<(), VolumeError> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at("replacing", &beside)(error)),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(at("writing", &beside))?;
    file.write_all(content).map_err(at("writing", &beside))?;
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(at("setting the mode of", &beside))?;
    fs::rename(&beside, path).map_err(at("replacing", path))
}

pub(super) fn group(number: i64) -> io::Result<Gid> {
    u32::try_from(number).map(Gid::from_raw).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "a group is a number from 0 to 4294967295",
        )
    })
}

pub(super) fn change_group(path: &Path, number: i64) -> Result<(), VolumeError> {
    group(number)
        .and_then(|gid| chown(path, None, Some(gid)).map_err(Into::into))
        .map_err(at("setting the group of", path))
}

#[cfg(test)]
mod tests;
