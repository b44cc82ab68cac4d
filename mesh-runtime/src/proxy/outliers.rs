//! Endpoints that could not be reached a moment ago. `outbound` chooses them last
//! for a while, so that a host that swallows packets costs a Service's clients one
//! timeout, not one each. Pure: time is an argument.
//!
//! An endpoint is an address and a port: that nobody listens on one port of a pod
//! says nothing of its others.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// About as long as it takes Kubernetes to notice, if a probe can tell.
const REST: Duration = Duration::from_secs(10);
/// Beyond so many the trouble is not theirs.
const MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Outliers {
    until: HashMap<SocketAddr, Instant>,
}

impl Outliers {
    pub(crate) fn failed(&mut self, endpoint: SocketAddr, now: Instant) {
        self.until.retain(|_, until| *until > now);
        if self.until.len() < MAX || self.until.contains_key(&endpoint) {
            self.until.insert(endpoint, now + REST);
        }
    }

    pub(crate) fn reached(&mut self, endpoint: SocketAddr) {
        self.until.remove(&endpoint);
    }

    /// Those that are better left alone for now. Mostly none.
    pub(crate) fn resting(&self, now: Instant) -> HashSet<SocketAddr> {
        let resting = self.until.iter().filter(|(_, until)| **until > now);
        resting.map(|(endpoint, _)| *endpoint).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 77, 1, 2], port))
    }

    #[test]
    fn an_endpoint_rests_for_a_while_or_until_it_is_reached() {
        let mut outliers = Outliers::default();
        let now = Instant::now();
        outliers.failed(endpoint(1), now);
        outliers.failed(endpoint(2), now);
        outliers.reached(endpoint(2));
        assert_eq!(outliers.resting(now), [endpoint(1)].into());
        assert_eq!(outliers.resting(now + REST), [].into());
    }

    #[test]
    fn a_failure_while_it_rests_makes_it_rest_longer() {
        let mut outliers = Outliers::default();
        let now = Instant::now();
        outliers.failed(endpoint(1), now);
        outliers.failed(endpoint(1), now + REST / 2);
        assert_eq!(outliers.resting(now + REST), [endpoint(1)].into());
    }

    #[test]
    fn they_do_not_pile_up() {
        let mut outliers = Outliers::default();
        let now = Instant::now();
        for port in 0..10_000 {
            outliers.failed(endpoint(port), now);
        }
        assert_eq!(outliers.until.len(), MAX);
        outliers.failed(endpoint(20_000), now + REST);
        assert_eq!(
            outliers.until.len(),
            1,
            "those that rested long enough are forgotten"
        );
    }
}
