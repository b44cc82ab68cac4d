//! One figure: ours and a baseline, each as samples taken in turns, and the
//! line that is printed for them.
//!
//! Pure. The median is what a figure says: on a machine that does other things
//! too, a few slow samples say more about the machine. The spread is printed
//! beside it, so that a reader sees how much a difference means.

use std::fmt;

/// Samples of one quantity, in the figure's unit.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn push(&mut self, sample: f64) {
        // A sample that is no number has no place in an order.
        if sample.is_finite() {
            self.0.push(sample);
        }
    }

    pub(crate) fn extend(&mut self, samples: impl IntoIterator<Item = f64>) {
        samples.into_iter().for_each(|sample| self.push(sample));
    }

    /// The value below which `share` of the samples lie, by linear
    /// interpolation; `None` without samples.
    fn quantile(&self, share: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = share.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
        let below = sorted.get(place.floor() as usize)?;
        let above = sorted.get(place.ceil() as usize)?;
        Some(below + (above - below) * place.fract())
    }

    /// Each sample less the one that was taken in the same round.
    pub(crate) fn less(&self, other: &Self) -> Self {
        self.0
            .iter()
            .zip(&other.0)
            .map(|(ours, theirs)| ours - theirs)
            .collect()
    }

    pub(crate) fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(samples: I) -> Self {
        let mut taken = Self::default();
        taken.extend(samples);
        taken
    }
}

/// `median (p10 … p90, n samples)`
impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.median(), self.quantile(0.1), self.quantile(0.9)) {
            (Some(median), Some(low), Some(high)) => write!(
                f,
                "{} ({} … {}, {} samples)",
                Short(median),
                Short(low),
                Short(high),
                self.0.len()
            ),
            _ => f.write_str("nothing was measured"),
        }
    }
}

/// What a figure should reach, by its ratio or by ours alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    RatioAtMost(f64),
    RatioAtLeast(f64),
    OursAtMost(f64),
}

/// What ours is held against.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Baseline {
    /// In turns with ours, in this run.
    Measured { what: &'static str, samples: Samples },
    /// A value from elsewhere.
    Stated { what: &'static str, value: f64 },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Samples,
    pub(crate) baseline: Baseline,
    /// `None`: nothing was promised.
    pub(crate) target: Option<Target>,
    /// Further lines for people.
    pub(crate) remarks: Vec<String>,
}

impl Target {
    fn reached(self, ours: f64, ratio: f64) -> bool {
        match self {
            Target::RatioAtMost(most) => ratio <= most,
            Target::RatioAtLeast(least) => ratio >= least,
            Target::OursAtMost(most) => ours <= most,
        }
    }
}

impl Figure {
    fn values(&self) -> Option<(f64, f64)> {
        let baseline = match &self.baseline {
            Baseline::Measured { samples, .. } => samples.median()?,
            Baseline::Stated { value, .. } => *value,
        };
        Some((self.ours.median()?, baseline))
    }
}

/// The figure's line, and comment lines that say what stands behind it.
impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = (self.name, self.unit);
        let Some((ours, baseline)) = self.values() else {
            return writeln!(f, "# {name}: nothing was measured");
        };
        let ratio = ours / baseline;
        writeln!(
            f,
            "figure {name} ours {} baseline {} unit {unit} ratio {ratio:.2}",
            Short(ours),
            Short(baseline)
        )?;
        writeln!(f, "#   ours     {}", self.ours)?;
        match &self.baseline {
            Baseline::Measured { what, samples } => writeln!(f, "#   baseline {samples}: {what}")?,
            Baseline::Stated { what, .. } => writeln!(f, "#   baseline stated, not measured: {what}")?,
        }
        if let Some(target) = self.target {
            let verdict = if target.reached(ours, ratio) {
                "reached"
            } else {
                "MISSED"
            };
            let target = match target {
                Target::RatioAtMost(most) => format!("ratio at most {most}"),
                Target::RatioAtLeast(least) => format!("ratio at least {least}"),
                Target::OursAtMost(most) => format!("ours at most {most} {unit}"),
            };
            writeln!(f, "#   target   {target}: {verdict}")?;
        }
        self.remarks
            .iter()
            .try_for_each(|remark| writeln!(f, "#   {remark}"))
    }
}

/// Three digits that mean something.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.0.abs() {
            v if v >= 100.0 => 0,
            v if v >= 10.0 => 1,
            v if v >= 1.0 => 2,
            _ => 3,
        };
        write!(f, "{:.digits$}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: &[f64], baseline: &[f64], target: Target) -> Figure {
        Figure {
            name: "pod-start-1",
            unit: "ms",
            ours: ours.iter().copied().collect(),
            baseline: Baseline::Measured {
                what: "a test",
                samples: baseline.iter().copied().collect(),
            },
            target: Some(target),
            remarks: Vec::new(),
        }
    }

    #[test]
    fn a_median_is_the_middle_sample_or_lies_between_the_two() {
        for (samples, median) in [
            (vec![], None),
            (vec![7.0], Some(7.0)),
            (vec![9.0, 1.0, 5.0], Some(5.0)),
            (vec![4.0, 1.0], Some(2.5)),
            (vec![f64::NAN, 3.0], Some(3.0)),
        ] {
            assert_eq!(samples.into_iter().collect::<Samples>().median(), median);
        }
    }

    #[test]
    fn one_slow_sample_does_not_move_a_figure() {
        let text = figure(&[10.0, 11.0, 900.0], &[10.0, 10.0], Target::RatioAtMost(1.5)).to_string();
        assert!(
            text.starts_with("figure pod-start-1 ours 11.0 baseline 10.0 unit ms ratio 1.10\n"),
            "{text}"
        );
    }

    #[test]
    fn what_is_added_is_taken_round_by_round() {
        let [ours, theirs] =
            [[110.0, 330.0, 120.0], [10.0, 200.0, 30.0]].map(|all| all.into_iter().collect::<Samples>());
        assert_eq!(ours.less(&theirs).median(), Some(100.0));
    }

    #[test]
    fn a_missed_target_is_said_and_a_reached_one_too() {
        let said = |figure: Figure| {
            figure
                .to_string()
                .lines()
                .find(|l| l.contains("target"))
                .map(str::to_owned)
        };
        let missed = figure(&[20.0], &[10.0], Target::RatioAtMost(1.5));
        assert_eq!(
            said(missed).as_deref(),
            Some("#   target   ratio at most 1.5: MISSED")
        );
        let reached = figure(&[20.0], &[10.0], Target::RatioAtLeast(0.27));
        assert_eq!(
            said(reached).as_deref(),
            Some("#   target   ratio at least 0.27: reached")
        );
        let absolute = figure(&[20.0], &[10.0], Target::OursAtMost(4.0));
        assert_eq!(
            said(absolute).as_deref(),
            Some("#   target   ours at most 4 ms: MISSED")
        );
    }

    #[test]
    fn a_figure_without_samples_prints_no_number() {
        let text = figure(&[], &[1.0], Target::RatioAtMost(1.0)).to_string();
        assert_eq!(text, "# pod-start-1: nothing was measured\n");
    }
}
