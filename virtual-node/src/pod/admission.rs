//! Whether this node takes a pod that was bound to it, as a kubelet decides: the
//! scheduler has looked at the same rules, but whoever sets `spec.nodeName` has not.
//!
//! Pure; called by the pod's driver before it asks for room, and only for a pod that
//! was never placed: a running pod is not sent away because a label changed. Room is
//! the placer's to refuse. Names and messages are the kubelet's.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};

use super::status::Verdict;

pub(crate) fn admit(pod: &Pod, node: &Node) -> Result<(), Verdict> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    if !matches_node(spec, node) {
        return Err(rejected(
            "NodeAffinity",
            "node(s) didn't match Pod's node affinity/selector",
        ));
    }
    if !tolerates_node(spec, node) {
        return Err(rejected(
            "TaintToleration",
            "node(s) had taints that the pod didn't tolerate",
        ));
    }
    Ok(())
}

fn rejected(predicate: &str, why: &str) -> Verdict {
    Verdict {
        reason: predicate.into(),
        message: format!("Pod was rejected: Predicate {predicate} failed: {why}"),
    }
}

// ---- node selector and affinity

fn matches_node(spec: &PodSpec, node: &Node) -> bool {
    let no_labels = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&no_labels);
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|selector| any_term(selector, labels, node))
}

fn any_term(selector: &NodeSelector, labels: &BTreeMap<String, String>, node: &Node) -> bool {
    selector
        .node_selector_terms
        .iter()
        .any(|term| whole_term(term, labels, node))
}

/// A term without requirements matches no node.
fn whole_term(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_label = |r: &NodeSelectorRequirement| holds(r, labels.get(&r.key).map(String::as_str));
    // The one field there is.
    let by_field =
        |r: &NodeSelectorRequirement| r.key == "metadata.name" && holds(r, node.metadata.name.as_deref());
    expressions.iter().all(by_label) && fields.iter().all(by_field)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = |value: &str| values.iter().any(|v| v == value);
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared(value, values).is_some_and(|(value, bound)| value > bound),
        "Lt" => compared(value, values).is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

/// Both as the integers they have to be.
fn compared(value: Option<&str>, values: &[String]) -> Option<(i64, i64)> {
    let [bound] = values else { return None };
    Some((value?.parse().ok()?, bound.parse().ok()?))
}

// ---- taints

/// A kubelet looks only at `NoExecute`: the other effects are for the scheduler.
fn tolerates_node(spec: &PodSpec, node: &Node) -> bool {
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    taints
        .filter(|taint| taint.effect == "NoExecute")
        .all(|taint| tolerations.iter().any(|t| tolerates(t, taint)))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let given = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
    if given(&toleration.effect).is_some_and(|effect| effect != taint.effect) {
        return false;
    }
    if given(&toleration.key).is_some_and(|key| key != taint.key) {
        return false;
    }
    let value = |text: &Option<String>| text.clone().unwrap_or_default();
    match toleration.operator.as_deref() {
        // Without a key: everything.
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            given(&toleration.key).is_some() && value(&toleration.value) == value(&taint.value)
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(taints: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "edge", "labels": {"zone": "a", "cores": "16", "type": "virtual-kubelet"}},
            "spec": {"taints": taints},
        }))
        .unwrap()
    }

    /// The reason of the rejection; empty if it is admitted.
    fn admitted(spec: Value, taints: Value) -> String {
        let mut spec = spec;
        spec["containers"] = json!([]);
        let pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        match admit(&pod, &node(taints)) {
            Ok(()) => String::new(),
            Err(verdict) => verdict.reason,
        }
    }

    #[test]
    fn a_pod_whose_selector_or_affinity_does_not_match_is_refused_by_name() {
        let expression = |key: &str, operator: &str, values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    // Matches nothing, and is one of several.
                    {},
                    {"matchExpressions": [{"key": key, "operator": operator, "values": values}]},
                ],
            }}}})
        };
        let field = |value: &str| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchFields": [
                    {"key": "metadata.name", "operator": "In", "values": [value]},
                ]}],
            }}}})
        };
        let cases = [
            (json!({}), true),
            (json!({"nodeSelector": {"zone": "a"}}), true),
            (json!({"nodeSelector": {"zone": "b"}}), false),
            (json!({"nodeSelector": {"zone": "a", "rack": "1"}}), false),
            (expression("zone", "In", json!(["b", "a"])), true),
            (expression("zone", "In", json!(["b"])), false),
            (expression("rack", "In", json!([""])), false),
            (expression("zone", "NotIn", json!(["a"])), false),
            (expression("rack", "NotIn", json!(["a"])), true),
            (expression("zone", "Exists", json!(null)), true),
            (expression("rack", "Exists", json!(null)), false),
            (expression("rack", "DoesNotExist", json!(null)), true),
            (expression("zone", "DoesNotExist", json!(null)), false),
            (expression("cores", "Gt", json!(["8"])), true),
            (expression("cores", "Gt", json!(["16"])), false),
            (expression("cores", "Lt", json!(["17"])), true),
            (expression("zone", "Lt", json!(["17"])), false),
            (expression("zone", "Like", json!(["a"])), false),
            (field("edge"), true),
            (field("other"), false),
        ];
        for (spec, fits) in cases {
            let reason = if fits { "" } else { "NodeAffinity" };
            assert_eq!(admitted(spec.clone(), json!([])), reason, "{spec}");
        }
    }

    #[test]
    fn a_pod_that_does_not_tolerate_eviction_is_refused_and_other_taints_are_not_ours() {
        let taints = json!([{"key": "drained", "value": "yes", "effect": "NoExecute"}]);
        let cases = [
            (json!([]), false),
            (json!([{"operator": "Exists"}]), true),
            (json!([{"key": "drained", "operator": "Exists"}]), true),
            (json!([{"key": "drained", "value": "yes"}]), true),
            (json!([{"key": "drained", "value": "no"}]), false),
            (
                json!([{"key": "drained", "value": "yes", "effect": "NoExecute"}]),
                true,
            ),
            (
                json!([{"key": "drained", "value": "yes", "effect": "NoSchedule"}]),
                false,
            ),
            (json!([{"key": "other", "operator": "Exists"}]), false),
            (json!([{"value": "yes"}]), false),
        ];
        for (tolerations, fits) in cases {
            let reason = if fits { "" } else { "TaintToleration" };
            let spec = json!({"tolerations": tolerations});
            assert_eq!(admitted(spec.clone(), taints.clone()), reason, "{spec}");
        }
        for effect in ["NoSchedule", "PreferNoSchedule"] {
            let taints = json!([{"key": "virtual-kubelet.io/provider", "effect": effect}]);
            assert_eq!(admitted(json!({}), taints), "");
        }
    }
}
