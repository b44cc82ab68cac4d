//! A bound on how often each host may ask for certificates. Pure: time is an
//! argument. Owned by `broker`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use pool_agent_api::HostName;

/// A host that starts all its pods at once asks for each of their identities.
const BURST: u32 = 200;

/// One more after this long.
const REFILL: Duration = Duration::from_millis(20);

/// Hosts whose allowance is full again are forgotten beyond this many.
const REMEMBERED: usize = 1024;

/// What each host has left.
#[derive(Debug, Default)]
pub struct Rates(BTreeMap<HostName, Allowance>);

#[derive(Debug)]
struct Allowance {
    left: u32,
    /// When `left` was right.
    at: Instant,
}

impl Rates {
    /// Takes one of the host's allowance. False if it has none left.
    pub fn take(&mut self, host: &HostName, now: Instant) -> bool {
        if self.0.len() >= REMEMBERED && !self.0.contains_key(host) {
            self.0.retain(|_, allowance| {
                allowance.refill(now);
                allowance.left < BURST
            });
        }
        let allowance = self
            .0
            .entry(host.clone())
            .or_insert(Allowance { left: BURST, at: now });
        allowance.refill(now);
        match allowance.left.checked_sub(1) {
            Some(left) => {
                allowance.left = left;
                true
            }
            None => false,
        }
    }
}

impl Allowance {
    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        let more = u32::try_from(passed.as_nanos() / REFILL.as_nanos()).unwrap_or(u32::MAX);
        if self.left.saturating_add(more) >= BURST {
            (self.left, self.at) = (BURST, now);
        } else {
            self.left += more;
            self.at += REFILL * more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::parse("host", name).unwrap()
    }

    #[test]
    fn a_host_that_asks_without_end_is_slowed_down_and_no_other() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        let greedy = host("greedy");
        let granted = (0..1000).filter(|_| rates.take(&greedy, now)).count();
        assert_eq!(granted, BURST as usize);
        assert!(rates.take(&host("modest"), now));
        let later = now + REFILL * 5;
        let granted = (0..1000).filter(|_| rates.take(&greedy, later)).count();
        assert_eq!(granted, 5);
    }

    #[test]
    fn half_a_refill_is_not_lost() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        let greedy = host("greedy");
        (0..BURST).for_each(|_| assert!(rates.take(&greedy, now)));
        assert!(!rates.take(&greedy, now + REFILL / 2));
        assert!(rates.take(&greedy, now + REFILL));
    }

    #[test]
    fn hosts_that_come_and_go_are_forgotten() {
        let (mut rates, mut now) = (Rates::default(), Instant::now());
        for n in 0..REMEMBERED * 3 {
            assert!(rates.take(&host(&format!("host-{n}")), now));
            now += REFILL;
        }
        assert!(rates.0.len() <= REMEMBERED);
    }
}
