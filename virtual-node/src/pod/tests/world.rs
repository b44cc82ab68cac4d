//! The pods' supervisor and all it drives, between an API server and hosts that
//! exist only here. Everything of this program is the real thing, up to the bytes of
//! gRPC and HTTP. Time is paused: it passes only while everybody waits.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::Method;
use pool_agent_api::Epoch;
use pool_agent_api::{HostName, Resources, tenant::MeshControl};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    api_server::{ApiServer, Fate},
    host::Host,
};
use crate::{
    config,
    event::Recorder,
    placement::{Cell, Placements, Placer},
    pod::{
        Directory, Supervisor, budget::Budgets, driver::Tools, metrics::Metrics, translate::NodeFacts,
        watch_pods,
    },
    pool::{Membership, Named, Pool, Rights},
};

pub(super) const NODE: &str = "node";
/// The tenant's namespace in the cell.
const CELL: &str = "/api/v1/namespaces/tenant-demo";
/// Where the pod of most tests is.
pub(super) const WEB: &str = "/api/v1/namespaces/shop/pods/web";
/// How long something may take that should happen. It costs no time to wait.
const DEADLINE: Duration = Duration::from_secs(600);

/// What was asked of whom, in order; and that something happened at all.
#[derive(Clone)]
pub(super) struct Journal {
    entries: Arc<Mutex<Vec<String>>>,
    stirred: watch::Sender<u64>,
}

impl Journal {
    fn new() -> Self {
        Self {
            entries: Arc::default(),
            stirred: watch::Sender::new(0),
        }
    }

    pub(super) fn note(&self, entry: String) {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(entry);
        self.stir();
    }

    pub(super) fn stir(&self) {
        self.stirred.send_modify(|count| *count += 1);
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.stirred.subscribe()
    }

