//! The agent's settings: one TOML file, parsed and checked once at the start.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use pool_agent_api::{HostName, Resources};
use serde::Deserialize;

use crate::{cell, policy::Policy, usage};

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("parsing {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: toml::de::Error,
    },
    #[error("{path}: {problem}")]
    Invalid { path: PathBuf, problem: String },
}

#[derive(Debug, Clone)]
pub struct Config {
    pub name: HostName,
    /// This host's address in the underlay.
    pub address: IpAddr,
    pub listen: SocketAddr,
    pub metrics_listen: SocketAddr,
    /// Survives a reboot: the ledger, logs, disk volumes.
    pub state_dir: PathBuf,
    /// Gone after a reboot: specs with secrets, sockets, memory volumes.
    pub run_dir: PathBuf,
    /// A mounted bpf file system.
    pub bpffs: PathBuf,
    pub cni_socket: PathBuf,
    pub containerd_socket: PathBuf,
    /// The host's device towards the underlay; gives the pods their MTU.
    pub uplink: String,
    /// This host's own: the addresses of its pods, of all tenants, and of its tenants'
    /// routers. The underlay leads it here.
    pub pod_range: Ipv4Net,
    /// None: the cell signs this host's certificate.
    pub tls: Option<TlsFiles>,
    pub capacity: Resources,
    /// What the host's operator allows.
    pub policy: Policy,
    /// The pool's cell; None: whatever a virtual node asks for has a claim.
    pub cell: Option<cell::Settings>,
    /// Where what pods used is told; None: it is not metered.
    pub usage: Option<usage::Settings>,
}

/// The pool's PKI, as PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
    pub trust_domain: String,
}

