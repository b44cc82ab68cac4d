//! What this host reports: the newest status of every sandbox, for any number of
//! readers. Written by the sandboxes' drivers; read by `Watch` calls and by the
//! task that keeps the last statuses on disk.
//!
//! A reader has a position, not a queue: it gets each sandbox's newest status
//! since it last looked, however slow it is, and no reader costs memory. What
//! cannot be merged (that a sandbox was forgotten) is kept for the last few
//! thousand; a reader further behind is told to begin again.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pool_agent_api::{
    SandboxKey, SandboxStatus, TenantId,
    status::{Notice, PodEvent},
};
use tokio::sync::{broadcast, watch};

/// Forgotten sandboxes that are remembered for readers, a tenant.
const FORGOTTEN: usize = 4096;
/// Events that wait for a slow reader; those beyond are lost to it ("at most once").
const EVENTS: usize = 512;

#[derive(Debug, Clone)]
pub enum Change {
    Status(Arc<SandboxStatus>),
    Forgotten(SandboxKey),
}

/// The reader has missed a change that is no longer kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reader fell too far behind and has to begin again")]
pub struct FellBehind;

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Board {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pages: Mutex<Pages>,
    /// The newest position; readers wait on it.
    newest: watch::Sender<u64>,
    /// Where revisions of this agent's life begin.
    first_revision: u64,
}

#[derive(Debug, Default)]
struct Pages {
    position: u64,
    tenants: HashMap<TenantId, Page>,
}

#[derive(Debug)]
struct Page {
    statuses: BTreeMap<SandboxKey, (u64, Arc<SandboxStatus>)>,
    /// Of the sandboxes that hang here.
    notices: BTreeMap<SandboxKey, Notice>,
    forgotten: VecDeque<(u64, SandboxKey)>,
    /// The newest position dropped from `forgotten`.
    horizon: u64,
    events: broadcast::Sender<PodEvent>,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            statuses: BTreeMap::new(),
            notices: BTreeMap::new(),
            forgotten: VecDeque::new(),
            horizon: 0,
            events: broadcast::channel(EVENTS).0,
        }
    }
}

impl Board {
    /// `generation` counts the agent's starts: revisions of a later life are greater.
    pub fn new(generation: u32) -> Self {
        Self {
            inner: Arc::new(Inner {
                pages: Mutex::default(),
                newest: watch::Sender::new(0),
                first_revision: u64::from(generation) << 32,
            }),
        }
    }

    /// Puts up a status if it differs from the one that hangs there. Its revision is
    /// set here.
    pub fn publish(&self, tenant: &TenantId, status: SandboxStatus) {
        let mut pages = self.pages();
        let position = self.put_up(&mut pages, tenant, status);
        drop(pages);
        self.tell(position);
    }

    /// Adds to a sandbox's status, now and from now on, that it has to end.
    pub fn give_notice(&self, tenant: &TenantId, key: &SandboxKey, notice: Notice) {
        // In one go: a status that its driver puts up meanwhile would be overwritten.
        let mut pages = self.pages();
        let page = pages.tenants.entry(tenant.clone()).or_default();
        let Some((_, status)) = page.statuses.get(key) else {
            return;
        };
        let status = (**status).clone();
        page.notices.insert(key.clone(), notice);
        let position = self.put_up(&mut pages, tenant, status);
        drop(pages);
        self.tell(position);
    }

    /// The new position, if the status differs from the one that hangs there.
    fn put_up(&self, pages: &mut Pages, tenant: &TenantId, mut status: SandboxStatus) -> Option<u64> {
        let position = pages.position + 1;
        let page = pages.tenants.entry(tenant.clone()).or_default();
        status.notice = page.notices.get(&status.key).cloned();
        match page.statuses.get(&status.key) {
            Some((_, known)) => {
                status.revision = known.revision;
                if **known == status {
                    return None;
                }
                status.revision += 1;
            }
            None => status.revision = self.inner.first_revision + 1,
        }
        page.statuses
            .insert(status.key.clone(), (position, Arc::new(status)));
        pages.position = position;
        Some(position)
    }

