//! Which sandboxes this host takes. Pure: [`crate::host`] calls it, makes the
//! answer durable in the ledger, and only then tells the virtual node.
//!
//! What always holds:
//! - a (pod UID, attempt) is taken once; the same request again has the same answer;
//! - an attempt older than one that is or was here is refused, and so is one that
//!   has ended: the attempt number is the fencing token;
//! - a newer attempt supersedes an older one that still lives here. The older one
//!   is killed at once and the newer starts only when it is gone, so of one pod at
//!   most one attempt has processes on this host. While both are known the larger
//!   of their claims counts, not the sum;
//! - the claims that count never exceed the capacity;
//! - no two sandboxes or routers on the host have one address, whosever they are, and
//!   an address that was just given back is the last to be given again.

mod addresses;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use pool_agent_api::{
    Attempt, PodUid, Refusal, RefusalReason, Resources, SandboxKey, SandboxSpec, TenantId,
    spec::{Files, SandboxParts, VolumeSource},
};
use sha2::{Digest as _, Sha256};

pub use addresses::Addresses;

/// Ended attempts of one tenant that are remembered. A pod's UID is never used again,
/// so what this protects against is a message that was long under way.
const FENCES: usize = 20_000;
/// And of all tenants. The one with the most loses its oldest.
const ALL_FENCES: usize = 100_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Admitted {
        address: Ipv4Addr,
        /// An older attempt that has to be gone first.
        supersedes: Option<SandboxKey>,
    },
    /// It is here already, with this spec.
    Repeated,
}

/// Why a tenant's settings were not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TenantRefusal {
    #[error("no free address for the tenant's router in this host's pod_range {0}")]
    NoAddress(Ipv4Net),
}

/// A sandbox that is here, as admission counts it.
#[derive(Debug, Clone)]
struct Admitted {
    tenant: TenantId,
    /// None if the spec was lost with the host's memory.
    spec: Option<Arc<SandboxSpec>>,
    claim: Resources,
    /// None once it has stopped and given it back.
    address: Option<Ipv4Addr>,
}

#[derive(Debug)]
pub struct Admission {
    capacity: Resources,
    draining: bool,
    cordoned: bool,
    addresses: Addresses,
    /// The tenants there are, with the addresses of their routers.
    routers: BTreeMap<TenantId, Ipv4Addr>,
    /// By pod; attempts in order. More than one while one supersedes another.
    here: HashMap<PodUid, BTreeMap<Attempt, Admitted>>,
    fences: Fences,
}

/// The newest ended attempt of each pod. A tenant raises fences for its own pods only,
/// and pushes out none but its own.
#[derive(Debug, Default)]
struct Fences {
    tenants: HashMap<TenantId, TenantFences>,
    raised: usize,
}

/// Oldest entries forgotten first. By a digest of the pod's UID: there are many of
/// them, for a long time.
#[derive(Debug, Default)]
struct TenantFences {
    by_pod: HashMap<Digest, (Attempt, u64)>,
    /// In the order in which they were raised; one that was raised again since is
    /// in here twice.
    raised: VecDeque<(u64, Digest)>,
    next: u64,
}

type Digest = [u8; 16];

fn digest(pod: &PodUid) -> Digest {
    let whole = Sha256::digest(pod.as_str().as_bytes());
    std::array::from_fn(|i| whole[i])
}

impl Fences {
    fn raise(&mut self, tenant: &TenantId, key: &SandboxKey) {
        let own = self.tenants.entry(tenant.clone()).or_default();
        own.raise(key);
        self.raised += 1;
        if own.raised.len() > FENCES {
            own.drop_oldest();
            self.raised -= 1;
        }
        while self.raised > ALL_FENCES
            && let Some(most) = self.tenants.values_mut().max_by_key(|t| t.raised.len())
        {
            most.drop_oldest();
            self.raised -= 1;
        }
    }

    fn of(&self, tenant: &TenantId, pod: &PodUid) -> Option<Attempt> {
        self.tenants.get(tenant)?.of(pod)
    }
}

