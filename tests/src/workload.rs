//! What tests run, as manifests, and what they read off the status of a Pod.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use serde_json::{Value, json};
use spindrift_local::images::{AGNHOST, BUSYBOX_IMAGE};

use crate::program::PROBE;

/// Where the test program and agnhost listen unless told otherwise.
pub const PORT: u16 = 8080;

/// A Pod, labelled `app: NAME`. What `spec` says wins.
pub fn pod(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": with_defaults(spec),
    })
}

/// A Deployment whose pods are labelled `app: NAME`.
pub fn deployment(name: &str, replicas: u32, spec: Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": with_defaults(spec),
            },
        },
    })
}

/// A Service of the pods labelled `app: NAME`: port 80 to [`PORT`].
pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": PORT}],
        },
    })
}

pub fn service_account(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
}

pub fn config_map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

pub fn secret(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data})
}

/// A second is enough for tests' programs, and nobody waits for thirty.
fn with_defaults(spec: Value) -> Value {
    merge(json!({"terminationGracePeriodSeconds": 1}), spec)
}

/// The members of both; `over` wins.
pub fn merge(mut base: Value, over: Value) -> Value {
    match (&mut base, over) {
        (Value::Object(base), Value::Object(over)) => base.extend(over),
        (base, over) => *base = over,
    }
    base
}

/// The container `main` of our test program.
pub fn probe(args: &[&str]) -> Value {
    json!({"name": "main", "image": PROBE.reference, "args": args})
}

/// The test program serving on [`PORT`], ready when it does.
pub fn probe_server() -> Value {
    let port = PORT.to_string();
    merge(
        probe(&["serve", &port]),
        json!({"readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1}}),
    )
}

/// The container `main` with a shell command of busybox.
pub fn shell(script: &str) -> Value {
    json!({"name": "main", "image": BUSYBOX_IMAGE.reference, "command": ["sh", "-c", script]})
}

/// A container of the test program that only waits to be told by exec.
pub fn idle() -> Value {
    json!({"name": "main", "image": PROBE.reference, "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"]})
}

/// The container `main` of Kubernetes' own test server.
pub fn agnhost(args: &[&str]) -> Value {
    json!({"name": "main", "image": AGNHOST.reference, "args": args})
}

/// agnhost's HTTP server on [`PORT`].
pub fn netexec() -> Value {
    merge(
        agnhost(&["netexec", &format!("--http-port={PORT}")]),
        json!({"readinessProbe": {"httpGet": {"port": PORT, "path": "/healthz"}, "periodSeconds": 1}}),
    )
}

pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready") == Some("True")
}

pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    Some(
        conditions
            .iter()
            .find(|condition| condition.type_ == kind)?
            .status
            .as_str(),
    )
}

pub fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

pub fn reason(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.reason.as_deref())
        .unwrap_or_default()
}

pub fn message(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.message.as_deref())
        .unwrap_or_default()
}

pub fn address(pod: &Pod) -> Option<Ipv4Addr> {
    pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// The status of a container of any kind.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let app = status.container_statuses.iter().flatten();
    let mut all = app.chain(status.init_container_statuses.iter().flatten());
    all.find(|container| container.name == name)
}

pub fn state<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerState> {
    container(pod, name)?.state.as_ref()
}

/// Why a container waits, or the empty text.
pub fn waiting<'a>(pod: &'a Pod, name: &str) -> &'a str {
    let waiting = state(pod, name).and_then(|state| state.waiting.as_ref());
    waiting
        .and_then(|waiting| waiting.reason.as_deref())
        .unwrap_or_default()
}

pub fn is_running(pod: &Pod, name: &str) -> bool {
    state(pod, name).is_some_and(|state| state.running.is_some())
}

/// What `kubectl get` would show in short: for messages.
pub fn summary(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let all = status.init_container_statuses.iter().flatten();
    let containers: Vec<String> = all
        .chain(status.container_statuses.iter().flatten())
        .map(|container| {
            let state = serde_json::to_string(&container.state).unwrap_or_default();
            format!(
                "{} ready={} restarts={} {state}",
                container.name, container.ready, container.restart_count
            )
        })
        .collect();
    format!(
        "{} phase={} reason={:?} message={:?} ip={:?} ready={:?} [{}]",
        pod.metadata.name.as_deref().unwrap_or_default(),
        phase(pod),
        reason(pod),
        message(pod),
        status.pod_ip,
        condition(pod, "Ready"),
        containers.join("; ")
    )
}
