//! The runtime's own metrics: attachments, how long they take, and what the
//! kernel dropped.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pool_agent_api::TenantId;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{counter::ConstCounter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    attachment::AttachmentState,
    redirect::{Drops, Reason},
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

pub(super) struct RuntimeMetrics {
    attachments: Family<StateLabel, Gauge>,
    attach_seconds: Histogram,
    drops: DropCounters,
}

/// The kernel's counters of each tenant, read when they are asked for.
#[derive(Clone, Default)]
struct DropCounters(Arc<Mutex<BTreeMap<TenantId, Arc<Drops>>>>);

impl RuntimeMetrics {
    pub(super) fn register(registry: &mut Registry) -> Arc<Self> {
        let registry = registry.sub_registry_with_prefix("mesh_runtime");
        let metrics = Self {
            attachments: Family::default(),
            // 100 µs to 400 ms, doubling.
            attach_seconds: Histogram::new((0..13).map(|n| 0.0001 * f64::from(1 << n))),
            drops: DropCounters::default(),
        };
        registry.register(
            "attachments",
            "Pods by how far they are in the mesh",
            metrics.attachments.clone(),
        );
        registry.register(
            "attach_seconds",
            "From the order to attach a pod to its redirection, the certificate not awaited",
            metrics.attach_seconds.clone(),
        );
        registry.register_collector(Box::new(metrics.drops.clone()));
        Arc::new(metrics)
    }

    /// An attachment went from one state to another; None before and after it is.
    pub(super) fn changed(&self, from: Option<AttachmentState>, to: Option<AttachmentState>) {
        let gauge = |state: AttachmentState| {
            self.attachments
                .get_or_create_owned(&StateLabel { state: state.name() })
        };
        if let Some(from) = from {
            gauge(from).dec();
        }
        if let Some(to) = to {
            gauge(to).inc();
        }
    }

    pub(super) fn attached(&self, took: Duration) {
        self.attach_seconds.observe(took.as_secs_f64());
    }

    pub(super) fn watch_drops(&self, tenant: &TenantId, drops: Arc<Drops>) {
        let mut all = self.drops.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(tenant.clone(), drops);
    }

    pub(super) fn forget_drops(&self, tenant: &TenantId) {
        self.drops
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(tenant);
    }
}

impl fmt::Debug for DropCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DropCounters")
    }
}

impl Collector for DropCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let template = ConstCounter::new(0u64);
        let mut family = encoder.encode_descriptor(
            // The sub-registry puts its prefix before.
            "dropped_packets",
            "Packets of pods, or to them, that the kernel programs dropped",
            None,
            template.metric_type(),
        )?;
        for (tenant, drops) in all {
            for reason in Reason::ALL {
                // A map that can't be read has no number to tell.
                let Ok(count) = drops.count(reason) else { continue };
                let labels = [("tenant", tenant.as_str()), ("reason", reason.name())];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
