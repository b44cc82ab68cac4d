//! The process of one virtual node, described by a file: what it needs from outside is
//! read, its parts are started ([`assembly`](crate::assembly)) and stopped. Called by
//! `main`. The process that serves many is `fleet`'s.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use kube::{
    Client, Config as ClientConfig,
    config::{KubeConfigOptions, Kubeconfig},
};
use pool_agent_api::{Epoch, tenant::MeshControl};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    api_server,
    assembly::{Assembly, Hosts, KubeletSetup, MeshSetup, Setup},
    config::Config,
    incoming::Incoming,
    kubelet::{Certificate, ClientAuthority},
    mesh::ca::Authority,
    metrics,
    pool_tls::{self, PoolTls},
};

/// How often the pool credentials' files are looked at.
const RELOAD: Duration = Duration::from_secs(60);

/// Runs the virtual node until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let (node_name, tenant) = (config.node_name.clone(), config.tenant.clone());
    let metrics_listen = config.metrics_listen;
    let mut registry = Registry::default();
    let setup = setup(config, &shutdown).await?;
    let assembly = Assembly::start(setup, &mut registry, &shutdown);
    let metrics = metrics::serve(metrics_listen, registry, shutdown.clone()).await?;
    info!(node = node_name, %tenant, "virtual node started");
    let stopping = async {
        shutdown.cancelled().await;
        info!("stopping; pods go on running");
    };
    let (ended, ()) = tokio::join!(assembly.ended(&shutdown), stopping);
    metrics.await.context("the metrics server broke")?;
    ended
}

/// What the file says, opened.
async fn setup(config: Config, shutdown: &CancellationToken) -> anyhow::Result<Setup> {
    let pool_tls = PoolTls::load(pool_tls::Files {
        trust_domain: config.pool.tls.trust_domain,
        certificate: config.pool.tls.certificate,
        key: config.pool.tls.key,
        ca: config.pool.tls.ca,
    })
    .context("cannot use the pool credentials")?;
    let pool_tls = Arc::new(pool_tls);
    let follow = pool_tls.clone();
    let until = shutdown.clone();
    tokio::spawn(async move { follow.follow_files(RELOAD, until).await });

    let listen = async |address, what| {
        Incoming::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address} for {what}"))
    };
    Ok(Setup {
        node_name: config.node_name,
        tenant: config.tenant,
        epoch: epoch()?,
        address: config.address,
        node: config.node,
        client: match &config.kubeconfig {
            Some(path) => client_of(path).await?,
            None => api_server::client(
                ClientConfig::incluster()
                    .context("no kubeconfig is given, and there is no cluster around")?,
            )?,
        },
        cluster: config.cluster,
        kubelet: KubeletSetup {
            port: config.kubelet.listen.port(),
            incoming: listen(config.kubelet.listen, "the kubelet API").await?,
            clients: ClientAuthority::File(config.kubelet.client_ca),
            certificate: match config.kubelet.certificate {
                Some((certificate, key)) => Certificate::Files(certificate, key),
                None => Certificate::Requested,
            },
        },
        mesh: MeshSetup {
            incoming: listen(config.mesh.listen, "the mesh's hosts").await?,
            authority: Authority::open(&config.mesh.ca_dir, SystemTime::now())
                .context("cannot open the mesh's certificate authority")?,
            control: MeshControl {
                address: config.mesh.advertise,
                trust_domain: config.mesh.trust_domain,
                cluster_id: config.mesh.cluster_id,
                network: config.mesh.network,
            },
        },
        pool_tls,
        hosts: match config.cell {
            None => Hosts::Listed(config.pool.hosts),
            Some(settings) => Hosts::Claimed {
                client: client_of(&settings.kubeconfig).await?,
                settings: settings.claims,
            },
        },
    })
}

/// Of a process that a file describes: one at a time, and each later than the one before.
fn epoch() -> anyhow::Result<Epoch> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.context("this machine's clock is before 1970")?;
    Ok(Epoch::parse("epoch", u64::try_from(since.as_millis())?)?)
}

/// A client as a kubeconfig of our own operator says; it may name files and commands.
pub(crate) async fn client_of(kubeconfig: &Path) -> anyhow::Result<Client> {
    let file =
        Kubeconfig::read_from(kubeconfig).with_context(|| format!("cannot read {}", kubeconfig.display()))?;
    let settings = ClientConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("cannot use {}", kubeconfig.display()))?;
    Ok(api_server::client(settings)?)
}
