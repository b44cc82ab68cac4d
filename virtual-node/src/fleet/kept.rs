//! What the replicas keep for a virtual node in Secrets of its tenant's namespace, so
//! that whoever has it next is the same to hosts and to the tenant's API server: the
//! mesh's certificate authority (`NAME-mesh-ca`) and the kubelet API's serving
//! certificate (`NAME-kubelet`). An operator may put either there beforehand. Both go
//! with the resource.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{Api, Client, Error, Resource, api::PostParams};
use rcgen::KeyPair;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    keeper::full,
    resource::{Key, VirtualNode},
    terms,
};
use crate::{
    api_server::answered,
    kubelet::request::{self, Requester},
    mesh::ca::{Authority, Material, OpenError},
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error("the cell does not give or take Secret {name}")]
    Api {
        name: String,
        #[source]
        source: Error,
    },
    #[error(transparent)]
    Authority(#[from] OpenError),
    #[error("{0}")]
    Content(#[from] pool_agent_api::Invalid),
}

/// The Secrets of one virtual node.
pub(crate) struct Kept {
    api: Api<Secret>,
    key: Key,
    owner: OwnerReference,
}

impl Kept {
    pub(crate) fn new(client: Client, key: &Key, node: &VirtualNode) -> Self {
        Self {
            api: Api::namespaced(client, &key.namespace),
            owner: OwnerReference {
                api_version: VirtualNode::api_version(&()).into_owned(),
                kind: VirtualNode::kind(&()).into_owned(),
                name: key.name.clone(),
                uid: node.uid().to_owned(),
                ..OwnerReference::default()
            },
            key: key.clone(),
        }
    }

    async fn get(&self, name: &str) -> Result<Option<Secret>, KeptError> {
        let refused = |source| KeptError::Api {
            name: name.to_owned(),
            source,
        };
        answered(self.api.get_opt(name)).await.map_err(refused)
    }

    /// False: somebody else has written it meanwhile.
    async fn put(
        &self,
        name: &str,
        found: Option<Secret>,
        data: BTreeMap<String, ByteString>,
    ) -> Result<bool, KeptError> {
        let params = PostParams::default();
        let written = match found {
            Some(mut secret) => {
                secret.metadata.managed_fields = None;
                secret.data.get_or_insert_default().extend(data);
                answered(self.api.replace(name, &params, &secret)).await
            }
            None => {
                let secret = Secret {
                    metadata: ObjectMeta {
                        name: Some(name.to_owned()),
                        owner_references: Some(vec![self.owner.clone()]),
                        ..ObjectMeta::default()
                    },
                    data: Some(data),
                    ..Secret::default()
                };
                answered(self.api.create(&params, &secret)).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(Error::Api(refused)) if refused.code == 409 => Ok(false),
            Err(source) => Err(KeptError::Api {
                name: name.to_owned(),
                source,
            }),
        }
    }

    /// The mesh's authority, made if there is none; its intermediate is renewed.
    pub(crate) async fn authority(&self) -> Result<Authority, KeptError> {
        let name = format!("{}-mesh-ca", self.key.name);
        let called = PathBuf::from(format!("Secret {name}"));
        // Once more where another replica was first.
        for _ in 0..3 {
            let found = self.get(&name).await?;
            let now = SystemTime::now();
            let (material, new) = match &found {
                None => (Material::begin(&called, now)?, true),
                Some(secret) => {
                    let material = material(&name, secret)?;
                    match material.renewed(&called, now)? {
                        Some(renewed) => (renewed, true),
                        None => (material, false),
                    }
                }
            };
            if new && !self.put(&name, found, data(&material)).await? {
                continue;
            }
            return Ok(Authority::of(&called, &material, now)?);
        }
        Err(
            pool_agent_api::Invalid::new(format!("Secret {name}"), "is written by others all the time")
                .into(),
        )
    }

    /// Keeps the kubelet API's certificate: what is in the Secret, or asked for.
    pub(crate) async fn serving(
        self,
        client: Client,
        node_name: String,
        address: IpAddr,
        told: watch::Sender<Option<Arc<CertifiedKey>>>,
    ) {
        let name = format!("{}-kubelet", self.key.name);
        let requester = Requester::new(client, &node_name, address);
        loop {
            let wait = match self.serve_once(&name, &requester, &told).await {
                Ok(wait) => wait,
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "no serving certificate for the kubelet API yet"
                    );
                    RETRY
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn serve_once(
        &self,
        name: &str,
        requester: &Requester,
        told: &watch::Sender<Option<Arc<CertifiedKey>>>,
    ) -> Result<Duration, KeptError> {
        let found = self.get(name).await?;
        if let Some(secret) = &found {
            let chain = terms::text(name, secret, "tls.crt")?;
            let key = KeyPair::from_pem(terms::text(name, secret, "tls.key")?)
                .map_err(|_| pool_agent_api::Invalid::new(format!("Secret {name}: tls.key"), "is no key"))?;
            let (pair, ends) = request::pair(chain.as_bytes(), &key)
                .map_err(|e| pool_agent_api::Invalid::new(format!("Secret {name}: tls.crt"), e))?;
            let left = Duration::try_from(ends.duration_since(Timestamp::now())).unwrap_or_default();
            if !left.is_zero() {
                told.send_replace(Some(Arc::new(pair)));
            }
            if left > RENEWED_BEFORE {
                return Ok(LOOK.min(left - RENEWED_BEFORE));
            }
        }
        let (chain, key) = requester
            .signed()
            .await
            .map_err(|e| pool_agent_api::Invalid::new(format!("Secret {name}"), full(&e)))?;
        let (pair, ends) = request::pair(&chain, &key)
            .map_err(|e| pool_agent_api::Invalid::new(format!("Secret {name}"), e))?;
        let data = [
            ("tls.crt".to_owned(), ByteString(chain)),
            ("tls.key".to_owned(), ByteString(key.serialize_pem().into_bytes())),
        ];
        if !self.put(name, found, data.into()).await? {
            // Another's is there, and is the one to serve with.
            return Ok(RETRY);
        }
        info!(secret = name, "the kubelet API's certificate is signed and kept");
        told.send_replace(Some(Arc::new(pair)));
        let left = Duration::try_from(ends.duration_since(Timestamp::now())).unwrap_or_default();
        // Not at once again, however short its life.
        Ok((left / 2).clamp(RETRY, LOOK))
    }
}

/// How often the serving certificate's Secret is looked at.
const LOOK: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_secs(15);
/// A serving certificate lives for months; one that ends sooner is asked for anew.
const RENEWED_BEFORE: Duration = Duration::from_secs(7 * 24 * 3600);

fn material(name: &str, secret: &Secret) -> Result<Material, pool_agent_api::Invalid> {
    let part = |key| terms::text(name, secret, key).map(str::to_owned);
    Ok(Material {
        root_cert: part(Material::ROOT_CERT)?,
        root_key: part(Material::ROOT_KEY).ok(),
        ca_cert: part(Material::CA_CERT)?,
        ca_key: part(Material::CA_KEY)?,
        chain: part(Material::CHAIN).ok(),
    })
}

fn data(material: &Material) -> BTreeMap<String, ByteString> {
    let parts = [
        (Material::ROOT_CERT, Some(&material.root_cert)),
        (Material::ROOT_KEY, material.root_key.as_ref()),
        (Material::CA_CERT, Some(&material.ca_cert)),
        (Material::CA_KEY, Some(&material.ca_key)),
        (Material::CHAIN, material.chain.as_ref()),
    ];
    let given = parts.into_iter().filter_map(|(key, value)| Some((key, value?)));
    given
        .map(|(key, value)| (key.to_owned(), ByteString(value.clone().into_bytes())))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_authority_out_of_a_secret_is_the_one_that_was_put_there() {
        let called = Path::new("Secret x");
        let now = SystemTime::now();
        let made = Material::begin(called, now).unwrap();
        let secret = Secret {
            data: Some(data(&made)),
            ..Secret::default()
        };
        let read = material("x", &secret).unwrap();
        assert!(read == made && read.renewed(called, now).unwrap().is_none());
        Authority::of(called, &read, now).unwrap();
        // Near its end the intermediate is another, of the same root.
        let later = now + Duration::from_secs(700 * 24 * 3600);
        let renewed = read.renewed(called, later).unwrap().unwrap();
        assert!(renewed.root_cert == read.root_cert && renewed.ca_cert != read.ca_cert);
        Authority::of(called, &renewed, later).unwrap();
    }
}
