//! What the cell's controller says of a claim that is being deleted on a host whose
//! Lease has lapsed: a condition of the claim, said again and again while it is so.
//!
//! Each statement is written over the claim as it was before the Lease was read (its
//! resource version is the guard). So of two different statements the later one's look at
//! the Lease came after the earlier one was written: whoever has seen the claim at some
//! moment, and after it two statements that are new, knows that the Lease was over at a
//! moment after that.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::names;

/// When it was last said of the claim that its host's Lease has lapsed; whole seconds.
pub fn statement(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let said = conditions
        .iter()
        .find(|c| c.type_ == names::HOST_LAPSED && c.status == "True")?;
    said.last_probe_time.as_ref().map(|at| at.0)
}

/// Since when it has been said.
pub fn since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let said = conditions.iter().find(|c| c.type_ == names::HOST_LAPSED)?;
    said.last_transition_time.as_ref().map(|at| at.0)
}

/// A strategic merge patch of `pods/status` that says so now, of the claim as it was read.
pub fn patch(pod: &Pod, now: Timestamp) -> Value {
    let whole = |at: Timestamp| Timestamp::from_second(at.as_second()).unwrap_or(at).to_string();
    json!({
        "metadata": {
            "uid": pod.metadata.uid,
            "resourceVersion": pod.metadata.resource_version,
        },
        "status": { "conditions": [{
            "type": names::HOST_LAPSED,
            "status": "True",
            "reason": "LeaseExpired",
            "message": "the host has not renewed its lease",
            "lastProbeTime": whole(now),
            "lastTransitionTime": whole(since(pod).unwrap_or(now)),
        }]},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_and_guarded_by_what_was_read_before() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let mut pod = Pod::default();
        assert_eq!(statement(&pod), None);
        pod.metadata.resource_version = Some("7".into());
        let first = patch(&pod, now);
        assert_eq!(first["metadata"]["resourceVersion"], "7");
        pod.status = Some(serde_json::from_value(first["status"].clone()).unwrap());
        assert_eq!((statement(&pod), since(&pod)), (Some(now), Some(now)));
        let later = Timestamp::from_second(1_700_000_002).unwrap();
        let again = patch(&pod, later);
        pod.status = Some(serde_json::from_value(again["status"].clone()).unwrap());
        assert_eq!((statement(&pod), since(&pod)), (Some(later), Some(now)));
        pod.status.as_mut().unwrap().conditions.as_mut().unwrap()[0].status = "False".into();
        assert_eq!(statement(&pod), None);
    }
}
