//! How containers end: by themselves, by a hook, by a stop.

use anyhow::ensure;
use pool_agent_api::{
    status::{ContainerState, SandboxState},
    wire,
};

use super::{
    host::Host,
    pod::{Pod, container, container_id, end, idle, job, pod, running, shell, waits},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        an_exit_code_a_signal_and_a_program_that_is_not_there_are_told,
        what_can_not_be_created_waits_and_is_tried_again,
        last_words_are_cut_as_a_kubelet_cuts_them,
        a_post_start_hook_that_fails_ends_its_container,
        a_stop_is_hastened_by_a_shorter_grace,
        a_pre_stop_hook_that_never_ends_is_cut_off_by_the_grace,
        an_attempt_is_started_once_and_a_newer_one_takes_its_place,
    ]
}

async fn an_exit_code_a_signal_and_a_program_that_is_not_there_are_told(host: &Host) -> anyhow::Result<()> {
    let containers = vec![
        shell("done", "exit 0"),
        shell("three", "exit 3"),
        idle("shot"),
        running("absent", &["/no/such/program"]),
    ];
    let web = host.start(job(containers)).await?;
    let status = web
        .until("run what is to be shot", |status| {
            let state = container(status, "shot").map(|c| &c.state);
            matches!(state, Ok(ContainerState::Running { .. }))
        })
        .await?;
    // From outside: within its own namespace nobody can.
    let pid = host.pid(&container_id(&status, "shot")?).await?;
    host.kill_process(pid)?;
    let status = web.until_stopped().await?;
    for (name, code, reason) in [
        ("done", 0, "Completed"),
        ("three", 3, "Error"),
        ("shot", 137, "Error"),
        ("absent", 128, "StartError"),
    ] {
        let end = end(&status, name)?;
        ensure!(
            (end.exit_code, end.reason.as_str()) == (code, reason),
            "{name}: {end:?}"
        );
        ensure!(!container(&status, name)?.ready, "{name} is ready");
    }
    let absent = end(&status, "absent")?;
    ensure!(absent.message.contains("/no/such/program"), "{absent:?}");
    web.event("Failed", "/no/such/program").await?;
    web.forget().await
}

async fn what_can_not_be_created_waits_and_is_tried_again(host: &Host) -> anyhow::Result<()> {
    // busybox' image says nothing of a user: it would run as root.
    let mut main = idle("main");
    main.security.as_mut().unwrap().run_as_non_root = true;
    let web = host.start(pod(vec![main])).await?;
    let status = web
        .until("be refused", |status| {
            waits(status, "main").0 == "CreateContainerConfigError"
        })
        .await?;
    ensure!(
        waits(&status, "main").1.contains("will run as root"),
        "{status:?}"
    );
    ensure!(container(&status, "main")?.restart_count == 0, "{status:?}");
    web.event("Failed", "will run as root").await?;
    web.forget().await
}

async fn last_words_are_cut_as_a_kubelet_cuts_them(host: &Host) -> anyhow::Result<()> {
    let from_log = |name, script| wire::Container {
        termination_message_fallback_to_logs: true,
        ..shell(name, script)
    };
    let containers = vec![
        shell(
            "long",
            "yes abcdefg | head -c 10000 > /dev/termination-log; exit 1",
        ),
        from_log(
            "logged",
            "i=0; while [ $i -lt 100 ]; do echo line $i; i=$((i+1)); done; exit 1",
        ),
        from_log("wide", "head -c 9000 /dev/zero | tr '\\0' x; exit 1"),
        // Only an error falls back to the log, and only if nothing was written.
        from_log("well", "echo all is well"),
        from_log("both", "echo logged; echo written > /dev/termination-log; exit 1"),
    ];
    let web = host.start(job(containers)).await?;
    let status = web.until_stopped().await?;
    let words = |name| end(&status, name).map(|end| end.message.clone());
    ensure!(words("long")?.len() == 4096, "{} bytes", words("long")?.len());
    let lines = words("logged")?;
    ensure!(
        lines.lines().count() == 80 && lines.starts_with("line 20\n") && lines.ends_with("line 99\n"),
        "{lines}"
    );
    ensure!(words("wide")?.len() == 2048, "{} bytes", words("wide")?.len());
    ensure!(words("well")?.is_empty(), "{}", words("well")?);
    ensure!(words("both")? == "written\n", "{}", words("both")?);
    web.forget().await
}

