//! Which claims are bound to this host: seen by a watch, asked by whoever wants to
//! start a sandbox, settled by a live read where the watch may not know.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    runtime::watcher::{self, Event},
};
use objects::Lenient;
use pool_agent_api::{HostName, RefusalReason, Resources, SandboxKey, SandboxSpec, TenantId};
use pool_cell::{NotAClaim, Placed, names};
use tokio::{sync::watch, time::Instant};

use super::{Cell, Clients, answered, client};
use crate::causes::described;

/// Whether a sandbox needs a claim in a cell.
#[derive(Clone, Default)]
pub enum Claims {
    /// There is no cell: what a virtual node asks for is its claim.
    #[default]
    Unneeded,
    Needed(Arc<Index>),
}

/// Why a sandbox was not found to be claimed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unclaimed {
    /// Settled: asking again gives the same answer.
    #[error("{message}")]
    Refused { reason: RefusalReason, message: String },
    /// The cell has not said; ask again.
    #[error("the cell does not say whether the sandbox is claimed: {0}")]
    Unsettled(String),
}

impl Claims {
    /// Whether the spec's sandbox has a claim here that covers it.
    pub async fn check(&self, spec: &SandboxSpec) -> Result<(), Unclaimed> {
        let Self::Needed(index) = self else {
            return Ok(());
        };
        let pod = match index.seen(&spec.tenant, &spec.key) {
            Some(pod) => Some(pod),
            // The scheduler may have bound it a moment ago.
            None => index
                .live(&spec.tenant, &spec.key)
                .await
                .map_err(Unclaimed::Unsettled)?
                .map(Arc::new),
        };
        let refused = |message| Unclaimed::Refused {
            reason: RefusalReason::NoClaim,
            message,
        };
        let Some(pod) = pod else {
            return Err(refused(format!(
                "no claim for sandbox {} of tenant {} is bound to this host",
                spec.key, spec.tenant
            )));
        };
        let placed = Placed::parse(&pod).map_err(|wrong: NotAClaim| {
            refused(format!("what is bound to this host is no claim: {wrong}"))
        })?;
        covers(&placed, &index.host, spec)
    }
}

impl Claims {
    /// Whether a tenant has any claim here that is known of. One that has, and is not
    /// known for it, is asked about again when it starts something.
    pub fn are_here(&self, tenant: &TenantId) -> bool {
        match self {
            Self::Unneeded => true,
            Self::Needed(index) => index.has(tenant),
        }
    }
}

/// Whether a claim is bound here, lives, and is for as much as the spec. Pure.
fn covers(placed: &Placed, host: &HostName, spec: &SandboxSpec) -> Result<(), Unclaimed> {
    let refused = |reason, message| Err(Unclaimed::Refused { reason, message });
    let claim = &placed.claim;
    if placed.host.as_ref() != Some(host) {
        return refused(
            RefusalReason::NoClaim,
            "the claim is bound to another host".into(),
        );
    }
    if claim.tenant != spec.tenant || claim.key != spec.key {
        return refused(RefusalReason::NoClaim, "the claim is for another sandbox".into());
    }
    if placed.deletion.is_some() || placed.phase.is_over() {
        return refused(RefusalReason::NoClaim, "the claim has ended or is ending".into());
    }
    for (field, said, claimed) in [
        ("namespace", spec.namespace.as_str(), claim.namespace.as_str()),
        ("name", spec.name.as_str(), claim.name.as_str()),
        ("node_name", spec.node_name.as_str(), claim.node_name.as_str()),
        (
            // The cell's RuntimeClasses have their handlers' names.
            "runtime_handler",
            spec.runtime_handler.as_deref().unwrap_or_default(),
            claim.runtime_class.as_deref().unwrap_or_default(),
        ),
    ] {
        if said != claimed {
            return refused(
                RefusalReason::ExceedsClaim,
                format!("{field}: {said:?} is not the claim's {claimed:?}"),
            );
        }
    }
    match over(spec.claim, placed.room()) {
        Some(message) => refused(RefusalReason::ExceedsClaim, message),
        None => Ok(()),
    }
}

