//! What `up --elastic` shows: a burst of pods brings hosts, fewer pods need fewer of
//! them, and the last pod's end leaves none. A table tells of it while it happens.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{Node, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{
    cell::Cell,
    cluster::{ClusterError, DEMO},
    lab::Lab,
    progress::Progress,
};

const MANIFEST: &str = include_str!("../manifests/burst.yaml");
const NAME: &str = "burst";
const PODS: usize = 40;
/// What is left of the burst: they fit on fewer hosts than it took.
const LEFT: usize = 8;
const LOOK: Duration = Duration::from_millis(250);
/// Hosts come in seconds; Karpenter takes its time to be sure that one may go.
const PATIENCE: Duration = Duration::from_secs(420);

#[derive(Debug, thiserror::Error)]
pub enum BurstError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("the API server did not answer")]
    Api(#[from] kube::Error),
    #[error("the lab has no cell")]
    NoCell,
    #[error("{what} did not happen within {} s; last seen: {seen}", PATIENCE.as_secs())]
    TimedOut { what: &'static str, seen: String },
}

/// What stands at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    hosts: usize,
    hosts_ready: usize,
    claims_waiting: usize,
    claims_bound: usize,
    pods: usize,
    pods_ready: usize,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>5}/{:<5}  {:>7} {:>6}   {:>5}/{}",
            self.hosts_ready, self.hosts, self.claims_waiting, self.claims_bound, self.pods_ready, self.pods
        )
    }
}

/// Seconds from a pod's creation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// Until its host was a Ready Node; 0 if it was one before.
    pub host: f64,
    pub ready: f64,
}

#[derive(Clone, Debug)]
pub struct Shown {
    pub first: Start,
    pub last: Start,
    pub hosts: usize,
    /// Hosts after consolidation, and seconds from the fall of the load until then.
    pub consolidated: (usize, f64),
    /// Seconds from the last pod's deletion to no host.
    pub to_zero: f64,
}

/// Shows it. Everything is gone after.
pub async fn run(lab: &Lab, progress: &Progress) -> Result<Shown, BurstError> {
    let stage = Stage::new(lab)?;
    progress.say(&format!(
        "\n  seconds   hosts        claims             pods\n            ready/there  waiting bound      ready/of {}\n",
        lab.layout().node_name()
    ));
    let mut table = Table::new(progress);
    let values = [("NODE", lab.layout().node_name()), ("REPLICAS", PODS.to_string())];
    let values = values.each_ref().map(|(key, value)| (*key, value.as_str()));
    lab.cluster().apply("burst.yaml", MANIFEST, &values).await?;

    let mut hosts_up = BTreeMap::<String, Instant>::new();
    let mut created = BTreeMap::<String, Instant>::new();
    let mut starts = BTreeMap::<String, Start>::new();
    let burst = stage
        .until(&mut table, "forty Ready pods", |look| {
            let now = Instant::now();
            for node in look.nodes.iter().filter(|node| is_ready_node(node)) {
                hosts_up.entry(node.name_any()).or_insert(now);
            }
            for pod in &look.pods {
                let since = *created.entry(pod.name_any()).or_insert(now);
                if is_ready(pod) && !starts.contains_key(&pod.name_any()) {
                    let claim = look.claims.iter().find(|claim| stands_for(claim, pod));
                    let host = claim.and_then(|claim| claim.spec.as_ref()?.node_name.clone());
                    let up = host.and_then(|host| hosts_up.get(&host).copied()).unwrap_or(now);
                    let start = Start {
                        host: up.saturating_duration_since(since).as_secs_f64(),
                        ready: (now - since).as_secs_f64(),
                    };
                    starts.insert(pod.name_any(), start);
                }
            }
            starts.len() >= PODS && look.seen.pods_ready == PODS
        })
        .await?;
    let mut order: Vec<Start> = starts.into_values().collect();
    order.sort_by(|a, b| a.ready.total_cmp(&b.ready));
    let (first, last) = (order[0], order[order.len() - 1]);

    table.say(&format!("scaled to {LEFT}"));
    let since = Instant::now();
    stage.scale(LEFT).await?;
    let fewer = stage
        .until(&mut table, "fewer hosts", |look| {
            let seen = &look.seen;
            (seen.pods, seen.pods_ready) == (LEFT, LEFT)
                && seen.hosts == seen.hosts_ready
                && seen.hosts * 2 <= burst.hosts
        })
        .await?;
    let consolidated = (fewer.hosts, since.elapsed().as_secs_f64());

    table.say("scaled to 0");
    let since = Instant::now();
    stage.scale(0).await?;
    stage
        .until(&mut table, "a pool without hosts", |look| {
            look.seen.hosts == 0 && look.seen.pods == 0
        })
        .await?;
    let to_zero = since.elapsed().as_secs_f64();
    lab.cluster().delete_namespace(DEMO, PATIENCE).await?;
    Ok(Shown {
        first,
        last,
        hosts: burst.hosts,
        consolidated,
        to_zero,
    })
}

