//! Whose pull is next. Pure; [`super::pulls`] does what it grants.
//!
//! What always holds:
//! - a tenant that pulls nothing has its next pull begun at once, whatever the others
//!   do: a tenant's first is its own, and what it pulls beside that shares the host's;
//! - what is shared goes round the tenants that wait, one each;
//! - no tenant has more than its own share, running or waiting.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::policy::images::Pulls;

/// One pull that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The tenant has as many that wait as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} other images of the tenant wait to be pulled on this host already")]
pub struct Full(pub usize);

#[derive(Debug)]
pub struct Turns<T> {
    bounds: Pulls,
    /// Tenants of which something waits or runs.
    tenants: BTreeMap<T, Share>,
    owners: HashMap<Ticket, T>,
    /// Tenants that wait, the next first.
    round: VecDeque<T>,
    running: usize,
}

#[derive(Debug, Default)]
struct Share {
    running: BTreeSet<Ticket>,
    waiting: VecDeque<Ticket>,
}

impl<T: Ord + Clone> Turns<T> {
    pub fn new(bounds: Pulls) -> Self {
        Self {
            bounds,
            tenants: BTreeMap::new(),
            owners: HashMap::new(),
            round: VecDeque::new(),
            running: 0,
        }
    }

    pub fn running(&self) -> usize {
        self.running
    }

    pub fn waiting(&self) -> usize {
        self.owners.len() - self.running
    }

    /// Joins the tenant's queue. It begins when [`Self::grant`] names it.
    pub fn ask(&mut self, tenant: &T, ticket: Ticket) -> Result<(), Full> {
        let share = self.tenants.entry(tenant.clone()).or_default();
        // What has just come and could begin at once is no one that waits.
        let most = self.bounds.waiting_per_tenant;
        if share.waiting.len() >= most {
            return Err(Full(most));
        }
        if share.waiting.is_empty() {
            self.round.push_back(tenant.clone());
        }
        share.waiting.push_back(ticket);
        self.owners.insert(ticket, tenant.clone());
        Ok(())
    }

    /// The next to begin, which counts as running from now on.
    pub fn grant(&mut self) -> Option<Ticket> {
        let shared: usize = self
            .tenants
            .values()
            .map(|share| share.running.len().saturating_sub(1))
            .sum();
        let may = |share: &Share| {
            share.running.is_empty()
                || (share.running.len() < self.bounds.per_tenant && shared < self.bounds.per_host)
        };
        let at = self
            .round
            .iter()
            .position(|tenant| self.tenants.get(tenant).is_some_and(may))?;
        let tenant = self.round.remove(at)?;
        let share = self.tenants.get_mut(&tenant)?;
        let ticket = share.waiting.pop_front()?;
        share.running.insert(ticket);
        self.running += 1;
        if !share.waiting.is_empty() {
            self.round.push_back(tenant);
        }
        Some(ticket)
    }

