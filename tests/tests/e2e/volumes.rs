//! What containers find in their volumes, and how it follows its source.

use anyhow::{Context, ensure};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use serde_json::{Value, json};
use spindrift_tests::{
    Scope,
    workload::{config_map, idle, is_running, merge, pod, secret, shell, uid},
};

use super::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        an_empty_dir_is_shared_by_containers_and_outlives_them,
        a_config_map_volume_follows_its_source,
        a_secret_volume_has_its_modes_and_is_kept_in_memory,
        a_downward_volume_follows_the_labels,
        a_projected_token_is_the_pods_own,
        a_sub_path_is_mounted_alone,
    ]
}

fn mounting(container: Value, name: &str, path: &str) -> Value {
    merge(
        container,
        json!({"volumeMounts": [{"name": name, "mountPath": path}]}),
    )
}

/// Waits until a command in the pod prints the text.
async fn prints(scope: &Scope, pod: &str, command: &[&str], wanted: &str) -> anyhow::Result<()> {
    scope
        .wait(&format!("{command:?} to print {wanted:?}"), async || {
            let answer = scope
                .kubectl()
                .exec(pod, command)
                .await
                .map_err(|e| format!("{e:#}"))?;
            if answer.out.trim() == wanted {
                Ok(())
            } else {
                Err(format!("{answer:?}"))
            }
        })
        .await
}

async fn an_empty_dir_is_shared_by_containers_and_outlives_them(scope: &Scope) -> anyhow::Result<()> {
    let writer = shell("date +%s%N >> /data/starts; cat /data/starts | wc -l; sleep 1; exit 1");
    let writer = merge(mounting(writer, "data", "/data"), json!({"name": "writer"}));
    let reader = mounting(idle(), "data", "/theirs");
    scope
        .create(pod(
            "web",
            json!({
                "containers": [reader, writer],
                "volumes": [{"name": "data", "emptyDir": {}}, {"name": "quick", "emptyDir": {"medium": "Memory"}}],
            }),
        ))
        .await?;
    scope
        .until("web", "runs its reader", |pod| is_running(pod, "main"))
        .await?;
    prints(
        scope,
        "web",
        &["sh", "-c", "test $(wc -l < /theirs/starts) -ge 2 && echo both"],
        "both",
    )
    .await
}

async fn a_config_map_volume_follows_its_source(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(config_map("paint", json!({"colour": "teal", "shade": "dark"})))
        .await?;
    scope
        .start(pod(
            "web",
            json!({
                "containers": [mounting(idle(), "paint", "/paint")],
                "volumes": [{"name": "paint", "configMap": {"name": "paint", "items": [
                    {"key": "colour", "path": "nested/colour"}, {"key": "shade", "path": "shade"},
                ]}}],
            }),
        ))
        .await?;
    let both = ["sh", "-c", "cat /paint/nested/colour; echo; cat /paint/shade"];
    prints(scope, "web", &both, "teal\ndark").await?;
    // One directory behind one link: a reader never sees one new and one old.
    prints(scope, "web", &["readlink", "/paint/shade"], "..data/shade").await?;
    scope
        .patch::<ConfigMap>("paint", json!({"data": {"colour": "ochre", "shade": "light"}}))
        .await?;
    prints(scope, "web", &both, "ochre\nlight").await
}

async fn a_secret_volume_has_its_modes_and_is_kept_in_memory(scope: &Scope) -> anyhow::Result<()> {
    scope.create(secret("vault", json!({"word": "sesame"}))).await?;
    scope
        .start(pod(
            "web",
            json!({
                "containers": [mounting(idle(), "vault", "/vault")],
                "volumes": [{"name": "vault", "secret": {"secretName": "vault", "defaultMode": 0o400}}],
            }),
        ))
        .await?;
    prints(scope, "web", &["cat", "/vault/word"], "sesame").await?;
    prints(scope, "web", &["stat", "-L", "-c", "%a", "/vault/word"], "400").await?;
    let write = scope.kubectl().exec("web", &["touch", "/vault/new"]).await?;
    ensure!(
        write.code != Some(0) && write.err.contains("Read-only"),
        "{write:?}"
    );
    let kind = scope
        .kubectl()
        .exec_ok("web", &["stat", "-f", "-c", "%T", "/vault"])
        .await?;
    ensure!(kind.trim() == "tmpfs", "secrets lie on {kind}");
    scope
        .patch::<Secret>("vault", json!({"stringData": {"word": "open"}}))
        .await?;
    prints(scope, "web", &["cat", "/vault/word"], "open").await
}

