//! One client's subscription to one xDS type: the delta protocol without the
//! wire. Pure; `xds` owns one for each type of each stream.
//!
//! ```text
//!             request                        poll(snapshot)
//!   Unasked ───────────▶ Idle ◀────────────────────────────▶ Waiting(nonce)
//!                          └──── nothing new ──▶ (no answer)     │
//!                          ▲                                     │
//!                          └───────────── ACK or NACK ───────────┘
//! ```
//!
//! What always holds: one answer is on its way at a time, so a slow client gets
//! the newest state once and no queue grows; after an answer the client holds what
//! it is subscribed to, as of that snapshot; each new demand gets an answer, an
//! empty one if need be (a client counts itself ready on it).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::snapshot::{Resource, Snapshot, Version};

/// The name that stands for all (xDS protocol, "wildcard").
const WILDCARD: &str = "*";

/// Names that one client may be subscribed to at a time: far more than a host has
/// peers; beyond it wildcard is the cheaper way.
const MAX_NAMES: usize = 65_536;

/// Longest name that is taken: namespaces, host names and addresses are shorter.
const MAX_NAME_BYTES: usize = 1024;

/// A request of the client, for this type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Of the answer that this acknowledges; empty if none.
    pub nonce: String,
    /// Why the answer was (partly) rejected.
    pub rejected: Option<String>,
    pub subscribe: Vec<String>,
    pub unsubscribe: Vec<String>,
    /// What the client held already when it connected; meant in the first request only.
    pub held: BTreeMap<String, String>,
}

/// What a request said of the last answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, or it was about an answer that is not the last.
    None,
    Accepted,
    Rejected {
        reason: String,
    },
}

/// A request that ends the stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("more than {MAX_NAMES} names in a subscription: subscribe to \"*\"")]
    TooManyNames,
    #[error("a name of more than {MAX_NAME_BYTES} bytes in a subscription")]
    NameTooLong,
}

/// What to tell the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub nonce: String,
    pub changed: Vec<Arc<Resource>>,
    pub removed: Vec<Arc<str>>,
}

/// The state of one subscription.
#[derive(Debug, Default)]
pub struct Subscription {
    asked: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    held: Held,
    /// Names asked for since the last answer: if nothing is called so, that has to
    /// be said.
    demanded: BTreeSet<String>,
    /// Those of them that were asked for on a running stream: the client may have
    /// dropped what it once had, so they are sent whatever it holds.
    again: BTreeSet<String>,
    /// An answer is owed even if it is empty.
    owed: bool,
    waiting: Option<u64>,
    answers: u64,
}

/// What the client has, as far as we know. A wildcard client has the snapshot it was
/// last sent: no copy of its names for each client.
#[derive(Debug)]
enum Held {
    All(Arc<Snapshot>),
    /// With no version where it is none of ours.
    Some(BTreeMap<Arc<str>, Option<Version>>),
}

impl Default for Held {
    fn default() -> Self {
        Self::Some(BTreeMap::new())
    }
}

impl Held {
    fn names(self) -> BTreeMap<Arc<str>, Option<Version>> {
        match self {
            Self::All(all) => all
                .iter()
                .map(|resource| (Arc::clone(&resource.name), Some(resource.version)))
                .collect(),
            Self::Some(held) => held,
        }
    }

    /// The client may have dropped any of it: all that is wanted is sent again.
    fn doubt(&mut self) {
        let mut held = std::mem::take(self).names();
        held.values_mut().for_each(|version| *version = None);
        *self = Self::Some(held);
    }
}

