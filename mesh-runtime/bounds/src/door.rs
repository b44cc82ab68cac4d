//! Those who came and have not said yet who they are, by where they come from. Pure.
//!
//! Whoever has an address can open a connection and be silent, so places at a door
//! are nobody's for long: when it is full, who comes next takes the place of the one
//! that has stood longest among those of the address that holds the most. An honest
//! caller is through in moments; to keep him out one must come more often than he
//! needs for a handshake, from more addresses than there are places.
//!
//! Addresses that are known (a workload's, a caller's that proved who he is) stand in
//! a queue of their own, which no stranger can fill.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

/// Where somebody stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    Known,
    Stranger,
}

/// Places of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    pub all: usize,
    /// Of one address.
    pub of_one: usize,
}

/// Who stands at the door. Rises with each that comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug)]
pub struct Door<S> {
    next: u64,
    known: Line<S>,
    strangers: Line<S>,
}

#[derive(Debug)]
struct Line<S> {
    places: Places,
    standing: usize,
    by_source: HashMap<S, BTreeSet<Ticket>>,
}

impl<S: Eq + Hash + Clone> Door<S> {
    /// Each queue has room for one at least.
    pub fn new(known: Places, strangers: Places) -> Self {
        let line = |places: Places| Line {
            places: Places {
                all: places.all.max(1),
                of_one: places.of_one.max(1),
            },
            standing: 0,
            by_source: HashMap::new(),
        };
        Self {
            next: 0,
            known: line(known),
            strangers: line(strangers),
        }
    }

    fn line(&mut self, queue: Queue) -> &mut Line<S> {
        match queue {
            Queue::Known => &mut self.known,
            Queue::Stranger => &mut self.strangers,
        }
    }

    /// Lets somebody stand there; who has to go for it, if anybody.
    pub fn come(&mut self, queue: Queue, source: &S) -> (Ticket, Option<Ticket>) {
        self.next += 1;
        let ticket = Ticket(self.next);
        let line = self.line(queue);
        let gone = line.make_room(source);
        line.standing += 1;
        line.by_source.entry(source.clone()).or_default().insert(ticket);
        (ticket, gone)
    }

    /// Nothing to do for one who had to go before.
    pub fn leave(&mut self, queue: Queue, source: &S, ticket: Ticket) {
        self.line(queue).remove(source, ticket);
    }

    pub fn standing(&self) -> usize {
        self.known.standing + self.strangers.standing
    }

    pub fn places(&self) -> usize {
        self.known.places.all + self.strangers.places.all
    }
}

impl<S: Eq + Hash + Clone> Line<S> {
    fn make_room(&mut self, source: &S) -> Option<Ticket> {
        let own = self.by_source.get(source).map_or(0, BTreeSet::len);
        let (source, ticket) = if own >= self.places.of_one {
            let oldest = self.by_source.get(source)?.first()?;
            (source.clone(), *oldest)
        } else if self.standing >= self.places.all {
            let (source, tickets) = self
                .by_source
                .iter()
                .max_by_key(|(_, tickets)| (tickets.len(), std::cmp::Reverse(tickets.first())))?;
            (source.clone(), *tickets.first()?)
        } else {
            return None;
        };
        self.remove(&source, ticket);
        Some(ticket)
    }

    fn remove(&mut self, source: &S, ticket: Ticket) {
        let Some(tickets) = self.by_source.get_mut(source) else {
            return;
        };
        if tickets.remove(&ticket) {
            self.standing -= 1;
        }
        if tickets.is_empty() {
            self.by_source.remove(source);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KNOWN: Places = Places { all: 8, of_one: 4 };
    const STRANGERS: Places = Places { all: 6, of_one: 3 };

    #[test]
    fn strangers_take_no_place_of_the_known() {
        let mut door = Door::new(KNOWN, STRANGERS);
        let (friend, _) = door.come(Queue::Known, &0_u8);
        for source in 1..200 {
            let (_, gone) = door.come(Queue::Stranger, &source);
            assert_ne!(gone, Some(friend));
        }
        assert_eq!(door.standing(), STRANGERS.all + 1);
    }

    #[test]
    fn who_floods_from_one_address_pushes_only_himself() {
        let mut door = Door::new(KNOWN, STRANGERS);
        let (honest, _) = door.come(Queue::Stranger, &1_u8);
        for _ in 0..100 {
            let (_, gone) = door.come(Queue::Stranger, &2);
            assert_ne!(gone, Some(honest));
        }
    }

    #[test]
    fn the_newest_of_a_modest_address_stays_while_a_greedy_one_stands_there() {
        let mut door = Door::new(KNOWN, STRANGERS);
        for _ in 0..3 {
            door.come(Queue::Stranger, &1_u8);
            door.come(Queue::Stranger, &2);
        }
        let (honest, gone) = door.come(Queue::Stranger, &3);
        assert!(gone.is_some_and(|gone| gone < honest), "full: somebody goes");
        let (_, gone) = door.come(Queue::Stranger, &4);
        assert_ne!(gone, Some(honest));
    }

    proptest! {
        #[test]
        fn no_queue_is_over_full_and_everybody_who_comes_stands(
            turns in prop::collection::vec((any::<bool>(), 0..5_u8, any::<bool>()), 0..300),
        ) {
            let mut door = Door::new(KNOWN, STRANGERS);
            let mut there: Vec<(Queue, u8, Ticket)> = vec![];
            for (known, source, leaves) in turns {
                let queue = if known { Queue::Known } else { Queue::Stranger };
                if leaves && let Some((queue, source, ticket)) = there.pop() {
                    door.leave(queue, &source, ticket);
                }
                let (ticket, gone) = door.come(queue, &source);
                if let Some(gone) = gone {
                    let before = there.len();
                    there.retain(|(_, _, ticket)| *ticket != gone);
                    prop_assert_eq!(there.len() + 1, before, "somebody else's place");
                }
                there.push((queue, source, ticket));
                prop_assert_eq!(door.standing(), there.len());
                for (queue, places) in [(Queue::Known, KNOWN), (Queue::Stranger, STRANGERS)] {
                    let standing = there.iter().filter(|(q, ..)| *q == queue);
                    prop_assert!(standing.clone().count() <= places.all);
                    for source in 0..5 {
                        prop_assert!(standing.clone().filter(|(_, s, _)| *s == source).count() <= places.of_one);
                    }
                }
            }
            for (queue, source, ticket) in there {
                door.leave(queue, &source, ticket);
            }
            prop_assert_eq!(door.standing(), 0);
            prop_assert!(door.known.by_source.is_empty() && door.strangers.by_source.is_empty());
        }
    }
}