async fn a_downward_volume_follows_the_labels(scope: &Scope) -> anyhow::Result<()> {
    let volume = json!({"name": "self", "downwardAPI": {"items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}},
    ]}});
    scope
        .start(pod(
            "web",
            json!({"containers": [mounting(idle(), "self", "/self")], "volumes": [volume]}),
        ))
        .await?;
    prints(scope, "web", &["cat", "/self/name"], "web").await?;
    prints(scope, "web", &["cat", "/self/labels"], "app=\"web\"").await?;
    scope
        .patch::<Pod>("web", json!({"metadata": {"labels": {"tier": "front"}}}))
        .await?;
    prints(
        scope,
        "web",
        &["sh", "-c", "cat /self/labels"],
        "app=\"web\"\ntier=\"front\"",
    )
    .await
}

async fn a_projected_token_is_the_pods_own(scope: &Scope) -> anyhow::Result<()> {
    let volume = json!({"name": "token", "projected": {"sources": [
        {"serviceAccountToken": {"path": "token", "audience": "https://kubernetes.default.svc.cluster.local", "expirationSeconds": 600}},
    ]}});
    let web = scope
        .start(pod(
            "web",
            json!({"containers": [mounting(idle(), "token", "/token")], "volumes": [volume]}),
        ))
        .await?;
    let token = scope.kubectl().exec_ok("web", &["cat", "/token/token"]).await?;
    let review = TokenReview {
        metadata: ObjectMeta::default(),
        spec: TokenReviewSpec {
            token: token.trim().to_owned(),
            audiences: None,
        },
        status: None,
    };
    let reviews: Api<TokenReview> = Api::all(scope.client());
    let status = reviews
        .create(&PostParams::default(), &review)
        .await?
        .status
        .context("no answer")?;
    ensure!(status.authenticated == Some(true), "{status:?}");
    let user = status.user.unwrap_or_default();
    let wanted = format!("system:serviceaccount:{}:default", scope.namespace());
    ensure!(user.username.as_deref() == Some(&wanted), "{user:?}");
    let extra = user.extra.unwrap_or_default();
    let bound = extra
        .get("authentication.kubernetes.io/pod-uid")
        .cloned()
        .unwrap_or_default();
    ensure!(bound == [uid(&web)], "it is bound to {bound:?}");
    // The one every pod gets, with the cluster's authority beside it.
    let own = scope
        .kubectl()
        .exec_ok("web", &["ls", "/var/run/secrets/kubernetes.io/serviceaccount"])
        .await?;
    ensure!(
        own.split_whitespace().eq(["ca.crt", "namespace", "token"]),
        "{own}"
    );
    Ok(())
}

async fn a_sub_path_is_mounted_alone(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(config_map("paint", json!({"colour": "teal", "shade": "dark"})))
        .await?;
    let main = merge(
        idle(),
        json!({"volumeMounts": [{"name": "paint", "mountPath": "/etc/colour", "subPath": "colour"}]}),
    );
    scope
        .start(pod(
            "web",
            json!({"containers": [main], "volumes": [{"name": "paint", "configMap": {"name": "paint"}}]}),
        ))
        .await?;
    prints(scope, "web", &["cat", "/etc/colour"], "teal").await?;
    // The rest of /etc is the image's.
    scope
        .kubectl()
        .exec_ok("web", &["test", "-e", "/etc/passwd"])
        .await?;
    Ok(())
}
