//! What may be done with a pod next: the rules by which it runs at most once.
//!
//! Pure. The pod's [`driver`](super::driver) feeds it what the API server
//! wants, what hosts report and how calls ended, and carries out the effects.
//!
//! ```text
//!              settled, Run                       room held               accepted / seen
//!  Unsettled ───────────────▶ Preparing ─▶ Claiming ───────▶ Starting ─────────────────▶ Placed
//!      │ seen on a host           ▲            ▲    refused     │  │ may run there, but      │
//!      │                          │            └────────────────┘  │ not known to            │ not Run
//!      ▼                          │ lost, Run                      ▼                         ▼
//!   Placed                        └───────────────── Forgetting ◀──────── Stopped ◀───── Stopping
//!                                                        │                   │
//!              Vacant ◀──────────────────────────────────┘       Removing ◀──┘ Delete
//!                 │ Delete                                           │ removed
//!                 └──▶ Removing ─▶ Over                              └──▶ Forgetting ─▶ Over
//! ```
//!
//! What always holds, over crashes of this process (property tests below):
//! - **At most one attempt runs.** A start is asked of another host only when
//!   the one before was refused there for certain, or was forgotten there,
//!   which fences it.
//! - **Absent is not gone.** A pod that may have been started by a predecessor
//!   of this process is not started until every host of the pool has said what
//!   it runs ([`Event::Settled`]). A host that stays silent holds such pods
//!   back; its operator fences it by taking it out of the configuration.
//! - A newer attempt of the same pod wins over an older one; the loser is
//!   evicted. Once every host has been heard, attempts are ours to number: a
//!   newer one that we did not start is evicted too, so that no host can claim
//!   a pod that runs elsewhere.
//! - The API object is removed only when nothing of it runs.

use std::time::Duration;

use pool_agent_api::{Attempt, HostName, RefusalReason, status::SandboxState};

/// What is wanted of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intent {
    Run,
    /// Its phase is final: nothing may run, its logs stay.
    Finish,
    /// It is being deleted: stop within the grace, then remove the object.
    Delete {
        grace: Duration,
    },
    /// The API object is gone (seen by a live read): leave nothing.
    Reap,
}

impl Intent {
    /// Later ones win: nothing that is being deleted runs again.
    fn rank(self) -> u8 {
        match self {
            Self::Run => 0,
            Self::Finish => 1,
            Self::Delete { .. } => 2,
            Self::Reap => 3,
        }
    }
}

/// One placement of the pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) host: HostName,
    pub(crate) attempt: Attempt,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing is known to run, but a host that has not been heard may run it.
    Unsettled { next: Attempt },
    /// Nothing runs, nothing is asked for.
    Vacant { next: Attempt },
    /// What it refers to is being looked up.
    Preparing { next: Attempt },
    /// Room is being asked for.
    Claiming { next: Attempt },
    /// Room is held and the start is being asked. `doubt`: an ask went
    /// unanswered, so it may run there.
    Starting { place: Place, doubt: bool },
    /// The host has it.
    Placed { place: Place },
    /// The host was told to stop it within `grace`.
    Stopping { place: Place, grace: Duration },
    /// No process is left; logs and record are still there.
    Stopped { place: Place },
    /// The host was told to forget it.
    Forgetting { place: Place },
    /// The API object is being removed; the remains are at `place`.
    Removing { place: Option<Place> },
    /// Nothing is left to do.
    Over,
}

