use pool_agent_api::spec::{
    ContainerSecurity, File, Files, PodSecurity, SandboxParts, SeLinuxOptions, Volume,
};

use super::*;
use crate::sandbox::lifecycle::tests_support::spec;

const ABLE: Abilities = Abilities {
    user_namespaces: true,
    app_armor: true,
    se_linux: true,
    strict_supplemental_groups: true,
};

fn policy(text: &str) -> Privilege {
    toml::from_str(text).unwrap()
}

fn container(security: ContainerSecurity) -> SandboxSpec {
    spec("a", |parts| parts.containers[0].security = security.clone())
}

fn pod(security: PodSecurity) -> SandboxSpec {
    spec("a", |parts| parts.security = security.clone())
}

fn adding(names: &[&str]) -> SandboxSpec {
    container(ContainerSecurity {
        add_capabilities: names.iter().map(|n| (*n).into()).collect(),
        ..Default::default()
    })
}

fn refused(policy: &Privilege, spec: &SandboxSpec, host: Abilities) -> (RefusalReason, String) {
    let denied = policy.check(spec, host).unwrap_err();
    (denied.reason, denied.field)
}

#[test]
fn what_a_pod_may_not_be_is_refused_by_its_field() {
    use RefusalReason::Forbidden;
    let at = |field: &str| format!("spec.containers[0].security.{field}");
    let sysctl = |name: &str| {
        pod(PodSecurity {
            sysctls: [(name.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        })
    };
    let safe = Privilege::default();
    for (spec, field) in [
        (adding(&["CHOWN", "SYS_ADMIN"]), at("add_capabilities[1]")),
        (adding(&["ALL"]), at("add_capabilities[0]")),
        (adding(&["NET_ADMIN"]), at("add_capabilities[0]")),
        (adding(&["SYS_PTRACE"]), at("add_capabilities[0]")),
        (adding(&["NO_SUCH"]), at("add_capabilities[0]")),
        (
            container(ContainerSecurity {
                seccomp: SeccompProfile::Unconfined,
                ..Default::default()
            }),
            at("seccomp"),
        ),
        (
            container(ContainerSecurity {
                app_armor: Some(AppArmorProfile::Unconfined),
                ..Default::default()
            }),
            at("app_armor"),
        ),
        (
            container(ContainerSecurity {
                app_armor: Some(AppArmorProfile::Localhost("x".into())),
                ..Default::default()
            }),
            at("app_armor"),
        ),
        (
            container(ContainerSecurity {
                se_linux: Some(SeLinuxOptions::default()),
                ..Default::default()
            }),
            at("se_linux"),
        ),
        (
            container(ContainerSecurity {
                run_as_user: Some(-1),
                ..Default::default()
            }),
            at("run_as_user"),
        ),
        (
            container(ContainerSecurity {
                run_as_group: Some(65536),
                ..Default::default()
            }),
            at("run_as_group"),
        ),
        (sysctl("kernel.msgmax"), "spec.security.sysctls".into()),
        (sysctl("net.core.somaxconn"), "spec.security.sysctls".into()),
        (sysctl("kernel.core_pattern"), "spec.security.sysctls".into()),
        (
            pod(PodSecurity {
                host_users: Some(true),
                ..Default::default()
            }),
            "spec.security.host_users".into(),
        ),
        (
            pod(PodSecurity {
                fs_group: Some(1 << 40),
                ..Default::default()
            }),
            "spec.security.fs_group".into(),
        ),
        (
            pod(PodSecurity {
                supplemental_groups: vec![1, 65536],
                ..Default::default()
            }),
            "spec.security.supplemental_groups[1]".into(),
        ),
    ] {
        assert_eq!(refused(&safe, &spec, ABLE), (Forbidden, field.clone()));
    }
    // Of an init container too.
    let init = spec("a", |parts| {
        let mut init = parts.containers[0].clone();
        init.name = "first".parse().unwrap();
        init.security.add_capabilities = vec!["BPF".into()];
        parts.init_containers = vec![init];
    });
    assert_eq!(
        refused(&safe, &init, ABLE).1,
        "spec.init_containers[0].security.add_capabilities[0]"
    );
    let owned = spec("a", |parts: &mut SandboxParts| {
        let file = File {
            path: "token".into(),
            content: "x".into(),
            mode: 0o600,
            owner: Some(70_000),
        };
        parts.volumes = vec![Volume {
            name: "v".parse().unwrap(),
            source: VolumeSource::Files(Files::new(vec![file], true).unwrap()),
        }];
    });
    assert_eq!(refused(&safe, &owned, ABLE).1, "spec.volumes[0].files.owner");
}

#[test]
fn what_a_container_has_anyway_may_be_named() {
    let safe = Privilege::default();
    let names = [
        "AUDIT_WRITE",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    ];
    assert_eq!(safe.check(&adding(&names), ABLE), Ok(Users::Own));
    let modest = pod(PodSecurity {
        fs_group: Some(65535),
        sysctls: [("net.ipv4.tcp_rmem".to_owned(), "4096 4096 4096".to_owned())].into(),
        strict_supplemental_groups: true,
        ..Default::default()
    });
    assert_eq!(safe.check(&modest, ABLE), Ok(Users::Own));
}

#[test]
fn a_class_has_what_is_said_above_it_but_for_what_it_says_itself() {
    let policy = policy(
        "unsafe_sysctls = ['net.core.somaxconn', 'kernel.msg*']
         [classes.gvisor]
         capabilities = ['ALL']
         unconfined_seccomp = true",
    );
    let of = |handler: Option<&str>, mut wanted: Box<dyn FnMut(&mut SandboxParts)>| {
        spec("a", |parts| {
            parts.runtime_handler = handler.map(Into::into);
            parts.security.sysctls = [("kernel.msgmax".to_owned(), "1".to_owned())].into();
            wanted(parts);
        })
    };
    let greedy = || -> Box<dyn FnMut(&mut SandboxParts)> {
        Box::new(|parts| {
            parts.containers[0].security.add_capabilities = vec!["SYS_ADMIN".into()];
            parts.containers[0].security.seccomp = SeccompProfile::Unconfined;
        })
    };
    assert!(policy.check(&of(Some("gvisor"), greedy()), ABLE).is_ok());
    assert!(policy.check(&of(None, greedy()), ABLE).is_err());
    assert!(policy.check(&of(Some("other"), greedy()), ABLE).is_err());
    assert!(policy.check(&of(None, Box::new(|_| {})), ABLE).is_ok());
}

#[test]
fn some_capabilities_may_be_had_within_a_user_namespace_alone() {
    let policy = policy("user_namespace_capabilities = ['NET_ADMIN']");
    let spec = adding(&["NET_ADMIN"]);
    assert_eq!(policy.check(&spec, ABLE), Ok(Users::Own));
    assert_eq!(
        refused(&policy, &spec, Abilities::default()).1,
        "spec.containers[0].security.add_capabilities[0]"
    );
}

#[test]
fn a_pod_has_users_of_its_own_where_the_host_can_and_the_hosts_only_where_it_may() {
    use RefusalReason::{Forbidden, Unsupported};
    let unable = Abilities::default();
    let lax = policy("host_users = true");
    let strict = policy("require_user_namespaces = true");
    let safe = Privilege::default();
    for (policy, asked, host, answer) in [
        (&safe, None, ABLE, Ok(Users::Own)),
        (&safe, Some(false), ABLE, Ok(Users::Own)),
        (&safe, Some(true), ABLE, Err(Forbidden)),
        (&safe, None, unable, Ok(Users::Host)),
        (&safe, Some(false), unable, Err(Unsupported)),
        (&safe, Some(true), unable, Err(Forbidden)),
        (&lax, Some(true), ABLE, Ok(Users::Host)),
        (&lax, None, ABLE, Ok(Users::Own)),
        (&strict, None, unable, Err(Unsupported)),
        (&strict, None, ABLE, Ok(Users::Own)),
    ] {
        let spec = pod(PodSecurity {
            host_users: asked,
            ..Default::default()
        });
        let got = policy.check(&spec, host).map_err(|denied| denied.reason);
        assert_eq!(got, answer, "{asked:?} {host:?}");
    }
}

#[test]
fn what_the_host_cannot_do_is_told_from_what_it_may_not() {
    let lax = policy(
        "se_linux_options = true
         app_armor_profiles = ['mine']
         unconfined_app_armor = true",
    );
    let armor = |profile| {
        container(ContainerSecurity {
            app_armor: Some(profile),
            ..Default::default()
        })
    };
    let labelled = container(ContainerSecurity {
        se_linux: Some(SeLinuxOptions::default()),
        ..Default::default()
    });
    let strict_groups = pod(PodSecurity {
        strict_supplemental_groups: true,
        ..Default::default()
    });
    for spec in [
        &labelled,
        &armor(AppArmorProfile::Localhost("mine".into())),
        &armor(AppArmorProfile::RuntimeDefault),
        &strict_groups,
    ] {
        assert!(lax.check(spec, ABLE).is_ok());
        assert_eq!(
            refused(&lax, spec, Abilities::default()).0,
            RefusalReason::Unsupported
        );
    }
    assert!(
        lax.check(&armor(AppArmorProfile::Unconfined), Abilities::default())
            .is_ok()
    );
}

#[test]
fn a_policy_with_a_mistake_is_refused_by_its_field() {
    for (text, says) in [
        ("capabilities = ['CAP_CHOWN']", "CAP_CHOWN"),
        ("capabilities = ['FLY']", "FLY"),
        ("unsafe_sysctls = ['kernel.*']", "kernel."),
        ("unsafe_sysctls = ['*']", "kept apart"),
        ("unsafe_sysctls = ['net.*.x']", "at the end"),
        ("unsafe_sysctls = ['vm.swappiness']", "vm.swappiness"),
        ("privileged = true", "privileged"),
        ("user_ids = { first = 1000, pods = 1 }", "user_ids.first"),
        ("user_ids = { first = 0, pods = 1 }", "user_ids.first"),
        ("user_ids = { first = 65536, pods = 40000 }", "user_ids.pods"),
        ("classes = 1", "classes"),
        ("[classes.x]\nuser_ids = { first = 65536, pods = 1 }", "user_ids"),
        ("[classes.kata]\nfoo = 1", "classes.kata"),
    ] {
        let error = toml::from_str::<Privilege>(text).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
}
