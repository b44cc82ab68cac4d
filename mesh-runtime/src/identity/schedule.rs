//! When to fetch which certificate. Pure: time is an argument.
//!
//! An identity is fetched as soon as it is wanted, again when half of its
//! certificate's life is gone, and after a failure when its wait is over. At
//! most [`MAX_FETCHES`] are under way; who has no certificate goes first.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use mesh_api::Identity;

/// Enough to fill the broker's latency, too few to bury it.
pub const MAX_FETCHES: usize = 8;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// A certificate whose half-life is over when it arrives, or whose times lie,
/// is not fetched again at once.
const MIN_RENEWAL: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub struct Schedule {
    entries: HashMap<Identity, Entry>,
    fetching: usize,
}

#[derive(Debug)]
struct Entry {
    step: Step,
    /// When the certificate in hand ends; None if there is none.
    expires: Option<Instant>,
    retries: ExponentialBackoff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Due { at: Instant },
    Fetching,
}

fn retries() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_RETRY)
        .with_max_delay(LAST_RETRY)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .build()
}

/// A certificate's age and what is left of it, when it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub past: Duration,
    pub left: Duration,
}

impl Schedule {
    pub fn want(&mut self, identity: Identity, now: Instant) {
        self.entries.entry(identity).or_insert_with(|| Entry {
            step: Step::Due { at: now },
            expires: None,
            retries: retries(),
        });
    }

    /// Forgets all but what `wanted` says. A fetch under way goes on; its result
    /// is not taken.
    pub fn retain(&mut self, wanted: impl Fn(&Identity) -> bool) {
        self.entries.retain(|identity, _| wanted(identity));
    }

    /// What to fetch now. Each has to be answered by [`Self::fetched`] or
    /// [`Self::failed`].
    pub fn start(&mut self, now: Instant) -> Vec<Identity> {
        let room = MAX_FETCHES.saturating_sub(self.fetching);
        let mut due: Vec<_> = self
            .entries
            .iter()
            .filter_map(|(identity, entry)| match entry.step {
                Step::Due { at } if at <= now => Some((entry.expires.is_some(), at, identity.clone())),
                _ => None,
            })
            .collect();
        due.sort();
        due.truncate(room);
        due.into_iter()
            .map(|(_, _, identity)| {
                if let Some(entry) = self.entries.get_mut(&identity) {
                    entry.step = Step::Fetching;
                }
                self.fetching += 1;
                identity
            })
            .collect()
    }

    /// Whether the certificate is still wanted.
    pub fn fetched(&mut self, identity: &Identity, life: Life, now: Instant) -> bool {
        self.fetching = self.fetching.saturating_sub(1);
        let Some(entry) = self.entries.get_mut(identity) else {
            return false;
        };
        let half = (life.past + life.left) / 2;
        entry.step = Step::Due {
            at: now + half.saturating_sub(life.past).max(MIN_RENEWAL),
        };
        entry.expires = Some(now + life.left);
        entry.retries = retries();
        true
    }

    /// When it will be tried again; None if it is no longer wanted.
    pub fn failed(&mut self, identity: &Identity, now: Instant) -> Option<Duration> {
        self.fetching = self.fetching.saturating_sub(1);
        let entry = self.entries.get_mut(identity)?;
        let wait = entry.retries.next().unwrap_or(LAST_RETRY);
        entry.step = Step::Due { at: now + wait };
        Some(wait)
    }

    /// Whose certificate ended. Each is told once.
    pub fn expired(&mut self, now: Instant) -> Vec<Identity> {
        self.entries
            .iter_mut()
            .filter_map(|(identity, entry)| {
                entry.expires.take_if(|at| *at <= now)?;
                Some(identity.clone())
            })
            .collect()
    }

    /// When to look again, if nothing else happens before.
    pub fn next(&self) -> Option<Instant> {
        let fetches = self.entries.values().filter_map(|entry| match entry.step {
            Step::Due { at } if self.fetching < MAX_FETCHES => Some(at),
            _ => None,
        });
        let expiries = self.entries.values().filter_map(|entry| entry.expires);
        fetches.chain(expiries).min()
    }
}

#[cfg(test)]
mod tests;
