use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use pool_agent_api::{
    Attempt,
    spec::{Action, AppArmorProfile, File, HostField, SeccompProfile, Segment, Text, VolumeSource},
};
use serde_json::{Value, json};

use super::*;
use crate::pod::references::{ServiceLink, ServiceLinkPort, Token, TokenSlot};

fn facts() -> NodeFacts {
    NodeFacts {
        tenant: "demo".parse().unwrap(),
        node_name: "node".into(),
        cluster_domain: "cluster.local".into(),
        dns_address: "10.96.0.10".parse().unwrap(),
        upstream_nameservers: vec!["192.0.2.1".parse().unwrap()],
        allocatable: Resources {
            cpu_millis: 4000,
            memory_bytes: 1 << 30,
            ephemeral_storage_bytes: 1 << 34,
            sandboxes: 110,
        },
    }
}

fn pod(spec: Value) -> Pod {
    let mut pod: Pod = serde_json::from_value(json!({
        "metadata": {
            "name": "web-0", "namespace": "shop", "uid": "u-1",
            "labels": {"app": "web"}, "annotations": {"note": "a \"b\""},
        },
        "spec": spec,
    }))
    .unwrap();
    // The API server gives every container an image.
    for container in &mut pod.spec.as_mut().unwrap().containers {
        container.image.get_or_insert_with(|| "app:1".into());
    }
    pod
}

fn resolved() -> Resolved {
    let map: ConfigMap = serde_json::from_value(json!({
        "data": {"color": "blue", "not=a=name": "x"}, "binaryData": {"raw": "AP8="},
    }))
    .unwrap();
    let secret: Secret = serde_json::from_value(json!({"data": {"password": "aHVudGVyMg=="}})).unwrap();
    let pull: Secret = serde_json::from_value(json!({"data": {
        ".dockerconfigjson": "eyJhdXRocyI6eyJodHRwczovL3JlZy5leGFtcGxlL3YxLyI6eyJhdXRoIjoiZFRwdyJ9fX0=",
    }}))
    .unwrap();
    Resolved {
        config_maps: BTreeMap::from([("settings".into(), Some(Arc::new(map))), ("gone".into(), None)]),
        secrets: BTreeMap::from([
            ("login".into(), Some(Arc::new(secret))),
            ("pull".into(), Some(Arc::new(pull))),
        ]),
        tokens: BTreeMap::from([(
            TokenSlot {
                volume: "api".into(),
                source: 0,
            },
            Token {
                text: "token".into(),
                refresh_at: jiff::Timestamp::UNIX_EPOCH,
            },
        )]),
        runtime_handler: None,
        services: vec![ServiceLink {
            name: "my-db".into(),
            cluster_ip: "10.96.0.7".into(),
            ports: vec![ServiceLinkPort {
                name: Some("sql".into()),
                protocol: "TCP".into(),
                port: 5432,
            }],
        }],
    }
}

fn translated(spec: Value) -> Result<Translated, Untranslatable> {
    let key = SandboxKey {
        pod: "u-1".parse().unwrap(),
        attempt: Attempt::FIRST,
    };
    translate(&pod(spec), key, MeshMode::Enrolled, &resolved(), &facts())
}

fn spec(spec: Value) -> SandboxSpec {
    translated(spec).unwrap().spec
}

fn env(env: Value) -> BTreeMap<String, Text> {
    let spec = spec(json!({"containers": [{"name": "c", "env": env}]}));
    spec.containers[0]
        .env
        .iter()
        .map(|e| (e.name.clone(), e.value.clone()))
        .collect()
}

