//! Taking over what an earlier agent left: the ledger says what was admitted, the
//! run directory what it was to be, the runtime what there is.
//!
//! What always holds:
//! - what cannot be taken over (its spec is lost, or its tenant cannot be opened) is
//!   stopped and reported as lost, with the reason; it keeps nothing else from
//!   being taken over;
//! - a pod that was admitted to the mesh is never taken over as one outside it.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::{Arc, Mutex},
    time::Duration,
};

use backon::{ConstantBuilder, Retryable};
use futures::StreamExt;
use pool_agent_api::{
    SandboxKey, SandboxSpec, SandboxStatus, TenantId,
    spec::MeshMode,
    status::{ContainerState, ContainerStatus, MeshState, SandboxState},
    wire,
};
use prost::Message;
use tokio::sync::watch;
use tracing::Instrument;

use super::{Ends, Host, Inner, Resident, State, Stops, Terms, abilities::HostAbilities, resident};
use crate::{
    admission::{Admission, slim},
    board::Board,
    causes::described,
    cgroup::Cgroups,
    confined::{Directory, removal::Removal},
    cri::{CriError, KnownContainer, KnownSandbox, Labels, ReportedState},
    layout::{Layout, SandboxDirs},
    ledger::{Contents, Entry, Ledger},
    network::Network,
    right::Node,
    sandbox::{
        Lifecycle,
        driver::{Command, Progress},
        event::{Event, Slot},
        lifecycle::{Found, FoundRun, FoundState},
        perform::{Hands, Workshop},
    },
    spec_file,
    user_ids::IdRanges,
    volumes,
};

/// Sandboxes that are taken over at a time; each asks the runtime a few things.
const AT_A_TIME: usize = 16;
/// How soon something that must work in the end is tried again.
const AGAIN: Duration = Duration::from_secs(2);

/// How often a tenant that cannot be opened is tried again before its pods are lost.
const OPEN_AGAIN: usize = 2;

/// Why a recorded sandbox cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
enum Lost {
    #[error("The host lost the sandbox, as in a restart; the pod needs another")]
    Spec,
    #[error("The host restarted, which ended the sandbox; the pod needs another")]
    Rebooted,
    #[error("The host could not open the pod's tenant again ({0}); the pod needs another")]
    Tenant(String),
}

/// What the runtime has of one key.
#[derive(Default)]
struct There {
    sandboxes: Vec<KnownSandbox>,
    containers: Vec<KnownContainer>,
}

/// A recorded sandbox on its way to a driver.
struct Heir {
    entry: Entry,
    /// None: it is lost.
    spec: Option<Arc<SandboxSpec>>,
    there: There,
    ends: Ends,
    older: Option<Resident>,
}

