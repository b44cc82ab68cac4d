//! A cell as `deploy/cell` sets it up, on a real API server without hosts: what a
//! tenant's virtual node may do with its credential, and what it is refused. Needs
//! root and what `deploy/local/tools` installs; fails where it cannot run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::{Node, Pod, Secret},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use spindrift_local::{
    Lab, Options, Progress,
    cell::{Cell, QUOTA, Quota, TIER},
    cluster::{self, Cluster},
    lab::{self, Extent},
};

const INSTANCE: &str = "e2e-cell";
const PATIENCE: Duration = Duration::from_secs(60);

/// One cell for all that is tried, with two tenants.
#[tokio::test]
async fn a_virtual_node_gets_claims_of_its_own_and_nothing_else() -> Result<()> {
    let progress = Progress::silent();
    lab::down(&INSTANCE.parse()?, &progress).await?;
    let options = Options {
        extent: Extent::ControlPlane,
        cell: true,
        hosts: 1,
        ..Options::for_tests(INSTANCE.parse()?, spindrift_local::cache::standard()?)
    };
    let lab = Lab::up(&options, &progress).await?;
    let tried = attempts(&lab).await;
    lab::down(&INSTANCE.parse()?, &progress).await?;
    tried
}

async fn attempts(lab: &Lab) -> Result<()> {
    let cell = lab.cell().context("the lab has no cell")?;
    let admin = cell.cluster().client();
    let (ours, theirs) = (Cell::namespace("ours"), Cell::namespace("theirs"));
    let small = Quota { pods: "2", ..QUOTA };
    cell.admit_tenant("theirs", &QUOTA).await?;
    cell.admit_tenant("ours", &small).await?;
    for namespace in [&ours, &theirs] {
        cell.cluster().wait_service_account(namespace, PATIENCE).await?;
    }
    let node = cell.user("virtual-node:ours")?;
    a_claim_is_taken_listed_and_deleted(&node, &ours).await?;
    each_other_shape_is_refused(&node.client(), &ours).await?;
    nothing_else_is_allowed(&node.client(), &admin, &ours, &theirs).await?;
    the_quota_is_told_and_holds(&node.client(), &ours).await
}

/// As the virtual node makes it.
fn claim(uid: &str, attempt: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{uid}-{attempt}"),
            "labels": {
                "spindrift.dev/pod-uid": uid,
                "spindrift.dev/attempt": attempt.to_string(),
                "spindrift.dev/owner": "o-1",
            },
            "annotations": {"spindrift.dev/pod": "shop/web", "spindrift.dev/node": "n"},
        },
        "spec": {
            "priorityClassName": TIER,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 60,
            "automountServiceAccountToken": false,
            "tolerations": [{"key": "spindrift.dev/pool", "operator": "Exists", "effect": "NoSchedule"}],
            "containers": [{
                "name": "image-0", "image": "app:1",
                "resources": {"requests": {"cpu": "1", "memory": "1Mi", "ephemeral-storage": "0"}},
            }],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 100,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": {"matchLabels": {"spindrift.dev/owner": "o-1"}},
                },
            }]}},
        },
    })
}

async fn create(client: &Client, namespace: &str, manifest: Value) -> Result<Pod, kube::Error> {
    let pod: Pod = serde_json::from_value(manifest).map_err(kube::Error::SerdeError)?;
    Api::namespaced(client.clone(), namespace)
        .create(&PostParams::default(), &pod)
        .await
}

async fn a_claim_is_taken_listed_and_deleted(node: &Cluster, ours: &str) -> Result<()> {
    let claims: Api<Pod> = Api::namespaced(node.client(), ours);
    // A new namespace and its quota reach admission by watches.
    cluster::wait("the first claim", PATIENCE, async || {
        create(&node.client(), ours, claim("u-1", 1))
            .await
            .map(drop)
            .map_err(|e| e.to_string())
    })
    .await?;
    let listed = claims.list(&ListParams::default()).await?;
    ensure!(listed.items.len() == 1 && listed.items[0].name_any() == "u-1-1");
    claims.delete("u-1-1", &DeleteParams::default()).await?;
    cluster::wait("its end", PATIENCE, async || {
        match claims.get_opt("u-1-1").await.map_err(|e| e.to_string())? {
            None => Ok(()),
            Some(_) => Err("still there".into()),
        }
    })
    .await?;
    Ok(())
}

