//! Patches of a Node's status by whoever keeps it: what differs and is ours, nothing
//! else, so that what others wrote stays.

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, NodeCondition, NodeStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};
use serde_json::{Map, Value, json};

use crate::quantity;

/// A strategic merge patch of `nodes/status`: what of `wanted` differs, all of its
/// conditions, with fresh heartbeats, if anything does or a heartbeat is `due`.
/// Fields that are absent in `wanted` stay as they are.
pub fn node_status(node: &Node, wanted: &NodeStatus, due: bool) -> Option<Value> {
    let current = object(node.status.clone().unwrap_or_default());
    let mut changes = Map::new();
    for (field, new) in object(wanted.clone()) {
        let old = current.get(&field);
        let differs = match field.as_str() {
            "conditions" => !settled(old, &new),
            "capacity" | "allocatable" => !same_amounts(old, &new),
            _ => old != Some(&new),
        };
        if !differs {
            continue;
        }
        let new = match (old, new) {
            // Maps are merged: what is gone has to be named.
            (Some(Value::Object(old)), Value::Object(mut new)) => {
                for key in old.keys() {
                    new.entry(key).or_insert(Value::Null);
                }
                Value::Object(new)
            }
            (_, new) => new,
        };
        changes.insert(field, new);
    }
    if changes.is_empty() && !due {
        return None;
    }
    if let Ok(conditions) = serde_json::to_value(&wanted.conditions) {
        changes.insert("conditions".into(), conditions);
    }
    Some(json!({"metadata": {"uid": node.metadata.uid}, "status": changes}))
}

fn object(status: NodeStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        // A NodeStatus is an object of plain data.
        Ok(_) | Err(_) => Map::new(),
    }
}

/// Whether amounts are worth the same: the API server spells them in its own way, `64Gi`
/// for `67108864Ki` and `10k` for `10000`.
fn same_amounts(old: Option<&Value>, new: &Value) -> bool {
    let worth = |amount: &Value| {
        let text = amount.as_str()?;
        quantity::millis(text).ok()
    };
    let same = |a: &Value, b: &Value| a == b || worth(a).is_some_and(|worth_a| Some(worth_a) == worth(b));
    let (Some(old), Some(new)) = (old.and_then(Value::as_object), new.as_object()) else {
        return old == Some(new);
    };
    old.len() == new.len()
        && new
            .iter()
            .all(|(name, amount)| old.get(name).is_some_and(|old| same(old, amount)))
}

/// Whether each condition of ours stands there, but for its heartbeat.
fn settled(old: Option<&Value>, new: &Value) -> bool {
    let bare = |condition: &Value| {
        let mut condition = condition.clone();
        if let Some(map) = condition.as_object_mut() {
            map.remove("lastHeartbeatTime");
        }
        condition
    };
    let old: Vec<Value> = old
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(bare)
        .collect();
    new.as_array()
        .into_iter()
        .flatten()
        .all(|c| old.contains(&bare(c)))
}

/// What a condition of a Node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// `Ready`, `MemoryPressure`, …
    pub kind: &'static str,
    pub holds: bool,
    pub reason: &'static str,
    pub message: String,
}

/// The conditions for what was found, each since when it has been so.
pub fn conditions<'a>(
    findings: impl IntoIterator<Item = Finding>,
    old: impl IntoIterator<Item = &'a NodeCondition> + Clone,
    now: Timestamp,
) -> Vec<NodeCondition> {
    // The API server keeps seconds.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    findings
        .into_iter()
        .map(|found| {
            let status = if found.holds { "True" } else { "False" };
            let since = old
                .clone()
                .into_iter()
                .find(|c| c.type_ == found.kind && c.status == status)
                .and_then(|c| c.last_transition_time.clone());
            NodeCondition {
                type_: found.kind.into(),
                status: status.into(),
                reason: Some(found.reason.into()),
                message: Some(found.message),
                last_heartbeat_time: Some(Time(now)),
                last_transition_time: Some(since.unwrap_or(Time(now))),
            }
        })
        .collect()
}
