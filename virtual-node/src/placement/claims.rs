//! Which claims there should be in the cell, given what the pods' drivers want and
//! what the cell holds. Pure; [`cell`](super::cell) carries it out.
//!
//! ```text
//!               no claim there          bound, its agent in reach
//!  Wanted ─────────▶ Create ─────▶ (seen) ─────▶ Room ──▶ Held ──▶ Left ──▶ Nothing
//!     ▲                               │ deleted, over, or another's           │
//!     └───── the next attempt ◀── Lost                                Delete ◀┘
//! ```
//!
//! A pod has two claims while it is handed over from one host to another; only one of
//! them is asked for at a time.
//!
//! What always holds:
//! - a claim is created only for what a driver wants now, under that attempt's name;
//! - a claim is deleted only when its driver has said that nothing is left of its
//!   attempt, or that it wants another attempt, or when a live read says that the pod
//!   is gone;
//! - room is granted once for each want, on the host that the claim is bound to, and
//!   only if the claim says what was asked for and nobody has given notice;
//! - while the cell is away nothing is concluded from it: what was seen stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{Attempt, HostName, Namespace, PodName, PodUid, SandboxKey};
use pool_cell::{Claim, NotAClaim, Placed, names};
use tracing::warn;

use super::{Seat, Waiting};
use crate::pool::Named;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Effect {
    Create(Claim),
    /// Repeated until it is gone or being deleted.
    Delete(SandboxKey),
    /// Read the claim itself: the watch is no proof of absence. Answered by
    /// [`Claims::answered`] or [`Claims::looked_in_vain`]; one that fails is repeated
    /// for as long as it [is missed](Claims::misses).
    Look(SandboxKey),
    /// Read the pod of a claim that no driver has asked for. Answered by
    /// [`Claims::orphaned`] if it is gone.
    LookForPod {
        key: SandboxKey,
        namespace: Namespace,
        name: PodName,
    },
    /// Read the claim itself, from now on: what is seen later is later than this.
    /// Answered by [`Claims::witnessed`] or [`Claims::looked_in_vain`].
    Witness(SandboxKey),
    /// As [`Self::Delete`], and at once: nobody has to be given time.
    Remove(SandboxKey),
    /// What was given up there has no right to run any more.
    Over(SandboxKey),
    Room(PodUid, HostName),
    Lost(PodUid),
    Tell(PodUid, Waiting),
    /// Call [`Claims::again`] after a while.
    Again(PodUid),
}

/// What a pod's driver said last.
#[derive(Debug, Clone)]
enum Want {
    /// Room for an attempt that no host has heard of.
    Room {
        claim: Claim,
        /// It has been asked for, and the cell has not answered.
        asked: bool,
        answered: bool,
        told: Option<Waiting>,
    },
    /// The attempt may run there, or its remains are there.
    Kept {
        attempt: Attempt,
        host: HostName,
        /// A live read has said that it has no claim.
        unclaimed: bool,
        given_up: Option<GivenUp>,
    },
    Nothing,
}

/// What has to be known before a pod's next attempt may begin though its host is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Its host's Lease has lapsed, or the claim is gone. (No grant of ours is live: that
    /// is the driver's to wait for.)
    Lapsed,
    /// The claim is gone: its host let it go, or the pool says that there is no host.
    Gone,
}

/// An attempt whose host is silent: its claim is deleted, which asks the cell about the
/// host.
#[derive(Debug, Clone)]
struct GivenUp {
    proof: Proof,
    /// The claim's version as it was read since.
    from: Option<u64>,
    /// What was said of it by then, which may be old.
    before: Option<Timestamp>,
    /// What has been said since.
    said: BTreeSet<Timestamp>,
    told: bool,
}

impl GivenUp {
    /// Of two statements that are new the later one looked at the Lease after the earlier
    /// was written, and so after it was given up ([`pool_cell::lapse`]).
    fn is_lapsed(&self) -> bool {
        self.proof == Proof::Lapsed && self.said.len() >= 2
    }

