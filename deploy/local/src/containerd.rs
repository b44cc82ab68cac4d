//! The containerd of one pool host: its configuration, its images, and the
//! removal of everything it has started.
//!
//! Each host has its own, apart from the machine's: root, state, socket, runc
//! root, CNI directories and streaming port. On a real host an operator sets
//! these once; nothing here is read by pool-agent but the socket.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::{MntFlags, umount2};

use crate::{
    artifacts::Containerd,
    component::{Component, Ready},
    file::{self, Mode},
    images::{self, Image, Images},
    instance::Layout,
    pool,
    process::Process,
    registry,
    tool::{Tool, ToolError},
    topology::Host,
};

/// Kubernetes' namespace inside containerd.
const NAMESPACE: &str = "k8s.io";

#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    #[error("cannot write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot import image {image} on {host}")]
    Import {
        image: &'static str,
        host: String,
        #[source]
        source: ToolError,
    },
    #[error("cannot unmount {}", .path.display())]
    Unmount {
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
}

/// Where one host's containerd keeps things.
#[derive(Clone, Debug)]
pub struct Runtime {
    layout: Layout,
    host: Host,
    programs: Containerd,
}

impl Runtime {
    pub fn new(layout: &Layout, host: &Host, programs: &Containerd) -> Self {
        Self {
            layout: layout.clone(),
            host: host.clone(),
            programs: programs.clone(),
        }
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn socket(&self) -> PathBuf {
        self.state().join("containerd.sock")
    }

    /// Where pool-agent listens for the CNI plugin.
    pub fn cni_socket(&self) -> PathBuf {
        self.layout.host_state(&self.host.name).join("cni.sock")
    }

    fn state(&self) -> PathBuf {
        self.layout.host_state(&self.host.name).join("containerd")
    }

    fn root(&self) -> PathBuf {
        self.layout.host_data(&self.host.name).join("containerd")
    }

    fn cni(&self, what: &str) -> PathBuf {
        self.layout.host_state(&self.host.name).join("cni").join(what)
    }

    /// How references are resolved to registries.
    pub fn registries(&self) -> PathBuf {
        self.state().join("certs.d")
    }

    /// Writes its configuration and tells what to run. `plugin` is
    /// spindrift-cni.
    pub fn component(&self, plugin: &Path) -> Result<Component, ContainerdError> {
        let write = |path: &Path, content: String| {
            let parent = path.parent().unwrap_or(path);
            std::fs::create_dir_all(parent)
                .and_then(|()| file::write(path, content, Mode::Public))
                .map_err(|source| ContainerdError::File {
                    path: path.to_owned(),
                    source,
                })
        };
        let network = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": "spindrift",
            "plugins": [{"type": "spindrift-cni", "socket": self.cni_socket()}],
        });
        write(&self.cni("net.d/10-spindrift.conflist"), network.to_string())?;
        let link = self.cni("bin/spindrift-cni");
        std::fs::create_dir_all(self.cni("bin"))
            .and_then(|()| file::remove(&link))
            .and_then(|()| std::os::unix::fs::symlink(plugin, &link))
            .map_err(|source| ContainerdError::File { path: link, source })?;
        for registry in registry::ALL {
            write(
                &self.registries().join(registry.name).join("hosts.toml"),
                registry.hosts_toml(),
            )?;
        }
        let link = runc(&self.state());
        file::remove(&link)
            .and_then(|()| std::os::unix::fs::symlink(&self.programs.runc, &link))
            .map_err(|source| ContainerdError::File { path: link, source })?;
        let config = self.state().join("config.toml");
        write(&config, self.config())?;

