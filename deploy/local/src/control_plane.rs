//! A Kubernetes control plane for the lab: etcd, API server, controller manager
//! and scheduler, a process each from the one `devcluster` binary, in the `lab`
//! namespace. Nothing of it is special to Spindrift; these are the flags an
//! operator would set. A lab has one for the tenant, and may have another beside
//! it for the pool itself, its cell.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};

use crate::{
    component::{Component, Ready},
    file::{self, Mode},
    instance::Layout,
    netns::Namespace,
    pki::{Authority, Credential, PkiError, Subject, signing_key},
    topology::{API_SERVER, API_SERVER_PORT, CELL, CELL_SERVICE_RANGE, KUBERNETES_SERVICE, SERVICE_RANGE},
};

/// Whose control plane. They stand side by side in one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The cluster that the pods are of.
    Tenant,
    /// The pool, whose hosts and claims it holds.
    Cell,
}

impl Owner {
    /// The component's name in the lab.
    pub fn component(self, program: &str) -> String {
        match self {
            Self::Tenant => program.to_owned(),
            Self::Cell => format!("cell-{program}"),
        }
    }

    pub fn address(self) -> Ipv4Addr {
        match self {
            Self::Tenant => API_SERVER,
            Self::Cell => CELL,
        }
    }

    fn service_range(self) -> &'static str {
        match self {
            Self::Tenant => SERVICE_RANGE,
            Self::Cell => CELL_SERVICE_RANGE,
        }
    }

    /// Its credentials' directory.
    fn directory(self) -> &'static str {
        match self {
            Self::Tenant => "cluster",
            Self::Cell => "cell",
        }
    }

    /// On loopback, as is what serves the health and metrics of a program that
    /// listens there by default at `port`.
    fn port(self, port: u16) -> u16 {
        match self {
            Self::Tenant => port,
            Self::Cell => port + 10_000,
        }
    }
}

pub struct ControlPlane {
    owner: Owner,
    pub etcd: Component,
    pub api_server: Component,
    /// Both need a serving API server.
    pub controllers: [Component; 2],
    /// Of the cluster's authority.
    pub authority: Authority,
    /// `system:masters`.
    pub admin: Credential,
}

#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

const LOOPBACK: [u8; 4] = [127, 0, 0, 1];
/// As by default: etcd for clients and for its peers, the two controllers.
const ETCD: u16 = 2379;
const ETCD_PEER: u16 = 2380;
const CONTROLLER_MANAGER: u16 = 10257;
const SCHEDULER: u16 = 10259;

impl ControlPlane {
    /// Issues what is missing of its credentials and tells what to run.
    pub fn new(
        owner: Owner,
        layout: &Layout,
        lab: &Namespace,
        devcluster: &Path,
    ) -> Result<Self, ControlPlaneError> {
        let directory = layout.pki().join(owner.directory());
        let authority = Authority::open(directory.clone(), "kubernetes")?;
        let issue = |name: &str, organization: Option<&str>| {
            let subject = Subject {
                common_name: name.to_owned(),
                organization: organization.map(str::to_owned),
                ..Subject::default()
            };
            authority.credential(name, &subject)
        };
        let admin = issue("kubernetes-admin", Some("system:masters"))?;
        let serving = authority.credential("kube-apiserver", &Self::serving(owner))?;
        let (token_key, token_public) = signing_key(&directory, "service-account")?;
        let ca = authority.certificate();

        let run = |name: &str| {
            Component::new(owner.component(name), devcluster)
                .arg(name)
                .within(lab)
        };
        let [etcd_client, etcd_peer] =
            [ETCD, ETCD_PEER].map(|port| format!("http://127.0.0.1:{}", owner.port(port)));
        let etcd = run("etcd")
            .path_flag("data-dir", layout.data().join(owner.component("etcd")))
            .flag("listen-client-url", &etcd_client)
            .flag("listen-peer-url", etcd_peer)
            // A lab that loses power is made anew.
            .arg("--unsafe-no-fsync")
            .ready_when(Ready::Accepts((LOOPBACK, owner.port(ETCD)).into()));
        let api_server = run("kube-apiserver")
            .flag("etcd-servers", etcd_client)
            // Also the endpoint of the `kubernetes` Service, which pods dial.
            .flag("advertise-address", owner.address())
            .flag("bind-address", owner.address())
            .flag("secure-port", API_SERVER_PORT)
            .path_flag("tls-cert-file", &serving.certificate)
            .path_flag("tls-private-key-file", &serving.key)
            .path_flag("client-ca-file", &ca)
            .flag(
                "service-account-issuer",
                "https://kubernetes.default.svc.cluster.local",
            )
            .path_flag("service-account-key-file", token_public)
            .path_flag("service-account-signing-key-file", &token_key)
            .flag("service-cluster-ip-range", owner.service_range())
            .flag("authorization-mode", "Node,RBAC")
            .flag("enable-admission-plugins", "NodeRestriction")
            .ready_when(Ready::Accepts((owner.address(), API_SERVER_PORT).into()));
        let api_server = match owner {
            Owner::Tenant => {
                let kubelet_client = issue("kube-apiserver-kubelet-client", Some("system:masters"))?;
                api_server
                    .path_flag("kubelet-certificate-authority", &ca)
                    .path_flag("kubelet-client-certificate", &kubelet_client.certificate)
                    .path_flag("kubelet-client-key", &kubelet_client.key)
                    // Names of nodes do not resolve here.
                    .flag("kubelet-preferred-address-types", "InternalIP,Hostname")
                    .arg("--allow-privileged")
            }
            // Nobody asks a host by way of the cell. Hosts join with a token.
            Owner::Cell => api_server.arg("--enable-bootstrap-token-auth"),
        };

        let endpoint = Self::inside(owner, &authority)?;
        let controller = |name: &str, port: u16| -> Result<Component, ControlPlaneError> {
            let credential = issue(&format!("system:{name}"), None)?;
            let kubeconfig = directory.join(format!("{name}.kubeconfig"));
            write_kubeconfig(&kubeconfig, &endpoint, &credential)?;
            Ok(run(name)
                .path_flag("kubeconfig", &kubeconfig)
                .path_flag("authentication-kubeconfig", &kubeconfig)
                .path_flag("authorization-kubeconfig", &kubeconfig)
                .flag("bind-address", "127.0.0.1")
                .flag("secure-port", owner.port(port))
                // There is one of it.
                .flag("leader-elect", false))
        };
        let manager = controller("kube-controller-manager", CONTROLLER_MANAGER)?
            .arg("--use-service-account-credentials")
            .path_flag("service-account-private-key-file", token_key)
            .path_flag("root-ca-file", &ca)
            .path_flag("cluster-signing-cert-file", &ca)
            .path_flag("cluster-signing-key-file", authority.key());
        let manager = match owner {
            Owner::Tenant => manager,
            // Off unless it is named: it removes bootstrap tokens that have ended.
            Owner::Cell => manager.flag("controllers", "*,token-cleaner-controller"),
        };
        let scheduler = controller("kube-scheduler", SCHEDULER)?;
        Ok(Self {
            owner,
            etcd,
            api_server,
            controllers: [manager, scheduler],
            authority,
            admin,
        })
    }

