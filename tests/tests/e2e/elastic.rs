//! Hosts that come when pods need them, and go. These run where the lab has none of its
//! own (`SPINDRIFT_TEST_ELASTIC=true`): Karpenter, its provider and the lab's driver are
//! the real ones.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, ensure};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Node, Pod, Secret},
};
use kube::{
    Api, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};
use spindrift_local::{
    cell::Cell,
    driver::{self, Stock},
    elastic,
    netns::Namespace,
};
use spindrift_tests::{
    Scope,
    workload::{agnhost, condition, deployment, is_ready, phase, pod, summary},
};

use super::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Alone:
        from_no_host_eight_pods_bring_hosts_and_their_end_leaves_none,
        what_is_sold_out_leaves_a_pod_waiting_and_another_shape_in_another_zone_is_brought,
        karpenter_makes_tokens_of_hosts_and_reads_no_secret,
    ]
}

/// A host is made in seconds; two cores may be building something else.
const HOSTS_COME: Duration = Duration::from_secs(150);
/// Karpenter waits until a host was empty for ten seconds and looks again after
/// fifteen; then it is drained and removed.
const HOSTS_GO: Duration = Duration::from_secs(150);

fn cell(scope: &Scope) -> anyhow::Result<&Cell> {
    scope.lab().cell().context("the lab has no cell")
}

async fn nodes(scope: &Scope) -> anyhow::Result<Vec<Node>> {
    let api: Api<Node> = Api::all(cell(scope)?.cluster().client());
    Ok(api.list(&ListParams::default()).await?.items)
}

async fn node_claims(scope: &Scope) -> anyhow::Result<Vec<DynamicObject>> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("karpenter.sh", "v1", "NodeClaim"));
    let api: Api<DynamicObject> = Api::all_with(cell(scope)?.cluster().client(), &resource);
    Ok(api.list(&ListParams::default()).await?.items)
}

/// Pods that ask for so many thousandths of a core.
fn wanting(cpu: &str) -> Value {
    let mut container = agnhost(&["pause"]);
    container["resources"] = json!({"requests": {"cpu": cpu, "memory": "32Mi"}});
    json!({"terminationGracePeriodSeconds": 1, "containers": [container]})
}

/// Waits until neither the cell, nor the driver, nor the machine has a host.
async fn no_host_is_left(scope: &Scope) -> anyhow::Result<()> {
    let layout = scope.lab().layout();
    scope
        .wait_within(HOSTS_GO, "that no host is left", async || {
            let told = |error: anyhow::Error| format!("{error:#}");
            let nodes = nodes(scope).await.map_err(told)?.len();
            let claims = node_claims(scope).await.map_err(told)?.len();
            let prefix = layout.namespace("host-");
            let namespaces = Namespace::existing()
                .into_iter()
                .filter(|namespace| namespace.name().starts_with(&prefix))
                .count();
            let directories = [layout.state(), layout.data()]
                .iter()
                .flat_map(std::fs::read_dir)
                .flatten()
                .flatten()
                .filter(|entry| entry.file_name().to_string_lossy().starts_with("host-"))
                .count();
            let left = [nodes, claims, namespaces, directories];
            if left == [0; 4] {
                Ok(())
            } else {
                Err(format!(
                    "{nodes} Nodes, {claims} NodeClaims, {namespaces} namespaces, {directories} directories"
                ))
            }
        })
        .await
}

