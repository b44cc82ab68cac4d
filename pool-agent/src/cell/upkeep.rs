//! Keeps the claims of this host as they should be, and its sandboxes as their claims
//! say: looks at everything when something has changed, and every so often.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use pool_agent_api::{
    SandboxKey, TenantId,
    status::{Notice, SandboxState},
};

use super::{
    Cell, answered, client,
    duty::{self, Here, Standing},
    refused_with,
};
use crate::causes::described;

/// Looked at anew though nothing was told: what failed is tried again.
const LOOK: Duration = Duration::from_secs(10);
/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(20);
/// Requests at a time.
const AT_A_TIME: usize = 8;
/// What a sandbox without a claim is left, if its pod asked for more.
const LONGEST_FAREWELL: Duration = Duration::from_secs(30);
const CLAIM_GONE: &str = "ClaimGone";

pub(super) async fn keep(cell: Cell) {
    let mut clients = cell.clients.clone();
    let mut claims = cell.index.changes();
    let mut statuses = cell.host.board().reader(None);
    let mut noticed = Noticed::new();
    loop {
        let client = client(&mut clients).await;
        // Before the look: what changes while it goes on is looked at again.
        claims.borrow_and_update();
        if statuses.take().is_err() {
            statuses = cell.host.board().reader(None);
        }
        let again = look(&cell, &client, &mut noticed).await;
        tokio::select! {
            changed = claims.changed() => if changed.is_err() {
                return;
            },
            changed = statuses.changed() => if !changed {
                return;
            },
            () = tokio::time::sleep(again.unwrap_or(LOOK).min(LOOK)) => {}
        }
        tokio::time::sleep(GATHER).await;
    }
}

/// When each claim's deletion was seen first, by the claim's UID.
type Noticed = HashMap<String, Timestamp>;

/// One look at everything. How soon to look again, if something is due.
async fn look(cell: &Cell, client: &Client, noticed: &mut Noticed) -> Option<Duration> {
    // Not known: a cell that is away stops nothing.
    let pods = cell.index.all()?;
    let claimed: HashSet<_> = pods.iter().filter_map(|pod| duty::subject(pod)).collect();
    let unclaimed: Vec<_> = cell
        .host
        .residents()
        .into_iter()
        .filter(|resident| !claimed.contains(resident))
        .collect();
    let now = Timestamp::now();
    let deleted = |pod: &Arc<Pod>| {
        let meta = &pod.metadata;
        meta.deletion_timestamp.as_ref().and(meta.uid.clone())
    };
    *noticed = pods
        .iter()
        .filter_map(deleted)
        .map(|uid| {
            let since = noticed.get(&uid).copied().unwrap_or(now);
            (uid, since)
        })
        .collect();
    let noticed = &*noticed;
    let due: Vec<Option<Timestamp>> = futures::stream::iter(pods)
        .map(|pod| async move {
            let since = deleted(&pod).and_then(|uid| noticed.get(&uid).copied());
            attend(cell, client, &pod, since.unwrap_or(now), now).await
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    futures::stream::iter(unclaimed)
        .for_each_concurrent(AT_A_TIME, |(tenant, key)| async move {
            settle(cell, &tenant, &key).await;
        })
        .await;
    let next = due.into_iter().flatten().min()?;
    Some(Duration::try_from(next.duration_since(Timestamp::now())).unwrap_or_default())
}

/// Does what one Pod asks for.
async fn attend(
    cell: &Cell,
    client: &Client,
    pod: &Arc<Pod>,
    noticed: Timestamp,
    now: Timestamp,
) -> Option<Timestamp> {
    let here = Here {
        address: cell.agent.ip(),
        agent: cell.agent,
    };
    let subject = duty::subject(pod);
    let standing = match &subject {
        Some((tenant, key)) => cell.host.standing(tenant, key),
        None => Standing::Absent,
    };
    let duty = duty::of(pod, &standing, here, noticed, now);
    if let Some((tenant, key)) = &subject {
        if let Some(notice) = duty.notice {
            cell.host.give_notice(tenant, key, notice);
        }
        if let Some(grace) = duty.stop {
            stop(cell, tenant, key, grace).await;
        }
        // Fenced before the object goes: a start that is under way to this process is
        // refused, and to a later one there is no claim.
        if duty.fence
            && let Err(error) = cell.host.forget(tenant, key).await
        {
            tracing::warn!(error = described(&error), "an unused claim cannot be let go yet");
            return duty.again;
        }
    }
    let api = api_of(client, pod);
    let name = pod.metadata.name.clone().unwrap_or_default();
    if let Some(patch) = duty.status.and_then(|status| status.patch(pod, now)) {
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        match answered(api.patch_status(&name, &parameters, &patch)).await {
            Ok(written) => cell.index.wrote(written),
            // Gone, or another by that name: the watch tells.
            Err(error) if matches!(refused_with(&error), Some(404 | 409)) => {}
            Err(error) => tracing::warn!(
                claim = name,
                error = described(&error),
                "a claim's status cannot be written"
            ),
        }
    }
    if duty.let_go {
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match answered(api.delete(&name, &parameters)).await {
            Ok(_) => tracing::info!(claim = name, "a claim was let go"),
            Err(error) if matches!(refused_with(&error), Some(404 | 409)) => {}
            Err(error) => tracing::warn!(
                claim = name,
                error = described(&error),
                "a claim cannot be let go yet"
            ),
        }
    }
    duty.again
}

/// A sandbox that no claim was seen for: absent is not gone, so the cell is asked.
async fn settle(cell: &Cell, tenant: &TenantId, key: &SandboxKey) {
    let Standing::Here { status, grace } = cell.host.standing(tenant, key) else {
        return;
    };
    let state = status.map(|s| s.state);
    if matches!(state, Some(SandboxState::Stopping | SandboxState::Stopped)) {
        return;
    }
    match cell.index.live(tenant, key).await {
        Ok(Some(_)) => {}
        Ok(None) => {
            let grace = grace.min(LONGEST_FAREWELL);
            tracing::warn!(
                pod.uid = %key.pod, attempt = %key.attempt, tenant = %tenant,
                "a sandbox's claim is gone: it is stopped"
            );
            let deadline = crate::sandbox::clock::after(Timestamp::now(), grace);
            let notice = Notice {
                reason: CLAIM_GONE.into(),
                deadline,
            };
            cell.host.give_notice(tenant, key, notice);
            stop(cell, tenant, key, grace).await;
        }
        Err(error) => tracing::warn!(error, "a sandbox without a claim that was seen goes on"),
    }
}

async fn stop(cell: &Cell, tenant: &TenantId, key: &SandboxKey, grace: Duration) {
    if let Err(error) = cell.host.stop(tenant, key, grace).await {
        tracing::warn!(
            error = described(&error),
            "a sandbox whose claim ends is not stopped yet"
        );
    }
}

fn api_of(client: &Client, pod: &Pod) -> Api<Pod> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    Api::namespaced(client.clone(), namespace)
}