#[test]
fn a_field_that_cannot_be_given_is_refused_by_name() {
    let container = |extra: Value| {
        let mut c = json!({"name": "c"});
        c.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        json!({"containers": [c]})
    };
    let with = |extra: Value| {
        let mut s = json!({"containers": [{"name": "c"}]});
        s.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        s
    };
    for (spec, field) in [
        (with(json!({"hostNetwork": true})), "spec.hostNetwork"),
        (with(json!({"hostPID": true})), "spec.hostPID"),
        (with(json!({"hostIPC": true})), "spec.hostIPC"),
        (with(json!({"os": {"name": "windows"}})), "spec.os.name"),
        (
            with(json!({"resources": {"limits": {"cpu": "1"}}})),
            "spec.resources",
        ),
        (
            with(json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]})),
            "spec.volumes[0]",
        ),
        (
            with(json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]})),
            "spec.volumes[0]",
        ),
        (
            with(json!({"volumes": [{"name": "v", "emptyDir": {"medium": "HugePages"}}]})),
            "spec.volumes[0].emptyDir.medium",
        ),
        (
            with(json!({"securityContext": {"sysctls": [{"name": "kernel.core_pattern", "value": "1"}]}})),
            "spec.securityContext.sysctls[0].name",
        ),
        (
            container(json!({"securityContext": {"privileged": true}})),
            "spec.containers[0].securityContext.privileged",
        ),
        (
            container(json!({"securityContext": {"capabilities": {"add": ["NET_ADMIN", "CAP_SYS_ADMIN"]}}})),
            "spec.containers[0].securityContext.capabilities.add[1]",
        ),
        (
            container(json!({"securityContext": {"seccompProfile": {"type": "Localhost"}}})),
            "spec.containers[0].securityContext.seccompProfile.type",
        ),
        (
            container(json!({"securityContext": {"procMount": "Unmasked"}})),
            "spec.containers[0].securityContext.procMount",
        ),
        (
            container(json!({"securityContext": {"appArmorProfile": {"type": "Custom"}}})),
            "spec.containers[0].securityContext.appArmorProfile",
        ),
        (
            container(json!({"volumeDevices": [{"name": "v", "devicePath": "/dev/sda"}]})),
            "spec.containers[0].volumeDevices",
        ),
        (
            with(json!({"securityContext": {"supplementalGroupsPolicy": "Loose"}})),
            "spec.securityContext.supplementalGroupsPolicy",
        ),
        (
            container(json!({"ports": [{"containerPort": 80, "hostPort": 80}]})),
            "spec.containers[0].ports[0].hostPort",
        ),
        (
            container(json!({"restartPolicy": "Never"})),
            "spec.containers[0].restartPolicy",
        ),
        (
            container(json!({"resources": {"requests": {"nvidia.com/gpu": "1"}}})),
            "spec.containers[0].resources.requests.nvidia.com/gpu",
        ),
        (
            container(json!({"livenessProbe": {"tcpSocket": {"port": "nobody"}}})),
            "spec.containers[0].livenessProbe.tcpSocket.port",
        ),
        (
            container(
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.hostname"}}}]}),
            ),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath",
        ),
    ] {
        match translated(spec.clone()) {
            Err(Untranslatable::Unsupported(invalid)) => assert_eq!(invalid.field, field, "{spec}"),
            other => panic!("{spec}: {other:?}"),
        }
    }
}

#[test]
fn what_a_hosts_operator_may_allow_goes_to_the_host_whole() {
    let spec = spec(json!({
        "hostUsers": true,
        "securityContext": {
            "seLinuxOptions": {"level": "s0:c1,c2"},
            "supplementalGroupsPolicy": "Strict",
            "sysctls": [
                {"name": "net.core.somaxconn", "value": "1024"},
                {"name": "kernel/shm_rmid_forced", "value": "1"},
            ],
        },
        "containers": [{
            "name": "c",
            "securityContext": {
                "appArmorProfile": {"type": "Localhost", "localhostProfile": "mine"},
                "seLinuxOptions": {"type": "container_t"},
                "seccompProfile": {"type": "Unconfined"},
                "capabilities": {"add": ["NET_ADMIN"]},
            },
        }, {"name": "d"}],
    }));
    assert_eq!(spec.security.host_users, Some(true));
    assert!(spec.security.strict_supplemental_groups);
    assert_eq!(
        spec.security.sysctls.keys().collect::<Vec<_>>(),
        ["kernel.shm_rmid_forced", "net.core.somaxconn"]
    );
    let own = &spec.containers[0].security;
    assert_eq!(own.app_armor, Some(AppArmorProfile::Localhost("mine".into())));
    assert_eq!(own.se_linux.as_ref().unwrap().kind, "container_t");
    assert_eq!(own.seccomp, SeccompProfile::Unconfined);
    assert_eq!(own.add_capabilities, ["NET_ADMIN"]);
    // What the pod says is for those who say nothing themselves.
    let other = &spec.containers[1].security;
    assert_eq!(other.se_linux.as_ref().unwrap().level, "s0:c1,c2");
    assert_eq!(
        (&other.app_armor, other.seccomp),
        (&None, SeccompProfile::RuntimeDefault)
    );
}