    /// It is over, or nobody wants it any more.
    pub fn leave(&mut self, ticket: Ticket) {
        let Some(tenant) = self.owners.remove(&ticket) else {
            return;
        };
        let Some(share) = self.tenants.get_mut(&tenant) else {
            return;
        };
        if share.running.remove(&ticket) {
            self.running -= 1;
        }
        share.waiting.retain(|waiting| *waiting != ticket);
        let (idle, none_wait) = (
            share.running.is_empty() && share.waiting.is_empty(),
            share.waiting.is_empty(),
        );
        if none_wait {
            self.round.retain(|waits| *waits != tenant);
        }
        if idle {
            self.tenants.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn bounds(per_tenant: usize, per_host: usize, waiting_per_tenant: usize) -> Pulls {
        Pulls {
            per_tenant,
            per_host,
            waiting_per_tenant,
            longest: Duration::from_secs(1),
        }
    }

    fn granted(turns: &mut Turns<u8>) -> Vec<u64> {
        std::iter::from_fn(|| turns.grant()).map(|t| t.0).collect()
    }

    #[test]
    fn a_hundred_pulls_of_one_tenant_hold_up_no_other() {
        let mut turns = Turns::new(bounds(5, 4, 200));
        for n in 0..100 {
            turns.ask(&0, Ticket(n)).unwrap();
        }
        assert_eq!(granted(&mut turns), [0, 1, 2, 3, 4]);
        // The host's share is full, and yet.
        turns.ask(&1, Ticket(100)).unwrap();
        turns.ask(&1, Ticket(101)).unwrap();
        assert_eq!(granted(&mut turns), [100]);
        // What comes free goes round.
        turns.leave(Ticket(0));
        assert_eq!(granted(&mut turns), [5]);
        turns.leave(Ticket(1));
        assert_eq!(granted(&mut turns), [101]);
    }

    #[test]
    fn a_tenant_beyond_its_share_is_refused_alone() {
        let mut turns = Turns::new(bounds(1, 1, 2));
        assert_eq!(turns.ask(&0, Ticket(0)), Ok(()));
        turns.grant().unwrap();
        assert_eq!(turns.ask(&0, Ticket(1)), Ok(()));
        assert_eq!(turns.ask(&0, Ticket(2)), Ok(()));
        assert_eq!(turns.ask(&0, Ticket(3)), Err(Full(2)));
        assert_eq!(turns.ask(&1, Ticket(4)), Ok(()));
        // The refused one is nowhere.
        turns.leave(Ticket(3));
        assert_eq!((turns.running(), turns.waiting()), (1, 3));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(u8),
        Leave(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0u8..5).prop_map(Step::Ask),
            2 => any::<usize>().prop_map(Step::Leave),
        ]
    }

    proptest! {
        #[test]
        fn no_share_is_exceeded_nobody_starves_and_no_place_is_lost(
            steps in prop::collection::vec(step(), 1..200),
            per_tenant in 1usize..4,
            per_host in 1usize..6,
            waiting in 1usize..8,
        ) {
            let mut turns = Turns::new(bounds(per_tenant, per_host, waiting));
            let mut there: Vec<(u8, Ticket)> = vec![];
            let mut running: BTreeSet<Ticket> = BTreeSet::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Ask(tenant) => {
                        let ticket = Ticket(next);
                        next += 1;
                        if turns.ask(&tenant, ticket).is_ok() {
                            there.push((tenant, ticket));
                        }
                    }
                    Step::Leave(at) if !there.is_empty() => {
                        let (_, ticket) = there.remove(at % there.len());
                        running.remove(&ticket);
                        turns.leave(ticket);
                    }
                    Step::Leave(_) => {}
                }
                while let Some(ticket) = turns.grant() {
                    let owner = there.iter().find(|(_, t)| *t == ticket);
                    prop_assert!(owner.is_some(), "granted to one that has left");
                    // In its own tenant's order.
                    let first = there.iter().find(|(t, ticket)| {
                        Some(t) == owner.map(|(t, _)| t) && !running.contains(ticket)
                    });
                    prop_assert_eq!(first.map(|(_, t)| *t), Some(ticket));
                    prop_assert!(running.insert(ticket), "granted twice");
                }
                let mut shared = 0;
                let mut short = false;
                for tenant in 0..5u8 {
                    let own = there.iter().filter(|(t, _)| *t == tenant).count();
                    let runs = there.iter().filter(|(t, k)| *t == tenant && running.contains(k)).count();
                    prop_assert!(runs <= per_tenant);
                    prop_assert!(own - runs <= waiting);
                    prop_assert!(own == 0 || runs > 0, "a tenant with nothing running waits");
                    shared += runs.saturating_sub(1);
                    short |= own > runs && runs < per_tenant;
                }
                prop_assert!(shared <= per_host);
                prop_assert!(!short || shared == per_host, "something waits though there is room");
                prop_assert_eq!(turns.running(), running.len());
                prop_assert_eq!(turns.waiting(), there.len() - running.len());
            }
        }

        #[test]
        fn what_is_shared_goes_to_each_that_waits_in_turn(tenants in 2u8..6, freed in 1usize..30) {
            let mut turns = Turns::new(bounds(100, 3, 200));
            let mut number = 0;
            for tenant in 0..tenants {
                for _ in 0..100 {
                    turns.ask(&tenant, Ticket(u64::from(tenant) * 1000 + number)).unwrap();
                    number += 1;
                }
            }
            let mut running: VecDeque<u64> = granted(&mut turns).into();
            // Everybody's first is running; one of the shared ones ends again and again.
            let mut counts = vec![0usize; tenants.into()];
            for _ in 0..freed {
                let ends = running.pop_back().unwrap();
                turns.leave(Ticket(ends));
                for ticket in granted(&mut turns) {
                    counts[usize::try_from(ticket / 1000).unwrap()] += 1;
                    running.push_back(ticket);
                }
            }
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            prop_assert!(most - least <= 1 + usize::from(freed == 0), "{counts:?}");
        }
    }
}
