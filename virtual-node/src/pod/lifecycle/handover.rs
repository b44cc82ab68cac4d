//! The second attempt of a pod that is handed over from a host that has to give it up
//! to another. Part of the [`Lifecycle`]: its stage is about the attempt that the pod's
//! status tells of, this about the other one.
//!
//! ```text
//!  stage  Placed(old) ──────────────────────────────────────▶ Placed(next)
//!                                                    ▲ switched: one write
//!  here   Claiming ▶ Preparing ▶ Starting ▶ Rising ▶ Switching ▶ Ending(old) ▶ Fencing(old) ▶ none
//!             │          │           │         │  ready
//!             │          │           └────┬────┘ refused, over, or the pod is not to run
//!             └────┬─────┘                ▼
//!                  ▼ no room          Fencing(next)
//!                 none ◀──────────────────┘  another handover, or the old is stopped first
//! ```
//!
//! What always holds, over crashes of this process (the same property tests):
//! - two attempts run only in a handover, and then both are on record;
//! - the older is never started again, and nothing else begins before the other of the
//!   two is fenced;
//! - the pod's address changes once: with the record, in one write.
//!
//! An old attempt that ends by itself (its host stops it when only the pod's own grace
//! is left of the notice) makes way for one that is being started: nothing overlaps
//! then, and the switch waits for no readiness. So does one whose host is silent and has
//! fenced it ([`Event::Lapsed`](super::Event::Lapsed)); a second attempt that was fenced
//! so is over as if it had been forgotten.

use std::time::Duration;

use pool_agent_api::{Attempt, HostName, RefusalReason, status::SandboxState};

use super::{Effect, Intent, Lifecycle, Place, Stage};

/// What a host's notice leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It ends here before it begins elsewhere.
    StopFirst,
    /// It may overlap with its next attempt.
    HandOver,
}

/// Which of the two attempts on record is not the pod's placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Beside {
    Next,
    Former,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handover {
    /// The pod's own, from being told to stop to its end.
    grace: Duration,
    pub(crate) step: Step,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Room for the next attempt is being asked for.
    Claiming { next: Attempt },
    /// Room is held; the next attempt is being put on record beside the one that serves.
    Preparing { place: Place },
    /// Its start is being asked, and it may run there.
    Starting { place: Place },
    /// Its host has it; it is not ready yet.
    Rising { place: Place },
    /// It becomes the pod's placement: that is being written.
    Switching { place: Place },
    /// The former attempt was told to stop.
    Ending { place: Place },
    /// One of the two was told to be forgotten.
    Fencing { place: Place },
}

impl Step {
    /// What is under way is a start, or the write that ends it.
    pub(crate) fn begins(&self) -> bool {
        matches!(
            self,
            Self::Claiming { .. } | Self::Preparing { .. } | Self::Starting { .. } | Self::Switching { .. }
        )
    }
}

impl Handover {
    /// Where the second attempt runs or may run.
    pub(crate) fn place(&self) -> Option<&Place> {
        match &self.step {
            Step::Claiming { .. } | Step::Preparing { .. } => None,
            Step::Starting { place }
            | Step::Rising { place }
            | Step::Switching { place }
            | Step::Ending { place }
            | Step::Fencing { place } => Some(place),
        }
    }

    /// Of those two it is.
    pub(crate) fn beside(&self) -> Option<(Beside, &Place)> {
        match &self.step {
            Step::Claiming { .. } | Step::Fencing { .. } => None,
            Step::Preparing { place }
            | Step::Starting { place }
            | Step::Rising { place }
            | Step::Switching { place } => Some((Beside::Next, place)),
            Step::Ending { place } => Some((Beside::Former, place)),
        }
    }

    /// The next attempt may take the pod over as soon as it can.
    fn rises(&self) -> bool {
        matches!(
            self.step,
            Step::Starting { .. } | Step::Rising { .. } | Step::Switching { .. }
        )
    }
}

type Stepped = (Lifecycle, Vec<Effect>);

impl Lifecycle {
    pub(crate) fn handover(&self) -> Option<&Handover> {
        self.handover.as_ref()
    }

    fn step_of(&self) -> Option<&Step> {
        self.handover.as_ref().map(|h| &h.step)
    }

    pub(crate) fn second(&self) -> Option<&Place> {
        self.handover.as_ref().and_then(Handover::place)
    }

    /// The attempt that follows all that were put to use.
    pub(super) fn attempt_after(&self, place: &Place) -> Option<Attempt> {
        self.used
            .map_or(place.attempt, |used| used.max(place.attempt))
            .next()
    }

    /// A process before this one put it on record beside the pod's placement.
    pub(super) fn found_beside(mut self, beside: Beside, place: Place, grace: Duration) -> Stepped {
        if self.stage != Stage::Unread {
            return self.stay();
        }
        self.used = self.used.max(Some(place.attempt));
        match beside {
            // It is not known how far that one had come. If the notice stands, another
            // handover begins.
            Beside::Next => self.fence(place, grace),
            Beside::Former => self.end(place, grace),
        }
    }

