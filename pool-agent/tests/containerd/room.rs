//! What pods may use of their host, each and together: claims, bounds, classes, the
//! disk, and who goes when the host is short. The attackers are pods, and a tenant's
//! virtual node that says whatever it likes.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use pool_agent::{
    cgroup::{Cgroups, Limits},
    cri::config::Qos,
};
use pool_agent_api::{Pressure, status::ContainerState, wire};

use super::{
    host::{Host, wait},
    pod::{Pod, container, container_id, empty_dir, end, idle, job, mounting, pod, running, shell},
    suite::{Case, cases},
};

const MIB: u64 = 1 << 20;

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        a_fork_bomb_is_held_by_its_pods_bound,
        a_memory_hog_is_killed_alone_while_its_neighbour_goes_on,
        limits_that_a_claim_does_not_allow_are_refused_by_name,
        a_pods_cgroup_is_what_its_claim_allows,
        a_best_effort_burner_leaves_others_their_share,
        what_fills_the_disk_is_evicted_in_a_kubelets_words,
    ];
    all.extend(cases![Alone:
        short_of_memory_the_host_evicts_who_is_beyond_its_claim,
    ]);
    all
}

fn cgroups(host: &Host) -> Cgroups {
    Cgroups::detect(&host.cgroup())
}

/// A file of a cgroup, by its name in version 2 or 1.
fn file(cgroup: &str, names: [&str; 2]) -> anyhow::Result<PathBuf> {
    let below = cgroup.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root)?.flatten().map(|entry| entry.path());
    [root.to_owned()]
        .into_iter()
        .chain(hierarchies)
        .flat_map(|root| names.map(|name| root.join(below).join(name)))
        .find(|path| path.exists())
        .with_context(|| format!("{cgroup} has no {names:?}"))
}

fn number(cgroup: &str, names: [&str; 2]) -> anyhow::Result<u64> {
    let path = file(cgroup, names)?;
    let text = std::fs::read_to_string(&path)?;
    text.trim()
        .parse()
        .with_context(|| format!("{}: {text}", path.display()))
}

fn memory_limit(cgroup: &str) -> anyhow::Result<u64> {
    number(cgroup, ["memory.max", "memory.limit_in_bytes"])
}

fn weight(cgroup: &str) -> anyhow::Result<u64> {
    number(cgroup, ["cpu.weight", "cpu.shares"])
}

/// Microseconds of CPU that a cgroup has used.
fn burnt(cgroup: &str) -> anyhow::Result<u64> {
    if let Ok(nanos) = number(cgroup, ["cpuacct.usage", "cpuacct.usage"]) {
        return Ok(nanos / 1000);
    }
    let text = std::fs::read_to_string(file(cgroup, ["cpu.stat", "cpu.stat"])?)?;
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(used.context("no usage_usec")?.trim().parse()?)
}

fn claiming(mut spec: wire::SandboxSpec, cpu_millis: u64, memory_bytes: u64) -> wire::SandboxSpec {
    spec.claim = Some(wire::Resources {
        cpu_millis,
        memory_bytes,
        sandboxes: 1,
        ..Default::default()
    });
    spec
}

fn with(mut container: wire::Container, resources: wire::ContainerResources) -> wire::Container {
    container.resources = Some(resources);
    container
}

/// It answers, and has not been started again.
async fn goes_on(neighbour: &Pod<'_>) -> anyhow::Result<()> {
    let answer = neighbour.exec("main", &["echo", "here"]).await?;
    ensure!(answer == "here", "{answer}");
    let status = neighbour.until_running().await?;
    ensure!(container(&status, "main")?.restart_count == 0, "{status:?}");
    Ok(())
}

