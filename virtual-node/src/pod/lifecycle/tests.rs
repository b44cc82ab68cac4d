use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn host(i: usize) -> HostName {
    format!("host-{i}").parse().unwrap()
}

fn place(i: usize, attempt: u32) -> Place {
    Place {
        host: host(i),
        attempt: Attempt::parse("attempt", attempt).unwrap(),
    }
}

/// Steps through `events` and returns what came of the last.
fn after(intent: Intent, events: &[Event]) -> (Lifecycle, Vec<Effect>) {
    let mut effects = vec![];
    let mut core = Lifecycle::new(intent);
    for event in events {
        (core, effects) = core.step(event.clone());
    }
    (core, effects)
}

const GRACE: Duration = Duration::from_secs(30);

fn seen(i: usize, attempt: u32, state: SandboxState) -> Event {
    Event::Seen {
        place: place(i, attempt),
        state,
    }
}

/// The first attempt is on record on host 0, and nothing else is known.
fn on_record() -> Event {
    Event::OnRecord(Some(place(0, 1)))
}

#[test]
fn a_new_pod_gets_room_is_put_on_record_and_started() {
    let (core, effects) = after(Intent::Run, &[Event::OnRecord(None)]);
    assert_eq!((core.room(), effects.len()), (Room::Wanted(Attempt::FIRST), 0));
    let (core, effects) = core.step(Event::Claimed(host(0)));
    assert_eq!(effects, [Effect::Prepare(place(0, 1))]);
    // Given, and not used yet.
    assert_eq!(core.room(), Room::Wanted(Attempt::FIRST));
    assert_eq!(core.place(), None);
    let (core, effects) = core.step(Event::Prepared);
    let start = Effect::Start {
        place: place(0, 1),
        again: false,
    };
    assert_eq!(effects, [start]);
    assert_eq!(core.room(), Room::Held(&place(0, 1)));
    let (core, effects) = core.step(Event::Accepted);
    assert_eq!(
        (core.stage(), effects.len()),
        (&Stage::Placed { place: place(0, 1) }, 0)
    );
}

#[test]
fn nothing_is_begun_before_the_record_is_read() {
    for event in [
        Event::Intended(Intent::Delete { grace: GRACE }),
        seen(0, 1, SandboxState::Running),
        Event::Claimed(host(0)),
        Event::Prepared,
    ] {
        let (core, effects) = after(Intent::Run, std::slice::from_ref(&event));
        assert_eq!((core.stage(), effects.len()), (&Stage::Unread, 0), "{event:?}");
    }
}

#[test]
fn a_pod_on_record_waits_for_its_host_and_for_no_other() {
    let (core, effects) = after(Intent::Run, &[on_record()]);
    assert_eq!((core.room(), effects.len()), (Room::Held(&place(0, 1)), 0));
    let (core, effects) = core.step(seen(0, 1, SandboxState::Running));
    assert_eq!(
        (core.stage(), effects.len()),
        (&Stage::Placed { place: place(0, 1) }, 0)
    );
}

#[test]
fn a_pod_on_record_that_its_host_does_not_have_is_fenced_before_it_is_placed_anew() {
    let (core, effects) = after(Intent::Run, &[on_record(), Event::Missing(place(0, 1))]);
    // The ask of a process that has died may still be on its way.
    assert_eq!(effects, [Effect::Forget(place(0, 1))]);
    let (core, _) = core.step(Event::Forgotten(place(0, 1)));
    assert_eq!(core.room(), Room::Wanted(place(0, 2).attempt));
}

#[test]
fn a_pod_on_record_that_is_being_deleted_is_stopped_without_waiting_for_a_report() {
    let delete = Event::Intended(Intent::Delete { grace: GRACE });
    for events in [[delete.clone(), on_record()], [on_record(), delete]] {
        let (_, effects) = after(Intent::Run, &events);
        let stop = Effect::Stop {
            place: place(0, 1),
            grace: GRACE,
        };
        assert_eq!(effects, [stop], "{events:?}");
    }
}