/// What is changed of a claim, and the words it is refused with.
fn attacks() -> Vec<(&'static str, Value, &'static str)> {
    let container = |field: &str, value: Value| {
        let mut container = claim("u-2", 1)["spec"]["containers"][0].clone();
        container[field] = value;
        json!([container])
    };
    let pool = json!({"key": "spindrift.dev/pool", "operator": "Exists", "effect": "NoSchedule"});
    let unreachable =
        json!({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"});
    let term = json!({
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"spindrift.dev/owner": "o-2"}},
        "namespaceSelector": {},
    });
    vec![
        ("/spec/nodeName", json!("host-a"), "names no node"),
        ("/spec/schedulerName", json!("mine"), "default scheduler"),
        (
            "/spec/tolerations",
            json!([pool, {"operator": "Exists"}]),
            "tolerates the pool's taint and no other",
        ),
        (
            "/spec/tolerations",
            json!([pool, {"key": "dedicated", "operator": "Exists"}]),
            "tolerates the pool's taint and no other",
        ),
        (
            "/spec/tolerations",
            json!([pool, unreachable]),
            "tolerates the pool's taint and no other",
        ),
        ("/metadata/name", json!("u-2-2"), "named UID-ATTEMPT"),
        ("/metadata/labels", json!({}), "named UID-ATTEMPT"),
        (
            "/metadata/annotations",
            json!({"spindrift.dev/agent": "192.0.2.99:7443"}),
            "the agent's to say",
        ),
        (
            "/metadata/finalizers",
            json!(["tenant.example/never"]),
            "no finalizers",
        ),
        (
            "/metadata/ownerReferences",
            json!([{"apiVersion": "v1", "kind": "Node", "name": "host-a", "uid": "1"}]),
            "no owners",
        ),
        (
            "/spec/priorityClassName",
            json!("system-node-critical"),
            "priority class",
        ),
        (
            "/spec/priorityClassName",
            json!("spindrift-spot"),
            "priority class",
        ),
        ("/spec/priorityClassName", Value::Null, "priority class"),
        ("/spec/hostNetwork", json!(true), "nothing of the host"),
        ("/spec/hostPID", json!(true), "nothing of the host"),
        ("/spec/hostIPC", json!(true), "nothing of the host"),
        (
            "/spec/volumes",
            json!([{"name": "v", "hostPath": {"path": "/"}}]),
            "no volumes",
        ),
        (
            "/spec/initContainers",
            json!([{"name": "i", "image": "app:1"}]),
            "no other containers",
        ),
        (
            "/spec/schedulingGates",
            json!([{"name": "tenant.example/gate"}]),
            "no other containers",
        ),
        (
            "/spec/automountServiceAccountToken",
            json!(true),
            "no service account",
        ),
        ("/spec/serviceAccountName", json!("other"), "service account"),
        ("/spec/restartPolicy", json!("Always"), "never restarted"),
        (
            "/spec/terminationGracePeriodSeconds",
            json!(3601),
            "an hour at most",
        ),
        // What fills the cell, or is the cell's to say.
        ("/spec/hostname", json!("x"), "nothing of names"),
        (
            "/spec/hostAliases",
            json!([{"ip": "192.0.2.1", "hostnames": ["x"]}]),
            "nothing of names",
        ),
        ("/spec/dnsConfig", json!({"searches": ["x"]}), "nothing of names"),
        ("/spec/hostUsers", json!(true), "nothing of names"),
        (
            "/spec/securityContext",
            json!({"supplementalGroups": [0]}),
            "nothing of names",
        ),
        (
            "/spec/containers",
            container("image", json!("x".repeat(1025))),
            "none of its texts is long",
        ),
        (
            "/metadata/annotations",
            json!({"spindrift.dev/pod": "x".repeat(513)}),
            "none of its texts is long",
        ),
        (
            "/metadata/annotations",
            json!({"tenant.example/x": "y"}),
            "none of its texts is long",
        ),
        ("/spec/containers", container("command", json!(["sh"])), "no more"),
        (
            "/spec/containers",
            container("securityContext", json!({"privileged": true})),
            "",
        ),
        (
            "/spec/containers",
            container("ports", json!([{"containerPort": 1, "hostPort": 1}])),
            "no more",
        ),
        (
            "/spec/nodeSelector",
            json!({"kubernetes.io/hostname": "host-a"}),
            "not for a host",
        ),
        (
            "/spec/affinity",
            json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 1,
                "preference": {"matchExpressions": [
                    {"key": "kubernetes.io/hostname", "operator": "In", "values": ["host-a"]},
                ]},
            }]}}),
            "by its node selector",
        ),
        (
            "/spec/affinity",
            json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "labelSelector": {}},
            ]}}),
            "asks for no neighbours",
        ),
        (
            "/spec/affinity",
            json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "podAffinityTerm": term},
            ]}}),
            "asks for no neighbours",
        ),
        (
            "/spec/affinity",
            json!({"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "podAffinityTerm": term},
            ]}}),
            "asks for no neighbours",
        ),
    ]
}

async fn each_other_shape_is_refused(node: &Client, ours: &str) -> Result<()> {
    for (path, value, said) in attacks() {
        let mut manifest = claim("u-2", 1);
        let (parent, field) = path.rsplit_once('/').context("no path")?;
        let told = format!("{path}: {value}");
        manifest.pointer_mut(parent).context("no such field")?[field] = value;
        match create(node, ours, manifest).await {
            Ok(_) => anyhow::bail!("taken: {told}"),
            Err(kube::Error::Api(status)) => {
                ensure!(
                    [403, 422].contains(&status.code) && status.message.contains(said),
                    "{told}: {status:?}"
                );
            }
            Err(error) => return Err(error).context(told),
        }
    }
    Ok(())
}

