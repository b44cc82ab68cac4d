//! Figures on pods.

use std::time::Duration;

use prometheus_client::{
    metrics::histogram::{Histogram, exponential_buckets},
    registry::{Registry, Unit},
};

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Metrics {
    start: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let start = Histogram::new(exponential_buckets(0.05, 1.6, 16));
        registry.register_with_unit(
            "virtual_node_pod_start",
            "Time from seeing a new pod to telling that it is ready",
            Unit::Seconds,
            start.clone(),
        );
        Self { start }
    }

    pub(crate) fn started(&self, took: Duration) {
        self.start.observe(took.as_secs_f64());
    }
}