#[test]
fn a_pod_that_another_process_put_on_record_meanwhile_is_that_ones() {
    let theirs = place(1, 1);
    for events in [
        vec![Event::OnRecord(None)],
        vec![Event::OnRecord(None), Event::Claimed(host(0))],
    ] {
        let (core, _) = after(Intent::Run, &events);
        let (core, effects) = core.step(Event::OnRecord(Some(theirs.clone())));
        assert_eq!(
            (core.stage(), effects.len()),
            (
                &Stage::Recorded {
                    place: theirs.clone()
                },
                0
            )
        );
    }
}

#[test]
fn a_newer_place_on_record_is_the_one_that_counts_while_nothing_was_heard_of_either() {
    let newer = place(1, 2);
    let (core, effects) = after(Intent::Run, &[on_record(), Event::OnRecord(Some(newer.clone()))]);
    assert_eq!(
        (core.stage(), effects.len()),
        (&Stage::Recorded { place: newer }, 0)
    );
    let (same, _) = core.clone().step(on_record());
    assert_eq!(same, core, "an older one is late");
}

#[test]
fn a_host_out_of_reach_is_given_up_before_it_is_asked() {
    let events = [
        Event::OnRecord(None),
        Event::Claimed(host(0)),
        Event::Refused(RefusalReason::Unknown),
    ];
    let (core, effects) = after(Intent::Run, &events);
    assert_eq!(
        (core.room(), effects.len()),
        (Room::Wanted(place(0, 2).attempt), 0)
    );
}

#[test]
fn an_unanswered_start_is_asked_of_the_same_host_again() {
    let start = [
        Event::OnRecord(None),
        Event::Claimed(host(0)),
        Event::Prepared,
        Event::Unanswered,
    ];
    let (core, effects) = after(Intent::Run, &start);
    let again = Effect::Start {
        place: place(0, 1),
        again: true,
    };
    assert_eq!(effects, [again]);
    // Refused now, but the first ask may still arrive: fence it.
    let (core, effects) = core.step(Event::Refused(RefusalReason::NoRoom));
    assert_eq!(effects, [Effect::Forget(place(0, 1))]);
    let (core, effects) = core.step(Event::Forgotten(place(0, 1)));
    assert_eq!(
        (core.room(), effects.len()),
        (Room::Wanted(place(0, 2).attempt), 0)
    );
}

#[test]
fn a_refused_start_is_tried_elsewhere_under_the_next_attempt() {
    let start = [Event::OnRecord(None), Event::Claimed(host(0)), Event::Prepared];
    let (core, _) = after(Intent::Run, &start);
    let (core, effects) = core.step(Event::Refused(RefusalReason::NoRoom));
    assert_eq!(
        (core.room(), effects.len()),
        (Room::Wanted(place(0, 2).attempt), 0)
    );
    let (_, effects) = core.step(Event::Claimed(host(1)));
    assert_eq!(effects, [Effect::Prepare(place(1, 2))]);
}

#[test]
fn a_deletion_stops_removes_and_forgets_in_that_order() {
    let start = [
        Event::OnRecord(None),
        Event::Claimed(host(0)),
        Event::Prepared,
        Event::Accepted,
    ];
    let (core, _) = after(Intent::Run, &start);
    let (core, effects) = core.step(Event::Intended(Intent::Delete { grace: GRACE }));
    let stop = |grace| Effect::Stop {
        place: place(0, 1),
        grace,
    };
    assert_eq!(effects, [stop(GRACE)]);
    // A shorter grace hastens, a longer one does not delay.
    let (core, effects) = core.step(Event::Intended(Intent::Delete { grace: GRACE * 2 }));
    assert_eq!(effects, []);
    let shorter = Duration::from_secs(1);
    let (core, effects) = core.step(Event::Intended(Intent::Delete { grace: shorter }));
    assert_eq!(effects, [stop(shorter)]);
    let stopped = Event::Seen {
        place: place(0, 1),
        state: SandboxState::Stopped,
    };
    let (core, effects) = core.step(stopped);
    assert_eq!(effects, [Effect::Remove]);
    let (core, effects) = core.step(Event::Removed);
    assert_eq!(effects, [Effect::Forget(place(0, 1))]);
    let (core, effects) = core.step(Event::Forgotten(place(0, 1)));
    assert_eq!((core.stage(), effects.len()), (&Stage::Over, 0));
}

