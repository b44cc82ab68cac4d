//! A budget that many tasks take from.

use std::{
    fmt,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Budget, Level, Step, metrics::Reading};

/// Cheap to clone.
pub struct Shared<K>(Arc<Inner<K>>);

struct Inner<K> {
    budget: Mutex<Budget<K>>,
    /// In the order of [`Level::ALL`].
    refusals: [AtomicU64; Level::ALL.len()],
}

/// Accounts from the host's side down to who asks: `trunk`, which many share, and one
/// more within it.
#[derive(Debug, Clone)]
pub struct Path<K> {
    pub trunk: Arc<[Step<K>]>,
    pub leaf: Option<Step<K>>,
}

impl<K: Clone> Path<K> {
    fn steps(&self) -> Vec<Step<K>> {
        self.trunk.iter().chain(&self.leaf).cloned().collect()
    }
}

/// A place that is held until this is dropped.
pub struct Place<K: Eq + Hash + Clone> {
    shared: Shared<K>,
    path: Path<K>,
}

/// Places on one path, more or fewer as they are needed; all go back when it is dropped.
pub struct Holding<K: Eq + Hash + Clone> {
    shared: Shared<K>,
    path: Path<K>,
    places: Vec<Place<K>>,
}

impl<K: Eq + Hash + Clone> Holding<K> {
    /// Of nothing yet.
    pub fn new(shared: Shared<K>, path: Path<K>) -> Self {
        Self {
            shared,
            path,
            places: vec![],
        }
    }

    /// Holds exactly so many places, or, where that is refused, as many as before.
    pub fn resize(&mut self, places: usize) -> Result<(), Level> {
        let before = self.places.len();
        self.places.truncate(places);
        while self.places.len() < places {
            match self.shared.take(self.path.clone()) {
                Ok(place) => self.places.push(place),
                Err(level) => {
                    self.places.truncate(before);
                    return Err(level);
                }
            }
        }
        Ok(())
    }
}

impl<K: Eq + Hash + Clone> fmt::Debug for Holding<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holding")
            .field("places", &self.places.len())
            .finish_non_exhaustive()
    }
}

impl<K> Clone for Shared<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Eq + Hash + Clone> Shared<K> {
    pub fn new(budget: Budget<K>) -> Self {
        Self(Arc::new(Inner {
            budget: Mutex::new(budget),
            refusals: Default::default(),
        }))
    }

    fn budget(&self) -> MutexGuard<'_, Budget<K>> {
        // Nothing that can panic runs under it.
        self.0.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Budget::take`]. A refusal is counted.
    pub fn take(&self, path: Path<K>) -> Result<Place<K>, Level> {
        let steps = path.steps();
        let taken = self.budget().take(&steps);
        match taken {
            Ok(()) => Ok(Place {
                shared: self.clone(),
                path,
            }),
            Err(level) => {
                if let Some(at) = Level::ALL.iter().position(|&l| l == level) {
                    self.0.refusals[at].fetch_add(1, Ordering::Relaxed);
                }
                Err(level)
            }
        }
    }

    pub fn held(&self) -> u32 {
        self.budget().held()
    }

    pub fn capacity(&self) -> u32 {
        self.budget().capacity()
    }
}

impl<K: Eq + Hash + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let steps = self.path.steps();
        self.shared.budget().release(&steps);
    }
}

impl<K: Eq + Hash + Clone> fmt::Debug for Place<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").finish_non_exhaustive()
    }
}

impl<K: Eq + Hash + Clone + Send + 'static> Reading for Shared<K> {
    fn current(&self) -> u64 {
        self.held().into()
    }

    fn limit(&self) -> u64 {
        self.capacity().into()
    }

    fn refusals(&self, level: Level) -> u64 {
        let at = Level::ALL.iter().position(|&l| l == level);
        at.map_or(0, |at| self.0.refusals[at].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;

    #[test]
    fn a_place_comes_back_when_it_is_dropped_and_refusals_are_counted() {
        let shared = Shared::new(Budget::new(1, 0));
        let path = || Path {
            trunk: Arc::from([Step {
                key: "one",
                level: Level::Pod,
                rule: Rule::FAIR,
            }]),
            leaf: None,
        };
        let place = shared.take(path()).unwrap();
        assert_eq!(shared.take(path()).unwrap_err(), Level::Host);
        assert_eq!((shared.current(), shared.refusals(Level::Host)), (1, 1));
        drop(place);
        assert!(shared.take(path()).is_ok());
        assert_eq!(shared.held(), 0);
    }
}
