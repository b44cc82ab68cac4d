//! Answers of the API server's reviews, kept for a while. Pure: the time is an
//! argument.

use std::{collections::HashMap, hash::Hash, time::Duration};

use tokio::time::Instant;

/// Bounded: a stranger who tries tokens must not grow it.
pub(super) struct ReviewCache<K, V> {
    entries: HashMap<K, (V, Instant)>,
    most: usize,
}

impl<K: Hash + Eq, V: Clone> ReviewCache<K, V> {
    pub(super) fn new(most: usize) -> Self {
        Self {
            entries: HashMap::new(),
            most,
        }
    }

    pub(super) fn get(&self, key: &K, now: Instant) -> Option<V> {
        self.entries
            .get(key)
            .filter(|(_, until)| now < *until)
            .map(|(value, _)| value.clone())
    }

    pub(super) fn put(&mut self, key: K, value: V, keep: Duration, now: Instant) {
        if self.entries.len() >= self.most {
            self.entries.retain(|_, (_, until)| now < *until);
        }
        // Still full of live answers: one more review next time costs less than growing.
        if self.entries.len() < self.most || self.entries.contains_key(&key) {
            self.entries.insert(key, (value, now + keep));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_kept_for_its_time_and_no_longer() {
        let mut cache = ReviewCache::new(2);
        let now = Instant::now();
        cache.put("a", 1, Duration::from_secs(10), now);
        assert_eq!(cache.get(&"a", now + Duration::from_secs(9)), Some(1));
        assert_eq!(cache.get(&"a", now + Duration::from_secs(10)), None);
    }

    #[test]
    fn a_full_cache_drops_the_stale_and_never_grows() {
        let mut cache = ReviewCache::new(2);
        let now = Instant::now();
        cache.put("a", 1, Duration::from_secs(1), now);
        cache.put("b", 2, Duration::from_secs(100), now);
        cache.put("c", 3, Duration::from_secs(100), now);
        assert_eq!(cache.get(&"c", now), None);
        let later = now + Duration::from_secs(2);
        cache.put("c", 3, Duration::from_secs(100), later);
        assert_eq!(
            (cache.get(&"b", later), cache.get(&"c", later)),
            (Some(2), Some(3))
        );
        assert!(cache.entries.len() <= 2);
    }
}
