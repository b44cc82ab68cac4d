//! What the Node should look like. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
        NodeSystemInfo, Taint,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use pool_agent_api::{Pressure, Resources};
use pool_cell::{
    host::KUBELET_VERSION,
    patch::{self, Finding},
    quantity::{self, quantities},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Identity;
use crate::{config, pool::HostTable};

/// What pods may use now: the quota, or what the hosts in reach have for them.
pub(crate) fn allocatable(identity: &Identity, hosts: &HostTable) -> Resources {
    let reachable = hosts.values().filter(|h| h.reachable);
    identity.settings.quota.unwrap_or_else(|| {
        reachable
            .filter_map(|h| h.host.as_ref())
            .fold(Resources::default(), |sum, host| {
                sum.saturating_add(host.allocatable)
            })
    })
}

fn capacity(identity: &Identity, hosts: &HostTable) -> Resources {
    identity.settings.quota.unwrap_or_else(|| {
        hosts
            .values()
            .filter_map(|h| h.host.as_ref())
            .fold(Resources::default(), |sum, host| {
                sum.saturating_add(host.capacity)
            })
    })
}

/// What a Node says that pods may use; None of one that does not say.
pub(super) fn offered(node: &Node) -> Option<Resources> {
    let said = node.status.as_ref()?.allocatable.as_ref()?;
    let of = |name: &str| said.get(name).map(|amount| amount.0.as_str());
    let offered = Resources {
        cpu_millis: quantity::millis(of("cpu")?).ok()?,
        memory_bytes: quantity::whole(of("memory")?).ok()?,
        ephemeral_storage_bytes: quantity::whole(of("ephemeral-storage")?).ok()?,
        sandboxes: u32::try_from(quantity::whole(of("pods")?).ok()?).ok()?,
    };
    // One that was registered before it was known what it has.
    Some(offered).filter(|offered| offered.sandboxes > 0)
}

/// Whether there is a pool behind the Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    Hosts {
        reachable: usize,
        all: usize,
    },
    /// `known`: it has said once what the tenant may use.
    Cell {
        known: bool,
    },
}

impl Standing {
    pub(super) fn of_hosts(hosts: &HostTable) -> Self {
        Self::Hosts {
            reachable: hosts.values().filter(|h| h.reachable).count(),
            all: hosts.len(),
        }
    }

    pub(super) fn of_quota(quota: Option<Resources>) -> Self {
        Self::Cell {
            known: quota.is_some(),
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        match self {
            Self::Hosts { reachable, .. } => *reachable > 0,
            Self::Cell { known } => *known,
        }
    }
}

/// The Node as it should be, given what it is.
pub(super) struct Shape {
    name: String,
    settings: config::Node,
    status: NodeStatus,
    ready: bool,
}

impl Shape {
    pub(super) fn new(
        identity: &Identity,
        hosts: &HostTable,
        standing: &Standing,
        node: &Node,
        now: Timestamp,
    ) -> Self {
        let ready = standing.is_ready();
        let old = node.status.clone().unwrap_or_default();
        Self {
            name: identity.name.clone(),
            settings: identity.settings.clone(),
            status: NodeStatus {
                addresses: Some(vec![
                    NodeAddress {
                        type_: "InternalIP".into(),
                        address: identity.address.to_string(),
                    },
                    NodeAddress {
                        type_: "Hostname".into(),
                        address: identity.name.clone(),
                    },
                ]),
                capacity: Some(quantities(capacity(identity, hosts))),
                allocatable: Some(quantities(allocatable(identity, hosts))),
                conditions: Some(conditions(
                    standing,
                    hosts,
                    old.conditions.as_deref().unwrap_or_default(),
                    now,
                )),
                daemon_endpoints: Some(NodeDaemonEndpoints {
                    kubelet_endpoint: Some(DaemonEndpoint {
                        port: identity.kubelet_port.into(),
                    }),
                }),
                node_info: Some(node_info(identity, hosts)),
                ..NodeStatus::default()
            },
            ready,
        }
    }

    pub(super) fn ready(&self) -> bool {
        self.ready
    }

    /// A Node that is not there yet. Its taints are set here and never again:
    /// afterwards they are the cluster's.
    pub(super) fn node(&self) -> Node {
        let taints: Vec<Taint> = self
            .settings
            .taints
            .iter()
            .map(|t| Taint {
                key: t.key.clone(),
                value: Some(t.value.clone()).filter(|v| !v.is_empty()),
                effect: t.effect.as_str().into(),
                time_added: None,
            })
            .collect();
        Node {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some(self.labels()),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                taints: Some(taints).filter(|t| !t.is_empty()),
                ..NodeSpec::default()
            }),
            status: Some(self.status.clone()),
        }
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let arch = self.status.node_info.as_ref().map(|i| i.architecture.clone());
        let arch = arch.filter(|a| !a.is_empty());
        let mut labels = BTreeMap::from(
            [
                ("kubernetes.io/hostname", self.name.as_str()),
                ("kubernetes.io/os", "linux"),
                ("kubernetes.io/arch", arch.as_deref().unwrap_or(NATIVE)),
                // The cluster autoscaler passes such nodes over.
                ("type", "virtual-kubelet"),
                ("node.kubernetes.io/exclude-from-external-load-balancers", "true"),
            ]
            .map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        labels.extend(self.settings.labels.clone());
        labels
    }

