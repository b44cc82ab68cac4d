//! The pod's status, written when it differs: one write at a time.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::Value;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{
    super::{
        lifecycle::{Intent, Stage},
        status::{self, Observed, Phase, is_ready},
    },
    Driver, api,
    object::is_gone,
    retries::Retries,
};
use crate::api_server::answered;

/// A change of status that nobody waits for is held back this long, so that a
/// pod that starts at once is written once.
const QUIET: Duration = Duration::from_millis(300);

/// A status write in flight.
pub(super) struct Writing {
    patch: Value,
    pub(super) done: BoxFuture<'static, Result<Pod, kube::Error>>,
}

pub(super) struct Telling {
    writing: Option<Writing>,
    /// When the status that differs is to be written.
    due: Option<Instant>,
    retries: Retries,
    /// After a failed write.
    not_before: Option<Instant>,
    /// The last patch that was taken, and the version it made: the same again
    /// would change nothing.
    written: Option<(Value, Option<String>)>,
    /// The status that says Ready has been told.
    was_ready: bool,
}

impl Telling {
    pub(super) fn new() -> Self {
        Self {
            writing: None,
            due: None,
            retries: Retries::of_calls(),
            not_before: None,
            written: None,
            was_ready: false,
        }
    }

    /// Whoever writes next has to wait for it.
    pub(super) fn take_writing(&mut self) -> Option<Writing> {
        self.due = None;
        self.writing.take()
    }

    /// The answer of a write in flight and what was written, or never.
    pub(super) async fn written(&mut self) -> (Value, Result<Pod, kube::Error>) {
        let Some(writing) = &mut self.writing else {
            return std::future::pending().await;
        };
        let answer = (&mut writing.done).await;
        let patch = self.writing.take().map(|w| w.patch).unwrap_or_default();
        (patch, answer)
    }
}

impl Driver {
    pub(super) fn observed<'a>(&'a self, pod: &'a Pod) -> Observed<'a> {
        let place = self.lifecycle.place();
        let sandbox = place.and_then(|place| self.reports.get(place)).map(Arc::as_ref);
        let lost = self.is_host_lost();
        let finished = matches!(
            self.lifecycle.stage(),
            Stage::Vacant { .. } | Stage::Stopped { .. }
        ) && self.lifecycle.intent() == Intent::Finish;
        Observed {
            pod,
            record: self.record.as_ref(),
            sandbox,
            verdict: self.verdict.as_ref(),
            holdup: self.holdup.as_ref(),
            waiting: self.waiting.borrow().clone(),
            host_lost: lost,
            // Whoever judges what its host reports decides that it is done.
            unsettled: self.lifecycle.intent() == Intent::Run,
            ended: finished || self.is_removing(),
            now: Timestamp::now(),
        }
    }

    /// Decides whether and when the status is to be written.
    pub(super) fn consider_status(&mut self) {
        let done_with = matches!(self.lifecycle.intent(), Intent::Reap) || self.is_removing();
        let unread = *self.lifecycle.stage() == Stage::Unread;
        let wanting = !done_with && !unread && !self.is_being_recorded();
        let Some(pod) = self.object.clone().filter(|_| wanting) else {
            self.telling.due = None;
            return;
        };
        let wanted = status::status(&self.observed(&pod));
        let current = pod.status.clone().unwrap_or_default();
        match self.difference(&pod, &wanted) {
            None => self.telling.due = None,
            Some(_) => {
                let urgent = wanted.phase != current.phase
                    || is_ready(&wanted) != is_ready(&current)
                    || self.holdup.is_some()
                    || self.waiting.borrow().is_some()
                    || self.verdict.is_some();
                let due = Instant::now() + if urgent { Duration::ZERO } else { QUIET };
                self.telling.due = Some(self.telling.due.map_or(due, |at| at.min(due)));
            }
        }
        // A write that failed has its own time.
        if let (Some(at), Some(not_before)) = (self.telling.due, self.telling.not_before) {
            self.telling.due = Some(at.max(not_before));
        }
    }

    /// When the next write is to begin; never while one is in flight.
    pub(super) fn write_due(&self) -> Option<Instant> {
        self.telling.due.filter(|_| self.telling.writing.is_none())
    }

    fn difference(&self, pod: &Pod, wanted: &PodStatus) -> Option<Value> {
        let current = pod.status.clone().unwrap_or_default();
        let patch = status::patch(self.uid.as_str(), &current, wanted)?;
        match &self.telling.written {
            // The API server keeps something else than it was told.
            Some((last, version)) if *last == patch && *version == pod.metadata.resource_version => None,
            _ => Some(patch),
        }
    }

    pub(super) fn begin_write(&mut self) {
        self.telling.due = None;
        self.telling.not_before = None;
        let Some(pod) = self.object.clone() else { return };
        let wanted = status::status(&self.observed(&pod));
        let Some(patch) = self.difference(&pod, &wanted) else {
            return;
        };
        if is_ready(&wanted) && !self.telling.was_ready {
            self.telling.was_ready = true;
            if self.start.first {
                self.tools.metrics.started(self.born.elapsed());
            }
        }
        let api = api(&self.tools.client, &pod);
        let (name, body) = (pod.name_any(), patch.clone());
        // Before the scheduler can know of it: the pod that it binds next is let in.
        let over = Phase::parse(wanted.phase.as_deref()).is_final();
        let (placer, uid) = (self.tools.placer.clone(), self.uid.clone());
        let done = async move {
            if over {
                placer.finished(uid).await;
            }
            let (parameters, body) = (PatchParams::default(), Patch::Strategic(body));
            answered(api.patch_status(&name, &parameters, &body))
                .await?
                .whole()
        };
        self.telling.writing = Some(Writing {
            patch,
            done: done.boxed(),
        });
    }

    pub(super) fn take_written(&mut self, (patch, written): (Value, Result<Pod, kube::Error>)) {
        match written {
            Ok(mut pod) => {
                self.telling.retries.reset();
                pod.metadata.managed_fields = None;
                self.telling.written = Some((patch, pod.metadata.resource_version.clone()));
                self.take_object(Arc::new(pod));
            }
            Err(error) => {
                let delay = self.telling.retries.pause();
                self.telling.not_before = Some(Instant::now() + delay);
                if is_gone(&error) {
                    debug!("the pod of a status write is not there any more");
                    self.look_again();
                } else {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot write a pod's status"
                    );
                }
            }
        }
    }
}
