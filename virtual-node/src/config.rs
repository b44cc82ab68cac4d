//! The configuration file: TOML in, checked values out, once at start.
//!
//! Read by `main`; every other module is handed the part it needs. A refusal
//! names the field. Nothing here is read again while the process runs, except
//! the certificate files, which are reloaded for each new connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use pool_agent_api::{HostName, Invalid, Namespace, PodName, Resources, TenantId};
use pool_cell::OwnerUid;
use serde::{Deserialize, Serialize};

use crate::quantity;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not valid TOML of the expected shape")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("{path}: {invalid}")]
    Invalid { path: PathBuf, invalid: Invalid },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub node_name: String,
    pub tenant: TenantId,
    /// None: the in-cluster configuration.
    pub kubeconfig: Option<PathBuf>,
    /// The Node's InternalIP.
    pub address: IpAddr,
    pub kubelet: Kubelet,
    pub metrics_listen: SocketAddr,
    pub cluster: Cluster,
    pub mesh: Mesh,
    pub pool: Pool,
    /// Where hosts are claimed; None: they are listed in `pool`.
    pub cell: Option<Cell>,
    pub node: Node,
}

/// The pool's own cluster, in which this node claims room for its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    pub kubeconfig: PathBuf,
    pub claims: Claims,
}

/// What this node's claims say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The tenant's in the cell.
    pub namespace: Namespace,
    /// The tenant's tier.
    pub priority_class: Option<String>,
    /// Only hosts with these labels will do.
    pub zone: Option<String>,
    pub class: Option<String>,
    pub arch: Option<String>,
}

/// The HTTPS API that the API server calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubelet {
    pub listen: SocketAddr,
    /// CA of the clients' certificates.
    pub client_ca: PathBuf,
    /// Certificate and key; None: asked for by CSR.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// What pods are told of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    pub domain: String,
    pub dns_address: IpAddr,
    pub upstream_nameservers: Vec<IpAddr>,
    pub pod_range: IpNet,
}

/// The embedded mesh control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    pub listen: SocketAddr,
    /// Where the hosts find it: `host:port`.
    pub advertise: String,
    pub trust_domain: String,
    pub cluster_id: String,
    pub network: String,
    /// Holds the CA of the workloads' identities; its key has mode 0600.
    pub ca_dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub tls: PoolTls,
    pub hosts: Vec<PoolHost>,
}

/// This virtual node's certificate in the pool's own PKI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolTls {
    pub trust_domain: String,
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolHost {
    pub name: HostName,
    pub address: SocketAddr,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    /// What the tenant may use; None: what the pool's hosts have.
    pub quota: Option<Resources>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taint {
    pub key: String,
    pub value: String,
    pub effect: TaintEffect,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum TaintEffect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

impl TaintEffect {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoSchedule => "NoSchedule",
            Self::PreferNoSchedule => "PreferNoSchedule",
            Self::NoExecute => "NoExecute",
        }
    }
}

/// The shape of the file.
mod file {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Config {
        pub(super) node_name: String,
        pub(super) tenant: String,
        pub(super) kubeconfig: Option<PathBuf>,
        pub(super) address: IpAddr,
        pub(super) kubelet_listen: SocketAddr,
        pub(super) kubelet_client_ca: PathBuf,
        pub(super) kubelet_certificate: Option<PathBuf>,
        pub(super) kubelet_key: Option<PathBuf>,
        pub(super) metrics_listen: SocketAddr,
        #[serde(default = "cluster_domain")]
        pub(super) cluster_domain: String,
        pub(super) dns_address: IpAddr,
        #[serde(default)]
        pub(super) upstream_nameservers: Vec<IpAddr>,
        pub(super) cluster_pod_range: IpNet,
        pub(super) mesh: Mesh,
        pub(super) pool: Pool,
        pub(super) cell: Option<Cell>,
        #[serde(default)]
        pub(super) node: Node,
    }

