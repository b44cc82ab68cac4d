//! A log line that an attacker could have written as often as he likes, written
//! seldom. Pure: time is an argument.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a burst of lines is followed by none.
const PAUSE: Duration = Duration::from_secs(10);

/// One for each kind of line and each who may cause it.
#[derive(Debug)]
pub struct Seldom {
    burst: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    begun: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self::allowing(1)
    }
}

impl Seldom {
    /// So many lines every ten seconds.
    pub fn allowing(burst: u32) -> Self {
        Self {
            burst,
            state: Mutex::default(),
        }
    }

    /// Whether a line is due now, and how many were left out since the last.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let over = state
            .begun
            .is_none_or(|begun| now.saturating_duration_since(begun) >= PAUSE);
        if over {
            (state.begun, state.lines) = (Some(now), 0);
        }
        if state.lines >= self.burst {
            state.left_out += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.left_out))
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

    #[test]
    fn a_few_at_once_are_each_told() {
        let (seldom, now) = (Seldom::allowing(3), Instant::now());
        let told = (0..5).filter(|_| seldom.due(now).is_some()).count();
        assert_eq!(told, 3);
        assert_eq!(seldom.due(now + PAUSE), Some(2));
    }
}
