//! What is under the agent, or the agent itself, dies at a bad moment.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use pool_agent::{cgroup::Cgroups, cri::Runtime, sandbox::event::SandboxId, spec_file};
use pool_agent_api::{
    SandboxSpec, SandboxStatus,
    spec::MeshMode,
    status::{ContainerState, MeshState, SandboxState, Severity},
    wire,
};
use spindrift_local::{images::BUSYBOX_IMAGE, tool::Tool};

use super::{
    host::{Host, wait, within},
    pod::{Pod, container, container_id, empty_dir, end, idle, job, mounting, pod, shell},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Alone:
        an_agent_killed_at_any_point_of_a_start_leaves_exactly_one_sandbox,
        an_agent_that_starts_again_runs_nothing_twice_and_takes_nobody_out_of_service,
        a_containerd_killed_underneath_ends_nothing_and_what_ended_meanwhile_is_seen,
        a_dead_pause_process_ends_the_pod_and_leaves_nothing,
        a_process_that_the_runtime_forgot_keeps_no_sandbox,
        a_container_that_cri_forgot_is_removed_with_its_process,
        a_tenant_that_cannot_be_opened_loses_its_pods_and_no_others,
        a_spec_that_leaves_out_the_mesh_of_an_enrolled_pod_is_not_believed,
        no_agent_panicked_in_the_whole_run,
    ]
}

/// One sandbox and one container that runs. (A run that was cut off in its start
/// counts, and is kept for `kubectl logs --previous`.)
async fn is_there_once(host: &Host, pod: &Pod<'_>) -> anyhow::Result<()> {
    let sandboxes = host.ids("sandbox", &pod.key).await?;
    ensure!(sandboxes.len() == 1, "{}: {sandboxes:?}", pod.key);
    let containers = host.ids("container", &pod.key).await?;
    let tasks = host.ctr(&["tasks", "list"]).await?;
    let runs = |id: &&String| {
        tasks
            .lines()
            .any(|line| line.starts_with(id.as_str()) && line.contains("RUNNING"))
    };
    let running = containers.iter().filter(runs).count();
    ensure!(running == 1, "{}: {running} of {containers:?} run", pod.key);
    Ok(())
}

async fn an_agent_killed_at_any_point_of_a_start_leaves_exactly_one_sandbox(
    host: &Host,
) -> anyhow::Result<()> {
    // Spread over what a start takes here, with other starts beside it: before the
    // sandbox is asked for, while its network is made, while containers start.
    for moment in [0, 20, 50, 90, 140, 200, 300] {
        let mut pods = vec![];
        for _ in 0..3 {
            pods.push(host.start(pod(vec![idle("main")])).await?);
        }
        tokio::time::sleep(Duration::from_millis(moment)).await;
        host.kill_agent().await?;
        host.start_agent().await?;
        for pod in &pods {
            let status = pod.until_running().await?;
            ensure!(status.state == SandboxState::Running, "{status:?}");
            let failed = pod.events().into_iter().find(|e| e.severity == Severity::Warning);
            ensure!(failed.is_none(), "{failed:?}");
            is_there_once(host, pod).await?;
        }
        for pod in &pods {
            pod.forget().await?;
        }
    }
    Ok(())
}

async fn an_agent_that_starts_again_runs_nothing_twice_and_takes_nobody_out_of_service(
    host: &Host,
) -> anyhow::Result<()> {
    let init = mounting(shell("init", "echo ran >> /shared/init"), "shared", "/shared");
    let mut main = mounting(idle("main"), "shared", "/shared");
    main.readiness_probe = Some(wire::Probe {
        action: Some(wire::probe::Action::Exec(wire::ExecAction {
            command: vec!["true".into()],
        })),
        initial_delay_seconds: 0,
        period_seconds: 1,
        timeout_seconds: 5,
        success_threshold: 1,
        failure_threshold: 3,
        termination_grace_seconds: None,
    });
    let mut spec = pod(vec![main]);
    spec.init_containers = vec![init];
    spec.volumes = vec![empty_dir("shared", false, None)];
    let web = host.start(spec).await?;
    let before = web.until_ready().await?;
    // Its end comes while nobody is there to see it.
    let short = host.start(job(vec![shell("main", "sleep 1; exit 4")])).await?;
    short.until_running().await?;
    host.kill_agent().await?;
    let short_id = &host.ids("container", &short.key).await?[0];
    wait("that the short one ends", async || {
        let tasks = host.ctr(&["tasks", "list"]).await.map_err(|e| e.to_string())?;
        let of_it = tasks.lines().find(|line| line.starts_with(short_id.as_str()));
        match of_it.is_some_and(|line| line.contains("RUNNING")) {
            true => Err(tasks),
            false => Ok(()),
        }
    })
    .await?;
    host.start_agent().await?;
    let first = web.until("be reported", |_| true).await?;
    ensure!(
        first.containers[0].ready,
        "it was taken out of service: {first:?}"
    );
    ensure!(
        first.revision > before.revision,
        "{} after {}",
        first.revision,
        before.revision
    );
    let told = |status: &SandboxStatus| (container_id(status, "main").ok(), status.pod_ip);
    ensure!(told(&first) == told(&before), "{first:?} after {before:?}");
    let ran = web.exec("main", &["cat", "/shared/init"]).await?;
    ensure!(ran == "ran", "{ran}");
    let status = short.until_stopped().await?;
    ensure!(end(&status, "main")?.exit_code == 4, "{status:?}");
    web.forget().await?;
    short.forget().await
}