    fn tell(&self, position: Option<u64>) {
        if let Some(position) = position {
            self.inner.newest.send_replace(position);
        }
    }

    pub fn forget(&self, tenant: &TenantId, key: &SandboxKey) {
        let mut pages = self.pages();
        let position = pages.position + 1;
        let page = pages.tenants.entry(tenant.clone()).or_default();
        page.notices.remove(key);
        if page.statuses.remove(key).is_none() {
            return;
        }
        page.forgotten.push_back((position, key.clone()));
        if page.forgotten.len() > FORGOTTEN
            && let Some((dropped, _)) = page.forgotten.pop_front()
        {
            page.horizon = dropped;
        }
        pages.position = position;
        drop(pages);
        self.inner.newest.send_replace(position);
    }

    /// Sends an event to whoever reads now.
    pub fn announce(&self, tenant: &TenantId, event: PodEvent) {
        let mut pages = self.pages();
        let page = pages.tenants.entry(tenant.clone()).or_default();
        // Nobody may be listening.
        let _readers = page.events.send(event).unwrap_or(0);
    }

    pub fn status(&self, tenant: &TenantId, key: &SandboxKey) -> Option<Arc<SandboxStatus>> {
        let pages = self.pages();
        let (_, status) = pages.tenants.get(tenant)?.statuses.get(key)?;
        Some(status.clone())
    }

    /// All statuses, of all tenants, by their state.
    pub fn all(&self) -> Vec<(TenantId, Arc<SandboxStatus>)> {
        let pages = self.pages();
        pages
            .tenants
            .iter()
            .flat_map(|(tenant, page)| page.statuses.values().map(|(_, s)| (tenant.clone(), s.clone())))
            .collect()
    }

    /// A reader that has seen nothing; of one tenant, or of all.
    pub fn reader(&self, tenant: Option<TenantId>) -> Reader {
        Reader {
            board: self.clone(),
            newest: self.inner.newest.subscribe(),
            tenant,
            seen: 0,
            began: false,
        }
    }

    /// The tenant's events from now on.
    pub fn events(&self, tenant: &TenantId) -> broadcast::Receiver<PodEvent> {
        let mut pages = self.pages();
        pages
            .tenants
            .entry(tenant.clone())
            .or_default()
            .events
            .subscribe()
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        // The pages are whole after each statement: a panic elsewhere leaves no harm.
        self.inner.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct Reader {
    board: Board,
    newest: watch::Receiver<u64>,
    tenant: Option<TenantId>,
    seen: u64,
    began: bool,
}

impl Reader {
    /// What has changed since the last call, oldest first; all there is at the first.
    pub fn take(&mut self) -> Result<Vec<Change>, FellBehind> {
        self.newest.mark_unchanged();
        let pages = self.board.pages();
        let mut changes: Vec<(u64, Change)> = vec![];
        let of_tenant = |tenant: &TenantId| self.tenant.as_ref().is_none_or(|t| t == tenant);
        for (_, page) in pages.tenants.iter().filter(|(t, _)| of_tenant(t)) {
            if self.began {
                if page.horizon > self.seen {
                    return Err(FellBehind);
                }
                let newer = page.forgotten.iter().rev().take_while(|(at, _)| *at > self.seen);
                changes.extend(newer.map(|(at, key)| (*at, Change::Forgotten(key.clone()))));
            }
            let newer = page.statuses.values().filter(|(at, _)| *at > self.seen);
            changes.extend(newer.map(|(at, status)| (*at, Change::Status(status.clone()))));
        }
        self.seen = pages.position;
        self.began = true;
        drop(pages);
        changes.sort_by_key(|(at, _)| *at);
        Ok(changes.into_iter().map(|(_, change)| change).collect())
    }

    /// Returns when there may be something to take. False: nothing will ever come.
    pub async fn changed(&mut self) -> bool {
        self.newest.changed().await.is_ok()
    }
}

#[cfg(test)]
mod tests;