    fn hear(&mut self, placed: &Placed) {
        let later = self.from.is_some_and(|from| version_of(placed) > Some(from));
        if let Some(said) = placed.lapsed.filter(|said| later && Some(*said) != self.before) {
            self.said.insert(said);
        }
    }
}

/// Versions of one object are ordered numbers (KEP-5504).
fn version_of(placed: &Placed) -> Option<u64> {
    placed.resource_version.parse().ok()
}

impl Want {
    fn attempt(&self) -> Option<Attempt> {
        match self {
            Self::Room { claim, .. } => Some(claim.key.attempt),
            Self::Kept { attempt, .. } => Some(*attempt),
            Self::Nothing => None,
        }
    }
}

#[derive(Debug)]
struct Seen {
    placed: Placed,
    /// Why the scheduler has no host for it; empty if it has, or has not looked.
    unscheduled: String,
    /// A deletion by us is under way.
    deleting: bool,
    /// Only an answer has told of it, which may be older than the watch's last list.
    unconfirmed: bool,
}

/// A Pod that has the name of a claim of this node's, and is none of the shape that
/// this release makes: the cell changed it, or another release made it.
#[derive(Debug)]
struct Misshapen {
    wrong: NotAClaim,
    /// Of which pod it says to be.
    pod: Option<(Namespace, PodName)>,
    host: Option<HostName>,
    deleting: bool,
}

#[derive(Debug)]
pub(super) struct Claims {
    node_name: String,
    wants: BTreeMap<PodUid, Want>,
    /// The same for the other attempt of a handover.
    beside: BTreeMap<PodUid, Want>,
    seen: BTreeMap<PodUid, BTreeMap<Attempt, Seen>>,
    misshapen: BTreeMap<PodUid, BTreeMap<Attempt, Misshapen>>,
    /// The newest version that the watch has told: what was read before is older than
    /// what is known, be it that the claim is gone.
    told: u64,
    /// Where each host's agent was last said to serve.
    agents: BTreeMap<HostName, SocketAddr>,
    reachable: BTreeSet<HostName>,
    /// Claims of a listing in progress.
    listing: Option<BTreeSet<SandboxKey>>,
    /// All claims have been listed once.
    listed: bool,
    /// A host is named, or an address, that was not when [`Self::hosts`] was last asked.
    new_host: bool,
}

impl Claims {
    pub(super) fn new(node_name: String) -> Self {
        Self {
            node_name,
            wants: BTreeMap::new(),
            beside: BTreeMap::new(),
            seen: BTreeMap::new(),
            misshapen: BTreeMap::new(),
            told: 0,
            agents: BTreeMap::new(),
            reachable: BTreeSet::new(),
            listing: None,
            listed: false,
            new_host: false,
        }
    }

    // ---- what drivers say

    pub(super) fn want(&mut self, seat: Seat, claim: Claim) -> Vec<Effect> {
        let pod = claim.key.pod.clone();
        let want = Want::Room {
            claim,
            asked: false,
            answered: false,
            told: None,
        };
        self.sit(seat, pod.clone(), want);
        self.settle(&pod)
    }

    pub(super) fn keep(&mut self, seat: Seat, pod: &PodUid, attempt: Attempt, host: HostName) -> Vec<Effect> {
        let want = self.kept(pod, attempt, host);
        self.sit(seat, pod.clone(), want);
        self.settle(pod)
    }

    /// Both at once: neither claim is nobody's in between.
    pub(super) fn exchange(
        &mut self,
        pod: &PodUid,
        placed: (Attempt, HostName),
        beside: (Attempt, HostName),
    ) -> Vec<Effect> {
        let placed = self.kept(pod, placed.0, placed.1);
        let beside = self.kept(pod, beside.0, beside.1);
        self.sit(Seat::Pod, pod.clone(), placed);
        self.sit(Seat::Beside, pod.clone(), beside);
        self.settle(pod)
    }

