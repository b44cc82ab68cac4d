//! Pods whose hosts are claimed in the pool's own cluster, its cell. These run where
//! the lab has one (`SPINDRIFT_TEST_CELL=true`), as does every other test then.

mod virtual_nodes;

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment,
    coordination::v1::Lease,
    core::v1::{Node, Pod, ResourceQuota},
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use spindrift_local::cell::{Cell, QUOTA};
use spindrift_tests::{
    Scope,
    scope::PATIENCE,
    workload::{condition, container, deployment, idle, is_ready, phase, pod, shell, summary, uid},
};

use super::{
    faults::virtual_node_killed_in_the_midst_of_ten_starts,
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        each_pod_has_one_claim_that_is_bound_to_its_host_and_goes_with_it,
        the_node_offers_the_tenants_quota,
    ];
    all.extend(cases![Alone:
        a_pod_beyond_the_quota_waits_says_why_and_starts_when_there_is_room,
        a_pod_that_fits_no_host_waits_and_says_so_in_the_schedulers_words,
        each_of_ten_pods_has_one_claim_after_virtual_node_was_killed_in_their_start,
        a_cell_that_is_away_disturbs_nothing_and_new_pods_wait_for_it,
        a_drained_host_gives_its_pods_up_and_each_starts_elsewhere,
        a_machine_whose_node_is_anothers_renews_nothing_and_takes_nothing,
    ]);
    all.extend(virtual_nodes::tests());
    all
}

fn cell(scope: &Scope) -> anyhow::Result<&Cell> {
    scope.lab().cell().context("the lab has no cell")
}

fn namespace(scope: &Scope) -> String {
    Cell::namespace(scope.lab().layout().instance().as_str())
}

/// As the cell's administrator sees them.
fn claims(scope: &Scope) -> anyhow::Result<Api<Pod>> {
    Ok(Api::namespaced(
        cell(scope)?.cluster().client(),
        &namespace(scope),
    ))
}

async fn claims_of(scope: &Scope, pod: &Pod) -> anyhow::Result<Vec<Pod>> {
    let of_pod = ListParams::default().labels(&format!("spindrift.dev/pod-uid={}", uid(pod)));
    Ok(claims(scope)?.list(&of_pod).await?.items)
}

fn host_of(claim: &Pod) -> &str {
    let spec = claim.spec.as_ref();
    spec.and_then(|s| s.node_name.as_deref()).unwrap_or_default()
}

async fn without_claims(scope: &Scope, pod: &Pod) -> anyhow::Result<()> {
    scope
        .wait("that no claim is left of a pod that is gone", async || {
            let left = claims_of(scope, pod).await.map_err(|e| format!("{e:#}"))?;
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{} are", left.len()))
            }
        })
        .await
}

async fn each_pod_has_one_claim_that_is_bound_to_its_host_and_goes_with_it(
    scope: &Scope,
) -> anyhow::Result<()> {
    scope
        .create(deployment("web", 4, json!({"containers": [idle()]})))
        .await?;
    let pods = scope.pods_until("web", 4, "are Ready", is_ready).await?;
    let mut hosts = BTreeSet::new();
    for pod in &pods {
        let own = claims_of(scope, pod).await?;
        let [claim] = own.as_slice() else {
            anyhow::bail!("{} has {} claims", pod.name_any(), own.len());
        };
        ensure!(
            host_of(claim) == scope.host_of(pod)?,
            "{} runs on {}, and its claim is on {}",
            pod.name_any(),
            scope.host_of(pod)?,
            host_of(claim)
        );
        hosts.insert(host_of(claim).to_owned());
    }
    ensure!(hosts.len() == 2, "siblings are not spread: {hosts:?}");
    scope
        .patch::<Deployment>("web", json!({"spec": {"replicas": 0}}))
        .await?;
    for pod in &pods {
        scope.gone(&pod.name_any()).await?;
        without_claims(scope, pod).await?;
    }
    Ok(())
}

async fn the_node_offers_the_tenants_quota(scope: &Scope) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(scope.client());
    let node = nodes.get(&scope.node_name()).await?;
    let offered = node.status.and_then(|s| s.allocatable).unwrap_or_default();
    let of = |name: &str| offered.get(name).map(|q| q.0.clone()).unwrap_or_default();
    ensure!(of("cpu") == QUOTA.cpu && of("pods") == QUOTA.pods, "{offered:?}");
    Ok(())
}

