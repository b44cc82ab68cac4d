//! A node taken out of its tenant's cluster: cordoned, its pods evicted and later
//! deleted, the Node gone, its claims in the cell too.
//!
//! Every step is looked up anew and may be repeated. While it goes on the node is
//! served as ever, so that its pods end as they should.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, Error, Resource, ResourceExt,
    api::{DeleteParams, EvictParams, ListParams, Patch, PatchParams, Preconditions},
};
use objects::Lenient;
use serde_json::json;
use tokio::time::Instant;
use tracing::warn;

use crate::api_server::answered;

/// How long disruption budgets are asked; then pods are deleted, with their grace.
const EVICTION: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_secs(2);
/// Pods of one look: more are dealt with in the next.
const AT_ONCE: u32 = 100;

/// Cordons the node, and asks its pods to go until none is left. `tell` is told how
/// many are.
pub(crate) async fn drain(client: Client, node: &str, mut tell: impl FnMut(usize)) -> Result<(), Error> {
    let nodes = Api::<Node>::all(client.clone());
    let cordon = Patch::Strategic(json!({"spec": {"unschedulable": true}}));
    match answered(nodes.patch(node, &PatchParams::default(), &cordon)).await {
        // It is gone already; pods may be bound to it all the same.
        Err(Error::Api(refused)) if refused.code == 404 => {}
        patched => drop(patched?),
    }
    let began = Instant::now();
    let all = Api::all(client.clone());
    let of_node = ListParams::default()
        .fields(&format!("spec.nodeName={node}"))
        .limit(AT_ONCE);
    loop {
        let pods: Vec<Lenient<Pod>> = answered(all.list(&of_node)).await?.items;
        if pods.is_empty() {
            return Ok(());
        }
        tell(pods.len());
        for pod in pods.iter().filter(|pod| pod.meta().deletion_timestamp.is_none()) {
            let namespace = pod.namespace().unwrap_or_default();
            let name = pod.name_any();
            let same = DeleteParams::default().preconditions(Preconditions {
                uid: pod.meta().uid.clone(),
                resource_version: None,
            });
            let asked = if began.elapsed() < EVICTION {
                let eviction = EvictParams {
                    delete_options: Some(same),
                    ..EvictParams::default()
                };
                let own = Api::<Pod>::namespaced(client.clone(), &namespace);
                answered(own.evict(&name, &eviction)).await.map(drop)
            } else {
                let own = Api::<Lenient<Pod>>::namespaced(client.clone(), &namespace);
                answered(own.delete(&name, &same)).await.map(drop)
            };
            match asked {
                // Gone, another of its name, or its budget allows none now.
                Err(Error::Api(refused)) if [404, 409, 429].contains(&refused.code) => {}
                // One pod that cannot be evicted, for two budgets or a webhook, is deleted
                // when the time for that comes, and holds up no other.
                Err(Error::Api(refused)) => warn!(
                    namespace,
                    pod = name,
                    code = refused.code,
                    reason = refused.message,
                    "a pod of a node that is removed was not asked to go"
                ),
                asked => asked?,
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Deletes the Node, if it is the one that was registered here.
pub(crate) async fn unregister(client: Client, node: &str, uid: &str) -> Result<(), Error> {
    let same = DeleteParams::default().preconditions(Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: None,
    });
    match answered(Api::<Node>::all(client).delete(node, &same)).await {
        Err(Error::Api(refused)) if [404, 409].contains(&refused.code) => Ok(()),
        deleted => deleted.map(drop),
    }
}

/// Deletes what is left of the node's claims in the cell; how many there were. Their
/// hosts end what runs for them, and then wait for a virtual node to forget it, which
/// nobody does any more: a claim whose sandbox is over goes at once.
pub(crate) async fn release_claims(cell: Client, namespace: &str, node: &str) -> Result<usize, Error> {
    let claims = Api::namespaced(cell, namespace);
    let all = answered(objects::list::<Pod>(&claims, &ListParams::default())).await?;
    let mut left = 0;
    for claim in all {
        let annotations = claim.metadata.annotations.as_ref();
        if annotations
            .and_then(|a| a.get(pool_cell::names::NODE))
            .map(String::as_str)
            != Some(node)
        {
            continue;
        }
        left += 1;
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        let over = matches!(phase, Some("Succeeded" | "Failed"));
        if claim.metadata.deletion_timestamp.is_some() && !over {
            continue;
        }
        let params = if over {
            DeleteParams::default().grace_period(0)
        } else {
            DeleteParams::default()
        };
        match answered(claims.delete(&claim.name_any(), &params)).await {
            Err(Error::Api(refused)) if refused.code == 404 => {}
            deleted => drop(deleted?),
        }
    }
    Ok(left)
}
