use k8s_openapi::api::core::v1::PodStatus;
use pool_agent_api::{Attempt, SandboxKey};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const T0: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(T0 + seconds).unwrap()
}

fn pod(spec: Value, status: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u-1", "generation": 3},
        "spec": spec,
        "status": status,
    }))
    .unwrap()
}

/// One app container, restarted or not.
fn one(policy: &str) -> Pod {
    let spec = json!({"restartPolicy": policy, "containers": [{"name": "app", "image": "app:1"}]});
    pod(spec, json!({"phase": "Pending", "qosClass": "BestEffort"}))
}

fn running() -> ContainerState {
    ContainerState::Running { started_at: at(1) }
}

fn waiting(reason: &str) -> ContainerState {
    ContainerState::Waiting {
        reason: reason.into(),
        message: String::new(),
    }
}

fn exit(code: i32) -> Terminated {
    Terminated {
        exit_code: code,
        signal: 0,
        reason: if code == 0 {
            "Completed".into()
        } else {
            "Error".into()
        },
        message: String::new(),
        started_at: Some(at(1)),
        finished_at: at(5),
        container_id: "containerd://1".into(),
    }
}

fn container(name: &str, state: ContainerState) -> ContainerStatus {
    let started = matches!(state, ContainerState::Running { .. });
    ContainerStatus {
        name: name.parse().unwrap(),
        image: "registry/app:1".into(),
        image_id: "sha256:1".into(),
        container_id: "containerd://1".into(),
        restart_count: 0,
        ready: started,
        started,
        state,
        last_terminated: None,
    }
}

fn sandbox(state: SandboxState, init: Vec<ContainerStatus>, app: Vec<ContainerStatus>) -> SandboxStatus {
    SandboxStatus {
        key: SandboxKey {
            pod: "u-1".parse().unwrap(),
            attempt: Attempt::FIRST,
        },
        namespace: "shop".parse().unwrap(),
        name: "web".parse().unwrap(),
        node_name: "node".into(),
        revision: 1,
        state,
        reason: String::new(),
        message: String::new(),
        pod_ip: Some("10.77.1.2".parse().unwrap()),
        host_ip: "192.0.2.11".parse().unwrap(),
        accepted_at: at(0),
        mesh: MeshState::Serving,
        identity: Some("spiffe://cluster.local/ns/shop/sa/web".into()),
        init_containers: init,
        containers: app,
        notice: None,
    }
}

fn observed<'a>(pod: &'a Pod, sandbox: Option<&'a SandboxStatus>) -> Observed<'a> {
    Observed {
        waiting: None,
        pod,
        record: None,
        sandbox,
        verdict: None,
        holdup: None,
        host_lost: false,
        unsettled: false,
        ended: false,
        now: at(60),
    }
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> (&'a str, &'a str) {
    let condition = status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == kind)
        .unwrap();
    (&condition.status, condition.reason.as_deref().unwrap_or_default())
}

#[test]
fn a_running_pod_is_told_as_a_kubelet_tells_it() {
    let pod = one("Always");
    let sandbox = sandbox(SandboxState::Running, vec![], vec![container("app", running())]);
    insta::assert_json_snapshot!(status(&observed(&pod, Some(&sandbox))));
}

#[test]
fn a_pod_that_no_host_has_yet_is_being_created() {
    let status = status(&observed(&one("Always"), None));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let containers = status.container_statuses.unwrap();
    let waiting = containers[0].state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ContainerCreating"));
}

#[test]
fn the_phase_follows_the_containers() {
    let twice = |state| vec![container("app", state)];
    let backoff = |code| {
        let mut c = container("app", waiting("CrashLoopBackOff"));
        c.last_terminated = Some(exit(code));
        vec![c]
    };
    let done = |code| twice(ContainerState::Terminated(exit(code)));
    for (policy, containers, expected) in [
        ("Always", twice(waiting("ErrImagePull")), "Pending"),
        ("Always", twice(running()), "Running"),
        ("Always", done(0), "Running"),
        ("Always", backoff(1), "Running"),
        ("OnFailure", done(0), "Succeeded"),
        ("OnFailure", done(1), "Running"),
        ("OnFailure", backoff(1), "Running"),
        ("Never", done(0), "Succeeded"),
        ("Never", done(3), "Failed"),
    ] {
        let sandbox = sandbox(SandboxState::Running, vec![], containers.clone());
        let pod = one(policy);
        let status = status(&observed(&pod, Some(&sandbox)));
        assert_eq!(status.phase.as_deref(), Some(expected), "{policy} {containers:?}");
    }
}

