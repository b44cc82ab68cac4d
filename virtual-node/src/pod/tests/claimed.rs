//! Pods whose hosts are claimed in a cell.

use std::time::Duration;

use http::Method;
use pool_agent_api::wire::RefusalReason;
use serde_json::json;

use super::{LONG, PLACED, api_server::Fate, host::Start, world::World};

const HOST_FOUND: &str = "spindrift.dev/HostFound";
const CLAIM: &str = "POST namespaces/tenant-demo/pods";
const CREATED: (Method, &str) = (Method::POST, "/namespaces/tenant-demo/pods");

#[tokio::test(start_paused = true)]
async fn a_pod_runs_where_its_claim_is_bound_and_a_start_costs_one_call_to_the_cell() {
    let world = World::with_cell().await;
    world.running_by_claim().await;
    world.let_pass(LONG).await;
    let write = "PATCH namespaces/shop/pods/web/status";
    assert_eq!(world.calls(), [CLAIM, write, "host-a start u-1/1", write]);
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    // It was placed at once: there is nothing to tell of waiting.
    assert_eq!(world.condition(HOST_FOUND), "");
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_deleted_when_its_host_has_forgotten_the_pod_and_not_before() {
    let world = World::with_cell().await;
    world.running_by_claim().await;
    world.api.delete_pod(super::world::WEB, 5);
    world.until_called("host-a stop(5) u-1/1").await;
    world.let_pass(Duration::from_secs(3)).await;
    assert_eq!(world.claims(), ["u-1-1"]);
    world.a.exit("u-1", 0);
    world.until_claims(&[]).await;
    let calls = world.calls();
    let at = |call: &str| calls.iter().position(|c| c == call);
    assert!(
        at("host-a forget u-1/1") < at("DELETE namespaces/tenant-demo/pods/u-1-1"),
        "{calls:#?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_restart_finds_the_pod_by_its_claim_and_asks_for_nothing() {
    let mut world = World::with_cell().await;
    world.running_by_claim().await;
    let before = world.calls().len();
    world.restart().await;
    world.let_pass(LONG).await;
    assert_eq!(world.calls()[before..], [] as [&str; 0]);
    assert_eq!(world.condition("Ready"), "True");
}

#[tokio::test(start_paused = true)]
async fn a_restart_before_the_pod_was_on_record_takes_its_claim_over() {
    let mut world = World::with_cell().await;
    world.create("u-1", json!({}));
    world.until_claims(&["u-1-1"]).await;
    world.kill().await;
    world.bind("u-1-1", "host-b");
    world.start();
    world.until_called("host-b start u-1/1").await;
    assert_eq!(world.claims(), ["u-1-1"]);
}

#[tokio::test(start_paused = true)]
async fn a_claim_of_a_pod_that_went_while_nobody_was_there_is_deleted() {
    let mut world = World::with_cell().await;
    world.create("u-1", json!({}));
    world.until_claims(&["u-1-1"]).await;
    world.kill().await;
    world.api.remove(super::world::WEB);
    world.start();
    world.until_claims(&[]).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_refuses_ends_the_claim_and_the_next_attempt_has_another() {
    let world = World::with_cell().await;
    world.a.on_start(Start::Refuse(RefusalReason::NoRoom));
    world.create("u-1", json!({}));
    world.until_claims(&["u-1-1"]).await;
    world.bind("u-1-1", "host-a");
    world.until_claims(&["u-1-2"]).await;
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_a_host_stays_pending_and_says_why_once() {
    let world = World::with_cell().await;
    world.create("u-1", json!({}));
    world.until_claims(&["u-1-1"]).await;
    world.pass_over("u-1-1", "0/2 nodes are available: 2 Insufficient memory.");
    world.until_condition(HOST_FOUND, "False: 0/2 nodes").await;
    world.let_pass(LONG).await;
    assert_eq!(world.phase(), "Pending");
    world.bind("u-1-1", "host-a");
    world.host_of("u-1").await.run("u-1");
    world.until_condition(HOST_FOUND, "True").await;
    let events = world.api.events();
    let told = |reason: &str| events.iter().filter(|e| *e == reason).count();
    assert_eq!((told("WaitingForHost"), told("HostFound")), (1, 1), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_the_cell_did_not_answer_is_made_again_and_never_twice() {
    for fate in [
        Fate::Status(500),
        Fate::Status(429),
        Fate::Unanswered,
        Fate::AnswerLost,
    ] {
        let world = World::with_cell().await;
        let (method, path) = CREATED;
        world.cell.as_ref().unwrap().fault(method, path, fate, 3);
        world.running_by_claim().await;
        assert_eq!(world.claims(), ["u-1-1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_is_lost_before_its_host_is_asked_is_made_again() {
    let world = World::with_cell().await;
    world.create("u-1", json!({}));
    world.until_claims(&["u-1-1"]).await;
    world.lose_claim("u-1-1");
    world.until_claims(&["u-1-1"]).await;
    world.bind("u-1-1", "host-a");
    world.until_called("host-a start u-1/1").await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_host_is_gone_with_its_claim_starts_elsewhere_and_not_before() {
    let world = World::with_cell().await;
    world.running_by_claim().await;
    // Silent for as long as it takes: nothing is concluded.
    world.a.set_reachable(false);
    world.let_pass(Duration::from_secs(600)).await;
    assert_eq!(world.claims(), ["u-1-1"]);
    // The cell lets the claim go with the host's Node; the read that is to settle that
    // fails more than once.
    let cell = world.cell.as_ref().unwrap();
    cell.fault(Method::GET, "/pods/u-1-1", Fate::Status(500), 2);
    world.lose_claim("u-1-1");
    world.until_claims(&["u-1-2"]).await;
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
}

// ---- a host that gives the pod up

/// Runs on host-a, whose claim is then deleted by somebody else.
async fn given_up(policy: &str) -> World {
    let world = World::with_cell().await;
    world
        .running_by_claim_with(json!({"restartPolicy": policy}))
        .await;
    world.a.notice("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    world
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_runs_once_and_had_to_leave_its_host_has_failed_by_disruption_whatever_it_exits_with() {
    for code in [0, 143] {
        let world = given_up("Never").await;
        world.a.wind_down("u-1", code);
        world.let_pass(LONG).await;
        // Not before nothing is left of it.
        assert_eq!((world.phase().as_str(), code), ("Running", code));
        world.a.exit("u-1", code);
        world.until_condition("DisruptionTarget", "True").await;
        assert_eq!((world.phase().as_str(), code), ("Failed", code));
        assert_eq!(world.pod()["status"]["reason"], "Terminated");
        world.let_pass(LONG).await;
        assert_eq!(world.claims(), ["u-1-1"], "it was given another host");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_was_done_before_it_was_told_to_leave_keeps_its_result() {
    for (code, phase) in [(0, "Succeeded"), (1, "Failed")] {
        let world = World::with_cell().await;
        world
            .running_by_claim_with(json!({"restartPolicy": "Never"}))
            .await;
        world.a.wind_down("u-1", code);
        world.a.notice("u-1");
        world.until(phase, |w| w.phase() == phase).await;
        world.a.exit("u-1", code);
        world.let_pass(LONG).await;
        assert_eq!(world.phase(), phase);
        assert_eq!(world.condition("DisruptionTarget"), "");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_may_run_again_is_not_done_by_leaving_its_host_with_zero() {
    let world = given_up("OnFailure").await;
    world.a.wind_down("u-1", 0);
    world.let_pass(LONG).await;
    world.a.exit("u-1", 0);
    world.until_claims(&["u-1-2"]).await;
    assert_eq!(world.phase(), "Running");
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
    world.b.run("u-1");
    world.until_condition("Ready", "True").await;
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
}