    /// The attempt's host is silent, and no grant of ours is live there. Its claim is
    /// deleted; [`Effect::Over`] comes when the proof is there.
    pub(super) fn give_up(&mut self, key: &SandboxKey, proof: Proof) -> Vec<Effect> {
        let Some(Want::Kept { given_up, .. }) = self.kept_mut(key) else {
            return vec![];
        };
        *given_up = Some(GivenUp {
            proof,
            from: None,
            before: None,
            said: BTreeSet::new(),
            told: false,
        });
        let mut effects = vec![Effect::Witness(key.clone())];
        effects.extend(self.settle(&key.pod));
        effects
    }

    /// A read of the claim that began after it was given up.
    pub(super) fn witnessed(&mut self, pod: &Pod) -> Vec<Effect> {
        if let Ok(placed) = Placed::parse(pod)
            && let Some(Want::Kept {
                given_up: Some(given_up),
                ..
            }) = self.kept_mut(&placed.claim.key)
            && given_up.from.is_none()
        {
            given_up.from = version_of(&placed);
            given_up.before = placed.lapsed;
        }
        self.answered(pod)
    }

    /// Claims that were given up and not read since.
    pub(super) fn unwitnessed(&self) -> Vec<Effect> {
        let wants = self.wants.iter().chain(&self.beside);
        let given_up = wants.filter_map(|(pod, want)| match want {
            Want::Kept {
                attempt,
                unclaimed: false,
                given_up: Some(GivenUp { from: None, .. }),
                ..
            } => Some(Effect::Witness(key(pod, *attempt))),
            _ => None,
        });
        given_up.collect()
    }

    pub(super) fn release(&mut self, seat: Seat, pod: &PodUid) -> Vec<Effect> {
        self.sit(seat, pod.clone(), Want::Nothing);
        self.settle(pod)
    }

    /// What is known of the attempt goes with it from seat to seat.
    fn kept(&self, pod: &PodUid, attempt: Attempt, host: HostName) -> Want {
        let before = self.wants_of(pod).find_map(|want| match want {
            Want::Kept {
                attempt: same,
                unclaimed,
                given_up,
                ..
            } if *same == attempt => Some((*unclaimed, given_up.clone())),
            _ => None,
        });
        let (unclaimed, given_up) = before.unwrap_or_default();
        Want::Kept {
            attempt,
            host,
            unclaimed,
            given_up,
        }
    }

    fn kept_mut(&mut self, key: &SandboxKey) -> Option<&mut Want> {
        self.wants_of_mut(&key.pod)
            .find(|want| matches!(want, Want::Kept { attempt, .. } if *attempt == key.attempt))
    }

    fn sit(&mut self, seat: Seat, pod: PodUid, want: Want) {
        match seat {
            Seat::Pod => self.wants.insert(pod, want),
            Seat::Beside => self.beside.insert(pod, want),
        };
    }

    fn wants_of(&self, pod: &PodUid) -> impl Iterator<Item = &Want> {
        self.wants.get(pod).into_iter().chain(self.beside.get(pod))
    }

    fn wants_of_mut(&mut self, pod: &PodUid) -> impl Iterator<Item = &mut Want> {
        let beside = self.beside.get_mut(pod);
        self.wants.get_mut(pod).into_iter().chain(beside)
    }

    /// What is being asked for. One at a time.
    fn asked_for(&mut self, pod: &PodUid) -> Option<&mut Want> {
        self.wants_of_mut(pod)
            .find(|want| matches!(want, Want::Room { .. }))
    }

    fn is_known(&self, pod: &PodUid) -> bool {
        self.wants.contains_key(pod) || self.beside.contains_key(pod)
    }

    // ---- what the cell says

    pub(super) fn begin_listing(&mut self) {
        self.listing = Some(BTreeSet::new());
    }