#[test]
fn init_containers_come_first_and_a_sidecar_does_not_hold_up_the_end() {
    let spec = json!({
        "restartPolicy": "Never",
        "initContainers": [
            {"name": "setup", "image": "x"},
            {"name": "proxy", "image": "x", "restartPolicy": "Always"},
        ],
        "containers": [{"name": "app", "image": "x"}],
    });
    let pod = pod(spec, json!({"phase": "Pending"}));
    let ended = |code| ContainerState::Terminated(exit(code));
    for (setup, proxy, app, phase, initialized) in [
        (
            running(),
            waiting("PodInitializing"),
            waiting("PodInitializing"),
            "Pending",
            "False",
        ),
        (
            ended(1),
            waiting("PodInitializing"),
            waiting("PodInitializing"),
            "Failed",
            "False",
        ),
        (
            ended(0),
            waiting("PodInitializing"),
            waiting("PodInitializing"),
            "Pending",
            "False",
        ),
        (
            ended(0),
            running(),
            waiting("ContainerCreating"),
            "Pending",
            "True",
        ),
        (ended(0), running(), running(), "Running", "True"),
        (ended(0), running(), ended(0), "Succeeded", "True"),
        (ended(0), ended(137), ended(0), "Succeeded", "True"),
    ] {
        let sandbox = sandbox(
            SandboxState::Running,
            vec![
                container("setup", setup.clone()),
                container("proxy", proxy.clone()),
            ],
            vec![container("app", app.clone())],
        );
        let status = status(&observed(&pod, Some(&sandbox)));
        let said = (
            status.phase.as_deref().unwrap(),
            condition(&status, "Initialized").0,
        );
        assert_eq!(said, (phase, initialized), "{setup:?} {proxy:?} {app:?}");
    }
}

#[test]
fn a_deletion_ends_in_a_final_phase() {
    let pod = pod(
        json!({"restartPolicy": "Always", "containers": [{"name": "app"}]}),
        json!({
            "phase": "Running",
            "containerStatuses": [{
                "name": "app", "image": "x", "imageID": "", "ready": true, "restartCount": 0,
                "containerID": "containerd://1", "state": {"running": {}},
            }],
        }),
    );
    let gone = Observed {
        ended: true,
        ..observed(&pod, None)
    };
    let status = status(&gone);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let ended = container.state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(
        (ended.exit_code, ended.reason.as_deref()),
        (137, Some("ContainerStatusUnknown"))
    );
    assert_eq!(condition(&status, "Ready"), ("False", "PodFailed"));

    let ended = Observed {
        ended: true,
        ..observed(&pod, None)
    };
    let sandbox = sandbox(
        SandboxState::Stopped,
        vec![],
        vec![container_of(ContainerState::Terminated(exit(0)))],
    );
    let status = super::status(&Observed {
        sandbox: Some(&sandbox),
        ..ended
    });
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
}

fn container_of(state: ContainerState) -> ContainerStatus {
    container("app", state)
}

#[test]
fn a_verdict_fails_the_pod_with_its_reason_and_no_containers() {
    let verdict = Verdict {
        reason: "OutOfcpu".into(),
        message: "Pod was rejected".into(),
    };
    let pod = one("Always");
    let status = status(&Observed {
        verdict: Some(&verdict),
        ..observed(&pod, None)
    });
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
    assert_eq!(status.container_statuses, None);
}

#[test]
fn a_missing_reference_is_told_on_the_container_that_needs_it() {
    let spec = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let pod = pod(spec, json!({"phase": "Pending"}));
    let holdup = Holdup {
        container: Some("b".into()),
        reason: "CreateContainerConfigError".into(),
        message: "configmap \"settings\" not found".into(),
    };
    let status = status(&Observed {
        holdup: Some(&holdup),
        ..observed(&pod, None)
    });
    let reasons: Vec<_> = status
        .container_statuses
        .unwrap()
        .into_iter()
        .map(|c| c.state.unwrap().waiting.unwrap().reason.unwrap())
        .collect();
    assert_eq!(reasons, ["ContainerCreating", "CreateContainerConfigError"]);
}