impl Host {
    /// Opens the ledger's tenants, gives every recorded sandbox its driver, and
    /// removes what is ours and recorded nowhere.
    pub async fn adopt(
        shop: Arc<Workshop>,
        board: Board,
        ledger: Ledger,
        contents: Contents,
        network: Network,
        mut admission: Admission,
        terms: Terms,
    ) -> Result<Self, CriError> {
        let abilities = HostAbilities::detect(shop.runtime.features().await?, &shop.layout);
        let mut there = everything(&shop).await?;
        let mut unopened: HashMap<TenantId, String> = HashMap::new();
        for entry in contents.admitted.values() {
            admission.hold(entry.address);
        }
        for (tenant, address) in &contents.routers {
            admission.restore_tenant(tenant, *address);
        }
        if let Some(last) = contents.last_address {
            admission.resume_addresses_after(last);
        }
        for (tenant, key) in &contents.ended {
            admission.fence(tenant, key);
        }
        let user_ids = IdRanges::new(terms.privilege.user_ids);
        let host = Self {
            inner: Arc::new(Inner {
                shop,
                board,
                ledger,
                network,
                abilities,
                privilege: terms.privilege,
                claims: terms.claims,
                state: Mutex::new(State {
                    admission,
                    user_ids,
                    tenants: HashMap::new(),
                    waiting: HashMap::new(),
                    residents: HashMap::new(),
                }),
                configuring: Mutex::default(),
            }),
        };
        let pods = contents.admitted.values().map(|entry| entry.address);
        let routers = contents.routers.values().copied();
        if let Err(error) = host.inner.network.sweep(pods.chain(routers)).await {
            tracing::warn!(error = described(&error), "routes to ended sandboxes stay");
        }
        let keep: Vec<SandboxKey> = contents.admitted.keys().cloned().collect();
        for tenant in contents.tenants.values() {
            // Its pods would be lost for something that passes.
            let patience = ConstantBuilder::new()
                .with_delay(AGAIN)
                .with_max_times(OPEN_AGAIN);
            // Its address is on record already, unless the host's range is another now.
            let address = host.state().admission.router(&tenant.id);
            let (there, tenant) = (&host, tenant);
            let open = || async move {
                match address {
                    Some(address) => there.open_router(tenant, address).await,
                    None => there.open_tenant(tenant).await,
                }
            };
            match open.retry(patience).await {
                Ok(opened) => {
                    if let Err(error) = opened.router.sweep(&keep).await {
                        tracing::warn!(tenant = %tenant.id, error = described(&error), "devices of ended sandboxes stay");
                    }
                    host.state().tenants.insert(tenant.id.clone(), opened);
                }
                Err(error) => {
                    unopened.insert(tenant.id.clone(), described(&error));
                }
            }
        }
        for (tenant, error) in &unopened {
            // Its virtual node configures it again when it connects, which tells it more.
            tracing::error!(tenant = %tenant, error, "a tenant of the ledger cannot be opened: its pods are lost");
        }
        host.inner.shop.usage.adopt(contents.admitted.values());
        host.sweep(&contents.admitted, &mut there).await;

        // Admission counts in the order in which things happened.
        let mut entries: Vec<Entry> = contents.admitted.into_values().collect();
        entries.sort_by_key(|entry| (entry.accepted_at, entry.key.attempt));
        let heirs: Vec<Heir> = entries
            .into_iter()
            .map(|entry| {
                let there = there.remove(&entry.key).unwrap_or_default();
                host.readmit(entry, there)
            })
            .collect();
        futures::stream::iter(heirs)
            .for_each_concurrent(AT_A_TIME, |heir| host.take_over(heir, &unopened))
            .await;
        Ok(host)
    }

    /// Removes what is ours but has no record: it was never acknowledged, or has ended.
    async fn sweep(&self, admitted: &BTreeMap<SandboxKey, Entry>, there: &mut HashMap<SandboxKey, There>) {
        let shop = &self.inner.shop;
        let orphans: Vec<SandboxKey> = there
            .keys()
            .filter(|key| !admitted.contains_key(key))
            .cloned()
            .collect();
        for key in orphans {
            tracing::info!(pod.uid = %key.pod, attempt = %key.attempt, "removing a sandbox without a record");
            for sandbox in there.remove(&key).unwrap_or_default().sandboxes {
                let removal = async {
                    shop.runtime.stop_sandbox(&sandbox.id).await?;
                    shop.runtime.remove_sandbox(&sandbox.id).await
                };
                if let Err(error) = removal.await {
                    tracing::warn!(sandbox.id = %sandbox.id, error = %error, "an orphan stays until the next start");
                }
            }
        }
        let layout = shop.layout.clone();
        let cgroups = shop.cgroups.clone();
        let admitted: Vec<SandboxKey> = admitted.keys().cloned().collect();
        let swept = tokio::task::spawn_blocking(move || sweep_files(&layout, &cgroups, &admitted));
        match swept.await {
            // However much it is, the agent serves meanwhile.
            Ok(left) => drop(tokio::spawn(async move {
                if let Err(error) = volumes::clear_away(left).await {
                    tracing::warn!(error = %error, "what earlier sandboxes left stays until the next start");
                }
            })),
            Err(error) => tracing::warn!(error = %error, "sweeping files broke off"),
        }
    }

