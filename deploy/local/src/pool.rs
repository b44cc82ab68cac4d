//! The pool: its own certificate authority, and an agent on each host.
//!
//! An operator of a real pool does what is done here: a certificate for each
//! host and one for each tenant's virtual node (a cell signs the hosts'), a bpffs
//! directory, and the agent's configuration file.

use std::{net::SocketAddr, path::PathBuf};

use nix::mount::{MsFlags, mount};
use serde::Serialize;

use crate::{
    artifacts::{ArtifactError, Spindrift},
    component::{Component, Ready},
    containerd::Runtime,
    file::{self, Mode},
    instance::Layout,
    pki::{Authority, Credential, PkiError, Subject},
    registry,
    topology::{API_SERVER, API_SERVER_PORT, Host, POD_RANGE, REGISTRY, UNDERLAY, UPLINK},
    usage,
};

pub const TRUST_DOMAIN: &str = "pool.spindrift";
const AGENT_PORT: u16 = 7443;
/// On the host's own loopback.
pub const AGENT_METRICS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9464);

/// The way out of a host's containerd, on the host's own loopback.
pub const EGRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9465);

#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error("cannot make the pool's credentials")]
    Pki(#[from] PkiError),
    #[error("cannot write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot mount a bpffs at {}", .path.display())]
    Bpffs {
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
    #[error("cannot write the configuration of {agent}")]
    Config {
        agent: String,
        #[source]
        source: toml::ser::Error,
    },
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
}

/// The pool's certificates.
pub struct PoolPki {
    authority: Authority,
}

/// Paths as both sides' configuration files name them.
#[derive(Clone, Debug, Serialize)]
pub struct PoolTls {
    pub trust_domain: String,
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

impl PoolPki {
    pub fn open(layout: &Layout) -> Result<Self, PkiError> {
        Ok(Self {
            authority: Authority::open(layout.pki().join("pool"), "spindrift pool")?,
        })
    }

    /// What a cell signs its members' certificates with.
    pub fn authority(&self) -> Credential {
        Credential {
            certificate: self.authority.certificate(),
            key: self.authority.key(),
        }
    }

    pub fn host(&self, host: &Host) -> Result<PoolTls, PkiError> {
        let uri = format!("spiffe://{TRUST_DOMAIN}/host/{}", host.name);
        let subject = Subject {
            common_name: host.name.clone(),
            addresses: vec![host.address.into()],
            uri: Some(uri),
            ..Subject::default()
        };
        Ok(self.tls(self.authority.credential(&host.name, &subject)?))
    }

    pub fn virtual_node(&self, tenant: &str) -> Result<PoolTls, PkiError> {
        let uri = format!("spiffe://{TRUST_DOMAIN}/tenant/{tenant}/virtual-node");
        let subject = Subject {
            common_name: format!("virtual-node {tenant}"),
            uri: Some(uri),
            ..Subject::default()
        };
        Ok(self.tls(self.authority.credential(&format!("tenant-{tenant}"), &subject)?))
    }

    pub fn usage_collector(&self) -> Result<PoolTls, PkiError> {
        let subject = Subject {
            common_name: usage::COMPONENT.into(),
            addresses: vec![usage::ADDRESS.ip()],
            uri: Some(format!("spiffe://{TRUST_DOMAIN}/usage-collector")),
            ..Subject::default()
        };
        Ok(self.tls(self.authority.credential(usage::COMPONENT, &subject)?))
    }

    fn tls(&self, credential: Credential) -> PoolTls {
        PoolTls {
            trust_domain: TRUST_DOMAIN.into(),
            certificate: credential.certificate,
            key: credential.key,
            ca: self.authority.certificate(),
        }
    }
}

pub fn agent_address(host: &Host) -> SocketAddr {
    (host.address, AGENT_PORT).into()
}

pub fn agent_name(host: &Host) -> String {
    format!("pool-agent@{}", host.name)
}

/// pool-agent's configuration file.
#[derive(Serialize)]
struct AgentConfig {
    name: String,
    address: std::net::Ipv4Addr,
    listen: SocketAddr,
    metrics_listen: SocketAddr,
    state_dir: PathBuf,
    run_dir: PathBuf,
    bpffs: PathBuf,
    cni_socket: PathBuf,
    containerd_socket: PathBuf,
    uplink: String,
    pod_range: String,
    /// None: its cell signs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<PoolTls>,
    policy: Policy,
    #[serde(skip_serializing_if = "Option::is_none")]
    cell: Option<Membership>,
    usage: Usage,
}

/// Often enough that a test sees a record in no time.
#[derive(Serialize)]
struct Usage {
    collector: SocketAddr,
    interval_seconds: u64,
    sample_seconds: u64,
}

/// What the lab's operator allows.
#[derive(Serialize)]
struct Policy {
    privilege: PrivilegePolicy,
    room: RoomPolicy,
    images: ImagePolicy,
    network: NetworkPolicy,
}

/// What is particular to hosts that share a machine.
#[derive(Serialize)]
struct RoomPolicy {
    parent: String,
    pod: PodBounds,
    eviction: Eviction,
}

/// Low enough that a test can reach it in no time.
#[derive(Serialize)]
struct PodBounds {
    pids: u64,
}

/// The disk is shared with whatever else the machine does: no pod is to go because
/// somebody builds beside it.
#[derive(Serialize)]
struct Eviction {
    nodefs_available: &'static str,
    nodefs_inodes_free: &'static str,
    pids_available: &'static str,
    pressure_seconds: u64,
}

#[derive(Serialize)]
struct PrivilegePolicy {
    /// Pods administer their own network, which the tests try and redirection withstands.
    user_namespace_capabilities: [&'static str; 1],
}

#[derive(Serialize)]
struct ImagePolicy {
    pull_credentials_verification_policy: &'static str,
    preloaded_images_verification_allowlist: [&'static str; 1],
    /// The lab's registries are on the hosts' own network.
    allow_registries: [&'static str; 2],
    allow_networks: [String; 1],
    egress_listen: SocketAddr,
}

impl Policy {
    fn of_lab(room_parent: String) -> Self {
        Self {
            privilege: PrivilegePolicy {
                user_namespace_capabilities: ["NET_ADMIN"],
            },
            room: RoomPolicy {
                parent: room_parent,
                pod: PodBounds { pids: 1024 },
                eviction: Eviction {
                    nodefs_available: "1%",
                    nodefs_inodes_free: "1%",
                    pids_available: "1%",
                    pressure_seconds: 10,
                },
            },
            images: ImagePolicy {
                pull_credentials_verification_policy: "NeverVerifyAllowlistedImages",
                // What `Runtime::import` puts on every host.
                preloaded_images_verification_allowlist: ["spindrift.local/*"],
                allow_registries: registry::ALL.map(|registry| registry.name),
                allow_networks: [format!("{REGISTRY}/32")],
                egress_listen: EGRESS,
            },
            network: NetworkPolicy {
                pool_ranges: vec![POD_RANGE],
                underlay: vec![UNDERLAY],
                // Pods reach the API server by its Service; names outside the cluster
                // are asked of the same address.
                allow: vec![(API_SERVER, API_SERVER_PORT).into(), (API_SERVER, 53).into()],
                // Wherever in the lab a virtual node runs.
                control_planes: vec![UNDERLAY],
            },
        }
    }
}

#[derive(Serialize)]
struct NetworkPolicy {
    pool_ranges: Vec<&'static str>,
    underlay: Vec<&'static str>,
    allow: Vec<SocketAddr>,
    control_planes: Vec<&'static str>,
}

/// How the host joins the cell.
#[derive(Serialize)]
struct Membership {
    bootstrap_kubeconfig: PathBuf,
}

/// Prepares the host for its agent and tells what to run.
pub fn agent(
    layout: &Layout,
    runtime: &Runtime,
    pki: &PoolPki,
    programs: &Spindrift,
    bootstrap_kubeconfig: Option<PathBuf>,
) -> Result<Component, PoolError> {
    let host = runtime.host();
    let state = layout.host_state(&host.name);
    let config = AgentConfig {
        name: host.name.clone(),
        address: host.address,
        listen: agent_address(host),
        metrics_listen: AGENT_METRICS,
        state_dir: layout.host_data(&host.name).join("agent"),
        run_dir: state.join("agent"),
        bpffs: state.join("bpf"),
        cni_socket: runtime.cni_socket(),
        containerd_socket: runtime.socket(),
        uplink: UPLINK.into(),
        pod_range: host.pod_range.clone(),
        tls: match bootstrap_kubeconfig {
            Some(_) => None,
            None => Some(pki.host(host)?),
        },
        policy: Policy::of_lab(layout.host_cgroup(&host.name)),
        cell: bootstrap_kubeconfig.map(|bootstrap_kubeconfig| Membership { bootstrap_kubeconfig }),
        usage: Usage {
            collector: usage::ADDRESS,
            interval_seconds: 4,
            sample_seconds: 2,
        },
    };
    for directory in [&config.state_dir, &config.run_dir, &config.bpffs] {
        std::fs::create_dir_all(directory).map_err(|source| PoolError::File {
            path: directory.clone(),
            source,
        })?;
    }
    mount_bpffs(&config.bpffs)?;
    let text = toml::to_string(&config).map_err(|source| PoolError::Config {
        agent: agent_name(host),
        source,
    })?;
    let path = state.join("pool-agent.toml");
    file::write(&path, text, Mode::Public).map_err(|source| PoolError::File {
        path: path.clone(),
        source,
    })?;
    Ok(Component::new(agent_name(host), programs.program("pool-agent")?)
        .within(&host.namespace)
        .path_flag("config", &path)
        .input(path)
        // Not its gRPC port: a look without TLS would be a caller turned away.
        .ready_when(Ready::Accepts(config.metrics_listen)))
}

/// One of the host's own, so that two hosts on a machine do not meet in
/// `/sys/fs/bpf`; what is pinned there goes when it is unmounted.
fn mount_bpffs(path: &std::path::Path) -> Result<(), PoolError> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    if nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type().0 == BPF_FS_MAGIC) {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .map_err(|source| PoolError::Bpffs {
        path: path.to_owned(),
        source,
    })
}
