//! Pulls under way: one for all that want the same, in the order that
//! [`super::turns`] gives, ended when nobody waits for it any more.
//!
//! A pull is polled by whoever waits for it and lives as long as one of them: a pod
//! that is deleted drops its wait, and with the last of them goes the call to the
//! runtime, which the runtime takes as its cancellation.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use pool_agent_api::{TenantId, spec::RegistryCredential};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use super::turns::{Full, Ticket, Turns};
use crate::policy;

/// What makes two pulls the same. Tenants share none: each proves its own access.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PullKey {
    tenant: TenantId,
    canonical: String,
    handler: Option<String>,
    /// A digest of the credential; None for a pull without.
    credential: Option<[u8; 32]>,
}

impl PullKey {
    pub fn new(
        tenant: &TenantId,
        canonical: &str,
        handler: Option<&str>,
        credential: Option<&RegistryCredential>,
    ) -> Self {
        let digest = |c: &RegistryCredential| {
            let mut sha = Sha256::new();
            // Lengths first, so that no two credentials read the same.
            sha.update(c.username.len().to_be_bytes());
            sha.update(&c.username);
            sha.update(&c.password);
            sha.finalize().into()
        };
        Self {
            tenant: tenant.clone(),
            canonical: canonical.to_owned(),
            handler: handler.map(str::to_owned),
            credential: credential.map(digest),
        }
    }
}

type Flight<T> = Shared<BoxFuture<'static, T>>;

/// `T` is what a pull comes to, told to each that waits.
pub struct Pulls<T: Clone> {
    queue: Queue,
    flights: Mutex<HashMap<PullKey, WeakShared<BoxFuture<'static, T>>>>,
}

impl<T: Clone + Send + Sync + 'static> Pulls<T> {
    pub fn new(bounds: policy::images::Pulls) -> Self {
        Self {
            queue: Queue(Arc::new(Mutex::new(Waiting {
                turns: Turns::new(bounds),
                granted: HashMap::new(),
                next: 0,
            }))),
            flights: Mutex::default(),
        }
    }

    /// Joins the pull of `key` that is under way, or begins one with `work` when its
    /// turn comes.
    pub async fn join<W>(&self, key: PullKey, work: impl FnOnce(Result<Turn, Full>) -> W) -> T
    where
        W: Future<Output = T> + Send + 'static,
    {
        let flight = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.retain(|_, flight| flight.upgrade().is_some());
            let under_way = flights
                .get(&key)
                .and_then(WeakShared::upgrade)
                // One that has ended is of an earlier time.
                .filter(|flight| flight.peek().is_none());
            match under_way {
                Some(flight) => flight,
                None => {
                    let turn = self.queue.ask(&key.tenant);
                    let flight: Flight<T> = work(turn).boxed().shared();
                    flights.extend(flight.downgrade().map(|weak| (key, weak)));
                    flight
                }
            }
        };
        flight.await
    }

    /// The names that are being pulled, or will be.
    pub fn names(&self) -> Vec<String> {
        let flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = flights
            .iter()
            .filter(|(_, flight)| flight.upgrade().is_some_and(|f| f.peek().is_none()));
        alive.map(|(key, _)| key.canonical.clone()).collect()
    }

    /// How many wait and how many run.
    pub fn counts(&self) -> (usize, usize) {
        let waiting = self.queue.lock();
        (waiting.turns.waiting(), waiting.turns.running())
    }
}

#[derive(Clone)]
struct Queue(Arc<Mutex<Waiting>>);

struct Waiting {
    turns: Turns<TenantId>,
    granted: HashMap<Ticket, oneshot::Sender<()>>,
    next: u64,
}

/// A place in the queue, and then the right to pull; given back when it is dropped.
pub struct Turn {
    queue: Queue,
    ticket: Ticket,
    granted: oneshot::Receiver<()>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Every change is made whole before the guard goes.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, tenant: &TenantId) -> Result<Turn, Full> {
        let mut waiting = self.lock();
        let ticket = Ticket(waiting.next);
        waiting.next += 1;
        waiting.turns.ask(tenant, ticket)?;
        let (grant, granted) = oneshot::channel();
        waiting.granted.insert(ticket, grant);
        waiting.call();
        Ok(Turn {
            queue: self.clone(),
            ticket,
            granted,
        })
    }
}

impl Waiting {
    /// Calls up all whose turn it is.
    fn call(&mut self) {
        while let Some(ticket) = self.turns.grant() {
            let told = self.granted.remove(&ticket).map(|grant| grant.send(()));
            // Its place is given back by whoever dropped the far end.
            if told != Some(Ok(())) {
                tracing::trace!("a pull left as its turn came");
            }
        }
    }
}