async fn a_containerd_killed_underneath_ends_nothing_and_what_ended_meanwhile_is_seen(
    host: &Host,
) -> anyhow::Result<()> {
    let web = host.start(pod(vec![idle("stays"), idle("goes")])).await?;
    let before = web.until_running().await?;
    let pid = host.pid(&container_id(&before, "goes")?).await?;
    host.kill_containerd().await?;
    host.kill_process(pid)?;
    // Asked for while nobody can do it.
    let late = host.start(pod(vec![idle("main")])).await?;
    host.start_containerd().await?;
    let after = web
        .until("start what ended again", |status| {
            container(status, "goes")
                .is_ok_and(|c| c.restart_count == 1 && matches!(c.state, ContainerState::Running { .. }))
        })
        .await?;
    let stays = |status| container_id(status, "stays");
    ensure!(stays(&after)? == stays(&before)?, "{after:?}");
    ensure!(container(&after, "stays")?.restart_count == 0, "{after:?}");
    ensure!(after.pod_ip == before.pod_ip, "{after:?}");
    late.until_running().await?;
    is_there_once(host, &late).await?;
    late.forget().await?;
    web.forget().await
}

async fn a_dead_pause_process_ends_the_pod_and_leaves_nothing(host: &Host) -> anyhow::Result<()> {
    let web = host.start(pod(vec![idle("main")])).await?;
    let beside = host.start(pod(vec![idle("main")])).await?;
    let before = beside.until_running().await?;
    web.until_running().await?;
    let sandbox = &host.ids("sandbox", &web.key).await?[0];
    host.kill_process(host.pid(sandbox).await?)?;
    web.event("SandboxChanged", "").await?;
    let status = web.until_stopped().await?;
    ensure!(status.reason == "SandboxLost", "{status:?}");
    ensure!(
        matches!(status.containers[0].state, ContainerState::Terminated(_)),
        "{status:?}"
    );
    web.forget().await?;
    let after = beside.until_running().await?;
    ensure!(
        container_id(&after, "main")? == container_id(&before, "main")?,
        "{after:?}"
    );
    beside.forget().await
}

/// The pod's own cgroup, in each hierarchy that has one.
fn cgroups_of(host: &Host, pod: &Pod<'_>) -> Vec<PathBuf> {
    let below = |root: &Path| {
        let parents = Cgroups::detect(&host.cgroup()).parents(&pod.key);
        let all = parents.map(|parent| root.join(parent.trim_start_matches('/')));
        all.into_iter().find(|path| path.exists())
    };
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten();
    let hierarchies = hierarchies.map(|entry| entry.path());
    hierarchies
        .chain([root.to_owned()])
        .filter_map(|root| below(&root))
        .collect()
}

/// As containerd leaves a `runc init` behind when a start is cut off.
async fn a_process_that_the_runtime_forgot_keeps_no_sandbox(host: &Host) -> anyhow::Result<()> {
    let web = host.start(pod(vec![idle("main")])).await?;
    web.until_running().await?;
    let cgroups = cgroups_of(host, &web);
    ensure!(!cgroups.is_empty(), "the pod has no cgroup");
    let mut forgotten = tokio::process::Command::new("sleep")
        .arg("100000")
        .kill_on_drop(true)
        .spawn()?;
    let pid = forgotten.id().context("it ended at once")?.to_string();
    let mut joined = 0;
    for cgroup in &cgroups {
        let below = cgroup.join("forgotten");
        std::fs::create_dir(&below)?;
        // Not into one of version 1's cpusets, which begin without processors.
        joined += usize::from(std::fs::write(below.join("cgroup.procs"), &pid).is_ok());
    }
    ensure!(joined > 0, "none of {cgroups:?} takes a process");
    web.forget().await?;
    let status = within("that the process ends", forgotten.wait()).await??;
    ensure!(status.signal() == Some(9), "{status}");
    ensure!(cgroups_of(host, &web).is_empty(), "its cgroup is left");
    Ok(())
}