    /// Puts a recorded sandbox back among the residents.
    fn readmit(&self, entry: Entry, there: There) -> Heir {
        let dirs = self.inner.shop.layout.sandbox(&entry.key);
        let spec = match spec_file::read(&dirs)
            .map_err(|e| e.to_string())
            .and_then(|s| as_admitted(s, &entry))
        {
            Ok(spec) => Some(Arc::new(slim(spec))),
            Err(error) => {
                tracing::warn!(
                    pod.uid = %entry.key.pod, attempt = %entry.key.attempt, error,
                    "a sandbox's spec is lost: it can only end"
                );
                None
            }
        };
        let (mut resident, ends) = resident(&Node::new(&entry.tenant, &entry.node_name));
        resident.stops = Stops {
            by: entry.stop_by,
            recorded: u32::from(entry.stop_by.is_some()),
        };
        ends.durable.send_replace(Some(true));
        let mut state = self.state();
        state.admission.restore(
            &entry.key,
            &entry.tenant,
            spec.clone(),
            entry.claim,
            entry.address,
        );
        if let Some(ids) = entry.user_ids {
            state.user_ids.restore(&entry.key, ids);
        }
        // One that was being superseded still has to end first.
        let older = state
            .residents
            .iter()
            .filter(|(key, _)| key.pod == entry.key.pod && key.attempt < entry.key.attempt)
            .max_by_key(|(key, _)| key.attempt)
            .map(|(_, resident)| resident.clone());
        state.residents.insert(entry.key.clone(), resident);
        drop(state);
        Heir {
            entry,
            spec,
            there,
            ends,
            older,
        }
    }

    async fn take_over(&self, heir: Heir, unopened: &HashMap<TenantId, String>) {
        let boot_id = &self.inner.shop.boot_id;
        if heir
            .entry
            .boot_id
            .as_ref()
            .is_some_and(|admitted| admitted != boot_id)
        {
            tracing::warn!(
                pod.uid = %heir.entry.key.pod, attempt = %heir.entry.key.attempt,
                "a sandbox of before the host's restart is void"
            );
            self.spawn_remains(heir.entry, heir.there, heir.ends, Lost::Rebooted);
            return;
        }
        let tenant = self.state().tenants.get(&heir.entry.tenant).cloned();
        let (Some(spec), Some(tenant)) = (heir.spec, tenant) else {
            let lost = match unopened.get(&heir.entry.tenant) {
                Some(error) => Lost::Tenant(error.clone()),
                None => Lost::Spec,
            };
            self.spawn_remains(heir.entry, heir.there, heir.ends, lost);
            return;
        };
        let (hands, mesh) = self.hands(&spec, heir.entry.address, heir.entry.user_ids, &tenant);
        let dirs = self.inner.shop.layout.sandbox(&heir.entry.key);
        // Before it is attached, which writes the deadline that is known.
        let over = self.resume_right(&spec, heir.entry.address).await;
        let found = self
            .find(&spec, &heir.entry, heir.there, &hands, read_status(&dirs))
            .await;
        tracing::info!(
            pod.uid = %spec.key.pod, attempt = %spec.key.attempt, tenant = %spec.tenant,
            pod.namespace = %spec.namespace, pod.name = %spec.name,
            runs = found.runs.len(), alive = found.sandbox.is_some(), "sandbox taken over"
        );
        let now = self.inner.shop.clock.now();
        let lifecycle = Lifecycle::adopt(spec.clone(), heir.entry.accepted_at, found, now);
        let address = heir.entry.address;
        self.spawn(
            lifecycle, &spec, address, &tenant, hands, mesh, heir.ends, heir.older,
        );
        if over {
            self.fence_one(&spec.key);
        }
    }

