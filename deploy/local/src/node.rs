//! The virtual node as a member of a cluster: its rights, its two certificates
//! and its configuration file.
//!
//! An operator who adds Spindrift to a cluster does the same: apply
//! `manifests/rbac.yaml`, approve a client certificate and a serving
//! certificate for `system:node:NAME`, write the file.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    artifacts::{ArtifactError, Spindrift},
    cell,
    cluster::{Cluster, ClusterError, SigningRequest},
    component::{Component, Ready},
    control_plane::{Endpoint, KubeconfigError, write_kubeconfig},
    file::{self, Mode},
    instance::Layout,
    pki::{Credential, PkiError, Subject},
    pool::{PoolPki, PoolTls, agent_address},
    topology::{API_SERVER, CLUSTER_DNS, POD_RANGE, Topology, VIRTUAL_NODE},
};

pub const COMPONENT: &str = "virtual-node";
pub const KUBELET_PORT: u16 = 10250;
const MESH_PORT: u16 = 15012;
/// On the lab namespace's loopback.
pub const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);
pub(crate) const RBAC: &str = include_str!("../manifests/rbac.yaml");

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot make the virtual node's credentials")]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("cannot write the virtual node's kubeconfig")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("cannot write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write the virtual node's configuration")]
    Config(#[from] toml::ser::Error),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
}

/// virtual-node's configuration file.
#[derive(Serialize)]
struct Config {
    node_name: String,
    tenant: String,
    kubeconfig: PathBuf,
    address: Ipv4Addr,
    kubelet_listen: SocketAddr,
    kubelet_client_ca: PathBuf,
    kubelet_certificate: PathBuf,
    kubelet_key: PathBuf,
    metrics_listen: SocketAddr,
    cluster_domain: String,
    dns_address: Ipv4Addr,
    upstream_nameservers: Vec<Ipv4Addr>,
    cluster_pod_range: String,
    node: Settings,
    mesh: Mesh,
    pool: Pool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cell: Option<Claims>,
}

/// Where it claims room for its pods.
#[derive(Serialize)]
struct Claims {
    kubeconfig: PathBuf,
    priority_class: &'static str,
}

/// What the node offers: less than its hosts have.
#[derive(Serialize)]
struct Settings {
    /// None: the cell says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<Quota>,
}

#[derive(Serialize)]
struct Quota {
    cpu: &'static str,
    memory: &'static str,
    ephemeral_storage: &'static str,
    pods: u32,
}

#[derive(Serialize)]
struct Mesh {
    listen: SocketAddr,
    advertise: SocketAddr,
    trust_domain: String,
    cluster_id: String,
    network: String,
    ca_dir: PathBuf,
}

#[derive(Serialize)]
struct Pool {
    #[serde(flatten)]
    tls: PoolTls,
    hosts: Vec<PoolHost>,
}

#[derive(Serialize)]
struct PoolHost {
    name: String,
    address: SocketAddr,
}

