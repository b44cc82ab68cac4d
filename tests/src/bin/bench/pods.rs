//! Pods made for a figure: created, waited for and removed as any client of the
//! API server would, the times taken from one watch of their namespace.
//!
//! The same watch serves every node, so what the API server and the way to it
//! add is the same for ours and for the baseline.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, future::try_join_all};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle, time::Instant};

pub(crate) const NAMESPACE: &str = "bench";
/// Longer than any start or end takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// What the watch has told of each pod that is there.
#[derive(Clone, Debug, Default)]
struct Seen {
    pods: HashMap<String, Sight>,
}

#[derive(Clone, Debug)]
struct Sight {
    pod: Pod,
    ready: Option<Instant>,
}

pub(crate) struct Pods {
    api: Api<Pod>,
    seen: watch::Receiver<Seen>,
    watching: JoinHandle<()>,
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

impl Pods {
    /// Makes the namespace and starts to watch it.
    pub(crate) async fn open(client: Client) -> Result<Self> {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        if namespaces.get_opt(NAMESPACE).await?.is_none() {
            let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}}))?;
            namespaces.create(&PostParams::default(), &namespace).await?;
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
        let until = Instant::now() + LIMIT;
        while accounts.get_opt("default").await?.is_none() {
            if Instant::now() > until {
                bail!("namespace {NAMESPACE} got no service account");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let api: Api<Pod> = Api::namespaced(client, NAMESPACE);
        let (tell, seen) = watch::channel(Seen::default());
        let watching = tokio::spawn(follow(api.clone(), tell));
        let pods = Self { api, seen, watching };
        // What an earlier run that was killed has left.
        let left: Vec<String> = pods
            .api
            .list_metadata(&Default::default())
            .await?
            .iter()
            .map(|p| p.name_any())
            .collect();
        pods.remove(&left).await?;
        Ok(pods)
    }

    /// An owner to share (`metadata.ownerReferences`): the placer spreads the pods
    /// of one over the hosts.
    pub(crate) async fn owner(&self, name: &str) -> Result<Value> {
        let owners: Api<ConfigMap> = Api::namespaced(self.api.clone().into_client(), NAMESPACE);
        let wanted = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let owner = match owners.create(&PostParams::default(), &wanted).await {
            // Of an earlier run.
            Err(kube::Error::Api(status)) if status.code == 409 => owners.get(name).await?,
            answer => answer?,
        };
        Ok(json!([{
            "apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": owner.uid(), "controller": true,
        }]))
    }

    /// Creates the pods at once; how long each took until it was Ready.
    pub(crate) async fn start(&self, pods: &[Value]) -> Result<Vec<Duration>> {
        let created = try_join_all(pods.iter().map(async |pod| -> Result<(String, Instant)> {
            let pod: Pod = serde_json::from_value(pod.clone())?;
            let since = Instant::now();
            self.api.create(&PostParams::default(), &pod).await?;
            Ok((pod.name_any(), since))
        }))
        .await?;
        try_join_all(created.into_iter().map(async |(name, since)| {
            let ready = self
                .when(&name, "Ready", |sight| sight.and_then(|s| s.ready))
                .await?;
            Ok(ready.duration_since(since))
        }))
        .await
    }

    /// Deletes the pods, each with its own grace period, and waits until they
    /// are gone.
    pub(crate) async fn remove<S: AsRef<str>>(&self, names: &[S]) -> Result<()> {
        try_join_all(names.iter().map(async |name| -> Result<()> {
            let name = name.as_ref();
            match self.api.delete(name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                answer => drop(answer.with_context(|| format!("cannot delete pod {name}"))?),
            }
            self.when(name, "gone", |sight| sight.is_none().then_some(()))
                .await
        }))
        .await
        .map(drop)
    }

    /// Its address. It must be Ready.
    pub(crate) fn address(&self, name: &str) -> Result<std::net::Ipv4Addr> {
        let seen = self.seen.borrow();
        let status = seen.pods.get(name).and_then(|sight| sight.pod.status.as_ref());
        let address = status.and_then(|status| status.pod_ip.as_deref());
        Ok(address
            .with_context(|| format!("pod {name} has no address"))?
            .parse()?)
    }

    async fn when<T>(&self, name: &str, what: &str, is: impl Fn(Option<&Sight>) -> Option<T>) -> Result<T> {
        let mut seen = self.seen.clone();
        let mut found = None;
        let wait = seen.wait_for(|seen| {
            found = is(seen.pods.get(name));
            found.is_some()
        });
        let waited = tokio::time::timeout(LIMIT, wait).await.map(|seen| seen.map(drop));
        match (waited, found) {
            (Ok(Ok(())), Some(found)) => Ok(found),
            _ => {
                let seen = self.seen.borrow();
                let status = seen.pods.get(name).and_then(|sight| sight.pod.status.clone());
                bail!(
                    "pod {name} was not {what} within {} s: {}",
                    LIMIT.as_secs(),
                    json!(status)
                )
            }
        }
    }
}

async fn follow(api: Api<Pod>, tell: watch::Sender<Seen>) {
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        let now = Instant::now();
        tell.send_modify(|seen| match event {
            Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) => seen.see(pod, now),
            Ok(watcher::Event::Delete(pod)) => drop(seen.pods.remove(&pod.name_any())),
            Ok(watcher::Event::Init) => seen.pods.clear(),
            Ok(watcher::Event::InitDone) => {}
            Err(error) => println!("# the watch of the pods was interrupted: {error}"),
        });
    }
}

impl Seen {
    fn see(&mut self, pod: Pod, now: Instant) {
        let name = pod.name_any();
        let before = self.pods.get(&name).and_then(|sight| sight.ready);
        let ready = is_ready(&pod).then(|| before.unwrap_or(now));
        self.pods.insert(name, Sight { pod, ready });
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"))
}

/// A pod of one container on a node, bound without the scheduler. Its processes
/// get a second to end.
pub(crate) fn pod(name: &str, node: &str, image: &str, command: &[&str]) -> Value {
    json!({
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_ready(status: &str) -> Pod {
        let conditions =
            json!([{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": status}]);
        serde_json::from_value(json!({"metadata": {"name": "p"}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    #[test]
    fn a_pod_is_ready_from_the_first_time_it_was_seen_so() {
        let mut seen = Seen::default();
        let start = Instant::now();
        seen.see(with_ready("False"), start);
        assert_eq!(seen.pods["p"].ready, None);
        for milliseconds in [5, 9] {
            seen.see(with_ready("True"), start + Duration::from_millis(milliseconds));
            assert_eq!(seen.pods["p"].ready, Some(start + Duration::from_millis(5)));
        }
    }

    #[test]
    fn the_same_pod_is_asked_of_each_node() {
        let (ours, stock) = (pod("p", "a", "i", &["c"]), pod("p", "b", "i", &["c"]));
        assert_eq!(ours["spec"]["containers"], stock["spec"]["containers"]);
        assert!(serde_json::from_value::<Pod>(ours).is_ok());
    }
}
