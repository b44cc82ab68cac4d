//! Pods that use more than was claimed for them. One host's share of it is in
//! pool-agent's own suite (`pool-agent/tests/containerd/room.rs`).

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use spindrift_tests::{
    Scope,
    workload::{idle, merge, message, phase, pod, reason, shell, state},
};

use crate::e2e::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        pods_bound_by_name_take_no_more_than_the_quota,
        a_limit_beyond_what_its_request_allows_fails_the_pod_by_name,
        a_pod_that_fills_its_writable_layer_is_evicted,
    ]
}

/// More than half of the lab's quota of three cores, bound past the scheduler.
fn large(scope: &Scope, container: Value) -> Value {
    let resources = json!({"resources": {"requests": {"cpu": "1600m"}}});
    json!({
        "nodeName": scope.node_name(),
        "restartPolicy": "Never",
        "containers": [merge(container, resources)],
    })
}

async fn pods_bound_by_name_take_no_more_than_the_quota(scope: &Scope) -> anyhow::Result<()> {
    // One that has finished does not count.
    scope.create(pod("done", large(scope, shell("true")))).await?;
    scope
        .until("done", "has succeeded", |pod| phase(pod) == "Succeeded")
        .await?;
    scope.start(pod("first", large(scope, idle()))).await?;
    scope.create(pod("second", large(scope, idle()))).await?;
    let second = scope
        .until("second", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(
        reason(&second) == "OutOfcpu",
        "{} {}",
        reason(&second),
        message(&second)
    );
    let words = "Pod was rejected: Node didn't have enough resource: cpu, requested: 1600, used: ";
    ensure!(
        message(&second).starts_with(words) && message(&second).ends_with("capacity: 3000"),
        "{}",
        message(&second)
    );
    Ok(())
}

async fn a_limit_beyond_what_its_request_allows_fails_the_pod_by_name(scope: &Scope) -> anyhow::Result<()> {
    let resources = json!({"resources": {"requests": {"memory": "16Mi"}, "limits": {"memory": "1Ti"}}});
    scope
        .create(pod("web", json!({"containers": [merge(idle(), resources)]})))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(
        message(&web).contains("containers[0].resources.memory_limit_bytes: 1099511627776 is more than"),
        "{} {}",
        reason(&web),
        message(&web)
    );
    Ok(())
}

async fn a_pod_that_fills_its_writable_layer_is_evicted(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell("dd if=/dev/zero of=/fill bs=65536 count=256; while :; do sleep 1; done"),
        json!({"resources": {"limits": {"ephemeral-storage": "4Mi"}}}),
    );
    scope
        .create(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [main]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(
        (reason(&web), message(&web))
            == (
                "Evicted",
                "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "
            ),
        "{} {}",
        reason(&web),
        message(&web)
    );
    let main = state(&web, "main").context("main has no state")?;
    ensure!(main.terminated.is_some(), "{main:?}");
    Ok(())
}
