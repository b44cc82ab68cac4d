use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::Attempt;

fn container(name: &str) -> Container {
    Container {
        name: name.parse().unwrap(),
        image: "busybox:1".into(),
        pull_policy: PullPolicy::IfNotPresent,
        command: vec!["sh".into()],
        args: vec![],
        working_dir: None,
        env: vec![EnvVar {
            name: "IP".into(),
            value: Text(vec![
                Segment::Literal("ip=".into()),
                Segment::Field(HostField::PodIp),
            ]),
        }],
        mounts: vec![Mount {
            volume: "data".parse().unwrap(),
            mount_path: "/data".into(),
            read_only: true,
            sub_path: None,
        }],
        security: ContainerSecurity {
            run_as_user: Some(1000),
            run_as_group: None,
            run_as_non_root: true,
            read_only_root_filesystem: true,
            no_new_privileges: true,
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["ALL".into()],
            seccomp: SeccompProfile::RuntimeDefault,
            app_armor: Some(AppArmorProfile::Localhost("strict".into())),
            se_linux: Some(SeLinuxOptions {
                level: "s0:c1,c2".into(),
                ..Default::default()
            }),
        },
        resources: ContainerResources {
            cpu_limit_millis: Some(100),
            ..Default::default()
        },
        startup_probe: None,
        liveness_probe: Some(Probe {
            action: Action::Tcp { host: None, port: 80 },
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            thresholds: Thresholds {
                success: 1,
                failure: 3,
            },
            termination_grace: None,
        }),
        readiness_probe: None,
        post_start: None,
        pre_stop: Some(Hook::Sleep(Duration::from_secs(2))),
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

fn parts() -> SandboxParts {
    SandboxParts {
        key: SandboxKey {
            pod: "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f".parse().unwrap(),
            attempt: Attempt::FIRST,
        },
        tenant: "demo".parse().unwrap(),
        node_name: "node".into(),
        namespace: "default".parse().unwrap(),
        name: "web".parse().unwrap(),
        service_account: "default".parse().unwrap(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        annotations: BTreeMap::new(),
        mesh: MeshMode::Enrolled,
        runtime_handler: None,
        network: PodNetwork {
            hostname: "web".into(),
            ..Default::default()
        },
        security: PodSecurity::default(),
        restart_policy: RestartPolicy::Always,
        termination_grace: Duration::from_secs(30),
        claim: Resources {
            sandboxes: 1,
            cpu_millis: 100,
            ..Default::default()
        },
        volumes: vec![Volume {
            name: "data".parse().unwrap(),
            source: VolumeSource::Files(
                Files::new(
                    vec![File {
                        path: "a/b".into(),
                        content: b"x".to_vec(),
                        mode: 0o644,
                        owner: None,
                    }],
                    true,
                )
                .unwrap(),
            ),
        }],
        init_containers: vec![],
        containers: vec![container("app")],
        registry_credentials: vec![],
        share_process_namespace: false,
        active_deadline: None,
        priority: -3,
    }
}

#[test]
fn a_spec_survives_the_wire() {
    let spec = SandboxSpec::new(parts()).unwrap();
    let bytes = wire::SandboxSpec::from(spec.clone()).encode_to_vec();
    let back = SandboxSpec::try_from(wire::SandboxSpec::decode(&bytes[..]).unwrap()).unwrap();
    assert_eq!(back, spec);
}

#[test]
fn a_refusal_names_the_field() {
    type Edit = fn(&mut SandboxParts);
    let table: [(&str, Edit); 6] = [
        ("containers", |p| p.containers.clear()),
        ("claim.sandboxes", |p| p.claim.sandboxes = 0),
        ("containers[1].name", |p| p.containers.push(container("app"))),
        ("containers[0].restartable_init", |p| {
            p.containers[0].restartable_init = true
        }),
        ("containers[0].mounts[0].volume", |p| p.volumes.clear()),
        ("volumes[1].name", |p| p.volumes.push(p.volumes[0].clone())),
    ];
    for (field, edit) in table {
        let mut parts = parts();
        edit(&mut parts);
        assert_eq!(SandboxSpec::new(parts).unwrap_err().field, field);
    }
}

#[test]
fn a_refusal_from_the_wire_names_the_nested_field() {
    type Edit = fn(&mut wire::SandboxSpec);
    let table: [(&str, Edit); 9] = [
        ("key", |s| s.key = None),
        ("mesh", |s| s.mesh = 0),
        ("restart_policy", |s| s.restart_policy = 99),
        ("namespace", |s| s.namespace = "../etc".into()),
        ("network.hostname", |s| {
            s.network.as_mut().unwrap().hostname = "a\nnameserver 6.6.6.6".into()
        }),
        ("containers[0].liveness_probe.tcp.port", |s| {
            s.containers[0].liveness_probe.as_mut().unwrap().action =
                Some(wire::probe::Action::Tcp(wire::TcpAction {
                    host: String::new(),
                    port: 70_000,
                }));
        }),
        ("containers[0].mounts[0].mount_path", |s| {
            s.containers[0].mounts[0].mount_path = "data".into()
        }),
        ("containers[0].env[0].name", |s| {
            s.containers[0].env[0].name = "A=B".into()
        }),
        ("volumes[0].files[0].path", |s| {
            let Some(wire::volume::Source::Files(files)) = &mut s.volumes[0].source else {
                unreachable!()
            };
            files.files[0].path = "../../etc/passwd".into();
        }),
    ];
    for (field, edit) in table {
        let mut spec = wire::SandboxSpec::from(SandboxSpec::new(parts()).unwrap());
        edit(&mut spec);
        assert_eq!(SandboxSpec::try_from(spec).unwrap_err().field, field);
    }
    // Of several mistakes, whose sandbox it is comes first.
    let nothing = SandboxSpec::try_from(wire::SandboxSpec::default());
    assert_eq!(nothing.unwrap_err().field, "key");
}

#[test]
fn a_file_below_another_file_is_refused() {
    let file = |path: &str| File {
        path: path.into(),
        content: vec![],
        mode: 0o644,
        owner: None,
    };
    assert!(Files::new(vec![file("a"), file("a/b")], false).is_err());
    assert!(Files::new(vec![file("a/b"), file("a/c")], false).is_ok());
    assert!(Files::new(vec![file("a"), file("a")], false).is_err());
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let mut parts = parts();
    parts.registry_credentials.push(RegistryCredential {
        registry: "r".into(),
        username: "u".into(),
        password: "hunter2".into(),
    });
    parts.containers[0].env.push(EnvVar {
        name: "TOKEN".into(),
        value: "hunter2".into(),
    });
    let text = format!("{:?}", SandboxSpec::new(parts).unwrap());
    assert!(!text.contains("hunter2"), "{text}");
}

proptest! {
    #[test]
    fn no_path_leaves_its_volume(path in "[a./\\x00]{0,12}") {
        let file = File { path: path.clone(), content: vec![], mode: 0o600, owner: None };
        if Files::new(vec![file], false).is_ok() {
            let clean: std::path::PathBuf = path.split('/').collect();
            prop_assert!(clean.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            prop_assert!(!path.starts_with('/'));
        }
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        if let Ok(spec) = wire::SandboxSpec::decode(&bytes[..]) {
            drop(SandboxSpec::try_from(spec));
        }
    }
}
