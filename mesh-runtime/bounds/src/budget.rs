//! Places, shared out among accounts within accounts. Pure.
//!
//! ```text
//!  host: capacity ─┬─ promised: so many places to each of so many accounts
//!                  └─ common ── tenant ─┬─ pod ─┬─ outbound
//!                                       │       └─ inbound ─┬─ peer
//!                                       └─ pod …            └─ peer …
//! ```
//!
//! Two rules, the same at every level:
//!
//! - **A promise is kept.** The first places that an account takes, up to its
//!   [`Rule::promised`], come from what was set aside for it. Nobody else can have
//!   had them.
//! - **Who takes leaves.** Beyond its promise an account gets one more only while it
//!   holds less of the common part than [`Rule::greed`] times what is left for it and
//!   its siblings. So one that is alone may use most of what is idle, those who come
//!   after it find some, and the more want it the less each may have. (Choudhury and
//!   Hahne's dynamic thresholds, as switches share their buffers.)
//!
//! What always holds: no more places are held than there are; no account goes beyond
//! its limit; a promise is never refused while those who were promised are not more
//! than was said.

use std::{collections::HashMap, hash::Hash};

use crate::Level;

/// What an account may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Places set aside for it alone. To be counted in [`Budget::new`].
    pub promised: u32,
    /// It never holds more.
    pub limit: u32,
    /// How many times what it leaves it may hold of the common part.
    pub greed: u32,
}

impl Rule {
    /// As much as it leaves to its siblings.
    pub const FAIR: Self = Self {
        promised: 0,
        limit: u32::MAX,
        greed: 1,
    };
}

/// An account on the way from the host to who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step<K> {
    pub key: K,
    /// What a refusal for its share is called.
    pub level: Level,
    pub rule: Rule,
}

#[derive(Debug)]
pub struct Budget<K> {
    capacity: u32,
    /// Of the capacity, what is set aside.
    promised: u32,
    /// All that is held, and what of it is of the common part.
    held: u32,
    common: u32,
    accounts: HashMap<K, u32>,
}

impl<K: Eq + Hash + Clone> Budget<K> {
    /// `capacity` places, of which `promised` in all are set aside for the promises
    /// of accounts that may come.
    pub fn new(capacity: u32, promised: u32) -> Self {
        Self {
            capacity,
            promised: promised.min(capacity),
            held: 0,
            common: 0,
            accounts: HashMap::new(),
        }
    }

    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Places that are held now.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// What an account holds.
    pub fn holds(&self, key: &K) -> u32 {
        self.accounts.get(key).copied().unwrap_or(0)
    }

    /// Takes a place for the last account of `path`, each within the one before it.
    /// Nothing is taken when the answer is a refusal. An account's path and rules
    /// must be the same each time.
    pub fn take(&mut self, path: &[Step<K>]) -> Result<(), Level> {
        if self.held >= self.capacity {
            return Err(Level::Host);
        }
        let mut room = self.capacity - self.promised - self.common;
        let mut used_up = (room == 0).then_some(Level::Host);
        for Step { key, level, rule } in path {
            let holds = self.holds(key);
            let beyond = holds.saturating_sub(rule.promised);
            let left = u64::from(rule.greed) * u64::from(room);
            // What it could take until what it holds is `greed` times what it leaves.
            let more = left
                .saturating_sub(beyond.into())
                .div_ceil(1 + u64::from(rule.greed));
            let kept = rule.promised.saturating_sub(holds);
            let could = u64::from(kept).saturating_add(more.min(room.into()));
            let within = rule.limit.saturating_sub(holds);
            let before = room;
            room = u32::try_from(could).unwrap_or(u32::MAX).min(within);
            used_up = match used_up {
                _ if room > 0 => None,
                _ if within == 0 => Some(*level),
                // There was nothing for anybody.
                Some(above) if before == 0 => Some(above),
                _ => Some(*level),
            };
        }
        if let Some(level) = used_up {
            return Err(level);
        }
        self.held += 1;
        self.common += u32::from(!self.charge(path, |holds, promised| {
            *holds += 1;
            *holds <= promised
        }));
        Ok(())
    }

    /// Gives back what [`Self::take`] took.
    pub fn release(&mut self, path: &[Step<K>]) {
        self.held = self.held.saturating_sub(1);
        let kept = self.charge(path, |holds, promised| {
            let of_the_promise = *holds <= promised;
            *holds = holds.saturating_sub(1);
            of_the_promise
        });
        self.common = self.common.saturating_sub(u32::from(!kept));
        for step in path {
            if self.holds(&step.key) == 0 {
                self.accounts.remove(&step.key);
            }
        }
        // A map keeps the room of its best days.
        if self.accounts.capacity() > 1024 && self.accounts.len() < self.accounts.capacity() / 8 {
            self.accounts.shrink_to_fit();
        }
    }