#[test]
fn a_pod_deleted_before_it_started_is_only_removed() {
    for events in [
        vec![Event::OnRecord(None)],
        vec![Event::OnRecord(None), Event::Claimed(host(0))],
        vec![
            Event::OnRecord(None),
            Event::Claimed(host(0)),
            Event::Prepared,
            Event::Refused(RefusalReason::NoRoom),
        ],
    ] {
        let (core, _) = after(Intent::Run, &events);
        let (core, effects) = core.step(Event::Intended(Intent::Delete { grace: GRACE }));
        assert_eq!(effects, [Effect::Remove], "{events:?}");
        assert_eq!(core.room(), Room::Nothing);
        let (core, _) = core.step(Event::Removed);
        assert_eq!(*core.stage(), Stage::Over);
    }
}

#[test]
fn a_finished_pod_keeps_its_remains_until_it_is_deleted() {
    let start = [
        Event::OnRecord(None),
        Event::Claimed(host(0)),
        Event::Prepared,
        Event::Accepted,
    ];
    let (core, _) = after(Intent::Run, &start);
    let (core, effects) = core.step(Event::Intended(Intent::Finish));
    assert!(matches!(effects[..], [Effect::Stop { .. }]));
    let stopped = Event::Seen {
        place: place(0, 1),
        state: SandboxState::Stopped,
    };
    let (core, effects) = core.step(stopped);
    assert_eq!((effects.len(), core.room()), (0, Room::Left(&place(0, 1))));
    // It does not run again, whatever comes.
    let (core, effects) = core.step(Event::Intended(Intent::Run));
    assert_eq!(effects, []);
    let (_, effects) = core.step(Event::Intended(Intent::Delete { grace: GRACE }));
    assert_eq!(effects, [Effect::Remove]);
}

#[test]
fn a_pod_that_was_final_before_the_start_is_left_alone() {
    let (core, effects) = after(
        Intent::Run,
        &[Event::Intended(Intent::Finish), Event::OnRecord(None)],
    );
    assert_eq!((core.room(), effects.len()), (Room::Nothing, 0));
}

#[test]
fn an_object_that_vanished_leaves_nothing_behind() {
    let start = [
        Event::OnRecord(None),
        Event::Claimed(host(0)),
        Event::Prepared,
        Event::Accepted,
    ];
    let (core, _) = after(Intent::Run, &start);
    let (core, effects) = core.step(Event::Intended(Intent::Reap));
    assert!(matches!(
        effects[..],
        [Effect::Stop {
            grace: Duration::ZERO,
            ..
        }]
    ));
    let (core, effects) = core.step(Event::StopUnknown(place(0, 1)));
    assert_eq!(effects, [Effect::Forget(place(0, 1))]);
    let (core, _) = core.step(Event::Forgotten(place(0, 1)));
    assert_eq!(*core.stage(), Stage::Over);
}