    /// How it is reached from the lab's namespaces.
    pub fn endpoint(&self) -> Result<Endpoint, ControlPlaneError> {
        Self::inside(self.owner, &self.authority)
    }

    fn inside(owner: Owner, authority: &Authority) -> Result<Endpoint, ControlPlaneError> {
        Ok(Endpoint {
            url: format!("https://{}:{API_SERVER_PORT}", owner.address()),
            authority: Some(authority.pem()?),
            server_name: None,
        })
    }

    fn serving(owner: Owner) -> Subject {
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        Subject {
            common_name: "kube-apiserver".into(),
            dns_names: names
                .iter()
                .chain(&["localhost"])
                .map(|name| (*name).to_owned())
                .collect(),
            // The last is where the relay listens for the user's kubectl.
            addresses: vec![
                owner.address().into(),
                KUBERNETES_SERVICE.into(),
                [127, 0, 0, 1].into(),
            ],
            ..Subject::default()
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    #[error("cannot make the cluster's credentials")]
    Pki(#[from] PkiError),
    #[error("cannot write a kubeconfig")]
    Kubeconfig(#[from] KubeconfigError),
}

/// How an API server is reached.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub url: String,
    /// PEM; `None`: the public authorities.
    pub authority: Option<String>,
    /// What its certificate says where that is not the URL's host.
    pub server_name: Option<String>,
}

/// Writes a kubeconfig that holds its certificates, so that it can be copied.
pub fn write_kubeconfig(
    path: &Path,
    endpoint: &Endpoint,
    credential: &Credential,
) -> Result<(), KubeconfigError> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map(|content| BASE64_STANDARD.encode(content))
            .map_err(|source| KubeconfigError::File {
                path: path.to_owned(),
                source,
            })
    };
    let user = format!(
        "    client-certificate-data: {}\n    client-key-data: {}\n",
        read(&credential.certificate)?,
        read(&credential.key)?
    );
    write_kubeconfig_of(path, endpoint, &user)
}

/// Writes a kubeconfig with a bearer token.
pub fn write_token_kubeconfig(path: &Path, endpoint: &Endpoint, token: &str) -> Result<(), KubeconfigError> {
    write_kubeconfig_of(path, endpoint, &format!("    token: {token}\n"))
}

/// `user`: the lines below the user's entry.
fn write_kubeconfig_of(path: &Path, endpoint: &Endpoint, user: &str) -> Result<(), KubeconfigError> {
    let mut cluster = format!("    server: {}\n", endpoint.url);
    if let Some(authority) = &endpoint.authority {
        cluster += &format!(
            "    certificate-authority-data: {}\n",
            BASE64_STANDARD.encode(authority)
        );
    }
    if let Some(name) = &endpoint.server_name {
        cluster += &format!("    tls-server-name: {name}\n");
    }
    let text = format!(
        "apiVersion: v1
kind: Config
clusters:
- name: spindrift
  cluster:
{cluster}users:
- name: spindrift
  user:
{user}contexts:
- name: spindrift
  context:
    cluster: spindrift
    user: spindrift
current-context: spindrift
"
    );
    file::write(path, text, Mode::Private).map_err(|source| KubeconfigError::File {
        path: path.to_owned(),
        source,
    })
}