/// What the pod takes of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room<'a> {
    Nothing,
    Wanted,
    Held(&'a Place),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Intended(Intent),
    /// Every host has reported since this process began (or nobody before it
    /// can have started this pod).
    Settled,
    /// Everything the pod refers to is in hand.
    Prepared,
    /// What is in hand has grown too old while room was waited for.
    Stale,
    /// The placer holds room on a host.
    Claimed(HostName),
    /// The start was answered, or not.
    Accepted,
    Refused(RefusalReason),
    Unanswered,
    /// A host reported.
    Seen {
        place: Place,
        state: SandboxState,
    },
    /// A host does not have it.
    Missing(Place),
    /// The host does not know what it was told to stop.
    StopUnknown(Place),
    Forgotten(Place),
    /// The API object is gone.
    Removed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Look up everything; answered by `Prepared` (or a change of intent).
    Prepare,
    /// Answered by `Accepted`, `Refused` or `Unanswered`. `again`: after a pause.
    Start { place: Place, again: bool },
    /// Repeated until the host answers. Seen as `Stopped`, or `StopUnknown`.
    Stop { place: Place, grace: Duration },
    /// Repeated until the host answers; answered by `Forgotten`.
    Forget(Place),
    /// Of a placement that is not the current one: forget it, ask nothing more.
    Evict(Place),
    /// Write the final status and delete the object; answered by `Removed`.
    Remove,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lifecycle {
    intent: Intent,
    settled: bool,
    stage: Stage,
}

/// For what still runs when the pod's phase is final.
const FINISH_GRACE: Duration = Duration::from_secs(30);

impl Lifecycle {
    pub(crate) fn new(intent: Intent) -> Self {
        Self {
            intent,
            settled: false,
            stage: Stage::Unsettled { next: Attempt::FIRST },
        }
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled
    }

    pub(crate) fn intent(&self) -> Intent {
        self.intent
    }

    /// Where it runs or may run, or its remains are.
    pub(crate) fn place(&self) -> Option<&Place> {
        match &self.stage {
            Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Stopped { place }
            | Stage::Forgetting { place } => Some(place),
            Stage::Removing { place } => place.as_ref(),
            Stage::Unsettled { .. }
            | Stage::Vacant { .. }
            | Stage::Preparing { .. }
            | Stage::Claiming { .. }
            | Stage::Over => None,
        }
    }

    /// What the placer is to keep for it. Levelled: the driver tells the placer
    /// whenever it differs from what it last told.
    pub(crate) fn room(&self) -> Room<'_> {
        match &self.stage {
            Stage::Claiming { .. } => Room::Wanted,
            // Forgetting: the fence may have been asked of a host that runs it.
            Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Forgetting { place } => Room::Held(place),
            Stage::Unsettled { .. }
            | Stage::Vacant { .. }
            | Stage::Preparing { .. }
            | Stage::Stopped { .. }
            | Stage::Removing { .. }
            | Stage::Over => Room::Nothing,
        }
    }

    /// An event that does not fit the stage is late and changes nothing.
    pub(crate) fn step(mut self, event: Event) -> (Self, Vec<Effect>) {
        match event {
            Event::Intended(intent) => self.intended(intent),
            Event::Settled => {
                self.settled = true;
                match self.stage.clone() {
                    Stage::Unsettled { next } => self.vacant(next),
                    Stage::Stopped { place } => self.stopped(place),
                    _ => self.stay(),
                }
            }
            Event::Prepared => match self.stage {
                Stage::Preparing { next } => self.to(Stage::Claiming { next }, []),
                _ => self.stay(),
            },
            Event::Stale => match self.stage {
                Stage::Claiming { next } => self.vacant(next),
                _ => self.stay(),
            },
            Event::Claimed(host) => match self.stage {
                Stage::Claiming { next } => {
                    let place = Place { host, attempt: next };
                    let start = Effect::Start {
                        place: place.clone(),
                        again: false,
                    };
                    self.to(Stage::Starting { place, doubt: false }, [start])
                }
                _ => self.stay(),
            },
            Event::Accepted => match self.stage.clone() {
                Stage::Starting { place, .. } => self.placed(place),
                _ => self.stay(),
            },
            Event::Unanswered => match self.stage.clone() {
                Stage::Starting { place, .. } if self.intent == Intent::Run => {
                    let start = Effect::Start {
                        place: place.clone(),
                        again: true,
                    };
                    self.to(Stage::Starting { place, doubt: true }, [start])
                }
                // It may run there: stop it there, and believe only what the host says.
                Stage::Starting { place, .. } => self.placed(place),
                _ => self.stay(),
            },
            Event::Refused(reason) => match self.stage.clone() {
                Stage::Starting { place, doubt } => self.refused(place, doubt, reason),
                _ => self.stay(),
            },
            Event::Seen { place, state } => self.seen(place, state),
            Event::Missing(gone) => self.missing(&gone),
            Event::StopUnknown(at) => match self.stage.clone() {
                // The host has never had it, or has lost it: fence it.
                Stage::Stopping { place, .. } if place == at => self.forget(place),
                _ => self.stay(),
            },
            Event::Forgotten(at) => match self.stage.clone() {
                Stage::Forgetting { place } if place == at => self.after(&place),
                _ => self.stay(),
            },
            Event::Removed => match self.stage.clone() {
                Stage::Removing { place } => {
                    self.intent = Intent::Reap;
                    match place {
                        Some(place) => self.forget(place),
                        None => self.to(Stage::Over, []),
                    }
                }
                _ => self.stay(),
            },
        }
    }

    fn stay(self) -> (Self, Vec<Effect>) {
        (self, vec![])
    }

    fn to<const N: usize>(self, stage: Stage, effects: [Effect; N]) -> (Self, Vec<Effect>) {
        (Self { stage, ..self }, effects.into())
    }

    /// `place` is fenced and nothing runs there.
    fn after(self, place: &Place) -> (Self, Vec<Effect>) {
        match place.attempt.next() {
            Some(next) => self.vacant(next),
            None => self.to(Stage::Over, []),
        }
    }

    /// Nothing of it is known to run.
    fn vacant(self, next: Attempt) -> (Self, Vec<Effect>) {
        match self.intent {
            Intent::Reap => self.to(Stage::Over, []),
            _ if !self.settled => self.to(Stage::Unsettled { next }, []),
            Intent::Run => self.to(Stage::Preparing { next }, [Effect::Prepare]),
            Intent::Finish => self.to(Stage::Vacant { next }, []),
            Intent::Delete { .. } => self.to(Stage::Removing { place: None }, [Effect::Remove]),
        }
    }

    /// It runs there, or may.
    fn placed(self, place: Place) -> (Self, Vec<Effect>) {
        let grace = match self.intent {
            Intent::Run => return self.to(Stage::Placed { place }, []),
            Intent::Finish => FINISH_GRACE,
            Intent::Delete { grace } => grace,
            Intent::Reap => Duration::ZERO,
        };
        let stop = Effect::Stop {
            place: place.clone(),
            grace,
        };
        self.to(Stage::Stopping { place, grace }, [stop])
    }

    /// It runs no more; its remains are there.
    fn stopped(self, place: Place) -> (Self, Vec<Effect>) {
        match self.intent {
            // It was lost (its host restarted): a new attempt, once this one is fenced.
            Intent::Run | Intent::Reap => self.forget(place),
            Intent::Delete { .. } if self.settled => {
                self.to(Stage::Removing { place: Some(place) }, [Effect::Remove])
            }
            // A host that was not heard may run a newer attempt: wait.
            Intent::Delete { .. } | Intent::Finish => self.to(Stage::Stopped { place }, []),
        }
    }

    fn forget(self, place: Place) -> (Self, Vec<Effect>) {
        let forget = Effect::Forget(place.clone());
        self.to(Stage::Forgetting { place }, [forget])
    }

    fn intended(mut self, new: Intent) -> (Self, Vec<Effect>) {
        let intent = match (self.intent, new) {
            // A grace may only get shorter.
            (Intent::Delete { grace: old }, Intent::Delete { grace: new }) => {
                Intent::Delete { grace: old.min(new) }
            }
            (old, new) if new.rank() >= old.rank() => new,
            (old, _) => old,
        };
        if intent == self.intent {
            return self.stay();
        }
        self.intent = intent;
        match self.stage.clone() {
            Stage::Vacant { next }
            | Stage::Preparing { next }
            | Stage::Claiming { next }
            | Stage::Unsettled { next } => self.vacant(next),
            Stage::Placed { place } => self.placed(place),
            Stage::Stopping { place, grace } => {
                let hastened = match intent {
                    Intent::Delete { grace } => grace,
                    Intent::Reap => Duration::ZERO,
                    Intent::Run | Intent::Finish => grace,
                };
                if hastened < grace {
                    self.placed(place)
                } else {
                    self.stay()
                }
            }
            Stage::Stopped { place } => self.stopped(place),
            Stage::Removing { place } if intent == Intent::Reap => match place {
                Some(place) => self.forget(place),
                None => self.to(Stage::Over, []),
            },
            // A start or a forget in flight is waited for; its answer is read
            // with the new intent.
            Stage::Starting { .. } | Stage::Forgetting { .. } | Stage::Removing { .. } | Stage::Over => {
                self.stay()
            }
        }
    }

    fn refused(self, place: Place, doubt: bool, reason: RefusalReason) -> (Self, Vec<Effect>) {
        if reason == RefusalReason::SpecConflict {
            // It is there, by an earlier ask of ours: a spec never changes within an attempt.
            return self.placed(place);
        }
        if doubt {
            // The earlier ask may still be on its way: fence it before going elsewhere.
            return self.forget(place);
        }
        match (self.intent, place.attempt.next()) {
            // What it refers to is in hand: only room is missing.
            (Intent::Run, Some(next)) => self.to(Stage::Claiming { next }, []),
            _ => self.after(&place),
        }
    }

    fn seen(self, seen: Place, state: SandboxState) -> (Self, Vec<Effect>) {
        let adopt = |core: Self, place: Place| {
            if state == SandboxState::Stopped {
                core.stopped(place)
            } else {
                core.placed(place)
            }
        };
        match self.stage.clone() {
            Stage::Unsettled { next }
            | Stage::Vacant { next }
            | Stage::Preparing { next }
            | Stage::Claiming { next } => {
                // One below `next` is fenced or was refused: a stray. Another
                // one was a predecessor's.
                if seen.attempt < next {
                    self.evict(seen)
                } else {
                    adopt(self, seen)
                }
            }
            Stage::Removing { place: None } | Stage::Over => self.evict(seen),
            Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Stopped { place }
            | Stage::Forgetting { place }
            | Stage::Removing { place: Some(place) } => {
                if place == seen {
                    match self.stage {
                        Stage::Starting { .. } => adopt(self, seen),
                        Stage::Placed { .. } | Stage::Stopping { .. } if state == SandboxState::Stopped => {
                            self.stopped(seen)
                        }
                        _ => self.stay(),
                    }
                } else if place.attempt >= seen.attempt || self.settled {
                    // Once all hosts have told what a predecessor started, attempts
                    // are ours to number: a host that tells of a newer one would take
                    // the pod's identity from the host that runs it.
                    self.evict(seen)
                } else {
                    // Newer than ours, so ours is the stray.
                    let (next, mut effects) = adopt(self, seen);
                    effects.push(Effect::Evict(place));
                    (next, effects)
                }
            }
        }
    }

    fn evict(self, stray: Place) -> (Self, Vec<Effect>) {
        (self, vec![Effect::Evict(stray)])
    }

    fn missing(self, gone: &Place) -> (Self, Vec<Effect>) {
        match self.stage.clone() {
            Stage::Placed { place } | Stage::Stopping { place, .. } | Stage::Stopped { place }
                if place == *gone =>
            {
                match self.intent {
                    // Nothing runs there and no record is left; the fence costs one call.
                    Intent::Run | Intent::Reap => self.forget(place),
                    Intent::Finish => self.after(&place),
                    Intent::Delete { .. } => self.stopped(place),
                }
            }
            _ => self.stay(),
        }
    }
}

#[cfg(test)]
mod tests;
