//! The `VirtualNode` resource: one node of one tenant, as the pool's operator
//! describes it in the cell. Its schema is `deploy/cell/virtualnodes.yaml`; a test
//! holds the two together.
//!
//! It is in the tenant's namespace there, and names Secrets of that namespace only: who
//! may write it can use no credentials but those that are already beside it.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};
use kube::Resource;
use serde::{Deserialize, Serialize};

use crate::config::TaintEffect;

/// Takes the node out of the tenant's cluster before the object goes.
pub(crate) const FINALIZER: &str = "spindrift.dev/node";
/// Annotation, `true`: the tenant's cluster is gone for ever. The object goes without
/// asking it; what runs is ended by the cell.
pub(crate) const ABANDON: &str = "spindrift.dev/abandon";

#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
pub struct VirtualNode {
    pub metadata: ObjectMeta,
    pub spec: Spec,
    #[serde(default)]
    pub status: Option<Status>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Of the Node in the tenant's cluster.
    pub node_name: String,
    /// Keys `kubeconfig` and `kubelet-client-ca.crt`.
    pub kubeconfig_secret: SecretName,
    /// The tenant's certificate in the pool: `tls.crt`, `tls.key`, `ca.crt`.
    pub pool_secret: SecretName,
    /// The Node's InternalIP; by default the replicas' common address.
    pub address: Option<String>,
    pub priority_class_name: Option<String>,
    pub zone: Option<String>,
    pub class: Option<String>,
    pub arch: Option<String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub taints: Vec<Taint>,
    pub cluster: Cluster,
    #[serde(default)]
    pub mesh: Mesh,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct SecretName {
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Taint {
    pub key: String,
    #[serde(default)]
    pub value: String,
    pub effect: TaintEffect,
}

/// What pods are told of the tenant's cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    #[serde(default = "cluster_local")]
    pub domain: String,
    pub dns_address: String,
    #[serde(default)]
    pub upstream_nameservers: Vec<String>,
    pub pod_range: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mesh {
    #[serde(default)]
    pub source: MeshSource,
    #[serde(default = "cluster_local")]
    pub trust_domain: String,
    #[serde(default = "kubernetes")]
    pub cluster_id: String,
    #[serde(default)]
    pub network: String,
}

/// Where the mesh's control plane comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum MeshSource {
    /// In the virtual node, made from the tenant's cluster.
    #[default]
    Embedded,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            source: MeshSource::default(),
            trust_domain: cluster_local(),
            cluster_id: kubernetes(),
            network: String::new(),
        }
    }
}

fn cluster_local() -> String {
    "cluster.local".into()
}