#[test]
fn a_silent_host_makes_its_pods_not_ready_and_nothing_else() {
    let pod = one("Always");
    let sandbox = sandbox(SandboxState::Running, vec![], vec![container("app", running())]);
    let status = status(&Observed {
        host_lost: true,
        ..observed(&pod, Some(&sandbox))
    });
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(condition(&status, "Ready"), ("False", "HostUnreachable"));
}

#[test]
fn a_readiness_gate_is_waited_for() {
    let spec = json!({
        "containers": [{"name": "app"}],
        "readinessGates": [{"conditionType": "lb.example/ready"}],
    });
    let sandbox = sandbox(SandboxState::Running, vec![], vec![container("app", running())]);
    let without = pod(spec.clone(), json!({}));
    let status = super::status(&observed(&without, Some(&sandbox)));
    assert_eq!(condition(&status, "ContainersReady").0, "True");
    assert_eq!(condition(&status, "Ready"), ("False", "ReadinessGatesNotReady"));
    let with = pod(
        spec,
        json!({"conditions": [{"type": "lb.example/ready", "status": "True"}]}),
    );
    let status = super::status(&observed(&with, Some(&sandbox)));
    assert_eq!(condition(&status, "Ready").0, "True");
}

#[test]
fn foreign_conditions_and_the_qos_class_survive() {
    let mut pod = one("Always");
    let foreign =
        json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    pod.status.as_mut().unwrap().conditions = Some(vec![serde_json::from_value(foreign).unwrap()]);
    let sandbox = sandbox(SandboxState::Running, vec![], vec![container("app", running())]);
    let status = status(&observed(&pod, Some(&sandbox)));
    assert_eq!(
        status.conditions.as_ref().unwrap()[0],
        pod.status.as_ref().unwrap().conditions.as_ref().unwrap()[0]
    );
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
}

