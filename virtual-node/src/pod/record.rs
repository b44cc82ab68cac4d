//! Where a pod was placed, on the pod itself: a condition that only a node may
//! write, so a later process finds it where it finds the pod.
//!
//! ```text
//! type: spindrift.dev/Placed  status: "True"  reason: Enrolled  message: attempt 2 on host-a
//! ```
//!
//! In a handover the pod has another attempt, which is on record beside it. Once that
//! is fenced, its number stays, so that it is not given again.
//!
//! ```text
//! type: spindrift.dev/Handover  status: "True"  reason: Next    message: attempt 3 on host-b
//! type: spindrift.dev/Handover  status: "True"  reason: Former  message: attempt 2 on host-a
//! type: spindrift.dev/Handover  status: "False" reason: Over    message: attempt 2 on host-a
//! ```
//!
//! Pure. The driver writes it before it asks the host, under the version of the
//! object that it has read; the [`lifecycle`](super::lifecycle) believes no host
//! that is not on it. Why it is here: docs/decisions/placements-on-record.md.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use pool_agent_api::{Attempt, HostName, spec::MeshMode};
use tracing::warn;

use super::lifecycle::{Beside, Place};

/// The condition's type.
pub(crate) const CONDITION: &str = "spindrift.dev/Placed";

/// The type of that of the other attempt.
pub(crate) const HANDOVER: &str = "spindrift.dev/Handover";

/// The other attempt of a handover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Other {
    pub(crate) place: Place,
    /// None: it is fenced.
    pub(crate) beside: Option<Beside>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) place: Place,
    /// As it was when the pod was placed: labels that change later move no pod.
    pub(crate) mesh: MeshMode,
    pub(crate) other: Option<Other>,
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
        let mut record = parsed?;
        record.other = conditions
            .iter()
            .find(|c| c.type_ == HANDOVER)
            .and_then(Other::parse);
        Some(record)
    }

    /// The placement, or the other attempt, fenced or not.
    pub(crate) fn names(&self, place: &Place) -> bool {
        self.place == *place || self.other.as_ref().is_some_and(|other| other.place == *place)
    }

    fn parse(condition: &PodCondition) -> Option<Self> {
        let mesh = match condition.reason.as_deref()? {
            ENROLLED => MeshMode::Enrolled,
            UNMESHED => MeshMode::Unmeshed,
            _ => return None,
        };
        Some(Self {
            place: placed(condition.message.as_deref()?)?,
            mesh,
            other: None,
        })
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
        message(&self.place)
    }
}

impl Other {
    fn parse(condition: &PodCondition) -> Option<Self> {
        let beside = match condition.reason.as_deref()? {
            NEXT => Some(Beside::Next),
            FORMER => Some(Beside::Former),
            OVER => None,
            _ => return None,
        };
        let place = placed(condition.message.as_deref()?)?;
        Some(Self { place, beside })
    }

    /// The condition's reason.
    pub(crate) fn reason(&self) -> &'static str {
        match self.beside {
            Some(Beside::Next) => NEXT,
            Some(Beside::Former) => FORMER,
            None => OVER,
        }
    }

    /// The condition's message.
    pub(crate) fn message(&self) -> String {
        message(&self.place)
    }
}

fn message(place: &Place) -> String {
    format!("attempt {} on {}", place.attempt, place.host)
}

fn placed(message: &str) -> Option<Place> {
    let (attempt, host) = message.strip_prefix("attempt ")?.split_once(" on ")?;
    Some(Place {
        host: HostName::parse("host", host).ok()?,
        attempt: Attempt::parse("attempt", attempt.parse().ok()?).ok()?,
    })
}

const NEXT: &str = "Next";
const FORMER: &str = "Former";
const OVER: &str = "Over";

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
                other: None,
            };
            assert_eq!(Record::of(&pod(record.reason(), &record.message())), Some(record));
        }
    }

    #[test]
    fn the_other_attempt_of_a_handover_is_read_as_it_was_written() {
        for beside in [Some(Beside::Next), Some(Beside::Former), None] {
            let other = Other {
                place: Place {
                    host: "host-b".parse().unwrap(),
                    attempt: Attempt::parse("attempt", 3).unwrap(),
                },
                beside,
            };
            let mut pod = pod("Enrolled", "attempt 2 on host-a");
            pod.status
                .as_mut()
                .unwrap()
                .conditions
                .as_mut()
                .unwrap()
                .push(PodCondition {
                    type_: HANDOVER.into(),
                    status: "True".into(),
                    reason: Some(other.reason().into()),
                    message: Some(other.message()),
                    ..PodCondition::default()
                });
            assert_eq!(Record::of(&pod).unwrap().other, Some(other));
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