impl Subscription {
    /// Takes a request up. The answer, if one is due, comes from [`Self::poll`].
    pub fn request(&mut self, request: Request) -> Result<Verdict, Refusal> {
        let names = || request.subscribe.iter().chain(&request.unsubscribe);
        if names()
            .chain(request.held.keys())
            .any(|name| name.len() > MAX_NAME_BYTES)
        {
            return Err(Refusal::NameTooLong);
        }
        let first = !std::mem::replace(&mut self.asked, true);
        if first {
            self.owed = true;
            // A first request without names means all (xDS protocol, "wildcard").
            self.wildcard = request.subscribe.is_empty();
            self.held = Held::Some(
                request
                    .held
                    .into_iter()
                    .map(|(name, version)| (name.into(), version.parse().ok()))
                    .collect(),
            );
        }
        for name in request.subscribe {
            if name == WILDCARD {
                if !self.wildcard && !first {
                    self.owed = true;
                    self.held.doubt();
                }
                self.wildcard = true;
            } else {
                self.owed = true;
                self.demanded.insert(name.clone());
                if !first {
                    self.again.insert(name.clone());
                }
                self.names.insert(name);
            }
        }
        // What it drops with that is its own choice, even if it was not subscribed
        // to the names: it may have held what it reported when it connected.
        if !first && !request.unsubscribe.is_empty() {
            self.held.doubt();
        }
        for name in request.unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.demanded.remove(&name);
                self.again.remove(&name);
                self.names.remove(&name);
            }
        }
        if self.names.len() > MAX_NAMES {
            return Err(Refusal::TooManyNames);
        }
        Ok(self.verdict(&request.nonce, request.rejected))
    }

    fn verdict(&mut self, nonce: &str, rejected: Option<String>) -> Verdict {
        if nonce.is_empty() || self.waiting.map(|waiting| waiting.to_string()).as_deref() != Some(nonce) {
            return Verdict::None;
        }
        self.waiting = None;
        match rejected {
            None => Verdict::Accepted,
            // What was rejected is not sent again until it changes: it would be
            // rejected again.
            Some(reason) => Verdict::Rejected { reason },
        }
    }

    /// The answer that brings the client to `snapshot`, if one is due now.
    pub fn poll(&mut self, snapshot: &Arc<Snapshot>) -> Option<Answer> {
        if !self.asked || self.waiting.is_some() {
            return None;
        }
        let (changed, mut removed) = if self.wildcard {
            self.bring_all(snapshot)
        } else {
            self.bring_named(snapshot)
        };
        let demanded = std::mem::take(&mut self.demanded);
        removed.extend(snapshot.unknown(demanded).into_iter().map(Arc::from));
        if changed.is_empty() && removed.is_empty() && !self.owed {
            return None;
        }
        self.owed = false;
        self.answers += 1;
        self.waiting = Some(self.answers);
        Some(Answer {
            nonce: self.answers.to_string(),
            changed,
            removed,
        })
    }

    fn bring_all(&mut self, snapshot: &Arc<Snapshot>) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let held = std::mem::replace(&mut self.held, Held::All(Arc::clone(snapshot)));
        let (mut changed, removed) = match &held {
            Held::All(held) => snapshot.since(held),
            Held::Some(held) => differences(snapshot.iter(), held, |name| snapshot.get(name).is_some()),
        };
        let again = snapshot.select(&std::mem::take(&mut self.again));
        if !again.is_empty() {
            changed.retain(|resource| !again.contains_key(&resource.name));
            changed.extend(again.into_values());
        }
        (changed, removed)
    }

    fn bring_named(&mut self, snapshot: &Arc<Snapshot>) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let wanted = snapshot.select(&self.names);
        let mut held = std::mem::take(&mut self.held).names();
        for name in snapshot.select(&std::mem::take(&mut self.again)).keys() {
            held.remove(name);
        }
        let differences = differences(wanted.values(), &held, |name| wanted.contains_key(name));
        self.held = Held::Some(
            wanted
                .into_iter()
                .map(|(name, resource)| (name, Some(resource.version)))
                .collect(),
        );
        differences
    }
}

/// What of `wanted` is not held so, and what is held and not wanted.
fn differences<'a>(
    wanted: impl Iterator<Item = &'a Arc<Resource>>,
    held: &BTreeMap<Arc<str>, Option<Version>>,
    is_wanted: impl Fn(&str) -> bool,
) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
    let changed = wanted
        .filter(|resource| held.get(&resource.name) != Some(&Some(resource.version)))
        .cloned()
        .collect();
    let removed = held.keys().filter(|name| !is_wanted(name)).cloned().collect();
    (changed, removed)
}

#[cfg(test)]
mod tests;