struct Stage {
    nodes: Api<Node>,
    claims: Api<Pod>,
    pods: Api<Pod>,
    deployments: Api<Deployment>,
}

struct Look {
    nodes: Vec<Node>,
    claims: Vec<Pod>,
    pods: Vec<Pod>,
    seen: Seen,
}

impl Stage {
    fn new(lab: &Lab) -> Result<Self, BurstError> {
        let cell = lab.cell().ok_or(BurstError::NoCell)?.cluster().client();
        let tenant = Cell::namespace(lab.layout().instance().as_str());
        Ok(Self {
            nodes: Api::all(cell.clone()),
            claims: Api::namespaced(cell, &tenant),
            pods: Api::namespaced(lab.client(), DEMO),
            deployments: Api::namespaced(lab.client(), DEMO),
        })
    }

    async fn look(&self) -> Result<Look, BurstError> {
        let all = ListParams::default();
        let (nodes, claims, pods) = tokio::try_join!(
            self.nodes.list(&all),
            self.claims.list(&all),
            self.pods.list(&all)
        )?;
        let (nodes, claims, pods) = (nodes.items, claims.items, pods.items);
        let bound = claims.iter().filter(|claim| is_bound(claim)).count();
        let seen = Seen {
            hosts: nodes.len(),
            hosts_ready: nodes.iter().filter(|node| is_ready_node(node)).count(),
            claims_waiting: claims.len() - bound,
            claims_bound: bound,
            pods: pods.len(),
            pods_ready: pods.iter().filter(|pod| is_ready(pod)).count(),
        };
        Ok(Look {
            nodes,
            claims,
            pods,
            seen,
        })
    }

    async fn until(
        &self,
        table: &mut Table<'_>,
        what: &'static str,
        mut met: impl FnMut(&Look) -> bool,
    ) -> Result<Seen, BurstError> {
        let since = Instant::now();
        loop {
            let look = self.look().await?;
            table.tell(&look.seen);
            if met(&look) {
                return Ok(look.seen);
            }
            if since.elapsed() > PATIENCE {
                return Err(BurstError::TimedOut {
                    what,
                    seen: look.seen.to_string(),
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn scale(&self, pods: usize) -> Result<(), BurstError> {
        let patch = Patch::Merge(json!({"spec": {"replicas": pods}}));
        self.deployments
            .patch(NAME, &PatchParams::default(), &patch)
            .await?;
        Ok(())
    }
}

/// A line whenever something has changed, at most one in half a second.
struct Table<'a> {
    progress: &'a Progress,
    since: Instant,
    last: Option<(Seen, Instant)>,
}

impl<'a> Table<'a> {
    fn new(progress: &'a Progress) -> Self {
        Self {
            progress,
            since: Instant::now(),
            last: None,
        }
    }

    fn tell(&mut self, seen: &Seen) {
        const AT_LEAST: Duration = Duration::from_millis(500);
        let told = self
            .last
            .as_ref()
            .is_some_and(|(last, at)| last == seen || at.elapsed() < AT_LEAST);
        if !told {
            let line = format!("{:>9.1}   {seen}", self.since.elapsed().as_secs_f64());
            self.progress.say(&line);
            self.last = Some((seen.clone(), Instant::now()));
        }
    }

    fn say(&self, what: &str) {
        let line = format!("{:>9.1}   {what}", self.since.elapsed().as_secs_f64());
        self.progress.say(&line);
    }
}

fn condition(conditions: Option<Vec<(String, String)>>, wanted: &str) -> bool {
    conditions
        .unwrap_or_default()
        .iter()
        .any(|(kind, status)| kind == wanted && status == "True")
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let told = conditions.map(|all| all.iter().map(|c| (c.type_.clone(), c.status.clone())).collect());
    pod.metadata.deletion_timestamp.is_none() && condition(told, "Ready")
}

fn is_ready_node(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let told = conditions.map(|all| all.iter().map(|c| (c.type_.clone(), c.status.clone())).collect());
    let going: &Option<Time> = &node.metadata.deletion_timestamp;
    going.is_none() && condition(told, "Ready")
}

fn is_bound(claim: &Pod) -> bool {
    claim.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
}

fn stands_for(claim: &Pod, pod: &Pod) -> bool {
    claim.labels().get("spindrift.dev/pod-uid") == pod.metadata.uid.as_ref()
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |what: &str, start: Start| {
            format!(
                "  {what:<10} created → host up {:5.1} s → Ready {:5.1} s\n",
                start.host, start.ready
            )
        };
        write!(
            f,
            "From no host to {} and back to none:\n{}{}  {LEFT} pods left: {} host{} after {:.0} s\n  no pod left: no host after {:.0} s",
            self.hosts,
            line("first pod", self.first),
            line("40th pod", self.last),
            self.consolidated.0,
            if self.consolidated.0 == 1 { "" } else { "s" },
            self.consolidated.1,
            self.to_zero
        )
    }
}