fn kubernetes() -> String {
    "Kubernetes".into()
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub observed_generation: Option<i64>,
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// The replica that has it.
    pub holder: Option<String>,
    /// Grows with each change of the holder; hosts refuse a lower one.
    pub epoch: Option<i64>,
    /// Where it is served, at the replicas' common address.
    pub ports: Option<Ports>,
    /// UID of the Node; none until it was registered.
    pub node_uid: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Ports {
    pub kubelet: u16,
    pub mesh: u16,
}

impl Resource for VirtualNode {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "VirtualNode".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "spindrift.dev".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1alpha1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "virtualnodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Which one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl VirtualNode {
    pub fn key(&self) -> Option<Key> {
        Some(Key {
            namespace: self.metadata.namespace.clone()?,
            name: self.metadata.name.clone()?,
        })
    }

    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    pub fn is_going(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// It waits for us to let it go.
    pub fn is_held(&self) -> bool {
        self.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
    }

    pub fn is_abandoned(&self) -> bool {
        let annotations = self.metadata.annotations.as_ref();
        annotations
            .and_then(|a| a.get(ABANDON))
            .is_some_and(|v| v == "true")
    }

    pub fn ports(&self) -> Option<Ports> {
        self.status.as_ref()?.ports
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;

    /// Every field that there is, filled in.
    pub(crate) fn example() -> Value {
        json!({
            "metadata": {"name": "burst", "namespace": "tenant-acme", "uid": "u-1", "generation": 1},
            "spec": {
                "nodeName": "spindrift-acme",
                "kubeconfigSecret": {"name": "kubeconfig"},
                "poolSecret": {"name": "pool"},
                "address": "192.0.2.2",
                "priorityClassName": "spindrift-standard",
                "zone": "z-1",
                "class": "standard",
                "arch": "amd64",
                "labels": {"a": "b"},
                "taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}],
                "cluster": {
                    "domain": "cluster.local",
                    "dnsAddress": "10.96.0.10",
                    "upstreamNameservers": ["192.0.2.1"],
                    "podRange": "10.77.0.0/16",
                },
                "mesh": {
                    "source": "Embedded",
                    "trustDomain": "cluster.local",
                    "clusterId": "Kubernetes",
                    "network": "n",
                },
            },
            "status": {
                "observedGeneration": 1,
                "conditions": [{
                    "type": "Ready", "status": "True", "reason": "NodeReady", "message": "m",
                    "observedGeneration": 1, "lastTransitionTime": "2026-11-27T19:00:00Z",
                }],
                "holder": "a",
                "epoch": 3,
                "ports": {"kubelet": 20000, "mesh": 20001},
                "nodeUid": "n-1",
            },
        })
    }

    const CRD: &str = include_str!("../../../deploy/cell/virtualnodes.yaml");

    /// Paths of all fields, `[]` for the elements of a list, `*` for a map's values.
    fn fields_of(value: &Value, at: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    let name = if at == "spec.labels" { "*" } else { name };
                    let at = format!("{at}.{name}");
                    found.insert(at.clone());
                    fields_of(value, &at, found);
                }
            }
            Value::Array(list) => list.iter().for_each(|v| fields_of(v, &format!("{at}[]"), found)),
            _ => {}
        }
    }

    fn fields_of_schema(schema: &Value, at: &str, found: &mut BTreeSet<String>) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let at = format!("{at}.{name}");
            found.insert(at.clone());
            fields_of_schema(property, &at, found);
        }
        if schema["items"].is_object() {
            fields_of_schema(&schema["items"], &format!("{at}[]"), found);
        }
        if schema["additionalProperties"].is_object() {
            found.insert(format!("{at}.*"));
        }
    }

    #[test]
    fn the_schema_and_the_types_have_the_same_fields() {
        let crd: Value = serde_saphyr::from_str(CRD).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        let parsed: VirtualNode = serde_json::from_value(example()).unwrap();
        let written = serde_json::to_value(&parsed).unwrap();
        for part in ["spec", "status"] {
            // Nothing of the example is lost: the types know each of its fields.
            assert_eq!(written[part], example()[part]);
            let (mut ours, mut theirs) = (BTreeSet::new(), BTreeSet::new());
            fields_of(&written[part], part, &mut ours);
            fields_of_schema(&schema[part], part, &mut theirs);
            assert_eq!(ours, theirs);
        }
        let kind = &crd["spec"]["names"]["kind"];
        assert_eq!(kind, VirtualNode::kind(&()).as_ref());
        assert_eq!(crd["spec"]["group"], VirtualNode::group(&()).as_ref());
        assert_eq!(
            crd["spec"]["versions"][0]["name"],
            VirtualNode::version(&()).as_ref()
        );
    }

    #[test]
    fn what_the_schema_requires_is_what_the_types_cannot_do_without() {
        let crd: Value = serde_saphyr::from_str(CRD).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let spec = example()["spec"].clone();
        for (name, _) in schema["properties"].as_object().unwrap() {
            let mut without = spec.clone();
            without.as_object_mut().unwrap().remove(name);
            let required = schema["required"].as_array().unwrap().iter().any(|r| r == name);
            let refused = serde_json::from_value::<Spec>(without).is_err();
            assert_eq!(refused, required, "{name}");
        }
    }
}
