use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{Attempt, Resources, SandboxKey};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const UID: &str = "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f";

fn parts() -> ClaimParts {
    ClaimParts {
        tenant: "acme".parse().unwrap(),
        key: SandboxKey {
            pod: UID.parse().unwrap(),
            attempt: Attempt::parse("attempt", 3).unwrap(),
        },
        namespace: "shop".parse().unwrap(),
        name: "web-0".parse().unwrap(),
        node_name: "burst".into(),
        requests: Resources {
            cpu_millis: 250,
            memory_bytes: 64 << 20,
            ephemeral_storage_bytes: 1_000_000,
            sandboxes: 1,
        },
        images: vec![
            "docker.io/library/web:1".into(),
            "docker.io/library/side:2".into(),
        ],
        runtime_class: Some("runc".into()),
        priority_class: Some("tier-1".into()),
        owner: Some(OwnerUid::parse("owner", "7d0c").unwrap()),
        zone: Some("z1".into()),
        class: Some("burst".into()),
        arch: None,
        grace: Duration::from_secs(60),
    }
}

fn claim() -> Claim {
    Claim::new(parts()).unwrap()
}

/// As the cell holds it: with what its API server, admission and scheduler fill in.
fn in_the_cell(claim: &Claim) -> Value {
    let mut pod = serde_json::to_value(claim.to_pod()).unwrap();
    pod["metadata"]["uid"] = json!("c1a1");
    pod["metadata"]["resourceVersion"] = json!("77");
    pod["metadata"]["creationTimestamp"] = json!("2026-11-27T16:00:00Z");
    let spec = &mut pod["spec"];
    spec["nodeName"] = json!("host-a");
    spec["priority"] = json!(1000);
    spec["preemptionPolicy"] = json!("Never");
    spec["serviceAccount"] = json!("default");
    spec["serviceAccountName"] = json!("default");
    spec["overhead"] = json!({"memory": "16Mi"});
    for container in spec["containers"].as_array_mut().unwrap() {
        container["resizePolicy"] = json!([
            {"resourceName": "cpu", "restartPolicy": "NotRequired"},
            {"resourceName": "memory", "restartPolicy": "NotRequired"},
        ]);
        let requests = &mut container["resources"]["requests"];
        if requests["memory"] == json!("65536Ki") {
            requests["memory"] = json!("64Mi");
            requests["ephemeral-storage"] = json!("1M");
        }
    }
    pod["status"] = json!({"phase": "Pending", "qosClass": "Burstable"});
    pod
}

