//! Who holds connections to the kubelet API: strangers at the door, until the first
//! request of somebody known, and then that user's share.

use std::{
    future::Future,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bounds::{
    Acquainted, Bounds, Budget, Gate, Guest, Level, Path, Place, Rule, Shared, Step,
    door::{Places, Queue},
};

/// Connections at once of those who proved who they are, and of one of them: the API
/// server keeps one for each log, exec and forward of the whole cluster.
const CONNECTIONS: u32 = 1024;
const USERS_CONNECTIONS: u32 = 768;
/// Connections of which nobody known has sent a request yet. Beyond, the oldest of the
/// address with the most is hung up on; an address from which somebody proved who he
/// is does not stand among strangers.
const STRANGERS: Places = Places { all: 256, of_one: 64 };

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Doorway {
    gate: Gate<IpAddr>,
    connections: Shared<String>,
    acquainted: Arc<Mutex<Acquainted<String, IpAddr>>>,
}

/// One connection's. Cheap to clone; what it holds is given back with the last.
#[derive(Clone)]
pub(super) struct Standing {
    doorway: Doorway,
    address: IpAddr,
    holds: Arc<Mutex<Holds>>,
}

enum Holds {
    Door { _guest: Guest<IpAddr> },
    Share { _place: Place<String> },
}

impl Doorway {
    pub(super) fn new(shown: &Bounds) -> Self {
        let doorway = Self {
            gate: Gate::new(STRANGERS, STRANGERS),
            connections: Shared::new(Budget::new(CONNECTIONS, 0)),
            acquainted: Arc::default(),
        };
        shown.show("strangers", doorway.gate.clone());
        shown.show("connections", doorway.connections.clone());
        doorway
    }

    fn acquainted(&self) -> MutexGuard<'_, Acquainted<String, IpAddr>> {
        // Nothing that can panic runs under it.
        self.acquainted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection, and when it has to go for others.
    pub(super) fn come(&self, address: IpAddr) -> (Standing, impl Future<Output = ()> + use<>) {
        let queue = if self.acquainted().knows(&address) {
            Queue::Known
        } else {
            Queue::Stranger
        };
        let guest = self.gate.come(queue, address);
        let displaced = guest.displacement();
        let standing = Standing {
            doorway: self.clone(),
            address,
            holds: Arc::new(Mutex::new(Holds::Door { _guest: guest })),
        };
        (standing, displaced)
    }
}

impl Standing {
    /// Somebody known has sent a request. Its user's share is asked once a connection.
    pub(super) fn proved(&self, user: &str) -> Result<(), Level> {
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*holds, Holds::Share { .. }) {
            return Ok(());
        }
        let step = Step {
            key: user.to_owned(),
            level: Level::Peer,
            rule: Rule {
                promised: 0,
                limit: USERS_CONNECTIONS,
                greed: 4,
            },
        };
        let path = Path {
            trunk: Arc::from([step]),
            leaf: None,
        };
        let place = self.doorway.connections.take(path)?;
        *holds = Holds::Share { _place: place };
        self.doorway.acquainted().meet(user.to_owned(), self.address);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn who_says_nothing_goes_for_who_comes_and_no_user_takes_what_another_needs() {
        let doorway = Doorway::new(&Bounds::default());
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let (known, stays) = doorway.come(address(1));
        known.proved("kube-apiserver").unwrap();
        let (silent, goes) = doorway.come(address(2));
        let crowd: Vec<_> = (0..2000).map(|n| doorway.come(address(3 + n % 500)).0).collect();
        assert!(goes.now_or_never().is_some() && stays.now_or_never().is_none());
        let greedy: Vec<_> = crowd.iter().map(|standing| standing.proved("greedy")).collect();
        assert!(greedy.iter().any(Result::is_ok) && greedy.contains(&Err(Level::Peer)));
        assert!(silent.proved("modest").is_ok());
    }
}