    fn entries(&self) -> Vec<String> {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

struct Process {
    shutdown: CancellationToken,
    supervisor: JoinHandle<()>,
    placements: watch::Receiver<Arc<Placements>>,
    directory: Directory,
}

pub(super) struct World {
    pub(super) api: ApiServer,
    pub(super) a: Host,
    pub(super) b: Host,
    /// None: the hosts are listed.
    pub(super) cell: Option<ApiServer>,
    /// How many pods the node takes, if it is bounded.
    pub(super) slots: Option<u32>,
    journal: Journal,
    process: Option<Process>,
}

impl World {
    /// Nothing runs yet.
    pub(super) fn new() -> Self {
        let journal = Journal::new();
        let api = ApiServer::new(journal.clone());
        let meta =
            |kind: &str, name: &str| json!({"kind": kind, "apiVersion": "v1", "metadata": {"name": name}});
        api.put("/api/v1/namespaces/shop", meta("Namespace", "shop"));
        let mut kubernetes = meta("Service", "kubernetes");
        kubernetes["spec"] = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 443}]});
        api.put("/api/v1/namespaces/default/services/kubernetes", kubernetes);
        Self {
            api,
            a: Host::new("host-a", journal.clone()),
            b: Host::new("host-b", journal.clone()),
            cell: None,
            slots: None,
            journal,
            process: None,
        }
    }

    /// Hosts are claimed in a cell, where nobody binds but the test. The virtual node
    /// runs.
    pub(super) async fn with_cell() -> Self {
        let mut world = Self::new();
        let cell = ApiServer::new(world.journal.clone());
        cell.put(
            &format!("{CELL}/resourcequotas/standard"),
            json!({"metadata": {"name": "standard"}, "spec": {"hard": {"pods": "10"}}}),
        );
        world.cell = Some(cell);
        world.start();
        world
            .until("placements are complete", |w| w.placements().complete)
            .await;
        world
    }

    fn cell(&self) -> &ApiServer {
        self.cell.as_ref().unwrap()
    }

    /// The names of the claims that there are.
    pub(super) fn claims(&self) -> Vec<String> {
        self.cell().names(&format!("{CELL}/pods"))
    }

    pub(super) async fn until_claims(&self, names: &[&str]) {
        self.until(&format!("the claims are {names:?}"), |w| w.claims() == names)
            .await;
    }

    /// As the scheduler and then the host's agent do.
    pub(super) fn bind(&self, claim: &str, host: &str) {
        let path = format!("{CELL}/pods/{claim}");
        let mut object = self.cell().get(&path).unwrap();
        object["spec"]["nodeName"] = json!(host);
        object["metadata"]["annotations"]["spindrift.dev/agent"] = json!("192.0.2.11:7443");
        self.cell().put(&path, object);
    }

    /// As the scheduler does when nothing fits.
    pub(super) fn pass_over(&self, claim: &str, why: &str) {
        let path = format!("{CELL}/pods/{claim}");
        let mut object = self.cell().get(&path).unwrap();
        object["status"]["conditions"] =
            json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}]);
        self.cell().put(&path, object);
    }

    /// The pod's owners, as from its creation.
    pub(super) fn own(&self, uid: &str, owners: Value) {
        let mut object = self.api.get(WEB).unwrap();
        assert_eq!(object["metadata"]["uid"], uid);
        object["metadata"]["ownerReferences"] = owners;
        self.api.put(WEB, object);
    }

    /// Gone without the node's doing.
    pub(super) fn lose_claim(&self, claim: &str) {
        self.cell().remove(&format!("{CELL}/pods/{claim}"));
    }

    /// A pod that runs on host-a, by its claim.
    pub(super) async fn running_by_claim(&self) {
        self.running_by_claim_with(json!({})).await;
    }

    /// The same, with that much more in its spec.
    pub(super) async fn running_by_claim_with(&self, extra: Value) {
        self.create("u-1", extra);
        self.until_claims(&["u-1-1"]).await;
        self.bind("u-1-1", "host-a");
        self.host_of("u-1").await.run("u-1");
        self.until_condition("Ready", "True").await;
    }

    /// The same, and it is a Deployment's, with that much surge in a rolling update.
    pub(super) async fn running_for_a_deployment(&self, surge: Value) {
        let owner = |kind: &str, name: &str, uid: &str| json!([{"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": true}]);
        let apps = "/apis/apps/v1/namespaces/shop";
        self.api.put(
            &format!("{apps}/replicasets/web-1"),
            json!({
                "metadata": {"name": "web-1", "uid": "set", "ownerReferences": owner("Deployment", "web", "dep")},
                "spec": {"selector": {}},
            }),
        );
        self.api.put(
            &format!("{apps}/deployments/web"),
            json!({
                "metadata": {"name": "web", "uid": "dep"},
                "spec": {"selector": {}, "template": {}, "strategy": {
                    "type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge},
                }},
            }),
        );
        self.running_by_claim().await;
        let mut pod = self.pod();
        pod["metadata"]["ownerReferences"] = owner("ReplicaSet", "web-1", "set");
        self.api.put(WEB, pod);
    }

    /// The virtual node runs, and both hosts are in reach.
    pub(super) async fn started() -> Self {
        let mut world = Self::new();
        world.start();
        world
            .until("placements are complete", |w| w.placements().complete)
            .await;
        world
    }

    pub(super) fn start(&mut self) {
        let client = self.api.client();
        let hosts: Vec<config::PoolHost> = ["host-a", "host-b"].map(pool_host).into();
        let channels = BTreeMap::from([
            (hosts[0].name.clone(), self.a.channel()),
            (hosts[1].name.clone(), self.b.channel()),
        ]);
        let connect = move |host: &HostName, _| channels[host].clone();
        let (names, named) = watch::channel(Named::listed(&hosts));
        if self.cell.is_some() {
            names.send_replace(Named::default());
        }
        let (pool, reports, table) = Pool::start(named, connect, membership());
        let (placer, placements) = match &self.cell {
            None => Placer::start(
                table,
                self.slots.map(|sandboxes| Resources {
                    cpu_millis: u64::MAX,
                    memory_bytes: u64::MAX,
                    ephemeral_storage_bytes: u64::MAX,
                    sandboxes,
                }),
            ),
            Some(cell) => Placer::claim_in(
                Cell {
                    client: cell.client(),
                    tenants_client: client.clone(),
                    settings: config::Claims {
                        namespace: "tenant-demo".parse().unwrap(),
                        priority_class: None,
                        zone: None,
                        class: None,
                        arch: None,
                    },
                    tenant: "demo".parse().unwrap(),
                    node_name: NODE.into(),
                    named: names,
                    quota: watch::Sender::new(None),
                },
                table,
            ),
        };
        let node = json!({"metadata": {"name": NODE, "labels": {"zone": "a"}}});
        let node = serde_json::from_value(node).unwrap();
        let tools = Arc::new(Tools {
            client: client.clone(),
            pool,
            placer,
            recorder: Recorder::start(client.clone(), NODE.into()),
            facts: watch::channel(facts()).1,
            node: watch::channel(Some(Arc::new(node))).1,
            metrics: Metrics::new(&mut Registry::default()),
            budgets: Budgets::default(),
        });
        let (directory, queries) = Directory::new();
        let shutdown = CancellationToken::new();
        let supervisor =
            Supervisor::new(tools).run(watch_pods(client, NODE), reports, queries, shutdown.clone());
        self.process = Some(Process {
            shutdown,
            supervisor: tokio::spawn(supervisor),
            placements,
            directory,
        });
    }

    /// As `kill -9`: nothing is said to anybody.
    pub(super) async fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.supervisor.abort();
            process.shutdown.cancel();
            assert!(
                process.supervisor.await.is_err(),
                "it was over before it was killed"
            );
        }
    }

    pub(super) async fn restart(&mut self) {
        self.kill().await;
        self.start();
        self.until("placements are complete", |w| w.placements().complete)
            .await;
    }

    pub(super) fn placements(&self) -> Arc<Placements> {
        self.process.as_ref().unwrap().placements.borrow().clone()
    }

    pub(super) fn watch_placements(&self) -> watch::Receiver<Arc<Placements>> {
        self.process.as_ref().unwrap().placements.clone()
    }

    pub(super) fn directory(&self) -> Directory {
        self.process.as_ref().unwrap().directory.clone()
    }

    // ---- the pod

    /// One container, on this node, with that much more in its spec.
    pub(super) fn create(&self, uid: &str, extra: Value) {
        self.create_as("web", uid, extra);
    }

    pub(super) fn create_as(&self, name: &str, uid: &str, extra: Value) {
        let mut spec = json!({
            "nodeName": NODE,
            "restartPolicy": "Always",
            "containers": [{"name": "app", "image": "app:1"}],
        });
        for (field, value) in extra.as_object().unwrap() {
            spec[field] = value.clone();
        }
        let pod = json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {"name": name, "namespace": "shop", "uid": uid, "generation": 1},
            "spec": spec,
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        });
        self.api.put(&format!("/api/v1/namespaces/shop/pods/{name}"), pod);
    }

    /// A pod with a sandbox that runs and was told to be ready.
    pub(super) async fn running(&self, extra: Value) -> &Host {
        self.create("u-1", extra);
        let host = self.host_of("u-1").await;
        host.run("u-1");
        self.until_condition("Ready", "True").await;
        host
    }

    /// Once a host has it.
    pub(super) async fn host_of(&self, uid: &str) -> &Host {
        self.until("a host has the pod", |w| w.holder(uid).is_some())
            .await;
        self.holder(uid).unwrap()
    }

    fn holder(&self, uid: &str) -> Option<&Host> {
        [&self.a, &self.b]
            .into_iter()
            .find(|host| !host.attempts(uid).is_empty())
    }

    pub(super) fn pod(&self) -> Value {
        self.api.get(WEB).unwrap_or_default()
    }

    /// Status and message, e.g. `True: attempt 1 on host-a`; empty if there is none.
    pub(super) fn condition(&self, kind: &str) -> String {
        let pod = self.pod();
        let conditions = pod["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found = conditions.iter().find(|c| c["type"] == kind);
        let text = |c: &Value, field: &str| c[field].as_str().unwrap_or_default().to_owned();
        found.map_or(String::new(), |c| {
            let (status, message) = (text(c, "status"), text(c, "message"));
            if message.is_empty() {
                status
            } else {
                format!("{status}: {message}")
            }
        })
    }

    pub(super) fn phase(&self) -> String {
        self.pod()["status"]["phase"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    // ---- what happened

    /// Calls to hosts, and requests that write pods; in order.
    pub(super) fn calls(&self) -> Vec<String> {
        let entries = self.journal.entries().into_iter();
        entries
            .filter(|e| !e.contains("/events") && !e.ends_with("/token"))
            .collect()
    }

    /// Only those to hosts.
    pub(super) fn asked(&self) -> Vec<String> {
        self.calls()
            .into_iter()
            .filter(|e| e.starts_with("host-"))
            .collect()
    }

    pub(super) fn has_called(&self, call: &str) -> bool {
        self.calls().iter().any(|c| c == call)
    }

    pub(super) fn tokens_asked(&self) -> usize {
        let entries = self.journal.entries();
        entries.iter().filter(|e| e.ends_with("/token")).count()
    }

    // ---- waiting

    pub(super) async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let mut stirred = self.journal.subscribe();
        let mut placements = self.process.as_ref().map(|p| p.placements.clone());
        let waited = tokio::time::timeout(DEADLINE, async {
            loop {
                stirred.borrow_and_update();
                if holds(self) {
                    return;
                }
                let placed = async {
                    let told = match &mut placements {
                        Some(placements) => placements.changed().await.is_ok(),
                        None => false,
                    };
                    if !told {
                        std::future::pending().await
                    }
                };
                tokio::select! {
                    changed = stirred.changed() => changed.unwrap(),
                    () = placed => {}
                }
            }
        });
        assert!(
            waited.await.is_ok(),
            "never: {what}\ncalls: {:#?}\npod: {:#}",
            self.calls(),
            self.pod()
        );
    }

    pub(super) async fn until_called(&self, call: &str) {
        self.until(call, |w| w.has_called(call)).await;
    }

    pub(super) async fn until_condition(&self, kind: &str, begins: &str) {
        let what = format!("{kind} is {begins}");
        self.until(&what, |w| w.condition(kind).starts_with(begins)).await;
    }

    /// Nothing is waited for: whatever is to happen in that time happens.
    pub(super) async fn let_pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

/// Everything that can go wrong with one write.
pub(super) const FATES: [Fate; 6] = [
    Fate::Status(500),
    Fate::Status(429),
    Fate::Status(409),
    Fate::Unanswered,
    Fate::AnswerLost,
    Fate::Overtaken,
];

pub(super) const STATUS: (Method, &str) = (Method::PATCH, "/pods/web/status");

fn pool_host(name: &str) -> config::PoolHost {
    config::PoolHost {
        name: name.parse().unwrap(),
        address: "192.0.2.11:7443".parse().unwrap(),
    }
}

fn membership() -> Membership {
    Membership {
        rights: Rights::new(Epoch::parse("epoch", 1).unwrap()),
        tenant: "demo".parse().unwrap(),
        node_name: NODE.into(),
        cluster: config::Cluster {
            domain: "cluster.local".into(),
            dns_address: "10.96.0.10".parse().unwrap(),
            upstream_nameservers: vec![],
            pod_range: "10.77.0.0/16".parse().unwrap(),
        },
        mesh: MeshControl {
            address: "192.0.2.1:15012".into(),
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            network: String::new(),
        },
    }
}

fn facts() -> NodeFacts {
    NodeFacts {
        tenant: "demo".parse().unwrap(),
        node_name: NODE.into(),
        cluster_domain: "cluster.local".into(),
        dns_address: "10.96.0.10".parse().unwrap(),
        upstream_nameservers: vec![],
        allocatable: pool_agent_api::Resources {
            cpu_millis: 8000,
            memory_bytes: 1 << 33,
            ephemeral_storage_bytes: 1 << 37,
            sandboxes: 220,
        },
    }
}