#[test]
fn a_host_cannot_claim_a_pod() {
    let claims = [
        place(1, 1),
        place(1, 2),
        place(1, 1_000_000),
        place(0, 2),
        place(0, 1_000_000),
    ];
    let histories = [
        vec![Event::OnRecord(None)],
        vec![Event::OnRecord(None), Event::Claimed(host(0))],
        vec![Event::OnRecord(None), Event::Claimed(host(0)), Event::Prepared],
        vec![on_record()],
        vec![on_record(), seen(0, 1, SandboxState::Running)],
        vec![on_record(), seen(0, 1, SandboxState::Stopped)],
    ];
    for history in histories {
        let (core, _) = after(Intent::Run, &history);
        for claim in &claims {
            let claimed = Event::Seen {
                place: claim.clone(),
                state: SandboxState::Running,
            };
            let (now, effects) = core.clone().step(claimed);
            assert_eq!(effects, [Effect::Evict(claim.clone())], "{history:?}");
            assert_eq!(now, core, "{history:?}");
        }
    }
}

#[test]
fn a_pod_that_has_to_leave_its_host_is_stopped_and_forgotten_there_before_it_has_another() {
    let noticed = |i, attempt| Event::Noticed {
        place: place(i, attempt),
        grace: GRACE,
    };
    let running = [on_record(), seen(0, 1, SandboxState::Running)];
    let (core, _) = after(Intent::Run, &running);
    // Of another placement than the one on record it says nothing.
    let (same, effects) = core.clone().step(noticed(1, 2));
    assert_eq!((same, effects.len()), (core.clone(), 0));
    let (core, effects) = core.step(noticed(0, 1));
    let stop = Effect::Stop {
        place: place(0, 1),
        grace: GRACE,
    };
    assert_eq!(effects, [stop]);
    assert_eq!(core.room(), Room::Held(&place(0, 1)));
    let (core, effects) = core.step(seen(0, 1, SandboxState::Stopped));
    assert_eq!(effects, [Effect::Forget(place(0, 1))]);
    let (core, _) = core.step(Event::Forgotten(place(0, 1)));
    assert_eq!(core.room(), Room::Wanted(place(0, 2).attempt));
}

// ---- the property, in a world of hosts, crashes and lost messages

const HOSTS: usize = 3;

/// One host's agent, as the contract has it.
#[derive(Debug, Clone, Default)]
struct Agent {
    /// Attempt and state.
    sandbox: Option<(u32, SandboxState)>,
    /// Attempts up to here are refused.
    fenced: u32,
    full: bool,
    /// The sandbox that it has is to go.
    notice: bool,
}

impl Agent {
    fn start(&mut self, attempt: u32) -> Result<(), RefusalReason> {
        if let Some((current, state)) = self.sandbox {
            return match current.cmp(&attempt) {
                std::cmp::Ordering::Equal if state == SandboxState::Stopped => {
                    Err(RefusalReason::EndedAttempt)
                }
                std::cmp::Ordering::Equal => Ok(()),
                _ => Err(RefusalReason::OlderAttempt),
            };
        }
        if attempt <= self.fenced {
            return Err(RefusalReason::EndedAttempt);
        }
        if self.full {
            return Err(RefusalReason::NoRoom);
        }
        self.sandbox = Some((attempt, SandboxState::Running));
        self.notice = false;
        Ok(())
    }

    fn forget(&mut self, attempt: u32) {
        self.fenced = self.fenced.max(attempt);
        if self.sandbox.is_some_and(|(a, _)| a <= attempt) {
            self.sandbox = None;
        }
    }

    fn runs(&self) -> bool {
        self.sandbox
            .is_some_and(|(_, state)| state != SandboxState::Stopped)
    }
}

