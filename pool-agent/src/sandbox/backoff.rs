//! How long to wait before something that failed is tried again, as a kubelet
//! does it: 10 s, doubled each time to 300 s, forgotten after 10 good minutes.
//! Pure; used by [`super::lifecycle`] for crashes and for image pulls.

use std::time::Duration;

use jiff::Timestamp;

use super::clock::{after, since};

/// The first delay.
pub(super) const BASE: Duration = Duration::from_secs(10);
/// Where the doubling ends.
pub(super) const LIMIT: Duration = Duration::from_secs(300);
/// A failure this long after the last one counts as the first.
pub(super) const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    /// The delay to wait after the next failure, and when it was set.
    set: Option<(Duration, Timestamp)>,
}

impl Backoff {
    /// As it stands after `restarts` of which the last was at `at`.
    pub(super) fn resumed(restarts: u32, at: Timestamp) -> Self {
        if restarts == 0 {
            return Self::default();
        }
        let delay = BASE.saturating_mul(1 << (restarts - 1).min(6)).min(LIMIT);
        Self {
            set: Some((delay, at)),
        }
    }

    /// The delay that a failure at `failed` calls for; zero for the first.
    pub(super) fn delay(&self, failed: Timestamp) -> Duration {
        match self.set {
            Some((delay, at)) if since(failed, at) <= FORGIVEN_AFTER => delay,
            _ => Duration::ZERO,
        }
    }

    /// When to try again after a failure at `failed`.
    pub(super) fn until(&self, failed: Timestamp) -> Timestamp {
        after(failed, self.delay(failed))
    }

    /// Notes at `now` that it is tried again after a failure at `failed`.
    pub(super) fn advance(&mut self, failed: Timestamp, now: Timestamp) {
        let delay = match self.delay(failed) {
            Duration::ZERO => BASE,
            delay => delay.saturating_mul(2).min(LIMIT),
        };
        self.set = Some((delay, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    #[test]
    fn the_first_restart_is_at_once_and_then_delays_double_to_five_minutes() {
        let mut backoff = Backoff::default();
        let mut now = 0;
        let mut delays = vec![];
        for _ in 0..8 {
            let delay = backoff.delay(at(now));
            delays.push(delay.as_secs());
            now += i64::try_from(delay.as_secs()).unwrap();
            backoff.advance(at(now), at(now));
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_good_minutes_are_a_fresh_start() {
        let mut backoff = Backoff::default();
        backoff.advance(at(0), at(0));
        backoff.advance(at(10), at(10));
        assert_eq!(backoff.delay(at(610)).as_secs(), 20);
        assert_eq!(backoff.delay(at(611)), Duration::ZERO);
    }

    #[test]
    fn a_restarted_agent_resumes_where_the_count_of_restarts_says() {
        for (restarts, seconds) in [(0, 0), (1, 10), (2, 20), (5, 160), (6, 300), (4_000_000_000, 300)] {
            assert_eq!(
                Backoff::resumed(restarts, at(0)).delay(at(1)).as_secs(),
                seconds,
                "{restarts}"
            );
        }
    }
}