        let path = format!(
            "{}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
            self.programs.directory.display()
        );
        Ok(
            Component::new(component_name(&self.host), self.programs.program())
                .within(&self.host.namespace)
                .arg("--config")
                .arg(config.display().to_string())
                .input(config)
                // Where it finds its shim and runc.
                .environment("PATH", path)
                // What it pulls goes by the agent's proxy, which knows where images are.
                .environment("HTTP_PROXY", format!("http://{}", pool::EGRESS))
                .environment("HTTPS_PROXY", format!("http://{}", pool::EGRESS))
                .ready_when(Ready::Socket(self.socket())),
        )
    }

    fn config(&self) -> String {
        let (images, runtime) = (
            "plugins.'io.containerd.cri.v1.images'",
            "plugins.'io.containerd.cri.v1.runtime'",
        );
        let registries = self.registries();
        let mut text = format!(
            "version = 3
root = '{root}'
state = '{state}'
imports = []
disabled_plugins = [
  'io.containerd.internal.v1.opt',
  'io.containerd.internal.v1.tracing',
  'io.containerd.nri.v1.nri',
  'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.btrfs',
  'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs',
  'io.containerd.snapshotter.v1.zfs',
  'io.containerd.tracing.processor.v1.otlp',
]

# Rather no containerd than one without CRI.
required_plugins = ['io.containerd.grpc.v1.cri']

[grpc]
address = '{socket}'

[{images}]
# A registry that says nothing for as long is given up.
image_pull_progress_timeout = '1m'
[{images}.pinned_images]
sandbox = '{pause}'
[{images}.registry]
config_path = '{registries}'
[plugins.'io.containerd.transfer.v1.local']
config_path = '{registries}'

# The transfer service wants the plugin; there is nothing in its directory.
[plugins.'io.containerd.image-verifier.v1.bindir']
bin_dir = '{state}/image-verifiers'

[{runtime}]
# Without the capability to lower a score, runc would fail rather than go on.
restrict_oom_score_adj = {restrict}
netns_mounts_under_state_dir = true
[{runtime}.cni]
bin_dirs = ['{cni_bin}']
conf_dir = '{cni_conf}'
use_internal_loopback = true
[{runtime}.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[{runtime}.containerd.runtimes.runc.options]
# The cgroupfs driver: there may be no systemd here.
SystemdCgroup = false
Root = '{runc}'
BinaryName = '{binary}'
",
            root = self.root().display(),
            state = self.state().display(),
            socket = self.socket().display(),
            pause = images::PAUSE.reference,
            registries = registries.display(),
            restrict = !may_lower_oom_scores(),
            cni_bin = self.cni("bin").display(),
            cni_conf = self.cni("net.d").display(),
            runc = self.runc_root().display(),
            binary = runc(&self.state()).display(),
        );
        if !Path::new("/sys/module/apparmor").exists() {
            text = text.replace("netns_mounts", "disable_apparmor = true\nnetns_mounts");
        }
        text
    }

    pub fn runc_root(&self) -> PathBuf {
        self.state().join("runc")
    }

    /// `ctr` for this host's containers and images.
    pub fn ctr(&self) -> Tool {
        Tool::new(self.programs.ctr())
            .arg("--address")
            .arg(self.socket())
            .arg("--namespace")
            .arg(NAMESPACE)
    }

    /// Imports what is not there in this version.
    pub async fn import(&self, images: &Images) -> Result<(), ContainerdError> {
        let mark = self.root().join("imported-images");
        if std::fs::read_to_string(&mark).is_ok_and(|version| version == images.version()) {
            return Ok(());
        }
        for image in images::ALL {
            self.import_archive(image, &images.archive(image)).await?;
        }
        file::write(&mark, images.version(), Mode::Public)
            .map_err(|source| ContainerdError::File { path: mark, source })
    }

    /// Imports one image from its archive, and pins it: from no registry could
    /// it come back once a full disk had cost it.
    pub async fn import_archive(&self, image: Image, archive: &Path) -> Result<(), ContainerdError> {
        let failed = |source| ContainerdError::Import {
            image: image.reference,
            host: self.host.name.clone(),
            source,
        };
        self.ctr()
            .args(["images", "import", "--local"])
            .arg(archive)
            .limit(Duration::from_secs(300))
            .run()
            .await
            .map_err(failed)?;
        self.ctr()
            .args([
                "images",
                "label",
                image.reference,
                "io.cri-containerd.pinned=pinned",
            ])
            .run()
            .await
            .map(drop)
            .map_err(failed)
    }
}

