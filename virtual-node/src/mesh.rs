//! The tenant's mesh control plane, embedded: what istiod would be to a ztunnel,
//! for the hosts of the pool. `main` makes a [`Control`] and runs
//! [`Control::serve`]; the hosts' mesh runtimes connect to it, nobody else.

//!
//! ```text
//!  API server ─▶ sources ─▶ index ─▶ snapshot ─▶ xds (subscription) ─▶ hosts
//!                             ▲                                          │ CSR
//!  placement ─────────────────┴──────────────────▶ broker ◀──────────────┘
//!                                                    └─▶ ca
//! ```
//!
//! What always holds: a peer is a host of the pool or it is not spoken with; a host
//! is told the same as any other, but gets certificates only for the pods it runs.

pub mod broker;
pub mod ca;
pub mod csr;
pub mod index;
mod intake;
pub mod listener;
pub mod metrics;
pub mod object;
pub mod rate;
pub mod snapshot;
pub mod sources;
pub mod subscription;
pub mod translate;
pub mod xds;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bounds::Bounds;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_api::istio::certificate::istio_certificate_service_server::IstioCertificateServiceServer;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use self::{
    broker::Broker,
    ca::Authority,
    index::Index,
    intake::Intake,
    metrics::{Kind, Metrics},
    xds::{Discovery, Snapshots},
};
use crate::{incoming::Incoming, placement::Placements, pool_tls::PoolTls};

/// A peer that is gone without a word is noticed after both: a ztunnel's own figures.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// At the end, connections get this long to close; hosts come back to the next process.
const DRAIN: Duration = Duration::from_secs(3);

/// A host has one xDS stream and asks for a few certificates at a time; more wait.
const MAX_STREAMS: u32 = 32;

/// A client of a large cluster names all it holds when it comes back: 50,000
/// resources at 150 bytes, and as much again.
const MAX_XDS_REQUEST: usize = 16 << 20;

/// A CSR and its metadata.
const MAX_CSR_REQUEST: usize = 64 << 10;

/// What the control plane has to know, parsed from the configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Pods bound to this Node are ours, and in the mesh unless they opted out.
    pub node_name: String,
    pub cluster: Cluster,
}

/// What the mesh calls the tenant's cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Istio's id of the cluster, e.g. `Kubernetes`.
    pub id: String,
    /// Istio's network name; empty for the default.
    pub network: String,
    /// Of the workloads' SPIFFE ids, e.g. `cluster.local`.
    pub trust_domain: String,
    /// DNS suffix of services, e.g. `cluster.local`.
    pub domain: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot serve the mesh's hosts")]
    Serve(#[source] tonic::transport::Error),
}

/// Ready to serve.
pub struct Control {
    config: Config,
    authority: Authority,
    incoming: Incoming,
    metrics: Arc<Metrics>,
    shown: Bounds,
}

impl Control {
    /// Metrics go into `registry`, under `virtual_node_mesh_…`.
    pub fn new(config: Config, authority: Authority, incoming: Incoming, registry: &mut Registry) -> Self {
        let metrics = Arc::new(Metrics::register(registry));
        let shown = Bounds::register(registry.sub_registry_with_prefix("virtual_node_mesh"));
        let expiry = authority.not_after().duration_since(SystemTime::UNIX_EPOCH);
        metrics.ca_expires(expiry.unwrap_or_default().as_secs_f64());
        Self {
            config,
            authority,
            incoming,
            metrics,
            shown,
        }
    }

    /// Where it listens: of use where the port was left open.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.incoming.address()
    }

    /// Serves until `shutdown`. A lost API server is waited for; meanwhile the hosts
    /// keep what they were last told.
    ///
    /// `placements` decides who gets a certificate: see [`Placements`] for when a
    /// placement has to be there.
    pub async fn serve(
        self,
        client: kube::Client,
        pool: Arc<PoolTls>,
        placements: watch::Receiver<Arc<Placements>>,
        shutdown: CancellationToken,
    ) -> Result<(), Error> {
        let index = Index::new(self.config.cluster.clone(), &self.config.node_name);
        let (publish, snapshots) = watch::channel(Snapshots {
            addresses: None,
            // No source of policies, so it has told all there is. See `sources`.
            authorizations: Some(Arc::default()),
        });
        self.metrics.served(Kind::Authorization, 0);
        let source = sources::kubernetes::run(
            client,
            index,
            placements.clone(),
            publish,
            Arc::clone(&self.metrics),
        );
        let overdue = {
            let shutdown = shutdown.clone();
            async move {
                shutdown.cancelled().await;
                tokio::time::sleep(DRAIN).await;
            }
        };
        tokio::select! {
            served = self.answer(pool, placements, snapshots, shutdown) => served,
            () = source => Ok(()),
            () = overdue => Ok(()),
        }
    }

    /// The gRPC server.
    async fn answer(
        self,
        pool: Arc<PoolTls>,
        placements: watch::Receiver<Arc<Placements>>,
        snapshots: watch::Receiver<Snapshots>,
        shutdown: CancellationToken,
    ) -> Result<(), Error> {
        let broker = Broker::new(
            self.authority,
            self.config.cluster.trust_domain,
            placements,
            Arc::clone(&self.metrics),
        );
        let discovery = Discovery::new(snapshots, Arc::clone(&self.metrics), shutdown.clone());
        Server::builder()
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .max_concurrent_streams(MAX_STREAMS)
            .layer(Intake::new(&self.shown))
            .add_service(
                AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_XDS_REQUEST),
            )
            .add_service(
                IstioCertificateServiceServer::new(broker).max_decoding_message_size(MAX_CSR_REQUEST),
            )
            .serve_with_incoming_shutdown(
                listener::accept(self.incoming, pool, self.metrics, &self.shown),
                shutdown.cancelled_owned(),
            )
            .await
            .map_err(Error::Serve)
    }
}

#[cfg(test)]
mod tests;