#[test]
fn env_beats_env_from_beats_services_and_refers_to_what_came_before() {
    let spec = spec(json!({"containers": [{
        "name": "c",
        "envFrom": [{"prefix": "CFG_", "configMapRef": {"name": "settings"}}],
        "env": [
            {"name": "CFG_color", "value": "red"},
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)$(CFG_color)$(LATER)$$(A)"},
            {"name": "LATER", "value": "x"},
            {"name": "URL", "value": "$(MY_DB_SERVICE_HOST):$(MY_DB_SERVICE_PORT)"},
            {"name": "MY_DB_PORT", "value": "own"},
        ],
        "command": ["sh", "$(B)"],
        "args": ["$(NOBODY)"],
    }]}));
    let container = &spec.containers[0];
    let env: BTreeMap<_, _> = container
        .env
        .iter()
        .map(|e| (e.name.as_str(), &e.value))
        .collect();
    assert_eq!(env["CFG_color"], &Text::from("red"));
    assert_eq!(env["B"], &Text::from("1red$(LATER)$(A)"));
    assert_eq!(env["URL"], &Text::from("10.96.0.7:5432"));
    assert_eq!(env["MY_DB_PORT"], &Text::from("own"));
    assert_eq!(env["MY_DB_SERVICE_PORT_SQL"], &Text::from("5432"));
    assert_eq!(env["MY_DB_PORT_5432_TCP_ADDR"], &Text::from("10.96.0.7"));
    assert_eq!(container.command[1], Text::from("1red$(LATER)$(A)"));
    assert_eq!(container.args[0], Text::from("$(NOBODY)"));
}

#[test]
fn a_key_that_cannot_be_a_variable_is_skipped_and_told() {
    let translated = translated(json!({"containers": [{
        "name": "c", "envFrom": [{"configMapRef": {"name": "settings"}}],
    }]}))
    .unwrap();
    assert_eq!(translated.skipped_variables.len(), 1);
    assert!(
        translated.skipped_variables[0].contains("not=a=name"),
        "{:?}",
        translated.skipped_variables
    );
}

#[test]
fn a_pod_is_told_of_itself() {
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    let resource =
        |name: &str, divisor: &str| json!({"resourceFieldRef": {"resource": name, "divisor": divisor}});
    let env = env(json!([
        {"name": "NAME", "valueFrom": field("metadata.name")},
        {"name": "UID", "valueFrom": field("metadata.uid")},
        {"name": "LABEL", "valueFrom": field("metadata.labels['app']")},
        {"name": "NODE", "valueFrom": field("spec.nodeName")},
        {"name": "IP", "valueFrom": field("status.podIP")},
        {"name": "AT", "value": "http://$(IP):80"},
        {"name": "CPU", "valueFrom": resource("limits.cpu", "1")},
        {"name": "MEM", "valueFrom": resource("limits.memory", "1Mi")},
        {"name": "REQ", "valueFrom": resource("requests.cpu", "1m")},
    ]));
    let hole = Segment::Field(HostField::PodIp);
    assert_eq!(env["NAME"], Text::from("web-0"));
    assert_eq!(env["UID"], Text::from("u-1"));
    assert_eq!(env["LABEL"], Text::from("web"));
    assert_eq!(env["NODE"], Text::from("node"));
    assert_eq!(env["IP"], Text(vec![hole.clone()]));
    let at = Text(vec![
        Segment::Literal("http://".into()),
        hole,
        Segment::Literal(":80".into()),
    ]);
    assert_eq!(env["AT"], at);
    // Without a limit: what the node has.
    assert_eq!(
        (&env["CPU"], &env["MEM"]),
        (&Text::from("4"), &Text::from("1024"))
    );
    assert_eq!(env["REQ"], Text::from("0"));
}

