use std::time::Duration;

use pool_agent_api::{
    Attempt, Resources,
    status::{ContainerStatus, MeshState, Terminated},
};
use pool_cell::{Claim, ClaimParts};
use serde_json::{Value, json};

use super::*;

fn claim() -> Claim {
    Claim::new(ClaimParts {
        tenant: "acme".parse().unwrap(),
        key: key(),
        namespace: "shop".parse().unwrap(),
        name: "web-0".parse().unwrap(),
        node_name: "burst".into(),
        requests: Resources {
            sandboxes: 1,
            ..Resources::default()
        },
        images: vec!["web".into()],
        runtime_class: None,
        priority_class: None,
        owner: None,
        zone: None,
        class: None,
        arch: None,
        grace: Duration::from_secs(60),
    })
    .unwrap()
}

fn key() -> SandboxKey {
    SandboxKey {
        pod: "u-1".parse().unwrap(),
        attempt: Attempt::FIRST,
    }
}

fn bound() -> Value {
    let mut pod = serde_json::to_value(claim().to_pod()).unwrap();
    pod["metadata"]["uid"] = json!("c-1");
    pod["spec"]["nodeName"] = json!("host-a");
    pod
}

fn pod(value: Value) -> Pod {
    serde_json::from_value(value).unwrap()
}

/// Deleted, to be over at the given second.
fn deleted(at: i64) -> Pod {
    let mut value = bound();
    value["metadata"]["deletionTimestamp"] = json!(second(at).to_string());
    value["metadata"]["deletionGracePeriodSeconds"] = json!(60);
    pod(value)
}

fn second(at: i64) -> Timestamp {
    Timestamp::from_second(at).unwrap()
}

const HERE: Here = Here {
    address: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 10)),
    agent: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 10)), 7443),
};

fn here(state: SandboxState, exits: &[i32]) -> Standing {
    let containers = exits.iter().map(|code| ContainerStatus {
        name: "app".parse().unwrap(),
        image: "web".into(),
        image_id: String::new(),
        container_id: String::new(),
        restart_count: 0,
        ready: state == SandboxState::Running,
        started: true,
        state: ContainerState::Terminated(Terminated {
            exit_code: *code,
            signal: 0,
            reason: String::new(),
            message: String::new(),
            started_at: None,
            finished_at: second(0),
            container_id: String::new(),
        }),
        last_terminated: None,
    });
    Standing::Here {
        status: Some(Arc::new(SandboxStatus {
            key: key(),
            namespace: "shop".parse().unwrap(),
            name: "web-0".parse().unwrap(),
            node_name: "burst".into(),
            revision: 1,
            state,
            reason: String::new(),
            message: String::new(),
            pod_ip: None,
            host_ip: HERE.address,
            accepted_at: second(0),
            mesh: MeshState::Serving,
            identity: None,
            init_containers: vec![],
            containers: containers.collect(),
            notice: None,
        })),
        grace: Duration::from_secs(20),
    }
}

fn written(standing: &Standing) -> (ClaimPhase, bool) {
    let status = of(&pod(bound()), standing, HERE, second(0), second(0))
        .status
        .unwrap();
    assert_eq!(status.agent, Some(HERE.agent));
    (status.phase, status.ready)
}

#[test]
fn a_claims_status_is_its_sandboxes() {
    assert_eq!(written(&Standing::Absent), (ClaimPhase::Pending, false));
    for (state, exits, phase, ready) in [
        (SandboxState::Preparing, vec![], ClaimPhase::Pending, false),
        (SandboxState::Running, vec![0], ClaimPhase::Running, true),
        (SandboxState::Stopping, vec![0], ClaimPhase::Running, false),
        (SandboxState::Stopped, vec![0, 0], ClaimPhase::Succeeded, false),
        (SandboxState::Stopped, vec![0, 1], ClaimPhase::Failed, false),
    ] {
        assert_eq!(written(&here(state, &exits)), (phase, ready), "{state:?}");
    }
    assert_eq!(written(&Standing::Ended), (ClaimPhase::Failed, false));
}

#[test]
fn what_is_over_stays_as_it_ended() {
    let mut value = bound();
    value["status"] = json!({"phase": "Succeeded"});
    assert_eq!(
        of(&pod(value), &Standing::Ended, HERE, second(0), second(0)).status,
        None
    );
}

