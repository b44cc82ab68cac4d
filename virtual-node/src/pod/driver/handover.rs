//! A host has to give the pod up: whether it may overlap with its next attempt, when
//! that one could serve, and the one write with which it takes the pod over.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{
    SandboxStatus,
    status::{SandboxState, Severity},
};
use tracing::{debug, info, warn};

use super::{
    super::{
        budget::Permit,
        lifecycle::{Beside, Event, Handover, Intent, Leave, Place, Stage, Step},
        record::{Other, Record},
        status::{self, Observed, is_ready},
        surge,
    },
    Done, Driver,
    object::is_gone,
    sleep,
    start::{Entry, RecordError},
};

/// Handovers that come to nothing before the pod is stopped first.
const TRIES: u32 = 3;
/// From the switch to the stop of the former attempt: what the mesh and the cluster's
/// Services are told of its address has arrived by then, and a connection that was on
/// its way is served. Endpoints follow a pod's status within a second or so.
const LINGER: Duration = Duration::from_secs(5);

/// How the pod leaves the host that gave notice.
pub(super) struct Leaving {
    place: Place,
    /// Whether its owner lets it overlap; None until that is known.
    overlap: Option<bool>,
    looking: Option<BoxFuture<'static, bool>>,
    tries: u32,
    /// Asks the tenant's disruption budgets, before it is stopped first.
    asking: Option<BoxFuture<'static, Permit>>,
}

/// What was asked before the pod leaves.
pub(super) enum Asked {
    /// Whether its owner lets it overlap.
    Overlap(bool),
    /// Its budgets allow that it is away.
    Permit(Permit),
}

/// The answer to what was asked, or never.
pub(super) async fn asked(leaving: &mut Option<Leaving>) -> Asked {
    let Some(leaving) = leaving else {
        return std::future::pending().await;
    };
    match (&mut leaving.looking, &mut leaving.asking) {
        (Some(looking), _) => Asked::Overlap(looking.await),
        (None, Some(asking)) => Asked::Permit(asking.await),
        (None, None) => std::future::pending().await,
    }
}

impl Driver {
    /// Its host has to give it up: a drain, a preemption, the pool's operator. One whose
    /// owner allows surge is handed over; any other is stopped, and starts on another
    /// host once nothing of it runs.
    pub(super) fn consider_leaving(&mut self) {
        self.consider_permit();
        let Stage::Placed { place } = self.lifecycle.stage().clone() else {
            if !matches!(self.lifecycle.stage(), Stage::Stopped { .. }) {
                self.leaving = None;
            }
            return;
        };
        let noticed = self
            .reports
            .get(&place)
            .filter(|status| status.notice.is_some() && status.state != SandboxState::Stopped)
            .cloned();
        let Some(sandbox) = noticed.filter(|_| self.lifecycle.intent() == Intent::Run) else {
            return;
        };
        let leaving = match self.leaving.take() {
            Some(leaving) if leaving.place == place => leaving,
            _ => self.told_to_leave(place.clone(), &sandbox),
        };
        let overlap = leaving.overlap;
        let begun = sandbox.state == SandboxState::Stopping;
        let tries = leaving.tries;
        self.leaving = Some(leaving);
        let leave = match (self.lifecycle.handover(), overlap) {
            (Some(_), _) => return self.consider_switch(),
            (None, None) => return,
            (None, Some(true)) if !begun && tries < TRIES => Leave::HandOver,
            // Its host has begun, whatever budgets say.
            (None, Some(_)) if begun || self.permit.is_some() => Leave::StopFirst,
            (None, Some(_)) => return self.ask_budgets(),
        };
        if leave == Leave::HandOver
            && let Some(leaving) = &mut self.leaving
        {
            leaving.tries += 1;
        }
        let grace = self.grace();
        self.step(Event::Noticed { place, grace, leave });
    }

    fn told_to_leave(&self, place: Place, sandbox: &SandboxStatus) -> Leaving {
        let reason = sandbox.notice.as_ref().map_or("", |notice| &notice.reason);
        warn!(host = %place.host, attempt = %place.attempt, reason, "the pod has to leave its host");
        let message = format!("The pod's host {} has to give it up: {reason}", place.host);
        self.happened(Severity::Warning, "LeavingHost", &message);
        let looking = match &self.object {
            Some(pod) if self.tools.placer.overlaps() && sandbox.state != SandboxState::Stopping => {
                let (client, pod) = (self.tools.client.clone(), pod.clone());
                Some(async move { surge::allows_overlap(&client, &pod).await }.boxed())
            }
            _ => None,
        };
        Leaving {
            place,
            overlap: match looking {
                Some(_) => None,
                None => Some(false),
            },
            looking,
            tries: 0,
            asking: None,
        }
    }

    /// Nobody has room for two: it is stopped first.
    pub(super) fn without_overlap(&mut self) {
        if let Some(leaving) = &mut self.leaving {
            leaving.overlap = Some(false);
        }
        self.step(Event::NoOverlap);
    }

    pub(super) fn take_asked(&mut self, asked: Asked) {
        let Some(leaving) = &mut self.leaving else { return };
        match asked {
            Asked::Overlap(overlap) => {
                leaving.looking = None;
                leaving.overlap = Some(overlap);
            }
            Asked::Permit(permit) => {
                leaving.asking = None;
                self.permit = Some(permit);
            }
        }
    }

