//! Istio's TCP metrics: the same names and labels as a stock mesh, so that its
//! dashboards read ours.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use mesh_api::Identity;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder},
    metrics::{MetricType, counter::Counter},
};

use crate::state::{Service, Workload};

/// Sets of labels that are kept apart. They come from the tenant's own objects,
/// so their number is the tenant's choice, and memory is the host's: beyond
/// this, connections are counted together under `unknown`.
const MAX_SERIES: usize = 4096;

/// Which end of the connection counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    MutualTls,
    None,
}

/// Istio's `response_flags`: why a connection failed, as far as the mesh is to
/// blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    None,
    Denied,
    Connect,
    Tls,
    Http2Handshake,
    /// Refused by where it goes, not by whom it is.
    NetworkPolicy,
    Identity,
}

impl Flag {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::Tls => "TLS_FAILURE",
            Self::Http2Handshake => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Identity => "IDENTITY_ERROR",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Party {
    pub workload: Option<Arc<str>>,
    pub namespace: Option<Arc<str>>,
    pub canonical_service: Option<Arc<str>>,
    pub canonical_revision: Option<Arc<str>>,
    pub principal: Option<Identity>,
    pub cluster: Option<Arc<str>>,
    pub region: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

impl Party {
    pub fn of(workload: &Workload) -> Self {
        let known = |text: &Arc<str>| Some(text).filter(|t| !t.is_empty()).cloned();
        Self {
            workload: known(&workload.owner).or_else(|| known(&workload.name)),
            namespace: known(&workload.namespace),
            canonical_service: known(&workload.canonical_name),
            canonical_revision: known(&workload.canonical_revision),
            principal: None,
            cluster: known(&workload.cluster),
            region: known(&workload.locality.region),
            zone: known(&workload.locality.zone),
        }
    }

    /// With the identity that TLS verified, or that this host's pod has.
    pub fn with_principal(self, principal: Option<Identity>) -> Self {
        Self { principal, ..self }
    }
}

/// What a connection is counted under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Labels {
    pub reporter: Reporter,
    pub source: Party,
    pub destination: Party,
    /// Host name, namespace and name.
    pub service: Option<(Arc<str>, Arc<str>, Arc<str>)>,
    pub security: Security,
}

impl Labels {
    pub fn with_service(self, service: &Service) -> Self {
        Self {
            service: Some((
                service.key.hostname.clone(),
                service.key.namespace.clone(),
                service.name.clone(),
            )),
            ..self
        }
    }
}

/// The counters of one set of labels, resolved once a connection.
#[derive(Debug, Default)]
pub struct Series {
    pub(super) opened: Counter,
    pub(super) received: Counter,
    pub(super) sent: Counter,
    /// By flag, in the order of `FLAGS`.
    closed: [Counter; FLAGS.len()],
}

const FLAGS: [Flag; 7] = [
    Flag::None,
    Flag::Denied,
    Flag::Connect,
    Flag::Tls,
    Flag::Http2Handshake,
    Flag::NetworkPolicy,
    Flag::Identity,
];

impl Series {
    pub(super) fn close(&self, flag: Flag) {
        if let Some(index) = FLAGS.iter().position(|&f| f == flag) {
            self.closed[index].inc();
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Traffic {
    series: RwLock<HashMap<Labels, Arc<Series>>>,
}

impl Traffic {
    pub(super) fn series(&self, labels: Labels) -> Arc<Series> {
        let known = self.series.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = known.get(&labels) {
            return series.clone();
        }
        drop(known);
        let mut series = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let labels = if series.len() < MAX_SERIES {
            labels
        } else {
            Labels {
                source: Party::default(),
                destination: Party::default(),
                service: None,
                ..labels
            }
        };
        series.entry(labels).or_default().clone()
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
        type Pick = fn(&Series) -> &Counter;
        let plain: [(&str, &str, Pick); 3] = [
            ("istio_tcp_connections_opened", "Connections opened", |s| {
                &s.opened
            }),
            ("istio_tcp_received_bytes", "Bytes from the client", |s| {
                &s.received
            }),
            ("istio_tcp_sent_bytes", "Bytes to the client", |s| &s.sent),
        ];
        for (name, help, pick) in plain {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in series.iter() {
                let flagged = Flagged(labels, Flag::None);
                pick(series).encode(family.encode_family(&flagged)?)?;
            }
        }
        let ended = [
            ("istio_tcp_connections_closed", "Connections closed", &FLAGS[..]),
            // Without the first flag, which says that nothing failed.
            (
                "istio_tcp_connections_failed",
                "Connections that failed",
                &FLAGS[1..],
            ),
        ];
        for (name, help, flags) in ended {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in series.iter() {
                for (flag, counter) in FLAGS.iter().zip(&series.closed) {
                    if flags.contains(flag) && counter.get() > 0 {
                        counter.encode(family.encode_family(&Flagged(labels, *flag))?)?;
                    }
                }
            }
        }
        Ok(())
    }
}

struct Flagged<'a>(&'a Labels, Flag);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(labels, flag) = self;
        let mut put = |name: &str, value: &str| (name, value).encode(encoder.encode_label());
        put(
            "reporter",
            match labels.reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            },
        )?;
        for (end, party) in [("source", &labels.source), ("destination", &labels.destination)] {
            let principal = party.principal.as_ref().map(Identity::to_string);
            let values = [
                ("workload", party.workload.as_deref()),
                ("canonical_service", party.canonical_service.as_deref()),
                ("canonical_revision", party.canonical_revision.as_deref()),
                ("workload_namespace", party.namespace.as_deref()),
                ("principal", principal.as_deref()),
                ("app", party.canonical_service.as_deref()),
                ("version", party.canonical_revision.as_deref()),
                ("cluster", party.cluster.as_deref()),
                ("region", party.region.as_deref()),
                ("zone", party.zone.as_deref()),
            ];
            for (what, value) in values {
                put(&format!("{end}_{what}"), value.unwrap_or("unknown"))?;
            }
        }
        let service = labels.service.as_ref();
        put("destination_service", service.map_or("unknown", |s| &s.0))?;
        put(
            "destination_service_namespace",
            service.map_or("unknown", |s| &s.1),
        )?;
        put("destination_service_name", service.map_or("unknown", |s| &s.2))?;
        put("request_protocol", "tcp")?;
        put("response_flags", flag.name())?;
        put(
            "connection_security_policy",
            match labels.security {
                Security::MutualTls => "mutual_tls",
                Security::None => "none",
            },
        )
    }
}
