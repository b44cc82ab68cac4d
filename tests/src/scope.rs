//! One test's place on the lab: a namespace of the cluster.
//!
//! Everything a test makes lives in it and goes with it. Closing waits until
//! the namespace is gone, so a pod that cannot be deleted fails the test that
//! made it.

use std::{
    fmt::{Debug, Write},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Event, Namespace, Pod},
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use spindrift_local::{Lab, cluster};

use crate::{journal::Mark, kubectl::Kubectl, workload};

/// How long anything that just has to happen may take. Far more than it takes:
/// two cores may be building something else.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Scope {
    lab: Arc<Lab>,
    namespace: String,
    started: Mark,
    kubectl: Kubectl,
}

impl Scope {
    /// Makes the namespace, and waits until it admits pods.
    pub async fn open(lab: Arc<Lab>, test: &str) -> anyhow::Result<Self> {
        let started = Mark::now(&lab);
        let short: String = test.rsplit("::").next().unwrap_or(test).replace('_', "-");
        // Room for the random end in the 63 bytes of a name.
        let short = short[..short.len().min(40)].trim_end_matches('-').to_owned();
        let wanted = Namespace {
            metadata: ObjectMeta {
                generate_name: Some(format!("{short}-")),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        let namespaces: Api<Namespace> = Api::all(lab.client());
        let made = namespaces.create(&PostParams::default(), &wanted).await?;
        let namespace = made.name_any();
        lab.cluster().wait_service_account(&namespace, PATIENCE).await?;
        Ok(Self {
            kubectl: Kubectl::new(&lab, &namespace),
            lab,
            namespace,
            started,
        })
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn client(&self) -> Client {
        self.lab.client()
    }

    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// The components' logs since the test began.
    pub fn journal(&self) -> &Mark {
        &self.started
    }

    /// The objects of a kind in the namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client(), &self.namespace)
    }

    pub fn node_name(&self) -> String {
        self.lab.layout().node_name()
    }

    /// Creates an object from its manifest.
    pub async fn create(&self, manifest: Value) -> anyhow::Result<DynamicObject> {
        let object: DynamicObject = serde_json::from_value(manifest)?;
        let types = object
            .types
            .clone()
            .context("the manifest has no apiVersion and kind")?;
        let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
        let api: Api<DynamicObject> = Api::namespaced_with(self.client(), &self.namespace, &resource);
        api.create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("cannot create {} {}", types.kind, object.name_any()))
    }

    pub async fn patch<K>(&self, name: &str, patch: Value) -> anyhow::Result<K>
    where
        K: kube::Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
        K::DynamicType: Default,
    {
        Ok(self
            .api::<K>()
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await?)
    }

    /// Creates a pod and waits until it is Ready.
    pub async fn start(&self, manifest: Value) -> anyhow::Result<Pod> {
        let name = self.create(manifest).await?.name_any();
        self.ready(&name).await
    }

    pub async fn ready(&self, pod: &str) -> anyhow::Result<Pod> {
        self.until(pod, "is Ready", workload::is_ready).await
    }

    pub async fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        Ok(self.api::<Pod>().get(name).await?)
    }

    /// Waits for a pod to be as wanted.
    pub async fn until(&self, pod: &str, what: &str, wanted: impl Fn(&Pod) -> bool) -> anyhow::Result<Pod> {
        self.until_within(PATIENCE, pod, what, wanted).await
    }

    pub async fn until_within(
        &self,
        limit: Duration,
        pod: &str,
        what: &str,
        wanted: impl Fn(&Pod) -> bool,
    ) -> anyhow::Result<Pod> {
        let pods: Api<Pod> = self.api();
        self.wait_within(limit, &format!("that pod {pod} {what}"), async || {
            let found = pods.get_opt(pod).await.map_err(|error| error.to_string())?;
            let found = found.ok_or("it does not exist")?;
            if wanted(&found) {
                Ok(found)
            } else {
                Err(workload::summary(&found))
            }
        })
        .await
    }

    /// Waits until the pod's object is gone.
    pub async fn gone(&self, pod: &str) -> anyhow::Result<()> {
        let pods: Api<Pod> = self.api();
        self.wait(&format!("that pod {pod} is gone"), async || {
            match pods.get_opt(pod).await.map_err(|error| error.to_string())? {
                None => Ok(()),
                Some(found) => Err(workload::summary(&found)),
            }
        })
        .await
    }

    /// The pods labelled `app: NAME`, once there are so many and all are as wanted.
    pub async fn pods_until(
        &self,
        app: &str,
        count: usize,
        what: &str,
        wanted: impl Fn(&Pod) -> bool,
    ) -> anyhow::Result<Vec<Pod>> {
        let pods: Api<Pod> = self.api();
        let selected = ListParams::default().labels(&format!("app={app}"));
        self.wait(&format!("{count} pods of {app} that {what}"), async || {
            let found = pods
                .list(&selected)
                .await
                .map_err(|error| error.to_string())?
                .items;
            if found.len() == count && found.iter().all(&wanted) {
                Ok(found)
            } else {
                Err(found
                    .iter()
                    .map(workload::summary)
                    .collect::<Vec<_>>()
                    .join("\n    "))
            }
        })
        .await
    }