/// Each is refused by the cell's RBAC.
async fn nothing_else_is_allowed(node: &Client, admin: &Client, ours: &str, theirs: &str) -> Result<()> {
    let made = create(node, ours, claim("u-3", 1)).await?;
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding",
        "metadata": {"name": made.name_any()},
        "target": {"apiVersion": "v1", "kind": "Node", "name": "host-a"},
    });
    let bind = http::Request::post(format!("/api/v1/namespaces/{ours}/pods/u-3-1/binding"))
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&binding)?)?;
    forbidden("binds a claim itself", node.request_text(bind).await)?;
    let pods: Api<Pod> = Api::namespaced(node.clone(), ours);
    // Of one that is bound: what is bound to no host goes at once.
    let bind = http::Request::post(format!("/api/v1/namespaces/{ours}/pods/u-3-1/binding"))
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&binding)?)?;
    admin.request_text(bind).await?;
    let forever = DeleteParams::default().grace_period(3601);
    let refused = pods.delete("u-3-1", &forever).await;
    ensure!(
        matches!(&refused, Err(kube::Error::Api(status)) if status.message.contains("an hour at most")),
        "it stretches a claim's end: {refused:?}"
    );
    let labels = Patch::Merge(json!({"metadata": {"labels": {"spindrift.dev/attempt": "9"}}}));
    let patched = pods.patch("u-3-1", &PatchParams::default(), &labels).await;
    forbidden("changes a claim", patched)?;
    let status = Patch::Merge(json!({"metadata": {"annotations": {"spindrift.dev/agent": "192.0.2.99:1"}}}));
    let patched = pods.patch_status("u-3-1", &PatchParams::default(), &status).await;
    forbidden("says where the agent is", patched)?;

    create(admin, theirs, claim("u-4", 1)).await?;
    forbidden(
        "claims in another namespace",
        create(node, theirs, claim("u-5", 1)).await,
    )?;
    let others: Api<Pod> = Api::namespaced(node.clone(), theirs);
    forbidden("reads another's claim", others.get("u-4-1").await)?;
    forbidden(
        "deletes another's claim",
        others.delete("u-4-1", &DeleteParams::default()).await,
    )?;
    let all: Api<Pod> = Api::all(node.clone());
    forbidden("lists everybody's claims", all.list(&ListParams::default()).await)?;
    let nodes: Api<Node> = Api::all(node.clone());
    forbidden("reads the hosts", nodes.list(&ListParams::default()).await)?;
    let secrets: Api<Secret> = Api::namespaced(node.clone(), "kube-system");
    forbidden(
        "reads the hosts' tokens",
        secrets.list(&ListParams::default()).await,
    )?;
    // Whatever else there is: what the API server itself says.
    for (group, resource, verb) in [
        ("", "namespaces", "list"),
        ("", "resourcequotas", "update"),
        ("", "events", "list"),
        ("certificates.k8s.io", "certificatesigningrequests", "create"),
        ("coordination.k8s.io", "leases", "get"),
        ("rbac.authorization.k8s.io", "rolebindings", "create"),
    ] {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(ours.to_owned()),
                    group: Some(group.to_owned()),
                    resource: Some(resource.to_owned()),
                    verb: Some(verb.to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = Api::all(node.clone())
            .create(&PostParams::default(), &review)
            .await?;
        let allowed = answer.status.is_none_or(|status| status.allowed);
        ensure!(!allowed, "may {verb} {resource}");
    }
    pods.delete("u-3-1", &DeleteParams::default()).await?;
    Ok(())
}

fn forbidden<T>(what: &str, answer: Result<T, kube::Error>) -> Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains("cannot") => Ok(()),
        Err(error) => Err(error).with_context(|| what.to_owned()),
        Ok(_) => anyhow::bail!("not refused: a virtual node {what}"),
    }
}

async fn the_quota_is_told_and_holds(node: &Client, ours: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(node.clone(), ours);
    cluster::wait("an empty namespace", PATIENCE, async || {
        match pods
            .list(&ListParams::default())
            .await
            .map_err(|e| e.to_string())?
        {
            none if none.items.is_empty() => Ok(()),
            some => Err(format!("{} claims", some.items.len())),
        }
    })
    .await?;
    for uid in ["u-6", "u-7"] {
        cluster::wait("a claim within the quota", PATIENCE, async || {
            create(node, ours, claim(uid, 1))
                .await
                .map(drop)
                .map_err(|e| e.to_string())
        })
        .await?;
    }
    match create(node, ours, claim("u-8", 1)).await {
        Err(kube::Error::Api(status)) => ensure!(
            status.code == 403 && status.message.contains("exceeded quota"),
            "{status:?}"
        ),
        other => anyhow::bail!("a third claim under a quota of two: {other:?}"),
    }
    Ok(())
}
