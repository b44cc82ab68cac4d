//! What a lab asks of a Kubernetes API server as its administrator: applying
//! manifests, and the two certificates a node needs, requested and approved as
//! an operator would. It is the same for a cluster made here and one the user
//! brought.

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
        core::v1::{Node, ServiceAccount},
    },
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::GroupVersionKind,
};
use serde_json::json;

use crate::{
    file::{self, Mode},
    pki::{Credential, PkiError, Subject},
};

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot use the kubeconfig {}", .path.display())]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: kube::config::KubeconfigError,
    },
    #[error("cannot make a client")]
    Client(#[source] kube::Error),
    #[error("the API server refused to {action}")]
    Request {
        action: String,
        #[source]
        source: kube::Error,
    },
    #[error("{what} did not happen within {} s; last seen: {seen}", .limit.as_secs())]
    TimedOut {
        what: String,
        limit: Duration,
        seen: String,
    },
    #[error("manifest {name} is not understood")]
    Manifest {
        name: String,
        #[source]
        source: Box<serde_saphyr::Error>,
    },
    #[error("manifest {name} holds an object without apiVersion, kind or name")]
    Nameless { name: String },
    #[error("cannot make the node's request for a certificate")]
    Pki(#[from] PkiError),
    #[error("the request {name} for the node's certificate was refused: {reason}")]
    Refused { name: String, reason: String },
    #[error("cannot write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

const MANAGER: &str = "spindrift-local";
const POLL: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

impl Cluster {
    pub async fn connect(kubeconfig: &Path) -> Result<Self, ClusterError> {
        let wrong = |source| ClusterError::Kubeconfig {
            path: kubeconfig.to_owned(),
            source,
        };
        let read = Kubeconfig::read_from(kubeconfig).map_err(wrong)?;
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .map_err(wrong)?;
        Ok(Self {
            client: Client::try_from(config).map_err(ClusterError::Client)?,
        })
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Waits until it serves and gives out service accounts, without which no
    /// pod is admitted.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), ClusterError> {
        wait("the API server's readiness", limit, async || {
            let request = http_get("/readyz").map_err(|e| e.to_string())?;
            self.client
                .request_text(request)
                .await
                .map(drop)
                .map_err(|e| e.to_string())
        })
        .await
    }

    /// The controller manager makes it, so this also waits for that.
    pub async fn wait_service_account(&self, namespace: &str, limit: Duration) -> Result<(), ClusterError> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        wait(
            &format!("the default service account of {namespace}"),
            limit,
            async || accounts.get("default").await.map(drop).map_err(|e| e.to_string()),
        )
        .await
    }

    /// Applies every object of a YAML text by server-side apply, with each
    /// `$(NAME)` replaced by its value.
    pub async fn apply(&self, name: &str, yaml: &str, values: &[(&str, &str)]) -> Result<(), ClusterError> {
        let mut yaml = yaml.to_owned();
        for (key, value) in values {
            yaml = yaml.replace(&format!("$({key})"), value);
        }
        let objects: Vec<DynamicObject> =
            serde_saphyr::from_multiple(&yaml).map_err(|source| ClusterError::Manifest {
                name: name.to_owned(),
                source: Box::new(source),
            })?;
        for object in objects {
            let nameless = || ClusterError::Nameless {
                name: name.to_owned(),
            };
            let types = object.types.clone().ok_or_else(nameless)?;
            let kind = GroupVersionKind::try_from(&types).map_err(|_| nameless())?;
            let resource = ApiResource::from_gvk(&kind);
            let api: Api<DynamicObject> = match object.namespace() {
                Some(namespace) => Api::namespaced_with(self.client(), &namespace, &resource),
                None => Api::all_with(self.client(), &resource),
            };
            let own = object.metadata.name.clone().ok_or_else(nameless)?;
            let patched = api
                .patch(&own, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object))
                .await;
            patched.map_err(|source| ClusterError::Request {
                action: format!("apply {} {own}", types.kind),
                source,
            })?;
        }
        Ok(())
    }

    /// A client certificate for the node, by a signing request that is approved
    /// at once; then the user in it is `system:node:NODE` of `system:nodes`,
    /// whom the node authorizer lets see only what concerns its pods. Kept in
    /// `directory`, and used again while it is there.
    pub async fn node_credential(&self, node: &str, directory: &Path) -> Result<Credential, ClusterError> {
        let files = Credential {
            certificate: directory.join("node.crt"),
            key: directory.join("node.key"),
        };
        if files.certificate.exists() {
            return Ok(files);
        }
        let user = node_user(node);
        let subject = Subject {
            common_name: user.clone(),
            organization: Some("system:nodes".into()),
            ..Subject::default()
        };
        let (request, key) = subject.request()?;
        let name = format!("{node}-client");
        let requests: Api<CertificateSigningRequest> = Api::all(self.client());
        let refused = |action: &str| {
            let action = format!("{action} the certificate request {name}");
            move |source| ClusterError::Request { action, source }
        };
        // One of an earlier run was for a key that is lost.
        match requests.delete(&name, &Default::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(source) => return Err(refused("delete")(source)),
        }
        let request = CertificateSigningRequest {
            metadata: kube::core::ObjectMeta {
                name: Some(name.clone()),
                ..Default::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.into_bytes()),
                signer_name: "kubernetes.io/kube-apiserver-client-kubelet".into(),
                usages: Some(vec!["digital signature".into(), "client auth".into()]),
                ..Default::default()
            },
            status: None,
        };
        requests
            .create(&PostParams::default(), &request)
            .await
            .map_err(refused("create"))?;
        self.approve(&name).await?;
        let certificate = self.certificate(&requests, &name).await?;
        let write = |path: &Path, content: &[u8]| {
            file::write(path, content, Mode::Private).map_err(|source| ClusterError::File {
                path: path.to_owned(),
                source,
            })
        };
        std::fs::create_dir_all(directory).map_err(|source| ClusterError::File {
            path: directory.to_owned(),
            source,
        })?;
        write(&files.key, key.as_bytes())?;
        write(&files.certificate, &certificate)?;
        Ok(files)
    }

    async fn certificate(
        &self,
        requests: &Api<CertificateSigningRequest>,
        name: &str,
    ) -> Result<Vec<u8>, ClusterError> {
        let limit = Duration::from_secs(60);
        let since = Instant::now();
        loop {
            let request = requests.get(name).await.map_err(|source| ClusterError::Request {
                action: format!("get the certificate request {name}"),
                source,
            })?;
            let status = request.status.unwrap_or_default();
            if let Some(certificate) = status.certificate {
                return Ok(certificate.0);
            }
            let conditions = status.conditions.unwrap_or_default();
            if let Some(bad) = conditions.iter().find(|condition| condition.type_ != "Approved") {
                let reason = bad.message.clone().unwrap_or_default();
                return Err(ClusterError::Refused {
                    name: name.to_owned(),
                    reason,
                });
            }
            if since.elapsed() > limit {
                let what = format!("the signature of the certificate request {name}");
                return Err(ClusterError::TimedOut {
                    what,
                    limit,
                    seen: "approved, not signed".into(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Approves the node's own requests for the certificate its kubelet API
    /// serves with. Kubernetes leaves these to an operator.
    pub async fn approve_serving(&self, node: &str) -> Result<usize, ClusterError> {
        let requests: Api<CertificateSigningRequest> = Api::all(self.client());
        let selected = ListParams::default().fields("spec.signerName=kubernetes.io/kubelet-serving");
        let listed = requests
            .list(&selected)
            .await
            .map_err(|source| ClusterError::Request {
                action: "list certificate requests".into(),
                source,
            })?;
        let user = node_user(node);
        let mut approved = 0;
        for request in listed {
            let decided = request
                .status
                .as_ref()
                .and_then(|s| s.conditions.as_ref())
                .is_some_and(|c| !c.is_empty());
            if !decided && request.spec.username.as_deref() == Some(&user) {
                self.approve(&request.name_any()).await?;
                approved += 1;
            }
        }
        Ok(approved)
    }

    async fn approve(&self, name: &str) -> Result<(), ClusterError> {
        let requests: Api<CertificateSigningRequest> = Api::all(self.client());
        let approval = json!({"status": {"conditions": [{
            "type": "Approved", "status": "True", "reason": "SpindriftLocal",
            "message": "This is the lab's own virtual node.",
        }]}});
        requests
            .patch_subresource(
                "approval",
                name,
                &PatchParams::default(),
                &Patch::Merge(&approval),
            )
            .await
            .map(drop)
            .map_err(|source| ClusterError::Request {
                action: format!("approve the certificate request {name}"),
                source,
            })
    }

    /// Waits until the node is Ready, approving what it asks for meanwhile.
    pub async fn wait_node(&self, node: &str, limit: Duration) -> Result<(), ClusterError> {
        let nodes: Api<Node> = Api::all(self.client());
        wait(&format!("node {node} being Ready"), limit, async || {
            self.approve_serving(node).await.map_err(|e| e.to_string())?;
            let found = nodes
                .get_opt(node)
                .await
                .map_err(|e| e.to_string())?
                .ok_or("not registered")?;
            let conditions = found
                .status
                .and_then(|status| status.conditions)
                .unwrap_or_default();
            let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
            match ready {
                Some(ready) if ready.status == "True" => Ok(()),
                Some(ready) => Err(ready.message.clone().unwrap_or_default()),
                None => Err("registered, no Ready condition".into()),
            }
        })
        .await
    }
}

/// Asks again until there is an answer or the limit is reached.
pub async fn wait<T>(
    what: &str,
    limit: Duration,
    mut ask: impl AsyncFnMut() -> Result<T, String>,
) -> Result<T, ClusterError> {
    let since = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(seen) if since.elapsed() > limit => {
                return Err(ClusterError::TimedOut {
                    what: what.to_owned(),
                    limit,
                    seen,
                });
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

fn node_user(node: &str) -> String {
    format!("system:node:{node}")
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>, http::Error> {
    http::Request::get(path).body(Vec::new())
}