/// The first amount that is more than what is claimed.
fn over(asked: Resources, claimed: Resources) -> Option<String> {
    [
        ("cpu_millis", asked.cpu_millis, claimed.cpu_millis),
        ("memory_bytes", asked.memory_bytes, claimed.memory_bytes),
        (
            "ephemeral_storage_bytes",
            asked.ephemeral_storage_bytes,
            claimed.ephemeral_storage_bytes,
        ),
    ]
    .into_iter()
    .find(|(_, asked, claimed)| asked > claimed)
    .map(|(field, asked, claimed)| format!("claim.{field}: {asked} is more than the claim's {claimed}"))
}

/// Namespace and name.
type Id = (String, String);

/// The Pods that are bound to this host, as the watch has told. One for each that the
/// cell's scheduler put here, so the host's slots bound them.
pub struct Index {
    pub(super) host: HostName,
    clients: OnceLock<Clients>,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<Id, Arc<Pod>>,
    /// A list that is under way; what it does not hold at its end is gone.
    listing: Option<BTreeMap<Id, Arc<Pod>>>,
    /// The watch has told all there is, and goes on.
    told: bool,
    /// Until when what the watch told is taken for what there is.
    heard_until: Option<Instant>,
}

impl State {
    /// What a write has answered meanwhile may be newer.
    fn put(&mut self, pod: Arc<Pod>, before: &BTreeMap<Id, Arc<Pod>>) {
        let id = id(&pod);
        let newest = match before.get(&id) {
            Some(known) if known.metadata.uid == pod.metadata.uid && !is_newer(&pod, known) => known.clone(),
            _ => pod,
        };
        self.pods.insert(id, newest);
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        match self.pods.get(&id(&pod)) {
            Some(known) if known.metadata.uid == pod.metadata.uid && !is_newer(&pod, known) => {}
            _ => {
                self.pods.insert(id(&pod), pod);
            }
        }
    }
}

fn is_newer(new: &Pod, old: &Pod) -> bool {
    let version = |pod: &Pod| pod.metadata.resource_version.clone();
    names::is_newer(version(new).as_deref(), version(old).as_deref())
}