impl TenantFences {
    fn raise(&mut self, key: &SandboxKey) {
        let pod = digest(&key.pod);
        let attempt = match self.by_pod.get(&pod) {
            Some((known, _)) => key.attempt.max(*known),
            None => key.attempt,
        };
        self.by_pod.insert(pod, (attempt, self.next));
        self.raised.push_back((self.next, pod));
        self.next += 1;
    }

    fn drop_oldest(&mut self) {
        if let Some((age, pod)) = self.raised.pop_front()
            && self.by_pod.get(&pod).is_some_and(|(_, newest)| *newest == age)
        {
            self.by_pod.remove(&pod);
        }
    }

    fn of(&self, pod: &PodUid) -> Option<Attempt> {
        self.by_pod.get(&digest(pod)).map(|(attempt, _)| *attempt)
    }
}

impl Admission {
    /// `range` is the host's own: all addresses come from it.
    pub fn new(capacity: Resources, range: Ipv4Net) -> Self {
        Self {
            capacity,
            draining: false,
            cordoned: false,
            addresses: Addresses::of(range),
            routers: BTreeMap::new(),
            here: HashMap::new(),
            fences: Fences::default(),
        }
    }

    pub fn capacity(&self) -> Resources {
        self.capacity
    }

    /// What the next sandbox may claim.
    pub fn free(&self) -> Resources {
        self.free_beside(None)
    }

    /// What is free if the claims of one pod are left out.
    fn free_beside(&self, pod: Option<&PodUid>) -> Resources {
        let used = self
            .here
            .iter()
            .filter(|(uid, _)| Some(*uid) != pod)
            .map(|(_, attempts)| claim_of(attempts))
            .fold(Resources::default(), Resources::saturating_add);
        Resources {
            cpu_millis: self.capacity.cpu_millis.saturating_sub(used.cpu_millis),
            memory_bytes: self.capacity.memory_bytes.saturating_sub(used.memory_bytes),
            ephemeral_storage_bytes: self
                .capacity
                .ephemeral_storage_bytes
                .saturating_sub(used.ephemeral_storage_bytes),
            sandboxes: self.capacity.sandboxes.saturating_sub(used.sandboxes),
        }
    }

    /// None if it was lost with the host's memory, or the sandbox is not here.
    pub fn spec(&self, key: &SandboxKey) -> Option<Arc<SandboxSpec>> {
        self.here.get(&key.pod)?.get(&key.attempt)?.spec.clone()
    }

    /// From now on no new sandbox is taken; those that are here stay.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// The same, until it is taken back. True: that is news.
    pub fn cordon(&mut self, cordoned: bool) -> bool {
        std::mem::replace(&mut self.cordoned, cordoned) != cordoned
    }

    /// The pod's own grace of a sandbox that is here; none if its spec is lost.
    pub fn grace(&self, key: &SandboxKey) -> Duration {
        self.here
            .get(&key.pod)
            .and_then(|attempts| attempts.get(&key.attempt)?.spec.as_ref())
            .map(|spec| spec.termination_grace)
            .unwrap_or_default()
    }

    /// Whether an attempt was here, or a later one, and has ended.
    pub fn fenced(&self, tenant: &TenantId, key: &SandboxKey) -> bool {
        let ended = self.fences.of(tenant, &key.pod);
        ended.is_some_and(|ended| key.attempt <= ended)
    }

    /// The address of the tenant's router: the tenant may have pods here from now on.
    pub fn admit_tenant(&mut self, tenant: &TenantId) -> Result<Ipv4Addr, TenantRefusal> {
        if let Some(address) = self.routers.get(tenant) {
            return Ok(*address);
        }
        let address = self
            .addresses
            .take()
            .ok_or(TenantRefusal::NoAddress(self.addresses.range()))?;
        self.routers.insert(tenant.clone(), address);
        Ok(address)
    }

    /// The address of the tenant's router, if it has one.
    pub fn router(&self, tenant: &TenantId) -> Option<Ipv4Addr> {
        self.routers.get(tenant).copied()
    }

    /// An address that is not to be given: it is in the ledger.
    pub fn hold(&mut self, address: Ipv4Addr) {
        self.addresses.hold(address);
    }