    pub(super) fn end_listing(&mut self) -> Vec<Effect> {
        let listing = self.listing.take().unwrap_or_default();
        let mut effects = vec![];
        for key in self.keys() {
            if listing.contains(&key) {
                continue;
            }
            // An answer that came meanwhile may be from before the list, or after.
            let unconfirmed = self
                .claim_of(&key.pod, key.attempt)
                .is_some_and(|s| s.unconfirmed);
            if unconfirmed {
                effects.push(Effect::Look(key));
            } else {
                self.forget(&key);
            }
        }
        self.new_host |= !std::mem::replace(&mut self.listed, true);
        let pods: BTreeSet<PodUid> = self
            .wants
            .keys()
            .chain(self.beside.keys())
            .cloned()
            .chain(self.pods())
            .collect();
        effects.extend(pods.iter().flat_map(|pod| self.settle(pod)));
        effects
    }

    /// A claim as the watch tells it. Those of the tenant's other nodes are not ours.
    pub(super) fn seen(&mut self, pod: &Pod) -> Vec<Effect> {
        let listed = names::subject(pod).map(|(_, key)| key);
        if let (Some(listing), Some(key)) = (&mut self.listing, listed) {
            listing.insert(key);
        }
        self.heard(pod);
        self.known(pod, false)
    }

    /// A claim as a request was answered: the watch may have told newer things.
    pub(super) fn answered(&mut self, pod: &Pod) -> Vec<Effect> {
        let subject = names::subject(pod).map(|(_, key)| key);
        let older = version(pod).is_some_and(|version| version <= self.told);
        let unconfirmed = |key: &SandboxKey| {
            let seen = self.claim_of(&key.pod, key.attempt);
            seen.is_some_and(|seen| seen.unconfirmed)
        };
        match subject {
            Some(key) if older && self.listed && !unconfirmed(&key) => self.settle(&key.pod),
            _ => self.known(pod, true),
        }
    }

    fn known(&mut self, pod: &Pod, unconfirmed: bool) -> Vec<Effect> {
        let placed = match Placed::parse(pod) {
            Ok(placed) => placed,
            Err(wrong) => return self.misshapen(pod, wrong),
        };
        if placed.claim.node_name != self.node_name {
            return vec![];
        }
        let key = placed.claim.key.clone();
        self.forget_misshapen(&key);
        if let (Some(host), Some(agent)) = (&placed.host, placed.agent) {
            self.serves(host.clone(), agent);
        }
        if let Some(Want::Kept {
            given_up: Some(given_up),
            ..
        }) = self.kept_mut(&key)
        {
            given_up.hear(&placed);
        }
        let attempts = self.seen.entry(key.pod.clone()).or_default();
        let before = attempts
            .get(&key.attempt)
            .filter(|old| old.placed.uid == placed.uid);
        let deleting = before.is_some_and(|old| old.deleting);
        let unconfirmed = unconfirmed && before.is_none_or(|old| old.unconfirmed);
        let seen = Seen {
            unscheduled: unscheduled(pod),
            placed,
            deleting,
            unconfirmed,
        };
        attempts.insert(key.attempt, seen);
        if let Some(Want::Room { asked, claim, .. }) = self.asked_for(&key.pod)
            && claim.key == key
        {
            *asked = false;
        }
        self.settle(&key.pod)
    }

