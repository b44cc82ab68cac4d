//! What a pod is to the host's kernel, tried by a virtual node that asks for too much
//! and by root in a pod.

use std::{os::unix::fs::MetadataExt, path::PathBuf};

use anyhow::{Context, ensure};
use pool_agent::policy::privilege::{IDS_OF_A_POD, UserIds};
use pool_agent_api::wire::{self, start_sandbox_response::Outcome};

use super::{
    host::{Host, wait},
    pod::{Pod, container, container_id, empty_dir, end, files, idle, job, mounting, pod, shell, text},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        what_a_pod_may_not_be_is_refused_by_the_host_and_leaves_nothing,
        each_pod_has_users_of_its_own_and_root_in_it_is_nobody_on_the_host,
        root_in_a_pod_changes_nothing_of_its_host,
        a_pod_sees_its_own_processes_and_a_kernel_behind_masks,
        volumes_of_every_kind_are_the_pods_own_in_its_user_namespace,
    ]
}

pub(crate) fn alone() -> Vec<Case> {
    cases![Alone: a_pod_keeps_its_users_over_the_agents_death_and_nobody_else_is_given_them]
}

fn secured(edit: impl FnOnce(&mut wire::ContainerSecurity)) -> wire::SandboxSpec {
    let mut main = idle("main");
    edit(main.security.get_or_insert_default());
    pod(vec![main])
}

fn as_pod(security: wire::PodSecurity) -> wire::SandboxSpec {
    wire::SandboxSpec {
        security: Some(security),
        ..pod(vec![idle("main")])
    }
}

