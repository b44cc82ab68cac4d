//! What a pod refers to: the objects that have to be read before it can be
//! translated. Pure; read by `resolve`, filled in for `translate`.
//!
//! The Node authorizer lets a node read only objects that its pods refer to, so
//! this list is also the whole of what a virtual node ever asks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ProjectedVolumeSource, Secret};

/// One token to ask for: which projection of which volume it fills.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TokenSlot {
    pub(crate) volume: String,
    pub(crate) source: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenWanted {
    /// None: the API server's own.
    pub(crate) audience: Option<String>,
    pub(crate) expiration: Duration,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct References {
    pub(crate) config_maps: BTreeSet<String>,
    pub(crate) secrets: BTreeSet<String>,
    /// A subset of `secrets`: credentials for registries.
    pub(crate) pull_secrets: Vec<String>,
    pub(crate) tokens: BTreeMap<TokenSlot, TokenWanted>,
    pub(crate) runtime_class: Option<String>,
}

/// The objects, as they were at one moment. None: the API server says that
/// there is none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resolved {
    pub(crate) config_maps: BTreeMap<String, Option<Arc<ConfigMap>>>,
    pub(crate) secrets: BTreeMap<String, Option<Arc<Secret>>>,
    pub(crate) tokens: BTreeMap<TokenSlot, Token>,
    /// The containerd runtime that the pod's RuntimeClass names.
    pub(crate) runtime_handler: Option<Option<String>>,
    /// Services that the pod's environment tells of.
    pub(crate) services: Vec<ServiceLink>,
}

/// A bound service-account token.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) text: String,
    /// When to fetch the next one.
    pub(crate) refresh_at: Timestamp,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("refresh_at", &self.refresh_at)
            .finish_non_exhaustive()
    }
}

/// A Service with a cluster IP, as the environment tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceLink {
    pub(crate) name: String,
    pub(crate) cluster_ip: String,
    pub(crate) ports: Vec<ServiceLinkPort>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceLinkPort {
    pub(crate) name: Option<String>,
    pub(crate) protocol: String,
    pub(crate) port: i32,
}

/// The API server's default for a projected token.
const DEFAULT_EXPIRATION: Duration = Duration::from_secs(3600);

/// Everything that `pod` refers to.
pub(crate) fn references(pod: &Pod) -> References {
    let mut found = References::default();
    let Some(spec) = &pod.spec else {
        return found;
    };
    for secret in spec.image_pull_secrets.iter().flatten() {
        if !secret.name.is_empty() {
            found.secrets.insert(secret.name.clone());
            found.pull_secrets.push(secret.name.clone());
        }
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        for from in container.env_from.iter().flatten() {
            if let Some(map) = &from.config_map_ref {
                found.config_maps.insert(map.name.clone());
            }
            if let Some(secret) = &from.secret_ref {
                found.secrets.insert(secret.name.clone());
            }
        }
        for from in container
            .env
            .iter()
            .flatten()
            .filter_map(|e| e.value_from.as_ref())
        {
            if let Some(key) = &from.config_map_key_ref {
                found.config_maps.insert(key.name.clone());
            }
            if let Some(key) = &from.secret_key_ref {
                found.secrets.insert(key.name.clone());
            }
        }
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(map) = &volume.config_map {
            found.config_maps.insert(map.name.clone());
        }
        if let Some(name) = volume.secret.as_ref().and_then(|s| s.secret_name.as_ref()) {
            found.secrets.insert(name.clone());
        }
        if let Some(projected) = &volume.projected {
            projections(&volume.name, projected, &mut found);
        }
    }
    found.runtime_class = spec.runtime_class_name.clone();
    // What validation would never have let pass is not asked for either.
    found.config_maps.remove("");
    found.secrets.remove("");
    found
}

fn projections(volume: &str, projected: &ProjectedVolumeSource, found: &mut References) {
    for (source, projection) in projected.sources.iter().flatten().enumerate() {
        if let Some(map) = &projection.config_map {
            found.config_maps.insert(map.name.clone());
        }
        if let Some(secret) = &projection.secret {
            found.secrets.insert(secret.name.clone());
        }
        if let Some(token) = &projection.service_account_token {
            let slot = TokenSlot {
                volume: volume.to_owned(),
                source,
            };
            let wanted = TokenWanted {
                audience: token.audience.clone().filter(|a| !a.is_empty()),
                expiration: token
                    .expiration_seconds
                    .and_then(|s| u64::try_from(s).ok())
                    .map_or(DEFAULT_EXPIRATION, Duration::from_secs),
            };
            found.tokens.insert(slot, wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn every_place_that_can_name_an_object_is_looked_at() {
        let found = references(&pod(json!({
            "imagePullSecrets": [{"name": "pull"}],
            "runtimeClassName": "gvisor",
            "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "init-env"}}]}],
            "containers": [{
                "name": "c",
                "envFrom": [{"secretRef": {"name": "env-from"}}],
                "env": [
                    {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "key-map", "key": "a"}}},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "key-secret", "key": "b"}}},
                ],
            }],
            "volumes": [
                {"name": "m", "configMap": {"name": "volume-map"}},
                {"name": "s", "secret": {"secretName": "volume-secret"}},
                {"name": "p", "projected": {"sources": [
                    {"configMap": {"name": "projected-map"}},
                    {"secret": {"name": "projected-secret"}},
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                    {"serviceAccountToken": {"path": "vault", "audience": "vault"}},
                ]}},
            ],
        })));
        let names = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(
            names(&found.config_maps),
            "init-env key-map projected-map volume-map"
        );
        assert_eq!(
            names(&found.secrets),
            "env-from key-secret projected-secret pull volume-secret"
        );
        assert_eq!(found.pull_secrets, ["pull"]);
        assert_eq!(found.runtime_class.as_deref(), Some("gvisor"));
        let tokens: Vec<_> = found
            .tokens
            .iter()
            .map(|(slot, w)| (slot.source, w.audience.as_deref(), w.expiration.as_secs()))
            .collect();
        assert_eq!(tokens, [(2, None, 3607), (3, Some("vault"), 3600)]);
    }

    #[test]
    fn a_pod_without_references_has_none() {
        let pod = pod(json!({"containers": [{"name": "c", "image": "x"}]}));
        assert_eq!(references(&pod), References::default());
    }
}