    fn cluster_domain() -> String {
        "cluster.local".into()
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Mesh {
        pub(super) listen: SocketAddr,
        pub(super) advertise: String,
        #[serde(default = "cluster_domain")]
        pub(super) trust_domain: String,
        #[serde(default = "cluster_id")]
        pub(super) cluster_id: String,
        #[serde(default)]
        pub(super) network: String,
        pub(super) ca_dir: PathBuf,
    }

    fn cluster_id() -> String {
        "Kubernetes".into()
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Pool {
        pub(super) trust_domain: String,
        pub(super) certificate: PathBuf,
        pub(super) key: PathBuf,
        pub(super) ca: PathBuf,
        #[serde(default)]
        pub(super) hosts: Vec<PoolHost>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Cell {
        pub(super) kubeconfig: PathBuf,
        pub(super) priority_class: Option<String>,
        pub(super) zone: Option<String>,
        pub(super) class: Option<String>,
        pub(super) arch: Option<String>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct PoolHost {
        pub(super) name: String,
        pub(super) address: SocketAddr,
    }

    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Node {
        #[serde(default)]
        pub(super) labels: BTreeMap<String, String>,
        #[serde(default)]
        pub(super) taints: Vec<Taint>,
        pub(super) quota: Option<Quota>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Taint {
        pub(super) key: String,
        #[serde(default)]
        pub(super) value: String,
        pub(super) effect: TaintEffect,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Quota {
        pub(super) cpu: String,
        pub(super) memory: String,
        pub(super) ephemeral_storage: String,
        pub(super) pods: u32,
    }
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let file: file::Config = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source: Box::new(source),
        })?;
        Self::check(file).map_err(|invalid| ConfigError::Invalid {
            path: path.into(),
            invalid,
        })
    }

    fn check(file: file::Config) -> Result<Self, Invalid> {
        let node_name = node_name("node_name", file.node_name)?;
        let certificate = match (file.kubelet_certificate, file.kubelet_key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(Invalid::new(
                    "kubelet_key",
                    "is required beside kubelet_certificate",
                ));
            }
            (None, Some(_)) => {
                return Err(Invalid::new(
                    "kubelet_certificate",
                    "is required beside kubelet_key",
                ));
            }
        };
        let tenant = TenantId::parse("tenant", file.tenant)?;
        let cell = file.cell.map(|cell| claimed(cell, &tenant)).transpose()?;
        match (&cell, file.pool.hosts.is_empty()) {
            (None, true) => {
                return Err(Invalid::new(
                    "pool.hosts",
                    "must hold at least one host, unless hosts are claimed in a [cell]",
                ));
            }
            (Some(_), false) => {
                return Err(Invalid::new(
                    "pool.hosts",
                    "must be empty where hosts are claimed in a [cell]",
                ));
            }
            (None, false) | (Some(_), true) => {}
        }
        if cell.is_some() && file.node.quota.is_some() {
            return Err(Invalid::new(
                "node.quota",
                "is the cell's to say: the ResourceQuota of the tenant's namespace",
            ));
        }
        let pod_range = network("cluster_pod_range", file.cluster_pod_range)?;
        Ok(Self {
            node_name,
            tenant,
            kubeconfig: file.kubeconfig,
            address: file.address,
            kubelet: Kubelet {
                listen: file.kubelet_listen,
                client_ca: file.kubelet_client_ca,
                certificate,
            },
            metrics_listen: file.metrics_listen,
            cluster: Cluster {
                domain: file.cluster_domain,
                dns_address: file.dns_address,
                upstream_nameservers: file.upstream_nameservers,
                pod_range,
            },
            mesh: Mesh {
                listen: file.mesh.listen,
                advertise: file.mesh.advertise,
                trust_domain: file.mesh.trust_domain,
                cluster_id: file.mesh.cluster_id,
                network: file.mesh.network,
                ca_dir: file.mesh.ca_dir,
            },
            pool: Pool {
                tls: PoolTls {
                    trust_domain: file.pool.trust_domain,
                    certificate: file.pool.certificate,
                    key: file.pool.key,
                    ca: file.pool.ca,
                },
                hosts: hosts(file.pool.hosts)?,
            },
            cell,
            node: Node {
                labels: file.node.labels,
                taints: file
                    .node
                    .taints
                    .into_iter()
                    .map(|t| Taint {
                        key: t.key,
                        value: t.value,
                        effect: t.effect,
                    })
                    .collect(),
                quota: file.node.quota.map(quota).transpose()?,
            },
        })
    }
}

/// The same rule as for pods; a node's name ends in labels and host names.
pub(crate) fn node_name(field: &str, name: String) -> Result<String, Invalid> {
    let name = PodName::parse(field, name)?;
    if name.as_str().len() > 63 {
        return Err(Invalid::new(field, "must have at most 63 characters"));
    }
    Ok(name.into())
}

/// The value of a label.
pub(crate) fn label(field: &str, value: String) -> Result<String, Invalid> {
    OwnerUid::parse(field, value).map(|value| value.as_str().to_owned())
}

pub(crate) fn network(field: &str, net: IpNet) -> Result<IpNet, Invalid> {
    if net != net.trunc() {
        return Err(Invalid::new(
            field,
            format_args!("has host bits set: write {}", net.trunc()),
        ));
    }
    Ok(net)
}

fn hosts(hosts: Vec<file::PoolHost>) -> Result<Vec<PoolHost>, Invalid> {
    let mut names = BTreeSet::new();
    let mut parsed = Vec::<PoolHost>::with_capacity(hosts.len());
    for (i, host) in hosts.into_iter().enumerate() {
        let at = |field: &str| format!("pool.hosts[{i}].{field}");
        let name = HostName::parse(&at("name"), host.name)?;
        if !names.insert(name.clone()) {
            return Err(Invalid::new(
                at("name"),
                format_args!("{name:?} is taken by another host"),
            ));
        }
        parsed.push(PoolHost {
            name,
            address: host.address,
        });
    }
    Ok(parsed)
}

fn claimed(cell: file::Cell, tenant: &TenantId) -> Result<Cell, Invalid> {
    let label = |field: &str, value: Option<String>| {
        value
            .map(|value| label(&format!("cell.{field}"), value))
            .transpose()
    };
    Ok(Cell {
        kubeconfig: cell.kubeconfig,
        claims: Claims {
            namespace: pool_cell::names::namespace_of(tenant)?,
            priority_class: label("priority_class", cell.priority_class)?,
            zone: label("zone", cell.zone)?,
            class: label("class", cell.class)?,
            arch: label("arch", cell.arch)?,
        },
    })
}

fn quota(quota: file::Quota) -> Result<Resources, Invalid> {
    let refuse = |field: &'static str| move |e: quantity::InvalidQuantity| Invalid::new(field, e);
    Ok(Resources {
        cpu_millis: quantity::millis(&quota.cpu).map_err(refuse("node.quota.cpu"))?,
        memory_bytes: quantity::whole(&quota.memory).map_err(refuse("node.quota.memory"))?,
        ephemeral_storage_bytes: quantity::whole(&quota.ephemeral_storage)
            .map_err(refuse("node.quota.ephemeral_storage"))?,
        sandboxes: quota.pods,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const EXAMPLE: &str = r#"
node_name = "spindrift-demo"
tenant = "demo"
kubeconfig = "kubeconfig"
address = "192.0.2.2"
kubelet_listen = "192.0.2.2:10250"
kubelet_client_ca = "client-ca.crt"
metrics_listen = "127.0.0.1:9465"
dns_address = "10.96.0.10"
upstream_nameservers = ["192.0.2.1"]
cluster_pod_range = "10.77.0.0/16"

[mesh]
listen = "192.0.2.2:15012"
advertise = "192.0.2.2:15012"
ca_dir = "ca"

[pool]
trust_domain = "pool.spindrift"
certificate = "node.crt"
key = "node.key"
ca = "ca.crt"

[[pool.hosts]]
name = "host-a"
address = "192.0.2.11:7443"

[[pool.hosts]]
name = "host-b"
address = "192.0.2.12:7443"

[node]
taints = [{ key = "virtual-kubelet.io/provider", value = "spindrift", effect = "NoSchedule" }]
quota = { cpu = "8", memory = "16Gi", ephemeral_storage = "20Gi", pods = 220 }
"#;

    pub fn parse(text: &str) -> Result<Config, String> {
        let file: file::Config = toml::from_str(text).map_err(|e| e.to_string())?;
        Config::check(file).map_err(|e| e.to_string())
    }

    #[test]
    fn the_example_is_read_with_its_defaults() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.cluster.domain, "cluster.local");
        assert_eq!(config.mesh.cluster_id, "Kubernetes");
        assert_eq!(config.pool.hosts.len(), 2);
        assert_eq!(config.node.quota.unwrap().cpu_millis, 8000);
    }

    const CELL: &str = r#"
[cell]
kubeconfig = "cell.kubeconfig"
priority_class = "spindrift-standard"
zone = "z-1"
"#;

    /// The example without its hosts and its quota, with a cell.
    fn with_cell() -> String {
        let (before, hosts) = EXAMPLE.split_once("[[pool.hosts]]").unwrap();
        let (_, node) = hosts.split_once("[node]").unwrap();
        let node = node
            .lines()
            .filter(|line| !line.starts_with("quota"))
            .collect::<Vec<_>>();
        format!("{before}{CELL}[node]{}", node.join("\n"))
    }

    #[test]
    fn hosts_are_listed_or_claimed_in_a_cell_and_never_both() {
        let config = parse(&with_cell()).unwrap();
        let cell = config.cell.unwrap();
        assert_eq!(cell.claims.namespace.as_str(), "tenant-demo");
        assert_eq!(cell.claims.zone.as_deref(), Some("z-1"));
        assert!(config.pool.hosts.is_empty());
        for (text, said) in [
            (format!("{EXAMPLE}{CELL}"), "pool.hosts: must be empty"),
            (
                with_cell().replace(CELL, ""),
                "pool.hosts: must hold at least one host",
            ),
            (
                format!(
                    "{}\nquota = {{ cpu = \"8\", memory = \"1Gi\", ephemeral_storage = \"1Gi\", pods = 9 }}",
                    with_cell()
                ),
                "node.quota: is the cell's to say",
            ),
            (with_cell().replace("z-1", "z 1"), "cell.zone:"),
            (with_cell().replace("zone", "zones"), "unknown field `zones`"),
        ] {
            let refused = parse(&text).unwrap_err();
            assert!(refused.contains(said), "{refused} should say {said}");
        }
    }

    #[test]
    fn a_wrong_value_is_refused_by_the_name_of_its_field() {
        for (from, to, said) in [
            (
                "node_name = \"spindrift-demo\"",
                "node_name = \"Demo\"",
                "node_name:",
            ),
            ("tenant = \"demo\"", "tenant = \"a/b\"", "tenant:"),
            (
                "cluster_pod_range = \"10.77.0.0/16\"",
                "cluster_pod_range = \"10.77.0.1/16\"",
                "cluster_pod_range: has host bits set",
            ),
            ("name = \"host-b\"", "name = \"host-a\"", "pool.hosts[1].name:"),
            (
                "address = \"192.0.2.12:7443\"",
                "address = \"192.0.2.12:7443\"\npod_range = \"10.77.2.0/24\"",
                "unknown field `pod_range`",
            ),
            ("cpu = \"8\"", "cpu = \"eight\"", "node.quota.cpu:"),
            (
                "tenant = \"demo\"",
                "tenant = \"demo\"\ntennant = \"x\"",
                "unknown field `tennant`",
            ),
            (
                "kubelet_client_ca = \"client-ca.crt\"",
                "kubelet_client_ca = \"ca\"\nkubelet_key = \"key\"",
                "kubelet_certificate: is required",
            ),
        ] {
            let text = EXAMPLE.replacen(from, to, 1);
            assert_ne!(text, EXAMPLE, "{from}");
            let refused = parse(&text).unwrap_err();
            assert!(refused.contains(said), "{refused} should say {said}");
        }
    }
}
