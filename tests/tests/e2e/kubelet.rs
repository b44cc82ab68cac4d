//! The kubelet API: logs, exec, port-forward as kubectl uses them, and who may
//! not use it.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, ensure};
use http::StatusCode;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::api::PostParams;
use serde_json::json;
use spindrift_local::{
    pki::{Authority, Subject},
    topology::VIRTUAL_NODE,
};
use spindrift_tests::{
    Scope,
    stranger::{Credentials, Https},
    workload::{PORT, container, idle, merge, netexec, pod, probe_server, shell, uid, waiting},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        logs_are_cut_to_what_was_asked_for,
        logs_of_the_container_before_the_last_restart_are_there,
        logs_are_followed_until_the_container_ends,
        logs_of_a_container_that_has_not_started_say_why,
        exec_gives_the_output_apart_and_the_exit_code,
        exec_reads_standard_input_to_its_end,
        exec_at_a_terminal_is_a_terminal,
        exec_into_what_is_not_there_is_refused,
        attach_shows_what_the_container_prints_from_now_on,
        port_forward_carries_requests_to_the_pod,
        the_kubelets_own_lists_name_the_pods,
        a_call_without_credentials_is_refused,
        a_call_with_a_strangers_certificate_is_refused,
        a_call_with_a_made_up_token_is_refused,
        a_known_user_without_the_right_is_forbidden_and_with_it_is_served,
        reading_the_node_is_no_right_to_run_commands,
    ]
}

const NUMBERS: &str = "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; done; echo oops >&2; sleep 3600";

async fn logs_are_cut_to_what_was_asked_for(scope: &Scope) -> anyhow::Result<()> {
    scope
        .start(pod("web", json!({"containers": [shell(NUMBERS)]})))
        .await?;
    let kubectl = scope.kubectl();
    let all = scope
        .log_until("web", "is whole", |log| log.lines().count() == 11)
        .await?;
    // Both streams are in it, in the order in which they were read of two pipes.
    let said: Vec<&str> = all.lines().filter(|line| *line != "oops").collect();
    let lines: Vec<String> = (1..=10).map(|n| format!("line {n}")).collect();
    ensure!(said == lines, "{all}");
    let tail = kubectl.run(&["logs", "web", "--tail=2"]).await?;
    ensure!(
        tail == all.split_inclusive('\n').skip(9).collect::<String>(),
        "{tail}"
    );
    let none = kubectl.run(&["logs", "web", "--tail=0"]).await?;
    ensure!(none.is_empty(), "{none}");
    let limited = kubectl.run(&["logs", "web", "--limit-bytes=9"]).await?;
    ensure!(limited == all[..9], "{limited:?}");
    let stamped = kubectl.run(&["logs", "web", "--timestamps"]).await?;
    let first = stamped.lines().next().unwrap_or_default();
    let (stamp, text) = first.split_once(' ').context("there is no time stamp")?;
    ensure!(
        stamp.parse::<jiff::Timestamp>().is_ok() && all.lines().next() == Some(text),
        "{first}"
    );
    let later = kubectl
        .run(&["logs", "web", "--since-time=2999-01-01T00:00:00Z"])
        .await?;
    ensure!(later.is_empty(), "{later}");
    let since = kubectl.run(&["logs", "web", "--since=1h"]).await?;
    ensure!(since == all, "{since}");
    Ok(())
}

async fn logs_of_the_container_before_the_last_restart_are_there(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell(
            "if [ -e /data/x ]; then echo second life; sleep 3600; fi; touch /data/x; echo first life; exit 1",
        ),
        json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
    );
    scope
        .create(pod(
            "web",
            json!({"containers": [main], "volumes": [{"name": "data", "emptyDir": {}}]}),
        ))
        .await?;
    scope
        .until("web", "lives again", |pod| {
            container(pod, "main").is_some_and(|c| c.restart_count == 1 && c.ready)
        })
        .await?;
    let kubectl = scope.kubectl();
    scope.log_is("web", "second life").await?;
    let before = kubectl.run(&["logs", "web", "--previous"]).await?;
    ensure!(before == "first life\n", "{before:?}");
    Ok(())
}

