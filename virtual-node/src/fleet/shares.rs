//! Which virtual nodes a replica holds. Pure.
//!
//! Each replica decides for itself, from what all see in the cell: it takes of those
//! that nobody has until it has its fair share, takes the rest after a pause in which
//! the others could have, and gives back, one at a time, what it has beyond its share.
//! Two that decide for the same one are told apart by its Lease.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

/// How long what is beyond the share is left to others.
pub(crate) const PAUSE: Duration = Duration::from_secs(5);

/// Who has a virtual node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Mine,
    /// A replica that lives.
    Others,
    /// Nobody, or one that is dead; for how long that has been seen.
    Free(Duration),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision<K> {
    pub(crate) take: Vec<K>,
    pub(crate) give: Option<K>,
}

/// What the replica `me` of `replicas` that live does now.
pub(crate) fn decide<K>(holds: &BTreeMap<K, Hold>, replicas: usize, me: &str) -> Decision<K>
where
    K: Ord + Clone + Hash,
{
    let share = holds.len().div_ceil(replicas.max(1));
    let mine: Vec<&K> = keys(holds, |hold| hold == Hold::Mine);
    // Each in an order of its own, so that two that begin together take others.
    let mut free = keys(holds, |hold| matches!(hold, Hold::Free(_)));
    free.sort_by_key(|key| preference(key, me));
    let room = share.saturating_sub(mine.len());
    let take = free
        .iter()
        .enumerate()
        .filter(|(i, key)| {
            *i < room || matches!(holds.get(**key), Some(Hold::Free(since)) if *since >= PAUSE)
        })
        .map(|(_, key)| (*key).clone())
        .collect();
    // While some are free, whoever has less takes those.
    let too_many = mine.len() > share && free.is_empty();
    let give = mine
        .into_iter()
        .max_by_key(|key| preference(key, me))
        .filter(|_| too_many)
        .cloned();
    Decision { take, give }
}

fn keys<K: Ord>(holds: &BTreeMap<K, Hold>, wanted: impl Fn(Hold) -> bool) -> Vec<&K> {
    let wanted = holds.iter().filter(|(_, hold)| wanted(**hold));
    wanted.map(|(key, _)| key).collect()
}

fn preference(key: &impl Hash, me: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (me, key).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Replicas in turn, each on what is so; who holds what at the end.
    fn settle(holders: &mut [Option<usize>], replicas: usize, rounds: usize) {
        for round in 0..rounds {
            for me in 0..replicas {
                let holds: BTreeMap<usize, Hold> = holders
                    .iter()
                    .enumerate()
                    .map(|(key, holder)| {
                        let hold = match holder {
                            Some(holder) if *holder == me => Hold::Mine,
                            Some(holder) if *holder < replicas => Hold::Others,
                            _ => Hold::Free(Duration::from_secs(round as u64)),
                        };
                        (key, hold)
                    })
                    .collect();
                let decision = decide(&holds, replicas, &format!("replica-{me}"));
                for key in decision.take {
                    assert!(matches!(holds[&key], Hold::Free(_)), "{key} was another's");
                    holders[key] = Some(me);
                }
                if let Some(key) = decision.give {
                    assert_eq!(holds[&key], Hold::Mine);
                    holders[key] = None;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn however_it_begins_each_ends_with_its_share_and_none_is_left(
            mut holders in prop::collection::vec(prop::option::of(0usize..6), 1..40),
            replicas in 1usize..5,
        ) {
            let count = holders.len();
            settle(&mut holders, replicas, 60);
            let share = count.div_ceil(replicas);
            for me in 0..replicas {
                let mine = holders.iter().filter(|h| **h == Some(me)).count();
                prop_assert!(mine <= share, "{me} has {mine} of {count}, its share is {share}");
            }
            prop_assert!(holders.iter().all(|h| h.is_some_and(|h| h < replicas)), "{holders:?}");
        }

        #[test]
        fn nothing_moves_once_each_has_its_share(count in 1usize..40, replicas in 1usize..5) {
            let mut holders = vec![None; count];
            settle(&mut holders, replicas, 60);
            let before = holders.clone();
            settle(&mut holders, replicas, 5);
            prop_assert_eq!(holders, before);
        }
    }

    #[test]
    fn what_is_beyond_the_share_is_left_to_others_for_a_while() {
        let free = |since| -> BTreeMap<u32, Hold> { (0..4).map(|k| (k, Hold::Free(since))).collect() };
        assert_eq!(decide(&free(Duration::ZERO), 2, "a").take.len(), 2);
        assert_eq!(decide(&free(PAUSE), 2, "a").take.len(), 4);
    }
}