    /// From the last account upwards, as far as the place is not of an account's own
    /// promise. Whether it was.
    fn charge(&mut self, path: &[Step<K>], mut change: impl FnMut(&mut u32, u32) -> bool) -> bool {
        path.iter().rev().any(|step| {
            let holds = self.accounts.entry(step.key.clone()).or_default();
            change(holds, step.rule.promised)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Account {
        Tenant(u8),
        Pod(u8),
        Peer(u8, u8),
    }

    const PODS: u8 = 6;
    const CAPACITY: u32 = 120;
    const PROMISED: u32 = 5;
    const LIMIT: u32 = 70;

    const POD: Rule = Rule {
        promised: PROMISED,
        limit: LIMIT,
        greed: 1,
    };
    const TENANT: Rule = Rule {
        promised: 0,
        limit: u32::MAX,
        greed: 4,
    };

    /// Pods 0, 2, 4 are one tenant's, the others the other's.
    fn pod(pod: u8) -> Vec<Step<Account>> {
        vec![
            Step {
                key: Account::Tenant(pod % 2),
                level: Level::Tenant,
                rule: TENANT,
            },
            Step {
                key: Account::Pod(pod),
                level: Level::Pod,
                rule: POD,
            },
        ]
    }

    fn peer(of: u8, peer: u8) -> Vec<Step<Account>> {
        let mut path = pod(of);
        path.push(Step {
            key: Account::Peer(of, peer),
            level: Level::Peer,
            rule: Rule::FAIR,
        });
        path
    }

    fn budget() -> Budget<Account> {
        Budget::new(CAPACITY, PROMISED * u32::from(PODS))
    }

    fn take_all(budget: &mut Budget<Account>, path: &[Step<Account>]) -> (u32, Level) {
        for n in 0.. {
            if let Err(level) = budget.take(path) {
                return (n, level);
            }
        }
        unreachable!("a budget ends")
    }

    #[test]
    fn a_pod_that_is_alone_uses_much_of_what_is_idle_and_leaves_the_rest() {
        let mut budget = budget();
        // 90 are common: a tenant may have four fifths of them, a pod half of that.
        let (alone, level) = take_all(&mut budget, &pod(0));
        assert_eq!((alone, level), (PROMISED + 36, Level::Pod));
        let (second, _) = take_all(&mut budget, &pod(2));
        assert_eq!(second, PROMISED + 18);
        let (other_tenant, level) = take_all(&mut budget, &pod(1));
        assert!(other_tenant > PROMISED, "{other_tenant}");
        assert_eq!(level, Level::Pod);
    }

    #[test]
    fn a_refusal_names_the_level_whose_share_is_used_up() {
        let limited = |promised, limit, greed| Rule {
            promised,
            limit,
            greed,
        };
        let path = |tenant, pod| {
            [
                Step {
                    key: 't',
                    level: Level::Tenant,
                    rule: tenant,
                },
                Step {
                    key: 'p',
                    level: Level::Pod,
                    rule: pod,
                },
            ]
        };
        let refused = |capacity, tenant, pod| {
            let mut budget = Budget::new(capacity, 0);
            let path = path(tenant, pod);
            (0..=capacity).find_map(|_| budget.take(&path).err())
        };
        let all = limited(0, u32::MAX, 1000);
        assert_eq!(refused(10, all, limited(0, 3, 1000)), Some(Level::Pod));
        assert_eq!(refused(10, limited(0, 3, 1000), all), Some(Level::Tenant));
        assert_eq!(refused(10, all, all), Some(Level::Host));
        assert_eq!(refused(10, all, Rule::FAIR), Some(Level::Pod));
    }

    #[test]
    fn what_one_peer_takes_of_a_pod_leaves_as_much_to_the_others() {
        let mut budget = budget();
        let (first, level) = take_all(&mut budget, &peer(0, 0));
        assert_eq!(level, Level::Peer);
        assert!(budget.take(&peer(0, 1)).is_ok());
        assert!(budget.holds(&Account::Pod(0)) > first);
    }

    #[derive(Debug, Clone)]
    enum Turn {
        Take(u8, Option<u8>),
        Release(usize),
    }

    fn turns() -> impl Strategy<Value = Vec<Turn>> {
        let turn = prop_oneof![
            3 => (0..PODS, prop::option::of(0..3_u8)).prop_map(|(pod, peer)| Turn::Take(pod, peer)),
            // One who wants everything.
            3 => Just(Turn::Take(0, None)),
            2 => any::<usize>().prop_map(Turn::Release),
        ];
        prop::collection::vec(turn, 0..600)
    }

    proptest! {
        #[test]
        fn promises_are_kept_limits_hold_and_all_comes_back(turns in turns()) {
            let mut budget = budget();
            let mut held: Vec<Vec<Step<Account>>> = vec![];
            for turn in turns {
                match turn {
                    Turn::Take(of, by) => {
                        let path = by.map_or_else(|| pod(of), |by| peer(of, by));
                        let before = budget.holds(&Account::Pod(of));
                        let common = CAPACITY - PROMISED * u32::from(PODS) - budget.common;
                        match budget.take(&path) {
                            Ok(()) => {
                                let after = budget.holds(&Account::Pod(of));
                                prop_assert_eq!(after, before + 1);
                                // Who takes leaves.
                                if after > PROMISED {
                                    prop_assert!(before - PROMISED < common);
                                }
                                held.push(path);
                            }
                            Err(level) => {
                                // A peer's own share apart, a promise is a promise.
                                prop_assert!(before >= PROMISED || level == Level::Peer, "{before} {level}");
                            }
                        }
                    }
                    Turn::Release(which) if !held.is_empty() => {
                        let path = held.swap_remove(which % held.len());
                        budget.release(&path);
                    }
                    Turn::Release(_) => {}
                }
                prop_assert!(budget.held() <= CAPACITY);
                prop_assert_eq!(budget.held() as usize, held.len());
                for of in 0..PODS {
                    prop_assert!(budget.holds(&Account::Pod(of)) <= LIMIT);
                }
            }
            // Whoever holds less than was promised gets it, whatever the others hold.
            for of in 0..PODS {
                for _ in budget.holds(&Account::Pod(of))..PROMISED {
                    prop_assert_eq!(budget.take(&pod(of)), Ok(()));
                    held.push(pod(of));
                }
            }
            for path in held {
                budget.release(&path);
            }
            prop_assert_eq!((budget.held(), budget.common), (0, 0));
            prop_assert!(budget.accounts.is_empty());
        }
    }
}
