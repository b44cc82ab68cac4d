//! Events for `kubectl describe`: what hosts report of pods, and what this node
//! says of pods and of itself.
//!
//! One task writes them, one after another, so that an event that repeats is
//! counted up rather than written again ([`correlate`], pure). Events are a
//! courtesy: when the queue is full or the API server refuses one, it is lost,
//! and nothing waits for it.

mod correlate;

use correlate::{Correlator, Write};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use pool_agent_api::status::Severity;
use serde_json::json;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::api_server::answered;

/// Events not yet written. More than a burst of a hundred pods makes at once;
/// beyond it they are dropped.
const QUEUE: usize = 1024;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Happening {
    pub(crate) object: Object,
    pub(crate) severity: Severity,
    /// CamelCase, e.g. a kubelet's `FailedMount`.
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) at: Timestamp,
}

/// What it happened to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Object {
    kind: &'static str,
    namespace: Option<String>,
    name: String,
    uid: String,
    /// E.g. `spec.containers{app}`.
    field: Option<String>,
}

impl Object {
    pub(crate) fn pod(pod: &Pod) -> Self {
        Self {
            kind: "Pod",
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            field: None,
        }
    }

    pub(crate) fn container(pod: &Pod, container: &str, init: bool) -> Self {
        let list = if init { "initContainers" } else { "containers" };
        Self {
            field: Some(format!("spec.{list}{{{container}}}")),
            ..Self::pod(pod)
        }
    }

    /// Kubelets use the node's name for its UID, and `kubectl describe node` looks for that.
    pub(crate) fn node(node: &Node) -> Self {
        let name = node.metadata.name.clone().unwrap_or_default();
        Self {
            kind: "Node",
            namespace: None,
            uid: name.clone(),
            name,
            field: None,
        }
    }

    fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some(self.kind.into()),
            namespace: self.namespace.clone(),
            name: Some(self.name.clone()),
            uid: Some(self.uid.clone()),
            field_path: self.field.clone(),
            ..ObjectReference::default()
        }
    }
}

/// Records what happens. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Happening>,
}

impl Recorder {
    /// Starts the task that writes. It ends when all clones are dropped.
    pub(crate) fn start(client: Client, node_name: String) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let writer = Writer {
            client,
            node_name,
            correlator: Correlator::default(),
        };
        tokio::spawn(writer.run(receiver));
        Self { queue }
    }

    /// Never waits.
    pub(crate) fn record(&self, happening: Happening) {
        if let Err(mpsc::error::TrySendError::Full(lost)) = self.queue.try_send(happening) {
            debug!(reason = lost.reason, "an event was dropped: too many at once");
        }
    }
}

struct Writer {
    client: Client,
    node_name: String,
    correlator: Correlator,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<Happening>) {
        while let Some(happening) = queue.recv().await {
            let now = Timestamp::now();
            let Some(write) = self.correlator.take(&happening, now) else {
                continue;
            };
            if let Err(error) = self.write(&happening, &write).await {
                match error {
                    // Its namespace is being deleted, or the event has expired.
                    kube::Error::Api(status) if status.code == 403 || status.code == 404 => {
                        debug!(
                            reason = happening.reason,
                            code = status.code,
                            "an event was not taken"
                        );
                    }
                    error => warn!(
                        reason = happening.reason,
                        error = &error as &dyn std::error::Error,
                        "cannot write an event"
                    ),
                }
                self.correlator.forget(&happening);
            }
        }
    }

    async fn write(&self, happening: &Happening, write: &Write) -> Result<(), kube::Error> {
        let namespace = happening.object.namespace.as_deref().unwrap_or("default");
        let api = Api::<Event>::namespaced(self.client.clone(), namespace);
        match write {
            Write::Create { name } => {
                let at = Time(happening.at);
                let event = Event {
                    metadata: ObjectMeta {
                        name: Some(name.clone()),
                        namespace: Some(namespace.to_owned()),
                        ..ObjectMeta::default()
                    },
                    involved_object: happening.object.reference(),
                    type_: Some(
                        match happening.severity {
                            Severity::Normal => "Normal",
                            Severity::Warning => "Warning",
                        }
                        .into(),
                    ),
                    reason: Some(happening.reason.clone()),
                    // Kubernetes' limit.
                    message: Some(happening.message.chars().take(1024).collect()),
                    source: Some(EventSource {
                        component: Some("virtual-node".into()),
                        host: Some(self.node_name.clone()),
                    }),
                    reporting_component: Some("virtual-node".into()),
                    reporting_instance: Some(self.node_name.clone()),
                    first_timestamp: Some(at.clone()),
                    last_timestamp: Some(at),
                    count: Some(1),
                    event_time: None::<MicroTime>,
                    ..Event::default()
                };
                answered(api.create(&PostParams::default(), &event))
                    .await
                    .map(drop)
            }
            Write::Count { name, count } => {
                let patch = json!({"count": count, "lastTimestamp": Time(happening.at)});
                answered(api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)))
                    .await
                    .map(drop)
            }
        }
    }
}