async fn logs_are_followed_until_the_container_ends(scope: &Scope) -> anyhow::Result<()> {
    let script = "echo one; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo two; exit 0";
    scope
        .start(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [shell(script)]}),
        ))
        .await?;
    let mut following = scope.kubectl().start(&["logs", "--follow", "web"])?;
    let mut lines = BufReader::new(following.stdout.take().context("no output")?).lines();
    let patience = spindrift_tests::scope::PATIENCE;
    ensure!(
        timeout(patience, lines.next_line()).await?? == Some("one".into()),
        "not the first line"
    );
    scope.kubectl().exec_ok("web", &["touch", "/tmp/go"]).await?;
    ensure!(
        timeout(patience, lines.next_line()).await?? == Some("two".into()),
        "not the second line"
    );
    // It ends by itself with the container.
    ensure!(
        timeout(patience, lines.next_line()).await??.is_none(),
        "there is more"
    );
    ensure!(timeout(patience, following.wait()).await??.success(), "it failed");
    Ok(())
}

async fn logs_of_a_container_that_has_not_started_say_why(scope: &Scope) -> anyhow::Result<()> {
    let main = json!({"name": "main", "image": "spindrift.local/absent:1", "imagePullPolicy": "Never"});
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    scope
        .until("web", "waits", |pod| waiting(pod, "main") == "ErrImageNeverPull")
        .await?;
    let answer = scope.kubectl().ask(&["logs", "web"]).await?;
    ensure!(
        answer.code == Some(1) && answer.err.contains("is waiting to start"),
        "{answer:?}"
    );
    let answer = scope.kubectl().ask(&["logs", "web", "--container=other"]).await?;
    ensure!(
        answer.code == Some(1) && answer.err.contains("other"),
        "{answer:?}"
    );
    Ok(())
}

async fn exec_gives_the_output_apart_and_the_exit_code(scope: &Scope) -> anyhow::Result<()> {
    scope.start(pod("web", json!({"containers": [idle()]}))).await?;
    let answer = scope
        .kubectl()
        .exec("web", &["sh", "-c", "echo to-out; echo to-err >&2; exit 7"])
        .await?;
    ensure!(answer.code == Some(7), "{answer:?}");
    ensure!(
        answer.out == "to-out\n" && answer.err.starts_with("to-err\n"),
        "{answer:?}"
    );
    // More than any buffer on the way.
    let much = scope
        .kubectl()
        .exec_ok("web", &["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"])
        .await?;
    ensure!(much.len() == 3_000_000, "{} bytes", much.len());
    Ok(())
}

async fn exec_reads_standard_input_to_its_end(scope: &Scope) -> anyhow::Result<()> {
    scope.start(pod("web", json!({"containers": [idle()]}))).await?;
    let input = "0123456789abcde\n".repeat(20_000);
    let answer = scope
        .kubectl()
        .ask_with(&["exec", "-i", "web", "--", "wc", "-c"], &input)
        .await?;
    ensure!(
        answer.code == Some(0) && answer.out.trim() == input.len().to_string(),
        "{answer:?}"
    );
    Ok(())
}

async fn exec_at_a_terminal_is_a_terminal(scope: &Scope) -> anyhow::Result<()> {
    scope.start(pod("web", json!({"containers": [idle()]}))).await?;
    let typed = "tty; stty size; echo done-$((40 + 2)); exit 9\n";
    let answer = scope
        .kubectl()
        .at_terminal(&["exec", "-it", "web", "--", "sh"], typed)
        .await?;
    ensure!(answer.out.contains("/dev/pts/"), "{answer:?}");
    ensure!(answer.out.contains("done-42"), "{answer:?}");
    ensure!(answer.code == Some(9), "{answer:?}");
    Ok(())
}

async fn exec_into_what_is_not_there_is_refused(scope: &Scope) -> anyhow::Result<()> {
    scope.start(pod("web", json!({"containers": [idle()]}))).await?;
    let answer = scope
        .kubectl()
        .ask(&["exec", "web", "--container=other", "--", "true"])
        .await?;
    ensure!(
        answer.code == Some(1) && answer.err.contains("other"),
        "{answer:?}"
    );
    let answer = scope.kubectl().exec("web", &["/no/such/program"]).await?;
    ensure!(
        answer.code != Some(0) && answer.err.contains("/no/such/program"),
        "{answer:?}"
    );
    Ok(())
}