async fn from_no_host_eight_pods_bring_hosts_and_their_end_leaves_none(scope: &Scope) -> anyhow::Result<()> {
    no_host_is_left(scope).await?;
    scope.create(deployment("web", 8, wanting("400m"))).await?;
    let pods = scope
        .wait_within(HOSTS_COME, "eight Ready pods", async || {
            let all = ListParams::default();
            let pods = scope
                .api::<Pod>()
                .list(&all)
                .await
                .map_err(|e| e.to_string())?
                .items;
            if pods.len() == 8 && pods.iter().all(is_ready) {
                Ok(pods)
            } else {
                Err(pods.iter().map(summary).collect::<Vec<_>>().join("\n    "))
            }
        })
        .await?;
    scope
        .event(&pods[0].name_any(), "WaitingForHost", "no nodes available")
        .await?;
    scope.event(&pods[0].name_any(), "HostFound", "").await?;

    // What Karpenter thinks a host has is what the host says it has.
    let shapes = elastic::shapes();
    let hosts = nodes(scope).await?;
    ensure!(
        hosts.len() >= 2,
        "eight pods of 400m fit on {} hosts",
        hosts.len()
    );
    let claimed: BTreeSet<String> = node_claims(scope)
        .await?
        .iter()
        .filter_map(|claim| Some(claim.data["status"]["providerID"].as_str()?.to_owned()))
        .collect();
    for host in &hosts {
        let name = host.name_any();
        let spec = host.spec.clone().unwrap_or_default();
        let id = spec.provider_id.unwrap_or_default();
        ensure!(
            claimed.contains(&id),
            "{name} is {id:?}, of which no NodeClaim knows"
        );
        let taints: Vec<String> = spec
            .taints
            .unwrap_or_default()
            .into_iter()
            .map(|t| t.key)
            .collect();
        ensure!(
            taints.contains(&"spindrift.dev/pool".to_owned())
                && !taints.contains(&"karpenter.sh/unregistered".to_owned()),
            "{name} has the taints {taints:?}"
        );
        let labels = host.labels();
        let label = |key: &str| labels.get(key).map(String::as_str).unwrap_or_default();
        ensure!(label("spindrift.dev/class") == elastic::CLASS, "{labels:?}");
        ensure!(
            elastic::ZONES.contains(&label("topology.kubernetes.io/zone")),
            "{labels:?}"
        );
        let shape = shapes
            .iter()
            .find(|shape| shape.name == label("node.kubernetes.io/instance-type"))
            .with_context(|| format!("{name} is of no shape: {labels:?}"))?;
        let allocatable = host
            .status
            .clone()
            .and_then(|s| s.allocatable)
            .unwrap_or_default();
        for (resource, wanted) in &shape.allocatable {
            let has = allocatable.get(resource).map(|q| q.0.clone()).unwrap_or_default();
            let told = amount(&has).zip(amount(wanted));
            ensure!(
                told.is_some_and(|(has, wanted)| has == wanted),
                "{name} offers {has} of {resource}, and its shape {wanted}"
            );
        }
    }
    let secrets: Api<Secret> = Api::namespaced(cell(scope)?.cluster().client(), "kube-system");
    scope
        .wait("that no token outlives its host's joining", async || {
            let all = secrets
                .list(&ListParams::default())
                .await
                .map_err(|e| e.to_string())?;
            let tokens: Vec<String> = all.items.iter().map(ResourceExt::name_any).collect();
            if tokens.iter().any(|name| name.starts_with("bootstrap-token-")) {
                Err(tokens.join(", "))
            } else {
                Ok(())
            }
        })
        .await?;

    scope
        .patch::<Deployment>("web", json!({"spec": {"replicas": 0}}))
        .await?;
    no_host_is_left(scope).await
}

/// In thousandths: of `1930m`, `110`, `3909091328`, `3817472Ki`.
fn amount(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..end].parse().ok()?;
    Some(match &text[end..] {
        "m" => number,
        "" => number * 1000,
        "Ki" => (number * 1000) << 10,
        "Mi" => (number * 1000) << 20,
        "Gi" => (number * 1000) << 30,
        _ => return None,
    })
}

