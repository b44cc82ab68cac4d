//! The process: every part started, wired and stopped. Called by `main`.
//!
//! Stopping stops nothing that runs: pods are the hosts', the Node stays, and
//! the next process reads it all again.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use bounds::Bounds;
use kube::{
    Client, Config as ClientConfig,
    config::{KubeConfigOptions, Kubeconfig},
};
use pool_agent_api::HostName;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    config::Config,
    event::Recorder,
    kubelet::Kubelet,
    mesh, metrics,
    node::{self, Offer, Registration},
    placement::{Cell, Placer},
    pod::{self, Directory, Supervisor, driver::Tools, translate::NodeFacts},
    pool::{self, Membership, Named, Pool},
    pool_tls::{self, PoolTls},
};

/// Runs the virtual node until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let client = client(&config).await?;
    let mut registry = Registry::default();
    let pod_metrics = pod::metrics::Metrics::new(&mut registry);

    let membership = Membership {
        tenant: config.tenant.clone(),
        node_name: config.node_name.clone(),
        cluster: config.cluster.clone(),
        mesh: config.mesh.clone(),
    };
    let pool_tls = PoolTls::load(pool_tls::Files {
        trust_domain: config.pool.tls.trust_domain.clone(),
        certificate: config.pool.tls.certificate.clone(),
        key: config.pool.tls.key.clone(),
        ca: config.pool.tls.ca.clone(),
    })
    .context("cannot use the pool credentials")?;
    let pool_tls = Arc::new(pool_tls);
    let follow = pool_tls.clone();
    let until = shutdown.clone();
    tokio::spawn(async move { follow.follow_files(RELOAD, until).await });

    let control = mesh::Control::open(mesh_config(&config), &mut registry)
        .await
        .context("cannot start the mesh control plane")?;
    let connect = {
        let pool_tls = pool_tls.clone();
        move |host: &HostName, address| pool::channel(host, address, pool_tls.clone())
    };
    let (named, names) = watch::channel(Named::listed(&config.pool.hosts));
    let (pool, reports, hosts) = Pool::start(names, connect, membership);
    let (placer, placements, offer) = match &config.cell {
        None => {
            let (placer, placements) = Placer::start(hosts.clone(), config.node.quota);
            (placer, placements, Offer::Hosts)
        }
        Some(settings) => {
            let (quota, offered) = watch::channel(None);
            named.send_replace(Named::default());
            let cell = Cell {
                client: client_of(&settings.kubeconfig).await?,
                tenants_client: client.clone(),
                settings: settings.clone(),
                tenant: config.tenant.clone(),
                node_name: config.node_name.clone(),
                named,
                quota,
            };
            let (placer, placements) = Placer::claim_in(cell, hosts.clone());
            (placer, placements, Offer::Quota(offered))
        }
    };
    let control = tokio::spawn(control.serve(client.clone(), pool_tls, placements, shutdown.clone()));
    let recorder = Recorder::start(client.clone(), config.node_name.clone());

    let identity = node::Identity {
        name: config.node_name.clone(),
        tenant: config.tenant.clone(),
        address: config.address,
        kubelet_port: config.kubelet.listen.port(),
        settings: config.node.clone(),
    };
    let (registration, node) = Registration::new(
        client.clone(),
        identity.clone(),
        hosts.clone(),
        offer.clone(),
        recorder.clone(),
    );
    let registration = tokio::spawn(registration.run(shutdown.clone()));

    let tools = Arc::new(Tools {
        client: client.clone(),
        pool: pool.clone(),
        placer,
        recorder,
        facts: facts(&config, identity, hosts, offer),
        node,
        metrics: pod_metrics,
    });
    let (directory, queries) = Directory::new();
    let pods = pod::watch_pods(client.clone(), &config.node_name);
    let supervisor = Supervisor::new(tools).run(pods, reports, queries, shutdown.clone());
    let supervisor = tokio::spawn(supervisor);

    let kubelet = Kubelet {
        config: config.kubelet.clone(),
        node_name: config.node_name.clone(),
        address: config.address,
        client,
        directory,
        pool,
        shown: Bounds::register(registry.sub_registry_with_prefix("virtual_node_kubelet")),
    };
    let kubelet = tokio::spawn(kubelet.serve(shutdown.clone()));

    let metrics = metrics::serve(config.metrics_listen, registry, shutdown.clone()).await?;

    info!(node = config.node_name, tenant = %config.tenant, "virtual node started");
    shutdown.cancelled().await;
    info!("stopping; pods go on running");
    supervisor.await.context("the pods' supervisor broke")?;
    registration.await.context("the node's registration broke")?;
    metrics.await.context("the metrics server broke")?;
    kubelet
        .await
        .context("the kubelet API broke")?
        .context("the kubelet API failed")?;
    control
        .await
        .context("the mesh control plane broke")?
        .context("the mesh control plane failed")?;
    Ok(())
}

/// How often the pool credentials' files are looked at.
const RELOAD: Duration = Duration::from_secs(60);

fn mesh_config(config: &Config) -> mesh::Config {
    mesh::Config {
        listen: config.mesh.listen,
        node_name: config.node_name.clone(),
        cluster: mesh::Cluster {
            id: config.mesh.cluster_id.clone(),
            network: config.mesh.network.clone(),
            trust_domain: config.mesh.trust_domain.clone(),
            domain: config.cluster.domain.clone(),
        },
        ca_dir: config.mesh.ca_dir.clone(),
    }
}

async fn client(config: &Config) -> anyhow::Result<Client> {
    match &config.kubeconfig {
        Some(path) => client_of(path).await,
        None => client_with(
            ClientConfig::incluster().context("no kubeconfig is given, and there is no cluster around")?,
        ),
    }
}

async fn client_of(kubeconfig: &Path) -> anyhow::Result<Client> {
    let file =
        Kubeconfig::read_from(kubeconfig).with_context(|| format!("cannot read {}", kubeconfig.display()))?;
    let settings = ClientConfig::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("cannot use {}", kubeconfig.display()))?;
    client_with(settings)
}

fn client_with(mut settings: ClientConfig) -> anyhow::Result<Client> {
    settings.connect_timeout = Some(std::time::Duration::from_secs(10));
    Client::try_from(settings).context("cannot make a client of the API server")
}

/// What pods are told of the node; follows the hosts.
fn facts(
    config: &Config,
    identity: node::Identity,
    mut hosts: watch::Receiver<crate::pool::HostTable>,
    mut offer: Offer,
) -> watch::Receiver<NodeFacts> {
    let facts = |identity: &node::Identity, hosts: &crate::pool::HostTable| NodeFacts {
        tenant: config.tenant.clone(),
        node_name: config.node_name.clone(),
        cluster_domain: config.cluster.domain.clone(),
        dns_address: config.cluster.dns_address,
        upstream_nameservers: config.cluster.upstream_nameservers.clone(),
        allocatable: node::allocatable(identity, hosts),
    };
    let mut identity = identity;
    identity.settings.quota = offer.quota().or(identity.settings.quota);
    let first = facts(&identity, &hosts.borrow_and_update());
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = hosts.changed() => if changed.is_err() {
                    return;
                },
                () = offer.changed() => {}
            }
            identity.settings.quota = offer.quota().or(identity.settings.quota);
            let allocatable = node::allocatable(&identity, &hosts.borrow_and_update());
            sender.send_if_modified(|facts| {
                let before = std::mem::replace(&mut facts.allocatable, allocatable);
                before != allocatable
            });
        }
    });
    receiver
}
