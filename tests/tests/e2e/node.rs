//! The Node object, its Lease, and what happens when either is meddled with.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use spindrift_tests::{
    Scope,
    workload::{idle, pod, uid},
};

use super::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        the_node_is_ready_and_says_what_a_kubelet_says,
        the_lease_is_renewed_and_belongs_to_the_node,
    ];
    all.extend(cases![Alone:
        a_restart_adopts_the_node_and_what_others_wrote_on_it,
        a_node_deleted_at_runtime_comes_back_and_its_pods_stay,
    ]);
    all
}

fn nodes(scope: &Scope) -> Api<Node> {
    Api::all(scope.client())
}

fn leases(scope: &Scope) -> Api<Lease> {
    Api::namespaced(scope.client(), "kube-node-lease")
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a str> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    Some(conditions.iter().find(|c| c.type_ == kind)?.status.as_str())
}

async fn the_node_is_ready_and_says_what_a_kubelet_says(scope: &Scope) -> anyhow::Result<()> {
    let node = nodes(scope).get(&scope.node_name()).await?;
    for (kind, wanted) in [
        ("Ready", "True"),
        ("MemoryPressure", "False"),
        ("DiskPressure", "False"),
        ("PIDPressure", "False"),
    ] {
        ensure!(
            condition(&node, kind) == Some(wanted),
            "{kind} is {:?}",
            condition(&node, kind)
        );
    }
    let labels = node.labels();
    for (label, wanted) in [
        ("kubernetes.io/hostname", scope.node_name()),
        ("kubernetes.io/os", "linux".into()),
        ("kubernetes.io/arch", "amd64".into()),
    ] {
        ensure!(
            labels.get(label) == Some(&wanted),
            "{label} is {:?}",
            labels.get(label)
        );
    }
    let status = node.status.context("the node has no status")?;
    let addresses = status.addresses.unwrap_or_default();
    ensure!(
        addresses
            .iter()
            .any(|a| a.type_ == "InternalIP" && a.address == "192.0.2.2"),
        "{addresses:?}"
    );
    let port = status
        .daemon_endpoints
        .and_then(|e| e.kubelet_endpoint)
        .map(|e| e.port);
    ensure!(port == Some(10250), "the kubelet's port is {port:?}");
    let info = status.node_info.context("the node has no info")?;
    ensure!(
        info.kubelet_version.starts_with("v1.37."),
        "{}",
        info.kubelet_version
    );
    ensure!(
        info.operating_system == "linux" && info.architecture == "amd64",
        "{info:?}"
    );
    ensure!(
        info.container_runtime_version.starts_with("containerd://"),
        "{info:?}"
    );
    let allocatable = status.allocatable.unwrap_or_default();
    for resource in ["cpu", "memory", "pods"] {
        let amount = allocatable
            .get(resource)
            .with_context(|| format!("no {resource} is allocatable"))?;
        ensure!(!amount.0.starts_with('0'), "{resource}: {}", amount.0);
    }
    // What a person looks at first.
    let shown = scope.kubectl().run(&["get", "nodes", "-o", "wide"]).await?;
    let line = shown
        .lines()
        .find(|line| line.starts_with(&scope.node_name()))
        .unwrap_or_default();
    ensure!(line.split_whitespace().nth(1) == Some("Ready"), "{shown}");
    Ok(())
}

async fn the_lease_is_renewed_and_belongs_to_the_node(scope: &Scope) -> anyhow::Result<()> {
    let name = scope.node_name();
    let node = nodes(scope).get(&name).await?;
    let first = scope
        .wait("the lease", async || {
            leases(scope).get(&name).await.map_err(|e| e.to_string())
        })
        .await?;
    let owners = first.owner_references();
    ensure!(
        owners.len() == 1 && Some(&owners[0].uid) == node.metadata.uid.as_ref() && owners[0].kind == "Node",
        "{owners:?}"
    );
    let spec = first.spec.context("the lease has no spec")?;
    ensure!(spec.holder_identity.as_deref() == Some(&name), "{spec:?}");
    ensure!(spec.lease_duration_seconds == Some(40), "{spec:?}");
    let renewed = spec.renew_time.context("the lease was never renewed")?;
    scope
        .wait("that the lease is renewed", async || {
            let lease = leases(scope).get(&name).await.map_err(|e| e.to_string())?;
            let now = lease
                .spec
                .and_then(|spec| spec.renew_time)
                .ok_or("no renew time")?;
            if now.0 > renewed.0 {
                Ok(())
            } else {
                Err(format!("{:?}", now.0))
            }
        })
        .await
}

