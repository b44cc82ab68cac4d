//! This host with all its tenants and sandboxes: what the service asks of it,
//! and the one place where admission, ledger and drivers meet.
//!
//! ```text
//!  start ─▶ admission (pure) ─▶ spec file, ledger (fsync) ─▶ driver ─▶ … ─▶ ledger: ended
//! ```
//!
//! What always holds:
//! - a sandbox is accepted towards its virtual node only when its record is on disk;
//! - every record has a driver, also after a restart ([`adopt`]); what no record
//!   names is removed, if it is ours;
//! - a newer attempt's driver begins when the older attempt's has ended.

mod abilities;
mod adopt;
mod pressure;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use mesh_runtime::{
    off_limits::Refused,
    redirect::Deadline,
    runtime::{CloseTenantError, OpenTenantError},
};
use pool_agent_api::{
    Refusal, RefusalReason, Resources, SandboxKey, SandboxSpec, Tenant, TenantId,
    spec::{MeshMode, Volume},
    status::{MeshState, Notice},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tracing::Instrument;

use abilities::HostAbilities;

use crate::{
    admission::{Admission, Answer, TenantRefusal, slim},
    allowance::Allowance,
    board::Board,
    causes::described,
    cell::{Claims, Standing, Unclaimed},
    cri::{
        config::Qos,
        events::{Believers, Sign},
    },
    ledger::{Entry, Ledger, LedgerError, Record},
    network::{Network, NetworkError, Router},
    policy::privilege::{Privilege, Users},
    right::{NoRight, Node},
    sandbox::{
        Lifecycle,
        clock::after,
        driver::{self, Command, INBOX, Outlet, Progress, UPDATES, Update, UpdateError, addressing},
        event::{ContainerId, Event, SandboxId},
        eviction::{self, Disk},
        perform::{Hands, Workshop},
    },
    spec_file::{self, SpecFileError},
    user_ids::{IdRange, IdRanges},
};

#[derive(Debug, thiserror::Error)]
pub enum TenantError {
    #[error(transparent)]
    Refused(#[from] TenantRefusal),
    #[error("pods of the tenant are here, and {0}")]
    InUse(&'static str),
    #[error("upstream_nameservers[{index}]: {server}:53: {refused}; this host's operator can allow it")]
    NameServer {
        index: usize,
        server: IpAddr,
        refused: Refused,
    },
    #[error("making the tenant's router")]
    Network(#[from] NetworkError),
    #[error("opening the tenant's mesh")]
    Open(#[from] OpenTenantError),
    #[error("closing the tenant's mesh")]
    Close(#[from] CloseTenantError),
    #[error("recording the tenant")]
    Ledger(#[from] LedgerError),
    #[error("{WAITING} tenants without a claim are known to this host: try again later")]
    TooMany,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("keeping the spec")]
    Spec(#[from] SpecFileError),
    #[error("recording the sandbox")]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Unclaimed(Unclaimed),
    #[error("opening the sandbox's tenant")]
    Tenant(#[from] TenantError),
    #[error(transparent)]
    NoRight(#[from] NoRight),
    #[error("the request that admitted the sandbox failed")]
    OtherFailed,
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("sandbox {0} is not on this host")]
    Unknown(SandboxKey),
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

/// What a sandbox has to satisfy beside there being room for it.
pub struct Terms {
    pub privilege: Privilege,
    pub claims: Claims,
}

struct Inner {
    shop: Arc<Workshop>,
    board: Board,
    ledger: Ledger,
    network: Network,
    abilities: HostAbilities,
    privilege: Privilege,
    claims: Claims,
    state: Mutex<State>,
    /// One for each tenant that asked. Held while it is configured, so that this happens
    /// once at a time and nobody else waits for it.
    configuring: Mutex<HashMap<TenantId, Turn>>,
}

/// When a tenant's settings were last made anew.
type Turn = Arc<tokio::sync::Mutex<Option<Instant>>>;

/// Tenants whose settings are kept without a claim: each is some KiB at most.
const WAITING: usize = 1024;

/// Between two changes of a tenant's settings: each makes a router, a mesh and a record
/// on disk anew. Whoever is sooner waits.
const BETWEEN_CHANGES: Duration = Duration::from_secs(2);

struct State {
    admission: Admission,
    user_ids: IdRanges,
    tenants: HashMap<TenantId, OpenTenant>,
    /// Settings of tenants that have no claim here yet.
    waiting: HashMap<TenantId, Tenant>,
    residents: HashMap<SandboxKey, Resident>,
}

#[derive(Clone)]
struct OpenTenant {
    settings: Tenant,
    router: Router,
}

impl OpenTenant {
    /// SPIFFE id; None for a pod outside the mesh.
    fn identity_of(&self, spec: &SandboxSpec) -> Option<String> {
        match spec.mesh {
            MeshMode::Enrolled => Some(format!(
                "spiffe://{}/ns/{}/sa/{}",
                self.settings.mesh_control.trust_domain, spec.namespace, spec.service_account
            )),
            MeshMode::Unmeshed => None,
        }
    }
}

/// A sandbox with its driver.
#[derive(Clone)]
struct Resident {
    tenant: TenantId,
    /// Whose grants count for it.
    node: Node,
    /// Its right to run is over, for good.
    fenced: bool,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    /// Its admission is on disk (true), or could not be put there (false).
    durable: Durable,
    /// What it takes of the disk, as of its last measuring.
    disk: watch::Receiver<Disk>,
    /// Nothing is left of it, and the ledger says so.
    ended: watch::Receiver<bool>,
    stops: Stops,
    /// Places of [`Update`]s.
    updates: Arc<Semaphore>,
}

/// The stops of a sandbox that are on disk: by when it was to have stopped, at the
/// earliest, and how many there are. Pure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Stops {
    by: Option<Timestamp>,
    recorded: u32,
}

/// Stops that are recorded however little they hasten it.
const STOPS_RECORDED: u32 = 4;

impl Stops {
    /// Whether a stop is worth a record. Each takes of the room that is set aside for
    /// ends, so that there must be a bound to how many there can be: each after the
    /// first few leaves half of the time at most.
    fn record(self, by: Timestamp, now: Timestamp) -> Option<Self> {
        let left = |by: Timestamp| by.duration_since(now).max(SignedDuration::ZERO);
        let worth = self.by.is_none_or(|known| {
            by < known && (self.recorded < STOPS_RECORDED || left(by) <= left(known) / 2)
        });
        worth.then_some(Self {
            by: Some(by),
            recorded: self.recorded.saturating_add(1),
        })
    }
}

/// The far ends of a [`Resident`].
struct Ends {
    commands: mpsc::Receiver<Command>,
    progress: watch::Sender<Progress>,
    durable: watch::Sender<Option<bool>>,
    disk: watch::Sender<Disk>,
    ended: watch::Sender<bool>,
}

/// A sandbox that admission has just taken.
struct Newcomer {
    address: Ipv4Addr,
    user_ids: Option<IdRange>,
    older: Option<Resident>,
    ends: Ends,
    tenant: OpenTenant,
}

fn resident(node: &Node) -> (Resident, Ends) {
    let (commands, inbox) = mpsc::channel(INBOX);
    let progress = watch::Sender::new(Progress::default());
    let durable = watch::Sender::new(None);
    let disk = watch::Sender::new(Disk::default());
    let ended = watch::Sender::new(false);
    let resident = Resident {
        tenant: node.tenant.clone(),
        node: node.clone(),
        fenced: false,
        commands,
        progress: progress.subscribe(),
        durable: durable.subscribe(),
        disk: disk.subscribe(),
        ended: ended.subscribe(),
        stops: Stops::default(),
        updates: Arc::new(Semaphore::new(UPDATES)),
    };
    let ends = Ends {
        commands: inbox,
        progress,
        durable,
        disk,
        ended,
    };
    (resident, ends)
}

/// Whether what was admitted is on disk: None while it is being written.
type Durable = watch::Receiver<Option<bool>>;

impl Host {
    pub fn free(&self) -> Resources {
        self.state().admission.free()
    }

    /// All there is.
    pub fn capacity(&self) -> Resources {
        self.inner.shop.room.capacity
    }

    /// What sandboxes may claim of it.
    pub fn allocatable(&self) -> Resources {
        self.state().admission.capacity()
    }

    /// Whether pods have users of their own, unless their runtime class cannot.
    pub fn has_user_namespaces(&self) -> bool {
        self.inner.abilities.of(None).user_namespaces
    }

    pub fn board(&self) -> &Board {
        &self.inner.board
    }

    pub fn shop(&self) -> &Workshop {
        &self.inner.shop
    }

    /// No new sandboxes from now on.
    pub fn drain(&self) {
        self.state().admission.drain();
    }

    /// Whether the host takes no new sandboxes for now, by its cell's word.
    pub fn cordon(&self, cordoned: bool) {
        if self.state().admission.cordon(cordoned) {
            tracing::info!(
                cordoned,
                "the cell has said whether this host takes new sandboxes"
            );
        }
    }

    // ---- what the cell asks

    /// Every sandbox that is recorded here.
    pub fn residents(&self) -> Vec<(TenantId, SandboxKey)> {
        let state = self.state();
        let of = |(key, resident): (&SandboxKey, &Resident)| (resident.tenant.clone(), key.clone());
        state.residents.iter().map(of).collect()
    }

    pub fn standing(&self, tenant: &TenantId, key: &SandboxKey) -> Standing {
        let state = self.state();
        if state.residents.get(key).is_some_and(|r| r.tenant == *tenant) {
            Standing::Here {
                status: self.inner.board.status(tenant, key),
                grace: state.admission.grace(key),
            }
        } else if state.admission.fenced(tenant, key) {
            Standing::Ended
        } else {
            Standing::Absent
        }
    }

    /// Tells a sandbox's virtual node that it has to end.
    pub fn give_notice(&self, tenant: &TenantId, key: &SandboxKey, notice: Notice) {
        self.inner.board.give_notice(tenant, key, notice);
    }

    /// Settled claims are refused or pass; of a sandbox that is here nothing is asked again.
    async fn claimed(&self, spec: &SandboxSpec) -> Result<(), StartError> {
        if self.state().residents.contains_key(&spec.key) {
            return Ok(());
        }
        match self.inner.claims.check(spec).await {
            Ok(()) => Ok(()),
            Err(Unclaimed::Refused { reason, message }) => Err(Refusal {
                reason,
                message,
                free: self.free(),
            }
            .into()),
            Err(unsettled) => Err(StartError::Unclaimed(unsettled)),
        }
    }

    // ---- tenants

    /// Of a tenant that has no claim here only its settings are kept, until it has: an
    /// address, a router and a mesh are for those who bring pods.
    pub async fn configure_tenant(&self, tenant: Tenant) -> Result<(), TenantError> {
        self.check_name_servers(&tenant)?;
        {
            let mut state = self.state();
            let pods = state.residents.values().any(|r| r.tenant == tenant.id);
            if !pods && !self.inner.claims.are_here(&tenant.id) {
                let same = |known: &OpenTenant| known.settings == tenant;
                if state.tenants.get(&tenant.id).is_some_and(same) {
                    return Ok(());
                }
                if state.waiting.len() >= WAITING && !state.waiting.contains_key(&tenant.id) {
                    return Err(TenantError::TooMany);
                }
                tracing::debug!(tenant = %tenant.id, "a tenant without a claim waits to be opened");
                state.waiting.insert(tenant.id.clone(), tenant);
                return Ok(());
            }
        }
        self.apply_settings(tenant).await
    }

    /// Opens a tenant that was without a claim and has one now.
    async fn open_waiting(&self, tenant: &TenantId) -> Result<(), TenantError> {
        let waiting = self.state().waiting.get(tenant).cloned();
        match waiting {
            Some(settings) => self.apply_settings(settings).await,
            None => Ok(()),
        }
    }

    fn check_name_servers(&self, tenant: &Tenant) -> Result<(), TenantError> {
        for (i, server) in tenant.upstream_nameservers.iter().enumerate() {
            let limits = &self.inner.shop.off_limits;
            let pods = limits.is_pods(*server).then_some(Refused::OffLimits);
            if let Some(refused) = limits.refuse((*server, 53).into()).or(pods) {
                return Err(TenantError::NameServer {
                    index: i,
                    server: *server,
                    refused,
                });
            }
        }
        Ok(())
    }

    async fn apply_settings(&self, tenant: Tenant) -> Result<(), TenantError> {
        let same = |known: &OpenTenant| known.settings == tenant;
        if self.state().tenants.get(&tenant.id).is_some_and(same) {
            self.state().waiting.remove(&tenant.id);
            return Ok(());
        }
        let turn = {
            let mut turns = self
                .inner
                .configuring
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            turns.entry(tenant.id.clone()).or_default().clone()
        };
        let mut changed = turn.lock().await;
        if self.state().tenants.get(&tenant.id).is_some_and(same) {
            return Ok(());
        }
        if let Some(changed) = *changed {
            tokio::time::sleep_until(changed + BETWEEN_CHANGES).await;
        }
        let (known, pods) = {
            let state = self.state();
            let pods = state.residents.values().any(|r| r.tenant == tenant.id);
            (state.tenants.contains_key(&tenant.id), pods)
        };
        if known {
            if pods {
                return Err(TenantError::InUse("its settings cannot change under them"));
            }
            // Nothing runs in it: it is made anew. Until it is, there is none.
            self.inner.shop.mesh.close_tenant(&tenant.id).await?;
            self.state().tenants.remove(&tenant.id);
        }
        // Whatever comes of it.
        *changed = Some(Instant::now());
        let opened = self.open_tenant(&tenant).await?;
        self.inner
            .ledger
            .commit(vec![Record::Tenant(tenant.clone())])
            .await?;
        let router = opened.router.address();
        {
            let mut state = self.state();
            state.tenants.insert(tenant.id.clone(), opened);
            if state.waiting.get(&tenant.id) == Some(&tenant) {
                state.waiting.remove(&tenant.id);
            }
        }
        tracing::info!(tenant = %tenant.id, router = %router, "tenant configured");
        Ok(())
    }

    async fn open_tenant(&self, tenant: &Tenant) -> Result<OpenTenant, TenantError> {
        let address = self.state().admission.admit_tenant(&tenant.id)?;
        // Before anything has it, so that no later agent gives it to somebody else.
        self.inner
            .ledger
            .commit(vec![Record::Router(tenant.id.clone(), address)])
            .await?;
        self.open_router(tenant, address).await
    }

    /// With an address that is on record.
    async fn open_router(&self, tenant: &Tenant, address: Ipv4Addr) -> Result<OpenTenant, TenantError> {
        let router = self.inner.network.router(&tenant.id, address).await?;
        self.inner.shop.mesh.open_tenant(tenant, &router).await?;
        Ok(OpenTenant {
            settings: tenant.clone(),
            router,
        })
    }

    // ---- sandboxes

    /// Admits and starts a sandbox. Answers a repetition as it answered before.
    pub async fn start(&self, spec: SandboxSpec) -> Result<(), StartError> {
        let key = spec.key.clone();
        let permitted = self.check_privilege(&spec).and_then(|users| {
            let fits = self.inner.shop.files.check(&spec);
            fits.map(|()| users).map_err(|invalid| Refusal {
                reason: RefusalReason::Unsupported,
                message: invalid.within("spec").to_string(),
                free: self.free(),
            })
        });
        // What it may use is settled before anything of it is kept.
        let permitted = permitted.and_then(|users| {
            let allowed = Allowance::of(spec.claim, &spec, &self.inner.shop.room);
            allowed.map(|_| users).map_err(|invalid| Refusal {
                reason: RefusalReason::Forbidden,
                message: invalid.within("spec").to_string(),
                free: self.free(),
            })
        });
        self.claimed(&spec).await?;
        self.open_waiting(&spec.tenant).await?;
        let slimmed = Arc::new(slim(spec.clone()));
        let accepted_at = self.inner.shop.clock.now();
        let Newcomer {
            address,
            user_ids,
            older,
            ends,
            tenant,
        } = match self.admit(&slimmed, permitted)? {
            Ok(newcomer) => newcomer,
            Err(durable) => return repeated(durable).await,
        };
        let entry = Entry {
            key: key.clone(),
            tenant: slimmed.tenant.clone(),
            namespace: slimmed.namespace.clone(),
            name: slimmed.name.clone(),
            node_name: slimmed.node_name.clone(),
            claim: slimmed.claim,
            address,
            identity: tenant.identity_of(&slimmed),
            user_ids,
            accepted_at,
            boot_id: Some(self.inner.shop.boot_id.clone()),
            stop_by: None,
        };
        let opened = entry.clone();
        let dirs = self.inner.shop.layout.sandbox(&key);
        let kept = tokio::task::spawn_blocking(move || spec_file::write(&dirs, spec))
            .await
            .unwrap_or(Err(SpecFileError::BrokeOff));
        let recorded = match kept {
            Ok(()) => self
                .inner
                .ledger
                .commit(vec![Record::Admitted(entry)])
                .await
                .map_err(StartError::from),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = recorded {
            let mut state = self.state();
            state.admission.undo(&key);
            state.user_ids.give_back(&key);
            state.residents.remove(&key);
            ends.durable.send_replace(Some(false));
            return Err(match error {
                StartError::Ledger(LedgerError::NoRoom(_)) => Refusal {
                    reason: RefusalReason::NoRoom,
                    message: described(&error),
                    free: state.admission.free(),
                }
                .into(),
                error => error,
            });
        }
        ends.durable.send_replace(Some(true));
        self.inner.shop.usage.open(&opened);
        tracing::info!(
            pod.uid = %key.pod, attempt = %key.attempt, tenant = %slimmed.tenant,
            pod.namespace = %slimmed.namespace, pod.name = %slimmed.name, address = %address,
            "sandbox admitted"
        );
        let lifecycle = Lifecycle::new(slimmed.clone(), accepted_at);
        let (hands, mesh) = self.hands(&slimmed, address, user_ids, &tenant);
        self.spawn(lifecycle, &slimmed, address, &tenant, hands, mesh, ends, older);
        Ok(())
    }

    /// Before anything of a pod is kept or made: whether it may be what it asks to be.
    fn check_privilege(&self, spec: &SandboxSpec) -> Result<Users, Refusal> {
        let handler = spec.runtime_handler.as_deref();
        let refuse = |reason, message| Refusal {
            reason,
            message,
            free: self.free(),
        };
        if let Some(handler) = handler
            && !self.inner.abilities.has(handler)
        {
            return Err(refuse(
                RefusalReason::Unsupported,
                format!("this host has no runtime handler {handler:?}"),
            ));
        }
        let abilities = self.inner.abilities.of(handler);
        let checked = self.inner.privilege.check(spec, abilities);
        checked.map_err(|denied| {
            tracing::info!(
                pod.uid = %spec.key.pod, attempt = %spec.key.attempt, tenant = %spec.tenant,
                field = denied.field, "a pod asks for what it may not be"
            );
            refuse(denied.reason, denied.to_string())
        })
    }

    /// Admission's answer; a repetition (Err) waits for what comes of the first.
    fn admit(
        &self,
        spec: &Arc<SandboxSpec>,
        permitted: Result<Users, Refusal>,
    ) -> Result<Result<Newcomer, Option<Durable>>, StartError> {
        let mut guard = self.state();
        let state = &mut *guard;
        // What is here stays as it was admitted, also under a policy that has changed since.
        if !state.residents.contains_key(&spec.key) {
            permitted.clone()?;
        }
        match state.admission.admit(spec)? {
            Answer::Repeated => Ok(Err(state.residents.get(&spec.key).map(|r| r.durable.clone()))),
            Answer::Admitted { address, supersedes } => {
                let Some(tenant) = state.tenants.get(&spec.tenant).cloned() else {
                    // Its range is known but its router is still being made.
                    state.admission.undo(&spec.key);
                    return Err(Refusal {
                        reason: RefusalReason::UnknownTenant,
                        message: format!("tenant {} is being configured on this host", spec.tenant),
                        free: state.admission.free(),
                    }
                    .into());
                };
                let pressure = *self.inner.shop.pressure.borrow();
                if let Some(message) = crate::pressure::refuses(pressure, spec.claim, Qos::of(spec)) {
                    state.admission.undo(&spec.key);
                    return Err(Refusal {
                        reason: RefusalReason::NoRoom,
                        message,
                        free: state.admission.free(),
                    }
                    .into());
                }
                // Under the lock that fencing takes: it finds this sandbox, or this finds it
                // under way.
                let node = Node::new(&spec.tenant, &spec.node_name);
                if let Err(no_right) = self.inner.shop.fence.admit(&node) {
                    state.admission.undo(&spec.key);
                    return Err(no_right.into());
                }
                let user_ids = match permitted.inspect_err(|_| state.admission.undo(&spec.key))? {
                    Users::Host => None,
                    Users::Own => Some(state.user_ids.take(&spec.key).ok_or_else(|| {
                        state.admission.undo(&spec.key);
                        Refusal {
                            reason: RefusalReason::NoRoom,
                            message: "all user ids that are for pods on this host are taken".into(),
                            free: state.admission.free(),
                        }
                    })?),
                };
                let older = supersedes.and_then(|old| state.residents.get(&old).cloned());
                let (resident, ends) = resident(&node);
                state.residents.insert(spec.key.clone(), resident);
                Ok(Ok(Newcomer {
                    address,
                    user_ids,
                    older,
                    ends,
                    tenant,
                }))
            }
        }
    }

    /// Begins the graceful end, or hastens it. Whatever the disk is like: a stop that
    /// cannot be recorded is only not gone on with by the next agent, until it is asked
    /// for again.
    pub async fn stop(
        &self,
        tenant: &TenantId,
        key: &SandboxKey,
        grace: Duration,
    ) -> Result<(), SandboxError> {
        let resident = self.resident(tenant, key)?;
        let now = self.inner.shop.clock.now();
        let by = after(now, grace);
        self.inner.shop.usage.asked(key);
        tell(&resident, Command::Event(Event::Stop { grace })).await;
        let before = {
            let mut state = self.state();
            let Some(known) = state.residents.get_mut(key) else {
                return Ok(());
            };
            if known.progress.borrow().stopped {
                return Ok(());
            }
            let Some(stops) = known.stops.record(by, now) else {
                return Ok(());
            };
            std::mem::replace(&mut known.stops, stops)
        };
        // An agent that starts again in the middle goes on stopping.
        if let Err(error) = self
            .inner
            .ledger
            .commit(vec![Record::Stopping(key.clone(), by)])
            .await
        {
            if let Some(known) = self.state().residents.get_mut(key) {
                known.stops = before;
            }
            tracing::warn!(pod.uid = %key.pod, attempt = %key.attempt, error = %error, "a stop cannot be recorded");
        }
        Ok(())
    }

    pub async fn update(
        &self,
        tenant: &TenantId,
        key: &SandboxKey,
        volumes: Vec<Volume>,
    ) -> Result<(), SandboxError> {
        let resident = self.resident(tenant, key)?;
        let place = resident.updates.clone().acquire_owned().await;
        let place = place.map_err(|_| SandboxError::Unknown(key.clone()))?;
        let (done, answer) = oneshot::channel();
        let update = Update { volumes, done, place };
        tell(&resident, Command::Update(update)).await;
        answer
            .await
            .map_err(|_| SandboxError::Unknown(key.clone()))?
            .map_err(SandboxError::Update)
    }

    /// Leaves nothing of a sandbox but its fence. Returns when that is so.
    pub async fn forget(&self, tenant: &TenantId, key: &SandboxKey) -> Result<(), SandboxError> {
        match self.resident(tenant, key) {
            Ok(resident) => {
                self.inner.shop.usage.asked(key);
                end(resident).await;
                Ok(())
            }
            Err(_) => {
                // Nothing is written for what is not here. In memory it is enough: what
                // may still be under way came by a connection that this process has.
                self.state().admission.fence(tenant, key);
                Ok(())
            }
        }
    }

    /// Refused unless the sandbox is here and the tenant's.
    pub fn check(&self, tenant: &TenantId, key: &SandboxKey) -> Result<(), SandboxError> {
        self.resident(tenant, key).map(drop)
    }

    /// The runtime's id of a sandbox that runs.
    pub fn sandbox_id(&self, tenant: &TenantId, key: &SandboxKey) -> Result<Option<SandboxId>, SandboxError> {
        let resident = self.resident(tenant, key)?;
        let progress = resident.progress.borrow();
        Ok(progress.sandbox.clone())
    }

    fn resident(&self, tenant: &TenantId, key: &SandboxKey) -> Result<Resident, SandboxError> {
        self.state()
            .residents
            .get(key)
            .filter(|r| r.tenant == *tenant)
            .cloned()
            .ok_or_else(|| SandboxError::Unknown(key.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is made whole before the guard goes.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the right to run

    /// The deadline of each sandbox that has not been fenced.
    pub fn unfenced(&self, deadline: impl Fn(&Node) -> Deadline) -> BTreeMap<SandboxKey, Deadline> {
        let state = self.state();
        let mut of_node: HashMap<&Node, Deadline> = HashMap::new();
        let unfenced = state.residents.iter().filter(|(_, resident)| !resident.fenced);
        unfenced
            .map(|(key, resident)| {
                let of = *of_node
                    .entry(&resident.node)
                    .or_insert_with(|| deadline(&resident.node));
                (key.clone(), of)
            })
            .collect()
    }

    /// Fences every sandbox of the node that is here: none has a right to run again.
    pub fn fence(&self, node: &Node) {
        let of_node: Vec<SandboxKey> = {
            let state = self.state();
            let of_node = state
                .residents
                .iter()
                .filter(|(_, r)| r.node == *node && !r.fenced);
            of_node.map(|(key, _)| key.clone()).collect()
        };
        for key in of_node {
            self.fence_one(&key);
        }
    }

    fn fence_one(&self, key: &SandboxKey) {
        let mut state = self.state();
        let Some(resident) = state.residents.get_mut(key) else {
            return;
        };
        resident.fenced = true;
        tracing::warn!(pod.uid = %key.pod, attempt = %key.attempt, tenant = %resident.tenant, "a sandbox is fenced");
        let resident = resident.clone();
        // Nobody else's end waits for a driver that is slow.
        tokio::spawn(async move { tell(&resident, Command::Event(Event::Fence)).await });
    }

    // ---- drivers

    fn hands(
        &self,
        spec: &Arc<SandboxSpec>,
        address: Ipv4Addr,
        user_ids: Option<IdRange>,
        tenant: &OpenTenant,
    ) -> (Arc<Hands>, watch::Receiver<MeshState>) {
        let mesh = watch::Sender::new(MeshState::Detached);
        let states = mesh.subscribe();
        let hands = Hands::new(
            self.inner.shop.clone(),
            spec.clone(),
            address,
            user_ids,
            tenant.router.clone(),
            mesh,
        );
        (Arc::new(hands), states)
    }

    /// Gives a sandbox its driver; `older` has to end first.
    #[expect(
        clippy::too_many_arguments,
        reason = "it is where the parts of a sandbox come together"
    )]
    fn spawn(
        &self,
        lifecycle: Lifecycle,
        spec: &Arc<SandboxSpec>,
        address: Ipv4Addr,
        tenant: &OpenTenant,
        hands: Arc<Hands>,
        mesh: watch::Receiver<MeshState>,
        ends: Ends,
        older: Option<Resident>,
    ) {
        let identity = tenant.identity_of(spec);
        let host_ip: IpAddr = self.inner.shop.address;
        let outlet = Outlet {
            board: self.inner.board.clone(),
            tenant: spec.tenant.clone(),
            addressing: addressing(address, host_ip, identity),
            progress: ends.progress,
            clock: self.inner.shop.clock,
        };
        let span = tracing::info_span!(
            "sandbox",
            pod.uid = %spec.key.pod,
            attempt = %spec.key.attempt,
            pod.namespace = %spec.namespace,
            pod.name = %spec.name,
            tenant = %spec.tenant,
        );
        let progress = outlet.progress.subscribe();
        let commands = {
            let state = self.state();
            state.residents.get(&spec.key).map(|r| r.commands.clone())
        };
        tokio::spawn(driver::run(lifecycle, hands, ends.commands, mesh, outlet).instrument(span.clone()));
        let shop = &self.inner.shop;
        match (Allowance::of(spec.claim, spec, &shop.room), &commands) {
            (Ok(allowance), Some(commands)) => {
                let bounds = eviction::Bounds::of(spec, &allowance, &shop.layout.sandbox(&spec.key));
                let counts = shop.counts.subscribe();
                let watch = eviction::watch(bounds, counts, ends.disk, progress.clone(), commands.clone());
                tokio::spawn(watch.instrument(span.clone()));
            }
            // It was admitted under another policy: its cgroup still holds it.
            (Err(error), _) => tracing::warn!(
                pod.uid = %spec.key.pod, error = %error,
                "a sandbox that today's policy would refuse is not measured"
            ),
            (_, None) => {}
        }
        tokio::spawn(
            async move {
                if let Some(older) = older {
                    tracing::info!("an older attempt has to end first");
                    end(older).await;
                }
                if let Some(commands) = commands
                    && commands.send(Command::Event(Event::Begin)).await.is_err()
                {
                    tracing::debug!("the sandbox ended before it began");
                }
            }
            .instrument(span.clone()),
        );
        let this = self.clone();
        let (key, tenant) = (spec.key.clone(), spec.tenant.clone());
        tokio::spawn(async move { this.see_off(key, tenant, progress, ends.ended).await }.instrument(span));
    }

    /// Follows a sandbox to its end, and gives back what it held.
    async fn see_off(
        &self,
        key: SandboxKey,
        tenant: TenantId,
        mut progress: watch::Receiver<Progress>,
        ended: watch::Sender<bool>,
    ) {
        if progress.wait_for(|p| p.stopped || p.gone).await.is_err() {
            return;
        }
        {
            let mut state = self.state();
            state.admission.release(&key);
            state.user_ids.give_back(&key);
        }
        let status = self.inner.board.status(&tenant, &key);
        let usage = &self.inner.shop.usage;
        usage.end(&key, status.as_ref().map_or("", |status| &status.reason));
        if progress.wait_for(|p| p.gone).await.is_err() {
            return;
        }
        // Once its end is in the ledger, no later agent looks for its account.
        usage.settle().await;
        while let Err(error) = self
            .inner
            .ledger
            .commit(vec![Record::Ended(tenant.clone(), key.clone())])
            .await
        {
            // Its end is not told before it is recorded; the fence must not be lost.
            tracing::error!(error = %error, "the end of a sandbox cannot be recorded");
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        usage.forget(&key);
        {
            let mut state = self.state();
            state.admission.end(&tenant, &key);
            state.user_ids.give_back(&key);
            state.residents.remove(&key);
        }
        self.inner.board.forget(&tenant, &key);
        ended.send_replace(true);
        tracing::info!("sandbox forgotten");
    }
}

/// Tells a sandbox to leave nothing, and waits for that.
async fn end(resident: Resident) {
    let mut ended = resident.ended.clone();
    tell(&resident, Command::Event(Event::Forget)).await;
    // An error tells that the far end has gone, at the agent's own end.
    let _over = ended.wait_for(|ended| *ended).await.is_ok();
}

async fn tell(resident: &Resident, command: Command) {
    if resident.commands.send(command).await.is_err() {
        tracing::debug!("a sandbox's driver has ended");
    }
}

/// The answer to a repeated start: that of the first, once it is known.
async fn repeated(durable: Option<Durable>) -> Result<(), StartError> {
    let Some(mut durable) = durable else {
        return Err(StartError::OtherFailed);
    };
    match durable.wait_for(Option::is_some).await {
        Ok(outcome) if *outcome == Some(true) => Ok(()),
        _ => Err(StartError::OtherFailed),
    }
}

impl Believers for Host {
    fn believed(&self) -> Vec<(SandboxKey, Option<SandboxId>, Vec<ContainerId>)> {
        self.state()
            .residents
            .iter()
            .map(|(key, resident)| {
                let progress = resident.progress.borrow();
                let sandbox = progress.sandbox.clone().filter(|_| !progress.stopped);
                (key.clone(), sandbox, progress.running.clone())
            })
            .filter(|(_, sandbox, running)| sandbox.is_some() || !running.is_empty())
            .collect()
    }

    fn tell(&self, key: &SandboxKey, sign: Sign) {
        let commands = self.state().residents.get(key).map(|r| r.commands.clone());
        if let Some(commands) = commands
            // A driver whose inbox is full hears of it at the next look at everything.
            && let Err(error) = commands.try_send(Command::Sign(sign))
        {
            tracing::debug!(error = %error, "a sign did not reach its driver");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_without_end_are_few_records_and_the_earliest_counts() {
        let now = Timestamp::UNIX_EPOCH;
        let at = |seconds: i64| Timestamp::from_second(seconds).unwrap();
        let mut stops = Stops::default();
        let mut records = 0;
        // A year of grace, and then each second less.
        let grace = 365 * 86_400;
        for by in (0..grace).rev().step_by(7) {
            if let Some(recorded) = stops.record(at(by), now) {
                (stops, records) = (recorded, records + 1);
            }
        }
        assert!(records <= STOPS_RECORDED + 26, "{records}");
        assert!(stops.by <= Some(at(14)), "{stops:?}");
        // The same again, and later, are none.
        assert_eq!(stops.record(at(grace), now), None);
        assert_eq!(stops.record(stops.by.unwrap(), now), None);
        let first = Stops::default().record(at(60), now).unwrap();
        assert_eq!(first.record(at(60), now), None);
        assert!(first.record(at(59), now).is_some());
    }
}