async fn a_post_start_hook_that_fails_ends_its_container(host: &Host) -> anyhow::Result<()> {
    let hook = |script: &str| {
        Some(wire::Hook {
            action: Some(wire::hook::Action::Exec(wire::ExecAction {
                command: ["sh", "-c", script].map(Into::into).to_vec(),
            })),
        })
    };
    let main = wire::Container {
        post_start: hook("exit 7"),
        ..idle("main")
    };
    let well = wire::Container {
        post_start: hook("touch /tmp/hooked"),
        ..idle("well")
    };
    let web = host.start(pod(vec![main, well])).await?;
    web.event("FailedPostStartHook", "command exited with 7").await?;
    let status = web
        .until("start it again", |status| status.containers[0].restart_count > 0)
        .await?;
    ensure!(
        container(&status, "main")?.last_terminated.is_some(),
        "{status:?}"
    );
    web.until("leave the other alone", |status| {
        container(status, "well").is_ok_and(|c| c.ready && c.restart_count == 0)
    })
    .await?;
    web.forget().await
}

/// Takes no notice of SIGTERM.
fn stubborn() -> wire::Container {
    shell("main", "trap '' TERM; echo up; while :; do sleep 1; done")
}

/// Waits until it does not; and until the agent knows that it runs, which is later.
async fn takes_no_notice(pod: &Pod<'_>) -> anyhow::Result<()> {
    pod.log_until("main", "says that it is up", |log| log.contains("up"))
        .await?;
    pod.until_running().await.map(drop)
}

async fn a_stop_is_hastened_by_a_shorter_grace(host: &Host) -> anyhow::Result<()> {
    let web = host.start(pod(vec![stubborn()])).await?;
    takes_no_notice(&web).await?;
    web.stop(100_000).await?;
    let status = web
        .until("be stopping", |status| status.state == SandboxState::Stopping)
        .await?;
    ensure!(
        matches!(status.containers[0].state, ContainerState::Running { .. }),
        "{status:?}"
    );
    web.stop(1).await?;
    let status = web.until_stopped().await?;
    ensure!(end(&status, "main")?.exit_code == 137, "{status:?}");
    web.forget().await
}

async fn a_pre_stop_hook_that_never_ends_is_cut_off_by_the_grace(host: &Host) -> anyhow::Result<()> {
    let main = wire::Container {
        pre_stop: Some(wire::Hook {
            action: Some(wire::hook::Action::Exec(wire::ExecAction {
                command: ["sleep", "100000"].map(Into::into).to_vec(),
            })),
        }),
        ..stubborn()
    };
    let web = host.start(pod(vec![main])).await?;
    takes_no_notice(&web).await?;
    web.stop(2).await?;
    let status = web.until_stopped().await?;
    ensure!(end(&status, "main")?.exit_code == 137, "{status:?}");
    web.event("FailedPreStopHook", "").await?;
    web.forget().await
}

async fn an_attempt_is_started_once_and_a_newer_one_takes_its_place(host: &Host) -> anyhow::Result<()> {
    let uid = host.next_uid();
    let attempt = |attempt| {
        let mut spec = pod(vec![idle("main")]);
        spec.key = Some(wire::SandboxKey {
            pod_uid: uid.clone(),
            attempt,
        });
        spec
    };
    let first = host.start(attempt(1)).await?;
    let status = first.until_running().await?;
    // As a virtual node that never heard the answer.
    host.start(attempt(1)).await?;
    ensure!(
        host.ids("sandbox", &first.key).await?.len() == 1,
        "it was started twice"
    );
    let second = host.start(attempt(2)).await?;
    let next = second.until_running().await?;
    ensure!(
        next.pod_ip != status.pod_ip,
        "the new attempt has the old one's address"
    );
    ensure!(
        host.ids("sandbox", &second.key).await?.len() == 1,
        "two attempts have sandboxes"
    );
    let refused = host.start(attempt(1)).await;
    ensure!(refused.is_err(), "an attempt came again");
    second.forget().await
}
