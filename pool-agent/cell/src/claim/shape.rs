//! The Pod that a claim is, and the claim that a Pod is, if it is one.
//!
//! Parsing does not list what is forbidden: it reads the claim's parts, makes the
//! Pod that they make, and compares. What the API server fills in is taken out of
//! both sides first, and named here.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::core::v1::{
        Affinity, Container, Pod, PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec,
        ResourceRequirements, Toleration, WeightedPodAffinityTerm,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta},
    },
};
use pool_agent_api::{Attempt, Invalid, Namespace, PodName, PodUid, Resources, SandboxKey};
use serde_json::Value;

use super::{Claim, ClaimParts, OwnerUid};
use crate::{names, quantity};

/// A Pod that is no claim: the first field that is not as a claim's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct NotAClaim {
    /// As in the Pod: `spec.containers[0].securityContext`.
    pub field: String,
    pub problem: String,
}

impl NotAClaim {
    fn new(field: impl Into<String>, problem: impl ToString) -> Self {
        Self {
            field: field.into(),
            problem: problem.to_string(),
        }
    }
}

impl From<Invalid> for NotAClaim {
    fn from(invalid: Invalid) -> Self {
        Self {
            field: invalid.field,
            problem: invalid.problem,
        }
    }
}

/// How long a claim stays on a host that the cell does not hear from, before the
/// cell gives notice: Kubernetes' own default, made explicit.
const UNHEARD_SECONDS: i64 = 300;
const SCHEDULER: &str = "default-scheduler";

impl Claim {
    pub fn to_pod(&self) -> Pod {
        let mut labels = BTreeMap::from([
            (names::POD_UID.to_owned(), self.key.pod.to_string()),
            (names::ATTEMPT.to_owned(), self.key.attempt.to_string()),
        ]);
        if let Some(owner) = &self.owner {
            labels.insert(names::OWNER.to_owned(), owner.to_string());
        }
        let annotations = BTreeMap::from([
            (names::POD.to_owned(), format!("{}/{}", self.namespace, self.name)),
            (names::NODE.to_owned(), self.node_name.clone()),
        ]);
        Pod {
            metadata: ObjectMeta {
                name: Some(self.cell_name()),
                namespace: Some(self.cell_namespace()),
                labels: Some(labels),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: Some(self.spec()),
            status: None,
        }
    }

    fn spec(&self) -> PodSpec {
        let selector: BTreeMap<String, String> = [
            (names::ZONE, &self.zone),
            (names::CLASS, &self.class),
            (names::ARCH, &self.arch),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)))
        .collect();
        let containers = self.images.iter().enumerate().map(|(i, image)| {
            let requests = if i == 0 {
                self.requests
            } else {
                Resources::default()
            };
            container(i, image, requests)
        });
        PodSpec {
            containers: containers.collect(),
            affinity: self.owner.as_ref().map(apart_from_siblings),
            node_selector: Some(selector).filter(|s| !s.is_empty()),
            tolerations: Some(tolerations()),
            runtime_class_name: self.runtime_class.clone(),
            priority_class_name: self.priority_class.clone(),
            termination_grace_period_seconds: i64::try_from(self.grace.as_secs()).ok(),
            restart_policy: Some("Never".into()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // What the API server would fill in, so that nothing is left to it.
            dns_policy: Some("Default".into()),
            scheduler_name: Some(SCHEDULER.into()),
            security_context: Some(PodSecurityContext::default()),
            ..PodSpec::default()
        }
    }

