//! What hosts report of the pod. Only of the placement on record are they believed.

use std::{collections::BTreeMap, sync::Arc};

use pool_agent_api::SandboxStatus;

use super::{
    super::{
        Heard,
        lifecycle::{Event, Intent, Place, Stage},
        status::{self, Observed, Phase, Verdict},
    },
    Driver,
};

/// How often the placement's host had told all it has when it took the pod.
pub(super) struct Synced {
    place: Place,
    count: u64,
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
                place,
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
    fn judge(&mut self, place: &Place, sandbox: &SandboxStatus) {
        if self.lifecycle.place() != Some(place) || self.lifecycle.intent() != Intent::Run {
            return;
        }
        let Some(pod) = self.object.clone() else { return };
        let computed = status::status(&Observed {
            sandbox: Some(sandbox),
            ..self.observed(&pod)
        });
        if Phase::parse(computed.phase.as_deref()).is_final() {
            self.step(Event::Intended(Intent::Finish));
        }
    }

    /// The host says that it has no such sandbox.
    fn missing(&mut self, place: Place) {
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
                let (place, count) = (place.clone(), heard.syncs(&place.host));
                match &self.synced {
                    Some(synced) if synced.place == place => (place, synced.count),
                    _ => {
                        let synced = self.synced.insert(Synced { place, count });
                        (synced.place.clone(), count)
                    }
                }
            }
            _ => {
                self.synced = None;
                return;
            }
        };
        let told = heard.syncs(&place.host) > since || !heard.knows(&place.host);
        if told && !self.reports.contains_key(&place) {
            self.missing(place);
        }
    }
}
