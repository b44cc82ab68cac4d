//! The attacks on the host's files, played by a pod or by its tenant's virtual node:
//! what root does on the host where a pod can write.

use std::{
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use pool_agent_api::{status::ContainerState, wire};

use super::{
    host::{Host, wait},
    pod::{container, empty_dir, end, files, idle, job, mounting, pod, shell, text, waits},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        an_update_that_names_an_empty_dir_is_refused_before_anything_is_touched,
        what_is_planted_in_a_file_volume_leads_the_host_nowhere,
        a_tree_of_any_depth_and_names_is_measured_and_removed,
        a_pod_that_fills_what_it_is_given_fills_nobody_elses,
        last_words_are_never_what_a_link_leads_to,
        a_sub_path_through_a_planted_link_is_refused,
        a_spec_that_has_the_host_hold_too_much_is_refused,
    ]
}

const SECRET: &str = "the host's own";

/// A directory of the host's with a file in it, which no pod may reach by way of root.
struct Sentinel(PathBuf);

impl Sentinel {
    fn set(host: &Host) -> anyhow::Result<Self> {
        let directory = host.files().state().join(format!("sentinel-{}", host.next_uid()));
        std::fs::create_dir(&directory)?;
        std::fs::write(directory.join("secret"), SECRET)?;
        Ok(Self(directory))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// As it was, and gone.
    fn untouched(self) -> anyhow::Result<()> {
        let secret = self.0.join("secret");
        let content = std::fs::read_to_string(&secret).context("the host's file is gone")?;
        ensure!(content == SECRET, "the host's file was written: {content:?}");
        let metadata = std::fs::metadata(&secret)?;
        ensure!(
            (metadata.uid(), metadata.gid(), metadata.nlink()) == (0, 0, 1),
            "{metadata:?}"
        );
        ensure!(
            std::fs::read_dir(&self.0)?.count() == 1,
            "something was put there"
        );
        std::fs::remove_dir_all(&self.0)?;
        Ok(())
    }
}

async fn an_update_that_names_an_empty_dir_is_refused_before_anything_is_touched(
    host: &Host,
) -> anyhow::Result<()> {
    let sentinel = Sentinel::set(host)?;
    let mut main = idle("main");
    for volume in ["config", "secret", "scratch"] {
        main = mounting(main, volume, &format!("/{volume}"));
    }
    let one = |content: &str| files("config", false, &[("one", content, 0o644)]);
    let mut spec = pod(vec![main]);
    spec.volumes = vec![
        one("1"),
        files("secret", true, &[("key", "1", 0o400)]),
        empty_dir("scratch", false, None),
    ];
    let web = host.start(spec).await?;
    // By the pod: the replacement would follow it, and remove what it leads to.
    let plant = format!(
        "ln -s {} /scratch/..data && ls -A /scratch",
        sentinel.path().display()
    );
    let planted = web.exec("main", &["sh", "-c", &plant]).await?;
    ensure!(planted == "..data", "{planted}");
    // By the virtual node.
    for (second, field) in [
        (files("scratch", false, &[("one", "2", 0o644)]), "volumes[1].name"),
        (files("none", false, &[("one", "2", 0o644)]), "volumes[1].name"),
        (files("config", false, &[("one", "3", 0o644)]), "volumes[1].name"),
        (
            files("secret", false, &[("key", "2", 0o444)]),
            "volumes[1].files.sensitive",
        ),
        (empty_dir("config", false, None), "volumes[1]"),
    ] {
        let error = web.update(vec![one("2"), second]).await.err();
        let status = error.as_ref().and_then(|e| e.downcast_ref::<tonic::Status>());
        let status = status.with_context(|| format!("it was taken, or not refused: {error:?}"))?;
        ensure!(
            status.code() == tonic::Code::InvalidArgument && status.message().contains(field),
            "{status:?}, not {field}"
        );
        // Not the half of it that would do no harm, either.
        let seen = web.exec("main", &["cat", "/config/one", "/secret/key"]).await?;
        ensure!(seen == "11", "{seen}");
        let left = web.exec("main", &["ls", "-A", "/scratch"]).await?;
        ensure!(left == "..data", "{left}");
    }
    web.update(vec![one("2")]).await?;
    let seen = web.exec("main", &["cat", "/config/one"]).await?;
    ensure!(seen == "2", "{seen}");
    web.forget().await?;
    sentinel.untouched()
}

/// As a container plants it that may mount, and so write what is mounted read-only.
async fn what_is_planted_in_a_file_volume_leads_the_host_nowhere(host: &Host) -> anyhow::Result<()> {
    let sentinel = Sentinel::set(host)?;
    let mut spec = pod(vec![mounting(
        mounting(idle("main"), "config", "/config"),
        "secret",
        "/secret",
    )]);
    let volumes = |content: &str| {
        vec![
            files("config", false, &[("secret", content, 0o644)]),
            files("secret", true, &[("secret", content, 0o444)]),
        ]
    };
    spec.volumes = volumes("0");
    let web = host.start(spec).await?;
    web.until_running().await?;
    let dirs = host.files().sandbox(&web.key);
    let roots = [dirs.disk_volume(&"config".parse()?), dirs.memory().join("secret")];
    for (i, name) in ["..data", "secret", "..data_tmp", "..v9", "other"]
        .into_iter()
        .enumerate()
    {
        for root in &roots {
            std::fs::remove_file(root.join(name)).ok();
            symlink(sentinel.path(), root.join(name))?;
        }
        let content = format!("{}", i + 1);
        web.update(volumes(&content)).await?;
        let seen = web
            .exec("main", &["cat", "/config/secret", "/secret/secret"])
            .await?;
        ensure!(seen == content.repeat(2), "{name}: {seen}");
    }
    for root in &roots {
        symlink(sentinel.path(), root.join("left"))?;
    }
    web.forget().await?;
    sentinel.untouched()
}

/// Deeper than the kernel takes a path: only who counts to the bottom finds what is
/// over the limit.
async fn a_tree_of_any_depth_and_names_is_measured_and_removed(host: &Host) -> anyhow::Result<()> {
    let sentinel = Sentinel::set(host)?;
    let script = format!(
        "cd /scratch; ln -s {sentinel} led; mkfifo fifo; touch \"$(printf '\\377\\n')\"
        mkdir wide; cd wide; seq 1 20000 | xargs touch; cd ..
        many=$(yes d | head -n 1000 | tr '\\n' /)
        for i in 1 2 3 4 5; do mkdir -p $many && cd -P $many || exit 9; done
        ln -s {sentinel} led; dd if=/dev/zero of=much bs=65536 count=512 && echo deep
        while :; do sleep 1; done",
        sentinel = sentinel.path().display()
    );
    let mut spec = job(vec![mounting(shell("main", &script), "scratch", "/scratch")]);
    spec.volumes = vec![empty_dir("scratch", false, Some(28 << 20))];
    let web = host.start(spec).await?;
    web.log_until("main", "says that it is deep", |log| log.contains("deep\n"))
        .await?;
    web.event("Evicted", "scratch").await?;
    web.until_stopped().await?;
    // Nothing of it is left.
    web.forget().await?;
    sentinel.untouched()
}

async fn a_pod_that_fills_what_it_is_given_fills_nobody_elses(host: &Host) -> anyhow::Result<()> {
    const FILES: [&str; 4] = [
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/dev/termination-log",
    ];
    let fill = format!(
        "for f in {}; do dd if=/dev/zero of=$f bs=65536 count=64 2>&1 | grep 'No space'; done; echo full; sleep 2; exit 1",
        FILES.join(" ")
    );
    let greedy = host.start(pod(vec![shell("main", &fill)])).await?;
    let log = greedy
        .log_until("main", "says that all is full", |log| log.contains("full\n"))
        .await?;
    ensure!(log.matches("No space").count() == FILES.len(), "{log}");
    let dirs = host.files().sandbox(&greedy.key);
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev());
    ensure!(
        device(&dirs.given())? != device(dirs.run())?,
        "what it is given is on a file system of everybody's"
    );
    let given = nix::sys::statvfs::statvfs(&dirs.given())?;
    let bytes = given.blocks() * given.fragment_size();
    ensure!(bytes <= 1 << 20, "it may fill {bytes} bytes");
    // It is started again where there is no room left, and others know nothing of it.
    let status = greedy
        .until("be started again", |status| {
            container(status, "main")
                .is_ok_and(|c| c.restart_count > 0 && matches!(c.state, ContainerState::Running { .. }))
        })
        .await?;
    let last = container(&status, "main")?.last_terminated.as_ref();
    let words = last.map_or(0, |end| end.message.len());
    ensure!(words <= 4096, "{words} bytes of last words");
    let modest = host
        .start(job(vec![shell(
            "main",
            "grep -q localhost /etc/hosts && grep -q web /etc/hostname && echo well > /dev/termination-log",
        )]))
        .await?;
    let status = modest.until_stopped().await?;
    let ended = end(&status, "main")?;
    ensure!(
        (ended.exit_code, ended.message.as_str()) == (0, "well\n"),
        "{ended:?}"
    );
    modest.forget().await?;
    greedy.forget().await
}

