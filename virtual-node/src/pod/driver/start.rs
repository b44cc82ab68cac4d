//! From a host with room to a sandbox it has accepted: on record, everything that
//! the pod refers to in hand, asked.
//!
//! The record is written while the references are read, so that a start waits for
//! the slower of the two and not for both.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt, future::OptionFuture, future::join};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Client, ResourceExt,
    api::{Patch, PatchParams},
};
use pool_agent_api::{PodUid, Refusal, RefusalReason, Resources, SandboxSpec, status::Severity};
use serde_json::json;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    super::{
        lifecycle::{Beside, Event, Handover, Lifecycle, Place, Stage, Step},
        record::{Other, Record},
        references::{Resolved, Token, TokenSlot},
        resolve::{Extent, ReadError, mesh_mode, resolve},
        status::{self, Holdup, Verdict},
        translate::{self, Translated, Untranslatable},
    },
    Done, Driver, Tools, api,
    object::{is_gone, newer},
    retries::Retries,
    room::{Told, forbidden, unsupported},
    sleep,
    telling::Writing,
};
use crate::{api_server::answered, event::Object, pool::CallError};

/// What was read is read again if the start comes later than this.
const FRESH: Duration = Duration::from_secs(120);
/// A read that fails is told to the user once it is waited for this long at a time.
const WORTH_TELLING: Duration = Duration::from_secs(2);

pub(super) struct Start {
    /// Nobody has placed the pod before.
    pub(super) first: bool,
    resolved: Option<(Resolved, Instant)>,
    spec: Option<SandboxSpec>,
    /// A host refused it, and none has taken it since.
    refused: bool,
    retries: Retries,
}

impl Start {
    pub(super) fn new() -> Self {
        Self {
            first: false,
            resolved: None,
            spec: None,
            refused: false,
            retries: Retries::of_reads(),
        }
    }

    /// Until a write is tried again.
    pub(super) fn pause(&mut self) -> Duration {
        self.retries.pause()
    }

    /// Nothing of the tenant's is kept longer than a start needs it.
    pub(super) fn follow(&mut self, lifecycle: &Lifecycle) {
        let starting = matches!(
            lifecycle.stage(),
            Stage::Claiming { .. } | Stage::Preparing { .. } | Stage::Starting { .. }
        ) || lifecycle
            .handover()
            .is_some_and(|handover| handover.step.begins());
        if !starting {
            self.spec = None;
            self.resolved = None;
            self.refused = false;
        }
    }
}

/// What came of preparing. None: there was nothing to do.
pub(super) struct Preparation {
    recorded: Option<Result<Pod, RecordError>>,
    resolved: Option<Result<Resolved, ReadError>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("cannot put a placement on record")]
    Write(#[from] kube::Error),
    #[error("another placement is on record")]
    Overtaken,
}

impl Driver {
    pub(super) fn prepare(&mut self) {
        let delay = if self.start.refused {
            // Every attempt costs a write, and there may be no end of refusals.
            self.start.retries.pause()
        } else {
            self.start.retries.reset();
            Duration::ZERO
        };
        self.prepare_after(delay);
    }

    fn prepare_after(&mut self, delay: Duration) {
        let (Some(pod), Some(place)) = (self.object.clone(), self.preparing().cloned()) else {
            return;
        };
        let recording = (!self.is_recorded(&place)).then(|| {
            let status = status::status(&self.observed(&pod));
            let entry = match (&self.record, self.is_second(&place)) {
                (Some(record), true) => Entry::Beside(Record {
                    other: Some(Other {
                        place,
                        beside: Some(Beside::Next),
                    }),
                    ..record.clone()
                }),
                (record, _) => Entry::Placed {
                    place,
                    other: record.as_ref().and_then(|r| r.other.clone()),
                },
            };
            self.recording(pod.clone(), status, entry).write()
        });
        let fresh = self
            .start
            .resolved
            .as_ref()
            .is_some_and(|(_, at)| at.elapsed() < FRESH);
        let resolving = (!fresh).then(|| read(self.tools.clone(), pod, self.upkeep.tokens().clone()));
        let preparing = async move {
            sleep(delay).await;
            let (recorded, resolved) =
                join(OptionFuture::from(recording), OptionFuture::from(resolving)).await;
            Done::Prepared(Box::new(Preparation { recorded, resolved }))
        };
        self.work = Some(preparing.boxed());
    }

    /// The attempt that is being put on record and looked up.
    fn preparing(&self) -> Option<&Place> {
        match (self.lifecycle.stage(), self.lifecycle.handover()) {
            (Stage::Preparing { place }, _) => Some(place),
            (
                _,
                Some(Handover {
                    step: Step::Preparing { place },
                    ..
                }),
            ) => Some(place),
            _ => None,
        }
    }

    /// Whether it is the other attempt of a handover that begins.
    fn is_second(&self, place: &Place) -> bool {
        self.lifecycle
            .handover()
            .is_some_and(|handover| match &handover.step {
                Step::Preparing { place: second } | Step::Starting { place: second } => second == place,
                _ => false,
            })
    }

