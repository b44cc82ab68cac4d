//! What hosts report of the pod. Only of the placement on record are they believed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use pool_agent_api::{
    SandboxStatus,
    status::{ContainerState, SandboxState},
};

use super::{
    super::{
        Heard,
        lifecycle::{Event, Intent, Place, Stage},
        status::{self, Observed, Phase, Verdict},
    },
    Driver,
    room::DEFAULT_GRACE,
};

/// When the placement's host had last told all it has as it took the pod.
pub(super) struct Synced {
    place: Place,
    turn: u64,
}

impl Driver {
    pub(super) fn take_reports(&mut self, reports: BTreeMap<Place, Arc<SandboxStatus>>) {
        if *self.lifecycle.stage() == Stage::Unread {
            // Which of them is true is not known yet.
            return;
        }
        let before = std::mem::replace(&mut self.reports, reports);
        let changed: Vec<(Place, Arc<SandboxStatus>)> = self
            .reports
            .iter()
            .filter(|(place, status)| before.get(place).is_none_or(|old| !Arc::ptr_eq(old, status)))
            .map(|(place, status)| (place.clone(), status.clone()))
            .collect();
        for (place, status) in changed {
            self.judge(&place, &status);
            self.step(Event::Seen {
                place: place.clone(),
                state: status.state,
            });
        }
        let gone: Vec<Place> = before
            .into_keys()
            .filter(|place| !self.reports.contains_key(place))
            .collect();
        for place in gone {
            self.missing(place);
        }
    }

    /// A report that ends the pod is understood as such before the lifecycle
    /// could take a stopped sandbox for a lost one.
    pub(super) fn judge(&mut self, place: &Place, sandbox: &SandboxStatus) {
        // One that has no container yet ends nothing: what is told of containers then is
        // of an attempt before.
        let judged = matches!(self.lifecycle.stage(), Stage::Forgetting { .. })
            || sandbox.state == SandboxState::Preparing;
        if self.lifecycle.place() != Some(place) || self.lifecycle.intent() != Intent::Run || judged {
            return;
        }
        let Some(pod) = self.object.clone() else { return };
        let computed = status::status(&Observed {
            sandbox: Some(sandbox),
            unsettled: false,
            ..self.observed(&pod)
        });
        let phase = Phase::parse(computed.phase.as_deref());
        if self.is_given_up(place, sandbox) {
            if sandbox.state == SandboxState::Stopped && self.may_not_run_again() {
                self.conclude(Verdict {
                    reason: status::TERMINATED.into(),
                    message: format!("Pod was terminated: host {} had to give it up", place.host),
                });
            }
        } else if phase.is_final() {
            self.step(Event::Intended(Intent::Finish));
        }
    }

    /// Whether the end of its containers is its host's doing, and no result: it was told
    /// to stop because the host had to give it up. What a container answers to that with
    /// its exit code does not say that its work is done. (A kubelet whose machine shuts
    /// down decides the same, before it sends the first signal.)
    fn is_given_up(&self, place: &Place, sandbox: &SandboxStatus) -> bool {
        let Some(notice) = &sandbox.notice else {
            return false;
        };
        if status::ended_by_host(sandbox) {
            return false;
        }
        match self.lifecycle.stage() {
            // A pod that is to run is stopped for no other reason.
            Stage::Stopping { place: at, .. } if at == place => true,
            // Its host has begun, or it came to its own end before.
            _ => {
                let begin = SignedDuration::try_from(self.grace())
                    .ok()
                    .and_then(|grace| notice.deadline.checked_sub(grace).ok())
                    .unwrap_or(Timestamp::MIN);
                matches!(sandbox.state, SandboxState::Stopping | SandboxState::Stopped)
                    && !ended_before(sandbox, begin)
            }
        }
    }

    /// The pod's own.
    pub(super) fn grace(&self) -> Duration {
        let spec = self.object.as_ref().and_then(|pod| pod.spec.as_ref());
        let seconds = spec
            .and_then(|spec| spec.termination_grace_period_seconds)
            .and_then(|seconds| u64::try_from(seconds).ok());
        Duration::from_secs(seconds.unwrap_or(DEFAULT_GRACE))
    }

    /// The host says that it has no such sandbox.
    pub(super) fn missing(&mut self, place: Place) {
        let ours = self.lifecycle.place() == Some(&place);
        if ours && self.lifecycle.intent() == Intent::Run && self.may_not_run_again() {
            self.conclude(Verdict {
                reason: "SandboxLost".into(),
                message: format!("Host {} no longer knows the pod", place.host),
            });
        }
        self.step(Event::Missing(place));
    }

    /// Its containers ran, and its policy lets them run only once.
    fn may_not_run_again(&self) -> bool {
        let Some(pod) = &self.object else { return false };
        let never = pod
            .spec
            .as_ref()
            .is_some_and(|s| s.restart_policy.as_deref() == Some("Never"));
        let ran = pod
            .status
            .iter()
            .flat_map(|s| s.container_statuses.iter().flatten())
            .any(|c| c.container_id.is_some());
        never && ran
    }

    /// A placement of which its host reports nothing, although it has told all it
    /// has: the host lost it, or never got it.
    pub(super) fn take_syncs(&mut self, heard: &Heard) {
        let (place, since) = match self.lifecycle.stage() {
            // From before this process: the first time counts.
            Stage::Recorded { place } => (place.clone(), 0),
            Stage::Placed { place } | Stage::Stopping { place, .. } => {
                let (place, turn) = (place.clone(), heard.syncs(&place.host));
                match &self.synced {
                    Some(synced) if synced.place == place => (place, synced.turn),
                    _ => {
                        let synced = self.synced.insert(Synced { place, turn });
                        (synced.place.clone(), turn)
                    }
                }
            }
            _ => {
                self.synced = None;
                return;
            }
        };
        if heard.syncs(&place.host) > since && !self.reports.contains_key(&place) {
            self.missing(place);
        }
    }

    /// Whether its host has turned out to be none of the pool: it can run nothing
    /// there. Only of a placement that the placer has been told, who may know the
    /// host by it.
    pub(super) fn is_without_host(&mut self) -> bool {
        let gone = match self.lifecycle.stage() {
            // Nothing runs there, and the other attempt is waited for.
            Stage::Stopped { .. } if self.lifecycle.handover().is_some() => return false,
            Stage::Recorded { place }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Stopped { place }
                if self.room.names(place) && !self.tools.pool.may_have(&place.host) =>
            {
                place.clone()
            }
            _ => return false,
        };
        self.missing(gone);
        true
    }
}

/// Every container of its own accord, before its host could have told it to.
fn ended_before(sandbox: &SandboxStatus, begin: Timestamp) -> bool {
    sandbox
        .containers
        .iter()
        .all(|c| matches!(&c.state, ContainerState::Terminated(end) if end.finished_at < begin))
}
