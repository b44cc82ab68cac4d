//! Which events are written, and which only counted. Pure.
//!
//! As a kubelet's own: the same event of the same object is counted up; an
//! object that causes a flood gets 25 events at once and then one in five
//! minutes.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;

use super::{Happening, Object};

/// Different events remembered. The one that was silent longest goes first.
const REMEMBERED: usize = 2048;
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Write {
    Create { name: String },
    Count { name: String, count: u32 },
}

/// What makes two events the same.
type Key = (Object, bool, String, String);

#[derive(Debug)]
struct Seen {
    name: String,
    count: u32,
    last: Timestamp,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Timestamp,
}

#[derive(Debug, Default)]
pub(super) struct Correlator {
    seen: BTreeMap<Key, Seen>,
    /// By UID.
    buckets: BTreeMap<String, Bucket>,
}

impl Correlator {
    /// None: not to be written, its object has caused too many.
    pub(super) fn take(&mut self, happening: &Happening, now: Timestamp) -> Option<Write> {
        if !self.allowed(&happening.object.uid, now) {
            return None;
        }
        let key = key(happening);
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.count = seen.count.saturating_add(1);
            seen.last = now;
            return Some(Write::Count {
                name: seen.name.clone(),
                count: seen.count,
            });
        }
        if self.seen.len() >= REMEMBERED {
            let oldest = self
                .seen
                .iter()
                .min_by_key(|(_, s)| s.last)
                .map(|(k, _)| k.clone());
            if let Some(oldest) = oldest {
                self.seen.remove(&oldest);
            }
        }
        // Unique within the object: time, and how many are remembered.
        let name = format!(
            "{}.{:x}{:04x}",
            happening.object.name,
            now.as_nanosecond(),
            self.seen.len()
        );
        self.seen.insert(
            key,
            Seen {
                name: name.clone(),
                count: 1,
                last: now,
            },
        );
        Some(Write::Create { name })
    }

    /// The event is not there: the next one is written anew.
    pub(super) fn forget(&mut self, happening: &Happening) {
        self.seen.remove(&key(happening));
    }

    fn allowed(&mut self, uid: &str, now: Timestamp) -> bool {
        if self.buckets.len() >= REMEMBERED && !self.buckets.contains_key(uid) {
            // A full bucket remembers nothing.
            self.buckets.retain(|_, b| filled(b, now) < BURST);
            if self.buckets.len() >= REMEMBERED {
                self.buckets.pop_first();
            }
        }
        let bucket = self.buckets.entry(uid.to_owned()).or_insert(Bucket {
            tokens: BURST,
            at: now,
        });
        bucket.tokens = filled(bucket, now);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }
}

fn filled(bucket: &Bucket, now: Timestamp) -> f64 {
    let passed = now.duration_since(bucket.at).as_secs_f64().max(0.0);
    (bucket.tokens + passed / REFILL.as_secs_f64()).min(BURST)
}

fn key(happening: &Happening) -> Key {
    (
        happening.object.clone(),
        happening.severity == pool_agent_api::status::Severity::Warning,
        happening.reason.clone(),
        happening.message.clone(),
    )
}

#[cfg(test)]
mod tests {
    use pool_agent_api::status::Severity;

    use super::*;

    fn happening(uid: &str, message: &str) -> Happening {
        Happening {
            object: Object {
                kind: "Pod",
                namespace: Some("shop".into()),
                name: "web".into(),
                uid: uid.into(),
                field: None,
            },
            severity: Severity::Warning,
            reason: "BackOff".into(),
            message: message.into(),
            at: Timestamp::UNIX_EPOCH,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn the_same_event_is_counted_up() {
        let mut correlator = Correlator::default();
        let Some(Write::Create { name }) = correlator.take(&happening("1", "a"), at(0)) else {
            panic!("the first is created");
        };
        assert_eq!(
            correlator.take(&happening("1", "a"), at(1)),
            Some(Write::Count { name, count: 2 })
        );
        let other = correlator.take(&happening("1", "b"), at(1));
        assert!(matches!(other, Some(Write::Create { .. })));
        let other = correlator.take(&happening("2", "a"), at(1));
        assert!(matches!(other, Some(Write::Create { .. })));
    }

    #[test]
    fn a_flood_of_one_object_is_cut_off_and_others_are_not() {
        let mut correlator = Correlator::default();
        let written = (0..100)
            .filter(|i| correlator.take(&happening("1", &i.to_string()), at(0)).is_some())
            .count();
        assert_eq!(written, 25);
        assert!(correlator.take(&happening("2", "a"), at(0)).is_some());
        assert!(correlator.take(&happening("1", "later"), at(299)).is_none());
        assert!(correlator.take(&happening("1", "later"), at(301)).is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let mut correlator = Correlator::default();
        for i in 0..3 * REMEMBERED {
            correlator.take(&happening(&i.to_string(), "a"), at(i as i64));
        }
        assert!(correlator.seen.len() <= REMEMBERED && correlator.buckets.len() <= REMEMBERED);
    }
}
