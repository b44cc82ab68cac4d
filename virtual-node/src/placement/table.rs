//! Best fit over a static list of hosts. Pure.
//!
//! What always holds:
//! - the room granted on a host never exceeds what the host has, less what
//!   others take of it (the host's agent still has the last word);
//! - a host that says it is short of something gets nothing new;
//! - of the hosts with room, the one with the fewest pods of the same owner is
//!   taken, then the fullest, then the first by name;
//! - a claim is answered as soon as there is room, older claims first; a claim
//!   that fits no host even when it is empty is answered at once.

use std::collections::{BTreeMap, BTreeSet};

use pool_agent_api::{HostName, PodUid, Resources};

use super::Ask;
use crate::pool::HostTable;

/// One of the amounts of a claim.
type Amount = fn(&Resources) -> u64;

/// What the node, or every host of the pool even when empty, has too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shortage {
    /// As in a kubelet's reasons: `cpu`, `memory`, `ephemeral-storage`, `pods`.
    pub(crate) resource: &'static str,
    pub(crate) requested: u64,
    /// By other pods of the node's quota; None: `capacity` is the largest host's.
    pub(crate) used: Option<u64>,
    pub(crate) capacity: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Room(HostName),
    Never(Shortage),
}

#[derive(Debug, Clone, Default)]
struct Host {
    reachable: bool,
    /// Short of something: it evicts pods, and would refuse this one.
    pressed: bool,
    /// None: never heard.
    allocatable: Option<Resources>,
    /// Taken by others than this table's pods, as of the host's last report.
    foreign: Resources,
}

#[derive(Debug, Clone)]
struct Claim {
    ask: Ask,
    /// None: it waits.
    host: Option<HostName>,
    /// Order of arrival.
    turn: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    hosts: BTreeMap<HostName, Host>,
    claims: BTreeMap<PodUid, Claim>,
    turns: u64,
    /// Hosts whose agent did not take a pod that fitted by this table.
    refusals: BTreeSet<(HostName, PodUid)>,
}

impl Table {
    pub(super) fn set_hosts(&mut self, table: &HostTable) -> Vec<(PodUid, Answer)> {
        self.hosts = table
            .iter()
            .map(|(name, view)| {
                let own = self.taken(name);
                let host = Host {
                    reachable: view.reachable,
                    pressed: view.host.as_ref().is_some_and(|h| h.pressure.any()),
                    allocatable: view.host.as_ref().map(|h| h.allocatable),
                    // What the host counts as taken and is not ours.
                    foreign: view
                        .host
                        .as_ref()
                        .map(|h| less(less(h.allocatable, h.free), own))
                        .unwrap_or_default(),
                };
                (name.clone(), host)
            })
            .collect();
        self.serve()
    }

    pub(super) fn claim(&mut self, pod: PodUid, ask: Ask) -> Vec<(PodUid, Answer)> {
        self.turns += 1;
        let claim = Claim {
            ask,
            host: None,
            turn: self.turns,
        };
        self.claims.insert(pod, claim);
        self.serve()
    }

    pub(super) fn hold(&mut self, pod: PodUid, ask: Ask, host: HostName) -> Vec<(PodUid, Answer)> {
        self.turns += 1;
        let claim = Claim {
            ask,
            host: Some(host),
            turn: self.turns,
        };
        let before = self.claims.insert(pod, claim);
        // Something may have become free by the move.
        if before.is_some_and(|c| c.host.is_some()) {
            self.serve()
        } else {
            vec![]
        }
    }

    pub(super) fn release(&mut self, pod: &PodUid) -> Vec<(PodUid, Answer)> {
        match self.claims.remove(pod) {
            Some(claim) if claim.host.is_some() => self.serve(),
            _ => vec![],
        }
    }

    /// The host's agent did not take the pod: it is not asked again before
    /// [`Self::retry`].
    pub(super) fn refused(&mut self, pod: &PodUid, host: HostName) -> Vec<(PodUid, Answer)> {
        self.refusals.insert((host, pod.clone()));
        self.release(pod)
    }

    pub(super) fn retry(&mut self) -> Vec<(PodUid, Answer)> {
        self.refusals.clear();
        self.serve()
    }