async fn a_fork_bomb_is_held_by_its_pods_bound(host: &Host) -> anyhow::Result<()> {
    // More than the bound, and no more than that: it has to end if nothing holds it.
    const FORKS: u64 = 1500;
    let neighbour = host.start(pod(vec![idle("main")])).await?;
    neighbour.until_running().await?;
    let script = format!(
        "i=0; while [ $i -lt {FORKS} ]; do sleep 1000 & i=$((i+1)); done; echo all of them; sleep 1000"
    );
    let bomb = host.start(job(vec![shell("main", &script)])).await?;
    let log = bomb
        .log_until("main", "says how it ended", |log| {
            log.contains("can't fork") || log.contains("all of them")
        })
        .await?;
    ensure!(!log.contains("all of them"), "nothing held it: {log}");
    let cgroup = cgroups(host).parent(&bomb.key, Qos::BestEffort);
    let bound = number(&cgroup, ["pids.max", "pids.max"])?;
    ensure!(bound < FORKS, "the pod may have {bound} tasks");
    goes_on(&neighbour).await?;
    bomb.forget().await?;
    neighbour.forget().await
}

async fn a_memory_hog_is_killed_alone_while_its_neighbour_goes_on(host: &Host) -> anyhow::Result<()> {
    let neighbour = host.start(pod(vec![idle("main")])).await?;
    neighbour.until_running().await?;
    // It claims nothing and has no limit: the policy's bound is all it gets.
    let hog = running("main", &["tail", "-c", "3000000000", "/dev/zero"]);
    let hog = host.start(job(vec![hog])).await?;
    let status = hog.until_stopped().await?;
    let end = end(&status, "main")?;
    ensure!(
        (end.reason.as_str(), end.exit_code) == ("OOMKilled", 137),
        "{end:?}"
    );
    goes_on(&neighbour).await?;
    hog.forget().await?;
    neighbour.forget().await
}

