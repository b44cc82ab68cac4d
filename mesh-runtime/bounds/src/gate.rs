//! A door that many tasks stand at.

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

use crate::{
    Level,
    door::{Door, Places, Queue, Ticket},
    metrics::Reading,
};

/// Cheap to clone.
pub struct Gate<S>(Arc<Inner<S>>);

struct Inner<S> {
    state: Mutex<State<S>>,
    displaced: AtomicU64,
}

struct State<S> {
    door: Door<S>,
    told: HashMap<Ticket, CancellationToken>,
}

/// Somebody at the door, until this is dropped.
pub struct Guest<S: Eq + Hash + Clone> {
    gate: Gate<S>,
    queue: Queue,
    source: S,
    ticket: Ticket,
    gone: CancellationToken,
}

impl<S> Clone for Gate<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: Eq + Hash + Clone> Gate<S> {
    pub fn new(known: Places, strangers: Places) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                door: Door::new(known, strangers),
                told: HashMap::new(),
            }),
            displaced: AtomicU64::new(0),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State<S>> {
        // Nothing that can panic runs under it.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever has to go for it is told.
    pub fn come(&self, queue: Queue, source: S) -> Guest<S> {
        let gone = CancellationToken::new();
        let mut state = self.state();
        let (ticket, displaced) = state.door.come(queue, &source);
        state.told.insert(ticket, gone.clone());
        let displaced = displaced.and_then(|ticket| state.told.remove(&ticket));
        drop(state);
        if let Some(displaced) = displaced {
            displaced.cancel();
            self.0.displaced.fetch_add(1, Ordering::Relaxed);
        }
        Guest {
            gate: self.clone(),
            queue,
            source,
            ticket,
            gone,
        }
    }
}

impl<S: Eq + Hash + Clone> Guest<S> {
    pub fn queue(&self) -> Queue {
        self.queue
    }

    /// The same for a task that does not hold the guest; it waits for ever once that
    /// has left.
    pub fn displacement(&self) -> impl Future<Output = ()> + use<S> {
        self.gone.clone().cancelled_owned()
    }

    /// Returns when somebody else needs the place.
    pub async fn displaced(&self) {
        self.gone.cancelled().await;
    }
}

impl<S: Eq + Hash + Clone> Drop for Guest<S> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.door.leave(self.queue, &self.source, self.ticket);
        state.told.remove(&self.ticket);
    }
}

impl<S: Eq + Hash + Clone + Send + 'static> Reading for Gate<S> {
    fn current(&self) -> u64 {
        self.state().door.standing() as u64
    }

    fn limit(&self) -> u64 {
        self.state().door.places() as u64
    }

    /// Who had to go: always one of the address that held the most.
    fn refusals(&self, level: Level) -> u64 {
        match level {
            Level::Peer => self.0.displaced.load(Ordering::Relaxed),
            Level::Pod | Level::Tenant | Level::Host => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Waker},
    };

    use super::*;

    #[test]
    fn who_has_to_go_is_told_and_leaves_no_trace() {
        let places = Places { all: 2, of_one: 1 };
        let gate = Gate::new(places, places);
        let first = gate.come(Queue::Stranger, 1);
        let second = gate.come(Queue::Stranger, 1);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(first.displaced()).as_mut().poll(&mut cx).is_ready());
        assert!(pin!(second.displaced()).as_mut().poll(&mut cx).is_pending());
        assert_eq!((gate.current(), gate.refusals(Level::Peer)), (1, 1));
        drop((first, second));
        assert_eq!(gate.current(), 0);
        assert!(gate.state().told.is_empty());
    }
}
