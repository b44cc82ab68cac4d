//! What a lab asks of a Kubernetes API server as its administrator: applying
//! manifests, and the two certificates a node needs, requested and approved as
//! an operator would. It is the same for a cluster made here and one the user
//! brought.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
        core::v1::{ConfigMap, Namespace, Node, ServiceAccount},
    },
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    config::{AuthInfo, KubeConfigOptions, Kubeconfig},
    core::{GroupVersionKind, ObjectMeta},
};
use serde_json::json;

use crate::{
    control_plane::Endpoint,
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
    #[error("the kubeconfig's server {0:?} has no host")]
    Url(String),
    #[error(
        "the kubeconfig does not verify its API server; a node's credentials are not sent to just anybody"
    )]
    Unverified,
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
    #[error(
        "the API server publishes no authority for client certificates, which the node's API is to believe"
    )]
    NoClientAuthority,
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

/// The namespace of the demo, which leaving the cluster removes.
pub const DEMO: &str = "demo";
const MANAGER: &str = "spindrift-local";
const POLL: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub struct Cluster {
    client: Client,
    config: Config,
}

/// What a certificate is asked for with.
#[derive(Clone, Debug)]
pub struct SigningRequest<'a> {
    /// Of the request object.
    pub name: &'a str,
    /// Such as `kubernetes.io/kubelet-serving`.
    pub signer: &'a str,
    /// `client auth` or `server auth`.
    pub usage: &'a str,
    pub subject: Subject,
}

impl Cluster {
    pub async fn connect(kubeconfig: &Path) -> Result<Self, ClusterError> {
        let wrong = |source| ClusterError::Kubeconfig {
            path: kubeconfig.to_owned(),
            source,
        };
        let read = Kubeconfig::read_from(kubeconfig).map_err(wrong)?;
        Self::new(
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .map_err(wrong)?,
        )
    }

    fn new(config: Config) -> Result<Self, ClusterError> {
        let client = Client::try_from(config.clone()).map_err(ClusterError::Client)?;
        Ok(Self { client, config })
    }

    /// How its API server is reached, and how it proves itself.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `HOST:PORT` of its API server.
    pub fn authority(&self) -> Result<String, ClusterError> {
        let url = &self.config.cluster_url;
        let host = url.host().ok_or_else(|| ClusterError::Url(url.to_string()))?;
        let port = url.port_u16().unwrap_or(443);
        Ok(format!("{host}:{port}"))
    }

    /// The API server as a relay at the address makes it reachable: it still
    /// has to prove that it is the one the kubeconfig names.
    pub fn endpoint_by_way_of(&self, address: Ipv4Addr, port: u16) -> Result<Endpoint, ClusterError> {
        let config = &self.config;
        if config.accept_invalid_certs || config.cluster_url.scheme_str() != Some("https") {
            return Err(ClusterError::Unverified);
        }
        let host = config
            .cluster_url
            .host()
            .ok_or_else(|| ClusterError::Url(config.cluster_url.to_string()))?;
        let pem = |der: &Vec<u8>| {
            let text = BASE64_STANDARD.encode(der);
            let lines = text
                .as_bytes()
                .chunks(64)
                .map(String::from_utf8_lossy)
                .collect::<Vec<_>>()
                .join("\n");
            format!("-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n")
        };
        Ok(Endpoint {
            url: format!(
                "https://{address}:{port}{}",
                config.cluster_url.path().trim_end_matches('/')
            ),
            authority: config
                .root_cert
                .as_ref()
                .map(|chain| chain.iter().map(pem).collect()),
            server_name: Some(config.tls_server_name.clone().unwrap_or_else(|| host.to_owned())),
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

    /// Deletes an object that belongs to no namespace; `kind` is such as
    /// `v1/Node` or `GROUP/v1/Kind`. One that is not there is fine.
    pub async fn delete(&self, kind: &str, name: &str) -> Result<(), ClusterError> {
        let (version, kind) = kind.rsplit_once('/').unwrap_or(("v1", kind));
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let api: Api<DynamicObject> = Api::all_with(self.client(), &resource);
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => Err(ClusterError::Request {
                action: format!("delete {kind} {name}"),
                source,
            }),
        }
    }

    /// Deletes a namespace and waits until all that was in it is gone.
    pub async fn delete_namespace(&self, name: &str, limit: Duration) -> Result<(), ClusterError> {
        self.delete("v1/Namespace", name).await?;
        let namespaces: Api<Namespace> = Api::all(self.client());
        wait(
            &format!("the end of namespace {name}"),
            limit,
            async || match namespaces.get_opt(name).await.map_err(|e| e.to_string())? {
                None => Ok(()),
                Some(_) => Err("still terminating".to_owned()),
            },
        )
        .await
    }

    /// The same API server, asked as another user.
    pub fn as_user(&self, credential: &Credential) -> Result<Self, ClusterError> {
        let mut config = self.config.clone();
        let text = |path: &Path| Some(path.display().to_string());
        config.auth_info = AuthInfo {
            client_certificate: text(&credential.certificate),
            client_key: text(&credential.key),
            ..AuthInfo::default()
        };
        Self::new(config)
    }

    /// The authority of those whom the API server believes by certificate, as
    /// it publishes it for its extensions; PEM.
    pub async fn client_authority(&self) -> Result<String, ClusterError> {
        let published = "extension-apiserver-authentication";
        let maps: Api<ConfigMap> = Api::namespaced(self.client(), "kube-system");
        let map = maps
            .get(published)
            .await
            .map_err(|source| ClusterError::Request {
                action: format!("get the ConfigMap kube-system/{published}"),
                source,
            })?;
        let authority = map.data.and_then(|mut data| data.remove("client-ca-file"));
        authority.ok_or(ClusterError::NoClientAuthority)
    }

    /// A certificate that the cluster signs: requested as the user of this
    /// client, approved at once by `approver`. Kept in the files, and taken
    /// from there while they last.
    pub async fn sign(
        &self,
        approver: &Cluster,
        request: &SigningRequest<'_>,
        files: Credential,
    ) -> Result<Credential, ClusterError> {
        if files.certificate.exists() {
            return Ok(files);
        }
        let (pem, key) = request.subject.request()?;
        let name = request.name;
        let refused = |action: &str| {
            let action = format!("{action} the certificate request {name}");
            move |source| ClusterError::Request { action, source }
        };
        let approving: Api<CertificateSigningRequest> = Api::all(approver.client());
        // One of an earlier run was for a key that is lost.
        approver
            .delete("certificates.k8s.io/v1/CertificateSigningRequest", name)
            .await?;
        let object = CertificateSigningRequest {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem.into_bytes()),
                signer_name: request.signer.to_owned(),
                usages: Some(vec!["digital signature".into(), request.usage.to_owned()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let requests: Api<CertificateSigningRequest> = Api::all(self.client());
        requests
            .create(&PostParams::default(), &object)
            .await
            .map_err(refused("create"))?;
        approver.approve(name).await?;
        let certificate = approver.certificate(&approving, name).await?;
        let write = |path: &Path, content: &[u8]| {
            file::write(path, content, Mode::Private).map_err(|source| ClusterError::File {
                path: path.to_owned(),
                source,
            })
        };
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

    /// Waits until the node is Ready.
    pub async fn wait_node(&self, node: &str, limit: Duration) -> Result<(), ClusterError> {
        let nodes: Api<Node> = Api::all(self.client());
        wait(&format!("node {node} being Ready"), limit, async || {
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

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>, http::Error> {
    http::Request::get(path).body(Vec::new())
}