    /// Puts back the address of a tenant's router. One that an earlier range gave is
    /// let go: nothing would lead to it.
    pub fn restore_tenant(&mut self, tenant: &TenantId, address: Ipv4Addr) {
        if self.addresses.range().contains(&address) {
            self.addresses.hold(address);
            self.routers.insert(tenant.clone(), address);
        }
    }

    pub fn admit(&mut self, spec: &Arc<SandboxSpec>) -> Result<Answer, Refusal> {
        let key = &spec.key;
        let refuse = |reason, message: String, free| Refusal {
            reason,
            message,
            free,
        };
        let attempts = self.here.get(&key.pod);
        if let Some(here) = attempts.and_then(|a| a.get(&key.attempt)) {
            return match &here.spec {
                Some(known) if same(known, spec) => Ok(Answer::Repeated),
                _ => Err(refuse(
                    RefusalReason::SpecConflict,
                    format!("sandbox {key} is here with another spec"),
                    self.free(),
                )),
            };
        }
        if let Some(ended) = self.fences.of(&spec.tenant, &key.pod)
            && key.attempt <= ended
        {
            return Err(if key.attempt == ended {
                refuse(
                    RefusalReason::EndedAttempt,
                    format!("sandbox {key} was here and has ended"),
                    self.free(),
                )
            } else {
                refuse(
                    RefusalReason::OlderAttempt,
                    format!("sandbox {key} is older than attempt {ended}, which has ended here"),
                    self.free(),
                )
            });
        }
        let newest = attempts.and_then(|a| a.keys().next_back()).copied();
        if let Some(newest) = newest
            && newest > key.attempt
        {
            return Err(refuse(
                RefusalReason::OlderAttempt,
                format!("sandbox {key} is older than attempt {newest}, which is here"),
                self.free(),
            ));
        }
        if self.draining || self.cordoned {
            return Err(refuse(
                RefusalReason::Draining,
                "the host takes no new sandboxes".into(),
                self.free(),
            ));
        }
        if !self.routers.contains_key(&spec.tenant) {
            return Err(refuse(
                RefusalReason::UnknownTenant,
                format!("tenant {} has not been configured on this host", spec.tenant),
                self.free(),
            ));
        }
        if let Some(attempts) = attempts
            && attempts.values().any(|a| a.tenant != spec.tenant)
        {
            // UIDs are unique within a cluster; two clusters that share one are not
            // told apart by CNI, so the second waits.
            return Err(refuse(
                RefusalReason::NoRoom,
                format!("a pod of another tenant with UID {} is here", key.pod),
                self.free(),
            ));
        }
        let beside = self.free_beside(Some(&key.pod));
        let older = attempts.map(claim_of).unwrap_or_default();
        if beside.checked_sub(larger(older, spec.claim)).is_none() {
            return Err(refuse(
                RefusalReason::NoRoom,
                short_of(spec.claim, beside),
                self.free(),
            ));
        }
        let Some(address) = self.addresses.take() else {
            return Err(refuse(
                RefusalReason::NoRoom,
                "this host has no free address".into(),
                self.free(),
            ));
        };
        let supersedes = newest.map(|attempt| SandboxKey {
            pod: key.pod.clone(),
            attempt,
        });
        self.here.entry(key.pod.clone()).or_default().insert(
            key.attempt,
            Admitted {
                tenant: spec.tenant.clone(),
                spec: Some(spec.clone()),
                claim: spec.claim,
                address: Some(address),
            },
        );
        Ok(Answer::Admitted { address, supersedes })
    }

    /// Puts back what the ledger holds, without asking whether there is room: it is here.
    pub fn restore(
        &mut self,
        key: &SandboxKey,
        tenant: &TenantId,
        spec: Option<Arc<SandboxSpec>>,
        claim: Resources,
        address: Ipv4Addr,
    ) {
        self.addresses.hold(address);
        // That a stopped sandbox gave its address back is not in the ledger; that a later
        // one was given it is. Call in the order of admission.
        let attempts = self.here.values_mut().flat_map(BTreeMap::values_mut);
        for other in attempts.filter(|o| o.address == Some(address)) {
            other.address = None;
        }
        self.here.entry(key.pod.clone()).or_default().insert(
            key.attempt,
            Admitted {
                tenant: tenant.clone(),
                spec,
                claim,
                address: Some(address),
            },
        );
    }

