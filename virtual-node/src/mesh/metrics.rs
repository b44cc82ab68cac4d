//! What the control plane counts, under `virtual_node_mesh_`.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// How a request for a certificate ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    Signed,
    Refused,
    /// Put off: what the host runs is not known yet.
    Retry,
    Failed,
}

/// The types served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Kind {
    Address,
    Authorization,
}

/// The kinds of objects watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Watched {
    Pod,
    Service,
    EndpointSlice,
    Namespace,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WatchedLabel {
    kind: Watched,
}

#[derive(Debug, Default)]
pub struct Metrics {
    certificates: Family<OutcomeLabel, Counter>,
    clients: Gauge,
    connections_refused: Counter,
    resources: Family<KindLabel, Gauge>,
    sent: Family<KindLabel, Counter>,
    removed: Family<KindLabel, Counter>,
    rejected: Family<KindLabel, Counter>,
    watch_failures: Family<WatchedLabel, Counter>,
    ca_expiry: Gauge<f64, AtomicU64>,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("virtual_node_mesh");
        registry.register(
            "certificates",
            "Requests for workload certificates, by how they ended",
            metrics.certificates.clone(),
        );
        registry.register("clients", "Open xDS streams", metrics.clients.clone());
        registry.register(
            "connections_refused",
            "Connections that failed the handshake, or whose certificate is no host's",
            metrics.connections_refused.clone(),
        );
        registry.register("resources", "Resources served", metrics.resources.clone());
        registry.register(
            "resources_sent",
            "Resources sent to clients because they were new or changed",
            metrics.sent.clone(),
        );
        registry.register(
            "resources_removed",
            "Resources that clients were told are gone",
            metrics.removed.clone(),
        );
        registry.register(
            "answers_rejected",
            "Answers of which a client rejected something",
            metrics.rejected.clone(),
        );
        registry.register(
            "watch_failures",
            "Failed lists and watches of the API server",
            metrics.watch_failures.clone(),
        );
        registry.register_with_unit(
            "ca_expiry_timestamp",
            "When the signing certificate ends",
            Unit::Seconds,
            metrics.ca_expiry.clone(),
        );
        metrics
    }

    pub fn certificate(&self, outcome: Outcome) {
        self.certificates.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Counts a client for as long as the answer lives.
    pub fn client(&self) -> impl Drop + Send + 'static {
        struct Counted(Gauge);
        impl Drop for Counted {
            fn drop(&mut self) {
                self.0.dec();
            }
        }
        self.clients.inc();
        Counted(self.clients.clone())
    }

    pub fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    pub fn served(&self, kind: Kind, resources: usize) {
        self.resources
            .get_or_create(&KindLabel { kind })
            .set(i64::try_from(resources).unwrap_or(i64::MAX));
    }

    pub fn sent(&self, kind: Kind, changed: usize, removed: usize) {
        let label = KindLabel { kind };
        self.sent.get_or_create(&label).inc_by(changed as u64);
        self.removed.get_or_create(&label).inc_by(removed as u64);
    }

    pub fn rejected(&self, kind: Kind) {
        self.rejected.get_or_create(&KindLabel { kind }).inc();
    }

    pub fn watch_failed(&self, kind: Watched) {
        self.watch_failures.get_or_create(&WatchedLabel { kind }).inc();
    }

    /// Seconds since the epoch.
    pub fn ca_expires(&self, at: f64) {
        self.ca_expiry.set(at);
    }
}