#[test]
fn what_is_missing_is_told_as_a_kubelet_tells_it() {
    let key = |from: Value| json!({"containers": [{"name": "c", "env": [{"name": "A", "valueFrom": from}]}]});
    let volume = |source: Value| json!({"containers": [{"name": "c"}], "volumes": [source]});
    for (spec, message) in [
        (
            key(json!({"configMapKeyRef": {"name": "gone", "key": "k"}})),
            "configmap \"gone\" not found",
        ),
        (
            key(json!({"configMapKeyRef": {"name": "settings", "key": "k"}})),
            "couldn't find key k in ConfigMap shop/settings",
        ),
        (
            key(json!({"secretKeyRef": {"name": "nope", "key": "k"}})),
            "secret \"nope\" not found",
        ),
        (
            volume(json!({"name": "v", "configMap": {"name": "gone"}})),
            "MountVolume.SetUp failed for volume \"v\" : configmap \"gone\" not found",
        ),
        (
            volume(
                json!({"name": "v", "secret": {"secretName": "login", "items": [{"key": "k", "path": "p"}]}}),
            ),
            "MountVolume.SetUp failed for volume \"v\" : references non-existent key: k",
        ),
    ] {
        let error = translated(spec.clone()).unwrap_err();
        assert!(!matches!(error, Untranslatable::Unsupported(_)), "{spec}");
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn what_is_optional_may_be_missing() {
    let spec = spec(json!({
        "containers": [{
            "name": "c",
            "envFrom": [{"secretRef": {"name": "nope", "optional": true}}],
            "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "k", "optional": true}}}],
        }],
        "volumes": [{"name": "v", "configMap": {"name": "gone", "optional": true}}],
    }));
    assert!(spec.containers[0].env.iter().all(|e| e.name != "A"));
    let VolumeSource::Files(files) = &spec.volumes[0].source else {
        panic!()
    };
    assert_eq!(files.iter().count(), 0);
}

fn files(volume: Value, context: Value) -> (Vec<File>, bool) {
    let spec = spec(json!({"containers": [{"name": "c"}], "volumes": [volume], "securityContext": context}));
    let VolumeSource::Files(files) = &spec.volumes[0].source else {
        panic!()
    };
    (files.iter().cloned().collect(), files.sensitive())
}

#[test]
fn volumes_hold_the_keys_and_modes_that_are_asked_for() {
    let (all, sensitive) = files(
        json!({"name": "v", "configMap": {"name": "settings", "defaultMode": 256}}),
        json!({}),
    );
    let listed: Vec<_> = all.iter().map(|f| (f.path.as_str(), f.mode)).collect();
    assert_eq!(listed, [("color", 0o400), ("not=a=name", 0o400), ("raw", 0o400)]);
    assert_eq!((all[2].content.as_slice(), sensitive), (&[0, 255][..], false));
    let item = json!({"key": "password", "path": "a/./b", "mode": 384});
    let (some, sensitive) = files(
        json!({"name": "v", "secret": {"secretName": "login", "items": [item]}}),
        json!({}),
    );
    assert_eq!(
        (some[0].path.as_str(), some[0].mode, sensitive),
        ("a/b", 0o600, true)
    );
    assert_eq!(some[0].content, b"hunter2");
    let item = json!({"path": "labels", "fieldRef": {"fieldPath": "metadata.annotations"}});
    let (told, _) = files(json!({"name": "v", "downwardAPI": {"items": [item]}}), json!({}));
    assert_eq!(told[0].content, b"note=\"a \\\"b\\\"\"");
}

#[test]
fn a_token_is_private_to_the_pods_user_and_group() {
    let api = json!({"name": "api", "projected": {"sources": [
        {"serviceAccountToken": {"path": "token"}},
        {"configMap": {"name": "settings", "items": [{"key": "color", "path": "ca"}]}},
    ]}});
    for (context, mode, owner) in [
        (json!({}), 0o644, None),
        (json!({"runAsUser": 1000}), 0o600, Some(1000)),
        (json!({"runAsUser": 1000, "fsGroup": 7}), 0o640, Some(1000)),
        (json!({"fsGroup": 7}), 0o640, None),
    ] {
        let (files, sensitive) = files(api.clone(), context.clone());
        let token = files.iter().find(|f| f.path == "token").unwrap();
        assert_eq!(
            (token.mode, token.owner, sensitive),
            (mode, owner, true),
            "{context}"
        );
        assert_eq!(token.content, b"token");
    }
}

#[test]
fn the_resolver_follows_the_pods_policy() {
    let network = |extra: Value| {
        let mut s = json!({"containers": [{"name": "c"}]});
        s.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let network = spec(s).network.clone();
        let servers: Vec<_> = network.nameservers.iter().map(ToString::to_string).collect();
        format!(
            "{} | {} | {}",
            servers.join(" "),
            network.searches.join(" "),
            network.dns_options.join(" ")
        )
    };
    let searches = "shop.svc.cluster.local svc.cluster.local cluster.local";
    assert_eq!(network(json!({})), format!("10.96.0.10 | {searches} | ndots:5"));
    assert_eq!(network(json!({"dnsPolicy": "Default"})), "192.0.2.1 |  | ");
    let config = json!({
        "nameservers": ["192.0.2.9"], "searches": ["x.example"], "options": [{"name": "ndots", "value": "2"}],
    });
    assert_eq!(
        network(json!({"dnsPolicy": "None", "dnsConfig": config})),
        "192.0.2.9 | x.example | ndots:2"
    );
    assert_eq!(
        network(json!({"dnsConfig": config})),
        format!("10.96.0.10 192.0.2.9 | {searches} x.example | ndots:2")
    );
}

#[test]
fn names_follow_hostname_and_subdomain() {
    let names = |extra: Value| {
        let mut s = json!({"containers": [{"name": "c"}]});
        s.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let network = spec(s).network.clone();
        (network.hostname, network.domainname.unwrap_or_default())
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(names(json!({})), pair("web-0", ""));
    assert_eq!(
        names(json!({"hostname": "h", "subdomain": "s"})),
        pair("h", "s.shop.svc.cluster.local")
    );
    assert_eq!(
        names(json!({"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true})),
        pair("h.s.shop.svc.cluster.local", "s.shop.svc.cluster.local")
    );
}

#[test]
fn probes_are_defaulted_and_named_ports_looked_up() {
    let spec = spec(json!({"containers": [{
        "name": "c",
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"port": "http", "path": "/ready"}},
    }]}));
    let probe = spec.containers[0].readiness_probe.clone().unwrap();
    let Action::Http(http) = &probe.action else {
        panic!()
    };
    assert_eq!((http.port, http.path.as_str(), http.tls), (8080, "/ready", false));
    assert_eq!(
        (
            probe.period.as_secs(),
            probe.timeout.as_secs(),
            probe.thresholds.failure
        ),
        (10, 1, 3)
    );
}

#[test]
fn pull_secrets_become_credentials() {
    let spec = spec(json!({
        "containers": [{"name": "c"}],
        "imagePullSecrets": [{"name": "nope"}, {"name": "pull"}],
    }));
    let held: Vec<_> = spec
        .registry_credentials
        .iter()
        .map(|c| (c.registry.as_str(), c.username.as_str(), c.password.as_str()))
        .collect();
    assert_eq!(held, [("reg.example/v1", "u", "p")]);
}
