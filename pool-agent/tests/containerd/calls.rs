//! Calls that are cut off or repeated, that name what is not here, or that come when
//! the disk is full.

use std::{io::Write, path::Path, time::Duration};

use anyhow::{Context, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pool_agent_api::{
    SandboxKey,
    wire::{self, start_sandbox_response::Outcome},
};
use tonic::Code;

use super::{
    host::{Host, wait},
    pod::{idle, pod},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        a_start_and_a_removal_that_are_cut_off_at_any_moment_are_done_whole,
        a_tenant_cannot_fence_another_tenants_pod,
    ];
    all.extend(cases![Alone:
        calls_for_pods_that_are_not_here_write_nothing,
        a_full_disk_keeps_no_pod_from_being_stopped_and_heals_by_itself,
    ]);
    all
}

/// The caller goes away after so long; each step is a few of the agent's awaits.
const STEP: Duration = Duration::from_micros(400);
const STEPS: u32 = 30;

async fn a_start_and_a_removal_that_are_cut_off_at_any_moment_are_done_whole(
    host: &Host,
) -> anyhow::Result<()> {
    let mut cut = 0;
    for step in 0..STEPS {
        let mut spec = pod(vec![idle("main")]);
        spec.tenant = host.ours.name.into();
        spec.key = Some(wire::SandboxKey {
            pod_uid: host.next_uid(),
            attempt: 1,
        });
        let key = SandboxKey::from_wire(spec.key.clone())?;
        let request = || wire::StartSandboxRequest {
            spec: Some(spec.clone()),
        };
        let mut client = host.ours.client();
        let answer = tokio::time::timeout(STEP * step, client.start_sandbox(request())).await;
        cut += usize::from(answer.is_err());
        // Whatever came of it, the same call finds it.
        let again = client.start_sandbox(request()).await?.into_inner();
        ensure!(
            matches!(again.outcome, Some(Outcome::Accepted(_))),
            "after {:?}: {again:?}",
            STEP * step
        );
        let forget = || wire::ForgetSandboxRequest {
            key: Some(wire::SandboxKey::from(&key)),
        };
        let answer = tokio::time::timeout(STEP * step, client.forget_sandbox(forget())).await;
        cut += usize::from(answer.is_err());
        client.forget_sandbox(forget()).await?;
        for kind in ["sandbox", "container"] {
            let left = host.ids(kind, &key).await?;
            ensure!(left.is_empty(), "after {:?}: {left:?}", STEP * step);
        }
        let again = client.start_sandbox(request()).await?.into_inner();
        ensure!(
            matches!(&again.outcome, Some(Outcome::Refused(r)) if r.reason() == wire::RefusalReason::EndedAttempt),
            "an ended attempt came again: {again:?}"
        );
    }
    ensure!(cut > 0, "no call was cut off");
    Ok(())
}

async fn a_tenant_cannot_fence_another_tenants_pod(host: &Host) -> anyhow::Result<()> {
    let uid = host.next_uid();
    let key = |attempt| {
        Some(wire::SandboxKey {
            pod_uid: uid.clone(),
            attempt,
        })
    };
    let fence = wire::ForgetSandboxRequest { key: key(u32::MAX) };
    host.theirs.client().forget_sandbox(fence.clone()).await?;
    let mut spec = pod(vec![idle("main")]);
    spec.key = key(1);
    let started = host.start(spec.clone()).await?;
    started.until_running().await?;
    host.theirs.client().forget_sandbox(fence.clone()).await?;
    started.until_running().await?;
    started.forget().await?;
    // Its own it can.
    host.ours.client().forget_sandbox(fence).await?;
    spec.key = key(2);
    ensure!(host.start(spec).await.is_err(), "a fenced attempt was taken");
    Ok(())
}