fn pod(value: Value) -> Pod {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_claim_comes_back_from_the_cell_as_it_was_made() {
    let claim = claim();
    let placed = Placed::parse(&pod(in_the_cell(&claim))).unwrap();
    assert_eq!(placed.claim, claim);
    assert_eq!(placed.host.as_ref().map(|h| h.as_str()), Some("host-a"));
    assert_eq!(placed.room().memory_bytes, 80 << 20);
    assert_eq!((placed.phase, placed.agent), (ClaimPhase::Pending, None));
}

#[test]
fn a_pod_of_any_other_shape_is_no_claim_and_the_field_is_named() {
    for (pointer, field, value) in [
        ("/metadata", "namespace", json!("kube-system")),
        ("/metadata", "name", json!("another")),
        ("/metadata/labels", "spindrift.dev/attempt", json!("4")),
        ("/metadata/labels", "spindrift.dev/attempt", json!("03")),
        ("/metadata/labels", "spindrift.dev/pod-uid", json!("..")),
        ("/metadata/labels", "spindrift.dev/owner", json!("other")),
        ("/metadata/annotations", "spindrift.dev/pod", json!("web-0")),
        ("/spec", "hostNetwork", json!(true)),
        ("/spec", "hostPID", json!(true)),
        ("/spec", "hostIPC", json!(true)),
        ("/spec", "hostUsers", json!(true)),
        ("/spec", "hostAliases", json!([{"ip": "10.0.0.1"}])),
        ("/spec", "shareProcessNamespace", json!(true)),
        (
            "/spec",
            "volumes",
            json!([{"name": "root", "hostPath": {"path": "/"}}]),
        ),
        ("/spec", "securityContext", json!({"runAsUser": 0})),
        ("/spec", "automountServiceAccountToken", json!(true)),
        ("/spec", "serviceAccountName", json!("operator")),
        ("/spec", "schedulerName", json!("mine")),
        ("/spec", "restartPolicy", json!("Always")),
        ("/spec", "activeDeadlineSeconds", json!(5)),
        ("/spec", "imagePullSecrets", json!([{"name": "theirs"}])),
        ("/spec", "resources", json!({"requests": {"cpu": "1"}})),
        ("/spec", "resourceClaims", json!([{"name": "gpu"}])),
        ("/spec", "initContainers", json!([{"name": "i", "image": "i"}])),
        (
            "/spec",
            "ephemeralContainers",
            json!([{"name": "e", "image": "e"}]),
        ),
        ("/spec", "tolerations", json!([{"operator": "Exists"}])),
        ("/spec/tolerations/0", "effect", json!("NoExecute")),
        ("/spec/tolerations/2", "tolerationSeconds", json!(100_000)),
        ("/spec/nodeSelector", "kubernetes.io/hostname", json!("host-b")),
        (
            "/spec/affinity",
            "podAffinity",
            json!({"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]}),
        ),
        (
            "/spec",
            "topologySpreadConstraints",
            json!([{"maxSkew": 1, "topologyKey": "x", "whenUnsatisfiable": "DoNotSchedule"}]),
        ),
        ("/spec/containers/0", "name", json!("shell")),
        ("/spec/containers/0", "command", json!(["sh"])),
        ("/spec/containers/0", "env", json!([{"name": "A", "value": "b"}])),
        (
            "/spec/containers/0",
            "ports",
            json!([{"containerPort": 80, "hostPort": 80}]),
        ),
        (
            "/spec/containers/1",
            "securityContext",
            json!({"privileged": true}),
        ),
        (
            "/spec/containers/1",
            "volumeMounts",
            json!([{"name": "a", "mountPath": "/a"}]),
        ),
        ("/spec/containers/1", "imagePullPolicy", json!("Always")),
        ("/spec/containers/1/resources/requests", "cpu", json!("1")),
        ("/spec/containers/1/resources", "limits", json!({"cpu": "1"})),
        (
            "/spec/containers/0/resources/requests",
            "nvidia.com/gpu",
            json!("1"),
        ),
        ("/spec/containers/0/resources", "claims", json!([{"name": "gpu"}])),
        ("/spec", "priorityClassName", json!("-")),
    ] {
        let mut changed = in_the_cell(&claim());
        changed.pointer_mut(pointer).unwrap()[field] = value.clone();
        match Claim::parse(&pod(changed)) {
            Ok(read) => panic!("{pointer}/{field} = {value} was taken for {read:?}"),
            Err(refused) => assert!(!refused.field.is_empty() && !refused.problem.is_empty()),
        }
    }
}

#[test]
fn the_refusal_names_the_path_of_the_field() {
    let refused = |pointer: &str, field: &str, value: Value| {
        let mut changed = in_the_cell(&claim());
        changed.pointer_mut(pointer).unwrap()[field] = value;
        Claim::parse(&pod(changed)).unwrap_err().field
    };
    assert_eq!(refused("/spec", "hostNetwork", json!(true)), "spec.hostNetwork");
    assert_eq!(
        refused(
            "/spec/containers/1",
            "securityContext",
            json!({"privileged": true})
        ),
        "spec.containers[1].securityContext"
    );
    assert_eq!(
        refused("/spec/nodeSelector", "kubernetes.io/hostname", json!("host-b")),
        "spec.nodeSelector.kubernetes.io/hostname"
    );
    assert_eq!(
        refused("/spec/containers/1/resources/requests", "memory", json!("1Gi")),
        "spec.containers[1].resources.requests"
    );
}

#[test]
fn what_makes_no_pod_makes_no_claim() {
    let refused = |change: fn(&mut ClaimParts)| {
        let mut parts = parts();
        change(&mut parts);
        Claim::new(parts).unwrap_err().field
    };
    assert_eq!(refused(|p| p.images.clear()), "images");
    assert_eq!(refused(|p| p.images[1] = p.images[0].clone()), "images[1]");
    assert_eq!(refused(|p| p.images[1] = "a b".into()), "images[1]");
    assert_eq!(refused(|p| p.requests.sandboxes = 2), "requests.sandboxes");
    assert_eq!(
        refused(|p| p.requests.memory_bytes = u64::MAX),
        "requests.memory_bytes"
    );
    assert_eq!(refused(|p| p.grace = Duration::from_millis(1500)), "grace");
    assert_eq!(refused(|p| p.zone = Some("a/b".into())), "zone");
    assert_eq!(refused(|p| p.key.pod = "ABC".parse().unwrap()), "key");
}

#[test]
fn a_deletion_is_notice_with_its_deadline() {
    let mut value = in_the_cell(&claim());
    value["metadata"]["deletionTimestamp"] = json!("2026-11-27T16:01:00Z");
    value["metadata"]["deletionGracePeriodSeconds"] = json!(60);
    let deletion = Placed::parse(&pod(value)).unwrap().deletion.unwrap();
    assert_eq!(deletion.grace, Duration::from_secs(60));
    assert_eq!(deletion.deadline.to_string(), "2026-11-27T16:01:00Z");
}

#[test]
fn a_status_is_written_once_and_read_back() {
    let status = ClaimStatus {
        phase: ClaimPhase::Running,
        reason: String::new(),
        message: String::new(),
        ready: true,
        host_ip: "192.0.2.10".parse().unwrap(),
        agent: Some("192.0.2.10:7443".parse().unwrap()),
    };
    let now = "2026-11-27T16:00:05Z".parse().unwrap();
    let mut value = in_the_cell(&claim());
    let patch = status.patch(&pod(value.clone()), now).unwrap();
    assert_eq!(patch["metadata"]["uid"], "c1a1");
    value["metadata"]["annotations"]["spindrift.dev/agent"] =
        patch["metadata"]["annotations"]["spindrift.dev/agent"].clone();
    value["status"] = patch["status"].clone();
    let written = pod(value);
    assert_eq!(status.patch(&written, now), None);
    let placed = Placed::parse(&written).unwrap();
    assert_eq!(placed.phase, ClaimPhase::Running);
    assert_eq!(placed.agent, status.agent);
    let unready = ClaimStatus {
        ready: false,
        ..status
    };
    assert!(unready.patch(&written, now).is_some());
}

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?"
}

fn any_parts() -> impl Strategy<Value = ClaimParts> {
    let amount = 0..=i64::MAX as u64;
    let ids = (name(), name(), 1..=u32::MAX, name(), name(), name());
    let amounts = (amount.clone(), amount.clone(), amount);
    let images = prop::collection::hash_set("[!-~]{1,40}", 1..6);
    let choices = prop::array::uniform6(prop::option::of(name()));
    (ids, amounts, images, choices, 0..=LONGEST_GRACE.as_secs()).prop_map(
        |(
            (tenant, uid, attempt, namespace, pod, node_name),
            (cpu, memory, storage),
            images,
            choices,
            grace,
        )| {
            let [runtime_class, priority_class, owner, zone, class, arch] = choices;
            ClaimParts {
                tenant: tenant.parse().unwrap(),
                key: SandboxKey {
                    pod: uid.parse().unwrap(),
                    attempt: Attempt::parse("attempt", attempt).unwrap(),
                },
                namespace: namespace.parse().unwrap(),
                name: pod.parse().unwrap(),
                node_name,
                requests: Resources {
                    cpu_millis: cpu,
                    memory_bytes: memory,
                    ephemeral_storage_bytes: storage,
                    sandboxes: 1,
                },
                images: images.into_iter().collect(),
                runtime_class,
                priority_class,
                owner: owner.map(|o| OwnerUid::parse("owner", o).unwrap()),
                zone,
                class,
                arch,
                grace: Duration::from_secs(grace),
            }
        },
    )
}

/// Values of every kind that a field can have.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        (0_i64..1000).prop_map(Value::from),
        name().prop_map(Value::from),
        Just(json!({"name": "x", "image": "x", "mountPath": "/", "topologyKey": "x", "ip": "::1"})),
        Just(json!([{"name": "x", "image": "x", "mountPath": "/", "operator": "Exists"}])),
        Just(json!({"privileged": true, "runAsUser": 0, "requests": {"cpu": "9"}})),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map(name(), inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Every field that a Pod's spec and its containers have.
const FIELDS: &[(&str, &str)] = &[
    ("/spec", "activeDeadlineSeconds"),
    ("/spec", "affinity"),
    ("/spec", "automountServiceAccountToken"),
    ("/spec", "dnsConfig"),
    ("/spec", "dnsPolicy"),
    ("/spec", "enableServiceLinks"),
    ("/spec", "ephemeralContainers"),
    ("/spec", "evictionResponders"),
    ("/spec", "hostAliases"),
    ("/spec", "hostIPC"),
    ("/spec", "hostNetwork"),
    ("/spec", "hostPID"),
    ("/spec", "hostUsers"),
    ("/spec", "hostname"),
    ("/spec", "hostnameOverride"),
    ("/spec", "imagePullSecrets"),
    ("/spec", "initContainers"),
    ("/spec", "os"),
    ("/spec", "readinessGates"),
    ("/spec", "resourceClaims"),
    ("/spec", "resources"),
    ("/spec", "restartPolicy"),
    ("/spec", "schedulerName"),
    ("/spec", "schedulingGates"),
    ("/spec", "schedulingGroup"),
    ("/spec", "securityContext"),
    ("/spec", "setHostnameAsFQDN"),
    ("/spec", "shareProcessNamespace"),
    ("/spec", "subdomain"),
    ("/spec", "tolerations"),
    ("/spec", "topologySpreadConstraints"),
    ("/spec", "volumes"),
    ("/spec/containers/0", "args"),
    ("/spec/containers/0", "command"),
    ("/spec/containers/0", "env"),
    ("/spec/containers/0", "envFrom"),
    ("/spec/containers/0", "imagePullPolicy"),
    ("/spec/containers/0", "lifecycle"),
    ("/spec/containers/0", "livenessProbe"),
    ("/spec/containers/0", "ports"),
    ("/spec/containers/0", "readinessProbe"),
    ("/spec/containers/0", "restartPolicy"),
    ("/spec/containers/0", "securityContext"),
    ("/spec/containers/0", "startupProbe"),
    ("/spec/containers/0", "stdin"),
    ("/spec/containers/0", "tty"),
    ("/spec/containers/0", "volumeDevices"),
    ("/spec/containers/0", "volumeMounts"),
    ("/spec/containers/0", "workingDir"),
];

proptest! {
    #[test]
    fn what_is_made_of_a_claim_is_that_claim(parts in any_parts()) {
        let claim = Claim::new(parts).unwrap();
        prop_assert_eq!(Claim::parse(&claim.to_pod()), Ok(claim.clone()));
        let placed = Placed::parse(&pod(in_the_cell(&claim))).unwrap();
        prop_assert_eq!(placed.claim, claim);
    }

    /// Whatever a field says that a claim leaves alone, it makes the Pod no claim,
    /// unless it says nothing.
    #[test]
    fn no_field_that_a_claim_leaves_alone_can_be_said(
        (pointer, field) in prop::sample::select(FIELDS),
        value in any_json(),
    ) {
        let claim = claim();
        let before = pod(in_the_cell(&claim));
        let mut changed = in_the_cell(&claim);
        changed.pointer_mut(pointer).unwrap()[field] = value;
        let Ok(changed) = serde_json::from_value::<Pod>(changed) else {
            return Ok(());
        };
        let mut says = serde_json::to_value(&changed).unwrap();
        let mut said = serde_json::to_value(&before).unwrap();
        shape::prune(&mut says);
        shape::prune(&mut said);
        let parsed = Claim::parse(&changed);
        prop_assert_eq!(parsed.is_ok(), says == said, "{}/{}: {:?}", pointer, field, parsed);
    }
}