/// Gives the node its rights and certificates and tells what to run.
///
/// `cluster` is used as its administrator; `endpoint` is how the API server is
/// reached from where the virtual node runs; `address` is what the Node says,
/// where the API server will dial it. `cell`: the kubeconfig with which it claims
/// hosts; without one they are listed.
pub async fn join(
    layout: &Layout,
    topology: &Topology,
    cluster: &Cluster,
    endpoint: &Endpoint,
    address: Ipv4Addr,
    programs: &Spindrift,
    cell: Option<&Path>,
) -> Result<Component, NodeError> {
    let node = layout.node_name();
    let directory = layout.state().join(COMPONENT);
    let ca_dir = directory.join("mesh-ca");
    std::fs::create_dir_all(&ca_dir).map_err(|source| NodeError::File {
        path: ca_dir.clone(),
        source,
    })?;
    cluster.apply("rbac.yaml", RBAC, &[("NODE", &node)]).await?;

    // The user in it is one whom the node authorizer knows.
    let subject = Subject {
        common_name: format!("system:node:{node}"),
        organization: Some("system:nodes".into()),
        ..Subject::default()
    };
    let files = |name: &str| Credential {
        certificate: directory.join(format!("{name}.crt")),
        key: directory.join(format!("{name}.key")),
    };
    let client = SigningRequest {
        name: &format!("{node}-client"),
        signer: "kubernetes.io/kube-apiserver-client-kubelet",
        usage: "client auth",
        subject: subject.clone(),
    };
    let client = cluster.sign(cluster, &client, files("client")).await?;
    // The node asks for this one itself; Kubernetes signs it for nobody else,
    // and leaves its approval to an operator.
    let serving = SigningRequest {
        name: &format!("{node}-serving"),
        signer: "kubernetes.io/kubelet-serving",
        usage: "server auth",
        subject: Subject {
            addresses: vec![address.into()],
            dns_names: vec![node.clone()],
            ..subject
        },
    };
    let serving = cluster
        .as_user(&client)?
        .sign(cluster, &serving, files("serving"))
        .await?;

    let write = |path: PathBuf, content: String| {
        file::write(&path, content, Mode::Public)
            .map_err(|source| NodeError::File {
                path: path.clone(),
                source,
            })
            .map(|()| path)
    };
    let kubelet_client_ca = write(
        directory.join("kubelet-client-ca.crt"),
        cluster.client_authority().await?,
    )?;
    let kubeconfig = directory.join("kubeconfig");
    write_kubeconfig(&kubeconfig, endpoint, &client)?;
    // One tenant, named like the instance.
    let tenant = layout.instance().as_str();
    let listed = topology.hosts.iter().filter(|_| cell.is_none());
    let hosts = listed.map(|host| PoolHost {
        name: host.name.clone(),
        address: agent_address(host),
    });
    let config = Config {
        node_name: node,
        tenant: tenant.into(),
        kubeconfig: kubeconfig.clone(),
        address,
        kubelet_listen: (VIRTUAL_NODE, KUBELET_PORT).into(),
        kubelet_client_ca,
        kubelet_certificate: serving.certificate,
        kubelet_key: serving.key,
        metrics_listen: METRICS,
        cluster_domain: "cluster.local".into(),
        dns_address: CLUSTER_DNS,
        // Nobody answers there: nothing of a lab talks to the world.
        upstream_nameservers: vec![API_SERVER],
        cluster_pod_range: POD_RANGE.into(),
        node: Settings {
            quota: cell.is_none().then_some(Quota {
                cpu: "3",
                memory: "16Gi",
                ephemeral_storage: "50Gi",
                pods: 220,
            }),
        },
        mesh: Mesh {
            listen: (VIRTUAL_NODE, MESH_PORT).into(),
            advertise: (VIRTUAL_NODE, MESH_PORT).into(),
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            network: String::new(),
            ca_dir,
        },
        pool: Pool {
            tls: PoolPki::open(layout)?.virtual_node(tenant)?,
            hosts: hosts.collect(),
        },
        cell: cell.map(|kubeconfig| Claims {
            kubeconfig: kubeconfig.to_owned(),
            priority_class: cell::TIER,
        }),
    };
    let path = write(directory.join("virtual-node.toml"), toml::to_string(&config)?)?;
    let component = Component::new(COMPONENT, programs.program("virtual-node")?);
    let component = match cell {
        Some(kubeconfig) => component.input(kubeconfig),
        None => component,
    };
    Ok(component
        .within(&topology.lab)
        .path_flag("config", &path)
        .input(path)
        .input(kubeconfig)
        .ready_when(Ready::Accepts(config.kubelet_listen)))
}

/// Takes back what [`join`] gave: for a cluster that goes on without the node.
/// What is not there is fine.
pub async fn leave(layout: &Layout, cluster: &Cluster) -> Result<(), ClusterError> {
    let node = layout.node_name();
    let delete = |kind: &'static str, name: String| async move { cluster.delete(kind, &name).await };
    delete("v1/Node", node.clone()).await?;
    delete(
        "rbac.authorization.k8s.io/v1/ClusterRoleBinding",
        format!("spindrift:virtual-node:{node}"),
    )
    .await?;
    for request in ["client", "serving"] {
        delete(
            "certificates.k8s.io/v1/CertificateSigningRequest",
            format!("{node}-{request}"),
        )
        .await?;
    }
    Ok(())
}