#[test]
fn a_patch_names_only_what_differs_and_whom_it_is_for() {
    let pod = one("Always");
    let before = pod.status.clone().unwrap();
    let waiting = sandbox(
        SandboxState::Preparing,
        vec![],
        vec![container("app", waiting("ContainerCreating"))],
    );
    let first = status(&observed(&pod, Some(&waiting)));
    assert!(patch("u-1", &first, &first).is_none(), "nothing differs");
    let mut pod = pod.clone();
    pod.status = Some(first.clone());
    let running = sandbox(SandboxState::Running, vec![], vec![container("app", running())]);
    let second = status(&observed(&pod, Some(&running)));
    let change = patch("u-1", &first, &second).unwrap();
    assert_eq!(change["metadata"], json!({"uid": "u-1"}));
    let named: Vec<_> = change["status"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(named, ["conditions", "containerStatuses", "phase"]);
    // A condition that loses its reason says so.
    let ready = change["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["type"] == "Ready")
        .unwrap();
    assert_eq!(
        (&ready["status"], &ready["reason"]),
        (&json!("True"), &Value::Null)
    );
    assert!(patch("u-1", &before, &second).is_some());
}

#[test]
fn a_new_address_takes_the_place_of_the_old_one() {
    let with = |ip: &str| PodStatus {
        pod_ips: Some(vec![PodIP { ip: ip.to_owned() }]),
        ..PodStatus::default()
    };
    let (old, new) = (with("10.77.1.2"), with("10.77.1.9"));
    let change = patch("u", &old, &new).unwrap();
    assert_eq!(
        change["status"]["podIPs"],
        json!([{"ip": "10.77.1.9"}, {"$patch": "delete", "ip": "10.77.1.2"}])
    );
}

fn states() -> impl Strategy<Value = ContainerState> {
    prop_oneof![
        Just(waiting("ContainerCreating")),
        Just(waiting("CrashLoopBackOff")),
        Just(running()),
        (0..3i32).prop_map(|code| ContainerState::Terminated(exit(code))),
    ]
}

fn reports() -> impl Strategy<Value = SandboxStatus> {
    let state = prop_oneof![
        Just(SandboxState::Preparing),
        Just(SandboxState::Running),
        Just(SandboxState::Stopping),
        Just(SandboxState::Stopped),
    ];
    let last = prop::option::of((0..3i32).prop_map(exit));
    (state, states(), states(), last, 0..5u32).prop_map(|(state, a, b, last, restarts)| {
        let mut a = container("a", a);
        a.last_terminated = last;
        a.restart_count = restarts;
        sandbox(state, vec![], vec![a, container("b", b)])
    })
}

proptest! {
    /// Whatever hosts report, in whatever order, the tale that users are told
    /// only moves forward.
    #[test]
    fn a_status_never_goes_back(
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
        steps in prop::collection::vec((prop::option::of(reports()), any::<bool>(), any::<bool>()), 1..12),
    ) {
        let spec = json!({"restartPolicy": policy, "containers": [{"name": "a"}, {"name": "b"}]});
        let mut pod = pod(spec, json!({"phase": "Pending"}));
        for (i, (report, lost, ended)) in steps.into_iter().enumerate() {
            let before = pod.status.clone().unwrap();
            let now = at(i64::try_from(i).unwrap());
            let next = status(&Observed {
                host_lost: lost,
                ended: ended && i > 8,
                now,
                ..observed(&pod, report.as_ref())
            });
            let phases = (Phase::parse(before.phase.as_deref()), Phase::parse(next.phase.as_deref()));
            prop_assert!(phases.1 >= phases.0, "{phases:?}");
            prop_assert!(!phases.0.is_final() || phases.0 == phases.1, "{phases:?}");
            prop_assert!(before.start_time.is_none() || before.start_time == next.start_time);
            for old in before.container_statuses.iter().flatten() {
                let new = next.container_statuses.iter().flatten().find(|c| c.name == old.name).unwrap();
                prop_assert!(new.restart_count >= old.restart_count);
            }
            for new in next.conditions.iter().flatten() {
                let old = before.conditions.iter().flatten().find(|c| c.type_ == new.type_);
                if let Some(old) = old {
                    let moved = old.last_transition_time != new.last_transition_time;
                    prop_assert!(!moved || old.status != new.status);
                }
            }
            let ready = condition(&next, "Ready").0 == "True";
            prop_assert!(!ready || !phases.1.is_final());
            // What is written is all there is to write.
            pod.status = Some(next.clone());
            let again = status(&Observed { host_lost: lost, ended: ended && i > 8, now, ..observed(&pod, report.as_ref()) });
            prop_assert_eq!(patch("u-1", &next, &again), None);
        }
    }
}

fn record(attempt: u32) -> Record {
    Record {
        place: crate::pod::lifecycle::Place {
            host: "host-a".parse().unwrap(),
            attempt: Attempt::parse("attempt", attempt).unwrap(),
        },
        mesh: MeshMode::Enrolled,
        other: None,
    }
}

#[test]
fn an_enrolled_pod_that_its_host_reports_without_an_identity_is_not_ready() {
    let pod = one("Always");
    let mut sandbox = sandbox(SandboxState::Running, vec![], vec![container_of(running())]);
    let record = record(1);
    let ready = |sandbox: &SandboxStatus| {
        let status = status(&Observed {
            record: Some(&record),
            ..observed(&pod, Some(sandbox))
        });
        let of = |kind| {
            let (holds, reason) = condition(&status, kind);
            format!("{holds} {reason}")
        };
        [of("PodReadyToStartContainers"), of("Ready")]
    };
    assert_eq!(ready(&sandbox), ["True ", "True "]);
    sandbox.identity = None;
    assert_eq!(ready(&sandbox), ["False ", "False OutsideMesh"]);
}

#[test]
fn a_record_is_kept_current_and_a_newer_attempt_is_never_written_over() {
    let placed = |before: Option<u32>, ours: u32| {
        let mut pod = one("Always");
        if let Some(attempt) = before {
            let status = pod.status.take().unwrap();
            pod.status = Some(on_record(status, &record(attempt), &pod, at(0)));
        }
        let record = record(ours);
        let status = status(&Observed {
            record: Some(&record),
            ..observed(&pod, None)
        });
        let pod = Pod {
            status: Some(status),
            ..pod
        };
        Record::of(&pod).unwrap().place.attempt.get()
    };
    // Taken away, the same, older, and another process's.
    for (before, ours, then) in [(None, 2, 2), (Some(2), 2, 2), (Some(1), 2, 2), (Some(3), 2, 3)] {
        assert_eq!(placed(before, ours), then, "{before:?} {ours}");
    }
}
