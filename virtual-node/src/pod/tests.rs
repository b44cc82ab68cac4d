//! The pods of a node, from the API server to the hosts, as far as it can be shown
//! without either. Nothing here reads a clock on the wall.

mod api_server;
mod claimed;
mod host;
mod world;

use std::time::Duration;

use http::Method;
use pool_agent_api::wire::RefusalReason;
use serde_json::{Value, json};

use self::{
    api_server::Fate,
    host::Start,
    world::{FATES, STATUS, WEB, World},
};

const PLACED: &str = "spindrift.dev/Placed";

/// Longer than any retry waits.
const LONG: Duration = Duration::from_secs(120);

fn token_volume() -> Value {
    json!({"volumes": [{"name": "api", "projected": {"sources": [
        {"serviceAccountToken": {"path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "optional": true}},
    ]}}]})
}

fn env_of_settings() -> Value {
    json!({"containers": [{"name": "app", "image": "app:1", "env": [
        {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
    ]}]})
}

fn settings(data: Value) -> Value {
    json!({"metadata": {"name": "settings", "namespace": "shop"}, "data": data})
}

const SETTINGS: &str = "/api/v1/namespaces/shop/configmaps/settings";

// ---- a start

#[tokio::test(start_paused = true)]
async fn a_pod_is_on_record_before_its_host_is_asked_and_told_in_two_writes() {
    let world = World::started().await;
    world.running(json!({})).await;
    world.let_pass(LONG).await;
    let write = "PATCH namespaces/shop/pods/web/status";
    assert_eq!(world.calls(), [write, "host-a start u-1/1", write]);
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    assert_eq!(world.phase(), "Running");

    let patches = world.api.patches();
    for patch in &patches {
        assert_eq!(patch["metadata"]["uid"], "u-1");
    }
    // The record is for the version that was read; later writes are for any.
    assert!(patches[0]["metadata"]["resourceVersion"].is_string());
    assert!(patches[1]["metadata"]["resourceVersion"].is_null());
    // What did not change is not written again.
    let fields: Vec<&String> = patches[1]["status"].as_object().unwrap().keys().collect();
    let changed = [
        "conditions",
        "containerStatuses",
        "hostIP",
        "hostIPs",
        "phase",
        "podIP",
        "podIPs",
    ];
    assert_eq!(fields, changed);
    let kinds: Vec<&str> = patches[1]["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["PodReadyToStartContainers", "ContainersReady", "Ready"]);
}

#[tokio::test(start_paused = true)]
async fn references_are_read_while_the_record_is_written_and_both_are_waited_for() {
    for slow in [STATUS, (Method::POST, "/token")] {
        let world = World::started().await;
        let (method, path) = slow.clone();
        world.api.fault(method, path, Fate::Unanswered, 1);
        world.create("u-1", token_volume());
        let recorded = "PATCH namespaces/shop/pods/web/status";
        world
            .until("both were asked", |w| {
                w.has_called(recorded) && w.tokens_asked() == 1
            })
            .await;
        assert_eq!(world.asked(), [""; 0], "{slow:?}");
        world.host_of("u-1").await;
        assert_eq!(world.asked(), ["host-a start u-1/1"], "{slow:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_placement_is_published_before_its_host_is_asked() {
    let world = World::started().await;
    for host in [&world.a, &world.b] {
        host.on_start(Start::Wait);
    }
    world.create("u-1", json!({}));
    world.until_called("host-a start u-1/1").await;
    let placements = world.placements();
    let placed = &placements.pods[&"u-1".parse().unwrap()];
    assert_eq!(
        (placed.host.as_str(), placed.attempt.get(), placed.enrolled),
        ("host-a", 1, true)
    );
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_to_the_record_the_pod_starts_once() {
    for fate in FATES {
        let world = World::started().await;
        world.api.fault(STATUS.0, STATUS.1, fate, 3);
        world.create("u-1", token_volume());
        let host = world.host_of("u-1").await;
        host.run("u-1");
        world.until_condition("Ready", "True").await;
        assert_eq!(world.asked(), ["host-a start u-1/1"], "{fate:?}");
        assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a", "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_that_fails_is_repeated() {
    let reads = [
        (Method::GET, "/namespaces/shop"),
        (Method::POST, "/token"),
        (Method::GET, "/configmaps/kube-root-ca.crt"),
        (Method::GET, "/services"),
    ];
    for (method, path) in reads {
        for fate in [
            Fate::Status(403),
            Fate::Status(500),
            Fate::Unanswered,
            Fate::AnswerLost,
        ] {
            let world = World::started().await;
            world.api.fault(method.clone(), path, fate, 2);
            world.create("u-1", token_volume());
            world.host_of("u-1").await;
            assert_eq!(world.asked(), ["host-a start u-1/1"], "{path} {fate:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_to_a_status_write_the_status_ends_as_it_should() {
    for fate in FATES {
        let world = World::started().await;
        world.create("u-1", json!({}));
        let host = world.host_of("u-1").await;
        world.api.fault(STATUS.0, STATUS.1, fate, 3);
        host.run("u-1");
        world.until_condition("Ready", "True").await;
        assert_eq!(world.phase(), "Running", "{fate:?}");
        assert_eq!(world.asked(), ["host-a start u-1/1"], "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_keeps_something_else_is_not_written_to_without_end() {
    let world = World::started().await;
    world.running(json!({})).await;
    let before = world.api.patches().len();
    let mut pod = world.pod();
    pod["status"]["phase"] = json!("Pending");
    world.api.put(WEB, pod);
    world
        .until("it is written again", |w| w.phase() == "Running")
        .await;
    world.let_pass(LONG).await;
    assert_eq!(world.api.patches().len(), before + 1);
}

// ---- what is missing

#[tokio::test(start_paused = true)]
async fn a_missing_reference_is_told_and_waited_for() {
    let world = World::started().await;
    world.create("u-1", env_of_settings());
    let waiting = |w: &World| w.pod()["status"]["containerStatuses"][0]["state"]["waiting"].clone();
    let told = |message: &'static str| {
        move |w: &World| waiting(w) == json!({"reason": "CreateContainerConfigError", "message": message})
    };
    world
        .until(
            "the map is told missing",
            told("configmap \"settings\" not found"),
        )
        .await;
    world.api.put(SETTINGS, settings(json!({"size": "1"})));
    world
        .until(
            "the key is told missing",
            told("couldn't find key color in ConfigMap shop/settings"),
        )
        .await;
    assert_eq!(world.asked(), [""; 0]);
    world.api.put(SETTINGS, settings(json!({"color": "blue"})));
    world.host_of("u-1").await;
    assert!(world.api.events().contains(&"Failed".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_waits_for_what_is_missing_is_deleted_without_asking_a_host() {
    let world = World::started().await;
    world.create("u-1", env_of_settings());
    world.until_condition(PLACED, "True").await;
    world.api.delete_pod(WEB, 30);
    world.until("the pod is gone", |w| w.pod().is_null()).await;
    world.let_pass(LONG).await;
    assert_eq!(world.asked(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_went_away_while_the_pod_waited_is_not_asked() {
    let world = World::started().await;
    world.create("u-1", env_of_settings());
    world.until_condition(PLACED, "True: attempt 1 on host-a").await;
    world.a.set_reachable(false);
    world.let_pass(LONG).await;
    world.api.put(SETTINGS, settings(json!({"color": "blue"})));
    world.host_of("u-1").await;
    assert_eq!(world.asked(), ["host-b start u-1/2"]);
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
}

// ---- admission

#[tokio::test(start_paused = true)]
async fn a_pod_that_does_not_belong_on_this_node_fails_before_anybody_is_asked() {
    let cases = [
        (
            json!({"nodeSelector": {"zone": "b"}}),
            "NodeAffinity",
            "Pod was rejected: Predicate NodeAffinity failed: \
             node(s) didn't match Pod's node affinity/selector",
        ),
        (
            json!({"containers": [{"name": "app", "image": "app:1", "resources": {"requests": {"cpu": "64"}}}]}),
            "OutOfcpu",
            "Pod was rejected: Node didn't have enough resource: cpu, requested: 64000, \
             capacity of the largest host: 4000",
        ),
        (
            json!({"hostNetwork": true}),
            "PodFeatureUnsupported",
            "Pod was rejected: spec.hostNetwork: pods have no access to the network of a host",
        ),
    ];
    for (spec, reason, message) in cases {
        let world = World::started().await;
        world.create("u-1", spec);
        world.until("it failed", |w| w.phase() == "Failed").await;
        let status = &world.pod()["status"];
        assert_eq!(
            (&status["reason"], &status["message"]),
            (&json!(reason), &json!(message))
        );
        world.let_pass(LONG).await;
        assert_eq!(world.asked(), [""; 0], "{reason}");
        assert!(world.placements().pods.is_empty());
    }
}

/// The scheduler counts a pod no more once its phase is final. So does the node, and
/// not only when the pod's host has taken its sandbox down.
#[tokio::test(start_paused = true)]
async fn a_pod_that_is_over_makes_room_as_soon_as_its_status_says_so() {
    let mut world = World::new();
    world.slots = Some(1);
    world.start();
    let host = world.running(json!({"restartPolicy": "Never"})).await;
    host.finish("u-1");
    world.until("it is over", |w| w.phase() == "Succeeded").await;
    world.create_as("next", "u-2", json!({}));
    world.host_of("u-2").await;
    assert_eq!(host.attempts("u-1"), [1], "it is still there");
    // Nor does it count for a virtual node that begins again and finds it there.
    world.restart().await;
    world
        .until("placements are complete", |w| w.placements().complete)
        .await;
    world.create_as("another", "u-3", json!({}));
    world
        .until("the third is refused for the second alone", |w| {
            let third = w.api.get("/api/v1/namespaces/shop/pods/another").unwrap();
            third["status"]["message"]
                .as_str()
                .is_some_and(|message| message.contains("pods, requested: 1, used: 1, capacity: 1"))
        })
        .await;
}

// ---- hosts that refuse, or do not answer

#[tokio::test(start_paused = true)]
async fn a_pod_that_a_host_refuses_is_tried_on_another_under_the_next_attempt() {
    let world = World::started().await;
    world.a.on_start(Start::Refuse(RefusalReason::NoRoom));
    world.create("u-1", json!({}));
    world.host_of("u-1").await;
    assert_eq!(world.asked(), ["host-a start u-1/1", "host-b start u-1/2"]);
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_is_fenced_on_its_host_is_followed_by_the_next() {
    let world = World::started().await;
    world.a.on_start(Start::Refuse(RefusalReason::OlderAttempt));
    world.b.on_start(Start::Refuse(RefusalReason::EndedAttempt));
    world.create("u-1", json!({}));
    world.until("some were tried", |w| w.asked().len() >= 3).await;
    for host in [&world.a, &world.b] {
        host.on_start(Start::Take);
    }
    world.host_of("u-1").await;
    let attempts: Vec<String> = world
        .asked()
        .iter()
        .map(|call| call.rsplit_once('/').unwrap().1.to_owned())
        .collect();
    let counted: Vec<String> = (1..=attempts.len()).map(|n| n.to_string()).collect();
    assert_eq!(attempts, counted);
}

#[tokio::test(start_paused = true)]
async fn a_spec_that_a_host_calls_invalid_fails_the_pod() {
    let world = World::started().await;
    world.a.on_start(Start::Fail(tonic::Code::InvalidArgument));
    world.create("u-1", json!({}));
    world.until("it failed", |w| w.phase() == "Failed").await;
    assert_eq!(world.pod()["status"]["reason"], "UnexpectedAdmissionError");
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn what_a_hosts_operator_forbids_fails_the_pod_and_no_other_host_is_asked() {
    let world = World::started().await;
    for host in [&world.a, &world.b] {
        host.on_start(Start::Refuse(RefusalReason::Forbidden));
    }
    world.create("u-1", json!({}));
    world.until("it failed", |w| w.phase() == "Failed").await;
    assert_eq!(world.pod()["status"]["reason"], "PodForbidden");
    assert_eq!(world.asked().len(), 1, "{:?}", world.asked());
}

#[tokio::test(start_paused = true)]
async fn a_start_without_an_answer_is_asked_of_the_same_host_again() {
    for start in [Start::Fail(tonic::Code::Unavailable), Start::Wait] {
        let world = World::started().await;
        world.a.on_start(start.clone());
        world.create("u-1", json!({}));
        world.until("it was asked twice", |w| w.asked().len() >= 2).await;
        world.a.on_start(Start::Take);
        world.host_of("u-1").await.run("u-1");
        world.until_condition("Ready", "True").await;
        for call in world.asked() {
            assert_eq!(call, "host-a start u-1/1", "{start:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_whose_answer_is_lost_is_seen_in_the_hosts_reports() {
    let world = World::started().await;
    world.a.on_start(Start::TakeUnanswered);
    world.running(json!({})).await;
    assert_eq!(world.a.attempts("u-1"), [1]);
    assert_eq!(world.b.attempts("u-1"), [0; 0]);
}

// ---- the end

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_is_stopped_within_its_grace_told_removed_and_forgotten() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    world.api.delete_pod(WEB, 30);
    world.until_called("host-a stop(30) u-1/1").await;
    world.let_pass(LONG).await;
    assert!(!world.pod().is_null(), "it still runs");
    host.exit("u-1", 0);
    world.until_called("host-a forget u-1/1").await;
    let calls = world.calls();
    let end = calls.iter().position(|c| c.contains("stop")).unwrap();
    let last: Vec<&String> = calls[end..].iter().filter(|c| !c.contains("PATCH")).collect();
    assert_eq!(
        last,
        [
            "host-a stop(30) u-1/1",
            "DELETE namespaces/shop/pods/web",
            "host-a forget u-1/1"
        ]
    );
    // The last thing told is how it ended.
    let told = world.api.patches();
    let ended = told.iter().rev().find_map(|p| {
        let container = &p["status"]["containerStatuses"][0];
        container["state"]["terminated"]["exitCode"].as_i64()
    });
    assert_eq!(ended, Some(0));
    world
        .until("no room is held", |w| w.placements().pods.is_empty())
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_shorter_grace_hastens_a_stop() {
    let world = World::started().await;
    world.running(json!({})).await;
    world.api.delete_pod(WEB, 30);
    world.until_called("host-a stop(30) u-1/1").await;
    world.api.delete_pod(WEB, 60);
    world.let_pass(LONG).await;
    world.api.delete_pod(WEB, 0);
    world.until_called("host-a forget u-1/1").await;
    let stops: Vec<String> = world.asked().into_iter().filter(|c| c.contains("stop")).collect();
    assert_eq!(stops, ["host-a stop(30) u-1/1", "host-a stop(0) u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_while_its_start_is_under_way_is_stopped_once_that_is_answered() {
    // Answered in time, and not at all.
    for answer in [Start::Take, Start::Fail(tonic::Code::Unavailable)] {
        let world = World::started().await;
        world.a.on_start(Start::Wait);
        world.create("u-1", json!({}));
        world.until_called("host-a start u-1/1").await;
        world.api.delete_pod(WEB, 0);
        world.a.on_start(answer.clone());
        world.until("the pod is gone", |w| w.pod().is_null()).await;
        world.until_called("host-a forget u-1/1").await;
        assert_eq!(
            world.asked(),
            [
                "host-a start u-1/1",
                "host-a stop(0) u-1/1",
                "host-a forget u-1/1"
            ],
            "{answer:?}"
        );
        assert_eq!(world.a.attempts("u-1"), [0; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_by_force_leaves_nothing_behind() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    world.api.remove(WEB);
    world
        .until("its host has nothing", |_| host.attempts("u-1").is_empty())
        .await;
    assert_eq!(
        world.asked()[1..],
        ["host-a stop(0) u-1/1", "host-a forget u-1/1"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_vanished_while_nobody_watched_leaves_nothing_behind() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    world.api.remove(WEB);
    world.api.compact();
    world
        .until("its host has nothing", |_| host.attempts("u-1").is_empty())
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_does_not_know_a_pod_is_no_proof_that_it_is_gone() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    // A listing from which the pod is missing, though it is there.
    let pod = world.pod();
    world.api.fault(Method::GET, "/pods/web", Fate::Status(500), 1000);
    world.api.remove(WEB);
    world.api.compact();
    world.let_pass(LONG).await;
    world.api.put(WEB, pod);
    world.api.mend();
    world.let_pass(LONG).await;
    assert_eq!(host.attempts("u-1"), [1]);
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn another_pod_of_the_same_name_is_another_pod() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    // The first is gone and the second there before this node has heard of either.
    world.api.remove(WEB);
    world.create("u-2", json!({}));
    world.api.compact();
    world
        .until("the first left nothing", |_| host.attempts("u-1").is_empty())
        .await;
    let second = world.host_of("u-2").await;
    second.run("u-2");
    world.until_condition("Ready", "True").await;
    assert_eq!(world.pod()["metadata"]["uid"], "u-2");
    let found = world.directory().find("shop", "web").await.unwrap();
    assert_eq!(found.sandbox.unwrap().1.key.pod.as_str(), "u-2");
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_fails_is_repeated() {
    for fate in [Fate::Status(500), Fate::Unanswered, Fate::AnswerLost] {
        let world = World::started().await;
        world.running(json!({})).await;
        world.api.fault(Method::DELETE, "/pods/web", fate, 2);
        world.api.delete_pod(WEB, 0);
        world.until_called("host-a forget u-1/1").await;
        assert!(world.pod().is_null(), "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_has_done_its_work_is_told_so_and_its_logs_stay() {
    let world = World::started().await;
    let host = world.running(json!({"restartPolicy": "Never"})).await;
    host.exit("u-1", 0);
    world.until("it succeeded", |w| w.phase() == "Succeeded").await;
    world.let_pass(LONG).await;
    assert_eq!(host.attempts("u-1"), [1]);
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

// ---- what is lost

#[tokio::test(start_paused = true)]
async fn a_lost_sandbox_is_followed_by_another_attempt_as_the_restart_policy_has_it() {
    for policy in ["Always", "OnFailure"] {
        let world = World::started().await;
        let host = world.running(json!({"restartPolicy": policy})).await;
        host.lose_sandbox("u-1");
        world.until_called("host-a start u-1/2").await;
        assert_eq!(
            world.asked(),
            ["host-a start u-1/1", "host-a forget u-1/1", "host-a start u-1/2"],
            "{policy}"
        );
        host.run("u-1");
        world.until_condition("Ready", "True").await;
        assert_eq!(world.condition(PLACED), "True: attempt 2 on host-a", "{policy}");
    }
    let world = World::started().await;
    let host = world.running(json!({"restartPolicy": "Never"})).await;
    host.lose_sandbox("u-1");
    world.until("it failed", |w| w.phase() == "Failed").await;
    world.let_pass(LONG).await;
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_its_host_no_longer_knows_is_fenced_and_placed_anew_or_failed() {
    let world = World::started().await;
    world.running(json!({})).await.lose_everything();
    world.until_called("host-a start u-1/2").await;
    assert_eq!(
        world.asked(),
        ["host-a start u-1/1", "host-a forget u-1/1", "host-a start u-1/2"]
    );

    let world = World::started().await;
    world
        .running(json!({"restartPolicy": "Never"}))
        .await
        .lose_everything();
    world.until("it failed", |w| w.phase() == "Failed").await;
    assert_eq!(world.pod()["status"]["reason"], "SandboxLost");
    world.let_pass(LONG).await;
    assert_eq!(world.asked(), ["host-a start u-1/1", "host-a forget u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_silent_makes_its_pods_unready_and_moves_none() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    host.set_reachable(false);
    world
        .until_condition("Ready", "False: the host of the pod has not been heard")
        .await;
    world.let_pass(LONG * 10).await;
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
    assert_eq!(world.placements().pods.len(), 1);
    host.set_reachable(true);
    world.until_condition("Ready", "True").await;
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_while_its_host_is_silent_is_removed_when_the_host_has_answered() {
    let world = World::started().await;
    let host = world.running(json!({})).await;
    host.set_reachable(false);
    world.api.delete_pod(WEB, 0);
    world.let_pass(LONG).await;
    assert!(!world.pod().is_null(), "it may still run");
    host.set_reachable(true);
    world.until("the pod is gone", |w| w.pod().is_null()).await;
    world
        .until("its host has nothing", |_| host.attempts("u-1").is_empty())
        .await;
}

// ---- a virtual node that begins again

#[tokio::test(start_paused = true)]
async fn a_restarted_virtual_node_takes_over_what_runs_and_asks_nobody_anything() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    let (calls, writes) = (world.calls(), world.api.patches().len());
    world.restart().await;
    let placements = world.placements();
    let placed = &placements.pods[&"u-1".parse().unwrap()];
    assert_eq!((placed.host.as_str(), placed.enrolled), ("host-a", true));
    world.let_pass(LONG).await;
    assert_eq!(world.calls(), calls);
    assert_eq!(world.api.patches().len(), writes);
}

#[tokio::test(start_paused = true)]
async fn all_that_is_on_record_is_published_before_placements_count_as_complete() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    world.kill().await;
    // No host has to be heard for that.
    world.a.set_reachable(false);
    world.b.set_reachable(false);
    world.start();
    let mut placements = world.watch_placements();
    let complete = placements.wait_for(|p| p.complete).await.unwrap();
    assert_eq!(complete.pods.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_was_put_on_record_by_a_virtual_node_that_died_is_fenced_and_started() {
    let mut world = World::started().await;
    world.a.on_start(Start::Wait);
    world.create("u-1", json!({}));
    world.until_called("host-a start u-1/1").await;
    world.kill().await;
    world.start();
    world.until_called("host-a forget u-1/1").await;
    // Only now does the first start arrive.
    world.a.on_start(Start::Take);
    world.until_called("host-a start u-1/2").await;
    world.host_of("u-1").await;
    assert_eq!(world.a.attempts("u-1"), [2]);
    assert_eq!(world.b.attempts("u-1"), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_on_record_on_a_host_out_of_reach_is_started_nowhere_else() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    world.kill().await;
    world.a.set_reachable(false);
    world.start();
    world.let_pass(LONG).await;
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
    assert!(world.condition("Ready").starts_with("False"));
    world.a.set_reachable(true);
    world.until_condition("Ready", "True").await;
    assert_eq!(world.asked(), ["host-a start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_was_never_placed_does_not_wait_for_silent_hosts() {
    let mut world = World::new();
    world.a.set_reachable(false);
    world.create("u-1", json!({}));
    world.start();
    world.host_of("u-1").await;
    assert_eq!(world.asked(), ["host-b start u-1/1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_while_nobody_was_there_leaves_nothing_behind() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    world.kill().await;
    world.api.remove(WEB);
    world.start();
    world
        .until("its host has nothing", |w| w.a.attempts("u-1").is_empty())
        .await;
}

#[tokio::test(start_paused = true)]
async fn labels_that_changed_while_nobody_was_there_move_no_pod_out_of_the_mesh() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    world.kill().await;
    let mut namespace = world.api.get("/api/v1/namespaces/shop").unwrap();
    namespace["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"});
    world.api.put("/api/v1/namespaces/shop", namespace);
    world.start();
    world
        .until("placements are complete", |w| w.placements().complete)
        .await;
    assert!(world.placements().pods[&"u-1".parse().unwrap()].enrolled);
}

// ---- hosts that lie

#[tokio::test(start_paused = true)]
async fn a_host_that_claims_a_newer_attempt_is_not_believed_even_right_after_a_start() {
    let mut world = World::started().await;
    world.running(json!({})).await;
    world.kill().await;
    // The host on record is silent, so the claim is all that is heard.
    world.a.set_reachable(false);
    world.b.claim("u-1", 7);
    world.start();
    world.until_called("host-b forget u-1/7").await;
    world.a.set_reachable(true);
    world.until_condition("Ready", "True").await;
    let placements = world.placements();
    assert_eq!(placements.pods[&"u-1".parse().unwrap()].host.as_str(), "host-a");
    assert_eq!(world.a.attempts("u-1"), [1]);
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_claims_a_pod_that_is_being_placed_gets_no_identity_of_it() {
    let world = World::started().await;
    world.create("u-1", env_of_settings());
    world.until_condition(PLACED, "True: attempt 1 on host-a").await;
    let mut placements = world.watch_placements();
    placements.mark_unchanged();
    world.b.claim("u-1", 1);
    world.until_called("host-b forget u-1/1").await;
    world.b.claim("u-1", 2);
    world.until_called("host-b forget u-1/2").await;
    // Not even the host it is to run on, before it was asked.
    world.a.claim("u-1", 1);
    world.until_called("host-a forget u-1/1").await;
    assert!(
        !placements.has_changed().unwrap(),
        "nothing was published meanwhile"
    );
    assert!(placements.borrow_and_update().pods.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_kubelet_api_is_led_to_the_host_on_record_only() {
    let world = World::started().await;
    world.running(json!({})).await;
    world.b.claim("u-1", 7);
    world.until_called("host-b forget u-1/7").await;
    let found = world.directory().find("shop", "web").await.unwrap();
    assert_eq!(found.sandbox.unwrap().0.host.as_str(), "host-a");
}

#[tokio::test(start_paused = true)]
async fn events_are_taken_from_the_host_on_record_only() {
    let world = World::started().await;
    world.running(json!({})).await;
    world.b.tell("u-1", 1, "Forged");
    world.a.tell("u-1", 2, "Early");
    world.a.tell("u-1", 1, "Started");
    world
        .until("it was told", |w| w.api.events().contains(&"Started".to_owned()))
        .await;
    world.let_pass(LONG).await;
    assert_eq!(world.api.events(), ["Started"]);
}