    /// Answers the waiting claims that can be answered, oldest first.
    fn serve(&mut self) -> Vec<(PodUid, Answer)> {
        let mut waiting: Vec<(u64, PodUid)> = self
            .claims
            .iter()
            .filter(|(_, c)| c.host.is_none())
            .map(|(pod, c)| (c.turn, pod.clone()))
            .collect();
        waiting.sort();
        let mut answers = vec![];
        for (_, pod) in waiting {
            let Some(claim) = self.claims.get(&pod) else {
                continue;
            };
            if let Some(host) = self.best(&pod, &claim.ask) {
                if let Some(claim) = self.claims.get_mut(&pod) {
                    claim.host = Some(host.clone());
                }
                answers.push((pod, Answer::Room(host)));
            } else if let Some(shortage) = self.never(&claim.ask.claim) {
                self.claims.remove(&pod);
                answers.push((pod, Answer::Never(shortage)));
            }
        }
        answers
    }

    fn best(&self, pod: &PodUid, ask: &Ask) -> Option<HostName> {
        self.hosts
            .iter()
            .filter(|(_, host)| host.reachable && !host.pressed)
            .filter(|(name, _)| !self.refusals.contains(&((*name).clone(), pod.clone())))
            .filter_map(|(name, host)| {
                let free = less(less(host.allocatable?, host.foreign), self.taken(name));
                let left = free.checked_sub(ask.claim)?;
                let siblings = match &ask.owner {
                    Some(owner) => self
                        .on(name)
                        .filter(|c| c.ask.owner.as_ref() == Some(owner))
                        .count(),
                    None => 0,
                };
                Some((
                    siblings,
                    (left.sandboxes, left.memory_bytes, left.cpu_millis),
                    name,
                ))
            })
            .min()
            .map(|(_, _, name)| name.clone())
    }

    /// What is short on every host, once all hosts have said what they have.
    fn never(&self, claim: &Resources) -> Option<Shortage> {
        let capacities: Option<Vec<Resources>> = self.hosts.values().map(|h| h.allocatable).collect();
        let capacities = capacities?;
        if capacities.iter().any(|c| c.checked_sub(*claim).is_some()) {
            return None;
        }
        let largest = |of: Amount| capacities.iter().map(of).max().unwrap_or(0);
        let kinds: [(&'static str, Amount); 4] = [
            ("cpu", |r| r.cpu_millis),
            ("memory", |r| r.memory_bytes),
            ("ephemeral-storage", |r| r.ephemeral_storage_bytes),
            ("pods", |r| u64::from(r.sandboxes)),
        ];
        let shortage = |(resource, of): (&'static str, Amount)| Shortage {
            resource,
            requested: of(claim),
            used: None,
            capacity: largest(of),
        };
        // No single amount may be too much, only their combination: name the
        // one that comes closest.
        let shortages: Vec<Shortage> = kinds.into_iter().map(shortage).collect();
        shortages
            .iter()
            .copied()
            .find(|s| s.requested > s.capacity)
            .or_else(|| {
                shortages
                    .iter()
                    .copied()
                    .max_by_key(|s| s.requested.saturating_mul(1000) / s.capacity.max(1))
            })
    }

    fn on<'a>(&'a self, host: &'a HostName) -> impl Iterator<Item = &'a Claim> + 'a {
        self.claims
            .values()
            .filter(move |c| c.host.as_ref() == Some(host))
    }

    fn taken(&self, host: &HostName) -> Resources {
        self.on(host).fold(Resources::default(), |sum, claim| {
            sum.saturating_add(claim.ask.claim)
        })
    }
}

fn less(from: Resources, what: Resources) -> Resources {
    Resources {
        cpu_millis: from.cpu_millis.saturating_sub(what.cpu_millis),
        memory_bytes: from.memory_bytes.saturating_sub(what.memory_bytes),
        ephemeral_storage_bytes: from
            .ephemeral_storage_bytes
            .saturating_sub(what.ephemeral_storage_bytes),
        sandboxes: from.sandboxes.saturating_sub(what.sandboxes),
    }
}

#[cfg(test)]
mod tests;