async fn last_words_are_never_what_a_link_leads_to(host: &Host) -> anyhow::Result<()> {
    let sentinel = Sentinel::set(host)?;
    let secret = sentinel.path().join("secret").display().to_string();
    let init = shell(
        "init",
        &format!("ln -s {secret} /scratch/words; ln -s /etc/passwd /scratch/users"),
    );
    let replaced = shell(
        "replaced",
        &format!("rm -f /dev/termination-log; ln -sf {secret} /dev/termination-log; exit 1"),
    );
    let named = |name: &str, path: &str| wire::Container {
        termination_message_path: path.into(),
        ..mounting(shell(name, "exit 1"), "scratch", "/scratch")
    };
    let mut spec = job(vec![
        replaced,
        named("words", "/scratch/words"),
        named("users", "/scratch/users"),
    ]);
    spec.init_containers = vec![mounting(init, "scratch", "/scratch")];
    spec.volumes = vec![empty_dir("scratch", false, None)];
    let web = host.start(spec).await?;
    let status = web.until_stopped().await?;
    for name in ["replaced", "words", "users"] {
        let words = &end(&status, name)?.message;
        ensure!(
            !words.contains(SECRET) && !words.contains("root:"),
            "{name}: {words}"
        );
    }
    web.forget().await?;
    sentinel.untouched()
}