async fn calls_for_pods_that_are_not_here_write_nothing(host: &Host) -> anyhow::Result<()> {
    let ledger = host.files().ledger();
    let before = std::fs::metadata(&ledger)?.len();
    let mut client = host.ours.client();
    for n in 0..500 {
        let key = Some(wire::SandboxKey {
            pod_uid: format!("nobody-{n}"),
            attempt: 1,
        });
        client
            .forget_sandbox(wire::ForgetSandboxRequest { key: key.clone() })
            .await?;
        let stopped = client
            .stop_sandbox(wire::StopSandboxRequest {
                key,
                grace_seconds: 0,
            })
            .await;
        ensure!(
            stopped.as_ref().is_err_and(|s| s.code() == Code::NotFound),
            "{stopped:?}"
        );
    }
    let after = std::fs::metadata(&ledger)?.len();
    ensure!(after == before, "the ledger grew from {before} to {after} bytes");
    Ok(())
}

async fn a_full_disk_keeps_no_pod_from_being_stopped_and_heals_by_itself(host: &Host) -> anyhow::Result<()> {
    let state = host.files().ledger();
    let state = state.parent().context("the ledger has no directory")?;
    host.kill_agent().await?;
    mount(
        Some("spindrift-small"),
        state,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("size=8m,mode=0700"),
    )?;
    let result = on_a_small_disk(host, state).await;
    // Whatever came of it, the others go on with what was there before.
    let back = async {
        host.kill_agent().await?;
        umount2(state, MntFlags::MNT_DETACH)?;
        host.start_agent()
            .await
            .context("on the disk that was there before")
    };
    let back = back.await;
    result.and(back)
}

/// Takes what room there is.
fn fill(path: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(path)?;
    for size in [1 << 16, 1 << 12, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    let error = file.write_all(&[0; 4096]).err().context("the disk is not full")?;
    ensure!(error.kind() == std::io::ErrorKind::StorageFull, "{error}");
    Ok(())
}

async fn on_a_small_disk(host: &Host, state: &Path) -> anyhow::Result<()> {
    host.start_agent().await?;
    for tenant in [&host.ours, &host.theirs] {
        tenant.configure().await?;
    }
    let (first, second) = (
        host.start(pod(vec![idle("main")])).await?,
        host.start(pod(vec![idle("main")])).await?,
    );
    first.until_running().await?;
    second.until_running().await?;
    let filler = state.join("filler");
    fill(&filler)?;

    // What is set aside grows by whole pages: a few more may fit.
    let mut taken = vec![];
    let refused = loop {
        ensure!(taken.len() < 50, "a full disk holds ever more");
        match host.start(pod(vec![idle("main")])).await {
            Ok(pod) => taken.push(pod),
            Err(refused) => break refused.to_string(),
        }
    };
    ensure!(
        refused.contains("NoRoom") && refused.contains("no room to record another sandbox"),
        "{refused}"
    );
    for pod in taken {
        pod.forget().await?;
    }
    first.stop(1).await?;
    first.until_stopped().await?;
    first.forget().await?;
    ensure!(host.ids("sandbox", &first.key).await?.is_empty());

    // Also an agent that starts on the full disk finds what was said on it.
    host.kill_agent().await?;
    host.start_agent().await.context("on a full disk")?;
    second.until_running().await?;
    let mut again = pod(vec![idle("main")]);
    again.key = Some(wire::SandboxKey::from(&first.key));
    let fenced = host
        .start(again)
        .await
        .map(drop)
        .err()
        .context("an ended attempt came again")?;
    ensure!(fenced.to_string().contains("EndedAttempt"), "{fenced}");
    second.stop(1).await?;
    second.until_stopped().await?;
    second.forget().await?;

    // Room again: nobody has to start anything anew.
    std::fs::remove_file(&filler)?;
    let third = wait("that a pod is taken again", async || {
        host.start(pod(vec![idle("main")]))
            .await
            .map_err(|error| format!("{error:#}"))
    })
    .await?;
    third.until_running().await?;
    third.forget().await
}
