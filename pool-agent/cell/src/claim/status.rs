//! What a host writes on the claims that are bound to it: a patch of `pods/status`,
//! where a node's identity may also set annotations (labels it may not).

use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::names;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClaimPhase {
    /// Nothing runs for it (yet).
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl ClaimPhase {
    pub(super) fn read(text: Option<&str>) -> Self {
        match text {
            Some("Running") => Self::Running,
            Some("Succeeded") => Self::Succeeded,
            Some("Failed") => Self::Failed,
            _ => Self::Pending,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    /// It does not count any more: the scheduler gives its room to others.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// Refused by its host because it is no claim.
pub const NOT_A_CLAIM: &str = "NotAClaim";

/// What a Pod's status should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimStatus {
    pub phase: ClaimPhase,
    /// CamelCase; empty if there is nothing to say.
    pub reason: String,
    pub message: String,
    pub ready: bool,
    pub host_ip: IpAddr,
    /// None for a Pod that is no claim.
    pub agent: Option<SocketAddr>,
}

impl ClaimStatus {
    /// A strategic merge patch of `pods/status`, guarded by the Pod's UID. None if
    /// the Pod says so already.
    pub fn patch(&self, pod: &Pod, now: Timestamp) -> Option<Value> {
        let status = pod.status.clone().unwrap_or_default();
        let annotation = pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(names::AGENT));
        let agent = self.agent.map(|a| a.to_string());
        let ready = if self.ready { "True" } else { "False" };
        let condition = status.conditions.iter().flatten().find(|c| c.type_ == "Ready");
        let said = status.phase.as_deref().unwrap_or("Pending") == self.phase.as_str()
            && status.reason.unwrap_or_default() == self.reason
            && status.message.unwrap_or_default() == self.message
            && status.host_ip.as_deref() == Some(self.host_ip.to_string().as_str())
            && condition.is_some_and(|c| c.status == ready)
            && annotation == agent.as_ref();
        if said {
            return None;
        }
        let since = condition
            .filter(|c| c.status == ready)
            .and_then(|c| c.last_transition_time.as_ref())
            .map_or(now, |t| t.0);
        let since = Timestamp::from_second(since.as_second()).unwrap_or(since);
        Some(json!({
            "metadata": {
                "uid": pod.metadata.uid,
                "annotations": { names::AGENT: agent },
            },
            "status": {
                "phase": self.phase.as_str(),
                "reason": self.reason,
                "message": self.message,
                "hostIP": self.host_ip.to_string(),
                "hostIPs": [{ "ip": self.host_ip.to_string() }],
                "conditions": [{
                    "type": "Ready",
                    "status": ready,
                    "lastTransitionTime": since.to_string(),
                }],
            },
        }))
    }
}
