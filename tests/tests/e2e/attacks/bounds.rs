//! Whoever takes more than his share of connections, descriptors or questions.

use anyhow::{Context, ensure};
use serde_json::json;
use spindrift_local::{Lab, pool::agent_name};
use spindrift_tests::{
    Scope,
    workload::{PORT, address, merge, netexec, pod, probe, probe_server},
};

use crate::e2e::{
    mesh::metric,
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    // It counts the agents' descriptors.
    cases![Alone: a_pod_with_thousands_of_idle_connections_keeps_no_other_from_starting]
}

/// Twice as many descriptors as an agent of the lab may have, if nothing bounded them.
const CROWD: u32 = 19_000;

/// Descriptors that the agents of both hosts have open.
fn descriptors(lab: &Lab) -> anyhow::Result<Vec<usize>> {
    lab.topology()
        .hosts
        .iter()
        .map(|host| {
            let name = agent_name(host);
            let process = lab.component(&name)?.process(lab.layout());
            let process = process.with_context(|| format!("{name} does not run"))?;
            Ok(std::fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count())
        })
        .collect()
}

async fn a_pod_with_thousands_of_idle_connections_keeps_no_other_from_starting(
    scope: &Scope,
) -> anyhow::Result<()> {
    let sink = scope
        .start(pod("sink", json!({"containers": [netexec()]})))
        .await?;
    let to = format!("{}:{PORT}", address(&sink).context("no address")?);
    let before = descriptors(scope.lab())?;

    let crowd = merge(probe(&["crowd", &to, &CROWD.to_string()]), json!({}));
    scope
        .create(pod("greedy", json!({"containers": [crowd]})))
        .await?;
    let told = scope
        .log_until("greedy", "says how many stand", |log| log.contains("crowd: "))
        .await?;
    let stand: u32 = told
        .split_once("crowd: ")
        .and_then(|(_, rest)| rest.split_once(' '))
        .and_then(|(count, _)| count.parse().ok())
        .with_context(|| told.clone())?;
    ensure!((100..CROWD / 2).contains(&stand), "{told}");
    let host = scope.host_of(&scope.pod("greedy").await?)?;
    let refusals = metric(
        scope,
        &host,
        "mesh_bound_refusals_total{bound=\"connections\",level=\"pod\"}",
    )
    .await?;
    ensure!(refusals > 0.0, "nothing was refused on {host}, but {told}");

    // On either host somebody else starts, is reached and says something.
    for n in 0..4 {
        let name = format!("late-{n}");
        let late = scope
            .start(pod(&name, json!({"containers": [probe_server()]})))
            .await?;
        let at = address(&late).context("no address")?;
        let dialled = scope
            .kubectl()
            .exec_ok(&name, &["/probe", "dial", "-", &format!("{at}:{PORT}"), "hello"])
            .await?;
        ensure!(dialled.contains("peer="), "{dialled}");
        scope
            .log_until(&name, "says that it serves", |log| log.contains("serving"))
            .await?;
    }
    for n in 0..4 {
        scope
            .kubectl()
            .run(&["delete", "pod", &format!("late-{n}"), "--wait=false"])
            .await?;
    }
    for name in ["greedy", "sink"] {
        scope
            .kubectl()
            .run(&["delete", "pod", name, "--wait=false"])
            .await?;
        scope.gone(name).await?;
    }
    scope
        .wait("that the descriptors come back", async || {
            let now = descriptors(scope.lab()).map_err(|e| format!("{e:#}"))?;
            // A call or a log that is just being written.
            let back = now.iter().zip(&before).all(|(now, before)| *now <= before + 16);
            if back {
                Ok(())
            } else {
                Err(format!("{now:?} where {before:?} were"))
            }
        })
        .await
}
