//! What has to be written so that one status becomes another.
//!
//! A strategic merge patch of the `status` subresource. It carries the pod's
//! UID, so that the API server refuses it for a later pod of the same name, and
//! only what differs. Lists that Kubernetes merges by a key (conditions, IPs)
//! carry the changed elements, so that elements of others survive.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

/// None if there is nothing to write.
pub(crate) fn patch(uid: &str, from: &PodStatus, to: &PodStatus) -> Option<Value> {
    let (from, to) = (object(from), object(to));
    let mut changes = Map::new();
    for (field, new) in &to {
        let old = from.get(field);
        if old == Some(new) {
            continue;
        }
        let change = match field.as_str() {
            "conditions" => changed_elements("type", old, new, Gone::Keep),
            "podIPs" | "hostIPs" => changed_elements("ip", old, new, Gone::Delete),
            _ => new.clone(),
        };
        changes.insert(field.clone(), change);
    }
    for field in from.keys().filter(|field| !to.contains_key(*field)) {
        changes.insert(field.clone(), Value::Null);
    }
    if changes.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": uid}, "status": changes}))
}

fn object(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        // A PodStatus is an object of plain data.
        Ok(_) | Err(_) => Map::new(),
    }
}

/// What happens to an element that is not in the new list.
#[derive(Clone, Copy)]
enum Gone {
    Keep,
    Delete,
}

fn changed_elements(key: &str, old: Option<&Value>, new: &Value, gone: Gone) -> Value {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let (old, new) = (list(old), list(Some(new)));
    let mut out: Vec<Value> = new
        .iter()
        .filter(|element| !old.contains(element))
        .map(|element| {
            // A merged element keeps the fields that are not named: name them.
            let before = old.iter().find(|o| o.get(key) == element.get(key));
            let mut element = element.clone();
            if let (Some(Value::Object(before)), Value::Object(element)) = (before, &mut element) {
                for field in before.keys() {
                    element.entry(field).or_insert(Value::Null);
                }
            }
            element
        })
        .collect();
    if let Gone::Delete = gone {
        out.extend(
            old.iter()
                .filter(|o| !new.iter().any(|n| n.get(key) == o.get(key)))
                .map(|o| json!({"$patch": "delete", key: o.get(key)})),
        );
    }
    Value::Array(out)
}