/// What the adversary does.
#[derive(Debug, Clone)]
enum Move {
    /// The oldest effect is carried out and answered.
    Do,
    /// It is carried out, and the answer is lost.
    DoUnanswered,
    /// It does not arrive at all, and the sender knows only that.
    Lose,
    /// It does not arrive now, the sender gives up, and it arrives later.
    Delay,
    /// A delayed start arrives.
    Arrive,
    /// A delayed write of the record arrives.
    ArriveRecord,
    /// The watch tells of the newest version.
    See,
    /// The placer finds room.
    Room(usize),
    Report(usize),
    /// The process is killed and begins again; nothing in flight survives but
    /// what was delayed on its way.
    Crash,
    /// A host claims to run an attempt that is not on record there.
    Claim(usize, u32),
    /// Host `usize` restarts: its sandbox is stopped.
    Reboot(usize),
    Fill(usize),
    /// Host `usize` has to give up what it has.
    Notice(usize),
    Delete,
    Vanish,
    Finish,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let host = 0..HOSTS;
    let step = prop_oneof![
        10 => Just(Move::Do),
        2 => Just(Move::DoUnanswered),
        2 => Just(Move::Lose),
        2 => Just(Move::Delay),
        2 => Just(Move::Arrive),
        2 => Just(Move::ArriveRecord),
        2 => Just(Move::See),
        2 => (host.clone(), 1..6u32).prop_map(|(i, attempt)| Move::Claim(i, attempt)),
        6 => host.clone().prop_map(Move::Room),
        8 => host.clone().prop_map(Move::Report),
        1 => Just(Move::Crash),
        1 => host.clone().prop_map(Move::Reboot),
        1 => host.clone().prop_map(Move::Fill),
        2 => host.prop_map(Move::Notice),
        1 => Just(Move::Delete),
        1 => Just(Move::Vanish),
        1 => Just(Move::Finish),
    ];
    prop::collection::vec(step, 0..80)
}

#[derive(Debug)]
struct World {
    agents: [Agent; HOSTS],
    core: Lifecycle,
    queue: Vec<Effect>,
    /// Starts that will arrive at their host some time, from any process.
    delayed: Vec<Place>,
    /// The object's record, and its version.
    record: (Option<Place>, u32),
    /// The version that this process has read.
    read: u32,
    /// Every place that a start was sent to, by any process.
    asked: BTreeSet<Place>,
    /// Writes of the record that will arrive some time, and the versions they are for.
    delayed_records: Vec<(Place, u32)>,
    /// What was reported to this process, by host.
    reported: BTreeMap<usize, u32>,
    /// What the API server wants.
    intent: Intent,
    object_exists: bool,
}