/// Ends all containers and shims of an instance and removes their cgroups and
/// sockets, whether or not a containerd is there to help. The containerds must
/// be gone: they would start shims again.
pub async fn remove_containers(layout: &Layout, hosts: impl IntoIterator<Item = String>) {
    for host in hosts {
        let state = layout.host_state(&host).join("containerd");
        let bundles: Vec<PathBuf> = entries(&state.join("io.containerd.runtime.v2.task").join(NAMESPACE));
        let cgroups: Vec<PathBuf> = bundles.iter().filter_map(|bundle| cgroup(bundle)).collect();
        let sockets: Vec<PathBuf> = bundles.iter().filter_map(|bundle| shim_socket(bundle)).collect();
        let root = state.join("runc").join(NAMESPACE);
        let removals = entries(&root).into_iter().map(|container| {
            let runc = Tool::new(runc(&state))
                .arg("--root")
                .arg(&root)
                .args(["delete", "--force"]);
            // One that a crash left half made is dealt with by its shim's end
            // and the removal of its files.
            async move { drop(runc.arg(container.file_name().unwrap_or_default()).run().await) }
        });
        futures::future::join_all(removals).await;
        let instance = layout.instance().as_str();
        let mut shims = Process::with_environment(crate::component::MARK, instance);
        shims.retain(|process| process.is_shim() && process.mentions(&state));
        futures::future::join_all(shims.iter().map(|shim| shim.end(Duration::ZERO))).await;
        for socket in sockets {
            // Most went with their shim.
            file::remove(&socket).ok();
        }
        for cgroup in cgroups {
            remove_cgroup(&cgroup);
        }
        let parent = layout.host_cgroup(&host);
        for hierarchy in hierarchies() {
            remove_cgroups_below(&hierarchy.join(&parent));
        }
    }
}

pub fn component_name(host: &Host) -> String {
    format!("containerd@{}", host.name)
}

/// A link to the runc that a containerd with this state starts containers with.
fn runc(state: &Path) -> PathBuf {
    state.join("bin-runc")
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_default()).unwrap_or_default()
}

/// What the container's specification says, as an absolute path in each
/// hierarchy.
fn cgroup(bundle: &Path) -> Option<PathBuf> {
    let specification = json(&bundle.join("config.json"));
    let path = Path::new(specification["linux"]["cgroupsPath"].as_str()?);
    path.strip_prefix("/").ok().map(Path::to_owned)
}

/// A shim's socket lies in a directory that all containerds share.
fn shim_socket(bundle: &Path) -> Option<PathBuf> {
    let told = json(&bundle.join("bootstrap.json"));
    told["address"]
        .as_str()?
        .strip_prefix("unix://")
        .map(PathBuf::from)
}

/// Removes a cgroup and those above it that are empty then: the pod's, the
/// class's. The kernel refuses for one that is in use.
fn remove_cgroup(path: &Path) {
    for hierarchy in hierarchies() {
        for path in path.ancestors().filter(|path| !path.as_os_str().is_empty()) {
            if std::fs::remove_dir(hierarchy.join(path))
                .is_err_and(|e| e.kind() != std::io::ErrorKind::NotFound)
            {
                break;
            }
        }
    }
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    match root.join("cgroup.controllers").exists() {
        true => vec![root.to_owned()],
        false => entries(root),
    }
}

/// The agent's own: those of the classes and of all pods, which outlive it.
fn remove_cgroups_below(path: &Path) {
    for entry in entries(path).into_iter().filter(|entry| entry.is_dir()) {
        remove_cgroups_below(&entry);
    }
    // Not there, or in use after all: then it is in nobody's way.
    let _gone = std::fs::remove_dir(path).is_ok();
}

/// Unmounts everything below the directories, innermost first.
pub fn unmount_below(directories: &[PathBuf]) -> Result<(), ContainerdError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(|source| ContainerdError::File {
        path: "/proc/self/mountinfo".into(),
        source,
    })?;
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| {
            PathBuf::from(
                point
                    .replace("\\040", " ")
                    .trim_end_matches("//deleted")
                    .to_owned(),
            )
        })
        .filter(|point| directories.iter().any(|directory| point.starts_with(directory)))
        .collect();
    // Later mounts lie on earlier ones.
    points.reverse();
    for path in points {
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(source) => return Err(ContainerdError::Unmount { path, source }),
        }
    }
    Ok(())
}

/// CAP_SYS_RESOURCE, which a container may lack although it is root.
fn may_lower_oom_scores() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits >> CAP_SYS_RESOURCE & 1 == 1)
}