    /// Asks until there is an answer. What was seen last is in the error.
    pub async fn wait<T>(
        &self,
        what: &str,
        ask: impl AsyncFnMut() -> Result<T, String>,
    ) -> anyhow::Result<T> {
        self.wait_within(PATIENCE, what, ask).await
    }

    pub async fn wait_within<T>(
        &self,
        limit: Duration,
        what: &str,
        ask: impl AsyncFnMut() -> Result<T, String>,
    ) -> anyhow::Result<T> {
        Ok(cluster::wait(what, limit, ask).await?)
    }

    /// Waits for an event about an object, with this reason, whose message has
    /// these words.
    pub async fn event(&self, object: &str, reason: &str, words: &str) -> anyhow::Result<Event> {
        let events: Api<Event> = self.api();
        let selected = ListParams::default().fields(&format!("involvedObject.name={object}"));
        self.wait(
            &format!("an event {reason} of {object} with {words:?}"),
            async || {
                let found = events.list(&selected).await.map_err(|error| error.to_string())?;
                let told: Vec<String> = found.items.iter().map(line).collect();
                let mut fitting = found.items.into_iter().filter(|event| {
                    event.reason.as_deref() == Some(reason)
                        && event
                            .message
                            .as_deref()
                            .is_some_and(|message| message.contains(words))
                });
                fitting.next().ok_or_else(|| told.join("\n    "))
            },
        )
        .await
    }

    /// Waits until the log of a pod's container is as wanted. A container that
    /// runs may not have said anything yet.
    pub async fn log_until(
        &self,
        pod: &str,
        what: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        self.wait(&format!("that the log of {pod} {what}"), async || {
            let log = self
                .kubectl
                .run(&["logs", pod])
                .await
                .map_err(|e| format!("{e:#}"))?;
            if wanted(&log) { Ok(log) } else { Err(log) }
        })
        .await
    }

    /// Waits until the log of a pod's container is just this.
    pub async fn log_is(&self, pod: &str, text: &str) -> anyhow::Result<()> {
        self.log_until(pod, &format!("is {text:?}"), |log| log.trim() == text)
            .await
            .map(drop)
    }

    /// The name of the host that a pod runs on, by its address.
    pub fn host_of(&self, pod: &Pod) -> anyhow::Result<String> {
        let address: Ipv4Addr = workload::address(pod).context("the pod has no address")?;
        let host = self.lab.topology().host_of(address.into());
        Ok(host
            .with_context(|| format!("{address} is of no host"))?
            .name
            .clone())
    }

    /// What a person would look at after a failure.
    pub async fn told(&self) -> String {
        let mut told = String::new();
        match self.api::<Pod>().list(&ListParams::default()).await {
            Ok(pods) => {
                for pod in &pods.items {
                    writeln!(told, "  pod {}", workload::summary(pod)).ok();
                }
            }
            Err(error) => drop(writeln!(told, "  the pods cannot be listed: {error}")),
        }
        if let Ok(events) = self.api::<Event>().list(&ListParams::default()).await {
            for event in &events.items {
                writeln!(told, "  event {}", line(event)).ok();
            }
        }
        let lines = self.started.all().unwrap_or_else(|error| vec![error.to_string()]);
        let about = |line: &&String| {
            // Pods' events were shown as such.
            let own = line.contains(&self.namespace) && !line.contains("pod event");
            own || [" WARN ", "ERROR "].iter().any(|level| line.contains(level))
        };
        let lines: Vec<&String> = lines.iter().filter(about).collect();
        // The end says why a test gave up, unless it was long ago.
        const SHOWN: usize = 40;
        const WIDTH: usize = 500;
        for line in &lines[lines.len().saturating_sub(SHOWN)..] {
            let line = line.replace(&self.namespace, "NS");
            writeln!(told, "  log {}", line.chars().take(WIDTH).collect::<String>()).ok();
        }
        told
    }

    /// Deletes the namespace and waits until everything in it is gone.
    pub async fn close(self) -> anyhow::Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client());
        namespaces
            .delete(&self.namespace, &DeleteParams::default())
            .await?;
        let pods: Api<Pod> = self.api();
        self.wait("that the namespace is gone", async || {
            if namespaces
                .get_opt(&self.namespace)
                .await
                .map_err(|e| e.to_string())?
                .is_none()
            {
                return Ok(());
            }
            let left = pods
                .list(&ListParams::default())
                .await
                .map_err(|e| e.to_string())?;
            Err(left
                .items
                .iter()
                .map(workload::summary)
                .collect::<Vec<_>>()
                .join("\n    "))
        })
        .await
    }
}

fn line(event: &Event) -> String {
    format!(
        "{} {} {}: {} (×{})",
        event.involved_object.name.as_deref().unwrap_or_default(),
        event.type_.as_deref().unwrap_or_default(),
        event.reason.as_deref().unwrap_or_default(),
        event.message.as_deref().unwrap_or_default(),
        event.count.unwrap_or(1),
    )
}
