//! Reads what a pod refers to. Called by the pod's driver before a start, and
//! again from time to time while the pod runs, to keep its volumes current.
//!
//! Objects are read when they are needed, by name: under the Node authorizer a
//! node may read just those, and nothing of a tenant's Secrets is kept here
//! longer than a start takes. A read that the authorizer refuses is tried again:
//! its graph learns of a pod a moment after the pod was bound.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{future::try_join_all, try_join};
use jiff::Timestamp;
use k8s_openapi::{
    Metadata, NamespaceResourceScope,
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount},
        node::v1::RuntimeClass,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    api::{ListParams, PostParams},
};
use pool_agent_api::spec::MeshMode;
use serde::de::DeserializeOwned;

use super::references::{
    References, Resolved, ServiceLink, ServiceLinkPort, Token, TokenSlot, TokenWanted, references,
};
use crate::{api_server::answered, mesh::object::DataplaneMode};

#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}")]
pub(crate) struct ReadError {
    /// E.g. `configmap shop/settings`.
    pub(crate) what: String,
    #[source]
    source: Box<kube::Error>,
}

/// Which reads are worth making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Everything, as it is now.
    Start,
    /// What volumes are made of; a moment old will do.
    Volumes,
}

/// Tokens at hand are used until it is time for the next.
pub(crate) async fn resolve(
    client: &Client,
    pod: &Pod,
    held: &BTreeMap<TokenSlot, Token>,
    extent: Extent,
    now: Timestamp,
) -> Result<Resolved, ReadError> {
    let wanted = references(pod);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let (config_maps, secrets, tokens, runtime_handler, services) = try_join!(
        objects::<ConfigMap>(client, namespace, &wanted.config_maps, "configmap"),
        objects::<Secret>(client, namespace, &wanted.secrets, "secret"),
        tokens(client, pod, &wanted, held, now),
        runtime_handler(client, wanted.runtime_class.as_deref(), extent),
        services(client, pod, namespace, extent),
    )?;
    Ok(Resolved {
        config_maps,
        secrets,
        tokens,
        runtime_handler,
        services,
    })
}

/// Whether the pod is to be in the mesh, by its own label and its namespace's.
pub(crate) async fn mesh_mode(client: &Client, pod: &Pod) -> Result<MeshMode, ReadError> {
    let name = pod.metadata.namespace.as_deref().unwrap_or_default();
    let namespace = answered(Api::<Namespace>::all(client.clone()).get_metadata(name))
        .await
        .map_err(read_error(format!("namespace {name}")))?;
    let of_namespace = DataplaneMode::of(&namespace.metadata);
    // The mesh's own rule, so that hosts and control plane agree.
    Ok(
        if DataplaneMode::enrols(DataplaneMode::of(&pod.metadata), of_namespace) {
            MeshMode::Enrolled
        } else {
            MeshMode::Unmeshed
        },
    )
}

fn read_error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> ReadError {
    let what = what.into();
    move |source| ReadError {
        what,
        source: Box::new(source),
    }
}

async fn objects<K>(
    client: &Client,
    namespace: &str,
    names: &std::collections::BTreeSet<String>,
    kind: &str,
) -> Result<BTreeMap<String, Option<Arc<K>>>, ReadError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Metadata<Ty = ObjectMeta>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let reads = names.iter().map(|name| {
        let api = api.clone();
        async move {
            let found = answered(api.get_opt(name))
                .await
                .map_err(read_error(format!("{kind} {namespace}/{name}")))?;
            Ok((name.clone(), found.map(Arc::new)))
        }
    });
    Ok(try_join_all(reads).await?.into_iter().collect())
}

async fn tokens(
    client: &Client,
    pod: &Pod,
    wanted: &References,
    held: &BTreeMap<TokenSlot, Token>,
    now: Timestamp,
) -> Result<BTreeMap<TokenSlot, Token>, ReadError> {
    let requests = wanted.tokens.iter().map(|(slot, want)| async move {
        if let Some(token) = held.get(slot).filter(|t| t.refresh_at > now) {
            return Ok((slot.clone(), token.clone()));
        }
        Ok((slot.clone(), token(client, pod, want, now).await?))
    });
    Ok(try_join_all(requests).await?.into_iter().collect())
}