/// What a hostile virtual node may send, and the field that is named to it.
fn asks() -> Vec<(wire::SandboxSpec, &'static str)> {
    let add = |name: &str| {
        let name = name.to_owned();
        secured(|s| s.add_capabilities = vec!["CHOWN".into(), name])
    };
    let sysctl = |name: &str| {
        as_pod(wire::PodSecurity {
            sysctls: [(name.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        })
    };
    let mut sneaking = pod(vec![idle("main")]);
    let mut first = idle("first");
    first.security.get_or_insert_default().add_capabilities = vec!["SYS_MODULE".into()];
    sneaking.init_containers = vec![first];
    vec![
        (
            add("SYS_ADMIN"),
            "spec.containers[0].security.add_capabilities[1]",
        ),
        (add("ALL"), "spec.containers[0].security.add_capabilities[1]"),
        (
            add("DAC_READ_SEARCH"),
            "spec.containers[0].security.add_capabilities[1]",
        ),
        (
            add("SYS_PTRACE"),
            "spec.containers[0].security.add_capabilities[1]",
        ),
        (sneaking, "spec.init_containers[0].security.add_capabilities[0]"),
        (
            secured(|s| s.seccomp = wire::SeccompProfile::Unconfined.into()),
            "spec.containers[0].security.seccomp",
        ),
        (
            secured(|s| s.app_armor = wire::AppArmorProfile::Unconfined.into()),
            "spec.containers[0].security.app_armor",
        ),
        (
            secured(|s| {
                s.app_armor = wire::AppArmorProfile::Localhost.into();
                s.app_armor_localhost = "unconfined".into();
            }),
            "spec.containers[0].security.app_armor",
        ),
        (
            secured(|s| {
                s.se_linux = Some(wire::SeLinuxOptions {
                    r#type: "spc_t".into(),
                    ..Default::default()
                });
            }),
            "spec.containers[0].security.se_linux",
        ),
        (
            secured(|s| s.run_as_user = Some(-1)),
            "spec.containers[0].security.run_as_user",
        ),
        (
            secured(|s| {
                s.run_as_user = Some(0);
                s.run_as_group = Some(i64::from(UserIds::default().first));
            }),
            "spec.containers[0].security.run_as_group",
        ),
        (sysctl("kernel.core_pattern"), "spec.security.sysctls"),
        (sysctl("kernel.msgmax"), "spec.security.sysctls"),
        (sysctl("vm.overcommit_memory"), "spec.security.sysctls"),
        (
            sysctl("net.ipv4.conf.all.route_localnet"),
            "spec.security.sysctls",
        ),
        (
            as_pod(wire::PodSecurity {
                host_users: Some(true),
                ..Default::default()
            }),
            "spec.security.host_users",
        ),
        (
            as_pod(wire::PodSecurity {
                fs_group: Some(1 << 32),
                ..Default::default()
            }),
            "spec.security.fs_group",
        ),
    ]
}

async fn what_a_pod_may_not_be_is_refused_by_the_host_and_leaves_nothing(host: &Host) -> anyhow::Result<()> {
    for (mut spec, field) in asks() {
        let uid = host.next_uid();
        spec.tenant = host.ours.name.into();
        spec.key = Some(wire::SandboxKey {
            pod_uid: uid.clone(),
            attempt: 1,
        });
        let key = pool_agent_api::SandboxKey::from_wire(spec.key.clone())?;
        let request = wire::StartSandboxRequest { spec: Some(spec) };
        let answer = host.ours.client().start_sandbox(request).await?.into_inner();
        let Some(Outcome::Refused(refused)) = answer.outcome else {
            anyhow::bail!("{field}: {answer:?}");
        };
        ensure!(
            refused.reason() == wire::RefusalReason::Forbidden
                && refused.message.starts_with(&format!("{field}: ")),
            "{field}: {refused:?}"
        );
        let dirs = host.files().sandbox(&key);
        ensure!(
            !dirs.run().exists() && !dirs.disk().exists() && host.ids("sandbox", &key).await?.is_empty(),
            "{field}: something of it was kept"
        );
    }
    // What leads out of /proc/sys by its name does not even read as a spec.
    for name in ["net/../kernel/core_pattern", "net./../kernel.core_pattern"] {
        let mut spec = as_pod(wire::PodSecurity {
            sysctls: [(name.to_owned(), "x".to_owned())].into(),
            ..Default::default()
        });
        spec.tenant = host.ours.name.into();
        spec.key = Some(wire::SandboxKey {
            pod_uid: host.next_uid(),
            attempt: 1,
        });
        let request = wire::StartSandboxRequest { spec: Some(spec) };
        let refused = host.ours.client().start_sandbox(request).await;
        let status = refused.err().context("it was taken")?;
        ensure!(
            status.code() == tonic::Code::InvalidArgument
                && status.message().starts_with("spec.security.sysctls."),
            "{status:?}"
        );
    }
    Ok(())
}

/// The first process of a pod's container as the host has it, and the host's ids it
/// has: of users, of groups.
async fn ids(host: &Host, pod: &Pod<'_>) -> anyhow::Result<(i32, [u32; 2])> {
    let status = pod.until_running().await?;
    let pid = host.pid(&container_id(&status, "main")?).await?;
    let first = |kind: &str| -> anyhow::Result<u32> {
        let map = std::fs::read_to_string(format!("/proc/{pid}/{kind}"))?;
        let words: Vec<&str> = map.split_whitespace().collect();
        ensure!(
            words.len() == 3 && words[0] == "0" && words[2] == IDS_OF_A_POD.to_string(),
            "{kind}: {map}"
        );
        Ok(words[1].parse()?)
    };
    Ok((pid, [first("uid_map")?, first("gid_map")?]))
}

async fn each_pod_has_users_of_its_own_and_root_in_it_is_nobody_on_the_host(
    host: &Host,
) -> anyhow::Result<()> {
    let ours = UserIds::default();
    let last = ours.first + ours.pods * IDS_OF_A_POD - 1;
    let mut all = vec![];
    for _ in 0..3 {
        let web = host.start(pod(vec![idle("main")])).await?;
        let (pid, [users, groups]) = ids(host, &web).await?;
        ensure!(
            users == groups && (ours.first..=last).contains(&users),
            "{users} {groups}"
        );
        // Itself it takes for root.
        ensure!(
            web.exec("main", &["id", "-u"]).await? == "0",
            "it is not root in its pod"
        );
        let process = std::fs::metadata(format!("/proc/{pid}"))?;
        ensure!((process.uid(), process.gid()) == (users, groups), "{process:?}");
        web.exec("main", &["sh", "-c", "touch /made && chmod 4755 /made"])
            .await?;
        let made = std::fs::metadata(format!("/proc/{pid}/root/made"))?;
        ensure!(made.uid() == users, "what it made is of {}", made.uid());
        let namespace = |kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ensure!(
            namespace("user")? != std::fs::read_link("/proc/self/ns/user")?,
            "it has the host's"
        );
        all.push((web, users, namespace("user")?));
    }
    for (i, (_, a, _)) in all.iter().enumerate() {
        for (_, b, _) in &all[..i] {
            ensure!(a.abs_diff(*b) >= IDS_OF_A_POD, "{a} and {b} have ids in common");
        }
    }
    let namespaces: std::collections::HashSet<&PathBuf> = all.iter().map(|(_, _, ns)| ns).collect();
    ensure!(namespaces.len() == all.len(), "{namespaces:?}");
    for (web, _, _) in &all {
        web.forget().await?;
    }
    Ok(())
}

/// As root, with all that a container may add.
fn nuisance() -> wire::SandboxSpec {
    secured(|s| s.add_capabilities = vec!["MKNOD".into(), "NET_RAW".into(), "SYS_CHROOT".into()])
}

async fn root_in_a_pod_changes_nothing_of_its_host(host: &Host) -> anyhow::Result<()> {
    let web = host.start(nuisance()).await?;
    for command in [
        "mount -t tmpfs none /tmp",
        "mount -t proc none /mnt",
        "mount -o remount,rw /proc/sys",
        "umount /proc/sys",
        "mount -t cgroup2 none /mnt",
        "unshare -m true",
        "unshare -U true",
        "mknod /disk b 254 0",
        "mknod /memory c 1 1",
        "insmod /bin/busybox",
        "swapon /bin/busybox",
        // busybox says so, and goes on.
        "! date -s @$(date +%s) 2>&1 | grep -q 'not permitted'",
        "hostname taken",
        "sysctl -w kernel.core_pattern=/taken",
        "echo /taken > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo 1 > /proc/sys/vm/drop_caches",
        "echo h > /proc/sysrq-trigger",
        "echo -1000 > /proc/self/oom_score_adj",
        "echo 0 > /sys/kernel/mm/transparent_hugepage/enabled",
        // Version 1 has one for each controller, below a tmpfs of the container's own.
        "for at in $(grep -E '^[^ ]+ [^ ]+ cgroup2? ' /proc/mounts | cut -d' ' -f2)
         do mkdir $at/taken && exit 0; done; false",
        "test -e /sys/fs/cgroup/memory/cgroup.procs && echo -1 > /sys/fs/cgroup/memory/memory.limit_in_bytes",
        "test -e /sys/fs/cgroup/memory.max && echo max > /sys/fs/cgroup/memory.max",
        "ip link set eth0 down",
        "ip addr add 192.0.2.99/32 dev eth0",
        "chroot /proc/1/root true && nsenter -t 1 -m true",
    ] {
        let tried = format!("({command}) >/dev/null 2>&1 && echo done || echo refused");
        let outcome = web.exec("main", &["sh", "-c", &tried]).await?;
        ensure!(outcome == "refused", "{command}: {outcome}");
    }
    web.forget().await
}

async fn a_pod_sees_its_own_processes_and_a_kernel_behind_masks(host: &Host) -> anyhow::Result<()> {
    let beside = host.start(pod(vec![idle("main")])).await?;
    beside.until_running().await?;
    let mut spec = pod(vec![idle("main"), idle("other")]);
    spec.containers[0]
        .security
        .get_or_insert_default()
        .no_new_privileges = true;
    let web = host.start(spec).await?;
    for (command, wanted) in [
        // A shell for this, and the idle one with its sleep: nobody else's.
        ("ls /proc | grep -cE '^[0-9]+$' | grep -cE '^[3-7]$'", "1"),
        ("grep NoNewPrivs /proc/self/status | tr -d '\t'", "NoNewPrivs:1"),
        ("grep '^Seccomp:' /proc/self/status | tr -d '\t'", "Seccomp:2"),
        // containerd's default set, to the bit.
        (
            "grep CapBnd /proc/self/status | tr -d '\t'",
            "CapBnd:00000000a80425fb",
        ),
        (
            "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c",
            "0",
        ),
        (
            "ls -A /proc/acpi /sys/firmware 2>/dev/null | grep -v : | grep -c .",
            "0",
        ),
        ("grep -E ' /sys sysfs ro[, ]' /proc/mounts | grep -c .", "1"),
        ("grep -E ' /proc/sys proc ro[, ]' /proc/mounts | grep -c .", "1"),
        // Of a pod that asked for nothing, first to go.
        ("cat /proc/self/oom_score_adj", "1000"),
    ] {
        let printed = web
            .exec("main", &["sh", "-c", &format!("{command}; true")])
            .await?;
        ensure!(printed == wanted, "{command}: {printed:?}, not {wanted:?}");
    }
    let gains = web
        .exec(
            "other",
            &["sh", "-c", "grep NoNewPrivs /proc/self/status | tr -d '\t'"],
        )
        .await?;
    ensure!(gains == "NoNewPrivs:0", "{gains}");
    web.forget().await?;
    beside.forget().await
}

async fn volumes_of_every_kind_are_the_pods_own_in_its_user_namespace(host: &Host) -> anyhow::Result<()> {
    const BOTH: &str = "set -e
        id -u
        for d in /disk /memory; do echo $d > $d/mine; stat -c '%u %g' $d/mine; done
        cat /config/colour /secret/key
        printf words > /dev/termination-log";
    // What an emptyDir does not open to everybody is root's, as under a kubelet.
    const OF_ROOT: &str = "
        echo part > /part/mine; stat -c '%u %g' /part/mine
        echo '192.0.2.7 seven' >> /etc/hosts; grep -c seven /etc/hosts; stat -c '%u' /etc/hosts";
    for (user, group, work, wanted) in [
        (
            None,
            None,
            format!("{BOTH}{OF_ROOT}"),
            "0\n0 0\n0 0\nochre\nsesame\n0 0\n1\n0\n",
        ),
        (
            Some(1000),
            Some(2000),
            BOTH.to_owned(),
            "1000\n1000 2000\n1000 2000\nochre\nsesame\n",
        ),
    ] {
        let mut main = shell("main", &work);
        main.security.get_or_insert_default().run_as_user = user;
        for volume in ["disk", "memory", "config", "secret"] {
            main = mounting(main, volume, &format!("/{volume}"));
        }
        main.mounts.push(wire::Mount {
            volume: "disk".into(),
            mount_path: "/part".into(),
            sub_path: Some(text("part")),
            ..Default::default()
        });
        let mut spec = job(vec![main]);
        spec.security = Some(wire::PodSecurity {
            fs_group: group,
            ..Default::default()
        });
        spec.volumes = vec![
            empty_dir("disk", false, None),
            empty_dir("memory", true, Some(1 << 20)),
            files("config", false, &[("colour", "ochre\n", 0o644)]),
            files("secret", true, &[("key", "sesame\n", 0o400)]),
        ];
        let web = host.start(spec).await?;
        let status = web.until_stopped().await?;
        let (log, end) = (web.log("main").await?, end(&status, "main")?);
        ensure!(
            end.exit_code == 0 && end.message == "words" && log == wanted,
            "{end:?}\n{log}"
        );
        web.forget().await?;
    }
    Ok(())
}

async fn a_pod_keeps_its_users_over_the_agents_death_and_nobody_else_is_given_them(
    host: &Host,
) -> anyhow::Result<()> {
    let web = host.start(pod(vec![idle("main")])).await?;
    let (_, before) = ids(host, &web).await?;
    let status = web.until_running().await?;
    let id = container_id(&status, "main")?;
    host.kill_agent().await?;
    host.start_agent().await?;
    // The runtime takes no container whose users are not its sandbox's.
    host.kill_process(host.pid(&id).await?)?;
    web.until("run again", |status| {
        container(status, "main").is_ok_and(|c| c.restart_count == 1 && c.ready)
    })
    .await?;
    let (_, after) = ids(host, &web).await?;
    ensure!(before == after, "{before:?} {after:?}");
    let beside = host.start(pod(vec![idle("main")])).await?;
    let (_, others) = ids(host, &beside).await?;
    ensure!(
        others[0].abs_diff(after[0]) >= IDS_OF_A_POD,
        "{others:?} {after:?}"
    );
    beside.forget().await?;
    web.forget().await?;
    // Free again, which a new pod does not find at once: it is the last to come.
    wait("that its ids are given back", async || {
        let gone = host.files().sandbox(&web.key);
        if gone.run().exists() {
            Err("it is there".into())
        } else {
            Ok(())
        }
    })
    .await
}