async fn attach_shows_what_the_container_prints_from_now_on(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell("while read line; do echo you said $line; done"),
        json!({"stdin": true, "stdinOnce": true}),
    );
    scope
        .start(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [main]}),
        ))
        .await?;
    let answer = scope
        .kubectl()
        .ask_with(&["attach", "-i", "web"], "hello\n")
        .await?;
    ensure!(answer.out.contains("you said hello"), "{answer:?}");
    Ok(())
}

async fn port_forward_carries_requests_to_the_pod(scope: &Scope) -> anyhow::Result<()> {
    scope
        .start(pod("web", json!({"containers": [netexec()]})))
        .await?;
    let mut forwarding = scope
        .kubectl()
        .start(&["port-forward", "pod/web", &format!(":{PORT}")])?;
    let mut lines = BufReader::new(forwarding.stdout.take().context("no output")?).lines();
    let patience = spindrift_tests::scope::PATIENCE;
    let said = timeout(patience, lines.next_line()).await??.context("it ended")?;
    let port = said
        .strip_prefix("Forwarding from 127.0.0.1:")
        .and_then(|rest| rest.split(' ').next()?.parse::<u16>().ok())
        .with_context(|| format!("it said {said:?}"))?;
    for _ in 0..3 {
        let mut connection = TcpStream::connect(("127.0.0.1", port)).await?;
        connection
            .write_all(b"GET /hostname HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
            .await?;
        let mut answer = String::new();
        timeout(patience, connection.read_to_string(&mut answer)).await??;
        ensure!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("web"),
            "{answer}"
        );
    }
    Ok(())
}

async fn the_kubelets_own_lists_name_the_pods(scope: &Scope) -> anyhow::Result<()> {
    let web = scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    let path = |rest: &str| format!("/api/v1/nodes/{}/proxy/{rest}", scope.node_name());
    let pods = scope.kubectl().run(&["get", "--raw", &path("pods")]).await?;
    let pods: serde_json::Value = serde_json::from_str(&pods)?;
    let uids: BTreeSet<&str> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|p| p["metadata"]["uid"].as_str())
        .collect();
    ensure!(uids.contains(uid(&web)), "{uids:?}");
    scope
        .wait("the pod's statistics", async || {
            let stats = scope
                .kubectl()
                .run(&["get", "--raw", &path("stats/summary")])
                .await;
            let stats: serde_json::Value =
                serde_json::from_str(&stats.map_err(|e| format!("{e:#}"))?).map_err(|e| e.to_string())?;
            let mut pods = stats["pods"].as_array().into_iter().flatten();
            let own = pods.find(|p| p["podRef"]["uid"].as_str() == Some(uid(&web)));
            let memory = own.and_then(|p| p["containers"][0]["memory"]["workingSetBytes"].as_u64());
            if memory.is_some_and(|bytes| bytes > 0) {
                Ok(())
            } else {
                Err(stats.to_string())
            }
        })
        .await
}

/// The kubelet API as somebody reaches it who is not the API server.
fn door(scope: &Scope, credentials: Credentials) -> Https {
    Https::new(
        scope.lab().topology().lab.clone(),
        (VIRTUAL_NODE, 10250).into(),
        credentials,
    )
}

const PATHS: [&str; 3] = [
    "/pods",
    "/containerLogs/default/none/none",
    "/exec/default/none/none?command=id&output=1",
];

async fn a_call_without_credentials_is_refused(scope: &Scope) -> anyhow::Result<()> {
    for path in PATHS {
        let answer = door(scope, Credentials::none()).get(path, None).await?;
        ensure!(answer.status == StatusCode::UNAUTHORIZED, "{path}: {answer:?}");
        ensure!(!answer.body.is_empty(), "{path}: the refusal says nothing");
    }
    Ok(())
}

async fn a_call_with_a_strangers_certificate_is_refused(scope: &Scope) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let theirs = Authority::open(directory.path().join("ca"), "kubernetes")?;
    // Whoever it says it is: another authority says so.
    let subject = Subject {
        common_name: "kubernetes-admin".into(),
        organization: Some("system:masters".into()),
        ..Subject::default()
    };
    let credential = theirs.credential("admin", &subject)?;
    for path in PATHS {
        let answer = door(scope, Credentials::load(&credential)?)
            .get(path, None)
            .await?;
        ensure!(answer.status == StatusCode::UNAUTHORIZED, "{path}: {answer:?}");
    }
    Ok(())
}

