//! What the proxy tells of the traffic: Istio's metrics, and a line for each
//! connection when it closes. One for the process; `proxy` feeds it, the agent
//! exposes it. Nothing here waits: what can't be written at once is counted.

mod access;
mod carried;
mod traffic;

pub use access::{Access, Direction};
pub use carried::{Carried, Side};
pub use traffic::{Flag, Labels, Party, Reporter, Security, Series};

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use prost::Message;

/// The mesh's metrics, registered once for the process.
#[derive(Debug)]
pub struct Metrics {
    traffic: Arc<traffic::Traffic>,
    access: access::Log,
    refused: Family<RefusedLabels, Counter>,
    tunnels: Family<TunnelLabels, Gauge>,
    xds_terminations: Family<TerminationLabels, Counter>,
    xds_messages: Family<MessageLabels, Counter>,
    xds_message_bytes: Family<MessageLabels, Counter>,
    dns_requests: Counter,
    dns_upstream_requests: Counter,
    dns_upstream_failures: Counter,
}

impl Metrics {
    /// Starts the thread that writes the access log, to the subscriber that is
    /// current now.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            traffic: Arc::default(),
            access: access::Log::start(),
            refused: Family::default(),
            tunnels: Family::default(),
            xds_terminations: Family::default(),
            xds_messages: Family::default(),
            xds_message_bytes: Family::default(),
            dns_requests: Counter::default(),
            dns_upstream_requests: Counter::default(),
            dns_upstream_failures: Counter::default(),
        };
        registry.register_collector(Box::new(metrics.traffic.clone()));
        registry.register(
            "mesh_connections_refused",
            "Connections that ended before their peer was known, by reason",
            metrics.refused.clone(),
        );
        registry.register(
            "mesh_tunnels",
            "HBONE tunnels that are open",
            metrics.tunnels.clone(),
        );
        registry.register(
            "mesh_access_log_dropped_lines",
            "Access log lines that were dropped because the log was too slow",
            metrics.access.dropped(),
        );
        registry.register(
            "istio_xds_connection_terminations",
            "Streams to the mesh control plane that ended",
            metrics.xds_terminations.clone(),
        );
        registry.register(
            "istio_xds_message",
            "Messages received",
            metrics.xds_messages.clone(),
        );
        registry.register(
            "istio_xds_message_bytes",
            "Bytes of the messages received",
            metrics.xds_message_bytes.clone(),
        );
        registry.register(
            "istio_dns_requests",
            "DNS requests of pods",
            metrics.dns_requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_requests",
            "DNS requests passed on to a name server",
            metrics.dns_upstream_requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_failures",
            "DNS requests passed on that no name server answered",
            metrics.dns_upstream_failures.clone(),
        );
        metrics
    }

    /// The counters of connections with these labels.
    pub fn series(&self, labels: Labels) -> Arc<Series> {
        self.traffic.series(labels)
    }

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    /// Counts a tunnel as open until the answer is dropped.
    pub fn tunnel(&self, direction: Direction) -> OpenTunnel {
        let gauge = self.tunnels.get_or_create_owned(&TunnelLabels { direction });
        gauge.inc();
        OpenTunnel(gauge)
    }

    pub fn xds_message(&self, response: &DeltaDiscoveryResponse) {
        let labels = MessageLabels {
            url: if response.type_url == mesh_api::ADDRESS_TYPE {
                mesh_api::ADDRESS_TYPE
            } else {
                mesh_api::AUTHORIZATION_TYPE
            },
        };
        self.xds_messages.get_or_create(&labels).inc();
        self.xds_message_bytes
            .get_or_create(&labels)
            .inc_by(response.encoded_len() as u64);
    }

    pub fn xds_terminated(&self, reason: &'static str) {
        self.xds_terminations
            .get_or_create(&TerminationLabels { reason })
            .inc();
    }

    pub fn dns_request(&self) {
        self.dns_requests.inc();
    }

    pub fn dns_upstream_request(&self) {
        self.dns_upstream_requests.inc();
    }

    pub fn dns_upstream_failure(&self) {
        self.dns_upstream_failures.inc();
    }
}

#[derive(Debug)]
pub struct OpenTunnel(Gauge);

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TunnelLabels {
    direction: Direction,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TerminationLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageLabels {
    url: &'static str,
}

impl EncodeLabelValue for Direction {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.name(), encoder)
    }
}

/// One connection, as one end of the mesh reports it. Metrics are counted as it
/// goes; the line is written when it is dropped, however that comes.
#[derive(Debug)]
pub struct Flow {
    metrics: Arc<Metrics>,
    series: Arc<Series>,
    opened: Instant,
    /// From client to server, and back.
    received: AtomicU64,
    sent: AtomicU64,
    /// The pod of this host whose connection it is, and which end of it the pod is.
    account: Option<(Arc<Carried>, Side)>,
    access: Option<Box<Access>>,
    end: End,
}

/// How it ended. A flow that is dropped without a word was cut.
#[derive(Debug, Clone)]
struct End {
    flag: Flag,
    error: Option<String>,
}

impl Flow {
    /// `opened` is when the client's connection was accepted.
    pub fn open(metrics: &Arc<Metrics>, labels: Labels, access: Access, opened: Instant) -> Self {
        let series = metrics.series(labels);
        series.opened.inc();
        Self {
            metrics: metrics.clone(),
            series,
            opened,
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            account: None,
            access: Some(Box::new(access)),
            end: End {
                flag: Flag::None,
                error: Some("cut".to_owned()),
            },
        }
    }

    /// Its bytes are also counted as that pod's.
    pub(crate) fn on_account_of(mut self, pod: &Arc<Carried>, side: Side) -> Self {
        self.account = Some((pod.clone(), side));
        self
    }

    /// Bytes that came from the client.
    pub fn received(&self, bytes: usize) {
        if let Some((pod, side)) = &self.account {
            pod.by_client(*side, bytes as u64);
        }
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.series.received.inc_by(bytes as u64);
    }

    /// Bytes that went back to it.
    pub fn sent(&self, bytes: usize) {
        if let Some((pod, side)) = &self.account {
            pod.by_server(*side, bytes as u64);
        }
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        self.series.sent.inc_by(bytes as u64);
    }

    /// Bytes so far, both ways.
    pub fn carried(&self) -> u64 {
        self.received.load(Ordering::Relaxed) + self.sent.load(Ordering::Relaxed)
    }

    pub fn succeed(mut self) {
        self.end.error = None;
    }

    pub fn fail(mut self, flag: Flag, error: String) {
        self.end = End {
            flag,
            error: Some(error),
        };
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.series.close(self.end.flag);
        if let Some(access) = self.access.take() {
            self.metrics.access.write(access::Line {
                access,
                received: *self.received.get_mut(),
                sent: *self.sent.get_mut(),
                duration: self.opened.elapsed(),
                flag: self.end.flag,
                error: self.end.error.take(),
            });
        }
    }
}

#[cfg(test)]
mod tests;