async fn limits_that_a_claim_does_not_allow_are_refused_by_name(host: &Host) -> anyhow::Result<()> {
    const TIB: u64 = 1 << 40;
    let zero_requests = wire::ContainerResources {
        cpu_request_millis: Some(0),
        memory_request_bytes: Some(0),
        ephemeral_storage_request_bytes: Some(0),
        ..Default::default()
    };
    for (resources, says) in [
        (
            wire::ContainerResources {
                memory_limit_bytes: Some(TIB),
                ..zero_requests
            },
            "containers[0].resources.memory_limit_bytes",
        ),
        (
            wire::ContainerResources {
                ephemeral_storage_limit_bytes: Some(TIB),
                ..zero_requests
            },
            "containers[0].resources.ephemeral_storage_limit_bytes",
        ),
        // It would be guaranteed: the last to be killed, with shares of 64 cores.
        (
            wire::ContainerResources {
                cpu_limit_millis: Some(64_000),
                memory_limit_bytes: Some(MIB),
                ..Default::default()
            },
            "claim.cpu_millis",
        ),
    ] {
        let spec = claiming(pod(vec![with(idle("main"), resources)]), 1, MIB);
        let refused = match host.start(spec).await {
            Ok(_) => anyhow::bail!("{says}: it was taken"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(refused.contains(says), "{refused}");
    }
    Ok(())
}

async fn a_pods_cgroup_is_what_its_claim_allows(host: &Host) -> anyhow::Result<()> {
    let cgroups = cgroups(host);
    let limits = cgroups.limits().context("the host's pods are held to nothing")?;
    let exact = wire::ContainerResources {
        cpu_limit_millis: Some(200),
        memory_limit_bytes: Some(96 * MIB),
        ..Default::default()
    };
    let burst = wire::ContainerResources {
        cpu_request_millis: Some(100),
        memory_request_bytes: Some(200 * MIB),
        ..Default::default()
    };
    let guaranteed = claiming(pod(vec![with(idle("main"), exact)]), 200, 96 * MIB);
    let burstable = claiming(pod(vec![with(idle("main"), burst)]), 100, 200 * MIB);
    for (spec, qos, memory) in [
        (guaranteed, Qos::Guaranteed, 96 * MIB),
        (burstable, Qos::Burstable, 800 * MIB),
        (pod(vec![idle("main")]), Qos::BestEffort, 512 * MIB),
    ] {
        let web = host.start(spec).await?;
        let status = web.until_running().await?;
        let cgroup = cgroups.parent(&web.key, qos);
        ensure!(
            memory_limit(&cgroup)? == memory,
            "{qos:?}: {}",
            memory_limit(&cgroup)?
        );
        ensure!(
            number(&cgroup, ["pids.max", "pids.max"])? < limits.tasks,
            "{qos:?}"
        );
        // And it is where its containers are.
        let id = container_id(&status, "main")?;
        let pid = host.pid(&id).await?;
        let of_process = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(
            of_process
                .lines()
                .any(|line| line.ends_with(&format!("{cgroup}/{id}"))),
            "{cgroup}: {of_process}"
        );
        web.forget().await?;
    }
    let parent = host.cgroup();
    wait("that classes weigh what their pods do", async || {
        let weights = || -> anyhow::Result<(u64, u64, u64)> {
            let burstable = file(&format!("{parent}/burstable"), ["cpu.weight", "cpu.shares"])?;
            let directory = burstable.parent().context("a file is in a directory")?;
            let mut sum = 0;
            for pod in std::fs::read_dir(directory)?
                .flatten()
                .filter(|e| e.path().is_dir())
            {
                let name = pod.file_name();
                sum += weight(&format!("{parent}/burstable/{}", name.to_string_lossy()))?;
            }
            let of_class = weight(&format!("{parent}/burstable"))?;
            Ok((sum, of_class, weight(&format!("{parent}/besteffort"))?))
        };
        match weights() {
            Ok((sum, of_class, 1 | 2)) if of_class == sum.max(2) || of_class == sum.max(1) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

async fn a_best_effort_burner_leaves_others_their_share(host: &Host) -> anyhow::Result<()> {
    let burning = || shell("main", "while :; do :; done & while :; do :; done");
    let request = wire::ContainerResources {
        cpu_request_millis: Some(500),
        ..Default::default()
    };
    let attacker = host.start(pod(vec![burning()])).await?;
    let victim = claiming(pod(vec![with(burning(), request)]), 500, 0);
    let victim = host.start(victim).await?;
    attacker.until_running().await?;
    victim.until_running().await?;
    let cgroups = cgroups(host);
    let [of_attacker, of_victim] = [(&attacker, Qos::BestEffort), (&victim, Qos::Burstable)]
        .map(|(pod, qos)| cgroups.parent(&pod.key, qos));
    let before = (burnt(&of_attacker)?, burnt(&of_victim)?);
    // However little of the machine is left for the two: the victim's time is the clock.
    let (attacker_used, victim_used) = wait("that the victim has its time", async || {
        let used = || -> anyhow::Result<(u64, u64)> {
            Ok((burnt(&of_attacker)? - before.0, burnt(&of_victim)? - before.1))
        };
        match used() {
            Ok((attacker, victim)) if victim > 2_000_000 => Ok((attacker, victim)),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    ensure!(
        attacker_used * 4 < victim_used,
        "best effort had {attacker_used} µs beside {victim_used} µs"
    );
    attacker.forget().await?;
    victim.forget().await
}

async fn what_fills_the_disk_is_evicted_in_a_kubelets_words(host: &Host) -> anyhow::Result<()> {
    let limited = |script: &str| {
        let limits = wire::ContainerResources {
            ephemeral_storage_request_bytes: Some(0),
            ephemeral_storage_limit_bytes: Some(4 * MIB),
            ..Default::default()
        };
        with(shell("main", script), limits)
    };
    let stay = "while :; do sleep 1; done";
    let fill = |to: &str| format!("dd if=/dev/zero of={to} bs=65536 count=256; {stay}");
    let layer = host.start(job(vec![limited(&fill("/fill"))])).await?;
    let mut volume = job(vec![mounting(
        limited(&fill("/scratch/fill")),
        "scratch",
        "/scratch",
    )]);
    volume.volumes = vec![empty_dir("scratch", false, None)];
    let volume = host.start(volume).await?;
    let talk = format!("dd if=/dev/zero bs=65536 count=96 | tr '\\0' 'x' | fold -w 1000; {stay}");
    let log = host.start(job(vec![limited(&talk)])).await?;
    const MESSAGE: &str = "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. ";
    for (what, filler) in [("a layer", layer), ("a volume", volume), ("a log", log)] {
        filler.event("Evicted", MESSAGE).await.context(what)?;
        let status = filler.until_stopped().await?;
        ensure!(
            (status.reason.as_str(), status.message.as_str()) == ("Evicted", MESSAGE),
            "{what}: {status:?}"
        );
        filler.forget().await?;
    }
    Ok(())
}

/// What the kernel holds all pods to, until it is dropped.
struct Squeezed {
    path: PathBuf,
    before: Limits,
}

impl Squeezed {
    fn to(host: &Host, bytes: u64) -> anyhow::Result<Self> {
        let before = cgroups(host).limits().context("no limit")?;
        let path = file(&host.cgroup(), ["memory.max", "memory.limit_in_bytes"])?;
        std::fs::write(&path, bytes.to_string()).with_context(|| format!("{bytes}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Squeezed {
    fn drop(&mut self) {
        std::fs::write(&self.path, self.before.memory_bytes.to_string()).ok();
    }
}

async fn pressure(host: &Host) -> anyhow::Result<Pressure> {
    let answer = host.ours.client().get_host(wire::GetHostRequest {}).await?;
    Ok(answer.into_inner().pressure.unwrap_or_default().into())
}

async fn short_of_memory_the_host_evicts_who_is_beyond_its_claim(host: &Host) -> anyhow::Result<()> {
    let holding = |mib: u64| {
        let script = format!(
            "dd if=/dev/zero of=/held/it bs=1048576 count={mib}; echo held; while :; do sleep 1; done"
        );
        mounting(shell("main", &script), "held", "/held")
    };
    let start = async |claimed: u64, mib: u64, priority: i32| {
        let request = wire::ContainerResources {
            memory_request_bytes: Some(claimed * MIB),
            ..Default::default()
        };
        let mut spec = claiming(job(vec![with(holding(mib), request)]), 0, claimed * MIB);
        spec.volumes = vec![empty_dir("held", true, None)];
        spec.priority = priority;
        let pod = host.start(spec).await?;
        pod.log_until("main", "says that it holds it", |log| log.contains("held"))
            .await?;
        anyhow::Ok(pod)
    };
    // The one within its claim holds more, and has the lower priority.
    let within = start(300, 200, -10).await?;
    let beyond = start(20, 150, 1000).await?;
    ensure!(!pressure(host).await?.any(), "there is a pressure already");

    let used = cgroups(host).usage("").context("no usage")?.working_set_bytes;
    let squeezed = Squeezed::to(host, used + 60 * MIB)?;
    beyond
        .event("Evicted", "The node was low on resource: memory. ")
        .await?;
    let status = beyond.until_stopped().await?;
    ensure!(
        status.reason == "Evicted" && status.message.contains("Container main was using"),
        "{status:?}"
    );
    ensure!(pressure(host).await?.memory, "the pressure is not told");
    // Who claims no memory is not taken now.
    let refused = match host.start(pod(vec![idle("main")])).await {
        Ok(_) => anyhow::bail!("best effort was taken"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(refused.contains("[MemoryPressure]"), "{refused}");
    let status = within.until_running().await?;
    let main = &container(&status, "main")?.state;
    ensure!(matches!(main, ContainerState::Running { .. }), "{status:?}");

    drop(squeezed);
    wait("that the pressure passes", async || match pressure(host).await {
        Ok(pressure) if !pressure.any() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    beyond.forget().await?;
    within.forget().await
}