async fn a_call_with_a_made_up_token_is_refused(scope: &Scope) -> anyhow::Result<()> {
    for token in ["sesame", "eyJhbGciOiJub25lIn0.e30.", &"x".repeat(6000)] {
        let answer = door(scope, Credentials::none()).get("/pods", Some(token)).await?;
        ensure!(answer.status == StatusCode::UNAUTHORIZED, "{answer:?}");
    }
    Ok(())
}

async fn a_known_user_without_the_right_is_forbidden_and_with_it_is_served(
    scope: &Scope,
) -> anyhow::Result<()> {
    let cluster = Authority::open(scope.lab().layout().pki().join("cluster"), "kubernetes")?;
    let name = format!("nobody-{}", scope.namespace());
    let subject = Subject {
        common_name: name.clone(),
        ..Subject::default()
    };
    let credential = cluster.credential(&name, &subject)?;
    let answer = door(scope, Credentials::load(&credential)?)
        .get("/pods", None)
        .await?;
    ensure!(
        answer.status == StatusCode::FORBIDDEN && answer.body.contains(&name),
        "{answer:?}"
    );

    grant(
        scope,
        "reader",
        json!([{"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]}]),
    )
    .await?;
    let token = token(scope, "reader").await?;
    // Rules reach the authorizer by a watch, and a refusal is remembered.
    let answer = scope
        .wait_within(Duration::from_secs(120), "that the right counts", async || {
            let answer = door(scope, Credentials::none()).get("/pods", Some(&token)).await;
            let answer = answer.map_err(|e| format!("{e:#}"))?;
            if answer.status == StatusCode::OK {
                Ok(answer)
            } else {
                Err(format!("{answer:?}"))
            }
        })
        .await;
    revoke(scope, "reader").await?;
    ensure!(answer?.body.contains("\"PodList\""), "it is no list of pods");
    Ok(())
}

async fn reading_the_node_is_no_right_to_run_commands(scope: &Scope) -> anyhow::Result<()> {
    scope.start(pod("web", json!({"containers": [idle()]}))).await?;
    let token = token(scope, "peeper").await?;
    grant(
        scope,
        "peeper",
        json!([{"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]}]),
    )
    .await?;
    let path = format!("/exec/{}/web/main?command=id&output=1", scope.namespace());
    // A WebSocket is opened by GET.
    let answer = door(scope, Credentials::none())
        .upgrade(&path, &token, "v5.channel.k8s.io")
        .await;
    revoke(scope, "peeper").await?;
    let answer = answer?;
    ensure!(answer.status == StatusCode::FORBIDDEN, "{answer:?}");
    Ok(())
}

/// A fresh token of a service account, made if need be.
async fn token(scope: &Scope, account: &str) -> anyhow::Result<String> {
    let made = scope
        .create(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}))
        .await;
    // It may be there from an earlier call.
    drop(made);
    let request = TokenRequest {
        metadata: Default::default(),
        spec: Some(TokenRequestSpec::default()),
        status: None,
    };
    let accounts = scope.api::<ServiceAccount>();
    let given = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await?;
    given
        .status
        .and_then(|status| status.token)
        .context("no token was given")
}

fn role(scope: &Scope, account: &str) -> String {
    format!("{}-{account}", scope.namespace())
}

/// What is about nodes is no namespace's: made by kubectl, removed by `revoke`.
async fn grant(scope: &Scope, account: &str, rules: serde_json::Value) -> anyhow::Result<()> {
    let name = role(scope, account);
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": scope.namespace()}],
        },
    ]});
    let answer = scope
        .kubectl()
        .ask_with(&["create", "-f", "-"], &objects.to_string())
        .await?;
    ensure!(answer.code == Some(0), "{answer:?}");
    Ok(())
}

async fn revoke(scope: &Scope, account: &str) -> anyhow::Result<()> {
    let name = role(scope, account);
    scope
        .kubectl()
        .run(&["delete", "clusterrole,clusterrolebinding", &name])
        .await?;
    Ok(())
}