impl Turn {
    /// Returns when the pull may begin.
    pub async fn comes(&mut self) {
        // The sending end goes only by a grant, or with this place.
        let _granted = (&mut self.granted).await.is_ok();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.granted.remove(&self.ticket);
        waiting.turns.leave(self.ticket);
        waiting.call();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;

    fn bounds(per_tenant: usize, waiting_per_tenant: usize) -> policy::images::Pulls {
        policy::images::Pulls {
            per_tenant,
            per_host: 1,
            waiting_per_tenant,
            longest: Duration::from_secs(1),
        }
    }

    fn key(tenant: &str, image: &str) -> PullKey {
        PullKey::new(&tenant.parse().unwrap(), image, None, None)
    }

    /// Counts the pulls that have begun, and those that have not ended.
    #[derive(Clone, Default)]
    struct Registry {
        begun: Arc<AtomicUsize>,
        alive: Arc<AtomicUsize>,
    }

    struct Alive(Arc<AtomicUsize>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Registry {
        async fn answers(
            self,
            turn: Result<Turn, Full>,
            end: Option<oneshot::Receiver<()>>,
        ) -> Result<usize, Full> {
            let mut turn = turn?;
            turn.comes().await;
            let number = self.begun.fetch_add(1, Ordering::SeqCst);
            self.alive.fetch_add(1, Ordering::SeqCst);
            let _alive = Alive(self.alive);
            match end {
                Some(end) => drop(end.await),
                None => std::future::pending().await,
            }
            Ok(number)
        }
    }

    #[tokio::test]
    async fn all_that_want_the_same_share_one_pull_and_its_end() {
        let (pulls, registry) = (Arc::new(Pulls::new(bounds(5, 5))), Registry::default());
        let (end, ended) = oneshot::channel();
        let mut ended = Some(ended);
        let waits: Vec<_> = (0..4)
            .map(|_| {
                let (pulls, registry, end) = (pulls.clone(), registry.clone(), ended.take());
                async move {
                    pulls
                        .join(key("a", "x:1"), |turn| registry.answers(turn, end))
                        .await
                }
            })
            .collect();
        let told = tokio::spawn(futures::future::join_all(waits));
        while registry.begun.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        end.send(()).unwrap();
        assert_eq!(told.await.unwrap(), vec![Ok(0); 4]);
        assert_eq!(registry.begun.load(Ordering::SeqCst), 1);
        // What has ended is no answer to who comes later.
        let (end, ended) = oneshot::channel();
        end.send(()).unwrap();
        let later = pulls.join(key("a", "x:1"), |turn| {
            registry.clone().answers(turn, Some(ended))
        });
        assert_eq!(later.await, Ok(1));
        assert_eq!(pulls.counts(), (0, 0));
    }

    #[tokio::test]
    async fn neither_tenants_nor_credentials_share_a_pull() {
        let credential = |password: &str| RegistryCredential {
            registry: "x".into(),
            username: "u".into(),
            password: password.into(),
        };
        let of = |tenant: &str, credential: Option<&RegistryCredential>| {
            PullKey::new(&tenant.parse().unwrap(), "x:1", None, credential)
        };
        assert_ne!(of("a", None), of("b", None));
        assert_ne!(of("a", None), of("a", Some(&credential("p"))));
        assert_ne!(of("a", Some(&credential("p"))), of("a", Some(&credential("q"))));
        assert_eq!(of("a", Some(&credential("p"))), of("a", Some(&credential("p"))));
    }

    #[tokio::test]
    async fn a_pull_ends_with_the_last_that_waits_for_it_and_its_place_is_free() {
        let (pulls, registry) = (Arc::new(Pulls::new(bounds(1, 5))), Registry::default());
        let wait = || {
            let (pulls, registry) = (pulls.clone(), registry.clone());
            tokio::spawn(async move {
                pulls
                    .join(key("a", "x:1"), |turn| registry.answers(turn, None))
                    .await
            })
        };
        let (first, second) = (wait(), wait());
        while registry.alive.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert_eq!(registry.alive.load(Ordering::SeqCst), 1, "one still waits");
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        assert_eq!(registry.alive.load(Ordering::SeqCst), 0);
        assert_eq!(registry.begun.load(Ordering::SeqCst), 1);
        assert_eq!(pulls.counts(), (0, 0));
        assert!(pulls.names().is_empty());
    }

    #[tokio::test]
    async fn one_tenants_slow_pulls_hold_up_no_other_and_what_is_too_much_is_refused() {
        let (pulls, registry) = (Arc::new(Pulls::new(bounds(2, 7))), Registry::default());
        let slow: Vec<_> = (0..10)
            .map(|n| {
                let (pulls, registry) = (pulls.clone(), registry.clone());
                tokio::spawn(async move {
                    pulls
                        .join(key("a", &format!("x:{n}")), |turn| registry.answers(turn, None))
                        .await
                })
            })
            .collect();
        while pulls.counts() != (7, 2) {
            tokio::task::yield_now().await;
        }
        let (end, ended) = oneshot::channel();
        end.send(()).unwrap();
        let other = pulls.join(key("b", "x:1"), |turn| {
            registry.clone().answers(turn, Some(ended))
        });
        assert!(other.await.is_ok());
        let refused = slow.iter().filter(|wait| wait.is_finished()).count();
        assert_eq!(refused, 1);
        for wait in slow {
            wait.abort();
            if let Ok(told) = wait.await {
                assert_eq!(told, Err(Full(7)));
            }
        }
        assert_eq!(pulls.counts(), (0, 0));
    }
}
