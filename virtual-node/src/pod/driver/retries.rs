//! How long to wait between attempts of something that is tried until it works.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

const MOST: Duration = Duration::from_secs(15);

/// Doubling pauses without end.
pub(super) struct Retries {
    first: Duration,
    delays: ExponentialBackoff,
}

impl Retries {
    /// Of a call that failed: whoever failed is given time.
    pub(super) fn of_calls() -> Self {
        Self::starting_at(Duration::from_millis(200))
    }

    /// Of a read that somebody waits for, and that often works a moment later:
    /// the Node authorizer hears of a new pod as we do, by a watch.
    pub(super) fn of_reads() -> Self {
        Self::starting_at(Duration::from_millis(20))
    }

    fn starting_at(first: Duration) -> Self {
        let delays = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(MOST)
            .with_jitter()
            .without_max_times()
            .build();
        Self { first, delays }
    }

    pub(super) fn pause(&mut self) -> Duration {
        self.delays.next().unwrap_or(MOST)
    }

    pub(super) fn reset(&mut self) {
        *self = Self::starting_at(self.first);
    }
}
