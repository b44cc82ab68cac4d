//! One process, the virtual nodes of many tenants: `virtual-node serve`.
//!
//! What there is to serve are the `VirtualNode` resources of the cell ([`resource`]).
//! Several replicas share them by Leases ([`leases`], [`shares`]); each that this one
//! has gets a task of its own ([`keeper`]) with everything that is that tenant's. What
//! is shared is here: the cell's client and two watches of it, the doors ([`doors`]),
//! the metrics' server, the runtime.
//!
//! ```text
//!  VirtualNodes ─┐               ┌─▶ keeper ─▶ assembly of node 1 ─▶ tenant 1's API server, hosts
//!                ├─▶ fleet ──────┼─▶ keeper ─▶ …
//!  Leases ───────┘     │         └─▶ …
//!                      └─▶ doors ◀── the common address's ports, other replicas
//! ```
//!
//! What always holds: a virtual node is served only while this replica's own Lease is
//! renewed; no keeper waits for another; nothing here waits for a tenant.

mod conditions;
mod doors;
mod keeper;
mod kept;
mod kubeconfig;
mod leases;
mod removal;
mod resource;
mod shares;
mod slots;
mod terms;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, Client, Config as ClientConfig,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
pub use slots::Range as PortRange;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};

use self::{
    conditions::{Standing, Told},
    doors::{Doors, Route, Routes},
    keeper::{Census, Keeper},
    leases::Seen,
    resource::{Key, VirtualNode},
    shares::Hold,
};
use crate::{
    api_server::{self, answered},
    metrics, process,
};

/// How often it is decided who has what.
const ROUND: Duration = Duration::from_millis(500);
/// Virtual nodes that are taken at a time.
const TAKING: usize = 16;
/// After a keeper broke.
const BROKEN: Duration = Duration::from_secs(10);
/// For the last words to the cell.
const LAST: Duration = Duration::from_secs(5);
const SWEEP: Duration = Duration::from_secs(60);

/// What the process is told.
#[derive(Debug)]
pub struct Settings {
    /// None: as a pod in the cell.
    pub cell_kubeconfig: Option<PathBuf>,
    /// Unlike any other replica's, and any earlier process's.
    pub replica: String,
    /// The process's own in the cell.
    pub namespace: String,
    /// The pool's.
    pub trust_domain: String,
    /// Of the virtual nodes' ports; any of this replica's.
    pub listen: IpAddr,
    /// Other replicas listen at the same address, on the same machine.
    pub shared: bool,
    /// By which hosts and API servers reach the ports, at whichever replica.
    pub address: IpAddr,
    pub ports: PortRange,
    /// Where other replicas hand on connections.
    pub peer: SocketAddr,
    pub metrics_listen: SocketAddr,
}

/// Serves until `shutdown`.
pub async fn run(settings: Settings, shutdown: CancellationToken) -> anyhow::Result<()> {
    let cell = match &settings.cell_kubeconfig {
        Some(path) => process::client_of(path).await?,
        None => api_server::client(
            ClientConfig::incluster()
                .context("no --cell-kubeconfig is given, and this is no pod of a cell")?,
        )?,
    };
    let peers = TcpListener::bind(settings.peer)
        .await
        .with_context(|| format!("cannot listen on {} for other replicas", settings.peer))?;
    let mut registry = Registry::default();
    let shown = Shown::new(&mut registry);
    let own = Arc::new(registry);
    let (registries, nodes) = watch::channel(Vec::<watch::Receiver<Option<Arc<Registry>>>>::new());
    let all = move || {
        let nodes = nodes.borrow();
        let nodes = nodes.iter().filter_map(|node| node.borrow().clone());
        std::iter::once(own.clone()).chain(nodes).collect()
    };
    let metrics = metrics::serve_many(settings.metrics_listen, all, shutdown.clone()).await?;
    let (routes, routes_told) = watch::channel(Routes::new());
    tokio::spawn(doors::serve_peers(peers, routes_told));

    let settings = Arc::new(settings);
    let (until, may_work) = watch::channel(None);
    let renewing = CancellationToken::new();
    let renewal = leases::Own::new(
        cell.clone(),
        &settings.namespace,
        &settings.replica,
        settings.peer,
    );
    let renewal = tokio::spawn(renewal.renew(until, renewing.clone()));
    info!(replica = settings.replica, "virtual nodes are served");

    let fleet = Fleet {
        doors: Doors::new(settings.listen, settings.shared),
        settings: settings.clone(),
        cell: cell.clone(),
        objects: BTreeMap::new(),
        listing: None,
        seen: Seen::default(),
        known: [false; 2],
        may_work,
        keepers: JoinSet::new(),
        of_task: HashMap::new(),
        calls: FuturesUnordered::new(),
        census: watch::Sender::default(),
        routes,
        registries,
        shown,
        swept: Instant::now(),
    };
    fleet.run(&shutdown).await;
    info!("stopping; pods go on running, and another replica goes on with them");
    renewing.cancel();
    renewal.await.context("the lease's renewal broke")?;
    // Nobody does this replica's work any more; without its Lease all know.
    let last = leases::Own::remove(cell, &settings.namespace, &settings.replica);
    if tokio::time::timeout(LAST, last).await.is_err() {
        warn!("the cell did not answer; what this replica had is taken when its lease ends");
    }
    metrics.await.context("the metrics server broke")
}