async fn a_restart_adopts_the_node_and_what_others_wrote_on_it(scope: &Scope) -> anyhow::Result<()> {
    let name = scope.node_name();
    let theirs = json!({"metadata": {
        "labels": {"e2e.example/zone": "north"},
        "annotations": {"e2e.example/note": "mine"},
    }});
    let before = nodes(scope)
        .patch(&name, &PatchParams::default(), &Patch::Merge(&theirs))
        .await?;
    let bystander = scope
        .start(pod("bystander", json!({"containers": [idle()]})))
        .await?;
    scope.lab().kill("virtual-node").await?;
    scope.lab().start("virtual-node").await?;
    scope
        .lab()
        .cluster()
        .wait_node(&name, spindrift_tests::scope::PATIENCE)
        .await?;
    // A lease renewed by the new process: it has got through its start.
    the_lease_is_renewed_and_belongs_to_the_node(scope).await?;
    let after = nodes(scope).get(&name).await?;
    ensure!(after.uid() == before.uid(), "the node was made anew");
    ensure!(
        after.labels().get("e2e.example/zone").map(String::as_str) == Some("north"),
        "the label went"
    );
    ensure!(
        after.annotations().get("e2e.example/note").map(String::as_str) == Some("mine"),
        "the annotation went"
    );
    let still = scope.ready("bystander").await?;
    ensure!(uid(&still) == uid(&bystander), "the pod was made anew");
    ensure!(
        still.status == bystander.status,
        "the pod's status changed: {:?} from {:?}",
        still.status,
        bystander.status
    );
    let clear = json!({"metadata": {
        "labels": {"e2e.example/zone": null},
        "annotations": {"e2e.example/note": null},
    }});
    nodes(scope)
        .patch(&name, &PatchParams::default(), &Patch::Merge(&clear))
        .await?;
    Ok(())
}

async fn a_node_deleted_at_runtime_comes_back_and_its_pods_stay(scope: &Scope) -> anyhow::Result<()> {
    let name = scope.node_name();
    let bystander = scope
        .start(pod("bystander", json!({"containers": [idle()]})))
        .await?;
    let before: BTreeMap<String, Option<u32>> = spindrift_tests::containers::on_hosts(scope.lab())
        .await?
        .into_iter()
        .map(|c| (c.id, c.pid))
        .collect();
    let old = nodes(scope).get(&name).await?;
    nodes(scope).delete(&name, &DeleteParams::default()).await?;
    let new = scope
        .wait("that the node is back and Ready", async || {
            let node = nodes(scope).get_opt(&name).await.map_err(|e| e.to_string())?;
            let node = node.ok_or("it is not there")?;
            if node.uid() != old.uid() && condition(&node, "Ready") == Some("True") {
                Ok(node)
            } else {
                Err(format!(
                    "uid {:?}, Ready {:?}",
                    node.uid(),
                    condition(&node, "Ready")
                ))
            }
        })
        .await?;
    scope
        .wait("that the lease belongs to the new node", async || {
            let lease = leases(scope).get(&name).await.map_err(|e| e.to_string())?;
            let owners: Vec<String> = lease.owner_references().iter().map(|o| o.uid.clone()).collect();
            if Some(&owners[..]) == new.uid().as_ref().map(std::slice::from_ref) {
                Ok(())
            } else {
                Err(format!("{owners:?}"))
            }
        })
        .await?;
    // It takes pods as before, and nothing happened to the one it had.
    scope
        .start(pod("newcomer", json!({"containers": [idle()]})))
        .await?;
    let still = scope.pod("bystander").await?;
    ensure!(
        uid(&still) == uid(&bystander) && still.metadata.deletion_timestamp.is_none(),
        "{still:?}"
    );
    let after: BTreeMap<String, Option<u32>> = spindrift_tests::containers::on_hosts(scope.lab())
        .await?
        .into_iter()
        .map(|c| (c.id, c.pid))
        .collect();
    for (id, pid) in before {
        ensure!(
            after.get(&id) == Some(&pid),
            "container {id} does not run as before"
        );
    }
    Ok(())
}