fn index(host: &HostName) -> usize {
    host.as_str().strip_prefix("host-").unwrap().parse().unwrap()
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            agents: Default::default(),
            core: Lifecycle::new(Intent::Run),
            queue: vec![],
            delayed: vec![],
            record: (None, 0),
            read: 0,
            asked: BTreeSet::new(),
            delayed_records: vec![],
            reported: BTreeMap::new(),
            intent: Intent::Run,
            object_exists: true,
        };
        world.step(Event::OnRecord(None));
        world
    }

    fn step(&mut self, event: Event) {
        let before = self.core.stage().clone();
        let (core, effects) = self.core.clone().step(event);
        self.core = core;
        if before != *self.core.stage() {
            // As the driver does: work of a stage that has passed is dropped.
            self.queue.retain(|e| matches!(e, Effect::Evict(_)));
        }
        for effect in &effects {
            if let Effect::Start { place, .. } = effect {
                self.asked.insert(place.clone());
            }
        }
        self.queue.extend(effects);
        self.check();
    }

    fn check(&self) {
        let running = self.agents.iter().filter(|a| a.runs()).count();
        assert!(running <= 1, "two attempts run: {self:#?}");
        if let Room::Held(place) = self.core.room()
            && Some(place) != self.record.0.as_ref()
        {
            // What an identity is granted by. Only a write that a dead process never
            // heard of, and so never acted on, may have come in between.
            let unused = self.record.0.as_ref().is_some_and(|on| !self.asked.contains(on));
            assert!(unused, "not on record: {self:#?}");
        }
    }

    fn deliver(&mut self, effect: &Effect) -> Vec<Event> {
        match effect {
            Effect::Prepare(place) => {
                if self.write(place, self.read) {
                    vec![Event::Prepared]
                } else {
                    // As the driver does: the newer version is read, and the write repeated.
                    self.queue.push(effect.clone());
                    self.read()
                }
            }
            Effect::Start { place, .. } => match self.agents[index(&place.host)].start(place.attempt.get()) {
                Ok(()) => vec![Event::Accepted],
                Err(reason) => vec![Event::Refused(reason)],
            },
            Effect::Stop { place, .. } => {
                let agent = &mut self.agents[index(&place.host)];
                match &mut agent.sandbox {
                    Some((attempt, state)) if *attempt == place.attempt.get() => {
                        *state = SandboxState::Stopped;
                        vec![Event::Seen {
                            place: place.clone(),
                            state: SandboxState::Stopped,
                        }]
                    }
                    _ => vec![Event::StopUnknown(place.clone())],
                }
            }
            Effect::Forget(place) => {
                self.agents[index(&place.host)].forget(place.attempt.get());
                vec![Event::Forgotten(place.clone())]
            }
            Effect::Evict(place) => {
                self.agents[index(&place.host)].forget(place.attempt.get());
                vec![]
            }
            Effect::Remove => {
                assert!(
                    self.agents.iter().all(|a| !a.runs()),
                    "removed while it runs: {self:#?}"
                );
                self.object_exists = false;
                vec![Event::Removed]
            }
        }
    }

    /// The API server takes a write that is for the version it has.
    fn write(&mut self, place: &Place, version: u32) -> bool {
        let taken = self.record.1 == version;
        if taken {
            self.record = (Some(place.clone()), version + 1);
            self.read = self.record.1;
        }
        taken
    }

    fn read(&mut self) -> Vec<Event> {
        self.read = self.record.1;
        vec![Event::OnRecord(self.record.0.clone())]
    }

    fn report(&mut self, i: usize) {
        match self.agents[i].sandbox {
            Some((attempt, state)) => {
                self.reported.insert(i, attempt);
                let place = place(i, attempt);
                self.step(Event::Seen {
                    place: place.clone(),
                    state,
                });
                if self.agents[i].notice {
                    self.step(Event::Noticed { place, grace: GRACE });
                }
            }
            None => {
                if let Some(attempt) = self.reported.remove(&i) {
                    self.step(Event::Missing(place(i, attempt)));
                }
            }
        }
        // As the driver does: what is not in all that a host has told is not there.
        let expected = match self.core.stage().clone() {
            Stage::Recorded { place } | Stage::Placed { place } | Stage::Stopping { place, .. } => place,
            _ => return,
        };
        let has = self.agents[i].sandbox.map(|(attempt, _)| attempt);
        if index(&expected.host) == i && has != Some(expected.attempt.get()) {
            self.step(Event::Missing(expected));
        }
    }

    fn play(&mut self, step: Move) {
        match step {
            Move::Do if !self.queue.is_empty() => {
                let effect = self.queue.remove(0);
                for event in self.deliver(&effect) {
                    self.step(event);
                }
            }
            Move::DoUnanswered | Move::Lose | Move::Delay => {
                if let Some(Effect::Prepare(place)) = self.queue.first().cloned() {
                    // The writer never learns; it repeats, or dies.
                    match step {
                        Move::DoUnanswered if self.record.1 == self.read => {
                            self.record = (Some(place), self.read + 1);
                        }
                        Move::Delay => self.delayed_records.push((place, self.read)),
                        _ => {}
                    }
                }
                // Of calls to hosts, only starts are not simply repeated by the driver.
                if let Some(Effect::Start { place, .. }) = self.queue.first().cloned() {
                    let effect = self.queue.remove(0);
                    match step {
                        Move::DoUnanswered => drop(self.deliver(&effect)),
                        Move::Delay => self.delayed.push(place),
                        _ => {}
                    }
                    self.step(Event::Unanswered);
                }
            }
            Move::Arrive if !self.delayed.is_empty() => {
                let place = self.delayed.remove(0);
                let _late = self.agents[index(&place.host)].start(place.attempt.get()).is_ok();
                self.check();
            }
            Move::ArriveRecord if !self.delayed_records.is_empty() => {
                let (place, version) = self.delayed_records.remove(0);
                if self.record.1 == version {
                    self.record = (Some(place), version + 1);
                }
            }
            Move::See if self.object_exists => {
                for event in self.read() {
                    self.step(event);
                }
            }
            Move::Room(i) => {
                if matches!(self.core.stage(), Stage::Claiming { .. }) {
                    self.step(Event::Claimed(host(i)));
                }
            }
            Move::Report(i) => self.report(i),
            Move::Crash => {
                self.queue.clear();
                self.reported.clear();
                self.core = Lifecycle::new(Intent::Run);
                let intent = if self.object_exists {
                    self.intent
                } else {
                    Intent::Reap
                };
                self.step(Event::Intended(intent));
                if self.object_exists {
                    for event in self.read() {
                        self.step(event);
                    }
                }
            }
            Move::Claim(i, attempt) => {
                let place = place(i, attempt);
                if self.record.0.as_ref() != Some(&place) {
                    let state = SandboxState::Running;
                    self.step(Event::Seen { place, state });
                }
            }
            Move::Reboot(i) => {
                if let Some((_, state)) = &mut self.agents[i].sandbox {
                    *state = SandboxState::Stopped;
                }
            }
            Move::Fill(i) => self.agents[i].full = !self.agents[i].full,
            Move::Notice(i) => self.agents[i].notice = self.agents[i].sandbox.is_some(),
            Move::Delete => {
                if self.object_exists {
                    self.intent = Intent::Delete { grace: GRACE };
                    self.step(Event::Intended(self.intent));
                }
            }
            Move::Vanish => {
                // Deleted by force, whatever runs.
                self.object_exists = false;
                self.step(Event::Intended(Intent::Reap));
            }
            Move::Finish => {
                if self.intent == Intent::Run {
                    self.intent = Intent::Finish;
                    self.step(Event::Intended(Intent::Finish));
                }
            }
            Move::Do | Move::Arrive | Move::ArriveRecord | Move::See => {}
        }
    }

    /// Everything works from now on.
    fn calm(&mut self) {
        for agent in &mut self.agents {
            agent.full = false;
        }
        for round in 0..60 {
            while !self.delayed.is_empty() {
                self.play(Move::Arrive);
            }
            while !self.delayed_records.is_empty() {
                self.play(Move::ArriveRecord);
            }
            for _ in 0..4 {
                self.play(Move::Do);
            }
            self.play(Move::See);
            self.play(Move::Room(round % HOSTS));
            for i in 0..HOSTS {
                self.report(i);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_history_runs_two_attempts_and_calm_brings_what_is_wanted(history in moves()) {
        let mut world = World::new();
        for step in history {
            world.play(step);
        }
        world.calm();
        let running = world.agents.iter().filter(|a| a.runs()).count();
        match (world.object_exists, world.intent) {
            (true, Intent::Run) => {
                prop_assert_eq!(running, 1, "a pod that should run does not: {:#?}", world);
                prop_assert!(matches!(world.core.stage(), Stage::Placed { .. }), "{:#?}", world);
                let given_up = world.agents.iter().any(|a| a.runs() && a.notice);
                prop_assert!(!given_up, "it stays where it has to leave: {:#?}", world);
            }
            (true, Intent::Finish) => prop_assert_eq!(running, 0, "{:#?}", world),
            (true, _) => prop_assert!(false, "a deleted pod was not removed: {world:#?}"),
            (false, _) => {
                prop_assert_eq!(running, 0, "a pod that is gone runs: {:#?}", world);
                prop_assert!(world.agents.iter().all(|a| a.sandbox.is_none()), "remains: {world:#?}");
            }
        }
    }
}
