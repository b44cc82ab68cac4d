//! Who may run on a host: what a restart of the host and an earlier process of a virtual
//! node are worth. (Lease and fence need a cell: the end-to-end suite's.)

use std::fmt::Write;

use anyhow::{Context, ensure};
use pool_agent_api::status::ContainerState;
use pool_agent_api::wire;
use sha2::{Digest, Sha256};
use tokio_stream::StreamExt;
use tonic::Code;

use super::{
    host::Host,
    pod::{container_id, idle, pod},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others: a_later_epoch_of_a_node_shuts_an_earlier_one_out_and_no_other_nodes]
}

pub(crate) fn tests_alone() -> Vec<Case> {
    cases![Alone: a_host_that_restarted_ends_what_it_had_and_never_starts_it_again]
}

/// The ledger's lines as another run of the machine would have written them.
fn of_another_boot(ledger: &str) -> anyhow::Result<String> {
    let mut other = String::new();
    for line in ledger.lines() {
        let (_, json) = line.split_once(' ').context("a line without a checksum")?;
        let mut records: serde_json::Value = serde_json::from_str(json)?;
        for record in records.as_array_mut().context("a line that is no list")? {
            if let Some(boot) = record.get_mut("boot_id") {
                *boot = "an earlier boot".into();
            }
        }
        let json = records.to_string();
        let digest = Sha256::digest(json.as_bytes());
        for byte in &digest[..8] {
            write!(other, "{byte:02x}")?;
        }
        writeln!(other, " {json}")?;
    }
    Ok(other)
}

async fn a_host_that_restarted_ends_what_it_had_and_never_starts_it_again(host: &Host) -> anyhow::Result<()> {
    let web = host.start(pod(vec![idle("main")])).await?;
    let before = web.until_running().await?;
    let id = container_id(&before, "main")?;
    let old = host.pid(&id).await?;
    host.kill_agent().await?;
    // The machine's containers went with it; that they are here shows that nothing of
    // them is believed.
    let ledger = host.files().ledger();
    std::fs::write(&ledger, of_another_boot(&std::fs::read_to_string(&ledger)?)?)?;
    host.start_agent().await?;
    let status = web.until_stopped().await?;
    ensure!(
        status.reason == "SandboxLost" && status.message.contains("The host restarted"),
        "{status:?}"
    );
    ensure!(
        matches!(status.containers[0].state, ContainerState::Terminated(_)),
        "{status:?}"
    );
    ensure!(
        !std::path::Path::new(&format!("/proc/{old}")).exists(),
        "its process is still there"
    );
    web.forget().await?;
    // Of this boot, and it goes on over a restart of the agent.
    let again = host.start(pod(vec![idle("main")])).await?;
    let first = again.until_running().await?;
    host.kill_agent().await?;
    host.start_agent().await?;
    let then = again.until_running().await?;
    ensure!(
        container_id(&first, "main")? == container_id(&then, "main")?,
        "{then:?}"
    );
    again.forget().await
}

/// The answer to one grant on a stream of its own.
async fn grant(
    host: &Host,
    node: &str,
    epoch: u64,
    millis: u64,
) -> Result<wire::GrantResponse, tonic::Status> {
    let grant = wire::GrantRequest {
        node_name: node.into(),
        epoch,
        duration_millis: millis,
        sequence: 9,
    };
    let grants = tokio_stream::once(grant).chain(tokio_stream::pending());
    let mut answers = host.ours.client().grant(grants).await?.into_inner();
    let answer = answers.message().await?;
    answer.ok_or_else(|| tonic::Status::internal("the stream ended without an answer"))
}

async fn a_later_epoch_of_a_node_shuts_an_earlier_one_out_and_no_other_nodes(
    host: &Host,
) -> anyhow::Result<()> {
    let answer = grant(host, "zone-a", 7, 30_000).await?;
    ensure!(answer.sequence == 9 && answer.lease_millis == 0, "{answer:?}");
    grant(host, "zone-a", 8, 30_000).await?;
    for (node, epoch, millis, code) in [
        ("zone-a", 7, 30_000, Code::FailedPrecondition),
        ("zone-a", 0, 30_000, Code::InvalidArgument),
        ("", 9, 30_000, Code::InvalidArgument),
        ("zone-a", 9, u64::MAX, Code::InvalidArgument),
    ] {
        let refused = grant(host, node, epoch, millis)
            .await
            .err()
            .context("it was taken")?;
        ensure!(refused.code() == code, "{node} {epoch} {millis}: {refused}");
    }
    grant(host, "zone-b", 1, 30_000).await.map(drop)?;
    Ok(())
}
