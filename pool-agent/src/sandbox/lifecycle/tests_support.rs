//! Specs for tests of this crate.

use std::{collections::BTreeMap, time::Duration};

use pool_agent_api::{
    Attempt, Resources, SandboxKey, SandboxSpec,
    spec::{
        Container, ContainerResources, ContainerSecurity, MeshMode, PodNetwork, PodSecurity, PullPolicy,
        RestartPolicy, SandboxParts, TerminationMessage,
    },
};

/// A pod with one container that runs `busybox`, changed by `change`.
pub(crate) fn spec(pod: &str, change: impl FnOnce(&mut SandboxParts)) -> SandboxSpec {
    let mut parts = SandboxParts {
        key: SandboxKey {
            pod: pod.parse().unwrap(),
            attempt: Attempt::FIRST,
        },
        tenant: "demo".parse().unwrap(),
        node_name: "node".into(),
        namespace: "shop".parse().unwrap(),
        name: "web-0".parse().unwrap(),
        service_account: "web".parse().unwrap(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        mesh: MeshMode::Enrolled,
        runtime_handler: None,
        network: PodNetwork {
            hostname: "web-0".into(),
            ..Default::default()
        },
        security: PodSecurity::default(),
        restart_policy: RestartPolicy::Always,
        termination_grace: Duration::from_secs(30),
        claim: Resources {
            cpu_millis: 100,
            memory_bytes: 1 << 20,
            ephemeral_storage_bytes: 0,
            sandboxes: 1,
        },
        volumes: vec![],
        init_containers: vec![],
        containers: vec![container("app")],
        registry_credentials: vec![],
        share_process_namespace: false,
        active_deadline: None,
        priority: 0,
    };
    change(&mut parts);
    SandboxSpec::new(parts).unwrap()
}

pub(crate) fn container(name: &str) -> Container {
    Container {
        name: name.parse().unwrap(),
        image: "busybox:1".into(),
        pull_policy: PullPolicy::IfNotPresent,
        command: vec!["sh".into()],
        args: vec![],
        working_dir: None,
        env: vec![],
        mounts: vec![],
        security: ContainerSecurity::default(),
        resources: ContainerResources::default(),
        startup_probe: None,
        liveness_probe: None,
        readiness_probe: None,
        post_start: None,
        pre_stop: None,
        stdin: false,
        stdin_once: false,
        tty: false,
        termination_message: TerminationMessage {
            path: "/dev/termination-log".into(),
            fallback_to_logs: false,
        },
        restartable_init: false,
        stop_signal: None,
    }
}