    pub(super) fn recording(&mut self, pod: Arc<Pod>, status: PodStatus, entry: Entry) -> Recording {
        Recording {
            client: self.tools.client.clone(),
            uid: self.uid.clone(),
            status,
            pod,
            entry,
            before: self.telling.take_writing(),
        }
    }

    /// A status write would be in the way of the record, which is for one version of
    /// the object, and says all that is known of the status itself.
    pub(super) fn is_being_recorded(&self) -> bool {
        let switching = matches!(
            self.lifecycle.handover(),
            Some(Handover {
                step: Step::Switching { .. },
                ..
            })
        );
        switching || self.preparing().is_some_and(|place| !self.is_recorded(place))
    }

    fn is_recorded(&self, place: &Place) -> bool {
        self.record.as_ref().is_some_and(|r| r.names(place))
    }

    pub(super) fn prepared(&mut self, preparation: Preparation) {
        let Preparation { recorded, resolved } = preparation;
        let unread = match resolved {
            Some(Ok(resolved)) => {
                self.upkeep.keep_tokens(resolved.tokens.clone());
                self.start.resolved = Some((resolved, Instant::now()));
                None
            }
            Some(Err(error)) => Some(error),
            None => None,
        };
        match recorded {
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
                return self.unprepared(&error);
            }
            None => {}
        }
        if let Some(error) = unread {
            return self.unprepared(&error);
        }
        // Unless the object that came back says that it is over.
        let Some(place) = self.preparing().cloned() else {
            return;
        };
        match self.translated(&place) {
            Some(Ok(translated)) => self.ready_to_start(translated, &place),
            // The one that serves goes on, and what is missing may come.
            Some(Err(why)) if self.is_second(&place) => {
                debug!(error = %why, "the next attempt of a handover waits for what it refers to");
                self.start.resolved = None;
                let delay = self.start.retries.pause();
                self.prepare_after(delay);
            }
            Some(Err(why @ Untranslatable::Unsupported(_))) => self.conclude(unsupported(&why)),
            Some(Err(why)) => self.hold_up(why),
            // What came back is not on record: somebody wrote over it at once.
            None => {
                let delay = self.start.retries.pause();
                self.prepare_after(delay);
            }
        }
    }

    /// None unless it is on record and everything is in hand.
    fn translated(&self, place: &Place) -> Option<Result<Translated, Untranslatable>> {
        let pod = self.object.as_ref()?;
        let record = self.record.as_ref().filter(|r| r.names(place))?;
        let (resolved, _) = self.start.resolved.as_ref()?;
        let facts = self.tools.facts.borrow();
        Some(translate::translate(
            pod,
            self.key(place),
            record.mesh,
            resolved,
            &facts,
        ))
    }

    fn ready_to_start(&mut self, translated: Translated, place: &Place) {
        self.holdup = None;
        for message in translated.skipped_variables {
            self.happened(Severity::Warning, "InvalidEnvironmentVariableNames", &message);
        }
        self.start.spec = Some(translated.spec);
        if self.heard.borrow().is_silent(&place.host) {
            // Gone while the pod waited for something: it was not asked, so another may be.
            if !self.is_second(place) {
                self.room = Told::Refused(place.host.clone());
            }
            self.step(Event::Refused(RefusalReason::Unknown));
        } else {
            self.step(Event::Prepared);
        }
    }

    /// The API server did not answer, or not as it should.
    fn unprepared(&mut self, error: &(dyn std::error::Error + 'static)) {
        let delay = self.start.retries.pause();
        if delay > WORTH_TELLING {
            warn!(error, "a pod waits for the API server");
            self.happened(Severity::Warning, "FailedMount", &chain(error));
        } else {
            debug!(error, "preparing a pod is tried again");
        }
        self.prepare_after(delay);
    }

    /// Something that the pod refers to is not there yet.
    fn hold_up(&mut self, why: Untranslatable) {
        let message = why.to_string();
        let waiting = || Holdup {
            container: None,
            reason: "ContainerCreating".into(),
            message: String::new(),
        };
        let holdup = match why {
            Untranslatable::MissingForContainer { container, message } => {
                self.happened_to_container(&container, &format!("Error: {message}"));
                Holdup {
                    container: Some(container),
                    reason: "CreateContainerConfigError".into(),
                    message,
                }
            }
            Untranslatable::MissingForVolume { .. } => {
                self.happened(Severity::Warning, "FailedMount", &message);
                waiting()
            }
            Untranslatable::MissingRuntimeClass { .. } | Untranslatable::Unsupported(_) => {
                self.happened(Severity::Warning, "FailedCreatePodSandBox", &message);
                waiting()
            }
        };
        self.holdup = Some(holdup);
        // What is there now is read again, with what is not.
        self.start.resolved = None;
        let delay = self.start.retries.pause();
        self.prepare_after(delay);
    }

    fn happened_to_container(&self, container: &str, message: &str) {
        let Some(pod) = &self.object else { return };
        let init = pod
            .spec
            .iter()
            .flat_map(|s| s.init_containers.iter().flatten())
            .any(|c| c.name == container);
        let object = Object::container(pod, container, init);
        self.happened_to(object, Severity::Warning, "Failed", message);
    }

    pub(super) fn start(&mut self, place: Place, again: bool) {
        let Some(spec) = self.start.spec.clone() else {
            // Cannot be: it was prepared on the way here. Begin again.
            self.step(Event::Refused(RefusalReason::Unknown));
            return;
        };
        info!(host = %place.host, attempt = %place.attempt, again, "starting the pod");
        let delay = if again {
            self.start.retries.pause()
        } else {
            Duration::ZERO
        };
        let pool = self.tools.pool.clone();
        let starting = async move {
            sleep(delay).await;
            Done::Started(match pool.host(&place.host) {
                Some(host) => host.start(spec).await,
                None => Ok(Err(Refusal {
                    reason: RefusalReason::Draining,
                    message: "the host is not of the pool any more".into(),
                    free: Resources::default(),
                })),
            })
        };
        self.work = Some(starting.boxed());
    }

    pub(super) fn started(&mut self, outcome: Result<Result<(), Refusal>, CallError>) {
        let second = !matches!(self.lifecycle.stage(), Stage::Starting { .. });
        match outcome {
            // Its volumes are looked after once it is the pod's placement.
            Ok(Ok(())) if second => self.step(Event::Accepted),
            // Whatever is wrong with it: it has another that serves.
            Ok(Err(refusal)) if second => {
                info!(reason = ?refusal.reason, detail = refusal.message, "the host refused a handover");
                self.start.refused = true;
                self.step(Event::Refused(refusal.reason));
            }
            Err(CallError::Invalid { message, .. }) if second => {
                info!(detail = message, "the host does not take the spec of a handover");
                self.step(Event::Refused(RefusalReason::Unsupported));
            }
            Ok(Ok(())) => {
                if let Some(spec) = &self.start.spec {
                    self.upkeep.host_has(&spec.volumes);
                }
                self.step(Event::Accepted);
            }
            // The pool's operator does not allow it, on this host or another.
            Ok(Err(refusal)) if refusal.reason == RefusalReason::Forbidden => {
                self.conclude(forbidden(&refusal));
                self.step(Event::Refused(refusal.reason));
            }
            Ok(Err(refusal)) => {
                info!(reason = ?refusal.reason, detail = refusal.message, "the host refused the pod");
                self.start.refused = true;
                if refusal.reason.another_host_may_accept()
                    && let Some(place) = self.lifecycle.place()
                {
                    self.room = Told::Refused(place.host.clone());
                }
                self.step(Event::Refused(refusal.reason));
            }
            // The spec itself was refused: no host will take it.
            Err(CallError::Invalid { message, .. }) => {
                self.conclude(Verdict {
                    reason: "UnexpectedAdmissionError".into(),
                    message: format!("Pod was rejected: {message}"),
                });
                self.step(Event::Refused(RefusalReason::Unsupported));
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "a start was not answered"
                );
                self.step(Event::Unanswered);
            }
        }
    }
}

