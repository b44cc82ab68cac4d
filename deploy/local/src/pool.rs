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
    tool::{Tool, ToolError},
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
    #[error("cannot configure {agent}")]
    FirstBoot {
        agent: String,
        #[source]
        source: ToolError,
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
    /// None: by the host's size.
    #[serde(skip_serializing_if = "Option::is_none")]
    reserved: Option<Kept>,
    pod: PodBounds,
    eviction: Eviction,
}

/// What a host keeps of its capacity for itself.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Kept {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_storage_bytes: u64,
}

/// Of memory: a host evicts below it, and so offers that much less.
pub const EVICTION_MEMORY: u64 = 100 << 20;
/// Of the disk, in percent: the same.
pub const EVICTION_DISK: u64 = 1;

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
    fn of_lab(room_parent: String, reserved: Option<Kept>) -> Self {
        Self {
            privilege: PrivilegePolicy {
                user_namespace_capabilities: ["NET_ADMIN"],
            },
            room: RoomPolicy {
                parent: room_parent,
                reserved,
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
        policy: Policy::of_lab(layout.host_cgroup(&host.name), None),
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

/// What the host driver hands over to a machine, as deploy/host/first-boot reads it.
pub struct Handover<'a> {
    pub class: &'a str,
    pub zone: &'a str,
    pub provider_id: &'a str,
    /// `KEY=EFFECT` each.
    pub taints: Vec<String>,
    /// The cell's URL.
    pub cell: &'a str,
    /// Its PEM, in base64.
    pub authority: String,
    pub token: &'a str,
    pub capacity: Capacity,
}

/// What a host is given of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_storage_bytes: u64,
    pub pods: u32,
    pub kept: Kept,
}

#[derive(Serialize)]
struct PolicyFile {
    policy: Policy,
}

/// Prepares a host as its first boot does, and tells what to run. The script that an
/// operator's machines run writes the configuration.
pub async fn first_boot(
    layout: &Layout,
    runtime: &Runtime,
    programs: &Spindrift,
    script: &std::path::Path,
    handover: &Handover<'_>,
) -> Result<Component, PoolError> {
    let host = runtime.host();
    let state = layout.host_state(&host.name);
    let (run, bpffs) = (state.join("agent"), state.join("bpf"));
    for directory in [&run, &bpffs] {
        std::fs::create_dir_all(directory).map_err(|source| PoolError::File {
            path: directory.clone(),
            source,
        })?;
    }
    mount_bpffs(&bpffs)?;
    let capacity = &handover.capacity;
    let policy = toml::to_string(&PolicyFile {
        policy: Policy::of_lab(layout.host_cgroup(&host.name), Some(capacity.kept)),
    })
    .map_err(|source| PoolError::Config {
        agent: agent_name(host),
        source,
    })?;
    let write = |path: &PathBuf, text: String| {
        file::write(path, text, Mode::Private).map_err(|source| PoolError::File {
            path: path.clone(),
            source,
        })
    };
    let policy_file = state.join("policy.toml");
    write(&policy_file, policy)?;
    let lines = [
        ("NAME", host.name.clone()),
        ("CLASS", handover.class.to_owned()),
        ("ZONE", handover.zone.to_owned()),
        ("PROVIDER_ID", handover.provider_id.to_owned()),
        ("TAINTS", handover.taints.join(",")),
        ("CELL_SERVER", handover.cell.to_owned()),
        ("CELL_CA", handover.authority.clone()),
        ("TOKEN", handover.token.to_owned()),
        ("ADDRESS", host.address.to_string()),
        ("POD_RANGE", host.pod_range.clone()),
        ("UPLINK", UPLINK.to_owned()),
        ("PORT", AGENT_PORT.to_string()),
        ("METRICS_PORT", AGENT_METRICS.port().to_string()),
        ("CPU_MILLIS", capacity.cpu_millis.to_string()),
        ("MEMORY_BYTES", capacity.memory_bytes.to_string()),
        ("STORAGE_BYTES", capacity.ephemeral_storage_bytes.to_string()),
        ("PODS", capacity.pods.to_string()),
        ("CONFIG_DIR", state.display().to_string()),
        (
            "STATE_DIR",
            layout.host_data(&host.name).join("agent").display().to_string(),
        ),
        ("RUN_DIR", run.display().to_string()),
        ("BPFFS", bpffs.display().to_string()),
        ("CNI_SOCKET", runtime.cni_socket().display().to_string()),
        ("CONTAINERD_SOCKET", runtime.socket().display().to_string()),
        ("POLICY", policy_file.display().to_string()),
    ];
    let text: String = lines
        .iter()
        .map(|(key, value)| format!("{key}={value}\n"))
        .collect();
    let path = state.join("handover");
    write(&path, text)?;
    Tool::new(script)
        .arg("--write-only")
        .arg(&path)
        .run()
        .await
        .map_err(|source| PoolError::FirstBoot {
            agent: agent_name(host),
            source,
        })?;
    let config = state.join("pool-agent.toml");
    Ok(Component::new(agent_name(host), programs.program("pool-agent")?)
        .within(&host.namespace)
        .path_flag("config", &config)
        .input(config)
        .ready_when(Ready::Accepts(AGENT_METRICS)))
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

#[cfg(test)]
mod tests {
    use std::{path::Path, process::Command};

    use crate::artifacts;

    fn handover(directory: &Path) -> String {
        let directory = directory.display();
        format!(
            "# a comment\nNAME=host-x\nCLASS=standard\nZONE=zone-a\nPROVIDER_ID=lab://demo/host-x\n\
             TAINTS=karpenter.sh/unregistered=NoExecute,a.b/c=NoSchedule\nCELL_SERVER=https://192.0.2.4:6443\n\
             CELL_CA=QUJD\nTOKEN=abcdef.0123456789abcdef\nPOD_RANGE=10.77.1.0/24\nADDRESS=192.0.2.11\n\
             UPLINK=eth0\nCPU_MILLIS=2000\nCONFIG_DIR={directory}/etc\nSTATE_DIR={directory}/lib\n\
             RUN_DIR={directory}/run\n"
        )
    }

    /// What the script said; None: it did it.
    fn first_boot(directory: &Path, handover: &str) -> Option<String> {
        let file = directory.join("handover");
        std::fs::write(&file, handover).unwrap();
        let script = artifacts::workspace().join("deploy/host/first-boot");
        let done = Command::new(script)
            .arg("--write-only")
            .arg(file)
            .output()
            .unwrap();
        (!done.status.success()).then(|| String::from_utf8(done.stderr).unwrap())
    }

    #[test]
    fn what_is_handed_over_becomes_the_agents_configuration_and_the_token_does_not_stay() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path();
        let policy = here.join("policy.toml");
        std::fs::write(&policy, "[policy.room]\nparent = \"x\"\n").unwrap();
        let text = format!("{}POLICY={}", handover(here), policy.display());
        assert_eq!(first_boot(here, &text), None);
        assert!(!here.join("handover").exists());
        let config = std::fs::read_to_string(here.join("etc/pool-agent.toml")).unwrap();
        let config: toml::Table = toml::from_str(&config).unwrap();
        assert_eq!(config["listen"].as_str(), Some("192.0.2.11:7443"));
        assert_eq!(config["capacity"]["cpu_millis"].as_integer(), Some(2000));
        assert_eq!(config["policy"]["room"]["parent"].as_str(), Some("x"));
        let cell = &config["cell"];
        assert_eq!(cell["provider_id"].as_str(), Some("lab://demo/host-x"));
        assert_eq!(
            cell["taints"].to_string(),
            "[{ effect = \"NoExecute\", key = \"karpenter.sh/unregistered\" }, { effect = \"NoSchedule\", key = \"a.b/c\" }]"
        );
        let kubeconfig = here.join("etc/bootstrap.kubeconfig");
        assert_eq!(cell["bootstrap_kubeconfig"].as_str(), kubeconfig.to_str());
        assert!(
            std::fs::read_to_string(&kubeconfig)
                .unwrap()
                .contains("token: abcdef.0123456789abcdef")
        );
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(
            std::fs::metadata(&kubeconfig).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_handover_with_a_mistake_is_refused_by_key_and_nothing_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path();
        let good = handover(here);
        for (from, to, says) in [
            ("NAME=host-x\n", "NAME=host-x\"\n", "NAME on line 2"),
            ("NAME=host-x\n", "", "NAME is missing"),
            ("ZONE=zone-a", "ZONE=a b", "ZONE on line"),
            ("ZONE=zone-a", "ZONE=$(id)", "ZONE on line"),
            ("CLASS=", "KLASS=", "there is no such key"),
            ("CLASS=standard", "CLASS", "line 3 is not KEY=VALUE"),
            ("TOKEN=abcdef.", "TOKEN=abcde.", "TOKEN on line"),
            ("https://", "http://", "CELL_SERVER on line"),
            ("=NoExecute", "=Never", "TAINTS on line"),
            ("CPU_MILLIS=2000", "CPU_MILLIS=two", "CPU_MILLIS on line"),
            ("UPLINK=eth0", "POLICY=/no/such/file", "POLICY: cannot read"),
            ("UPLINK=eth0", "TLS_KEY=/k", "TLS_CERTIFICATE is missing"),
        ] {
            let changed = good.replace(from, to);
            assert_ne!(changed, good);
            let said = first_boot(here, &changed).unwrap_or_default();
            assert!(said.contains(says), "{to}: {said}");
            assert!(!said.contains("0123456789abcdef"), "{said}");
            assert!(!here.join("etc").exists(), "{to}");
        }
    }
}