#[test]
fn a_pod_that_is_no_claim_fails_by_name_and_goes_when_it_is_deleted() {
    let mut value = bound();
    value["spec"]["hostNetwork"] = json!(true);
    let duty = of(&pod(value.clone()), &Standing::Absent, HERE, second(0), second(0));
    let status = duty.status.unwrap();
    assert_eq!(
        (status.phase, status.reason.as_str()),
        (ClaimPhase::Failed, "NotAClaim")
    );
    assert!(status.message.contains("spec.hostNetwork"), "{}", status.message);
    assert_eq!(status.agent, None);
    assert!(!duty.let_go && duty.stop.is_none());
    value["metadata"]["deletionTimestamp"] = json!("1970-01-01T00:01:00Z");
    assert!(of(&pod(value), &Standing::Absent, HERE, second(0), second(0)).let_go);
}

#[test]
fn a_deletion_is_notice_and_the_stop_comes_with_the_pods_grace_before_its_end() {
    let running = here(SandboxState::Running, &[0]);
    let early = of(&deleted(60), &running, HERE, second(0), second(10));
    assert_eq!(early.stop, None);
    assert_eq!(early.again, Some(second(40)));
    assert_eq!(early.notice.map(|n| n.deadline), Some(second(60)));
    assert!(!early.let_go);
    let due = of(&deleted(60), &running, HERE, second(0), second(41));
    assert_eq!(due.stop, Some(Duration::from_secs(19)));
    let late = of(&deleted(60), &running, HERE, second(0), second(99));
    assert_eq!(late.stop, Some(Duration::ZERO));
    // It is under way: nothing hastens it again.
    let stopping = of(
        &deleted(60),
        &here(SandboxState::Stopping, &[0]),
        HERE,
        second(0),
        second(99),
    );
    assert_eq!((stopping.stop, stopping.let_go), (None, false));
}

#[test]
fn a_claim_is_let_go_when_nothing_is_left_and_only_after_a_fence_if_nothing_was() {
    let ended = of(&deleted(60), &Standing::Ended, HERE, second(0), second(0));
    assert_eq!((ended.fence, ended.let_go), (false, true));
    let absent = of(&deleted(60), &Standing::Absent, HERE, second(0), second(0));
    assert_eq!((absent.fence, absent.let_go), (true, true));
    for state in [
        SandboxState::Preparing,
        SandboxState::Running,
        SandboxState::Stopped,
    ] {
        assert!(
            !of(&deleted(60), &here(state, &[0]), HERE, second(0), second(99)).let_go,
            "{state:?}"
        );
    }
    let admitted = Standing::Here {
        status: None,
        grace: Duration::ZERO,
    };
    assert!(!of(&deleted(60), &admitted, HERE, second(0), second(99)).let_go);
}

#[test]
fn a_pod_has_its_own_grace_from_when_its_claims_deletion_was_seen_whatever_the_hosts_clock_says() {
    let running = here(SandboxState::Running, &[0]);
    // An hour ahead, or away for an hour.
    let first = of(&deleted(60), &running, HERE, second(3600), second(3600));
    assert_eq!(first.notice.map(|n| n.deadline), Some(second(3620)));
    assert_eq!(first.stop, Some(Duration::from_secs(20)));
    let later = of(&deleted(60), &running, HERE, second(3600), second(3615));
    assert_eq!(later.stop, Some(Duration::from_secs(5)));
    // Whoever grants less means it.
    let mut hasty = deleted(60);
    hasty.metadata.deletion_grace_period_seconds = Some(1);
    let duty = of(&hasty, &running, HERE, second(3600), second(3600));
    assert_eq!(duty.stop, Some(Duration::from_secs(1)));
}

#[test]
fn a_claim_of_another_release_is_not_failed_under_its_sandbox_and_its_deletion_is_notice() {
    let mut value = bound();
    value["spec"]["hostNetwork"] = json!(true);
    assert_eq!(
        subject(&pod(value.clone())),
        Some(("acme".parse().unwrap(), key()))
    );
    let running = here(SandboxState::Running, &[0]);
    let duty = of(&pod(value.clone()), &running, HERE, second(0), second(0));
    assert_eq!(duty, Duty::default());
    value["metadata"]["deletionTimestamp"] = json!(second(60).to_string());
    value["metadata"]["deletionGracePeriodSeconds"] = json!(60);
    let duty = of(&pod(value.clone()), &running, HERE, second(0), second(41));
    assert_eq!(duty.stop, Some(Duration::from_secs(19)));
    assert!(duty.notice.is_some() && duty.status.is_none() && !duty.let_go);
    // Nothing came of it: it goes, and no start that is under way finds room.
    let duty = of(&pod(value), &Standing::Absent, HERE, second(0), second(41));
    assert!(duty.fence && duty.let_go && duty.status.is_some());
}
