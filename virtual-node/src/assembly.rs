//! One virtual node: its parts, started, wired and stopped.
//!
//! Everything here is one node's and one tenant's: clients, watches, drivers, links to
//! hosts, mesh. What a process shares is around it: the runtime, the metrics' server,
//! the cell's client. Called by [`process`](crate::process) for the one node of a file
//! and by `fleet` for each `VirtualNode` that it holds.
//!
//! Stopping stops nothing that runs: pods are the hosts', the Node stays, and
//! the next assembly reads it all again.

use std::{net::IpAddr, sync::Arc};

use anyhow::anyhow;
use bounds::Bounds;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use pool_agent_api::{Epoch, HostName, TenantId, tenant::MeshControl};
use prometheus_client::registry::Registry;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::{
    config,
    event::Recorder,
    incoming::Incoming,
    kubelet::{Certificate, ClientAuthority, Kubelet},
    mesh,
    node::{self, Offer, Registration},
    placement::{Cell, Placer},
    pod::{self, Directory, Supervisor, budget::Budgets, driver::Tools, translate::NodeFacts},
    pool::{self, HostTable, Membership, Named, Pool, Rights},
    pool_tls::PoolTls,
};

/// What one node is made of.
pub(crate) struct Setup {
    pub(crate) node_name: String,
    pub(crate) tenant: TenantId,
    /// Higher than that of every earlier holder of the node: hosts take grants of no
    /// other.
    pub(crate) epoch: Epoch,
    /// The Node's InternalIP.
    pub(crate) address: IpAddr,
    pub(crate) node: config::Node,
    /// Of the tenant's API server.
    pub(crate) client: Client,
    pub(crate) cluster: config::Cluster,
    pub(crate) kubelet: KubeletSetup,
    pub(crate) mesh: MeshSetup,
    pub(crate) pool_tls: Arc<PoolTls>,
    pub(crate) hosts: Hosts,
}

pub(crate) struct KubeletSetup {
    /// What the Node says: connections may come in by way of somebody else's.
    pub(crate) port: u16,
    pub(crate) incoming: Incoming,
    pub(crate) clients: ClientAuthority,
    pub(crate) certificate: Certificate,
}

pub(crate) struct MeshSetup {
    /// What hosts are told of it.
    pub(crate) control: MeshControl,
    pub(crate) incoming: Incoming,
    pub(crate) authority: mesh::ca::Authority,
}

/// Where the hosts come from.
pub(crate) enum Hosts {
    Listed(Vec<config::PoolHost>),
    Claimed {
        /// Of the cell.
        client: Client,
        settings: config::Claims,
    },
}

