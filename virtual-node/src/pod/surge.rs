//! Whether a pod may overlap with its next attempt: its Deployment says so, by a rolling
//! update with a surge. Such a pod has siblings beside it at any time anyway. Whatever
//! else owns a pod may count on one at a time.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, ReplicaSet},
        core::v1::Pod,
    },
    apimachinery::pkg::{apis::meta::v1::OwnerReference, util::intstr::IntOrString},
};
use kube::{Api, Client, ResourceExt};
use tracing::debug;

use crate::api_server::answered;

/// Not known is no.
pub(crate) async fn allows_overlap(client: &Client, pod: &Pod) -> bool {
    match deployment_of(client, pod).await {
        Ok(Some(deployment)) => surges(&deployment),
        Ok(None) => false,
        Err(error) => {
            debug!(
                error = &error as &dyn std::error::Error,
                "a pod's Deployment was not read: it does not overlap"
            );
            false
        }
    }
}

async fn deployment_of(client: &Client, pod: &Pod) -> Result<Option<Deployment>, kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let Some(owner) = controller(pod.metadata.owner_references.as_deref(), "ReplicaSet") else {
        return Ok(None);
    };
    let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), &namespace);
    let Some(set) = answered(sets.get_opt(&owner.name))
        .await?
        .filter(|set| set.metadata.uid.as_ref() == Some(&owner.uid))
    else {
        return Ok(None);
    };
    let Some(owner) = controller(set.metadata.owner_references.as_deref(), "Deployment") else {
        return Ok(None);
    };
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
    let found = answered(deployments.get_opt(&owner.name)).await?;
    Ok(found.filter(|deployment| deployment.metadata.uid.as_ref() == Some(&owner.uid)))
}

fn controller<'a>(owners: Option<&'a [OwnerReference]>, kind: &str) -> Option<&'a OwnerReference> {
    owners
        .into_iter()
        .flatten()
        .find(|owner| owner.controller == Some(true) && owner.kind == kind && owner.api_version == "apps/v1")
}

/// A rolling update whose surge is above 0. A share of the replicas is rounded up, so
/// that any share is at least one; what is not said is a quarter.
fn surges(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.strategy.as_ref();
    let rolling = strategy.is_none_or(|s| s.type_.as_deref().is_none_or(|kind| kind == "RollingUpdate"));
    let surge = strategy
        .and_then(|s| s.rolling_update.as_ref())
        .and_then(|rolling| rolling.max_surge.as_ref());
    rolling
        && match surge {
            None => true,
            Some(IntOrString::Int(pods)) => *pods > 0,
            Some(IntOrString::String(share)) => share
                .strip_suffix('%')
                .and_then(|share| share.parse::<u32>().ok())
                .is_some_and(|share| share > 0),
        }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn deployment(strategy: Value) -> Deployment {
        serde_json::from_value(json!({"spec": {
            "selector": {}, "template": {}, "strategy": strategy,
        }}))
        .unwrap()
    }

    #[test]
    fn a_pod_overlaps_where_its_deployment_rolls_with_a_surge() {
        for (strategy, overlaps) in [
            (json!({}), true),
            (json!({"type": "RollingUpdate"}), true),
            (
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}),
                true,
            ),
            (
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "1%"}}),
                true,
            ),
            (
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
                false,
            ),
            (
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "0%"}}),
                false,
            ),
            (json!({"type": "Recreate"}), false),
        ] {
            assert_eq!(surges(&deployment(strategy.clone())), overlaps, "{strategy}");
        }
    }
}
