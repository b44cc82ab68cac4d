//! Time for the drivers: the wall clock at the agent's start, carried on by the
//! monotonic one, so that a step of the wall clock neither hastens nor holds up
//! a back-off. Cores get the time as an argument and use [`after`] and [`since`].

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    monotonic: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self {
            wall: Timestamp::now(),
            monotonic: Instant::now(),
        }
    }

    pub fn now(&self) -> Timestamp {
        after(self.wall, self.monotonic.elapsed())
    }

    /// The monotonic instant at which [`Self::now`] will be `at`.
    pub fn instant(&self, at: Timestamp) -> Instant {
        // A day ahead is as good as never for a timer that is computed anew after each event.
        let ahead = since(at, self.wall).min(self.monotonic.elapsed() + Duration::from_secs(86_400));
        self.monotonic + ahead
    }
}

/// `at + by`, no later than the last time there is.
pub fn after(at: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by)
        .ok()
        .and_then(|by| at.checked_add(by).ok())
        .unwrap_or(Timestamp::MAX)
}

/// How long after `earlier` it is at `later`; zero if it is not.
pub fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_duration_a_peer_can_send_overflows_a_time() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        assert_eq!(after(now, Duration::from_secs(u64::MAX)), Timestamp::MAX);
        assert_eq!(since(now, Timestamp::MAX), Duration::ZERO);
        assert_eq!(
            since(after(now, Duration::from_secs(3)), now),
            Duration::from_secs(3)
        );
    }
}
