//! Until when the sandboxes of each virtual node may run on this host, and which of
//! them have to be fenced. Pure; [`crate::fence`] tells it and does what it says.
//!
//! ```text
//!            renewed, granted                   neither is live any more
//!  Idle ───────────────────────▶ Live ──(again)──▶ … ───────────────▶ Over
//!    ▲                                                                  │
//!    └──────────────────── fenced: nothing of it may run ◀──────────────┘
//! ```
//!
//! What always holds:
//! - a node's sandboxes may run while the host's Lease in the cell *or* a grant of the
//!   node's own is live, and no longer;
//! - what was over stays so: a renewal or a grant that comes after the end saves no
//!   sandbox that was here at the end, only those that come later;
//! - a grant of an earlier epoch than the node's last is refused.

use std::collections::BTreeMap;

use mesh_runtime::redirect::BootTime;
use pool_agent_api::{Epoch, TenantId};

/// Virtual nodes of one tenant that this host remembers; those that have nothing to
/// run here go first. A tenant has one for each zone and class.
const NODES_PER_TENANT: usize = 16;

/// Whose grants count for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    pub tenant: TenantId,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefused {
    #[error("epoch {epoch} of the node has been succeeded by {newest}")]
    EarlierEpoch { epoch: Epoch, newest: Epoch },
    #[error("the tenant's nodes that grant on this host are {NODES_PER_TENANT} already")]
    TooManyNodes,
}

/// The sandbox may not begin now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither the host's lease in the cell nor a grant of the sandbox's virtual node is live")]
pub struct NoRight;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing may run.
    Idle,
    Live,
    /// What is here is to be fenced; it could run until then.
    Over(BootTime),
}

#[derive(Debug, Clone)]
struct Held {
    state: State,
    epoch: Option<Epoch>,
    /// The end of the last grant; of what an earlier agent left, its end.
    granted: BootTime,
}

#[derive(Debug)]
pub struct Rights {
    /// The end of the Lease.
    lease: BootTime,
    nodes: BTreeMap<Node, Held>,
}

const NEVER: BootTime = BootTime::since_boot(std::time::Duration::ZERO);

impl Default for Rights {
    fn default() -> Self {
        Self {
            lease: NEVER,
            nodes: BTreeMap::new(),
        }
    }
}

impl Rights {
    /// The Lease holds until then. The end of an earlier renewal may come later.
    pub fn renewed(&mut self, until: BootTime, now: BootTime) {
        self.look(now);
        self.lease = self.lease.max(until);
        for held in self.nodes.values_mut() {
            held.revive(self.lease, now);
        }
    }

    pub fn granted(
        &mut self,
        node: &Node,
        epoch: Epoch,
        until: BootTime,
        now: BootTime,
    ) -> Result<(), GrantRefused> {
        self.look(now);
        if !self.nodes.contains_key(node) {
            self.make_room_for(&node.tenant)?;
        }
        let lease = self.lease;
        let held = self.held(node);
        if let Some(newest) = held.epoch.filter(|newest| *newest > epoch) {
            return Err(GrantRefused::EarlierEpoch { epoch, newest });
        }
        // A later process counts from its own grants.
        held.epoch = Some(epoch);
        held.granted = held.granted.max(until);
        held.revive(lease, now);
        Ok(())
    }

    /// An earlier agent left sandboxes of the node, which may run until then.
    pub fn resumed(&mut self, node: &Node, until: BootTime, now: BootTime) {
        let lease = self.lease;
        let held = self.held(node);
        held.granted = held.granted.max(until);
        held.revive(lease, now);
    }

    /// Whether a sandbox of the node may begin.
    pub fn admit(&mut self, node: &Node, now: BootTime) -> Result<(), NoRight> {
        self.look(now);
        let lease = self.lease;
        let held = self.held(node);
        held.revive(lease, now);
        match held.state {
            State::Live => Ok(()),
            State::Idle | State::Over(_) => Err(NoRight),
        }
    }

    /// Nodes whose sandboxes are to be fenced; until [`Self::fenced`] is told so they are
    /// named again.
    pub fn look(&mut self, now: BootTime) -> Vec<Node> {
        let mut over = vec![];
        for (node, held) in &mut self.nodes {
            let until = held.granted.max(self.lease);
            if held.state == State::Live && until < now {
                held.state = State::Over(until);
            }
            if matches!(held.state, State::Over(_)) {
                over.push(node.clone());
            }
        }
        over
    }

    /// Every sandbox of the node that was here has been fenced.
    pub fn fenced(&mut self, node: &Node, now: BootTime) {
        let lease = self.lease;
        if let Some(held) = self.nodes.get_mut(node) {
            if matches!(held.state, State::Over(_)) {
                held.state = State::Idle;
            }
            held.revive(lease, now);
        }
    }

    /// Until when the node's sandboxes may run.
    pub fn until(&self, node: &Node) -> BootTime {
        match self.nodes.get(node) {
            Some(held) => match held.state {
                State::Over(at) => at,
                State::Live => held.granted.max(self.lease),
                State::Idle => NEVER,
            },
            None => NEVER,
        }
    }

    /// The next time at which something is over.
    pub fn next(&self) -> Option<BootTime> {
        self.nodes
            .values()
            .filter(|held| held.state == State::Live)
            .map(|held| held.granted.max(self.lease))
            .min()
    }

    fn held(&mut self, node: &Node) -> &mut Held {
        self.nodes.entry(node.clone()).or_insert(Held {
            state: State::Idle,
            epoch: None,
            granted: NEVER,
        })
    }

    fn make_room_for(&mut self, tenant: &TenantId) -> Result<(), GrantRefused> {
        let of_tenant = |(node, _): &(&Node, &Held)| node.tenant == *tenant;
        if self.nodes.iter().filter(of_tenant).count() < NODES_PER_TENANT {
            return Ok(());
        }
        let oldest = self
            .nodes
            .iter()
            .filter(of_tenant)
            .filter(|(_, held)| held.state == State::Idle)
            .min_by_key(|(_, held)| held.granted)
            .map(|(node, _)| node.clone());
        let oldest = oldest.ok_or(GrantRefused::TooManyNodes)?;
        self.nodes.remove(&oldest);
        Ok(())
    }
}

impl Held {
    /// What is over has to be fenced first.
    fn revive(&mut self, lease: BootTime, now: BootTime) {
        if self.state == State::Idle && self.granted.max(lease) >= now {
            self.state = State::Live;
        }
    }
}

#[cfg(test)]
mod tests;
