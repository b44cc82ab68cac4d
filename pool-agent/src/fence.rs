//! Fences what has no right to run any more ([`crate::right`]): its packets by the
//! kernel's deadline, which is moved ahead here and holds when this process has
//! stopped, then its processes.
//!
//! A host that is in no cell fences nobody: nobody starts a successor there for a host
//! that is silent (docs/decisions/the-right-to-run.md).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_runtime::redirect::{BootTime, Deadline};
use pool_agent_api::{Epoch, SandboxKey, TenantId};
use tokio::sync::Notify;

use crate::{
    causes::described,
    host::Host,
    right::{GrantRefused, NoRight, Node, Rights},
};

/// How often deadlines are compared with what the kernel was told, though nothing has
/// changed: it may have failed.
const LOOK: Duration = Duration::from_secs(5);
/// A deadline that moves by less is told to the kernel with the next look.
const WORTHWHILE: Duration = Duration::from_millis(500);
/// The kernel is told within this, or again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Cheap to clone.
#[derive(Clone)]
pub struct Fence(Arc<Inner>);

struct Inner {
    /// How long the Lease in the cell is good for after a renewal; None: the host is in
    /// none, and what is kept here is only who may grant.
    lease: Option<Duration>,
    rights: Mutex<Rights>,
    changed: Notify,
}

impl Inner {
    fn rights(&self) -> MutexGuard<'_, Rights> {
        // Every change is made whole before the guard goes.
        self.rights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fence {
    /// `lease`: of the host's Lease in its cell, after a renewal; None: it is in none.
    pub fn new(lease: Option<Duration>) -> Self {
        Self(Arc::new(Inner {
            lease,
            rights: Mutex::default(),
            changed: Notify::new(),
        }))
    }

    pub fn lease(&self) -> Option<Duration> {
        self.0.lease
    }

    /// The Lease in the cell has been written, by a request that was sent at `sent`.
    pub fn renewed(&self, sent: BootTime) {
        if let Some(lease) = self.0.lease {
            self.0.rights().renewed(sent + lease, BootTime::now());
            self.0.changed.notify_one();
        }
    }

    pub fn granted(&self, node: &Node, epoch: Epoch, duration: Duration) -> Result<(), GrantRefused> {
        let now = BootTime::now();
        let mut rights = self.0.rights();
        if self.0.lease.is_none() {
            for over in rights.look(now) {
                rights.fenced(&over, now);
            }
        }
        let before = rights.until(node);
        rights.granted(node, epoch, now + duration, now)?;
        // Who grants without end is heard with the next look.
        if rights.until(node).since(before) >= WORTHWHILE {
            self.0.changed.notify_one();
        }
        Ok(())
    }

    /// What an earlier agent left, and until when the kernel lets it. False: it is over.
    pub fn resumed(&self, node: &Node, left: Deadline) -> bool {
        let Some(lease) = self.0.lease else { return true };
        let now = BootTime::now();
        if left.has_passed(now) {
            return false;
        }
        let until = match left {
            Deadline::At(at) => at.min(now + lease.max(pool_agent_api::grant::LONGEST)),
            // From an agent that was in no cell: as if the lease were renewed now.
            Deadline::Never => now + lease,
        };
        self.0.rights().resumed(node, until, now);
        self.0.changed.notify_one();
        true
    }

    /// Whether a sandbox of the node may begin.
    pub fn admit(&self, node: &Node) -> Result<(), NoRight> {
        if self.0.lease.is_none() {
            return Ok(());
        }
        let mut rights = self.0.rights();
        let before = rights.next();
        rights.admit(node, BootTime::now())?;
        if rights.next() != before {
            self.0.changed.notify_one();
        }
        Ok(())
    }

    /// Until when the node's sandboxes may send and be sent to.
    pub fn deadline(&self, node: &Node) -> Deadline {
        match self.0.lease {
            Some(_) => Deadline::At(self.0.rights().until(node)),
            None => Deadline::Never,
        }
    }
}

/// Moves deadlines ahead and fences, for as long as the agent runs.
pub async fn keep(host: Host) {
    let fence = host.shop().fence.clone();
    let mut told: BTreeMap<SandboxKey, Deadline> = BTreeMap::new();
    if fence.0.lease.is_none() {
        // What an agent of a cell has left.
        while !tell(&host, &fence, &mut told).await {
            tokio::time::sleep(LOOK).await;
        }
        return;
    }
    let inner = fence.0.clone();
    loop {
        let over = inner.rights().look(BootTime::now());
        // In this order: the mesh first. What is over has its old deadline, which the
        // kernel may not have been told.
        let all = tell(&host, &fence, &mut told).await;
        for node in &over {
            tracing::warn!(
                tenant = %node.tenant, node = node.name,
                "neither the cell nor the virtual node has been heard of in time: its sandboxes are fenced"
            );
            host.fence(node);
            inner.rights().fenced(node, BootTime::now());
        }
        let next = inner.rights().next();
        // The end itself is still within the right.
        let due = next.map(|at| at.since(BootTime::now()) + Duration::from_millis(1));
        let wait = if all && over.is_empty() { LOOK } else { LOOK / 10 };
        tokio::select! {
            () = inner.changed.notified() => {}
            () = tokio::time::sleep(due.map_or(wait, |due| due.min(wait))) => {}
        }
    }
}

/// Tells the kernel what it does not know yet. False if it may not have heard.
async fn tell(host: &Host, fence: &Fence, told: &mut BTreeMap<SandboxKey, Deadline>) -> bool {
    let wanted = host.unfenced(|node| fence.deadline(node));
    told.retain(|key, _| wanted.contains_key(key));
    let new: Vec<(SandboxKey, Deadline)> = wanted
        .into_iter()
        .filter(|(key, deadline)| told.get(key) != Some(deadline))
        .collect();
    if new.is_empty() {
        return true;
    }
    match tokio::time::timeout(PATIENCE, host.shop().mesh.set_deadlines(new.clone())).await {
        Ok(Ok(there)) => {
            // One that is not attached yet gets its deadline when it is, and the next here.
            told.extend(new.into_iter().filter(|(key, _)| there.contains(key)));
            true
        }
        Ok(Err(error)) => {
            tracing::warn!(error = described(&error), "the kernel was not told of deadlines");
            false
        }
        Err(_) => {
            tracing::warn!("the kernel was not told of deadlines in time");
            false
        }
    }
}

impl Node {
    pub fn new(tenant: &TenantId, name: &str) -> Self {
        Self {
            tenant: tenant.clone(),
            name: name.to_owned(),
        }
    }
}