impl From<certificates::member::Files> for TlsFiles {
    fn from(files: certificates::member::Files) -> Self {
        Self {
            certificate: files.identity.clone(),
            key: files.identity,
            ca: files.ca,
            trust_domain: files.trust_domain,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    address: IpAddr,
    listen: SocketAddr,
    metrics_listen: SocketAddr,
    state_dir: PathBuf,
    run_dir: PathBuf,
    bpffs: PathBuf,
    cni_socket: PathBuf,
    containerd_socket: PathBuf,
    uplink: String,
    pod_range: Ipv4Net,
    tls: Option<TlsFiles>,
    capacity: Option<Capacity>,
    #[serde(default)]
    policy: Policy,
    cell: Option<Cell>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Usage {
    collector: String,
    #[serde(default = "Usage::default_interval")]
    interval_seconds: u64,
    #[serde(default = "Usage::default_sample")]
    sample_seconds: u64,
    #[serde(default = "Usage::default_keep")]
    keep_bytes: u64,
}

impl Usage {
    /// Long enough to be few, and well within a minute with what a look takes.
    fn default_interval() -> u64 {
        45
    }

    fn default_sample() -> u64 {
        10
    }

    fn default_keep() -> u64 {
        256 << 20
    }

    fn checked(self) -> Result<usage::Settings, String> {
        let (host, port) = self.collector.rsplit_once(':').unwrap_or_default();
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err("usage.collector: must be HOST:PORT".into());
        }
        if !(1..=10).contains(&self.sample_seconds) {
            return Err("usage.sample_seconds: must be 1 to 10".into());
        }
        // With a sample's length, which it may overshoot by, it is a minute.
        if !(self.sample_seconds..=50).contains(&self.interval_seconds) {
            return Err("usage.interval_seconds: must be from sample_seconds to 50".into());
        }
        if self.keep_bytes < 1 << 20 {
            return Err("usage.keep_bytes: must be at least 1048576".into());
        }
        Ok(usage::Settings {
            collector: self.collector,
            interval: Duration::from_secs(self.interval_seconds),
            sample: Duration::from_secs(self.sample_seconds),
            keep_bytes: self.keep_bytes,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cell {
    bootstrap_kubeconfig: PathBuf,
    zone: Option<String>,
    region: Option<String>,
    class: Option<String>,
    provider_id: Option<String>,
    #[serde(default)]
    taints: Vec<Taint>,
    lease_seconds: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Taint {
    key: String,
    effect: String,
}

/// As a kubelet's: four renewals in it.
const DEFAULT_LEASE: u64 = 40;

impl Cell {
    fn checked(self) -> Result<cell::Settings, String> {
        if !self.bootstrap_kubeconfig.is_absolute() {
            return Err("cell.bootstrap_kubeconfig: must be an absolute path".into());
        }
        let label = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        for (field, value) in [
            ("zone", &self.zone),
            ("region", &self.region),
            ("class", &self.class),
        ] {
            if let Some(value) = value
                && (value.is_empty() || value.len() > 63 || !value.chars().all(label))
            {
                return Err(format!("cell.{field}: must be a label's value"));
            }
        }
        let mut taints = vec![];
        for (i, taint) in self.taints.into_iter().enumerate() {
            if taint.key.is_empty() {
                return Err(format!("cell.taints[{i}].key: must not be empty"));
            }
            if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&taint.effect.as_str()) {
                return Err(format!(
                    "cell.taints[{i}].effect: must be NoSchedule, PreferNoSchedule or NoExecute"
                ));
            }
            taints.push((taint.key, taint.effect));
        }
        let lease = self.lease_seconds.unwrap_or(DEFAULT_LEASE);
        if !(4..=3600).contains(&lease) {
            return Err("cell.lease_seconds: must be 4 to 3600".into());
        }
        Ok(cell::Settings {
            bootstrap_kubeconfig: self.bootstrap_kubeconfig,
            zone: self.zone,
            region: self.region,
            class: self.class,
            provider_id: self.provider_id.filter(|id| !id.is_empty()),
            taints,
            lease: Duration::from_secs(lease),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Capacity {
    cpu_millis: Option<u64>,
    memory_bytes: Option<u64>,
    ephemeral_storage_bytes: Option<u64>,
    sandboxes: Option<u32>,
}

/// Slots where the file does not say: a kubelet's default.
const DEFAULT_SANDBOXES: u32 = 110;

impl Config {
    /// Reads and checks the file. Amounts of capacity that are absent or 0 are
    /// taken from `detected`.
    pub fn load(path: &Path, detected: impl FnOnce(&Path) -> Resources) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text, detected)
    }

    fn parse(
        path: &Path,
        text: &str,
        detected: impl FnOnce(&Path) -> Resources,
    ) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })?;
        let invalid = |problem: String| ConfigError::Invalid {
            path: path.to_owned(),
            problem,
        };
        let name = HostName::parse("name", file.name).map_err(|e| invalid(e.to_string()))?;
        for (field, dir) in [
            ("state_dir", &file.state_dir),
            ("run_dir", &file.run_dir),
            ("bpffs", &file.bpffs),
            ("cni_socket", &file.cni_socket),
            ("containerd_socket", &file.containerd_socket),
        ] {
            if !dir.is_absolute() {
                return Err(invalid(format!("{field}: must be an absolute path")));
            }
        }
        if file.uplink.is_empty() || file.uplink.len() > 15 {
            return Err(invalid("uplink: must be the name of a network device".into()));
        }
        check_range(file.pod_range, file.address)
            .map_err(|problem| invalid(format!("pod_range: {problem}")))?;
        // The host's networks are looked at when it starts.
        file.policy
            .network
            .off_limits(file.pod_range, &[])
            .map_err(invalid)?;
        let found = detected(&file.state_dir);
        let capacity = file.capacity.map_or(
            Resources {
                sandboxes: DEFAULT_SANDBOXES,
                ..found
            },
            |c| {
                let or = |given: Option<u64>, found| given.filter(|&n| n != 0).unwrap_or(found);
                Resources {
                    cpu_millis: or(c.cpu_millis, found.cpu_millis),
                    memory_bytes: or(c.memory_bytes, found.memory_bytes),
                    ephemeral_storage_bytes: or(c.ephemeral_storage_bytes, found.ephemeral_storage_bytes),
                    sandboxes: c.sandboxes.filter(|&n| n != 0).unwrap_or(DEFAULT_SANDBOXES),
                }
            },
        );
        let cell = file.cell.map(Cell::checked).transpose().map_err(invalid)?;
        if file.tls.is_none() && cell.is_none() {
            return Err(invalid(
                "tls: name the files of the host's certificate in the pool, or a [cell] that signs one"
                    .into(),
            ));
        }
        let usage = file.usage.map(Usage::checked).transpose().map_err(invalid)?;
        Ok(Self {
            name,
            address: file.address,
            listen: file.listen,
            metrics_listen: file.metrics_listen,
            state_dir: file.state_dir,
            run_dir: file.run_dir,
            bpffs: file.bpffs,
            cni_socket: file.cni_socket,
            containerd_socket: file.containerd_socket,
            uplink: file.uplink,
            pod_range: file.pod_range,
            tls: file.tls,
            capacity,
            policy: file.policy,
            cell,
            usage,
        })
    }
}

/// Ranges of which no address can be a pod's.
const NO_PODS: [(Ipv4Net, &str); 5] = [
    (Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8), "\"this network\""),
    (Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8), "loopback"),
    (
        Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
        "link-local",
    ),
    (Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4), "multicast"),
    (Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4), "reserved"),
];

/// Whether a host with this address can give pods addresses of `range`. What its
/// devices have is looked at when the network is opened.
fn check_range(range: Ipv4Net, host: IpAddr) -> Result<(), String> {
    if range != range.trunc() {
        return Err(format!("has host bits set: write {}", range.trunc()));
    }
    if range.prefix_len() > 30 {
        return Err(format!("{range} has no room for a router and a pod"));
    }
    if let Some((taken, what)) = NO_PODS
        .iter()
        .find(|(taken, _)| taken.contains(&range) || range.contains(taken))
    {
        return Err(format!("{range} overlaps {taken}, {what} addresses"));
    }
    match host {
        IpAddr::V4(host) if range.contains(&host) => Err(format!("{range} holds the host's own {host}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        name = "host-a"
        address = "192.0.2.11"
        listen = "192.0.2.11:7443"
        metrics_listen = "127.0.0.1:9464"
        state_dir = "/var/lib/spindrift"
        run_dir = "/run/spindrift"
        bpffs = "/sys/fs/bpf/spindrift"
        cni_socket = "/run/spindrift/cni.sock"
        containerd_socket = "/run/containerd/containerd.sock"
        uplink = "eth0"
        pod_range = "10.77.1.0/24"
        [tls]
        certificate = "/a" 
        key = "/b"
        ca = "/c"
        trust_domain = "pool.spindrift"
    "#;

    fn found(_: &Path) -> Resources {
        Resources {
            cpu_millis: 2000,
            memory_bytes: 1 << 30,
            ephemeral_storage_bytes: 1 << 34,
            sandboxes: 0,
        }
    }

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("agent.toml"), text, found)
    }

    #[test]
    fn capacity_is_what_the_file_says_and_else_what_the_host_has() {
        assert_eq!(parse(FILE).unwrap().capacity.sandboxes, 110);
        let text = format!("{FILE}\n[capacity]\ncpu_millis = 500\nmemory_bytes = 0\nsandboxes = 7");
        let capacity = parse(&text).unwrap().capacity;
        assert_eq!(
            (capacity.cpu_millis, capacity.memory_bytes, capacity.sandboxes),
            (500, 1 << 30, 7)
        );
    }

    #[test]
    fn a_file_with_a_mistake_is_refused_by_field() {
        for (from, to, says) in [
            ("\"host-a\"", "\"Host A\"", "name"),
            ("\"/run/spindrift\"", "\"run\"", "run_dir"),
            ("\"eth0\"", "\"\"", "uplink"),
            (
                "10.77.1.0/24",
                "10.77.1.1/24",
                "pod_range: has host bits set: write 10.77.1.0/24",
            ),
            (
                "10.77.1.0/24",
                "10.77.1.0/31",
                "pod_range: 10.77.1.0/31 has no room",
            ),
            (
                "10.77.1.0/24",
                "169.0.0.0/8",
                "pod_range: 169.0.0.0/8 overlaps 169.254.0.0/16",
            ),
            ("10.77.1.0/24", "127.1.0.0/16", "loopback"),
            (
                "10.77.1.0/24",
                "192.0.2.0/28",
                "pod_range: 192.0.2.0/28 holds the host's own",
            ),
        ] {
            let error = parse(&FILE.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(parse(&FILE.replace("uplink", "uplnk")).is_err());
    }

    #[test]
    fn usage_is_metered_only_if_the_file_says_for_whom_and_at_least_once_a_minute() {
        assert!(parse(FILE).unwrap().usage.is_none());
        let usage = |text: &str| {
            parse(&format!(
                "{FILE}\n[usage]\ncollector = \"192.0.2.1:15020\"\n{text}"
            ))
        };
        let settings = usage("").unwrap().usage.unwrap();
        assert!(settings.interval + settings.sample <= Duration::from_secs(60));
        for (text, says) in [
            ("interval_seconds = 51", "usage.interval_seconds"),
            ("interval_seconds = 5", "usage.interval_seconds"),
            ("sample_seconds = 0", "usage.sample_seconds"),
            ("sample_seconds = 11", "usage.sample_seconds"),
            ("keep_bytes = 1", "usage.keep_bytes"),
        ] {
            let error = usage(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let nowhere = format!("{FILE}\n[usage]\ncollector = \"192.0.2.1\"");
        assert!(
            parse(&nowhere)
                .unwrap_err()
                .to_string()
                .contains("usage.collector")
        );
    }

    #[test]
    fn a_host_is_in_a_cell_only_if_the_file_says_so_and_says_it_well() {
        assert!(parse(FILE).unwrap().cell.is_none());
        let cell = |text: &str| parse(&format!("{FILE}\n[cell]\nbootstrap_kubeconfig = \"/b\"\n{text}"));
        let settings = cell("zone = \"z1\"").unwrap().cell.unwrap();
        assert_eq!(settings.lease, Duration::from_secs(40));
        assert_eq!(settings.zone.as_deref(), Some("z1"));
        for (text, says) in [
            ("class = \"a b\"", "cell.class"),
            ("lease_seconds = 1", "cell.lease_seconds"),
            (
                "taints = [{ key = \"a\", effect = \"Never\" }]",
                "cell.taints[0].effect",
            ),
        ] {
            let error = cell(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(cell("zoen = \"z1\"").is_err());
    }
}
