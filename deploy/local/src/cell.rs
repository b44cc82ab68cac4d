//! The pool's own cluster, its cell, set up as its operator does: what is applied
//! once, what is applied for each tenant, and the token with which a host joins.
//! Its control plane is [`ControlPlane`](crate::control_plane::ControlPlane)'s;
//! the manifests are in `deploy/cell`.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use jiff::{SignedDuration, Timestamp};

use crate::{
    cluster::{Cluster, ClusterError, SigningRequest},
    control_plane::{Endpoint, KubeconfigError, write_kubeconfig, write_token_kubeconfig},
    file,
    instance::Layout,
    pki::{Credential, Subject},
};

const CELL: &str = include_str!("../../cell/cell.yaml");
const VIRTUAL_NODES: [(&str, &str); 2] = [
    ("virtualnodes.yaml", include_str!("../../cell/virtualnodes.yaml")),
    (
        "virtual-nodes.yaml",
        include_str!("../../cell/virtual-nodes.yaml"),
    ),
];
const TENANT: &str = include_str!("../../cell/tenant.yaml");
const HOST_TOKEN: &str = include_str!("../../cell/host-token.yaml");

/// The program that lets hosts in, and its user.
pub const CONTROLLER: &str = "cell-controller";

/// The PriorityClass of the lab's claims.
pub const TIER: &str = "spindrift-standard";

/// How long a host may take to join.
const TOKEN_LIFE: SignedDuration = SignedDuration::from_hours(1);

/// What a tenant may use of the pool, as Kubernetes' quantities.
#[derive(Clone, Debug)]
pub struct Quota {
    pub pods: &'static str,
    pub cpu: &'static str,
    pub memory: &'static str,
    pub ephemeral_storage: &'static str,
    /// With those of pods that are over.
    pub objects: &'static str,
}

/// More than a lab's tests ask for at once, and less than its hosts have.
pub const QUOTA: Quota = Quota {
    pods: "200",
    cpu: "64",
    memory: "64Gi",
    ephemeral_storage: "64Gi",
    objects: "1000",
};

#[derive(Debug, thiserror::Error)]
pub enum CellError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("cannot write a kubeconfig of the cell")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A cell that serves.
pub struct Cell {
    /// Asked as its administrator.
    cluster: Cluster,
    /// How it is reached from inside the lab.
    endpoint: Endpoint,
    directory: PathBuf,
}

impl Cell {
    /// Applies what the pool itself needs in it.
    pub async fn furnish(layout: &Layout, cluster: Cluster, endpoint: Endpoint) -> Result<Self, CellError> {
        let directory = layout.state().join("cell");
        std::fs::create_dir_all(&directory).map_err(|source| CellError::File {
            path: directory.clone(),
            source,
        })?;
        cluster.apply("cell.yaml", CELL, &[]).await?;
        for (name, manifest) in VIRTUAL_NODES {
            cluster.apply(name, manifest, &[]).await?;
        }
        Ok(Self {
            cluster,
            endpoint,
            directory,
        })
    }

    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A tenant's namespace in it.
    pub fn namespace(tenant: &str) -> String {
        format!("tenant-{tenant}")
    }

    /// Lets a tenant in, and gives its virtual node a kubeconfig.
    pub async fn admit_tenant(&self, tenant: &str, quota: &Quota) -> Result<PathBuf, CellError> {
        let values = [
            ("TENANT", tenant),
            ("PODS", quota.pods),
            ("CPU", quota.cpu),
            ("MEMORY", quota.memory),
            ("STORAGE", quota.ephemeral_storage),
            ("OBJECTS", quota.objects),
        ];
        self.cluster.apply("tenant.yaml", TENANT, &values).await?;
        self.kubeconfig(&format!("virtual-node:{tenant}")).await
    }

    /// The cell, asked as a user who has a [`kubeconfig`](Self::kubeconfig).
    pub fn user(&self, name: &str) -> Result<Cluster, CellError> {
        Ok(self.cluster.as_user(&self.credential(name))?)
    }

    fn credential(&self, name: &str) -> Credential {
        let file = name.replace(':', "-");
        Credential {
            certificate: self.directory.join(format!("{file}.crt")),
            key: self.directory.join(format!("{file}.key")),
        }
    }

    /// The kubeconfig of the user `spindrift:NAME`, whose certificate the cell
    /// signs. What the user may do is in the manifests.
    pub async fn kubeconfig(&self, name: &str) -> Result<PathBuf, CellError> {
        let file = name.replace(':', "-");
        let request = SigningRequest {
            name: &format!("spindrift-{file}"),
            signer: "kubernetes.io/kube-apiserver-client",
            usage: "client auth",
            subject: Subject {
                common_name: format!("spindrift:{name}"),
                ..Subject::default()
            },
        };
        let credential = self
            .cluster
            .sign(&self.cluster, &request, self.credential(name))
            .await?;
        let path = self.directory.join(format!("{file}.kubeconfig"));
        write_kubeconfig(&path, &self.endpoint, &credential)?;
        Ok(path)
    }

    /// A kubeconfig with which the host joins, once. One that was given stays as
    /// it is: the host has joined with it, or will.
    pub async fn bootstrap_kubeconfig(&self, host: &str) -> Result<PathBuf, CellError> {
        let path = self.directory.join(format!("{host}-bootstrap.kubeconfig"));
        if path.exists() {
            return Ok(path);
        }
        let (id, secret) = token().map_err(|source| CellError::File {
            path: RANDOM.into(),
            source,
        })?;
        let expires = (Timestamp::now() + TOKEN_LIFE).to_string();
        let values = [
            ("HOST", host),
            ("TOKEN_ID", &id),
            ("TOKEN_SECRET", &secret),
            ("EXPIRES", &expires),
        ];
        self.cluster.apply("host-token.yaml", HOST_TOKEN, &values).await?;
        write_token_kubeconfig(&path, &self.endpoint, &format!("{id}.{secret}"))?;
        Ok(path)
    }
}

const RANDOM: &str = "/dev/urandom";

/// Id and secret of a bootstrap token: six and sixteen of `0-9a-f`.
fn token() -> std::io::Result<(String, String)> {
    let mut bytes = [0; 11];
    std::fs::File::open(Path::new(RANDOM))?.read_exact(&mut bytes)?;
    let text = file::hex(&bytes);
    let (id, secret) = text.split_at(6);
    Ok((id.to_owned(), secret.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_kubernetes_shape_and_no_two_are_alike() {
        let (id, secret) = token().unwrap();
        assert_eq!((id.len(), secret.len()), (6, 16));
        assert_ne!(token().unwrap(), (id, secret));
    }
}
