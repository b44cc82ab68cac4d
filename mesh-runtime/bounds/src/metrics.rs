//! Every bound as three metrics: what is held, of how much, and what was refused at
//! which level. Under the prefix of the registry they are put in.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::Level;

/// What a bound tells of itself.
pub trait Reading: Send {
    fn current(&self) -> u64;
    fn limit(&self) -> u64;
    /// Since the start.
    fn refusals(&self, level: Level) -> u64;
}

type Entry = (&'static str, Box<dyn Reading>);

/// The bounds of a process. Cheap to clone.
#[derive(Clone, Default)]
pub struct Bounds(Arc<Mutex<Vec<Entry>>>);

impl Bounds {
    /// `bound_held`, `bound_limit` and `bound_refusals_total` of `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let bounds = Self::default();
        registry.register_collector(Box::new(bounds.clone()));
        bounds
    }

    /// From now on `bound` is shown by this name.
    pub fn show(&self, name: &'static str, bound: impl Reading + 'static) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((name, Box::new(bound)));
    }
}

impl fmt::Debug for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bounds")
    }
}

// `Collector` asks for Sync; what is read is behind the lock.
impl Collector for Bounds {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        type Read = fn(&dyn Reading) -> u64;
        let gauges: [(&str, &str, Read); 2] = [
            ("bound_held", "What is held of a bound", |r| r.current()),
            ("bound_limit", "What a bound allows in all", |r| r.limit()),
        ];
        let kind = ConstGauge::new(0_i64).metric_type();
        for (name, help, read) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (bound, reading) in all.iter() {
                let value = i64::try_from(read(&**reading)).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(family.encode_family(&[("bound", *bound)])?)?;
            }
        }
        let kind = ConstCounter::new(0_u64).metric_type();
        let help = "What was refused, by the level whose share was used up";
        let mut family = encoder.encode_descriptor("bound_refusals", help, None, kind)?;
        for (bound, reading) in all.iter() {
            for level in Level::ALL {
                let labels = [("bound", *bound), ("level", level.name())];
                let count = ConstCounter::new(reading.refusals(level));
                count.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
