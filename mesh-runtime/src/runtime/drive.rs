//! One pod's attachment: the task that owns its state machine, carries out what
//! it orders, and feeds it what happens. Ends when the pod is detached.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument;

use super::{AttachError, Attached, Entry, PodAttachment, metrics::RuntimeMetrics, tenant::OpenTenant};
use crate::{
    attachment::{Attachment, AttachmentState, Effect, Event},
    identity::CertificateState,
    telemetry::Carried,
};

/// Orders to detach that wait for the task: the first one ends it, and whoever
/// comes after waits for the same end.
const ORDERS: usize = 4;

/// The order to detach.
pub(super) struct Drain {
    /// How long connections may go on.
    pub(super) limit: Duration,
    /// Told when nothing of the pod is left; closed if another order did it.
    pub(super) done: oneshot::Sender<()>,
}

struct Task {
    wanted: PodAttachment,
    carried: Arc<Carried>,
    tenant: Arc<OpenTenant>,
    attachment: Attachment,
    state: watch::Sender<AttachmentState>,
    /// None for a pod without identity.
    certificate: Option<watch::Receiver<CertificateState>>,
    synced: watch::Receiver<bool>,
    metrics: Arc<RuntimeMetrics>,
}

/// Starts the task. The answer comes once the pod is redirected, or could not
/// be; in the latter case its entry is gone again.
pub(super) fn start(
    wanted: PodAttachment,
    tenant: Arc<OpenTenant>,
    attached: Weak<Attached>,
    metrics: Arc<RuntimeMetrics>,
) -> (Entry, oneshot::Receiver<Result<(), AttachError>>) {
    let (state, state_receiver) = watch::channel(AttachmentState::Detached);
    let (drain, orders) = mpsc::channel(ORDERS);
    let (answer, answered) = oneshot::channel();
    let pod = &wanted.pod;
    let span = tracing::info_span!(
        "attachment",
        tenant = %pod.tenant,
        pod.uid = %pod.key.pod,
        pod.namespace = %pod.namespace,
        pod.name = %pod.name,
        attempt = %pod.key.attempt,
    );
    let carried = Arc::new(Carried::default());
    let entry = Entry {
        wanted: wanted.clone(),
        carried: carried.clone(),
        drain,
        state: state_receiver,
        router: Arc::clone(&tenant.router),
    };
    let synced = tenant.proxy.synced();
    let mode = wanted.pod.mode;
    metrics.changed(None, Some(AttachmentState::Detached));
    let task = Task {
        wanted,
        carried,
        tenant,
        attachment: Attachment::new(mode),
        state,
        certificate: None,
        synced,
        metrics,
    };
    tokio::spawn(task.run(attached, orders, answer).instrument(span));
    (entry, answered)
}

impl Task {
    async fn run(
        mut self,
        attached: Weak<Attached>,
        mut orders: mpsc::Receiver<Drain>,
        answer: oneshot::Sender<Result<(), AttachError>>,
    ) {
        let started = Instant::now();
        if let Err(error) = self.attach().await {
            self.detach(Duration::ZERO).await;
            self.forget(&attached);
            // If nobody waits, nobody has to know: nothing of it is left.
            drop(answer.send(Err(error)));
            return;
        }
        self.metrics.attached(started.elapsed());
        // If nobody waits any more, the pod is attached all the same, until the
        // agent says otherwise.
        drop(answer.send(Ok(())));
        let Some(order) = self.follow(&mut orders).await else {
            // The runtime was dropped. The kernel stays as it is.
            return;
        };
        self.detach(order.limit).await;
        self.forget(&attached);
        order.done.send(()).ok();
    }

    async fn attach(&mut self) -> Result<(), AttachError> {
        let key = self.wanted.pod.key.clone();
        for effect in self.take(Event::Attach) {
            match effect {
                Effect::AddToProxy => {
                    self.certificate = self
                        .tenant
                        .proxy
                        .add_pod(self.wanted.pod.clone(), self.carried.clone())
                        .map_err(|source| AttachError::Identity {
                            key: key.clone(),
                            source,
                        })?;
                }
                Effect::Redirect => {
                    self.tenant
                        .router
                        .attach(self.wanted.device())
                        .await
                        .map_err(|source| AttachError::Redirect {
                            key: key.clone(),
                            source,
                        })?
                }
                Effect::RemoveFromProxy | Effect::Drop => {}
            }
        }
        self.take(Event::Redirected);
        Ok(())
    }

    /// Until the order to detach comes; None if it can't come any more.
    async fn follow(&mut self, orders: &mut mpsc::Receiver<Drain>) -> Option<Drain> {
        if *self.synced.borrow_and_update() {
            self.take(Event::Synced);
        }
        if let Some(certificate) = &mut self.certificate {
            certificate.mark_changed();
        }
        loop {
            let event = tokio::select! {
                order = orders.recv() => return order,
                Some(held) = certificate(&mut self.certificate) => {
                    if held { Event::CertificateHeld } else { Event::CertificateLost }
                }
                Ok(()) = self.synced.changed() => {
                    if !*self.synced.borrow_and_update() {
                        continue;
                    }
                    Event::Synced
                }
                // The proxy is gone, and with it this tenant.
                else => return orders.recv().await,
            };
            self.take(event);
        }
    }

    async fn detach(&mut self, limit: Duration) {
        for effect in self.take(Event::Drain) {
            match effect {
                Effect::RemoveFromProxy => {
                    self.tenant.proxy.remove_pod(&self.wanted.pod.key, limit).await;
                }
                Effect::Drop => {
                    if let Err(error) = self.tenant.router.detach(self.wanted.address()).await {
                        // Its packets are still the proxy's, which knows the pod
                        // no more; the entry goes with the device.
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "cannot take a pod's entry out of the kernel"
                        );
                    }
                }
                Effect::AddToProxy | Effect::Redirect => {}
            }
        }
        self.take(Event::Drained);
    }

    /// Leaves no trace in the runtime; its tenant can be closed from now on.
    fn forget(self, attached: &Weak<Attached>) {
        if let Some(attached) = attached.upgrade() {
            attached.with(|entries| entries.remove(&self.wanted.pod.key));
        }
        self.metrics.changed(Some(self.attachment.state()), None);
    }

    fn take(&mut self, event: Event) -> Vec<Effect> {
        let before = self.attachment.state();
        match self.attachment.step(event) {
            Ok((next, effects)) => {
                self.attachment = next;
                let after = next.state();
                if before != after {
                    self.metrics.changed(Some(before), Some(after));
                    tracing::info!(from = before.name(), to = after.name(), "attachment changed");
                    self.state.send_replace(after);
                }
                effects
            }
            Err(refusal) => {
                tracing::error!(
                    error = &refusal as &dyn std::error::Error,
                    "attachment took a wrong turn"
                );
                Vec::new()
            }
        }
    }
}

/// Whether a certificate is in hand, when that may have changed. None if the
/// pod has no identity, or its certificate is not looked after any more.
async fn certificate(state: &mut Option<watch::Receiver<CertificateState>>) -> Option<bool> {
    let state = state.as_mut()?;
    state.changed().await.ok()?;
    Some(matches!(*state.borrow_and_update(), CertificateState::Held(_)))
}