/// Sets how many claims the tenant may have.
async fn allow(scope: &Scope, pods: &str) -> anyhow::Result<()> {
    let quotas: Api<ResourceQuota> = Api::namespaced(cell(scope)?.cluster().client(), &namespace(scope));
    let patch = Patch::Merge(json!({"spec": {"hard": {"pods": pods}}}));
    quotas.patch("standard", &PatchParams::default(), &patch).await?;
    // The API server counts by what its quota controller has written.
    scope
        .wait("that the quota holds", async || {
            let quota = quotas.get("standard").await.map_err(|e| e.to_string())?;
            let hard = quota.status.and_then(|s| s.hard).unwrap_or_default();
            match hard.get("pods") {
                Some(now) if now.0 == pods => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await
}

async fn a_pod_beyond_the_quota_waits_says_why_and_starts_when_there_is_room(
    scope: &Scope,
) -> anyhow::Result<()> {
    let first = scope
        .start(pod(
            "first",
            json!({"terminationGracePeriodSeconds": 1, "containers": [idle()]}),
        ))
        .await?;
    let used = claims(scope)?.list(&ListParams::default()).await?.items.len();
    allow(scope, &used.to_string()).await?;
    let held = async {
        scope
            .create(pod("second", json!({"containers": [idle()]})))
            .await?;
        let waits = scope
            .until("second", "waits for quota", |pod| {
                condition(pod, "spindrift.dev/HostFound") == Some("False")
            })
            .await?;
        ensure!(phase(&waits) == "Pending", "{}", summary(&waits));
        scope.event("second", "QuotaExceeded", "exceeded quota").await?;
        scope
            .api::<Pod>()
            .delete(&first.name_any(), &DeleteParams::default())
            .await?;
        let second = scope.ready("second").await?;
        ensure!(
            condition(&second, "spindrift.dev/HostFound") == Some("True"),
            "{}",
            summary(&second)
        );
        scope.event("second", "HostFound", "").await?;
        anyhow::Ok(())
    }
    .await;
    allow(scope, QUOTA.pods).await?;
    held
}

async fn a_pod_that_fits_no_host_waits_and_says_so_in_the_schedulers_words(
    scope: &Scope,
) -> anyhow::Result<()> {
    let mut large = idle();
    large["resources"] = json!({"requests": {"cpu": "63"}});
    scope.create(pod("large", json!({"containers": [large]}))).await?;
    let waits = scope
        .until("large", "waits for a host", |pod| {
            condition(pod, "spindrift.dev/HostFound") == Some("False")
        })
        .await?;
    ensure!(phase(&waits) == "Pending", "{}", summary(&waits));
    scope.event("large", "WaitingForHost", "Insufficient cpu").await?;
    Ok(())
}

async fn each_of_ten_pods_has_one_claim_after_virtual_node_was_killed_in_their_start(
    scope: &Scope,
) -> anyhow::Result<()> {
    virtual_node_killed_in_the_midst_of_ten_starts(scope).await?;
    let pods = scope.api::<Pod>().list(&ListParams::default()).await?.items;
    for pod in &pods {
        scope
            .wait("that each pod has one claim", async || {
                let own = claims_of(scope, pod).await.map_err(|e| format!("{e:#}"))?;
                match own.as_slice() {
                    [_] => Ok(()),
                    many => Err(format!("{} has {}", pod.name_any(), many.len())),
                }
            })
            .await?;
    }
    Ok(())
}

async fn a_cell_that_is_away_disturbs_nothing_and_new_pods_wait_for_it(scope: &Scope) -> anyhow::Result<()> {
    let before = scope
        .start(pod("before", json!({"containers": [idle()]})))
        .await?;
    scope.lab().kill("cell-kube-apiserver").await?;
    let away = async {
        scope
            .create(pod("during", json!({"containers": [idle()]})))
            .await?;
        scope.event("during", "WaitingForHost", "").await?;
        scope.kubectl().exec_ok("before", &["true"]).await
    }
    .await;
    scope.lab().start("cell-kube-apiserver").await?;
    away?;
    cell(scope)?.cluster().wait_ready(PATIENCE).await?;
    scope.ready("during").await?;
    let after = scope.ready("before").await?;
    ensure!(uid(&after) == uid(&before), "it was made anew");
    ensure!(
        container(&after, "main").is_some_and(|c| c.restart_count == 0),
        "{}",
        summary(&after)
    );
    scope.kubectl().exec_ok("before", &["true"]).await.map(drop)
}

async fn a_drained_host_gives_its_pods_up_and_each_starts_elsewhere(scope: &Scope) -> anyhow::Result<()> {
    let quick = |policy: &str, container: Value| json!({"terminationGracePeriodSeconds": 1, "restartPolicy": policy, "containers": [container]});
    let moved = scope.start(pod("moved", quick("Always", idle()))).await?;
    // One that is not done when it is told to go.
    let busy = shell("trap '' TERM; while :; do sleep 1000 & wait; done");
    let once = scope.start(pod("once", quick("Never", busy))).await?;
    for pod in [&moved, &once] {
        for claim in claims_of(scope, pod).await? {
            claims(scope)?
                .delete(&claim.name_any(), &DeleteParams::default())
                .await?;
        }
    }
    scope
        .until("once", "has failed because it had to go", |pod| {
            phase(pod) == "Failed" && condition(pod, "DisruptionTarget") == Some("True")
        })
        .await?;
    let first = placement(&moved);
    let again = scope
        .until("moved", "runs in another attempt", |pod| {
            is_ready(pod) && placement(pod) != first
        })
        .await?;
    ensure!(uid(&again) == uid(&moved), "it was made anew");
    Ok(())
}

/// As if another machine had joined under the name of one that was thought dead.
async fn a_machine_whose_node_is_anothers_renews_nothing_and_takes_nothing(
    scope: &Scope,
) -> anyhow::Result<()> {
    let first = scope.start(pod("first", json!({"containers": [idle()]}))).await?;
    let claim = claims_of(scope, &first).await?.pop().context("it has no claim")?;
    let host = host_of(&claim).to_owned();
    let client = cell(scope)?.cluster().client();
    let nodes: Api<Node> = Api::all(client.clone());
    let node = nodes.get(&host).await?;
    let ours = node
        .status
        .and_then(|status| Some(status.node_info?.machine_id))
        .context("its Node has no machine id")?;
    let machine = async |id: &str| {
        let patch = Patch::Merge(json!({"status": {"nodeInfo": {"machineID": id}}}));
        nodes.patch_status(&host, &PatchParams::default(), &patch).await
    };
    machine("another").await?;
    let held = async {
        let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
        // Two renewals and a half; the Lease itself holds for four.
        scope
            .wait("that its Lease is not renewed any more", async || {
                let lease = leases.get(&host).await.map_err(|e| e.to_string())?;
                let renewed = lease.spec.and_then(|spec| spec.renew_time).map(|time| time.0);
                let age = renewed.map(|at| Timestamp::now().duration_since(at).as_secs());
                age.filter(|age| *age >= 25).map(drop).ok_or(format!("{age:?} s"))
            })
            .await?;
        // Nor does it touch a claim that is deleted.
        let name = claim.name_any();
        let mark =
            Patch::Merge(json!({"metadata": {"annotations": {"spindrift.dev/agent": "192.0.2.99:1"}}}));
        let marked = claims(scope)?
            .patch(&name, &PatchParams::default(), &mark)
            .await?;
        anyhow::Ok(marked.metadata.resource_version)
    }
    .await;
    machine(&ours).await?;
    let marked = held?;
    // What was written there meanwhile stood until now, and is mended.
    let name = claim.name_any();
    scope
        .wait("that its claim says where its agent is", async || {
            let claim = claims(scope)
                .map_err(|e| e.to_string())?
                .get(&name)
                .await
                .map_err(|e| e.to_string())?;
            let said = claim.annotations().get("spindrift.dev/agent").cloned();
            let mended = claim.resource_version() != marked && said.as_deref() != Some("192.0.2.99:1");
            if mended { Ok(()) } else { Err(format!("{said:?}")) }
        })
        .await
}

/// The placement on record: attempt and host.
fn placement(pod: &Pod) -> String {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == "spindrift.dev/Placed")
        .and_then(|c| c.message.clone())
        .unwrap_or_default()
}
