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

// ---- a handover

const HANDOVER: &str = "spindrift.dev/Handover";

/// Its host has given notice, and the next attempt has a claim.
async fn handing_over() -> World {
    let world = World::with_cell().await;
    world.running_for_a_deployment(json!(1)).await;
    world.a.notice("u-1");
    world.until_claims(&["u-1-1", "u-1-2"]).await;
    world
}

/// The same, and host-b has been asked for the next attempt.
async fn rising() -> World {
    let world = handing_over().await;
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
    world
}

fn address(world: &World) -> String {
    world.pod()["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_a_deployment_with_surge_serves_until_its_next_attempt_does_and_switches_in_one_write() {
    let world = rising().await;
    world.let_pass(LONG).await;
    // The next is there, and not ready: nothing has changed but the record.
    assert_eq!(world.condition(HANDOVER), "True: attempt 2 on host-b");
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    assert_eq!(
        (address(&world).as_str(), world.condition("Ready")),
        ("10.77.1.2", "True".into())
    );
    let beside = world.placements().beside.values().next().cloned().unwrap();
    assert_eq!((beside.host.as_str(), beside.attempt.get()), ("host-b", 2));
    assert!(
        !world.asked().iter().any(|call| call.contains("stop")),
        "{:?}",
        world.asked()
    );

    let before = world.api.patches().len();
    world.b.run("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    let patches = world.api.patches()[before..].to_vec();
    let switch: Vec<_> = patches
        .iter()
        .filter(|p| p["status"]["podIP"] == "10.77.2.2")
        .collect();
    assert_eq!(switch.len(), 1, "{patches:#?}");
    let said = switch[0]["status"]["conditions"].to_string();
    assert!(
        said.contains("attempt 2 on host-b") && said.contains("attempt 1 on host-a"),
        "{said}"
    );
    assert_eq!(address(&world), "10.77.2.2");
    let unready = |patch: &serde_json::Value| {
        let conditions = patch["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] != "True")
    };
    assert!(
        !patches.iter().any(unready),
        "it was not ready in between: {patches:#?}"
    );

    world.a.exit("u-1", 0);
    world.until_called("host-a forget u-1/1").await;
    world.until_claims(&["u-1-2"]).await;
    world.until_condition(HANDOVER, "False").await;
    world.let_pass(LONG).await;
    assert!(world.placements().beside.is_empty());
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
    let starts = world.asked().iter().filter(|call| call.contains("start")).count();
    assert_eq!(starts, 2, "{:?}", world.asked());
}

#[tokio::test(start_paused = true)]
async fn a_handover_survives_a_restart_of_the_virtual_node_at_any_point() {
    // Before anybody was asked; while the next rises; after the switch.
    for point in 0..4 {
        let mut world = match point {
            0 => handing_over().await,
            _ => rising().await,
        };
        if point == 2 {
            // Not answered yet as the process dies: it may have been written, or not.
            let (method, path) = super::STATUS;
            world.api.fault(method, path, Fate::AnswerLost, 1);
        }
        if point >= 2 {
            world.b.run("u-1");
            world.until_condition(PLACED, "True: attempt 2 on host-b").await;
        }
        world.restart().await;
        if point < 2 {
            // Not known how far the next had come: it is fenced, and another is begun.
            world
                .until("another attempt is claimed", |w| {
                    w.claims().iter().any(|claim| {
                        claim != "u-1-1" && !w.condition(HANDOVER).ends_with("host-b")
                            || claim == "u-1-3"
                            || point == 0 && claim == "u-1-2"
                    })
                })
                .await;
            let claim = world.claims().last().unwrap().clone();
            world.bind(&claim, "host-b");
            let number = claim.rsplit('-').next().unwrap().to_owned();
            world.until_called(&format!("host-b start u-1/{number}")).await;
            world.b.run("u-1");
        }
        world.until_called("host-a stop(30) u-1/1").await;
        world.a.exit("u-1", 0);
        world.until_called("host-a forget u-1/1").await;
        world.until_condition("Ready", "True").await;
        world.let_pass(LONG).await;
        assert_eq!((point, address(&world).as_str()), (point, "10.77.2.2"));
        assert_eq!((point, world.a.attempts("u-1").len()), (point, 0));
        assert_eq!((point, world.b.attempts("u-1").len()), (point, 1));
        assert_eq!((point, world.claims().len()), (point, 1), "{:?}", world.claims());
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_surge_is_stopped_before_anything_of_it_is_claimed_anew() {
    let world = World::with_cell().await;
    world.running_for_a_deployment(json!(0)).await;
    world.a.notice("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    world.let_pass(LONG).await;
    assert_eq!(world.claims(), ["u-1-1"]);
    world.a.exit("u-1", 0);
    world.until_claims(&["u-1-2"]).await;
    let calls = world.calls();
    let at = |call: &str| calls.iter().rposition(|c| c == call);
    assert!(at("host-a forget u-1/1") < at(CLAIM), "{calls:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_cannot_be_read_lets_nothing_overlap() {
    let world = World::with_cell().await;
    world.running_for_a_deployment(json!(1)).await;
    world
        .api
        .fault(Method::GET, "/deployments/web", Fate::Status(403), 9);
    world.a.notice("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    assert_eq!(world.claims(), ["u-1-1"]);
}

#[tokio::test(start_paused = true)]
async fn a_pod_for_whose_overlap_the_cell_has_no_room_is_stopped_first() {
    let world = World::with_cell().await;
    world.running_for_a_deployment(json!(1)).await;
    let (method, path) = CREATED;
    world
        .cell
        .as_ref()
        .unwrap()
        .fault(method, path, Fate::Status(403), 1);
    world.a.notice("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    world.a.exit("u-1", 0);
    world.until_claims(&["u-1-2"]).await;
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_host_stops_it_before_the_next_is_ready_goes_on_as_the_next() {
    let world = rising().await;
    world.a.wind_down("u-1", 0);
    world.let_pass(LONG).await;
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    world.a.exit("u-1", 0);
    world.until_condition(PLACED, "True: attempt 2 on host-b").await;
    assert_eq!(
        world.condition("Ready"),
        "False: containers with unready status: [app]"
    );
    world.until_called("host-a forget u-1/1").await;
    world.b.run("u-1");
    world.until_condition("Ready", "True").await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_deleted_in_the_midst_of_a_handover_leaves_nothing_on_either_host() {
    let world = rising().await;
    world.api.delete_pod(super::world::WEB, 5);
    world.until_called("host-b forget u-1/2").await;
    world.until_called("host-a stop(5) u-1/1").await;
    world.a.exit("u-1", 0);
    world.until_claims(&[]).await;
    assert_eq!(
        (world.a.attempts("u-1"), world.b.attempts("u-1")),
        (vec![], vec![])
    );
}

#[tokio::test(start_paused = true)]
async fn a_next_attempt_whose_host_falls_silent_is_given_up_and_the_one_that_serves_serves_on() {
    let world = rising().await;
    world.b.set_reachable(false);
    // What it was good for is over there as well: another is claimed.
    world.until_claims(&["u-1-1", "u-1-3"]).await;
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    assert_eq!(world.condition("Ready"), "True");
    assert!(
        !world.asked().iter().any(|call| call.contains("stop")),
        "{:?}",
        world.asked()
    );
    world.b.set_reachable(true);
    world.until_called("host-b forget u-1/2").await;
    world.bind("u-1-3", "host-b");
    world.until_called("host-b start u-1/3").await;
    world.b.run("u-1");
    world.until_condition(PLACED, "True: attempt 3 on host-b").await;
    world.until_called("host-a stop(30) u-1/1").await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_host_falls_silent_in_a_handover_goes_on_as_the_next() {
    let world = rising().await;
    let silent = tokio::time::Instant::now();
    world.a.set_reachable(false);
    world.until_condition("Ready", "False").await;
    assert_eq!(world.condition(PLACED), "True: attempt 1 on host-a");
    // Not ready yet, and there is no other.
    world.until_condition(PLACED, "True: attempt 2 on host-b").await;
    assert!(
        silent.elapsed() >= Duration::from_secs(38),
        "{:?}",
        silent.elapsed()
    );
    world.b.run("u-1");
    world.until_condition("Ready", "True").await;
    // Nobody waits for what its host would say.
    world.until_claims(&["u-1-2"]).await;
    world.until_condition(HANDOVER, "False").await;
    assert!(world.placements().beside.is_empty());
    world.a.set_reachable(true);
    world.until_called("host-a forget u-1/1").await;
    assert_eq!(world.condition(PLACED), "True: attempt 2 on host-b");
}

// ---- disruption budgets

fn budget(allowed: i32) -> serde_json::Value {
    json!({"metadata": {}, "items": [{
        "metadata": {"name": "web", "namespace": "shop", "uid": "pdb", "generation": 1},
        "spec": {"selector": {}, "minAvailable": 1},
        "status": {"observedGeneration": 1, "disruptionsAllowed": allowed,
            "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1},
    }]})
}

const BUDGETS: &str = "/apis/policy/v1/namespaces/shop/poddisruptionbudgets";

#[tokio::test(start_paused = true)]
async fn a_pod_whose_budget_forbids_is_stopped_only_once_it_allows() {
    let world = World::with_cell().await;
    world.api.put(BUDGETS, budget(0));
    world.running_by_claim().await;
    world.a.notice("u-1");
    world.let_pass(LONG).await;
    assert!(!world.has_called("host-a stop(30) u-1/1"), "{:?}", world.asked());
    assert_eq!(world.condition("Ready"), "True");
    world.api.put(BUDGETS, budget(1));
    world.until_called("host-a stop(30) u-1/1").await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stops_a_pod_when_its_notice_ends_does_not_wait_for_its_budget() {
    let world = World::with_cell().await;
    world.api.put(BUDGETS, budget(0));
    world.running_by_claim().await;
    world.a.notice("u-1");
    world.let_pass(LONG).await;
    world.a.exit("u-1", 143);
    world.until_claims(&["u-1-2"]).await;
}

#[tokio::test(start_paused = true)]
async fn of_two_pods_of_one_budget_the_second_leaves_when_the_first_is_back() {
    let world = World::with_cell().await;
    world.api.put(BUDGETS, budget(1));
    world.running_by_claim().await;
    world.create_as("other", "u-2", json!({}));
    world.until_claims(&["u-1-1", "u-2-1"]).await;
    world.bind("u-2-1", "host-a");
    world.until_called("host-a start u-2/1").await;
    world.a.run("u-2");
    world.a.notice("u-1");
    world.until_called("host-a stop(30) u-1/1").await;
    world.a.notice("u-2");
    world.let_pass(LONG).await;
    // The budget says 1 all the while: what it says has not followed yet.
    assert!(!world.has_called("host-a stop(30) u-2/1"), "{:?}", world.asked());
    world.a.exit("u-1", 0);
    world.until_claims(&["u-1-2", "u-2-1"]).await;
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
    world.let_pass(LONG).await;
    assert!(!world.has_called("host-a stop(30) u-2/1"), "{:?}", world.asked());
    world.b.run("u-1");
    world.until_called("host-a stop(30) u-2/1").await;
}

// ---- a host that says nothing

/// Of a ReplicaSet's, which may be replaced before it is known that nothing of it runs.
fn replica() -> serde_json::Value {
    json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1", "controller": true}])
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_host_is_silent_starts_elsewhere_when_no_grant_and_no_lease_can_be_live() {
    let world = World::with_cell().await;
    world.running_by_claim().await;
    world.own("u-1", replica());
    // For less than that: unready for a while, and nothing else.
    world.a.set_reachable(false);
    world.until_condition("Ready", "False").await;
    world.let_pass(Duration::from_secs(20)).await;
    world.a.set_reachable(true);
    world.until_condition("Ready", "True").await;
    assert_eq!(world.claims(), ["u-1-1"]);
    let silent = tokio::time::Instant::now();
    world.a.set_reachable(false);
    world.until_condition("Ready", "False").await;
    assert!(
        silent.elapsed() <= Duration::from_secs(15),
        "{:?}",
        silent.elapsed()
    );
    world.let_pass(Duration::from_secs(20)).await;
    assert_eq!(world.claims(), ["u-1-1"], "after {:?}", silent.elapsed());
    // The cell lets it go: its host has said that nothing of it is left, or there is none.
    world.until_claims(&["u-1-2"]).await;
    assert!(
        silent.elapsed() >= Duration::from_secs(38),
        "{:?}",
        silent.elapsed()
    );
    world.bind("u-1-2", "host-b");
    world.until_called("host-b start u-1/2").await;
    // What comes back has nothing to say any more.
    world.a.set_reachable(true);
    world.until_called("host-a forget u-1/1").await;
}

#[tokio::test(start_paused = true)]
async fn a_virtual_node_that_has_just_started_takes_every_host_to_hold_a_grant() {
    let mut world = World::with_cell().await;
    world.running_by_claim().await;
    world.own("u-1", replica());
    world.a.set_reachable(false);
    world.kill().await;
    world.let_pass(Duration::from_secs(300)).await;
    world.start();
    let begun = tokio::time::Instant::now();
    world.until_claims(&["u-1-2"]).await;
    assert!(
        begun.elapsed() >= Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_deletion_on_a_silent_host_is_done_when_its_claim_is_gone() {
    let world = World::with_cell().await;
    world.running_by_claim().await;
    world.a.set_reachable(false);
    world.let_pass(Duration::from_secs(600)).await;
    assert_eq!(world.claims(), ["u-1-1"]);
    world.api.delete_pod(super::world::WEB, 5);
    world.until("the pod is gone", |w| w.pod().is_null()).await;
    world.until_claims(&[]).await;
}
