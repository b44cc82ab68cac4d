//! What may be done with a pod next: the rules by which it runs at most once.
//!
//! Pure. The pod's [`driver`](super::driver) feeds it what the API server
//! wants, what hosts report and how calls ended, and carries out the effects.
//!
//! ```text
//!            not on record, Run        room         on record, in hand          accepted / seen
//!  Unread ──────────────────▶ Claiming ───▶ Preparing ───────────▶ Starting ─────────────────▶ Placed
//!     │ on record               ▲  ▲                     refused    │  │ may run there, but      │
//!     ▼         seen            │  └────────────────────────────────┘  │ not known to            │ not Run
//!  Recorded ────────▶ Placed    │                                      ▼                         ▼
//!     │ its host is heard and   │ Run                 Forgetting ◀──────── Stopped ◀───── Stopping
//!     │ does not have it        └────────────────────────┤                   │
//!     └──────────────────────────────────────────────────▶                   │
//!              Vacant ◀──────────────────────────────────┘       Removing ◀──┘ Delete
//!                 │ Delete                                           │ removed
//!                 └──▶ Removing ─▶ Over                              └──▶ Forgetting ─▶ Over
//! ```
//!
//! What always holds, over crashes of this process (property tests below):
//! - **Nothing is asked of a host that is not on record.** A placement is on the
//!   pod's record ([`record`](super::record)) before its host hears of it, so a
//!   later process knows the one host that may run the pod. A pod that is not on
//!   record was never asked of any.
//! - **At most one attempt runs.** A start is asked of another host only when
//!   the one before was refused there for certain, or was forgotten there,
//!   which fences it. What is on record from before this process is fenced too,
//!   if its host does not have it: the ask may still be on its way. A host that
//!   stays silent holds its pods back until it is certain that it has fenced them
//!   ([`silence`](super::driver)); a listed one until its operator takes it out
//!   of the configuration.
//! - **Two run only in a handover** ([`handover`]): of a pod whose owner allows it, on
//!   notice of its host, with both on record.
//! - **No host can claim a pod.** What a host reports is believed only of the
//!   placement on record; any other is evicted.
//! - The API object is removed only when nothing of it runs.

mod handover;

use std::time::Duration;

