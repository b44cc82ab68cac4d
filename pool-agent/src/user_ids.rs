//! Which of the host's user and group ids belong to which pod. Pure; [`crate::host`]
//! asks when it admits a sandbox, keeps the answer in the ledger's entry, and gives
//! the ids back when no process of the sandbox is left.
//!
//! A pod's processes are 0 to 65535 to themselves and a range of nobody else's to the
//! host: a file or a process of another pod, or of the host, is not theirs even for
//! root in the pod. Ranges are given in turn, as addresses are, so that one just given
//! back is the last to come again.

use std::collections::{BTreeSet, HashMap};

use pool_agent_api::SandboxKey;

use crate::policy::privilege::{IDS_OF_A_POD, UserIds};

/// One pod's ids on the host: `first` and the 65535 after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdRange {
    pub first: u32,
}

#[derive(Debug)]
pub struct IdRanges {
    of_the_host: UserIds,
    held: BTreeSet<IdRange>,
    by_sandbox: HashMap<SandboxKey, IdRange>,
    /// The last range given, counted from the host's first.
    last: u32,
}

impl IdRanges {
    pub fn new(of_the_host: UserIds) -> Self {
        Self {
            of_the_host,
            held: BTreeSet::new(),
            by_sandbox: HashMap::new(),
            last: of_the_host.pods - 1,
        }
    }

    /// The next free range; None if there is none.
    pub fn take(&mut self, key: &SandboxKey) -> Option<IdRange> {
        // At most `held` ranges are passed over before one is free.
        for step in 1..=self.held.len() + 1 {
            let step = u32::try_from(step).ok()?;
            if step > self.of_the_host.pods {
                return None;
            }
            let number = (self.last + step) % self.of_the_host.pods;
            let range = IdRange {
                first: self.of_the_host.first + number * IDS_OF_A_POD,
            };
            if self.held.insert(range) {
                self.last = number;
                self.by_sandbox.insert(key.clone(), range);
                return Some(range);
            }
        }
        None
    }

    /// Puts back what the ledger holds. That a stopped sandbox gave its range back is
    /// not in there; that a later one was given it is: call in the order of admission.
    pub fn restore(&mut self, key: &SandboxKey, range: IdRange) {
        self.by_sandbox.retain(|_, known| *known != range);
        self.held.insert(range);
        self.by_sandbox.insert(key.clone(), range);
        let number = range.first.checked_sub(self.of_the_host.first);
        // One of an older configuration says nothing of where the next is.
        if let Some(number) = number.map(|ids| ids / IDS_OF_A_POD)
            && number < self.of_the_host.pods
        {
            self.last = number;
        }
    }

    /// Fine if it holds none.
    pub fn give_back(&mut self, key: &SandboxKey) {
        if let Some(range) = self.by_sandbox.remove(key) {
            self.held.remove(&range);
        }
    }
}

#[cfg(test)]
mod tests {
    use pool_agent_api::Attempt;
    use proptest::prelude::*;

    use super::*;

    fn key(pod: usize) -> SandboxKey {
        SandboxKey {
            pod: format!("pod-{pod}").parse().unwrap(),
            attempt: Attempt::FIRST,
        }
    }

    const FOUR: UserIds = UserIds {
        first: 1 << 20,
        pods: 4,
    };

    #[test]
    fn a_range_given_back_is_the_last_to_come_again() {
        let mut ranges = IdRanges::new(FOUR);
        let first = ranges.take(&key(0)).unwrap();
        assert_eq!(first.first, 1 << 20);
        ranges.give_back(&key(0));
        let others: Vec<_> = (1..=5).map(|n| ranges.take(&key(n))).collect();
        assert_eq!(others.iter().flatten().count(), 4);
        assert_eq!(others[3], Some(first));
        assert_eq!(others[4], None);
    }

    #[test]
    fn what_the_ledger_holds_is_not_given_again_after_a_restart() {
        let mut before = IdRanges::new(FOUR);
        let (a, b) = (before.take(&key(1)).unwrap(), before.take(&key(2)).unwrap());
        let mut ranges = IdRanges::new(FOUR);
        // A sandbox that has stopped, whose range a later one was given.
        ranges.restore(&key(0), a);
        ranges.restore(&key(1), a);
        ranges.restore(&key(2), b);
        ranges.give_back(&key(0));
        let next = ranges.take(&key(3)).unwrap();
        assert!(next != a && next != b && next > b, "{next:?}");
        // One of a configuration that was another.
        ranges.restore(&key(4), IdRange { first: 1 << 30 });
        assert!(ranges.take(&key(5)).is_some());
        assert_eq!(ranges.take(&key(6)), None);
    }

    proptest! {
        #[test]
        fn no_two_pods_have_an_id_in_common(
            steps in proptest::collection::vec((0_usize..12, any::<bool>()), 1..200),
        ) {
            let mut ranges = IdRanges::new(FOUR);
            let mut living: HashMap<usize, IdRange> = HashMap::new();
            for (pod, take) in steps {
                if take && !living.contains_key(&pod) {
                    match ranges.take(&key(pod)) {
                        Some(range) => {
                            let offset = range.first - FOUR.first;
                            prop_assert_eq!(offset % IDS_OF_A_POD, 0);
                            prop_assert!(offset / IDS_OF_A_POD < FOUR.pods);
                            prop_assert!(living.values().all(|other| *other != range));
                            living.insert(pod, range);
                        }
                        None => prop_assert_eq!(living.len(), 4),
                    }
                } else if !take {
                    ranges.give_back(&key(pod));
                    living.remove(&pod);
                }
            }
        }
    }
}