    /// Labels of ours that are missing or differ.
    pub(super) fn metadata_patch(&self, node: &Node) -> Option<Value> {
        let current = node.metadata.labels.clone().unwrap_or_default();
        let missing: BTreeMap<String, String> = self
            .labels()
            .into_iter()
            .filter(|(key, value)| current.get(key) != Some(value))
            .collect();
        (!missing.is_empty()).then(|| json!({"metadata": {"uid": node.metadata.uid, "labels": missing}}))
    }

    /// What of the status differs; all conditions, with fresh heartbeats, if
    /// anything does or it is `due`.
    pub(super) fn status_patch(&self, node: &Node, due: bool) -> Option<Value> {
        patch::node_status(node, &self.status, due)
    }
}

/// Until a host has said what it is.
const NATIVE: &str = match std::env::consts::ARCH.as_bytes() {
    b"aarch64" => "arm64",
    _ => "amd64",
};

fn conditions(
    standing: &Standing,
    hosts: &HostTable,
    old: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let reachable = hosts.values().filter(|h| h.reachable);
    let pressures: Vec<Pressure> = reachable
        .filter_map(|h| h.host.as_ref().map(|h| h.pressure))
        .collect();
    // Placement leaves a host that is short alone: the node is, once all are. Over a cell
    // others may come.
    let listed = matches!(standing, Standing::Hosts { .. });
    let all =
        |pressed: fn(&Pressure) -> bool| listed && !pressures.is_empty() && pressures.iter().all(pressed);
    let ready = match standing {
        Standing::Hosts { reachable: 0, all } => (
            false,
            "PoolUnreachable",
            format!("none of the {all} hosts of the pool is in reach"),
        ),
        Standing::Hosts { .. } => (true, "PoolReady", "hosts of the pool are in reach".to_owned()),
        Standing::Cell { known: true } => (
            true,
            "PoolReady",
            "the pool finds a host for each pod, within the tenant's quota".to_owned(),
        ),
        Standing::Cell { known: false } => (
            false,
            "PoolUnreachable",
            "the pool has not said yet what the tenant may use".to_owned(),
        ),
    };
    let told = |holds: bool, when: [&'static str; 2], otherwise: [&'static str; 2]| {
        let [reason, message] = if holds { when } else { otherwise };
        (holds, reason, message.to_owned())
    };
    let memory = told(
        all(|p| p.memory),
        [
            "KubeletHasInsufficientMemory",
            "all hosts of the pool are short of memory",
        ],
        [
            "KubeletHasSufficientMemory",
            "hosts of the pool have sufficient memory available",
        ],
    );
    let disk = told(
        all(|p| p.disk),
        [
            "KubeletHasDiskPressure",
            "all hosts of the pool are short of disk",
        ],
        [
            "KubeletHasNoDiskPressure",
            "hosts of the pool have no disk pressure",
        ],
    );
    let pid = told(
        all(|p| p.pids),
        [
            "KubeletHasInsufficientPID",
            "all hosts of the pool are short of PIDs",
        ],
        [
            "KubeletHasSufficientPID",
            "hosts of the pool have sufficient PIDs available",
        ],
    );
    let network = (
        false,
        "RouteCreated",
        "each host routes its slice of the pod range".to_owned(),
    );
    let findings = [
        ("MemoryPressure", memory.0, memory.1, memory.2),
        ("DiskPressure", disk.0, disk.1, disk.2),
        ("PIDPressure", pid.0, pid.1, pid.2),
        ("NetworkUnavailable", network.0, network.1, network.2),
        ("Ready", ready.0, ready.1, ready.2),
    ]
    .map(|(kind, holds, reason, message)| Finding {
        kind,
        holds,
        reason,
        message,
    });
    patch::conditions(findings, old, now)
}

fn node_info(identity: &Identity, hosts: &HostTable) -> NodeSystemInfo {
    let first = hosts.values().find_map(|h| h.host.clone());
    // There is no machine; ids that last as long as the node does.
    let id = |what: &str| {
        let digest = Sha256::digest(format!("{what}/{}/{}", identity.tenant, identity.name));
        digest[..16]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect::<String>()
    };
    let of_host =
        |get: fn(&pool_agent_api::Host) -> &String| first.as_deref().map(get).cloned().unwrap_or_default();
    NodeSystemInfo {
        machine_id: id("machine"),
        system_uuid: id("system"),
        boot_id: id("boot"),
        kernel_version: of_host(|h| &h.kernel_version),
        os_image: of_host(|h| &h.os_image),
        container_runtime_version: of_host(|h| &h.runtime_version),
        kubelet_version: KUBELET_VERSION.into(),
        kube_proxy_version: String::new(),
        operating_system: "linux".into(),
        architecture: first
            .as_deref()
            .map_or_else(|| NATIVE.to_owned(), |h| h.architecture.clone()),
        ..NodeSystemInfo::default()
    }
}

#[cfg(test)]
mod tests;