    /// The claim that a Pod is. Refused by field if it is not exactly that.
    pub fn parse(pod: &Pod) -> Result<Self, NotAClaim> {
        let meta = &pod.metadata;
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let tenant = names::tenant_of(namespace)
            .ok_or_else(|| NotAClaim::new("metadata.namespace", "is no tenant's"))?;
        let label = |key: &str| meta.labels.as_ref().and_then(|l| l.get(key));
        let annotation = |key: &str| meta.annotations.as_ref().and_then(|a| a.get(key));
        let field_of = |kind: &str, key: &str| format!("metadata.{kind}[{key}]");
        let needed = |kind: &str, key: &str, value: Option<&String>| {
            value
                .cloned()
                .ok_or_else(|| NotAClaim::new(field_of(kind, key), "is missing"))
        };
        let uid = needed("labels", names::POD_UID, label(names::POD_UID))?;
        let attempt = needed("labels", names::ATTEMPT, label(names::ATTEMPT))?;
        let attempt_field = field_of("labels", names::ATTEMPT);
        let attempt = attempt
            .parse()
            .ok()
            .filter(|n: &u32| n.to_string() == attempt)
            .ok_or_else(|| NotAClaim::new(&attempt_field, "is not a number"))?;
        let key = SandboxKey {
            pod: PodUid::parse(&field_of("labels", names::POD_UID), uid)?,
            attempt: Attempt::parse(&attempt_field, attempt)?,
        };
        if meta.name.as_deref() != Some(names::claim_name(&key).as_str()) {
            return Err(NotAClaim::new(
                "metadata.name",
                "is not UID-ATTEMPT of its labels",
            ));
        }
        let owner = match label(names::OWNER) {
            Some(owner) => Some(OwnerUid::parse(&field_of("labels", names::OWNER), owner.clone())?),
            None => None,
        };
        let of_pod = needed("annotations", names::POD, annotation(names::POD))?;
        let pod_field = field_of("annotations", names::POD);
        let (pod_namespace, pod_name) = of_pod
            .split_once('/')
            .ok_or_else(|| NotAClaim::new(&pod_field, "is not namespace/name"))?;
        let spec = pod
            .spec
            .as_ref()
            .ok_or_else(|| NotAClaim::new("spec", "is missing"))?;
        let selector = |key: &str| spec.node_selector.as_ref().and_then(|s| s.get(key)).cloned();
        let grace = spec
            .termination_grace_period_seconds
            .and_then(|s| u64::try_from(s).ok())
            .ok_or_else(|| NotAClaim::new("spec.terminationGracePeriodSeconds", "is missing"))?;
        let claim = Self::new(ClaimParts {
            tenant,
            key,
            namespace: Namespace::parse(&pod_field, pod_namespace)?,
            name: PodName::parse(&pod_field, pod_name)?,
            node_name: needed("annotations", names::NODE, annotation(names::NODE))?,
            requests: requested(spec)?,
            images: spec
                .containers
                .iter()
                .map(|c| c.image.clone().unwrap_or_default())
                .collect(),
            runtime_class: spec.runtime_class_name.clone(),
            priority_class: spec.priority_class_name.clone(),
            owner,
            zone: selector(names::ZONE),
            class: selector(names::CLASS),
            arch: selector(names::ARCH),
            grace: Duration::from_secs(grace),
        })
        .map_err(|e| NotAClaim::from(e.within("claim")))?;
        match difference("spec", &comparable(spec), &comparable(&claim.spec())) {
            Some(field) => Err(NotAClaim::new(field, "is not as in a claim")),
            None => Ok(claim),
        }
    }
}

fn container(i: usize, image: &str, requests: Resources) -> Container {
    let mut amounts = quantity::quantities(requests);
    amounts.remove("pods");
    Container {
        name: format!("image-{i}"),
        image: Some(image.to_owned()),
        image_pull_policy: Some("IfNotPresent".into()),
        // Each says what it asks for, also nothing: a quota wants it of every container.
        resources: Some(ResourceRequirements {
            requests: Some(amounts),
            ..ResourceRequirements::default()
        }),
        termination_message_path: Some("/dev/termination-log".into()),
        termination_message_policy: Some("File".into()),
        ..Container::default()
    }
}

/// The pool's taint, and what the API server gives to every Pod that has none.
fn tolerations() -> Vec<Toleration> {
    let unheard = |key: &str| Toleration {
        key: Some(key.to_owned()),
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        toleration_seconds: Some(UNHEARD_SECONDS),
        value: None,
    };
    vec![
        Toleration {
            key: Some(names::POOL_TAINT.into()),
            operator: Some("Exists".into()),
            effect: Some("NoSchedule".into()),
            ..Toleration::default()
        },
        unheard("node.kubernetes.io/not-ready"),
        unheard("node.kubernetes.io/unreachable"),
    ]
}