async fn what_is_sold_out_leaves_a_pod_waiting_and_another_shape_in_another_zone_is_brought(
    scope: &Scope,
) -> anyhow::Result<()> {
    no_host_is_left(scope).await?;
    let file = driver::stock_file(scope.lab().layout());
    let stocked = |small, medium: [usize; 2]| -> anyhow::Result<()> {
        let zones = |left: [usize; 2]| elastic::ZONES.map(str::to_owned).into_iter().zip(left).collect();
        let stock = Stock::from([
            ("small".to_owned(), zones(small)),
            ("medium".to_owned(), zones(medium)),
        ]);
        Ok(std::fs::write(&file, serde_json::to_vec(&stock)?)?)
    };
    stocked([0, 0], [0, 0])?;
    let held = async {
        scope.create(pod("lonely", wanting("100m"))).await?;
        let waits = scope
            .until("lonely", "waits for a host", |pod| {
                condition(pod, "spindrift.dev/HostFound") == Some("False")
            })
            .await?;
        ensure!(phase(&waits) == "Pending", "{}", summary(&waits));
        scope.event("lonely", "WaitingForHost", "").await?;
        let karpenter = scope.journal();
        scope
            .wait("that all four offerings were asked for and refused", async || {
                let refused = karpenter.since(driver::COMPONENT).map_err(|e| e.to_string())?;
                let refused = refused.iter().filter(|line| line.contains("an order is refused"));
                match refused.count() {
                    0..4 => Err("fewer".into()),
                    _ => Ok(()),
                }
            })
            .await?;
        ensure!(nodes(scope).await?.is_empty(), "a host came from nowhere");
        // One is left, the dearer, elsewhere.
        stocked([0, 0], [0, 1])?;
        scope
            .until_within(HOSTS_COME, "lonely", "is Ready", is_ready)
            .await?;
        let hosts = nodes(scope).await?;
        ensure!(hosts.len() == 1, "{} hosts came for one pod", hosts.len());
        let labels = hosts[0].labels();
        ensure!(
            labels["node.kubernetes.io/instance-type"] == "medium"
                && labels["topology.kubernetes.io/zone"] == elastic::ZONES[1],
            "{labels:?}"
        );
        anyhow::Ok(())
    }
    .await;
    std::fs::remove_file(&file)?;
    held
}

async fn karpenter_makes_tokens_of_hosts_and_reads_no_secret(scope: &Scope) -> anyhow::Result<()> {
    let as_karpenter = cell(scope)?.user(elastic::KARPENTER)?.client();
    let secrets: Api<Secret> = Api::namespaced(as_karpenter, "kube-system");
    let forbidden = |what: &str, result: Result<(), kube::Error>| match result {
        Err(kube::Error::Api(status)) if status.code == 403 || status.code == 422 => {
            Ok(status.message.clone())
        }
        other => Err(anyhow::anyhow!("{what}: {other:?}")),
    };
    let list = secrets.list(&ListParams::default()).await.map(drop);
    forbidden("it listed the Secrets", list)?;
    let get = secrets.get("bootstrap-token-000000").await.map(drop);
    forbidden("it read a Secret", get)?;
    let token = |kind: &str, group: &str, annotated: bool| -> anyhow::Result<Secret> {
        let annotations = if annotated {
            json!({"spindrift.dev/host": "host-x"})
        } else {
            json!({})
        };
        Ok(serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Secret", "type": kind,
            "metadata": {"name": "bootstrap-token-000000", "annotations": annotations},
            "stringData": {
                "token-id": "000000", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true",
                "auth-extra-groups": group,
            },
        }))?)
    };
    let hosts = "system:bootstrappers:spindrift";
    let bootstrap = "bootstrap.kubernetes.io/token";
    for (what, secret) in [
        ("an opaque Secret", token("Opaque", hosts, true)?),
        ("a token of no host", token(bootstrap, hosts, false)?),
        (
            "a token of another group",
            token(bootstrap, "system:bootstrappers:masters", true)?,
        ),
    ] {
        let made = secrets.create(&Default::default(), &secret).await.map(drop);
        let why = forbidden(what, made)?;
        ensure!(why.contains("spindrift-karpenter"), "{what}: {why}");
    }
    secrets
        .create(&Default::default(), &token(bootstrap, hosts, true)?)
        .await?;
    secrets
        .delete("bootstrap-token-000000", &Default::default())
        .await?;
    // Not one of its own making: it is there in every cell.
    let admin: Api<Secret> = Api::namespaced(cell(scope)?.cluster().client(), "kube-system");
    let other: Secret = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "another"}, "stringData": {"key": "value"},
    }))?;
    admin.create(&Default::default(), &other).await?;
    let deleted = secrets.delete("another", &Default::default()).await.map(drop);
    let refused = forbidden("it removed another's Secret", deleted);
    admin.delete("another", &Default::default()).await?;
    refused.map(drop)
}