    fn ask_budgets(&mut self) {
        let (Some(pod), Some(leaving)) = (self.object.clone(), &mut self.leaving) else {
            return;
        };
        if leaving.asking.is_none() {
            let tools = self.tools.clone();
            let asking = async move { tools.budgets.permit(&tools.client, &pod).await };
            leaving.asking = Some(asking.boxed());
        }
    }

    /// It is away no more, or for good: another pod of its budgets may be.
    fn consider_permit(&mut self) {
        if self.permit.is_none() {
            return;
        }
        let leaves = self
            .leaving
            .as_ref()
            .is_some_and(|leaving| self.lifecycle.place() == Some(&leaving.place));
        let ready = self
            .object
            .as_ref()
            .and_then(|pod| pod.status.as_ref())
            .is_some_and(is_ready);
        let back = matches!(self.lifecycle.stage(), Stage::Placed { .. }) && ready && !leaves;
        if back || self.lifecycle.intent() != Intent::Run {
            self.permit = None;
        }
    }

    /// Whether the next attempt could serve now.
    fn consider_switch(&mut self) {
        let Some(Handover {
            step: Step::Rising { place },
            ..
        }) = self.lifecycle.handover()
        else {
            return;
        };
        let place = place.clone();
        let Some(pod) = self.object.clone() else { return };
        let Some((_, status)) = self.switched_status(&pod, &place) else {
            return;
        };
        if is_ready(&status) {
            info!(host = %place.host, attempt = %place.attempt, "the next attempt takes the pod over");
            self.step(Event::Ready(place));
        }
    }

    /// The pod's status and its record, once it is placed there.
    fn switched_status(
        &self,
        pod: &Pod,
        next: &Place,
    ) -> Option<(Record, k8s_openapi::api::core::v1::PodStatus)> {
        let record = Record {
            place: next.clone(),
            mesh: self.record.as_ref()?.mesh,
            other: Some(Other {
                place: self.lifecycle.place()?.clone(),
                beside: Some(Beside::Former),
            }),
        };
        let pod = without_states(pod);
        let status = status::status(&Observed {
            pod: &pod,
            record: Some(&record),
            sandbox: self.reports.get(next).map(Arc::as_ref),
            verdict: None,
            holdup: None,
            waiting: None,
            host_lost: self.is_lost_at(next),
            unsettled: true,
            ended: false,
            now: Timestamp::now(),
        });
        Some((record, status))
    }

    /// One write: the record, the address, the containers, the conditions.
    pub(super) fn switch_after(&mut self, delay: Duration) {
        let Some(Handover {
            step: Step::Switching { place },
            ..
        }) = self.lifecycle.handover()
        else {
            return;
        };
        let place = place.clone();
        let Some(pod) = self.object.clone() else { return };
        let recording = self
            .switched_status(&pod, &place)
            .map(|(record, status)| self.recording(pod, status, Entry::Switched(record)).write());
        let switching = async move {
            sleep(delay).await;
            Done::Switched(Box::new(match recording {
                Some(recording) => Some(recording.await),
                None => None,
            }))
        };
        self.work = Some(switching.boxed());
    }

    pub(super) fn switched(&mut self, written: Option<Result<Pod, RecordError>>) {
        match written {
            Some(Ok(mut pod)) => {
                pod.metadata.managed_fields = None;
                self.take_object(Arc::new(pod));
            }
            Some(Err(error)) => {
                if let RecordError::Write(error) = &error
                    && is_gone(error)
                {
                    self.look_again();
                }
                debug!(
                    error = &error as &dyn std::error::Error,
                    "a switch is written again"
                );
            }
            None => {}
        }
        let Some(Handover {
            step: Step::Switching { place },
            ..
        }) = self.lifecycle.handover()
        else {
            return;
        };
        let place = place.clone();
        let found = self.object.as_ref().and_then(|pod| Record::of(pod));
        match found {
            Some(found) if found.place == place => {
                self.record = Some(found);
                self.upkeep.begin_anew();
                self.step(Event::Switched);
                // What was reported of it before it was the pod's placement.
                match self.reports.get(&place).cloned() {
                    Some(status) => {
                        self.judge(&place, &status);
                        self.step(Event::Seen {
                            place,
                            state: status.state,
                        });
                    }
                    None => self.missing(place),
                }
            }
            _ => {
                let delay = self.start.pause();
                self.switch_after(delay);
            }
        }
    }

    /// How long the former attempt goes on after a switch.
    pub(super) fn linger(&self) -> Duration {
        match (self.lifecycle.intent(), self.lifecycle.stage()) {
            (Intent::Run, Stage::Placed { .. } | Stage::Recorded { .. }) => LINGER,
            _ => Duration::ZERO,
        }
    }

    /// What is on record of the other attempt, after a step.
    pub(super) fn follow_handover(&mut self) {
        if self.lifecycle.handover().is_none()
            && let Some(Record {
                other: Some(other), ..
            }) = &mut self.record
        {
            other.beside = None;
        }
    }
}

/// What is told of the containers is of the former attempt. Only their counts go on.
fn without_states(pod: &Pod) -> Pod {
    let mut pod = pod.clone();
    if let Some(status) = &mut pod.status {
        let containers = status.container_statuses.iter_mut();
        for container in containers.chain(&mut status.init_container_statuses).flatten() {
            container.state = None;
            container.ready = false;
        }
    }
    pod
}