struct Shown {
    known: Gauge,
    held: Gauge,
    replicas: Gauge,
}

impl Shown {
    fn new(registry: &mut Registry) -> Self {
        let shown = Self {
            known: Gauge::default(),
            held: Gauge::default(),
            replicas: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("virtual_node_fleet");
        registry.register("known", "Virtual nodes that there are", shown.known.clone());
        registry.register("held", "Virtual nodes that this replica has", shown.held.clone());
        registry.register("replicas", "Replicas that live", shown.replicas.clone());
        shown
    }
}

/// One virtual node, as this replica sees it.
struct Object {
    latest: Arc<VirtualNode>,
    told: watch::Sender<Option<Arc<VirtualNode>>>,
    route: watch::Sender<Route>,
    registry: watch::Sender<Option<Arc<Registry>>>,
    keeper: Option<AbortHandle>,
    taking: bool,
    /// Since when nobody has been seen to have it.
    free: Option<Instant>,
    /// It is not taken before, after its keeper broke.
    rests: Option<Instant>,
    epoch: i64,
}

impl Object {
    fn new(latest: Arc<VirtualNode>) -> Self {
        Self {
            told: watch::Sender::new(Some(latest.clone())),
            latest,
            route: watch::Sender::new(Route::Nobody),
            registry: watch::Sender::new(None),
            keeper: None,
            taking: false,
            free: None,
            rests: None,
            epoch: 0,
        }
    }
}

enum Done {
    Taken(Key, Result<Option<i64>, kube::Error>),
    Given(Key, Result<(), kube::Error>),
    Told,
}

struct Fleet {
    settings: Arc<Settings>,
    cell: Client,
    objects: BTreeMap<Key, Object>,
    listing: Option<BTreeSet<Key>>,
    seen: Seen,
    /// Whether virtual nodes and Leases have been listed.
    known: [bool; 2],
    /// Until when this replica may work.
    may_work: watch::Receiver<Option<Instant>>,
    keepers: JoinSet<()>,
    of_task: HashMap<Id, Key>,
    calls: FuturesUnordered<BoxFuture<'static, Done>>,
    census: watch::Sender<Arc<Census>>,
    doors: Doors,
    routes: watch::Sender<Routes>,
    registries: watch::Sender<Vec<watch::Receiver<Option<Arc<Registry>>>>>,
    shown: Shown,
    swept: Instant,
}

impl Fleet {
    async fn run(mut self, shutdown: &CancellationToken) {
        let all = Api::all(self.cell.clone());
        let mut nodes = objects::watch::<VirtualNode>(all, watcher::Config::default())
            .default_backoff()
            .boxed();
        let ours = format!(
            "{} in ({}, {})",
            leases::KIND,
            leases::OF_REPLICA,
            leases::OF_NODE
        );
        let all = Api::all(self.cell.clone());
        let mut leases = objects::watch::<Lease>(all, watcher::Config::default().labels(&ours))
            .default_backoff()
            .boxed();
        let mut round = tokio::time::interval(ROUND);
        round.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(event) = nodes.next() => match event {
                    Ok(event) => self.watched(event),
                    Err(error) => warn!(error = &error as &dyn std::error::Error, "the watch of virtual nodes failed"),
                },
                Some(event) = leases.next() => match event {
                    Ok(event) => self.leases_watched(event),
                    Err(error) => warn!(error = &error as &dyn std::error::Error, "the watch of leases failed"),
                },
                Some(done) = self.calls.next(), if !self.calls.is_empty() => self.called(done),
                Some(ended) = self.keepers.join_next_with_id(), if !self.keepers.is_empty() => {
                    self.ended(ended.map(|(id, ())| id));
                }
                _ = round.tick() => self.round(),
            }
        }
        // Aborted, and over when this returns.
        self.keepers.shutdown().await;
    }

    fn watched(&mut self, event: watcher::Event<VirtualNode>) {
        match event {
            watcher::Event::Init => self.listing = Some(BTreeSet::new()),
            watcher::Event::InitApply(node) => {
                if let (Some(listing), Some(key)) = (&mut self.listing, node.key()) {
                    listing.insert(key);
                }
                self.applied(node);
            }
            watcher::Event::InitDone => {
                self.known[0] = true;
                let listed = self.listing.take().unwrap_or_default();
                let gone: Vec<Key> = self
                    .objects
                    .keys()
                    .filter(|key| !listed.contains(*key))
                    .cloned()
                    .collect();
                gone.iter().for_each(|key| self.deleted(key));
            }
            watcher::Event::Apply(node) => self.applied(node),
            watcher::Event::Delete(node) => {
                if let Some(key) = node.key() {
                    self.deleted(&key);
                }
            }
        }
    }

    fn applied(&mut self, node: VirtualNode) {
        let Some(key) = node.key() else { return };
        let node = Arc::new(node);
        match self.objects.get_mut(&key) {
            // Another of the same name: nothing of the old one goes on.
            Some(object) if object.latest.uid() != node.uid() => {
                self.deleted(&key);
                self.objects.insert(key, Object::new(node));
            }
            Some(object) => {
                object.latest = node.clone();
                object.told.send_replace(Some(node));
            }
            None => drop(self.objects.insert(key, Object::new(node))),
        }
    }

    fn deleted(&mut self, key: &Key) {
        if let Some(object) = self.objects.remove(key)
            && let Some(keeper) = object.keeper
        {
            keeper.abort();
        }
    }

    fn leases_watched(&mut self, event: watcher::Event<Lease>) {
        let now = Instant::now();
        match event {
            watcher::Event::Init => self.seen.begin_listing(),
            watcher::Event::InitApply(lease) | watcher::Event::Apply(lease) => self.seen.saw(&lease, now),
            watcher::Event::InitDone => {
                self.known[1] = true;
                self.seen.end_listing();
            }
            watcher::Event::Delete(lease) => self.seen.gone(&lease),
        }
    }

    /// Who has what, and what of it changes.
    fn round(&mut self) {
        let now = Instant::now();
        let works = self.may_work.borrow().is_some_and(|until| now < until);
        if !works {
            for (key, object) in &mut self.objects {
                if let Some(keeper) = object.keeper.take() {
                    warn!(%key, "this replica's lease has not been renewed: the virtual node is let go");
                    keeper.abort();
                    object.registry.send_replace(None);
                }
            }
        }
        self.tell_routes(now);
        if !works || self.known != [true; 2] {
            return;
        }
        let me = self.settings.replica.as_str();
        let mut holds = BTreeMap::new();
        for (key, object) in &mut self.objects {
            let holder = self.seen.tenure(key).and_then(|tenure| tenure.holder.as_deref());
            let hold = if object.keeper.is_some() || object.taking {
                Hold::Mine
            } else if holder.is_some_and(|holder| holder != me && self.seen.lives(holder, now)) {
                Hold::Others
            } else {
                let since = *object.free.get_or_insert(now);
                Hold::Free(now.duration_since(since))
            };
            if !matches!(hold, Hold::Free(_)) {
                object.free = None;
            }
            // One that is let go already is only waiting for others.
            let over = object.latest.is_going() && !object.latest.is_held();
            if !over && object.rests.is_none_or(|until| until <= now) {
                holds.insert(key.clone(), hold);
            }
        }
        let replicas = self.seen.others(me, now) + 1;
        let held = holds.values().filter(|hold| **hold == Hold::Mine).count();
        self.shown.known.set(self.objects.len() as i64);
        self.shown.held.set(held as i64);
        self.shown.replicas.set(replicas as i64);
        let decision = shares::decide(&holds, replicas, me);
        let taking = self.objects.values().filter(|object| object.taking).count();
        for key in decision.take.into_iter().take(TAKING.saturating_sub(taking)) {
            self.take(key);
        }
        if let Some(key) = decision.give {
            self.give(key);
        }
        if self.swept.elapsed() >= SWEEP {
            self.swept = now;
            let dead = self.seen.long_dead(now);
            let (cell, namespace) = (self.cell.clone(), self.settings.namespace.clone());
            let sweep = async move {
                leases::sweep(cell, &namespace, dead).await;
                Done::Told
            };
            self.calls.push(sweep.boxed());
        }
    }

    fn take(&mut self, key: Key) {
        let Some(object) = self.objects.get_mut(&key) else {
            return;
        };
        object.taking = true;
        let case = self.seen.case(&key);
        let (cell, node) = (self.cell.clone(), object.latest.clone());
        let (namespace, me) = (self.settings.namespace.clone(), self.settings.replica.clone());
        let take = async move {
            let taken = leases::take(cell, namespace, &node, key.clone(), me, case).await;
            Done::Taken(key, taken)
        };
        self.calls.push(take.boxed());
    }

    fn give(&mut self, key: Key) {
        let Some(object) = self.objects.get_mut(&key) else {
            return;
        };
        let Some(keeper) = object.keeper.take() else {
            return;
        };
        info!(%key, "the virtual node is given to another replica");
        keeper.abort();
        object.registry.send_replace(None);
        // Until the Lease says so it is not to be taken again.
        object.taking = true;
        let (cell, me) = (self.cell.clone(), self.settings.replica.clone());
        let give = async move {
            // Not before the keeper has ended.
            while !keeper.is_finished() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let given = leases::give(cell, key.clone(), me).await;
            Done::Given(key, given)
        };
        self.calls.push(give.boxed());
    }

    fn called(&mut self, done: Done) {
        match done {
            Done::Taken(key, taken) => {
                let now = Instant::now();
                let works = self.may_work.borrow().is_some_and(|until| now < until);
                let Some(object) = self.objects.get_mut(&key) else {
                    return;
                };
                object.taking = false;
                match taken {
                    Ok(Some(epoch)) if works => self.keep(key, epoch),
                    // Taken too late: it is taken again, or by another.
                    Ok(_) => {}
                    Err(error) => {
                        warn!(%key, error = &error as &dyn std::error::Error, "cannot take a virtual node");
                        object.rests = Some(now + BROKEN);
                    }
                }
            }
            Done::Given(key, given) => {
                if let Some(object) = self.objects.get_mut(&key) {
                    object.taking = false;
                    // For the others to take it first.
                    object.rests = Some(Instant::now() + BROKEN);
                }
                if let Err(error) = given {
                    warn!(%key, error = &error as &dyn std::error::Error, "cannot give a virtual node to another replica");
                }
            }
            Done::Told => {}
        }
    }

    fn keep(&mut self, key: Key, epoch: i64) {
        let Some(object) = self.objects.get_mut(&key) else {
            return;
        };
        object.epoch = epoch;
        object.free = None;
        let keeper = Keeper {
            settings: self.settings.clone(),
            cell: self.cell.clone(),
            key: key.clone(),
            object: object.told.subscribe(),
            epoch,
            route: object.route.clone(),
            census: self.census.subscribe(),
            registry: object.registry.clone(),
        };
        info!(%key, epoch, "the virtual node is this replica's");
        let span = info_span!("virtual_node", %key, epoch);
        let task = self.keepers.spawn(keeper.run().instrument(span));
        self.of_task.insert(task.id(), key);
        object.keeper = Some(task);
    }

    fn ended(&mut self, ended: Result<Id, JoinError>) {
        let (id, panic) = match ended {
            Ok(id) => (id, None),
            Err(error) => (error.id(), error.is_panic().then(|| error.to_string())),
        };
        let Some(key) = self.of_task.remove(&id) else {
            return;
        };
        let Some(object) = self.objects.get_mut(&key) else {
            return;
        };
        // Another may be there already.
        if object.keeper.as_ref().is_none_or(|keeper| keeper.id() != id) {
            return;
        }
        object.keeper = None;
        object.registry.send_replace(None);
        object.rests = Some(Instant::now() + BROKEN);
        let Some(panic) = panic else { return };
        warn!(%key, panic, "a virtual node broke; it is started again");
        let told = Told {
            holder: self.settings.replica.clone(),
            epoch: object.epoch,
            accepted: Ok(()),
            standing: Standing::not("Broken", panic),
            ports: None,
            node_uid: None,
        };
        let Some(patch) = conditions::patch(&object.latest, &told, Timestamp::now()) else {
            return;
        };
        let api = Api::<VirtualNode>::namespaced(self.cell.clone(), &key.namespace);
        let tell = async move {
            let patch = Patch::Merge(patch);
            if let Err(error) = answered(api.patch_status(&key.name, &PatchParams::default(), &patch)).await {
                warn!(%key, %error, "the status of a virtual node was not written");
            }
            Done::Told
        };
        self.calls.push(tell.boxed());
    }

    /// Where connections go, which ports are whose, what is counted.
    fn tell_routes(&mut self, now: Instant) {
        let mut census = Census::default();
        let mut oldest: BTreeMap<&str, (Option<Timestamp>, &str)> = BTreeMap::new();
        for (key, object) in &self.objects {
            let holder = self.seen.tenure(key).and_then(|tenure| tenure.holder.as_deref());
            if object.keeper.is_none() {
                let peer = holder
                    .filter(|holder| *holder != self.settings.replica && self.seen.lives(holder, now))
                    .and_then(|holder| self.seen.peer(holder));
                object.route.send_if_modified(|route| {
                    let new = match (&route, peer) {
                        (Route::There(old), Some(new)) if *old == new => return false,
                        (Route::Nobody, None) => return false,
                        (_, Some(new)) => Route::There(new),
                        (_, None) => Route::Nobody,
                    };
                    *route = new;
                    true
                });
            }
            if let Some(ports) = object.latest.ports() {
                census.ports.insert(ports.kubelet);
            }
            let made = object.latest.metadata.creation_timestamp.as_ref().map(|t| t.0);
            let this = (made, key.name.as_str());
            oldest
                .entry(&key.namespace)
                .and_modify(|first| *first = this.min(*first))
                .or_insert(this);
        }
        census.first = oldest
            .into_iter()
            .map(|(namespace, (_, name))| (namespace.to_owned(), name.to_owned()))
            .collect();
        self.census.send_if_modified(|known| {
            let changed = **known != census;
            if changed {
                *known = Arc::new(census);
            }
            changed
        });
        let same = {
            let known = self.routes.borrow();
            known.len() == self.objects.len()
                && self.objects.iter().all(|(key, object)| {
                    let of = known.get(key);
                    of.is_some_and(|(ports, route)| {
                        *ports == object.latest.ports() && route.same_channel(&object.route.subscribe())
                    })
                })
        };
        if !same {
            let routes: Routes = self
                .objects
                .iter()
                .map(|(key, object)| (key.clone(), (object.latest.ports(), object.route.subscribe())))
                .collect();
            self.registries.send_replace(
                self.objects
                    .values()
                    .map(|object| object.registry.subscribe())
                    .collect(),
            );
            self.routes.send_replace(routes);
        }
        // Each round: a port that was not free may be now.
        self.doors.follow(&self.routes.borrow());
    }
}