/// As a start that was cut off leaves it: in containerd's store, and not in CRI's.
async fn a_container_that_cri_forgot_is_removed_with_its_process(host: &Host) -> anyhow::Result<()> {
    const ID: &str = "forgotten";
    let cgroup = format!("/{}/forgotten", host.cgroup());
    let run = ["run", "--detach", "--null-io", "--cgroup", &cgroup];
    let what = [BUSYBOX_IMAGE.reference, ID, "/bin/sleep", "100000"];
    host.ctr(&[run.as_slice(), &what].concat()).await?;
    let pid = host.pid(ID).await?;
    let runtime = Runtime::at(&host.socket());
    // The second time it is gone.
    for _ in 0..2 {
        runtime.remove_sandbox(&SandboxId(ID.into())).await?;
        let left = host.ctr(&["containers", "list", "--quiet"]).await?;
        ensure!(left.lines().all(|id| id != ID), "{left}");
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "its process lives");
    }
    Ok(())
}

async fn a_tenant_that_cannot_be_opened_loses_its_pods_and_no_others(host: &Host) -> anyhow::Result<()> {
    let ours = host.start(pod(vec![idle("main")])).await?;
    let theirs = host.start_for(&host.theirs, pod(vec![idle("main")])).await?;
    let before = ours.until_running().await?;
    theirs.until_running().await?;
    host.kill_agent().await?;
    // What cannot become a router's namespace again.
    let router = host.theirs.router(host);
    Tool::words("umount --lazy").arg(&router).run().await?;
    std::fs::remove_file(&router)?;
    std::fs::create_dir(&router)?;
    host.start_agent().await?;
    let status = theirs.until_stopped().await?;
    ensure!(
        status.reason == "SandboxLost" && status.message.contains("could not open the pod's tenant"),
        "{status:?}"
    );
    let after = ours.until_running().await?;
    ensure!(
        container_id(&after, "main")? == container_id(&before, "main")?,
        "{after:?}"
    );
    let refused = host.start_for(&host.theirs, pod(vec![idle("main")])).await;
    ensure!(refused.is_err(), "a pod of a tenant that is not open was taken");
    theirs.forget().await?;
    // Mended by a person, and configured again by the virtual node.
    std::fs::remove_dir(&router)?;
    host.theirs.configure().await?;
    let again = host.start_for(&host.theirs, pod(vec![idle("main")])).await?;
    again.until_running().await?;
    again.forget().await?;
    ours.forget().await
}

async fn a_spec_that_leaves_out_the_mesh_of_an_enrolled_pod_is_not_believed(
    host: &Host,
) -> anyhow::Result<()> {
    let mut spec = pod(vec![idle("main")]);
    spec.mesh = wire::MeshMode::Enrolled.into();
    let web = host.start(spec).await?;
    // No further: nobody signs its certificate.
    let before = web
        .until("be redirected", |status| status.mesh == MeshState::Redirected)
        .await?;
    let identity = before.identity.context("an enrolled pod has an identity")?;
    host.kill_agent().await?;
    let dirs = host.files().sandbox(&web.key);
    let mut parts = (*spec_file::read(&dirs)?).clone();
    parts.mesh = MeshMode::Unmeshed;
    spec_file::write(&dirs, SandboxSpec::new(parts)?)?;
    host.start_agent().await?;
    let status = web.until_stopped().await?;
    ensure!(status.reason == "SandboxLost", "{status:?}");
    ensure!(
        status.identity.as_deref() == Some(identity.as_str()),
        "{status:?}"
    );
    let containers = host.ids("container", &web.key).await?;
    ensure!(containers.is_empty(), "it was started: {containers:?}");
    web.forget().await
}

async fn no_agent_panicked_in_the_whole_run(host: &Host) -> anyhow::Result<()> {
    let log = host.agent_log()?;
    ensure!(log.contains("the agent serves"), "the agent has logged nothing");
    let panics: Vec<&str> = log.lines().filter(|line| line.contains("panicked at")).collect();
    ensure!(panics.is_empty(), "{panics:#?}");
    Ok(())
}