/// A node that runs. Dropped, it ends at once.
pub(crate) struct Assembly {
    node: watch::Receiver<Option<Arc<Node>>>,
    parts: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Assembly {
    /// Starts it, until `shutdown`. Its metrics go into `registry`.
    pub(crate) fn start(setup: Setup, registry: &mut Registry, shutdown: &CancellationToken) -> Self {
        let client = setup.client;
        let pod_metrics = pod::metrics::Metrics::new(registry);
        let mut parts = Parts::default();

        let membership = Membership {
            tenant: setup.tenant.clone(),
            node_name: setup.node_name.clone(),
            cluster: setup.cluster.clone(),
            mesh: setup.mesh.control.clone(),
            rights: Rights::new(setup.epoch),
        };
        let pool_tls = setup.pool_tls;
        let connect = {
            let pool_tls = pool_tls.clone();
            move |host: &HostName, address| pool::channel(host, address, pool_tls.clone())
        };
        let (named, names) = watch::channel(match &setup.hosts {
            Hosts::Listed(hosts) => Named::listed(hosts),
            Hosts::Claimed { .. } => Named::default(),
        });
        let (pool, reports, hosts) = Pool::start(names, connect, membership);
        let (placer, placements, offer) = match setup.hosts {
            Hosts::Listed(_) => {
                let (placer, placements) = Placer::start(hosts.clone(), setup.node.quota);
                (placer, placements, Offer::Hosts)
            }
            Hosts::Claimed {
                client: cell,
                settings,
            } => {
                let (quota, offered) = watch::channel(None);
                let cell = Cell {
                    client: cell,
                    tenants_client: client.clone(),
                    settings,
                    tenant: setup.tenant.clone(),
                    node_name: setup.node_name.clone(),
                    named,
                    quota,
                };
                let (placer, placements) = Placer::claim_in(cell, hosts.clone());
                (placer, placements, Offer::Quota(offered))
            }
        };

        let MeshSetup {
            control,
            incoming,
            authority,
        } = setup.mesh;
        let mesh_config = mesh::Config {
            node_name: setup.node_name.clone(),
            cluster: mesh::Cluster {
                id: control.cluster_id,
                network: control.network,
                trust_domain: control.trust_domain,
                domain: setup.cluster.domain.clone(),
            },
        };
        let control = mesh::Control::new(mesh_config, authority, incoming, registry).serve(
            client.clone(),
            pool_tls,
            placements,
            shutdown.clone(),
        );
        parts.add("the mesh control plane", async move { Ok(control.await?) });
        let recorder = Recorder::start(client.clone(), setup.node_name.clone());

        let identity = node::Identity {
            name: setup.node_name.clone(),
            tenant: setup.tenant,
            address: setup.address,
            kubelet_port: setup.kubelet.port,
            settings: setup.node,
        };
        let (registration, node) = Registration::new(
            client.clone(),
            identity.clone(),
            hosts.clone(),
            offer.clone(),
            recorder.clone(),
        );
        parts.add("the node's registration", {
            let registration = registration.run(shutdown.clone());
            async move {
                registration.await;
                Ok(())
            }
        });

        let tools = Arc::new(Tools {
            client: client.clone(),
            pool: pool.clone(),
            placer,
            recorder,
            facts: facts(&setup.cluster, identity, hosts, offer),
            node: node.clone(),
            metrics: pod_metrics,
            budgets: Budgets::default(),
        });
        let (directory, queries) = Directory::new();
        let pods = pod::watch_pods(client.clone(), &setup.node_name);
        let supervisor = Supervisor::new(tools).run(pods, reports, queries, shutdown.clone());
        parts.add("the pods' supervisor", async move {
            supervisor.await;
            Ok(())
        });

        let kubelet = Kubelet {
            incoming: setup.kubelet.incoming,
            clients: setup.kubelet.clients,
            certificate: setup.kubelet.certificate,
            node_name: setup.node_name,
            address: setup.address,
            client,
            directory,
            pool,
            shown: Bounds::register(registry.sub_registry_with_prefix("virtual_node_kubelet")),
        };
        let kubelet = kubelet.serve(shutdown.clone());
        parts.add("the kubelet API", async move { Ok(kubelet.await?) });
        Self { node, parts: parts.0 }
    }

    /// The Node as last seen or written.
    pub(crate) fn node(&self) -> watch::Receiver<Option<Arc<Node>>> {
        self.node.clone()
    }

    /// Waits until all has ended. A part that ends before `shutdown` ends the others,
    /// and is the error.
    pub(crate) async fn ended(mut self, shutdown: &CancellationToken) -> anyhow::Result<()> {
        let mut ended = Ok(());
        while let Some(part) = self.parts.join_next().await {
            let early = !shutdown.is_cancelled();
            let broke = match part {
                Ok((_, Ok(()))) if !early => continue,
                Ok((name, Ok(()))) => anyhow!("{name} has ended"),
                Ok((name, Err(error))) => error.context(format!("{name} failed")),
                Err(panic) => anyhow::Error::from(panic).context("a part of the node broke"),
            };
            // The first is the cause of the others.
            ended = ended.and(Err(broke));
            shutdown.cancel();
        }
        ended
    }
}

#[derive(Default)]
struct Parts(JoinSet<(&'static str, anyhow::Result<()>)>);

impl Parts {
    fn add(&mut self, name: &'static str, part: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let part = async move { (name, part.await) };
        self.0.spawn(part.instrument(Span::current()));
    }
}

/// What pods are told of the node; follows the hosts.
fn facts(
    cluster: &config::Cluster,
    identity: node::Identity,
    mut hosts: watch::Receiver<HostTable>,
    mut offer: Offer,
) -> watch::Receiver<NodeFacts> {
    let facts = |identity: &node::Identity, hosts: &HostTable| NodeFacts {
        tenant: identity.tenant.clone(),
        node_name: identity.name.clone(),
        cluster_domain: cluster.domain.clone(),
        dns_address: cluster.dns_address,
        upstream_nameservers: cluster.upstream_nameservers.clone(),
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
