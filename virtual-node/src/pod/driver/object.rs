//! The pod as the API server has it: what it wants now, what is on record, and
//! whether it is still there.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use objects::Lenient;
use tracing::{info, warn};

use super::{
    super::{
        lifecycle::{Event, Handover, Intent, Stage},
        record::{Other, Record},
        status::Phase,
    },
    Driver, optional,
    retries::Retries,
};
use crate::api_server::answered;

type Looked = Result<Option<Pod>, kube::Error>;

/// A live read of the object.
pub(super) struct Look {
    reading: Option<BoxFuture<'static, Looked>>,
    retries: Retries,
}

impl Look {
    pub(super) fn new() -> Self {
        Self {
            reading: None,
            retries: Retries::of_calls(),
        }
    }

    /// The answer of a read in flight, or never.
    pub(super) async fn looked(&mut self) -> Looked {
        let looked = optional(&mut self.reading).await;
        self.reading = None;
        looked
    }
}

impl Driver {
    pub(super) fn take_object(&mut self, object: Arc<Pod>) {
        if let Some(known) = &self.object {
            if Arc::ptr_eq(known, &object) || !newer(&object, known) {
                return;
            }
            let relabelled = known.metadata.labels != object.metadata.labels
                || known.metadata.annotations != object.metadata.annotations;
            if relabelled {
                // A volume of the downward API may show them.
                self.upkeep.hasten();
            }
        } else {
            let span = tracing::Span::current();
            span.record("pod.namespace", object.namespace().unwrap_or_default());
            span.record("pod.name", object.name_any());
        }
        self.object = Some(object);
        // In this order: what is being deleted is not placed any more.
        self.intend();
        self.read_record();
    }

    /// What the object wants now.
    fn intend(&mut self) {
        let Some(object) = &self.object else { return };
        let phase = Phase::of(object);
        let intent = if object.metadata.deletion_timestamp.is_some() {
            let grace = object.metadata.deletion_grace_period_seconds.unwrap_or(0);
            Intent::Delete {
                grace: Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
            }
        } else if phase.is_final() || self.verdict.is_some() {
            Intent::Finish
        } else {
            Intent::Run
        };
        self.step(Event::Intended(intent));
    }

    /// What is on record counts until this process has placed the pod itself, or
    /// has heard of it from the host on record.
    fn read_record(&mut self) {
        let Some(object) = &self.object else { return };
        let stage = self.lifecycle.stage();
        if *stage == Stage::Unread {
            let found = Record::of(object);
            self.start.first = found.is_none();
            self.record.clone_from(&found);
            if let Some(Other {
                place,
                beside: Some(beside),
            }) = found.as_ref().and_then(|record| record.other.clone())
            {
                self.step(Event::BesideOnRecord {
                    beside,
                    place,
                    grace: self.grace(),
                });
            } else if let Some(over) = found.as_ref().and_then(|record| record.other.as_ref()) {
                self.step(Event::WasBeside(over.place.attempt));
            }
            self.step(Event::OnRecord(found.map(|r| r.place)));
        } else if matches!(
            stage,
            Stage::Recorded { .. } | Stage::Claiming { .. } | Stage::Preparing { .. }
        ) && let Some(found) = Record::of(object)
        {
            self.record = Some(found.clone());
            // What is fenced since is fenced, whatever was written last.
            self.follow_handover();
            self.step(Event::OnRecord(Some(found.place)));
        } else if let Some((beside, second)) = self.lifecycle.handover().and_then(Handover::beside)
            && let Some(found) = Record::of(object)
            && Some(&found.place) == self.lifecycle.place()
            && found
                .other
                .as_ref()
                .is_some_and(|other| other.beside == Some(beside) && other.place == *second)
        {
            self.record = Some(found);
        }
    }

    /// Reads the object itself: the watch is no proof of absence.
    pub(super) fn look_again(&mut self) {
        let named = match &self.object {
            Some(pod) => Some((pod.namespace().unwrap_or_default(), pod.name_any())),
            None => self
                .inputs
                .borrow()
                .reports
                .values()
                .next()
                .map(|s| (String::from(&s.namespace), String::from(&s.name))),
        };
        let settled = matches!(self.lifecycle.intent(), Intent::Reap) || self.look.reading.is_some();
        let Some((namespace, name)) = named.filter(|_| !settled) else {
            return;
        };
        let delay = self.look.retries.pause();
        let api = Api::<Lenient<Pod>>::namespaced(self.tools.client.clone(), &namespace);
        let reading = async move {
            tokio::time::sleep(delay).await;
            answered(api.get_opt(&name))
                .await?
                .map(Lenient::whole)
                .transpose()
        };
        self.look.reading = Some(reading.boxed());
    }

    pub(super) fn take_looked(&mut self, looked: Looked) {
        match looked {
            Ok(Some(pod)) if pod.metadata.uid.as_deref() == Some(self.uid.as_str()) => {
                self.take_object(Arc::new(pod));
                if self.absent {
                    self.look_again();
                } else {
                    self.look.retries.reset();
                }
            }
            Ok(_) => {
                info!("the pod is gone from the API server");
                self.step(Event::Intended(Intent::Reap));
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot look whether a pod still exists"
                );
                self.look_again();
            }
        }
        // Reports that had to wait for this.
        self.take_inputs();
    }
}

/// 404, or 409: the UID is another pod's, or the version is not the newest.
pub(super) fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}

/// Versions of one object are ordered numbers (KEP-5504).
pub(super) fn newer(new: &Pod, old: &Pod) -> bool {
    let version = |pod: &Pod| {
        pod.metadata
            .resource_version
            .as_ref()
            .and_then(|v| v.parse::<u64>().ok())
    };
    match (version(new), version(old)) {
        (Some(new), Some(old)) => new > old,
        _ => true,
    }
}