/// A token of the pod's service account, bound to the pod: it dies with it.
async fn token(client: &Client, pod: &Pod, wanted: &TokenWanted, now: Timestamp) -> Result<Token, ReadError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let account = pod
        .spec
        .as_ref()
        .and_then(|s| s.service_account_name.as_deref())
        .filter(|n| !n.is_empty())
        .unwrap_or("default");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: wanted.audience.clone().map(|a| vec![a]),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
            expiration_seconds: i64::try_from(wanted.expiration.as_secs()).ok(),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let issued = answered(accounts.create_token_request(account, &PostParams::default(), &request))
        .await
        .map_err(read_error(format!(
            "a token of serviceaccount {namespace}/{account}"
        )))?;
    let status = issued.status.unwrap_or_default();
    Ok(Token {
        text: status.token.unwrap_or_default(),
        refresh_at: refresh_at(now, status.expiration_timestamp.map_or(now, |t| t.0)),
    })
}

/// A kubelet fetches the next token at 80 % of the life of the last, and at
/// least daily.
fn refresh_at(issued: Timestamp, expires: Timestamp) -> Timestamp {
    const AT_MOST: Duration = Duration::from_secs(24 * 3600);
    let life = Duration::try_from(expires.duration_since(issued)).unwrap_or(Duration::ZERO);
    let use_for = life.mul_f64(0.8).min(AT_MOST);
    issued.saturating_add(use_for).unwrap_or(issued)
}

pub(crate) async fn runtime_handler(
    client: &Client,
    name: Option<&str>,
    extent: Extent,
) -> Result<Option<Option<String>>, ReadError> {
    let Some(name) = name.filter(|_| extent == Extent::Start) else {
        return Ok(None);
    };
    let class = answered(Api::<RuntimeClass>::all(client.clone()).get_opt(name))
        .await
        .map_err(read_error(format!("runtimeclass {name}")))?;
    Ok(class.map(|c| Some(c.handler).filter(|h| !h.is_empty())))
}

/// The `kubernetes` Service, and those of the pod's namespace unless it does
/// not want them.
async fn services(
    client: &Client,
    pod: &Pod,
    namespace: &str,
    extent: Extent,
) -> Result<Vec<ServiceLink>, ReadError> {
    if extent == Extent::Volumes {
        return Ok(vec![]);
    }
    const MASTER: (&str, &str) = ("default", "kubernetes");
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links) != Some(false);
    let own = async {
        if !links {
            return Ok(vec![]);
        }
        let services = Api::namespaced(client.clone(), namespace);
        answered(objects::list::<Service>(
            &services,
            &ListParams::default().match_any(),
        ))
        .await
        .map_err(read_error(format!("services of {namespace}")))
    };
    let master = async {
        if links && namespace == MASTER.0 {
            return Ok(None);
        }
        answered(Api::<Service>::namespaced(client.clone(), MASTER.0).get_opt(MASTER.1))
            .await
            .map_err(read_error("service default/kubernetes"))
    };
    let (own, master) = try_join!(own, master)?;
    // One of the pod's own namespace by that name comes later and wins.
    Ok(master.into_iter().chain(own).filter_map(link).collect())
}

fn link(service: Service) -> Option<ServiceLink> {
    let spec = service.spec?;
    let cluster_ip = spec.cluster_ip.filter(|ip| !ip.is_empty() && ip != "None")?;
    Some(ServiceLink {
        name: service.metadata.name?,
        cluster_ip,
        ports: spec
            .ports
            .into_iter()
            .flatten()
            .map(|p| ServiceLinkPort {
                name: p.name,
                protocol: p.protocol.unwrap_or_else(|| "TCP".into()),
                port: p.port,
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_and_daily() {
        let issued = Timestamp::from_second(1_000_000).unwrap();
        for (life, after) in [(3600, 2880), (607, 485), (10 * 24 * 3600, 24 * 3600), (0, 0)] {
            let expires = issued.saturating_add(Duration::from_secs(life)).unwrap();
            let renewed = refresh_at(issued, expires);
            assert_eq!(renewed.as_second() - issued.as_second(), after, "{life}");
        }
    }
}