/// Preferred, not required: siblings share a host rather than wait for another.
fn apart_from_siblings(owner: &OwnerUid) -> Affinity {
    Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                weight: 100,
                pod_affinity_term: PodAffinityTerm {
                    label_selector: Some(LabelSelector {
                        match_labels: Some(BTreeMap::from([(names::OWNER.into(), owner.to_string())])),
                        ..LabelSelector::default()
                    }),
                    topology_key: names::HOSTNAME.into(),
                    ..PodAffinityTerm::default()
                },
            }]),
            ..PodAntiAffinity::default()
        }),
        ..Affinity::default()
    }
}

/// The first container's requests; the others have to ask for nothing.
fn requested(spec: &PodSpec) -> Result<Resources, NotAClaim> {
    let mut whole = Resources::default();
    for (i, container) in spec.containers.iter().enumerate() {
        let field = format!("spec.containers[{i}].resources");
        let resources = container
            .resources
            .as_ref()
            .ok_or_else(|| NotAClaim::new(&field, "is missing"))?;
        let field = format!("{field}.requests");
        let requests = resources
            .requests
            .as_ref()
            .ok_or_else(|| NotAClaim::new(&field, "is missing"))?;
        let amounts = amounts(&field, requests)?;
        if i == 0 {
            whole = amounts;
        } else if amounts != Resources::default() {
            return Err(NotAClaim::new(
                field,
                "asks for something: the first container asks for all",
            ));
        }
    }
    Ok(Resources {
        sandboxes: 1,
        ..whole
    })
}

/// Amounts of what a host has, and of nothing else.
pub(super) fn amounts(field: &str, map: &BTreeMap<String, Quantity>) -> Result<Resources, NotAClaim> {
    let wrong = |name: &str| {
        let field = format!("{field}.{name}");
        move |e: quantity::InvalidQuantity| NotAClaim::new(field, e)
    };
    let mut amounts = Resources::default();
    for (name, amount) in map {
        match name.as_str() {
            "cpu" => amounts.cpu_millis = quantity::millis(&amount.0).map_err(wrong(name))?,
            "memory" => amounts.memory_bytes = quantity::whole(&amount.0).map_err(wrong(name))?,
            "ephemeral-storage" => {
                amounts.ephemeral_storage_bytes = quantity::whole(&amount.0).map_err(wrong(name))?;
            }
            _ => {
                return Err(NotAClaim::new(
                    format!("{field}.{name}"),
                    "is no resource of a host",
                ));
            }
        }
    }
    Ok(amounts)
}

/// A spec without what may differ between the claim that was made and the Pod that
/// the cell holds.
fn comparable(spec: &PodSpec) -> Value {
    let mut spec = spec.clone();
    // The scheduler's word, and which host it is the reader's to ask.
    spec.node_name = None;
    // What the priority class and the runtime class are worth, says the cell's admission.
    spec.priority = None;
    spec.preemption_policy = None;
    spec.overhead = None;
    // The namespace's own account, of which no token is asked.
    for account in [&mut spec.service_account, &mut spec.service_account_name] {
        if account.as_deref() == Some("default") {
            *account = None;
        }
    }
    for container in &mut spec.containers {
        // What a resize would restart: it is filled in and grants nothing.
        container.resize_policy = None;
        // Read and checked before; the API server spells amounts in its own way.
        if let Some(resources) = &mut container.resources {
            resources.requests = None;
        }
    }
    let mut value = serde_json::to_value(spec).unwrap_or_default();
    prune(&mut value);
    value
}

/// Takes out what says nothing: nulls, empty lists, empty objects.
pub(super) fn prune(value: &mut Value) {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(prune);
            fields.retain(|_, v| !empty(v));
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

/// The path of the first field that differs.
fn difference(at: &str, one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            let fields = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
            for field in fields {
                let at = format!("{at}.{field}");
                match (a.get(field), b.get(field)) {
                    (Some(a), Some(b)) => {
                        if let Some(found) = difference(&at, a, b) {
                            return Some(found);
                        }
                    }
                    _ => return Some(at),
                }
            }
            None
        }
        (Value::Array(a), Value::Array(b)) => {
            for i in 0..a.len().max(b.len()) {
                let at = format!("{at}[{i}]");
                match (a.get(i), b.get(i)) {
                    (Some(a), Some(b)) => {
                        if let Some(found) = difference(&at, a, b) {
                            return Some(found);
                        }
                    }
                    _ => return Some(at),
                }
            }
            None
        }
        _ => (one != other).then(|| at.to_owned()),
    }
}