fn id(pod: &Pod) -> Id {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

fn id_of(tenant: &TenantId, key: &SandboxKey) -> Option<Id> {
    let namespace = names::namespace_of(tenant).ok()?;
    Some((namespace.into(), names::claim_name(key)))
}

impl Index {
    pub fn new(host: HostName) -> Arc<Self> {
        Arc::new(Self {
            host,
            clients: OnceLock::new(),
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// How live reads are made. Called once.
    pub(super) fn reach(&self, clients: Clients) {
        if self.clients.set(clients).is_err() {
            tracing::error!("the index of claims was given two cells");
        }
    }

    /// The API server has answered: for so long silence of the watch means that
    /// nothing has changed.
    pub(super) fn heard(&self, holds: Duration) {
        self.state().heard_until = Some(Instant::now() + holds);
    }

    /// A claim's Pod, if the watch has told of it and is in touch with the cell.
    fn seen(&self, tenant: &TenantId, key: &SandboxKey) -> Option<Arc<Pod>> {
        let state = self.state();
        if !in_touch(&state) {
            return None;
        }
        state.pods.get(&id_of(tenant, key)?).cloned()
    }

    fn has(&self, tenant: &TenantId) -> bool {
        names::namespace_of(tenant).is_ok_and(|namespace| {
            let namespace: String = namespace.into();
            let state = self.state();
            let mut from = state.pods.range((namespace.clone(), String::new())..);
            from.next().is_some_and(|((first, _), _)| *first == namespace)
        })
    }

    /// Asks the cell itself. None: no claim for the sandbox is bound here, at some
    /// moment since the call.
    pub(super) async fn live(&self, tenant: &TenantId, key: &SandboxKey) -> Result<Option<Pod>, String> {
        let Some((namespace, name)) = id_of(tenant, key) else {
            return Ok(None);
        };
        let client: Option<Client> = self.clients.get().and_then(|c| c.borrow().clone());
        let Some(client) = client else {
            return Err("this host has not joined it yet".into());
        };
        // A list, since a node that gets what is not bound to it learns nothing: that is
        // refused like what does not exist. Without a version it is read from the store.
        let fields = format!("spec.nodeName={},metadata.name={name}", self.host);
        let api: Api<Lenient<Pod>> = Api::namespaced(client, &namespace);
        let listed = answered(api.list(&ListParams::default().fields(&fields))).await;
        match listed {
            Ok(list) => match list.items.into_iter().next() {
                Some(Lenient::Read(pod)) => Ok(Some(*pod)),
                // It is there: nothing ends for it.
                Some(Lenient::Broken { problem, .. }) => Err(problem),
                None => Ok(None),
            },
            Err(error) => Err(described(&error)),
        }
    }

    /// All Pods that are bound here; None while that is not known.
    pub(super) fn all(&self) -> Option<Vec<Arc<Pod>>> {
        let state = self.state();
        in_touch(&state).then(|| state.pods.values().cloned().collect())
    }

    /// What a write has answered, until the watch tells it too.
    pub(super) fn wrote(&self, pod: Pod) {
        let mut state = self.state();
        if let Some(known) = state.pods.get_mut(&id(&pod))
            && known.metadata.uid == pod.metadata.uid
            && is_newer(&pod, known)
        {
            *known = Arc::new(pod);
        }
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn take(&self, event: Event<Pod>) {
        {
            let mut state = self.state();
            match event {
                Event::Init => state.listing = Some(BTreeMap::new()),
                Event::InitApply(pod) => {
                    let listing = state.listing.get_or_insert_default();
                    listing.insert(id(&pod), Arc::new(pod));
                }
                Event::InitDone => {
                    if let Some(listing) = state.listing.take() {
                        let before = std::mem::take(&mut state.pods);
                        for pod in listing.into_values() {
                            state.put(pod, &before);
                        }
                    }
                    state.told = true;
                }
                Event::Apply(pod) => state.apply(Arc::new(pod)),
                Event::Delete(pod) => {
                    state.pods.remove(&id(&pod));
                }
            }
        }
        self.changed.send_modify(|version| *version += 1);
    }

    fn interrupted(&self) {
        self.state().told = false;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is made whole before the guard goes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_touch(state: &State) -> bool {
    state.told && state.heard_until.is_some_and(|until| Instant::now() < until)
}

/// Follows what is bound to this host, with a new identity where there is one.
pub(super) async fn watch(cell: Cell, lease: Duration) {
    let backoff = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(20))
        .with_jitter()
        .without_max_times();
    let mut delays = backoff.build();
    let mut clients = cell.clients.clone();
    loop {
        let client = client(&mut clients).await;
        let config = watcher::Config::default()
            .fields(&format!("spec.nodeName={}", cell.name))
            // One whose connection has fallen silent is taken for dead when it has not
            // ended in that time: before the Lease ends, by which others count.
            .timeout(seconds(lease / 4));
        // One that failed is made anew and begins with a list: nothing is missed.
        let mut events = objects::watch::<Pod>(Api::all(client), config).boxed();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                renewed = clients.changed() => {
                    if renewed.is_err() {
                        return;
                    }
                    break;
                }
            };
            match event {
                Some(Ok(event)) => {
                    delays = backoff.build();
                    cell.index.take(event);
                }
                Some(Err(error)) => {
                    cell.index.interrupted();
                    tracing::warn!(
                        error = described(&error),
                        "the watch of this host's claims failed"
                    );
                    tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(20))).await;
                    break;
                }
                None => break,
            }
        }
    }
}

fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests;