    /// The cell has changed what it was asked for, or does not say it as this release
    /// does. What may run is left alone; what does not is refused, and deleted.
    fn misshapen(&mut self, pod: &Pod, wrong: NotAClaim) -> Vec<Effect> {
        let annotation = |key: &str| pod.metadata.annotations.as_ref()?.get(key).cloned();
        let Some((_, key)) = names::subject(pod) else {
            // The cell's policy lets nobody make one.
            warn!(error = %wrong, name = pod.metadata.name, "a Pod among the claims is none");
            return vec![];
        };
        let wanted = self
            .wants_of(&key.pod)
            .any(|want| want.attempt() == Some(key.attempt));
        if annotation(names::NODE).as_deref() != Some(self.node_name.as_str()) && !wanted {
            return vec![];
        }
        let host: Option<HostName> = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_ref()?.parse().ok());
        let agent = annotation(names::AGENT).and_then(|agent| agent.parse().ok());
        if let (Some(host), Some(agent)) = (&host, agent) {
            self.serves(host.clone(), agent);
        }
        self.forget_seen(&key);
        let attempts = self.misshapen.entry(key.pod.clone()).or_default();
        let before = attempts.get(&key.attempt);
        if before.is_none() {
            warn!(
                pod.uid = %key.pod, attempt = %key.attempt, error = %wrong,
                "a claim is not of the shape that this release makes"
            );
        }
        let deleting =
            pod.metadata.deletion_timestamp.is_some() || before.is_some_and(|before| before.deleting);
        let of = annotation(names::POD).and_then(|of| {
            let (namespace, name) = of.split_once('/')?;
            Some((
                Namespace::parse("annotations", namespace).ok()?,
                PodName::parse("annotations", name).ok()?,
            ))
        });
        attempts.insert(
            key.attempt,
            Misshapen {
                wrong,
                pod: of,
                host,
                deleting,
            },
        );
        self.settle(&key.pod)
    }

    pub(super) fn deleted(&mut self, pod: &Pod) -> Vec<Effect> {
        self.heard(pod);
        let Some((_, key)) = names::subject(pod) else {
            return vec![];
        };
        self.forget(&key);
        self.settle(&key.pod)
    }

    /// The cell did not create it, for the reason that is told; it is asked again
    /// with [`Self::again`].
    pub(super) fn not_created(&mut self, key: &SandboxKey, why: Waiting) -> Vec<Effect> {
        match self.asked_for(&key.pod) {
            Some(Want::Room { claim, .. }) if claim.key == *key => self.tell(&key.pod, why),
            _ => vec![],
        }
    }

    /// There is one of that name already: ours from before, or one that is ending.
    pub(super) fn exists(&mut self, key: &SandboxKey) -> Vec<Effect> {
        vec![Effect::Look(key.clone())]
    }

    pub(super) fn again(&mut self, pod: &PodUid) -> Vec<Effect> {
        if let Some(Want::Room { asked, .. }) = self.asked_for(pod) {
            *asked = false;
        }
        let unconfirmed = self.seen.get(pod).into_iter().flatten();
        let mut effects: Vec<Effect> = unconfirmed
            .filter(|(_, seen)| seen.unconfirmed)
            .map(|(attempt, _)| Effect::Look(key(pod, *attempt)))
            .collect();
        effects.extend(self.settle(pod));
        effects
    }

    /// A live read of a claim: there is none.
    pub(super) fn looked_in_vain(&mut self, key: &SandboxKey) -> Vec<Effect> {
        let seen = self.claim_of(&key.pod, key.attempt);
        // The watch has told of it since it was looked for, and will tell its end.
        if seen.is_some_and(|seen| !seen.unconfirmed) {
            return vec![];
        }
        self.forget(key);
        for want in self.wants_of_mut(&key.pod) {
            match want {
                Want::Kept {
                    attempt, unclaimed, ..
                } if *attempt == key.attempt => *unclaimed = true,
                Want::Room { claim, asked, .. } if claim.key == *key => *asked = false,
                _ => {}
            }
        }
        self.settle(&key.pod)
    }

    /// Whether it is not known if a claim is there that has to be known.
    pub(super) fn misses(&self, pod: &PodUid) -> bool {
        let mut kept = self
            .wants_of(pod)
            .filter_map(|want| match want {
                Want::Kept {
                    attempt,
                    unclaimed: false,
                    ..
                } => Some(*attempt),
                _ => None,
            })
            .peekable();
        if kept.peek().is_some() {
            return kept.any(|attempt| !self.is_there(pod, attempt));
        }
        self.seen
            .get(pod)
            .into_iter()
            .flatten()
            .any(|(_, s)| s.unconfirmed)
    }

    /// A live read of the pod: it is gone, and nobody asks for its claim.
    pub(super) fn orphaned(&mut self, pod: &PodUid) -> Vec<Effect> {
        if self.is_known(pod) {
            return vec![];
        }
        self.release(Seat::Pod, pod)
    }

    // ---- what the pool says

    /// The hosts with which there is a session.
    pub(super) fn set_reachable(&mut self, reachable: BTreeSet<HostName>) -> Vec<Effect> {
        let new: BTreeSet<HostName> = reachable.difference(&self.reachable).cloned().collect();
        self.reachable = reachable;
        if new.is_empty() {
            return vec![];
        }
        let waiting: Vec<PodUid> = self
            .wants
            .iter()
            .chain(&self.beside)
            .filter(|(_, want)| matches!(want, Want::Room { answered: false, .. }))
            .map(|(pod, _)| pod.clone())
            .collect();
        waiting.iter().flat_map(|pod| self.settle(pod)).collect()
    }

    /// Claims for which no driver has said anything, of pods that may be gone; and those
    /// of which the watch has not told, which may be gone themselves.
    pub(super) fn orphans(&self) -> Vec<Effect> {
        let seen = self.seen.values().filter_map(|attempts| {
            let claim = &attempts.values().next()?.placed.claim;
            Some((claim.key.clone(), claim.namespace.clone(), claim.name.clone()))
        });
        let misshapen = self.misshapen.iter().filter_map(|(pod, attempts)| {
            let (attempt, of) = attempts.iter().next()?;
            let (namespace, name) = of.pod.clone()?;
            Some((key(pod, *attempt), namespace, name))
        });
        let orphans = seen
            .chain(misshapen)
            .filter(|(key, _, _)| !self.is_known(&key.pod))
            .map(|(key, namespace, name)| Effect::LookForPod { key, namespace, name });
        // The watch tells of what is there within moments.
        let unconfirmed = self.keys().into_iter().filter(|key| {
            let seen = self.claim_of(&key.pod, key.attempt);
            seen.is_some_and(|seen| seen.unconfirmed)
        });
        orphans.chain(unconfirmed.map(Effect::Look)).collect()
    }

    pub(super) fn names_a_new_host(&self) -> bool {
        self.new_host
    }

    /// The hosts that hold something of this node, as far as is known.
    pub(super) fn hosts(&mut self) -> Named {
        self.new_host = false;
        let mut hosts: BTreeMap<HostName, Option<SocketAddr>> = BTreeMap::new();
        for seen in self.seen.values().flat_map(BTreeMap::values) {
            if let Some(host) = &seen.placed.host {
                let agent = seen.placed.agent.or_else(|| self.agents.get(host).copied());
                hosts.insert(host.clone(), agent);
            }
        }
        for there in self.misshapen.values().flat_map(BTreeMap::values) {
            if let Some(host) = &there.host {
                hosts.insert(host.clone(), self.agents.get(host).copied());
            }
        }
        for (pod, want) in self.wants.iter().chain(&self.beside) {
            // Bound there once. Until it is certain that it is no more, it may be.
            if let Want::Kept {
                attempt,
                host,
                unclaimed: false,
                ..
            } = want
                && self.claim_of(pod, *attempt).is_none()
            {
                hosts
                    .entry(host.clone())
                    .or_insert_with(|| self.agents.get(host).copied());
            }
        }
        self.agents.retain(|host, _| hosts.contains_key(host));
        Named {
            hosts,
            complete: self.listed,
        }
    }

    fn claim_of(&self, pod: &PodUid, attempt: Attempt) -> Option<&Seen> {
        self.seen.get(pod)?.get(&attempt)
    }

    /// Of whatever shape.
    fn is_there(&self, pod: &PodUid, attempt: Attempt) -> bool {
        let misshapen = self.misshapen.get(pod);
        self.claim_of(pod, attempt).is_some() || misshapen.is_some_and(|m| m.contains_key(&attempt))
    }

    fn pods(&self) -> impl Iterator<Item = PodUid> {
        self.seen.keys().chain(self.misshapen.keys()).cloned()
    }

    fn keys(&self) -> Vec<SandboxKey> {
        let seen = self
            .seen
            .iter()
            .flat_map(|(pod, a)| a.keys().map(move |a| key(pod, *a)));
        let misshapen = self.misshapen.iter();
        let misshapen = misshapen.flat_map(|(pod, a)| a.keys().map(move |a| key(pod, *a)));
        seen.chain(misshapen).collect()
    }

    fn heard(&mut self, pod: &Pod) {
        self.told = self.told.max(version(pod).unwrap_or_default());
    }

    fn serves(&mut self, host: HostName, agent: SocketAddr) {
        let before = self.agents.insert(host.clone(), agent);
        self.new_host |= before != Some(agent) || !self.reachable.contains(&host);
    }

    fn forget(&mut self, key: &SandboxKey) {
        self.forget_seen(key);
        self.forget_misshapen(key);
    }

    fn forget_seen(&mut self, key: &SandboxKey) {
        take(&mut self.seen, key);
    }

    fn forget_misshapen(&mut self, key: &SandboxKey) {
        take(&mut self.misshapen, key);
    }

    /// Once for each new thing to say.
    fn tell(&mut self, pod: &PodUid, waiting: Waiting) -> Vec<Effect> {
        match self.asked_for(pod) {
            Some(Want::Room { told, .. }) if told.as_ref() != Some(&waiting) => {
                *told = Some(waiting.clone());
                vec![Effect::Tell(pod.clone(), waiting)]
            }
            _ => vec![],
        }
    }

    /// What is to be done for a pod, given what is wanted and what there is.
    fn settle(&mut self, pod: &PodUid) -> Vec<Effect> {
        if !self.is_known(pod) {
            return vec![];
        }
        let current: BTreeSet<Attempt> = self.wants_of(pod).filter_map(Want::attempt).collect();
        let mut effects = vec![];
        for (attempt, seen) in self.seen.get_mut(pod).into_iter().flatten() {
            let stale = !current.contains(attempt);
            if stale && !seen.deleting && seen.placed.deletion.is_none() {
                seen.deleting = true;
                effects.push(Effect::Delete(key(pod, *attempt)));
            }
        }
        for (attempt, there) in self.misshapen.get_mut(pod).into_iter().flatten() {
            let mut wants = self
                .wants
                .get_mut(pod)
                .into_iter()
                .chain(self.beside.get_mut(pod));
            let refused = match wants.find(|want| want.attempt() == Some(*attempt)) {
                Some(Want::Kept { .. }) => false,
                Some(Want::Room {
                    asked,
                    answered,
                    told,
                    ..
                }) => {
                    if !*answered {
                        *asked = true;
                        let why = Waiting::refused(format!(
                            "The pool has changed what it was asked for: {}",
                            there.wrong
                        ));
                        if told.as_ref() != Some(&why) {
                            *told = Some(why.clone());
                            effects.push(Effect::Tell(pod.clone(), why));
                        }
                        effects.push(Effect::Again(pod.clone()));
                    }
                    !*answered
                }
                _ => true,
            };
            if refused && !std::mem::replace(&mut there.deleting, true) {
                effects.push(Effect::Delete(key(pod, *attempt)));
            }
        }
        effects.extend(self.give_up_further(pod));
        let mut seeks = false;
        for want in self.wants_of(pod) {
            match want {
                Want::Kept {
                    attempt,
                    unclaimed: false,
                    ..
                } if self.listed && !self.is_there(pod, *attempt) => {
                    effects.push(Effect::Look(key(pod, *attempt)));
                }
                Want::Room { answered: false, .. } => seeks = true,
                _ => {}
            }
        }
        if seeks {
            effects.extend(self.seek(pod));
        }
        let nothing = self.wants_of(pod).all(|want| matches!(want, Want::Nothing));
        if matches!(self.beside.get(pod), Some(Want::Nothing)) && self.wants.contains_key(pod) {
            self.beside.remove(pod);
        }
        if nothing && !self.seen.contains_key(pod) && !self.misshapen.contains_key(pod) {
            self.wants.remove(pod);
            self.beside.remove(pod);
        }
        effects
    }

    /// On with what was given up: its claim's deletion, and the proof.
    fn give_up_further(&mut self, pod: &PodUid) -> Vec<Effect> {
        let mut effects = vec![];
        let beside = self.beside.get_mut(pod);
        for want in self.wants.get_mut(pod).into_iter().chain(beside) {
            let Want::Kept {
                attempt,
                unclaimed,
                given_up: Some(given_up),
                ..
            } = want
            else {
                continue;
            };
            let key = key(pod, *attempt);
            if *unclaimed || given_up.is_lapsed() {
                if std::mem::replace(&mut given_up.told, true) {
                    continue;
                }
                if !*unclaimed {
                    // Whoever comes back there finds that nothing of it is claimed.
                    effects.push(Effect::Remove(key.clone()));
                }
                effects.push(Effect::Over(key));
                continue;
            }
            if let Some(seen) = self.seen.get_mut(pod).and_then(|a| a.get_mut(&key.attempt))
                && !seen.deleting
                && seen.placed.deletion.is_none()
            {
                seen.deleting = true;
                effects.push(Effect::Delete(key));
            }
        }
        effects
    }

    /// On with a claim that is wanted.
    fn seek(&mut self, pod: &PodUid) -> Vec<Effect> {
        let Some(Want::Room {
            claim,
            asked,
            answered,
            ..
        }) = self
            .wants
            .get_mut(pod)
            .into_iter()
            .chain(self.beside.get_mut(pod))
            .find(|want| matches!(want, Want::Room { .. }))
        else {
            return vec![];
        };
        let attempt = claim.key.attempt;
        let misshapen = self.misshapen.get(pod);
        if misshapen.is_some_and(|m| m.contains_key(&attempt)) {
            return vec![];
        }
        let Some(seen) = self.seen.get_mut(pod).and_then(|a| a.get_mut(&attempt)) else {
            if *asked || !self.listed {
                return vec![];
            }
            *asked = true;
            return vec![Effect::Create(claim.clone())];
        };
        let placed = &seen.placed;
        if placed.deletion.is_some() || seen.deleting || placed.phase.is_over() || placed.claim != *claim {
            *answered = true;
            let mut effects = vec![Effect::Lost(pod.clone())];
            if !seen.deleting && seen.placed.deletion.is_none() {
                seen.deleting = true;
                effects.push(Effect::Delete(key(pod, attempt)));
            }
            return effects;
        }
        match (&placed.host, placed.agent) {
            (Some(host), Some(_)) if self.reachable.contains(host) => {
                *answered = true;
                vec![Effect::Room(pod.clone(), host.clone())]
            }
            (Some(_), _) => self.tell(
                pod,
                Waiting::for_host("A host was found for the pod, and is not in reach yet"),
            ),
            (None, _) => {
                let message = if seen.unscheduled.is_empty() {
                    "The pool's scheduler looks for a host".to_owned()
                } else {
                    seen.unscheduled.clone()
                };
                self.tell(pod, Waiting::for_host(message))
            }
        }
    }
}

fn key(pod: &PodUid, attempt: Attempt) -> SandboxKey {
    SandboxKey {
        pod: pod.clone(),
        attempt,
    }
}

fn version(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_ref()?.parse().ok()
}

fn take<T>(map: &mut BTreeMap<PodUid, BTreeMap<Attempt, T>>, key: &SandboxKey) {
    if let Some(attempts) = map.get_mut(&key.pod) {
        attempts.remove(&key.attempt);
        if attempts.is_empty() {
            map.remove(&key.pod);
        }
    }
}

/// The scheduler's own words.
fn unscheduled(pod: &Pod) -> String {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == "PodScheduled" && c.status == "False")
        .and_then(|c| c.message.clone())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