    pub(super) fn noticed(self, at: &Place, grace: Duration, leave: Leave) -> Stepped {
        let place = match (self.intent, &self.stage) {
            (Intent::Run, Stage::Placed { place }) if place == at => place.clone(),
            _ => return self.stay(),
        };
        match (leave, self.step_of()) {
            (Leave::HandOver, None) => match self.attempt_after(&place) {
                Some(next) => self.on(grace, Step::Claiming { next }, []),
                None => self.stop_first(place, grace),
            },
            // At most two; and what is being written is not taken back.
            (Leave::HandOver, Some(_)) | (_, Some(Step::Switching { .. })) => self.stay(),
            (Leave::StopFirst, _) => self.stop_first(place, grace),
        }
    }

    /// There is no room for two: at most one runs. When the one that serves is stopped
    /// is another question.
    pub(super) fn without_overlap(mut self) -> Stepped {
        match (&self.stage, self.step_of()) {
            (Stage::Placed { .. }, Some(step)) if !matches!(step, Step::Switching { .. }) => {
                let effects = self.give_up_next();
                (self, effects)
            }
            _ => self.stay(),
        }
    }

    fn stop_first(mut self, place: Place, grace: Duration) -> Stepped {
        let mut effects = self.give_up_next();
        effects.push(Effect::Stop {
            place: place.clone(),
            grace,
        });
        let (this, _) = self.to(Stage::Stopping { place, grace }, []);
        (this, effects)
    }

    pub(super) fn next_claimed(self, host: HostName) -> Stepped {
        let (Some(Step::Claiming { next }), Stage::Placed { place: old }) = (self.step_of(), &self.stage)
        else {
            return self.stay();
        };
        if old.host == host {
            // One host has one attempt of a pod.
            return self.without_overlap();
        }
        let place = Place { host, attempt: *next };
        let mut this = self;
        this.used = this.used.max(Some(place.attempt));
        let prepare = Effect::Prepare(place.clone());
        this.advance(Step::Preparing { place }, [prepare])
    }

    pub(super) fn next_lost(self, attempt: Attempt) -> Stepped {
        match (self.step_of(), attempt.next()) {
            (Some(Step::Claiming { next }), Some(later)) if *next == attempt => {
                self.advance(Step::Claiming { next: later }, [])
            }
            _ => self.stay(),
        }
    }