async fn a_sub_path_through_a_planted_link_is_refused(host: &Host) -> anyhow::Result<()> {
    let sentinel = Sentinel::set(host)?;
    let init = shell(
        "init",
        &format!(
            "cd /scratch; ln -s {} out; ln -s ../../.. up; mkdir in; ln -s in led",
            sentinel.path().display()
        ),
    );
    let sub_path = |name: &str, path: &str| {
        let mut container = mounting(idle(name), "scratch", "/mnt");
        container.mounts[0].sub_path = Some(text(path));
        container
    };
    let refused = ["out", "out/new", "up/new"];
    let names = ["out", "out-new", "up-new"];
    let mut containers: Vec<_> = names
        .iter()
        .zip(refused)
        .map(|(name, path)| sub_path(name, path))
        .collect();
    containers.push(sub_path("led", "led"));
    let mut spec = pod(containers);
    spec.init_containers = vec![mounting(init, "scratch", "/scratch")];
    spec.volumes = vec![empty_dir("scratch", false, None)];
    let web = host.start(spec).await?;
    let status = web
        .until("refuse what leads out", |status| {
            names
                .iter()
                .all(|name| waits(status, name).0 == "CreateContainerConfigError")
                && container(status, "led").is_ok_and(|c| matches!(c.state, ContainerState::Running { .. }))
        })
        .await?;
    for name in names {
        let (_, message) = waits(&status, name);
        ensure!(message.contains("subPath"), "{name}: {message}");
    }
    web.forget().await?;
    sentinel.untouched()
}

async fn a_spec_that_has_the_host_hold_too_much_is_refused(host: &Host) -> anyhow::Result<()> {
    let many: Vec<String> = (0..10_000).map(|i| format!("f{i}")).collect();
    let many: Vec<(&str, &str, u32)> = many.iter().map(|name| (name.as_str(), "", 0o644)).collect();
    let much = "x".repeat(10 << 20);
    let mut mounts = idle("main");
    for i in 0..300 {
        mounts = mounting(mounts, "scratch", &format!("/m{i}"));
        mounts.mounts[i].sub_path = Some(text("a"));
    }
    let main = || vec![idle("main")];
    for (containers, volumes, word) in [
        (main(), vec![files("many", true, &many)], "whole pages"),
        (
            main(),
            vec![
                files("much", true, &[("x", &much, 0o644)]),
                files(
                    "more",
                    false,
                    &[("x", &much[..4 << 20], 0o644), ("y", &much[..3 << 20], 0o644)],
                ),
            ],
            "bytes of files",
        ),
        (
            vec![mounts],
            vec![empty_dir("scratch", false, None)],
            "mounts on the host",
        ),
    ] {
        let mut spec = pod(containers);
        spec.volumes = volumes;
        let key = wire::SandboxKey {
            pod_uid: host.next_uid(),
            attempt: 1,
        };
        spec.key = Some(key.clone());
        let error = match host.start(spec).await {
            Ok(taken) => anyhow::bail!("{} was taken", taken.key),
            Err(error) => format!("{error:#}"),
        };
        ensure!(
            error.contains("spec.volumes") && error.contains(word),
            "{word}: {error}"
        );
        let dirs = host
            .files()
            .sandbox(&pool_agent_api::SandboxKey::from_wire(Some(key))?);
        ensure!(
            !dirs.run().exists() && !dirs.disk().exists(),
            "something of it was kept"
        );
    }
    // An update is held to the same.
    let mut spec = pod(vec![mounting(idle("main"), "config", "/config")]);
    spec.volumes = vec![files("config", true, &[("one", "1", 0o644)])];
    let web = host.start(spec).await?;
    web.until_running().await?;
    let error = web.update(vec![files("config", true, &many)]).await.err();
    let error = error.context("it was taken")?.to_string();
    ensure!(error.contains("whole pages"), "{error}");
    wait("that the contents are as they were", async || {
        let seen = web.exec("main", &["cat", "/config/one"]).await;
        match seen.map_err(|error| format!("{error:#}"))?.as_str() {
            "1" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await?;
    web.forget().await
}
