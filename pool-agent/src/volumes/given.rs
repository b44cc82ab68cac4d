//! The small files every pod gets, and its containers may write: hosts, hostname,
//! resolver and each container's last words. They are on a tmpfs of the pod's own, so
//! that a pod that fills them fills nobody else's.

use std::net::{IpAddr, Ipv4Addr};

use pool_agent_api::{ContainerName, SandboxSpec, spec::PodNetwork};

use super::{VolumeError, at, mounts};
use crate::{
    confined::{Directory, Owned},
    layout::SandboxDirs,
};

/// Files in it: four, and each container's last words of this run and of the one
/// before.
const FILES: u64 = 4096;

/// The pod's tmpfs, mounted if it is not.
pub(super) fn mounted(dirs: &SandboxDirs, bytes: u64) -> Result<Directory, VolumeError> {
    let path = dirs.given();
    let place = Directory::ensure(&path).map_err(at("making", &path))?;
    if !mounts::is_mount_point(&path) {
        let room = mounts::Room {
            bytes: Some(bytes),
            inodes: Some(FILES),
        };
        mounts::tmpfs(&place, room, Owned::ours(0o700)).map_err(at("mounting", &path))?;
    }
    // Above, the directory below the mount was opened.
    Directory::open(&path).map_err(at("opening", &path))
}

/// Writes what is not there yet. What a container has made of it since stays.
pub(super) fn write(
    given: &Directory,
    spec: &SandboxSpec,
    pod_ip: Ipv4Addr,
    dirs: &SandboxDirs,
) -> Result<(), VolumeError> {
    for (path, content) in [
        (dirs.hosts(), hosts(spec, pod_ip)),
        (dirs.hostname(), format!("{}\n", spec.network.hostname)),
        (dirs.resolver(), resolver(&spec.network)),
    ] {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let absent = given.kind(&*name).map_err(at("reading", &path))?.is_none();
        if absent {
            given
                .replace(&name, content.as_bytes(), Owned::ours(0o644))
                .map_err(at("writing", &path))?;
        }
    }
    Ok(())
}

/// An empty file for the last words of one run.
pub(super) fn message(
    given: &Directory,
    container: &ContainerName,
    restart: u32,
    dirs: &SandboxDirs,
) -> Result<(), VolumeError> {
    let path = dirs.message(container, restart);
    let make = || {
        let messages = given.make_or_open(SandboxDirs::MESSAGES, Owned::ours(0o700))?;
        let name = SandboxDirs::message_name(container, restart);
        match messages.create(&name, b"", Owned::ours(0o666)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    };
    make().map_err(at("making", &path))
}

/// As a kubelet writes it.
fn hosts(spec: &SandboxSpec, pod_ip: Ipv4Addr) -> String {
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

/// As containerd writes it, whose own file is on the host's disk and a container's to
/// write.
fn resolver(network: &PodNetwork) -> String {
    let mut text = String::new();
    if !network.searches.is_empty() {
        text.push_str(&format!("search {}\n", network.searches.join(" ")));
    }
    for server in &network.nameservers {
        text.push_str(&format!("nameserver {}\n", IpAddr::to_string(server)));
    }
    if !network.dns_options.is_empty() {
        text.push_str(&format!("options {}\n", network.dns_options.join(" ")));
    }
    text
}