    pub(super) fn next_prepared(self) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Preparing { place }) => {
                let start = Effect::Start {
                    place: place.clone(),
                    again: false,
                };
                self.advance(Step::Starting { place }, [start])
            }
            _ => self.stay(),
        }
    }

    pub(super) fn next_unanswered(self) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Starting { place }) => {
                let start = Effect::Start {
                    place: place.clone(),
                    again: true,
                };
                self.advance(Step::Starting { place }, [start])
            }
            _ => self.stay(),
        }
    }

    pub(super) fn next_refused(self, reason: RefusalReason) -> Stepped {
        match self.step_of().cloned() {
            // Nobody was asked.
            Some(Step::Preparing { place }) => self.advance(Step::Claiming { next: place.attempt }, []),
            Some(Step::Starting { place }) if reason == RefusalReason::SpecConflict => self.rises(place),
            Some(Step::Starting { place }) => self.fence_second(place),
            _ => self.stay(),
        }
    }

    pub(super) fn next_accepted(self) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Starting { place }) => self.rises(place),
            _ => self.stay(),
        }
    }

    /// Its host has it. If the one before is over, nothing is left to wait for.
    fn rises(self, place: Place) -> Stepped {
        match self.stage {
            Stage::Stopped { .. } => self.switch(place),
            _ => self.advance(Step::Rising { place }, []),
        }
    }

    fn switch(self, place: Place) -> Stepped {
        let switch = Effect::Switch(place.clone());
        self.advance(Step::Switching { place }, [switch])
    }

    pub(super) fn next_ready(self, at: &Place) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Rising { place }) if place == *at => self.switch(place),
            _ => self.stay(),
        }
    }

    pub(super) fn switched(self) -> Stepped {
        let (Some(handover), Some(former)) = (self.handover.clone(), self.place().cloned()) else {
            return self.stay();
        };
        let Step::Switching { place } = handover.step else {
            return self.stay();
        };
        let over = matches!(self.stage, Stage::Stopped { .. });
        let (this, _) = self.to(Stage::Placed { place }, []);
        if over {
            this.fence(former, handover.grace)
        } else {
            this.end(former, handover.grace)
        }
    }

    pub(super) fn second_seen(self, place: Place, state: SandboxState) -> Stepped {
        let stopped = state == SandboxState::Stopped;
        match self.step_of() {
            Some(Step::Starting { .. }) if !stopped => self.rises(place),
            // After a switch, what its host reports is read again.
            Some(Step::Starting { .. } | Step::Rising { .. } | Step::Ending { .. }) if stopped => {
                self.fence_second(place)
            }
            _ => self.stay(),
        }
    }

    pub(super) fn second_missing(self, gone: &Place) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Rising { place } | Step::Ending { place }) if place == *gone => {
                self.fence_second(place)
            }
            _ => self.stay(),
        }
    }

    pub(super) fn second_stop_unknown(self, at: &Place) -> Stepped {
        match self.step_of().cloned() {
            Some(Step::Ending { place }) if place == *at => self.fence_second(place),
            _ => self.stay(),
        }
    }

    /// One of the two is fenced. What had to wait for that goes on.
    pub(super) fn second_forgotten(self, at: &Place) -> Stepped {
        match self.step_of() {
            Some(Step::Fencing { place }) if place == at => self.second_over(),
            _ => self.stay(),
        }
    }

    /// Its host has fenced it by itself. What is being written is not taken back: of
    /// that one it is told again when it is the pod's placement.
    pub(super) fn second_lapsed(self, over: &Place) -> Stepped {
        match self.step_of() {
            Some(Step::Switching { .. }) => self.stay(),
            _ if self.second() == Some(over) => self.second_over(),
            _ => self.stay(),
        }
    }

    fn second_over(mut self) -> Stepped {
        self.handover = None;
        match self.stage.clone() {
            Stage::Stopped { place } if self.intent != Intent::Finish => self.stopped(place),
            Stage::Vacant { next } => self.vacant(next),
            _ => self.stay(),
        }
    }

    /// The attempt at `place` is over, and the pod is to run. None: not in a handover
    /// that goes on without it.
    pub(super) fn makes_way(&mut self, place: &Place) -> Option<Stepped> {
        match self.handover.clone() {
            Some(handover) if handover.rises() => {
                let (this, _) = self.clone().to(Stage::Stopped { place: place.clone() }, []);
                Some(match handover.step {
                    Step::Rising { place } | Step::Switching { place } => this.switch(place),
                    // What is under way ends with the stage that has passed.
                    Step::Starting { place } => {
                        let start = Effect::Start {
                            place: place.clone(),
                            again: true,
                        };
                        this.advance(Step::Starting { place }, [start])
                    }
                    _ => this.stay(),
                })
            }
            Some(Handover {
                step: Step::Claiming { .. } | Step::Preparing { .. },
                ..
            }) => {
                self.handover = None;
                None
            }
            _ => None,
        }
    }

    /// Nothing may begin: the other attempt is not fenced yet.
    pub(super) fn waits_for_second(&self) -> bool {
        self.handover.is_some()
    }

    /// The pod is not to run any more, or not as two.
    pub(super) fn give_up_next(&mut self) -> Vec<Effect> {
        let Some(handover) = &mut self.handover else {
            return vec![];
        };
        match handover.step.clone() {
            Step::Claiming { .. } | Step::Preparing { .. } => {
                self.handover = None;
                vec![]
            }
            Step::Starting { place } | Step::Rising { place } | Step::Switching { place } => {
                handover.step = Step::Fencing { place: place.clone() };
                vec![Effect::Forget(place)]
            }
            Step::Ending { .. } | Step::Fencing { .. } => vec![],
        }
    }

    /// A former attempt has no more time than the pod.
    pub(super) fn hasten_former(&mut self, most: Duration) -> Vec<Effect> {
        match &mut self.handover {
            Some(Handover {
                grace,
                step: Step::Ending { place },
            }) if most < *grace => {
                *grace = most;
                vec![Effect::Stop {
                    place: place.clone(),
                    grace: most,
                }]
            }
            _ => vec![],
        }
    }

    fn end(self, place: Place, grace: Duration) -> Stepped {
        let stop = Effect::Stop {
            place: place.clone(),
            grace,
        };
        self.on(grace, Step::Ending { place }, [stop])
    }

    fn fence(self, place: Place, grace: Duration) -> Stepped {
        let forget = Effect::Forget(place.clone());
        self.on(grace, Step::Fencing { place }, [forget])
    }

    fn fence_second(self, place: Place) -> Stepped {
        let forget = Effect::Forget(place.clone());
        self.advance(Step::Fencing { place }, [forget])
    }

    fn on<const N: usize>(mut self, grace: Duration, step: Step, effects: [Effect; N]) -> Stepped {
        self.handover = Some(Handover { grace, step });
        (self, effects.into())
    }

    fn advance<const N: usize>(mut self, step: Step, effects: [Effect; N]) -> Stepped {
        if let Some(handover) = &mut self.handover {
            handover.step = step;
        }
        (self, effects.into())
    }
}