async fn read(
    tools: Arc<Tools>,
    pod: Arc<Pod>,
    held: BTreeMap<TokenSlot, Token>,
) -> Result<Resolved, ReadError> {
    resolve(&tools.client, &pod, &held, Extent::Start, Timestamp::now()).await
}

/// What is to be on record.
pub(super) enum Entry {
    /// A new placement; whether it is enrolled is decided now.
    Placed { place: Place, other: Option<Other> },
    /// The next attempt of a handover, beside the placement that there is.
    Beside(Record),
    /// That attempt as the placement, and the one before beside it.
    Switched(Record),
}

/// A place to be put on record.
pub(super) struct Recording {
    client: Client,
    uid: PodUid,
    pod: Arc<Pod>,
    /// As it is to be, but for the record.
    status: PodStatus,
    entry: Entry,
    /// A status write that is still in flight.
    before: Option<Writing>,
}

impl Recording {
    /// Written for the version that was read: if another process has placed the pod
    /// since, the API server refuses this with 409.
    pub(super) async fn write(self) -> Result<Pod, RecordError> {
        let mut known = self.pod;
        if let Some(before) = self.before
            && let Ok(written) = before.done.await
            && newer(&written, &known)
        {
            known = Arc::new(written);
        }
        let record = match self.entry {
            Entry::Placed { place, other } => Record {
                place,
                mesh: mesh_mode(&self.client, &known).await?,
                other,
            },
            Entry::Beside(record) | Entry::Switched(record) => {
                let found = Record::of(&known).map(|found| found.place);
                if !found.is_some_and(|found| record.names(&found)) {
                    return Err(RecordError::Overtaken);
                }
                record
            }
        };
        let current = known.status.clone().unwrap_or_default();
        let wanted = status::on_record(self.status, &record, &known, Timestamp::now());
        let Some(mut patch) = status::patch(self.uid.as_str(), &current, &wanted) else {
            return Ok(Pod::clone(&known));
        };
        patch["metadata"]["resourceVersion"] = json!(known.metadata.resource_version);
        let pods = api(&self.client, &known);
        let name = known.name_any();
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        Ok(answered(pods.patch_status(&name, &parameters, &patch))
            .await?
            .whole()?)
    }
}

/// An error and its causes on one line, for the user.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
