//! The status of a `VirtualNode`. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::{Value, json};

use super::{
    resource::{Ports, Status, VirtualNode},
    terms::Refusal,
};

/// Whether the node serves, in a condition's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) ready: bool,
    /// CamelCase.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Standing {
    pub(crate) fn not(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            ready: false,
            reason,
            message: message.into(),
        }
    }

    pub(crate) fn ready() -> Self {
        Self {
            ready: true,
            reason: "NodeReady",
            message: "the node is registered in the tenant's cluster, and ready".into(),
        }
    }
}

/// What its holder knows of a virtual node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) holder: String,
    pub(crate) epoch: i64,
    pub(crate) accepted: Result<(), Refusal>,
    pub(crate) standing: Standing,
    pub(crate) ports: Option<Ports>,
    pub(crate) node_uid: Option<String>,
}

/// A merge patch of the status, if anything differs.
pub(crate) fn patch(node: &VirtualNode, told: &Told, now: Timestamp) -> Option<Value> {
    let old = node.status.clone().unwrap_or_default();
    let generation = node.metadata.generation;
    let accepted = match &told.accepted {
        Ok(()) => (
            "True",
            "Accepted",
            "the resource and its Secrets can be used".to_owned(),
        ),
        Err(refusal) => ("False", refusal.reason, refusal.message.clone()),
    };
    let ready = if told.standing.ready { "True" } else { "False" };
    let standing = (ready, told.standing.reason, told.standing.message.clone());
    let conditions = [("Accepted", accepted), ("Ready", standing)]
        .into_iter()
        .map(|(kind, (status, reason, message))| {
            let before = old
                .conditions
                .iter()
                .find(|c| c.type_ == kind && c.status == status);
            Condition {
                type_: kind.into(),
                status: status.into(),
                reason: reason.into(),
                message: shortened(message),
                observed_generation: generation,
                last_transition_time: before.map_or(Time(now), |c| c.last_transition_time.clone()),
            }
        })
        .collect();
    let new = Status {
        observed_generation: generation,
        conditions,
        holder: Some(told.holder.clone()),
        epoch: Some(told.epoch),
        // Once they are the node's they stay so.
        ports: told.ports.or(old.ports),
        node_uid: told.node_uid.clone().or(old.node_uid.clone()),
    };
    (new != old).then(|| json!({"status": new}))
}

/// The API server takes no longer message.
fn shortened(message: String) -> String {
    message.chars().take(1024).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::resource::tests::example;

    fn told() -> Told {
        Told {
            holder: "a".into(),
            epoch: 1,
            accepted: Ok(()),
            standing: Standing::ready(),
            ports: None,
            node_uid: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn applied(mut node: VirtualNode, patch: Value) -> VirtualNode {
        node.status = serde_json::from_value(patch["status"].clone()).unwrap();
        node
    }

    #[test]
    fn a_status_is_written_when_it_differs_and_transitions_are_true() {
        let mut node: VirtualNode = serde_json::from_value(example()).unwrap();
        node.status = None;
        let first = patch(&node, &told(), at(10)).unwrap();
        let node = applied(node, first);
        assert_eq!(patch(&node, &told(), at(20)), None);

        let refused = Told {
            accepted: Err(Refusal {
                reason: "InvalidSpec",
                message: "spec.zone: no".into(),
            }),
            ..told()
        };
        let node = applied(node.clone(), patch(&node, &refused, at(30)).unwrap());
        let status = node.status.unwrap();
        let time = |kind: &str| {
            let condition = status.conditions.iter().find(|c| c.type_ == kind).unwrap();
            (condition.status.as_str(), condition.last_transition_time.0)
        };
        assert_eq!(time("Accepted"), ("False", at(30)));
        assert_eq!(time("Ready"), ("True", at(10)));
    }

    #[test]
    fn ports_and_the_nodes_uid_stay_though_the_next_holder_does_not_know_them_yet() {
        let node: VirtualNode = serde_json::from_value(example()).unwrap();
        let new = applied(node.clone(), patch(&node, &told(), at(1)).unwrap());
        assert_eq!(new.ports(), node.ports());
        assert_eq!(new.status.unwrap().node_uid, node.status.unwrap().node_uid);
    }
}
