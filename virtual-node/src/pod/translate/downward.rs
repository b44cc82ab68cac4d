//! The downward API: what a pod may be told of itself.

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};
use pool_agent_api::spec::{HostField, Segment, Text};

use super::{NodeFacts, Untranslatable};
use crate::quantity;

/// The value of `fieldRef` in an environment.
pub(super) fn field(
    pod: &Pod,
    facts: &NodeFacts,
    selector: &ObjectFieldSelector,
    at: &str,
) -> Result<Text, Untranslatable> {
    let host = |field| Ok(Text(vec![Segment::Field(field)]));
    match selector.field_path.as_str() {
        "status.podIP" => host(HostField::PodIp),
        "status.podIPs" => host(HostField::PodIps),
        "status.hostIP" => host(HostField::HostIp),
        "status.hostIPs" => host(HostField::HostIps),
        _ => known_field(pod, facts, selector, at).map(Text::from_string),
    }
}

/// The value of `fieldRef` in a volume: only what is known here.
pub(super) fn known_field(
    pod: &Pod,
    facts: &NodeFacts,
    selector: &ObjectFieldSelector,
    at: &str,
) -> Result<String, Untranslatable> {
    let path = selector.field_path.as_str();
    let meta = &pod.metadata;
    let text = |value: &Option<String>| Ok(value.clone().unwrap_or_default());
    if let Some(key) = subscript(path, "metadata.labels") {
        return Ok(meta
            .labels
            .as_ref()
            .and_then(|l| l.get(key))
            .cloned()
            .unwrap_or_default());
    }
    if let Some(key) = subscript(path, "metadata.annotations") {
        return Ok(meta
            .annotations
            .as_ref()
            .and_then(|a| a.get(key))
            .cloned()
            .unwrap_or_default());
    }
    match path {
        "metadata.name" => text(&meta.name),
        "metadata.namespace" => text(&meta.namespace),
        "metadata.uid" => text(&meta.uid),
        "metadata.labels" => Ok(lines(meta.labels.as_ref())),
        "metadata.annotations" => Ok(lines(meta.annotations.as_ref())),
        "spec.nodeName" => Ok(facts.node_name.clone()),
        "spec.serviceAccountName" => text(&pod.spec.as_ref().and_then(|s| s.service_account_name.clone())),
        _ => Err(Untranslatable::unsupported(
            format!("{at}.fieldPath"),
            format_args!("{path:?} is not a field that a pod can be told"),
        )),
    }
}

/// `KEY` of `base['KEY']`.
fn subscript<'a>(path: &'a str, base: &str) -> Option<&'a str> {
    path.strip_prefix(base)?.strip_prefix("['")?.strip_suffix("']")
}

/// One `key="value"` a line, as Kubernetes writes labels into a volume.
fn lines(map: Option<&std::collections::BTreeMap<String, String>>) -> String {
    map.into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", quoted(value)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// As Go's `strconv.Quote` writes text.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of `resourceFieldRef`: an amount in units of its divisor, rounded
/// up. A limit that is not set is the node's allocatable amount.
pub(super) fn resource(
    pod: &Pod,
    own: Option<&Container>,
    facts: &NodeFacts,
    selector: &ResourceFieldSelector,
    at: &str,
) -> Result<String, Untranslatable> {
    let container = match selector.container_name.as_deref().filter(|n| !n.is_empty()) {
        None => own,
        Some(name) => pod.spec.as_ref().and_then(|s| {
            s.init_containers
                .iter()
                .flatten()
                .chain(&s.containers)
                .find(|c| c.name == name)
        }),
    }
    .ok_or_else(|| {
        Untranslatable::unsupported(format!("{at}.containerName"), "names no container of the pod")
    })?;
    let (kind, name) = selector
        .resource
        .split_once('.')
        .ok_or_else(|| unknown(selector, at))?;
    let resources = container.resources.as_ref();
    let set = match kind {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(unknown(selector, at)),
    };
    let parse: fn(&str) -> _ = if name == "cpu" {
        quantity::millis
    } else {
        quantity::whole
    };
    let wrong = |e: quantity::InvalidQuantity| Untranslatable::unsupported(at.to_owned(), e);
    let amount = match set.and_then(|s| s.get(name)) {
        Some(amount) => parse(&amount.0).map_err(wrong)?,
        None if kind == "requests" => 0,
        None => match name {
            "cpu" => facts.allocatable.cpu_millis,
            "memory" => facts.allocatable.memory_bytes,
            "ephemeral-storage" => facts.allocatable.ephemeral_storage_bytes,
            _ => return Err(unknown(selector, at)),
        },
    };
    let divisor = match &selector.divisor {
        Some(divisor) if divisor.0 != "0" => parse(&divisor.0).map_err(wrong)?,
        _ => parse("1").map_err(wrong)?,
    };
    Ok(amount.div_ceil(divisor.max(1)).to_string())
}

fn unknown(selector: &ResourceFieldSelector, at: &str) -> Untranslatable {
    Untranslatable::unsupported(
        format!("{at}.resource"),
        format_args!("{:?} is not a resource that a pod can be told", selector.resource),
    )
}

/// `Text` of an owned string, empty ones without a segment.
trait FromString {
    fn from_string(text: String) -> Self;
}

impl FromString for Text {
    fn from_string(text: String) -> Self {
        if text.is_empty() {
            Text::default()
        } else {
            Text::literal(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_written_as_kubernetes_quotes_them() {
        let map = std::collections::BTreeMap::from([
            ("b".to_owned(), "two \"2\"\n".to_owned()),
            ("a".to_owned(), "1".to_owned()),
        ]);
        assert_eq!(lines(Some(&map)), "a=\"1\"\nb=\"two \\\"2\\\"\\n\"");
    }

    #[test]
    fn a_subscript_names_one_key() {
        assert_eq!(
            subscript("metadata.labels['app.io/x']", "metadata.labels"),
            Some("app.io/x")
        );
        assert_eq!(subscript("metadata.labels", "metadata.labels"), None);
        assert_eq!(subscript("metadata.labels['x", "metadata.labels"), None);
    }
}
