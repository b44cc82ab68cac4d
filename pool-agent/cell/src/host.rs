//! A host of the pool as a Node of the cell: what its agent writes there, and what it
//! reads back.

use std::{collections::BTreeMap, net::IpAddr};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{ContainerImage, Node, NodeAddress, NodeSpec, NodeStatus, NodeSystemInfo, Taint},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use pool_agent_api::{HostName, Pressure, Resources};
use serde_json::{Map, Value, json};

use crate::{
    names,
    patch::{self, Finding},
    quantity::quantities,
};

/// The Kubernetes release whose node this is; what skew checks look at.
pub const KUBELET_VERSION: &str = concat!("v1.37.2+spindrift.", env!("CARGO_PKG_VERSION"));
/// As many as a kubelet tells: they are in every copy of the Node.
const MOST_IMAGES: usize = 50;
const MOST_NAMES: usize = 5;

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNode {
    pub name: HostName,
    /// In the underlay.
    pub address: IpAddr,
    pub zone: Option<String>,
    pub region: Option<String>,
    pub class: Option<String>,
    /// As its cloud names it.
    pub provider_id: Option<String>,
    /// Beyond the pool's own; set when the Node is made, and afterwards others'.
    pub taints: Vec<(String, String)>,
    pub capacity: Resources,
    /// Without what is kept for the host itself.
    pub allocatable: Resources,
    /// Why no claim could start here; None if all is well.
    pub unready: Option<String>,
    pub pressure: Pressure,
    pub facts: NodeFacts,
    pub images: Vec<HostImage>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Another one: the host, not its agent, has started anew.
    pub boot_id: String,
    /// Another one: it is another machine.
    pub machine_id: String,
    pub system_uuid: String,
    pub kernel_version: String,
    pub os_image: String,
    pub runtime_version: String,
    /// GOARCH.
    pub architecture: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostImage {
    /// Tags and digests, as the runtime names them.
    pub names: Vec<String>,
    pub bytes: u64,
}

/// What a Node says that is not its agent's to decide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostRecord {
    pub uid: String,
    /// Cordoned: it takes no new sandboxes.
    pub unschedulable: bool,
    /// The range its pods get addresses from, if the cell assigns any.
    pub pod_ranges: Vec<String>,
    pub boot_id: String,
    pub machine_id: String,
}

impl HostRecord {
    pub fn read(node: &Node) -> Self {
        let spec = node.spec.clone().unwrap_or_default();
        let info = node.status.as_ref().and_then(|s| s.node_info.clone());
        let info = info.unwrap_or_default();
        Self {
            uid: node.metadata.uid.clone().unwrap_or_default(),
            unschedulable: spec.unschedulable.unwrap_or_default(),
            pod_ranges: spec
                .pod_cidrs
                .unwrap_or_else(|| spec.pod_cidr.into_iter().collect()),
            boot_id: info.boot_id,
            machine_id: info.machine_id,
        }
    }
}

