//! A log line that an attacker could have written as often as he likes, written
//! seldom. Pure: time is an argument.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// One for each kind of line and each who may cause it.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// Whether a line is due now, and how many were left out since the last.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.last {
            Some(last) if now.saturating_duration_since(last) < PAUSE => {
                state.left_out += 1;
                None
            }
            _ => {
                state.last = Some(now);
                Some(std::mem::take(&mut state.left_out))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_that_says_how_much_it_leaves_out() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.due(now), Some(0));
        for _ in 0..1000 {
            assert_eq!(seldom.due(now), None);
        }
        assert_eq!(seldom.due(now + PAUSE), Some(1000));
    }
}
