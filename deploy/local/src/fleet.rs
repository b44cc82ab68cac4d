//! The replicas that serve the virtual nodes of the cell, and what a tenant needs
//! before one of them can be its node's: as the pool's operator would do it.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api,
    api::{Patch, PatchParams},
};

use crate::{
    artifacts::{ArtifactError, Spindrift},
    cell::{Cell, CellError, Quota},
    cluster::{Cluster, ClusterError, SigningRequest},
    component::{Component, Ready},
    control_plane::{Endpoint, KubeconfigError, write_kubeconfig},
    instance::Layout,
    node::RBAC,
    pki::{Credential, PkiError, Subject},
    pool::{PoolPki, TRUST_DOMAIN},
    topology::{Topology, VIRTUAL_NODE},
};

/// The user of the replicas in the cell.
const USER: &str = "virtual-nodes";
pub const REPLICAS: [&str; 2] = ["virtual-nodes-a", "virtual-nodes-b"];
/// Keys of the Secrets as the resource's schema names them.
pub const KUBECONFIG_SECRET: &str = "kubeconfig";
pub const POOL_SECRET: &str = "pool";

#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("cannot make a tenant's credentials")]
    Pki(#[from] PkiError),
    #[error("cannot write a tenant's kubeconfig")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("cannot read {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the cell does not take Secret {name}")]
    Secret {
        name: &'static str,
        #[source]
        source: kube::Error,
    },
}

/// What to run: two, at one address, as behind one Service.
pub async fn replicas(
    topology: &Topology,
    cell: &Cell,
    programs: &Spindrift,
) -> Result<Vec<Component>, FleetError> {
    let kubeconfig = cell.kubeconfig(USER).await?;
    let program = programs.program("virtual-node")?;
    let replica = |(name, own): (&str, u16)| {
        let peer = SocketAddr::from((VIRTUAL_NODE, 7100 + own));
        let metrics = SocketAddr::from(([127, 0, 0, 1], 9470 + own));
        Component::new(name, &program)
            .within(&topology.lab)
            .arg("serve")
            .path_flag("cell-kubeconfig", &kubeconfig)
            .flag("replica", name)
            .flag("pool-trust-domain", TRUST_DOMAIN)
            .flag("address", VIRTUAL_NODE)
            .flag("listen", VIRTUAL_NODE)
            .arg("--shared")
            .flag("peer", peer)
            .flag("metrics-listen", metrics)
            .input(kubeconfig.clone())
            .ready_when(Ready::Accepts(peer))
    };
    Ok(REPLICAS.into_iter().zip(1..).map(replica).collect())
}

/// Lets a tenant in whose cluster is `cluster`: its namespace in the cell, and there the
/// Secrets that a VirtualNode of the node `node` names.
pub async fn enroll(
    layout: &Layout,
    cell: &Cell,
    cluster: &Cluster,
    endpoint: &Endpoint,
    tenant: &str,
    node: &str,
    quota: &Quota,
) -> Result<(), FleetError> {
    cell.admit_tenant(tenant, quota).await?;
    cluster.apply("rbac.yaml", RBAC, &[("NODE", node)]).await?;
    let directory = layout.state().join("tenants").join(tenant);
    std::fs::create_dir_all(&directory).map_err(|source| FleetError::File {
        path: directory.clone(),
        source,
    })?;
    let request = SigningRequest {
        name: &format!("{node}-client"),
        signer: "kubernetes.io/kube-apiserver-client-kubelet",
        usage: "client auth",
        subject: Subject {
            common_name: format!("system:node:{node}"),
            organization: Some("system:nodes".into()),
            ..Subject::default()
        },
    };
    let files = Credential {
        certificate: directory.join(format!("{node}.crt")),
        key: directory.join(format!("{node}.key")),
    };
    let client = cluster.sign(cluster, &request, files).await?;
    let kubeconfig = directory.join(format!("{node}.kubeconfig"));
    write_kubeconfig(&kubeconfig, endpoint, &client)?;
    let pool = PoolPki::open(layout)?.virtual_node(tenant)?;
    let namespace = Cell::namespace(tenant);
    let read = |path: PathBuf| {
        std::fs::read(&path)
            .map(ByteString)
            .map_err(|source| FleetError::File { path, source })
    };
    let authority = ByteString(cluster.client_authority().await?.into_bytes());
    let secrets = [
        (
            KUBECONFIG_SECRET,
            [
                ("kubeconfig".to_owned(), read(kubeconfig)?),
                ("kubelet-client-ca.crt".to_owned(), authority),
            ]
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
        ),
        (
            POOL_SECRET,
            [
                ("tls.crt".to_owned(), read(pool.certificate)?),
                ("tls.key".to_owned(), read(pool.key)?),
                ("ca.crt".to_owned(), read(pool.ca)?),
            ]
            .into_iter()
            .collect(),
        ),
    ];
    let api: Api<Secret> = Api::namespaced(cell.cluster().client(), &namespace);
    for (name, data) in secrets {
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            data: Some(data),
            ..Secret::default()
        };
        let params = PatchParams::apply("spindrift-local").force();
        api.patch(name, &params, &Patch::Apply(&secret))
            .await
            .map_err(|source| FleetError::Secret { name, source })?;
    }
    Ok(())
}