impl HostNode {
    /// A Node that is not there yet. NodeRestriction lets a node taint itself now and
    /// never again.
    pub fn node(&self, now: Timestamp) -> Node {
        let pool = (names::POOL_TAINT.to_owned(), "NoSchedule".to_owned());
        let own = [pool];
        // A NodePool's template names the pool's own, too; a Node with one taint twice is
        // refused.
        let others = self.taints.iter().filter(|taint| !own.contains(taint));
        let taints = own.iter().chain(others).map(|(key, effect)| Taint {
            key: key.clone(),
            effect: effect.clone(),
            ..Taint::default()
        });
        Node {
            metadata: ObjectMeta {
                name: Some(self.name.to_string()),
                labels: Some(self.labels()),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                taints: Some(taints.collect()),
                provider_id: self.provider_id.clone(),
                ..NodeSpec::default()
            }),
            status: Some(self.status(&Node::default(), now)),
        }
    }

    fn labels(&self) -> BTreeMap<String, String> {
        [
            (names::HOSTNAME, Some(self.name.as_str())),
            (names::OS, Some("linux")),
            (names::ARCH, Some(self.facts.architecture.as_str())),
            (names::ZONE, self.zone.as_deref()),
            (names::REGION, self.region.as_deref()),
            (names::CLASS, self.class.as_deref()),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
        .collect()
    }

    /// A merge patch of what of the labels and the provider's id is missing or
    /// differs; None if nothing does.
    pub fn metadata_patch(&self, node: &Node) -> Option<Value> {
        let current = node.metadata.labels.clone().unwrap_or_default();
        let missing: BTreeMap<String, String> = self
            .labels()
            .into_iter()
            .filter(|(key, value)| current.get(key) != Some(value))
            .collect();
        let known = node.spec.as_ref().and_then(|s| s.provider_id.clone());
        // Once it is set it stays: the API server refuses another.
        let provider_id = self.provider_id.clone().filter(|_| known.is_none());
        if missing.is_empty() && provider_id.is_none() {
            return None;
        }
        let mut patch = Map::new();
        let mut metadata = Map::new();
        metadata.insert("uid".into(), json!(node.metadata.uid));
        if !missing.is_empty() {
            metadata.insert("labels".into(), json!(missing));
        }
        patch.insert("metadata".into(), Value::Object(metadata));
        if let Some(id) = provider_id {
            patch.insert("spec".into(), json!({ "providerID": id }));
        }
        Some(Value::Object(patch))
    }

    /// A strategic merge patch of the status; None if nothing differs and no
    /// heartbeat is `due`.
    pub fn status_patch(&self, node: &Node, now: Timestamp, due: bool) -> Option<Value> {
        patch::node_status(node, &self.status(node, now), due)
    }

    fn status(&self, node: &Node, now: Timestamp) -> NodeStatus {
        let address = |kind: &str, address: String| NodeAddress {
            type_: kind.into(),
            address,
        };
        let old = node.status.as_ref().and_then(|s| s.conditions.as_ref());
        let old = old.into_iter().flatten().collect::<Vec<_>>();
        let images = self.images.iter().take(MOST_IMAGES).map(|image| ContainerImage {
            names: Some(image.names.iter().take(MOST_NAMES).cloned().collect()),
            size_bytes: i64::try_from(image.bytes).ok(),
        });
        NodeStatus {
            addresses: Some(vec![
                address("InternalIP", self.address.to_string()),
                address("Hostname", self.name.to_string()),
            ]),
            capacity: Some(quantities(self.capacity)),
            allocatable: Some(quantities(self.allocatable)),
            conditions: Some(patch::conditions(self.findings(), old, now)),
            images: Some(images.collect()),
            node_info: Some(NodeSystemInfo {
                boot_id: self.facts.boot_id.clone(),
                machine_id: self.facts.machine_id.clone(),
                system_uuid: self.facts.system_uuid.clone(),
                kernel_version: self.facts.kernel_version.clone(),
                os_image: self.facts.os_image.clone(),
                container_runtime_version: self.facts.runtime_version.clone(),
                kubelet_version: KUBELET_VERSION.into(),
                operating_system: "linux".into(),
                architecture: self.facts.architecture.clone(),
                ..NodeSystemInfo::default()
            }),
            ..NodeStatus::default()
        }
    }

    fn findings(&self) -> [Finding; 4] {
        let pressure = |kind, short, yes, no, what: &str| Finding {
            kind,
            holds: short,
            reason: if short { yes } else { no },
            message: if short {
                format!("the host is short of {what}")
            } else {
                format!("the host has sufficient {what}")
            },
        };
        [
            pressure(
                "MemoryPressure",
                self.pressure.memory,
                "KubeletHasInsufficientMemory",
                "KubeletHasSufficientMemory",
                "memory",
            ),
            pressure(
                "DiskPressure",
                self.pressure.disk,
                "KubeletHasDiskPressure",
                "KubeletHasNoDiskPressure",
                "disk space",
            ),
            pressure(
                "PIDPressure",
                self.pressure.pids,
                "KubeletHasInsufficientPID",
                "KubeletHasSufficientPID",
                "process ids",
            ),
            Finding {
                kind: "Ready",
                holds: self.unready.is_none(),
                reason: if self.unready.is_none() {
                    "AgentReady"
                } else {
                    "AgentNotReady"
                },
                message: match &self.unready {
                    None => "the agent takes claims".into(),
                    Some(why) => why.clone(),
                },
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostNode {
        HostNode {
            name: "host-a".parse().unwrap(),
            address: "192.0.2.10".parse().unwrap(),
            zone: Some("z1".into()),
            region: None,
            class: Some("burst".into()),
            provider_id: Some("lab://host-a".into()),
            taints: vec![
                ("karpenter.sh/unregistered".into(), "NoExecute".into()),
                ("spindrift.dev/pool".into(), "NoSchedule".into()),
            ],
            capacity: Resources {
                cpu_millis: 2000,
                memory_bytes: 4 << 30,
                ephemeral_storage_bytes: 1 << 34,
                sandboxes: 110,
            },
            allocatable: Resources {
                cpu_millis: 1900,
                memory_bytes: 3 << 30,
                ephemeral_storage_bytes: 1 << 33,
                sandboxes: 110,
            },
            unready: None,
            pressure: Pressure::default(),
            facts: NodeFacts {
                boot_id: "boot-1".into(),
                architecture: "amd64".into(),
                ..NodeFacts::default()
            },
            images: vec![],
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_new_node_keeps_other_pods_away_and_says_where_and_what_it_is() {
        let node = host().node(at(5));
        let taints = node.spec.as_ref().unwrap().taints.clone().unwrap();
        assert_eq!(
            taints
                .iter()
                .map(|t| (t.key.as_str(), t.effect.as_str()))
                .collect::<Vec<_>>(),
            [
                ("spindrift.dev/pool", "NoSchedule"),
                ("karpenter.sh/unregistered", "NoExecute")
            ]
        );
        let labels = node.metadata.labels.clone().unwrap();
        assert_eq!(labels["topology.kubernetes.io/zone"], "z1");
        assert_eq!(labels["spindrift.dev/class"], "burst");
        assert!(!labels.contains_key("topology.kubernetes.io/region"));
        assert_eq!(HostRecord::read(&node).boot_id, "boot-1");
        let allocatable = node.status.unwrap().allocatable.unwrap();
        assert_eq!(allocatable["cpu"].0, "1900m");
    }

    #[test]
    fn nothing_is_written_that_stands_there_and_a_pressure_is_since_it_began() {
        let mut host = host();
        let node = host.node(at(5));
        assert_eq!(host.metadata_patch(&node), None);
        assert_eq!(host.status_patch(&node, at(9), false), None);
        assert!(host.status_patch(&node, at(9), true).is_some());
        host.pressure.memory = true;
        let patch = host.status_patch(&node, at(9), false).unwrap();
        let conditions = patch["status"]["conditions"].as_array().unwrap();
        let of = |kind: &str| conditions.iter().find(|c| c["type"] == kind).unwrap();
        assert_eq!(of("MemoryPressure")["status"], "True");
        assert_eq!(of("MemoryPressure")["lastTransitionTime"], "1970-01-01T00:00:09Z");
        assert_eq!(of("Ready")["lastTransitionTime"], "1970-01-01T00:00:05Z");
        assert!(patch["status"].get("capacity").is_none());
    }

    #[test]
    fn an_amount_that_the_api_server_spells_otherwise_is_not_written_again() {
        let mut host = host();
        host.capacity.memory_bytes = 64 << 30;
        host.capacity.ephemeral_storage_bytes = 10_000;
        let mut node = host.node(at(5));
        let capacity = node.status.as_mut().unwrap().capacity.as_mut().unwrap();
        for (name, ours, theirs) in [
            ("memory", "67108864Ki", "64Gi"),
            ("ephemeral-storage", "10000", "10k"),
        ] {
            assert_eq!(capacity[name].0, ours);
            capacity.get_mut(name).unwrap().0 = theirs.into();
        }
        assert_eq!(host.status_patch(&node, at(9), false), None);
        host.capacity.memory_bytes += 1024;
        let patch = host.status_patch(&node, at(9), false).unwrap();
        assert_eq!(patch["status"]["capacity"]["memory"], "67108865Ki");
        assert!(patch["status"].get("allocatable").is_none());
    }

    #[test]
    fn labels_that_others_took_away_come_back_and_theirs_stay() {
        let host = host();
        let mut node = host.node(at(5));
        let labels = node.metadata.labels.as_mut().unwrap();
        labels.insert("theirs".into(), "x".into());
        labels.remove("spindrift.dev/class");
        // Karpenter takes its own away when it has seen the host.
        node.spec.as_mut().unwrap().taints = None;
        let patch = host.metadata_patch(&node).unwrap();
        assert_eq!(
            patch["metadata"]["labels"],
            json!({"spindrift.dev/class": "burst"})
        );
        assert!(patch.get("spec").is_none());
    }
}