    /// A sandbox has stopped: its claim and its address are free, its record stays.
    pub fn release(&mut self, key: &SandboxKey) {
        let here = self.here.get_mut(&key.pod).and_then(|a| a.get_mut(&key.attempt));
        if let Some(here) = here {
            here.claim = Resources::default();
            if let Some(address) = here.address.take() {
                self.addresses.give_back(address);
            }
        }
    }

    /// A sandbox is gone. Its attempt, and all before it, may not come again.
    pub fn end(&mut self, tenant: &TenantId, key: &SandboxKey) {
        self.undo(key);
        self.fences.raise(tenant, key);
    }

    /// Takes back an admission that could not be made durable.
    pub fn undo(&mut self, key: &SandboxKey) {
        self.release(key);
        if let Some(attempts) = self.here.get_mut(&key.pod) {
            attempts.remove(&key.attempt);
            if attempts.is_empty() {
                self.here.remove(&key.pod);
            }
        }
    }

    /// Remembers that a tenant's attempt may not come again.
    pub fn fence(&mut self, tenant: &TenantId, key: &SandboxKey) {
        if self
            .fences
            .of(tenant, &key.pod)
            .is_none_or(|ended| ended < key.attempt)
        {
            self.fences.raise(tenant, key);
        }
    }

    /// Where the next address is looked for; kept over restarts.
    pub fn resume_addresses_after(&mut self, last: Ipv4Addr) {
        self.addresses.resume_after(last);
    }
}

/// Of the attempts of one pod at most one has processes: the largest claim counts.
fn claim_of(attempts: &BTreeMap<Attempt, Admitted>) -> Resources {
    attempts
        .values()
        .map(|a| a.claim)
        .fold(Resources::default(), larger)
}

fn larger(a: Resources, b: Resources) -> Resources {
    Resources {
        cpu_millis: a.cpu_millis.max(b.cpu_millis),
        memory_bytes: a.memory_bytes.max(b.memory_bytes),
        ephemeral_storage_bytes: a.ephemeral_storage_bytes.max(b.ephemeral_storage_bytes),
        sandboxes: a.sandboxes.max(b.sandboxes),
    }
}

fn short_of(claim: Resources, free: Resources) -> String {
    let mut short = vec![];
    let mut compare = |what: &str, wanted: u64, free: u64| {
        if wanted > free {
            short.push(format!("{what}: {wanted} wanted, {free} free"));
        }
    };
    compare("cpu (m)", claim.cpu_millis, free.cpu_millis);
    compare("memory (bytes)", claim.memory_bytes, free.memory_bytes);
    compare(
        "ephemeral storage (bytes)",
        claim.ephemeral_storage_bytes,
        free.ephemeral_storage_bytes,
    );
    compare("sandboxes", claim.sandboxes.into(), free.sandboxes.into());
    format!("no room: {}", short.join("; "))
}

/// Whether two specs of one attempt are the same, but for what may change while
/// it runs: the contents of file volumes (a token is new each time it is asked
/// for) and registry credentials.
fn same(a: &SandboxSpec, b: &SandboxSpec) -> bool {
    let fixed = |spec: &SandboxSpec| SandboxParts {
        registry_credentials: vec![],
        ..without_contents((*spec).clone())
    };
    fixed(a) == fixed(b)
}

fn without_contents(spec: SandboxSpec) -> SandboxParts {
    let mut parts = SandboxParts::clone(&spec);
    for volume in &mut parts.volumes {
        if let VolumeSource::Files(files) = &volume.source {
            // An empty set of files is valid: no path can be wrong.
            let empty = Files::new(vec![], files.sensitive()).unwrap_or_default();
            volume.source = VolumeSource::Files(empty);
        }
    }
    parts
}

/// A spec to keep in memory: the contents of its volumes stay on disk.
pub fn slim(spec: SandboxSpec) -> SandboxSpec {
    let fallback = spec.clone();
    SandboxSpec::new(without_contents(spec)).unwrap_or(fallback)
}

#[cfg(test)]
mod tests;