    /// Goes on from the deadline that the kernel has held it to; whether that has passed.
    /// One that the kernel does not know (it has still to begin, or the programs are
    /// others now) has no packets until a renewal or a grant is heard.
    async fn resume_right(&self, spec: &SandboxSpec, address: Ipv4Addr) -> bool {
        let node = Node::new(&spec.tenant, &spec.node_name);
        let left = loop {
            match self.inner.shop.mesh.deadline(&spec.tenant, address).await {
                Ok(Some(left)) => break left,
                Ok(None) => return false,
                Err(error) => {
                    tracing::warn!(error = described(&error), "a sandbox's deadline cannot be read");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        !self.inner.shop.fence.resumed(&node, left)
    }

    async fn find(
        &self,
        spec: &SandboxSpec,
        entry: &Entry,
        there: There,
        hands: &Arc<Hands>,
        before: Option<SandboxStatus>,
    ) -> Found {
        let ready = there.sandboxes.iter().find(|s| s.ready).map(|s| s.id.clone());
        let sandbox = match ready {
            None => None,
            Some(id) => match hands.adopt().await {
                Ok(true) => Some(id),
                Ok(false) => {
                    tracing::warn!(pod.uid = %spec.key.pod, "a sandbox's device is gone");
                    None
                }
                Err(error) => {
                    // Its packets are dropped until this works; its containers go on.
                    tracing::error!(pod.uid = %spec.key.pod, error, "a sandbox's attachment was not taken over");
                    tokio::spawn(attach_in_the_end(hands.clone()).in_current_span());
                    Some(id)
                }
            },
        };
        let mut runs = vec![];
        for known in there.containers {
            let slot = spec.all_containers().position(|c| c.name == known.container);
            let Some(slot) = slot.map(Slot) else {
                continue;
            };
            let report = match self.inner.shop.runtime.report(&known.id).await {
                Ok(report) => report,
                Err(error) => {
                    tracing::warn!(error = %error, "a container could not be looked at");
                    continue;
                }
            };
            let state = match report.state {
                // Never started: the number is used again.
                ReportedState::Created => continue,
                ReportedState::Running { started_at } => FoundState::Running { started_at },
                ReportedState::Exited(end) => {
                    FoundState::Exited(hands.with_last_words(slot, known.restart, end).await)
                }
            };
            let last = before.as_ref().and_then(|b| last_status(b, spec, slot));
            let same_run = last.filter(|s| s.container_id == format!("containerd://{}", known.id));
            let probed = spec
                .all_containers()
                .nth(slot.0)
                .is_some_and(|c| c.startup_probe.is_some());
            runs.push(FoundRun {
                slot,
                id: known.id,
                restart: known.restart,
                image_id: report.image_id,
                created_at: report.created_at,
                state,
                was_started: !probed || same_run.is_some_and(|s| s.started),
                was_ready: same_run.is_some_and(|s| s.ready),
            });
        }
        Found {
            had_run: !runs.is_empty() || before.is_some_and(|b| b.state != SandboxState::Preparing),
            sandbox,
            stop_by: entry.stop_by,
            runs,
        }
    }

    /// A sandbox that cannot go on: all that is left is to say so, and to clear up.
    fn spawn_remains(&self, entry: Entry, there: There, ends: Ends, lost: Lost) {
        let this = self.clone();
        let span = tracing::info_span!("remains", pod.uid = %entry.key.pod, attempt = %entry.key.attempt,
            pod.namespace = %entry.namespace, pod.name = %entry.name, tenant = %entry.tenant);
        let progress = ends.progress.subscribe();
        let (key, tenant) = (entry.key.clone(), entry.tenant.clone());
        let host = self.clone();
        let ended = ends.ended;
        let (commands, progress_sender) = (ends.commands, ends.progress);
        tokio::spawn(
            async move { host.see_off(key, tenant, progress, ended).await }.instrument(span.clone()),
        );
        tokio::spawn(
            async move {
                this.bury_remains(entry, there, lost, commands, progress_sender)
                    .await;
            }
            .instrument(span),
        );
    }

    async fn bury_remains(
        &self,
        entry: Entry,
        there: There,
        lost: Lost,
        mut commands: tokio::sync::mpsc::Receiver<Command>,
        progress: watch::Sender<Progress>,
    ) {
        let shop = &self.inner.shop;
        for sandbox in &there.sandboxes {
            while let Err(error) = shop.runtime.stop_sandbox(&sandbox.id).await {
                tracing::warn!(error = %error, "what is left of a sandbox cannot be stopped");
                tokio::time::sleep(AGAIN).await;
            }
        }
        shop.mesh.detach(&entry.key).await;
        let router = self.state().tenants.get(&entry.tenant).map(|t| t.router.clone());
        if let Some(router) = router {
            while let Err(error) = router.unplug(&entry.key, entry.address).await {
                tracing::warn!(error = %error, "what is left of a sandbox cannot be unplugged");
                tokio::time::sleep(AGAIN).await;
            }
        }
        let dirs = shop.layout.sandbox(&entry.key);
        let before = read_status(&dirs);
        self.inner
            .board
            .publish(&entry.tenant, lost_status(&entry, &lost, before, shop.address));
        progress.send_modify(|p| p.stopped = true);
        loop {
            match commands.recv().await {
                Some(Command::Event(Event::Forget)) | None => break,
                // It has stopped already; dropping an update refuses it.
                Some(_) => {}
            }
        }
        for sandbox in &there.sandboxes {
            while let Err(error) = shop.runtime.remove_sandbox(&sandbox.id).await {
                tracing::warn!(error = %error, "what is left of a sandbox cannot be removed");
                tokio::time::sleep(AGAIN).await;
            }
        }
        shop.usage.settle().await;
        let cgroups = shop.cgroups.clone();
        let key = entry.key.clone();
        let removed = tokio::task::spawn_blocking(move || remove_cgroups(&cgroups, &key));
        if let Err(error) = removed.await {
            tracing::warn!(error = %error, "removing cgroups broke off");
        }
        if let Err(error) = volumes::remove(&dirs).await {
            tracing::warn!(error = %error, "a sandbox's files stay");
        }
        progress.send_modify(|p| p.gone = true);
    }
}

async fn everything(shop: &Workshop) -> Result<HashMap<SandboxKey, There>, CriError> {
    let of = Labels::Host(&shop.host);
    let (sandboxes, containers) = tokio::try_join!(shop.runtime.sandboxes(of), shop.runtime.containers(of))?;
    let mut there: HashMap<SandboxKey, There> = HashMap::new();
    for sandbox in sandboxes {
        there
            .entry(sandbox.key.clone())
            .or_default()
            .sandboxes
            .push(sandbox);
    }
    for container in containers {
        there
            .entry(container.key.clone())
            .or_default()
            .containers
            .push(container);
    }
    Ok(there)
}

async fn attach_in_the_end(hands: Arc<Hands>) {
    loop {
        tokio::time::sleep(AGAIN).await;
        match hands.adopt().await {
            Ok(_) => return,
            Err(error) => tracing::warn!(error, "a sandbox's attachment is still not taken over"),
        }
    }
}

/// Takes out of the way what no record names; what is left of it is yet to be removed.
fn sweep_files(layout: &Layout, cgroups: &Cgroups, admitted: &[SandboxKey]) -> Vec<Removal> {
    let mut left = vec![];
    for root in layout.roots() {
        let Ok(directory) = Directory::open(&root) else {
            continue;
        };
        for name in directory.entries().into_iter().flatten().flatten() {
            if name.to_string_lossy().starts_with(volumes::ASIDE) {
                left.extend(Removal::of(&directory, &name));
                continue;
            }
            let key = name.to_str().and_then(Layout::key_of);
            if let Some(key) = key.filter(|key| !admitted.contains(key)) {
                remove_cgroups(cgroups, &key);
                match volumes::put_aside(&layout.sandbox(&key)) {
                    Ok(aside) => left.extend(aside),
                    Err(error) => tracing::warn!(error = %error, "a sandbox's files stay"),
                }
            }
        }
    }
    left
}

fn remove_cgroups(cgroups: &Cgroups, key: &SandboxKey) {
    for parent in cgroups.parents(key) {
        if let Err(error) = cgroups.remove(&parent) {
            tracing::warn!(cgroup = parent, error = %error, "a pod's cgroup stays");
        }
    }
}

/// The spec, if it says no less than what was admitted: one that left out the mesh
/// would let an enrolled pod's packets pass.
fn as_admitted(spec: SandboxSpec, entry: &Entry) -> Result<SandboxSpec, String> {
    if spec.key != entry.key || spec.tenant != entry.tenant {
        return Err(format!("it is of sandbox {} of tenant {}", spec.key, spec.tenant));
    }
    if spec.mesh == MeshMode::Unmeshed
        && let Some(identity) = &entry.identity
    {
        return Err(format!("it leaves out the mesh, but {identity} was admitted"));
    }
    Ok(spec)
}

/// The last status that was published, if it can be read.
fn read_status(dirs: &SandboxDirs) -> Option<SandboxStatus> {
    let bytes = std::fs::read(dirs.status()).ok()?;
    let status = wire::SandboxStatus::decode(bytes.as_slice()).ok()?;
    SandboxStatus::try_from(status).ok()
}

fn last_status<'a>(status: &'a SandboxStatus, spec: &SandboxSpec, slot: Slot) -> Option<&'a ContainerStatus> {
    let name = &spec.all_containers().nth(slot.0)?.name;
    status
        .init_containers
        .iter()
        .chain(&status.containers)
        .find(|s| s.name == *name)
}

fn lost_status(
    entry: &Entry,
    lost: &Lost,
    before: Option<SandboxStatus>,
    host_ip: std::net::IpAddr,
) -> SandboxStatus {
    let mut status = before.unwrap_or_else(|| SandboxStatus {
        key: entry.key.clone(),
        namespace: entry.namespace.clone(),
        name: entry.name.clone(),
        node_name: entry.node_name.clone(),
        revision: 0,
        state: SandboxState::Stopped,
        reason: String::new(),
        message: String::new(),
        pod_ip: None,
        host_ip,
        accepted_at: entry.accepted_at,
        mesh: MeshState::Detached,
        identity: None,
        init_containers: vec![],
        containers: vec![],
        notice: None,
    });
    status.state = SandboxState::Stopped;
    status.mesh = MeshState::Detached;
    status.identity = entry.identity.clone().or(status.identity);
    status.reason = "SandboxLost".into();
    status.message = lost.to_string();
    for container in status.init_containers.iter_mut().chain(&mut status.containers) {
        if let ContainerState::Running { started_at } = container.state {
            container.state = ContainerState::Terminated(pool_agent_api::status::Terminated {
                exit_code: 137,
                signal: 0,
                reason: "ContainerStatusUnknown".into(),
                message: "The container could not be located when the pod was terminated".into(),
                started_at: Some(started_at),
                finished_at: started_at,
                container_id: container.container_id.clone(),
            });
        }
        container.ready = false;
        container.started = false;
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::lifecycle::tests_support::spec;

    fn admitted(identity: Option<&str>) -> Entry {
        let spec = spec("a", |_| {});
        Entry {
            key: spec.key.clone(),
            tenant: spec.tenant.clone(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            node_name: spec.node_name.clone(),
            claim: spec.claim,
            address: [10, 0, 0, 2].into(),
            identity: identity.map(Into::into),
            user_ids: None,
            accepted_at: jiff::Timestamp::UNIX_EPOCH,
            boot_id: None,
            stop_by: None,
        }
    }

    #[test]
    fn a_spec_that_leaves_out_the_mesh_of_an_enrolled_pod_is_not_believed() {
        const IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/web";
        for (recorded, mesh, fits) in [
            (Some(IDENTITY), MeshMode::Enrolled, true),
            (Some(IDENTITY), MeshMode::Unmeshed, false),
            (None, MeshMode::Unmeshed, true),
            // More than was asked for does no harm.
            (None, MeshMode::Enrolled, true),
        ] {
            let found = spec("a", |parts| parts.mesh = mesh);
            let taken = as_admitted(found, &admitted(recorded));
            assert_eq!(taken.is_ok(), fits, "{recorded:?} {mesh:?}");
        }
        assert!(
            as_admitted(spec("b", |_| {}), &admitted(None)).is_err(),
            "of another sandbox"
        );
    }

    #[test]
    fn a_lost_sandbox_keeps_its_identity_and_tells_why() {
        let entry = admitted(Some("spiffe://x/ns/a/sa/b"));
        let lost = Lost::Tenant("the kernel said no".into());
        let status = lost_status(&entry, &lost, None, [192, 0, 2, 1].into());
        assert_eq!(status.identity, entry.identity);
        assert_eq!(status.state, SandboxState::Stopped);
        assert!(
            status.message.contains("the kernel said no"),
            "{}",
            status.message
        );
    }
}
