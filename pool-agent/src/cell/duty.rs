//! What a Pod that is bound to this host asks of it: what its status should say, and
//! what should happen to its sandbox. Pure; [`super::upkeep`] does it, again and again.
//!
//! ```text
//!  no claim ──▶ Failed, NotAClaim ──(deleted)──▶ let go
//!  claim ──▶ Pending ──▶ Running ──▶ Succeeded | Failed     as its sandbox does
//!    └──(deleted)──▶ notice ──(time)──▶ stop ──(nothing left)──▶ let go
//! ```

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{
    SandboxKey, SandboxStatus, TenantId,
    status::{ContainerState, Notice, SandboxState},
};
use pool_cell::{
    ClaimPhase, ClaimStatus, Placed,
    claim::{Deletion, NOT_A_CLAIM},
    names,
};

use crate::sandbox::clock::after;

/// Of a sandbox whose claim is being deleted.
pub(super) const CLAIM_DELETED: &str = "ClaimDeleted";

/// What this host has of a claim's sandbox.
#[derive(Debug, Clone, PartialEq)]
pub enum Standing {
    /// It was never here.
    Absent,
    /// Admitted; None until its driver has reported.
    Here {
        status: Option<Arc<SandboxStatus>>,
        /// The pod's own.
        grace: Duration,
    },
    /// It was here, and nothing is left of it.
    Ended,
}

/// What is to be done for one Pod, all of it idempotent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Duty {
    pub(super) status: Option<ClaimStatus>,
    pub(super) notice: Option<Notice>,
    /// Begin the end, to be over in this time.
    pub(super) stop: Option<Duration>,
    /// No later start may find room: before [`Duty::let_go`].
    pub(super) fence: bool,
    /// Take the object out of the cell.
    pub(super) let_go: bool,
    /// When to look again though nothing happens.
    pub(super) again: Option<Timestamp>,
}

/// Where this host is, for its claims' status.
#[derive(Debug, Clone, Copy)]
pub(super) struct Here {
    pub(super) address: IpAddr,
    pub(super) agent: SocketAddr,
}

/// Whose sandbox a Pod is about, of whatever shape it is; None if it is no claim.
pub(super) fn subject(pod: &Pod) -> Option<(TenantId, SandboxKey)> {
    names::subject(pod)
}

/// `noticed`: when the claim's deletion was seen first, by this host's clock.
pub(super) fn of(pod: &Pod, standing: &Standing, here: Here, noticed: Timestamp, now: Timestamp) -> Duty {
    let placed = match Placed::parse(pod) {
        Ok(placed) => placed,
        // Of another release, or changed in the cell since: its sandbox has the room, and
        // a claim that has Failed would give it to another.
        Err(_) if matches!(standing, Standing::Here { .. }) => {
            let mut duty = Duty::default();
            if let Some(deletion) = Deletion::read(pod) {
                end(&mut duty, deletion, standing, noticed, now);
            }
            return duty;
        }
        Err(wrong) => {
            return Duty {
                status: Some(ClaimStatus {
                    phase: ClaimPhase::Failed,
                    reason: NOT_A_CLAIM.into(),
                    message: format!("a host of the pool runs nothing but claims: {wrong}"),
                    ready: false,
                    host_ip: here.address,
                    agent: None,
                }),
                // A start may be under way for the attempt that its name says.
                fence: pod.metadata.deletion_timestamp.is_some() && *standing == Standing::Absent,
                let_go: pod.metadata.deletion_timestamp.is_some(),
                ..Duty::default()
            };
        }
    };
    let mut duty = Duty {
        status: status(&placed, standing, here),
        ..Duty::default()
    };
    if let Some(deletion) = placed.deletion {
        end(&mut duty, deletion, standing, noticed, now);
    }
    duty
}

/// What a claim's deletion asks for.
fn end(duty: &mut Duty, deletion: Deletion, standing: &Standing, noticed: Timestamp, now: Timestamp) {
    match standing {
        Standing::Absent | Standing::Ended => {
            duty.fence = *standing == Standing::Absent;
            duty.let_go = true;
        }
        Standing::Here { status, grace } => {
            let state = status.as_ref().map(|s| s.state);
            if matches!(state, Some(SandboxState::Stopping | SandboxState::Stopped)) {
                return;
            }
            // The API server's clock, and this host may have been away since. Whatever
            // they say, a pod has its own grace from when the deletion was seen, as under
            // a kubelet; and not more than the claim's deletion grants.
            let least = after(noticed, (*grace).min(deletion.grace));
            let deadline = deletion.deadline.max(least);
            duty.notice = Some(Notice {
                reason: CLAIM_DELETED.into(),
                deadline,
            });
            // The claim's grace covers the pod's own.
            let grace = SignedDuration::try_from(*grace).unwrap_or(SignedDuration::MAX);
            let begin = deadline.checked_sub(grace).unwrap_or(Timestamp::MIN);
            if begin <= now {
                let left = Duration::try_from(deadline.duration_since(now));
                duty.stop = Some(left.unwrap_or_default());
            } else {
                duty.again = Some(begin);
            }
        }
    }
}

/// None: what stands there is to stay.
fn status(placed: &Placed, standing: &Standing, here: Here) -> Option<ClaimStatus> {
    let (phase, reason, message, ready) = match standing {
        // What is over is over.
        _ if placed.phase.is_over() => return None,
        Standing::Absent => (ClaimPhase::Pending, String::new(), String::new(), false),
        Standing::Ended => (
            ClaimPhase::Failed,
            "SandboxEnded".into(),
            "the sandbox was here and nothing is left of it".into(),
            false,
        ),
        Standing::Here { status: None, .. } => (ClaimPhase::Pending, String::new(), String::new(), false),
        Standing::Here {
            status: Some(status), ..
        } => (
            phase(status),
            status.reason.clone(),
            status.message.clone(),
            status.state == SandboxState::Running && status.containers.iter().all(|c| c.ready),
        ),
    };
    Some(ClaimStatus {
        phase,
        reason,
        message,
        ready,
        host_ip: here.address,
        agent: Some(here.agent),
    })
}

fn phase(status: &SandboxStatus) -> ClaimPhase {
    let succeeded =
        |state: &ContainerState| matches!(state, ContainerState::Terminated(end) if end.exit_code == 0);
    match status.state {
        SandboxState::Preparing => ClaimPhase::Pending,
        SandboxState::Running | SandboxState::Stopping => ClaimPhase::Running,
        SandboxState::Stopped
            if status.reason.is_empty() && status.containers.iter().all(|c| succeeded(&c.state)) =>
        {
            ClaimPhase::Succeeded
        }
        SandboxState::Stopped => ClaimPhase::Failed,
    }
}

#[cfg(test)]
mod tests;
