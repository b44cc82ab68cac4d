//! What to make of a row of results. Pure.

use pool_agent_api::spec::Thresholds;

use crate::sandbox::event::Verdict;

/// Counts results in a row and says when they change the verdict.
#[derive(Debug)]
pub(super) struct Tally {
    thresholds: Thresholds,
    last: Option<bool>,
    row: u32,
    verdict: Option<Verdict>,
}

impl Tally {
    pub(super) fn new(thresholds: Thresholds) -> Self {
        Self {
            thresholds,
            last: None,
            row: 0,
            verdict: None,
        }
    }

    /// The new verdict, if this result makes one.
    pub(super) fn count(&mut self, passed: bool) -> Option<Verdict> {
        self.row = if self.last == Some(passed) {
            self.row.saturating_add(1)
        } else {
            1
        };
        self.last = Some(passed);
        let (threshold, verdict) = if passed {
            (self.thresholds.success, Verdict::Passing)
        } else {
            (self.thresholds.failure, Verdict::Failing)
        };
        if self.row < threshold || self.verdict == Some(verdict) {
            return None;
        }
        self.verdict = Some(verdict);
        Some(verdict)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn verdicts(success: u32, failure: u32, results: &[bool]) -> Vec<Option<Verdict>> {
        let mut tally = Tally::new(Thresholds { success, failure });
        results.iter().map(|&passed| tally.count(passed)).collect()
    }

    #[test]
    fn a_verdict_takes_as_many_results_in_a_row_as_its_threshold() {
        use Verdict::{Failing, Passing};
        assert_eq!(
            verdicts(1, 3, &[true, false, false, true, false, false, false, false]),
            [Some(Passing), None, None, None, None, None, Some(Failing), None]
        );
        assert_eq!(
            verdicts(2, 1, &[true, true, true, false, true, true]),
            [None, Some(Passing), None, Some(Failing), None, Some(Passing)]
        );
    }

    proptest! {
        #[test]
        fn a_verdict_is_only_given_when_it_changes(
            success in 1u32..5, failure in 1u32..5,
            results in proptest::collection::vec(any::<bool>(), 0..100),
        ) {
            let given: Vec<Verdict> = verdicts(success, failure, &results).into_iter().flatten().collect();
            prop_assert!(given.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}
