//! Pods that use more than was claimed for them. One host's share of it is in
//! pool-agent's own suite (`pool-agent/tests/containerd/room.rs`).

use anyhow::{Context, ensure};
use serde_json::json;
use spindrift_tests::{
    Scope,
    workload::{idle, merge, message, phase, pod, reason, shell, state},
};

use crate::e2e::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        a_limit_beyond_what_its_request_allows_fails_the_pod_by_name,
        a_pod_that_fills_its_writable_layer_is_evicted,
    ]
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
