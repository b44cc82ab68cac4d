//! Volumes as a container sees them.

use anyhow::ensure;
use pool_agent_api::wire;

use super::{
    host::Host,
    pod::{empty_dir, files, idle, job, mounting, pod, shell},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        volumes_belong_to_the_pods_group_and_memory_is_held_to_its_limit,
        files_change_whole_under_a_program_that_reads_them,
        an_empty_dir_on_disk_past_its_limit_evicts_its_pod,
    ]
}

async fn volumes_belong_to_the_pods_group_and_memory_is_held_to_its_limit(host: &Host) -> anyhow::Result<()> {
    let mut main = idle("main");
    main.security.as_mut().unwrap().run_as_user = Some(1000);
    for volume in ["disk", "memory", "config", "secret"] {
        main = mounting(main, volume, &format!("/{volume}"));
    }
    let mut spec = pod(vec![main]);
    spec.security = Some(wire::PodSecurity {
        fs_group: Some(2000),
        ..Default::default()
    });
    spec.volumes = vec![
        empty_dir("disk", false, None),
        empty_dir("memory", true, Some(1 << 20)),
        files("config", false, &[("colour", "ochre", 0o644)]),
        files("secret", true, &[("key", "sesame", 0o400)]),
    ];
    let web = host.start(spec).await?;
    for (command, wanted) in [
        ("stat -c '%a %g' /disk", "2777 2000"),
        ("stat -c '%a %g' /memory", "2777 2000"),
        ("stat -f -c %T /memory", "tmpfs"),
        ("stat -f -c %T /secret", "tmpfs"),
        ("stat -L -c '%a %g' /config/colour", "644 2000"),
        // Readable to the group, or the pod's user could not read it.
        ("stat -L -c '%a %g' /secret/key", "440 2000"),
        ("cat /secret/key", "sesame"),
        ("touch /disk/made && stat -c '%u %g' /disk/made", "1000 2000"),
        ("touch /config/made 2>&1 | grep -c Read-only", "1"),
        (
            "dd if=/dev/zero of=/memory/much bs=65536 count=64 2>&1 | grep -c 'No space'",
            "1",
        ),
    ] {
        let printed = web.exec("main", &["sh", "-c", command]).await?;
        ensure!(printed == wanted, "{command}: {printed:?}, not {wanted:?}");
    }
    web.forget().await
}

/// One version after the other: whoever reads two files of one version reads what
/// belongs together.
async fn files_change_whole_under_a_program_that_reads_them(host: &Host) -> anyhow::Result<()> {
    const READER: &str = "while :; do
        version=$(readlink /config/..data) || continue
        one=$(cat /config/$version/one 2>/dev/null) || continue
        two=$(cat /config/$version/two 2>/dev/null) || continue
        [ \"$one\" = \"$two\" ] || echo torn $one $two
        [ \"$one\" = \"$last\" ] || echo saw $one
        last=$one
    done";
    let version = |n: u32| {
        let n = n.to_string();
        vec![files(
            "config",
            false,
            &[("one", n.as_str(), 0o644), ("two", n.as_str(), 0o644)],
        )]
    };
    let mut spec = pod(vec![mounting(shell("main", READER), "config", "/config")]);
    spec.volumes = version(0);
    let web = host.start(spec).await?;
    web.log_until("main", "has the first version", |log| log.contains("saw 0\n"))
        .await?;
    const LAST: u32 = 20;
    for n in 1..=LAST {
        web.update(version(n)).await?;
    }
    let log = web
        .log_until("main", "has the last version", |log| {
            log.contains(&format!("saw {LAST}\n"))
        })
        .await?;
    ensure!(!log.contains("torn"), "{log}");
    // The same files by the names a program opens.
    let printed = web.exec("main", &["cat", "/config/one", "/config/two"]).await?;
    ensure!(printed == format!("{LAST}{LAST}"), "{printed}");
    web.forget().await
}

async fn an_empty_dir_on_disk_past_its_limit_evicts_its_pod(host: &Host) -> anyhow::Result<()> {
    let filling = shell(
        "main",
        "dd if=/dev/zero of=/scratch/much bs=65536 count=64 && echo full; while :; do sleep 1; done",
    );
    let mut greedy = job(vec![mounting(filling.clone(), "scratch", "/scratch")]);
    greedy.volumes = vec![empty_dir("scratch", false, Some(1 << 20))];
    let mut modest = job(vec![mounting(filling, "scratch", "/scratch")]);
    modest.volumes = vec![empty_dir("scratch", false, Some(64 << 20))];
    let modest = host.start(modest).await?;
    let greedy = host.start(greedy).await?;
    const MESSAGE: &str = "Usage of EmptyDir volume \"scratch\" exceeds the limit \"1Mi\". ";
    greedy.event("Evicted", MESSAGE).await?;
    let status = greedy.until_stopped().await?;
    ensure!(
        (status.reason.as_str(), status.message.as_str()) == ("Evicted", MESSAGE),
        "{status:?}"
    );
    modest
        .log_until("main", "says that it is full", |log| log.contains("full"))
        .await?;
    let status = modest.until_running().await?;
    ensure!(status.reason.is_empty(), "{status:?}");
    greedy.forget().await?;
    modest.forget().await
}
