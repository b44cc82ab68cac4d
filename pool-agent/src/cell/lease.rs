//! The Lease in `kube-node-lease` that says this host lives.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use mesh_runtime::redirect::BootTime;
use pool_agent_api::HostName;
use pool_cell::names;
use serde_json::json;
use tokio::time::MissedTickBehavior;

use super::{Cell, answered, client, refused_with};
use crate::causes::described;

/// After a renewal that failed.
const RETRY: Duration = Duration::from_secs(2);

/// Renews four times in each `duration`.
pub(super) async fn renew(cell: Cell, duration: Duration) {
    let mut clients = cell.clients.clone();
    let mut ticks = tokio::time::interval(duration / 4);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let client = client(&mut clients).await;
        // What is claimed for it begins before it can be anywhere else.
        let sent = BootTime::now();
        match renewed(client, &cell.name, duration).await {
            Ok(renewed) => {
                cell.index.heard(duration);
                if renewed {
                    cell.host.shop().fence.renewed(sent);
                }
            }
            Err(error) => {
                tracing::warn!(
                    error = described(&error),
                    "the host's lease in the cell is not renewed"
                );
                ticks.reset_after(RETRY.min(duration / 4));
            }
        }
    }
}

/// One patch; the Lease is made if it is not there. False: there is no Node whose Lease
/// it would be.
async fn renewed(client: Client, name: &HostName, duration: Duration) -> Result<bool, kube::Error> {
    let api: Api<Lease> = Api::namespaced(client.clone(), names::LEASES);
    let now = MicroTime(Timestamp::now());
    let seconds = i32::try_from(duration.as_secs()).unwrap_or(i32::MAX);
    // This host alone writes its Lease: what stands there is an earlier renewal.
    let patch = json!({"spec": {
        "holderIdentity": name.as_str(),
        "leaseDurationSeconds": seconds,
        "renewTime": now,
    }});
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
    match answered(api.patch(name.as_str(), &parameters, &patch)).await {
        Err(error) if refused_with(&error) == Some(404) => {}
        other => return other.map(|_| true),
    }
    // Owned by the Node, so that it goes with it; without one there is nothing to renew.
    let nodes: Api<Node> = Api::all(client);
    let Some(node) = answered(nodes.get_opt(name.as_str())).await? else {
        return Ok(false);
    };
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.to_string()),
            namespace: Some(names::LEASES.into()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.to_string(),
                uid: node.metadata.uid.unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_string()),
            lease_duration_seconds: Some(seconds),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    answered(api.create(&PostParams::default(), &lease))
        .await
        .map(|_| true)
}
