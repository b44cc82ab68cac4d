//! Where a pod was placed, on the pod itself: a condition that only a node may
//! write, so a later process finds it where it finds the pod.
//!
//! ```text
//! type: spindrift.dev/Placed  status: "True"  reason: Enrolled  message: attempt 2 on host-a
//! ```
//!
//! Pure. The driver writes it before it asks the host, under the version of the
//! object that it has read; the [`lifecycle`](super::lifecycle) believes no host
//! that is not on it. Why it is here: docs/decisions/placements-on-record.md.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use pool_agent_api::{Attempt, HostName, spec::MeshMode};
use tracing::warn;

use super::lifecycle::Place;

/// The condition's type.
pub(crate) const CONDITION: &str = "spindrift.dev/Placed";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) place: Place,
    /// As it was when the pod was placed: labels that change later move no pod.
    pub(crate) mesh: MeshMode,
}

impl Record {
    /// None if the pod was never placed. A record that cannot be understood was
    /// not written by us and is none.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let written = conditions.iter().find(|c| c.type_ == CONDITION)?;
        let parsed = Self::parse(written);
        if parsed.is_none() {
            warn!(
                reason = written.reason,
                detail = written.message,
                "a pod's placement on record cannot be understood"
            );
        }
        parsed
    }

    fn parse(condition: &PodCondition) -> Option<Self> {
        let mesh = match condition.reason.as_deref()? {
            ENROLLED => MeshMode::Enrolled,
            UNMESHED => MeshMode::Unmeshed,
            _ => return None,
        };
        let message = condition.message.as_deref()?;
        let (attempt, host) = message.strip_prefix("attempt ")?.split_once(" on ")?;
        let place = Place {
            host: HostName::parse("host", host).ok()?,
            attempt: Attempt::parse("attempt", attempt.parse().ok()?).ok()?,
        };
        Some(Self { place, mesh })
    }

    /// The condition's reason.
    pub(crate) fn reason(&self) -> &'static str {
        match self.mesh {
            MeshMode::Enrolled => ENROLLED,
            MeshMode::Unmeshed => UNMESHED,
        }
    }

    /// The condition's message.
    pub(crate) fn message(&self) -> String {
        format!("attempt {} on {}", self.place.attempt, self.place.host)
    }
}

const ENROLLED: &str = "Enrolled";
const UNMESHED: &str = "Unmeshed";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(reason: &str, message: &str) -> Pod {
        serde_json::from_value(json!({"status": {"conditions": [
            {"type": "Ready", "status": "False"},
            {"type": CONDITION, "status": "True", "reason": reason, "message": message},
        ]}}))
        .unwrap()
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for mesh in [MeshMode::Enrolled, MeshMode::Unmeshed] {
            let record = Record {
                place: Place {
                    host: "host-a.example".parse().unwrap(),
                    attempt: Attempt::parse("attempt", 12).unwrap(),
                },
                mesh,
            };
            assert_eq!(Record::of(&pod(record.reason(), &record.message())), Some(record));
        }
    }

    #[test]
    fn what_we_would_not_write_is_no_record() {
        assert_eq!(Record::of(&Pod::default()), None);
        for (reason, message) in [
            ("Enrolled", ""),
            ("Enrolled", "attempt 0 on host-a"),
            ("Enrolled", "attempt 4294967296 on host-a"),
            ("Enrolled", "attempt 1 on ../host"),
            ("Enrolled", "attempt one on host-a"),
            ("", "attempt 1 on host-a"),
            ("enrolled", "attempt 1 on host-a"),
        ] {
            assert_eq!(Record::of(&pod(reason, message)), None, "{reason} {message}");
        }
    }
}