pub(crate) use handover::{Beside, Handover, Leave, Step};
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
    /// Its record has not been read.
    Unread,
    /// It may run there: an earlier process put it on record, and the host has
    /// not been heard since.
    Recorded { place: Place },
    /// Nothing runs here, nothing is asked for (yet, if another attempt is not fenced).
    Vacant { next: Attempt },
    /// Room is being asked for.
    Claiming { next: Attempt },
    /// Room is held; the place is being put on record, and what the pod refers to
    /// looked up. The host has not been asked.
    Preparing { place: Place },
    /// It is on record there and the start is being asked. `doubt`: an ask went
    /// unanswered, so it may run there.
    Starting { place: Place, doubt: bool },
    /// The host has it.
    Placed { place: Place },
    /// The host was told to stop it within `grace`.
    Stopping { place: Place, grace: Duration },
    /// No process is left; logs and record are still there. Of a pod that is to run or
    /// to be removed: until the other attempt takes it over, or is fenced.
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
    /// For this attempt: asked for, or given and not used yet.
    Wanted(Attempt),
    /// It may run there.
    Held(&'a Place),
    /// Nothing runs; its logs are there.
    Left(&'a Place),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Intended(Intent),
    /// The record names another attempt, too. Before [`Event::OnRecord`].
    BesideOnRecord {
        beside: Beside,
        place: Place,
        /// The pod's own.
        grace: Duration,
    },
    /// The record names one that was fenced: its number is not given again.
    WasBeside(Attempt),
    /// Where the object's record says that it was placed; None if it never was.
    OnRecord(Option<Place>),
    /// The placer holds room on a host.
    Claimed(HostName),
    /// There is no room to be had under that attempt any more. No host has heard of it.
    Lost(Attempt),
    /// The place is on record and everything the pod refers to is in hand.
    Prepared,
    /// The start was answered, or not.
    Accepted,
    /// The host did not take it, or is out of reach before it was asked.
    Refused(RefusalReason),
    Unanswered,
    /// A host reported.
    Seen {
        place: Place,
        state: SandboxState,
    },
    /// It has to leave its host; it may run on another. Told again while it is there.
    Noticed {
        place: Place,
        grace: Duration,
        leave: Leave,
    },
    /// Nobody has room for two attempts of it.
    NoOverlap,
    /// The next attempt of a handover could serve.
    Ready(Place),
    /// The next attempt is on record as the pod's placement, and the one before beside it.
    Switched,
    /// A host that has told what it has does not have it, or is not of the pool.
    Missing(Place),
    /// Its host is silent, and it is certain that it may run there no more.
    Lapsed(Place),
    /// The host does not know what it was told to stop.
    StopUnknown(Place),
    Forgotten(Place),
    /// The API object is gone.
    Removed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Put the place on record and look up everything; answered by `Prepared` (or
    /// `Refused`, `OnRecord` or a change of intent).
    Prepare(Place),
    /// Answered by `Accepted`, `Refused` or `Unanswered`. `again`: after a pause.
    Start { place: Place, again: bool },
    /// Repeated until the host answers. Seen as `Stopped`, or `StopUnknown`.
    Stop { place: Place, grace: Duration },
    /// Repeated until the host answers; answered by `Forgotten`.
    Forget(Place),
    /// Put the next attempt on record as the pod's placement and tell its address, in
    /// one write, which is repeated; answered by `Switched`.
    Switch(Place),
    /// Of a placement that is not the current one: forget it, ask nothing more.
    Evict(Place),
    /// Write the final status and delete the object; answered by `Removed`.
    Remove,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lifecycle {
    intent: Intent,
    stage: Stage,
    /// The other attempt, if there is one.
    handover: Option<Handover>,
    /// The latest attempt that was put on record for a handover.
    used: Option<Attempt>,
}

/// For what still runs when the pod's phase is final.
const FINISH_GRACE: Duration = Duration::from_secs(30);

impl Lifecycle {
    pub(crate) fn new(intent: Intent) -> Self {
        Self {
            intent,
            stage: Stage::Unread,
            handover: None,
            used: None,
        }
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    pub(crate) fn intent(&self) -> Intent {
        self.intent
    }

    /// Where it runs or may run, or its remains are.
    pub(crate) fn place(&self) -> Option<&Place> {
        match &self.stage {
            Stage::Recorded { place }
            | Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Stopped { place }
            | Stage::Forgetting { place } => Some(place),
            Stage::Removing { place } => place.as_ref(),
            Stage::Unread
            | Stage::Vacant { .. }
            | Stage::Claiming { .. }
            | Stage::Preparing { .. }
            | Stage::Over => None,
        }
    }

    /// What the placer is to keep for it. Levelled: the driver tells the placer
    /// whenever it differs from what it last told.
    pub(crate) fn room(&self) -> Room<'_> {
        match &self.stage {
            Stage::Claiming { next } => Room::Wanted(*next),
            Stage::Preparing { place } => Room::Wanted(place.attempt),
            // Forgetting: the fence may have been asked of a host that runs it.
            Stage::Recorded { place }
            | Stage::Starting { place, .. }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Forgetting { place } => Room::Held(place),
            Stage::Stopped { place } | Stage::Removing { place: Some(place) } => Room::Left(place),
            Stage::Unread | Stage::Vacant { .. } | Stage::Removing { place: None } | Stage::Over => {
                Room::Nothing
            }
        }
    }

    /// The same for the other attempt of a handover.
    pub(crate) fn room_beside(&self) -> Room<'_> {
        match self.handover.as_ref().map(|handover| &handover.step) {
            None => Room::Nothing,
            Some(Step::Claiming { next }) => Room::Wanted(*next),
            Some(Step::Preparing { place }) => Room::Wanted(place.attempt),
            Some(
                Step::Starting { place }
                | Step::Rising { place }
                | Step::Switching { place }
                | Step::Ending { place }
                | Step::Fencing { place },
            ) => Room::Held(place),
        }
    }

    /// An event that does not fit the stage is late and changes nothing.
    pub(crate) fn step(mut self, event: Event) -> (Self, Vec<Effect>) {
        match event {
            Event::Intended(intent) => self.intended(intent),
            Event::OnRecord(place) => self.on_record(place),
            Event::BesideOnRecord { beside, place, grace } => self.found_beside(beside, place, grace),
            Event::WasBeside(attempt) => {
                self.used = self.used.max(Some(attempt));
                self.stay()
            }
            Event::Claimed(host) => match self.stage {
                Stage::Claiming { next } => {
                    let place = Place { host, attempt: next };
                    let prepare = Effect::Prepare(place.clone());
                    self.to(Stage::Preparing { place }, [prepare])
                }
                _ => self.next_claimed(host),
            },
            Event::Lost(attempt) => match (&self.stage, attempt.next()) {
                (Stage::Claiming { next }, Some(later)) if *next == attempt => {
                    self.to(Stage::Claiming { next: later }, [])
                }
                _ => self.next_lost(attempt),
            },
            Event::Prepared => match self.stage.clone() {
                Stage::Preparing { place } => {
                    let start = Effect::Start {
                        place: place.clone(),
                        again: false,
                    };
                    self.to(Stage::Starting { place, doubt: false }, [start])
                }
                _ => self.next_prepared(),
            },
            Event::Accepted => match self.stage.clone() {
                Stage::Starting { place, .. } => self.placed(place),
                _ => self.next_accepted(),
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
                _ => self.next_unanswered(),
            },
            Event::Refused(reason) => match self.stage.clone() {
                Stage::Starting { place, doubt } => self.refused(place, doubt, reason),
                Stage::Preparing { place } => self.after(&place),
                _ => self.next_refused(reason),
            },
            Event::Seen { place, state } => self.seen(place, state),
            Event::Noticed { place, grace, leave } => self.noticed(&place, grace, leave),
            Event::NoOverlap => self.without_overlap(),
            Event::Ready(place) => self.next_ready(&place),
            Event::Switched => self.switched(),
            Event::Missing(gone) => self.missing(&gone),
            Event::Lapsed(over) => self.lapsed(&over),
            Event::StopUnknown(at) => match self.stage.clone() {
                // The host has never had it, or has lost it: fence it.
                Stage::Stopping { place, .. } if place == at => self.forget(place),
                _ => self.second_stop_unknown(&at),
            },
            Event::Forgotten(at) => match self.stage.clone() {
                Stage::Forgetting { place } if place == at => self.after(&place),
                _ => self.second_forgotten(&at),
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
        match self.attempt_after(place) {
            Some(next) => self.vacant(next),
            None => self.to(Stage::Over, []),
        }
    }

    /// Nothing of it runs anywhere, but for the other attempt of a handover.
    fn vacant(self, next: Attempt) -> (Self, Vec<Effect>) {
        match self.intent {
            _ if self.waits_for_second() => self.to(Stage::Vacant { next }, []),
            Intent::Reap => self.to(Stage::Over, []),
            Intent::Run => self.to(Stage::Claiming { next }, []),
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
    fn stopped(mut self, place: Place) -> (Self, Vec<Effect>) {
        if self.intent == Intent::Run
            && let Some(way_made) = self.makes_way(&place)
        {
            return way_made;
        }
        match self.intent {
            // It was lost (its host restarted): a new attempt, once this one is fenced.
            Intent::Run | Intent::Reap => self.forget(place),
            Intent::Delete { .. } if !self.waits_for_second() => {
                self.to(Stage::Removing { place: Some(place) }, [Effect::Remove])
            }
            Intent::Delete { .. } | Intent::Finish => self.to(Stage::Stopped { place }, []),
        }
    }

    fn forget(self, place: Place) -> (Self, Vec<Effect>) {
        let forget = Effect::Forget(place.clone());
        self.to(Stage::Forgetting { place }, [forget])
    }

    fn on_record(self, place: Option<Place>) -> (Self, Vec<Effect>) {
        match (self.stage.clone(), place) {
            (Stage::Unread, None) => self.vacant(Attempt::FIRST),
            (Stage::Unread, Some(place)) => self.recorded(place),
            // Written by another process, which may have asked that host: it counts.
            (Stage::Claiming { next }, Some(place)) if place.attempt >= next => self.recorded(place),
            (Stage::Preparing { place: ours }, Some(place))
                if place != ours && place.attempt >= ours.attempt =>
            {
                self.recorded(place)
            }
            (Stage::Recorded { place: older }, Some(place)) if place.attempt > older.attempt => {
                self.recorded(place)
            }
            _ => self.stay(),
        }
    }

    /// It may run there.
    fn recorded(self, place: Place) -> (Self, Vec<Effect>) {
        match self.intent {
            Intent::Run | Intent::Finish => self.to(Stage::Recorded { place }, []),
            // No need to wait for a report: the host is asked until it answers.
            Intent::Delete { .. } | Intent::Reap => self.placed(place),
        }
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
        let mut effects = self.give_up_next();
        match intent {
            Intent::Delete { grace } => effects.extend(self.hasten_former(grace)),
            Intent::Reap => effects.extend(self.hasten_former(Duration::ZERO)),
            Intent::Run | Intent::Finish => {}
        }
        let (this, more) = self.on_with_intent();
        effects.extend(more);
        (this, effects)
    }

    /// What the stage comes to, now that something else is wanted.
    fn on_with_intent(self) -> (Self, Vec<Effect>) {
        let intent = self.intent;
        match self.stage.clone() {
            Stage::Unread if intent == Intent::Reap => self.to(Stage::Over, []),
            Stage::Vacant { next } | Stage::Claiming { next } => self.vacant(next),
            Stage::Preparing { place } => self.vacant(place.attempt),
            Stage::Recorded { place } => self.recorded(place),
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
            Stage::Unread
            | Stage::Starting { .. }
            | Stage::Forgetting { .. }
            | Stage::Removing { .. }
            | Stage::Over => self.stay(),
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
        if self.stage == Stage::Unread {
            return self.stay();
        }
        if self.place() != Some(&seen) {
            if self.second() == Some(&seen) {
                return self.second_seen(seen, state);
            }
            // Fenced, given up, or claimed by a host that was never asked.
            return (self, vec![Effect::Evict(seen)]);
        }
        let stopped = state == SandboxState::Stopped;
        match self.stage {
            Stage::Recorded { .. } | Stage::Starting { .. } if !stopped => self.placed(seen),
            Stage::Recorded { .. }
            | Stage::Starting { .. }
            | Stage::Placed { .. }
            | Stage::Stopping { .. }
                if stopped =>
            {
                self.stopped(seen)
            }
            _ => self.stay(),
        }
    }

    /// Nothing of it is there. An ask may still be on its way, so it is fenced.
    fn missing(mut self, gone: &Place) -> (Self, Vec<Effect>) {
        if self.intent == Intent::Run
            && matches!(&self.stage, Stage::Placed { place } | Stage::Stopped { place } if place == gone)
            && let Some(way_made) = self.makes_way(gone)
        {
            return way_made;
        }
        match self.stage.clone() {
            Stage::Recorded { place }
            | Stage::Placed { place }
            | Stage::Stopping { place, .. }
            | Stage::Stopped { place }
                if place == *gone =>
            {
                self.forget(place)
            }
            _ => self.second_missing(gone),
        }
    }

    /// Its host fences it by itself: it needs no answer.
    fn lapsed(mut self, over: &Place) -> (Self, Vec<Effect>) {
        if self.place() != Some(over) || matches!(self.stage, Stage::Removing { .. }) {
            return self.second_lapsed(over);
        }
        if self.intent == Intent::Run
            && let Some(way_made) = self.makes_way(over)
        {
            return way_made;
        }
        self.after(over)
    }
}

#[cfg(test)]
mod tests;
