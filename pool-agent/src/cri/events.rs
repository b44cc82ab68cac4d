//! What the runtime says happened, and, since a stream can miss things, what a
//! look at all its containers says. One task; it tells the sandboxes' drivers.

use std::{collections::HashSet, sync::Arc, time::Duration};

use pool_agent_api::{HostName, SandboxKey};
use tokio::time::MissedTickBehavior;

use super::{CriError, Labels, Runtime, key_of, wire};
use crate::sandbox::event::{ContainerId, SandboxId};

/// How often everything is looked at while the stream of events works.
const RELIST: Duration = Duration::from_secs(15);
/// How soon it is followed again; each time everything is looked at first.
const RELIST_ALONE: Duration = Duration::from_secs(1);

/// Something to look into.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Sign {
    /// A run has ended, or is no more.
    Ended(ContainerId),
    /// The sandbox has stopped being ready, or is no more.
    SandboxDown(SandboxId),
}

/// Who is told, and what they believe to run.
pub trait Believers: Send + Sync + 'static {
    /// The live sandboxes, each with the runs believed to be running.
    fn believed(&self) -> Vec<(SandboxKey, Option<SandboxId>, Vec<ContainerId>)>;
    fn tell(&self, key: &SandboxKey, sign: Sign);
}

/// Runs until the agent ends.
pub async fn watch(runtime: Runtime, host: HostName, believers: Arc<impl Believers>) {
    loop {
        if let Err(status) = follow(&runtime, &host, &*believers).await {
            tracing::warn!(
                error = status.message(),
                "the runtime's events cannot be followed"
            );
        }
        tokio::time::sleep(RELIST_ALONE).await;
    }
}

async fn follow(runtime: &Runtime, host: &HostName, believers: &impl Believers) -> Result<(), tonic::Status> {
    let mut relisting = tokio::time::interval(RELIST);
    relisting.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut client = runtime.runtime_client();
    // The runtime answers only when it has the first event to send.
    let opening = client.get_container_events(wire::GetEventsRequest {});
    let mut opening = std::pin::pin!(opening);
    let mut events = loop {
        tokio::select! {
            opened = &mut opening => break opened?.into_inner(),
            _ = relisting.tick() => relist(runtime, host, believers).await,
        }
    };
    loop {
        tokio::select! {
            event = events.message() => match event? {
                Some(event) => heed(event, believers),
                None => return Ok(()),
            },
            _ = relisting.tick() => relist(runtime, host, believers).await,
        }
    }
}

fn heed(event: wire::ContainerEventResponse, believers: &impl Believers) {
    use wire::ContainerEventType as Type;
    if !matches!(
        event.container_event_type(),
        Type::ContainerStoppedEvent | Type::ContainerDeletedEvent
    ) {
        return;
    }
    let Some(sandbox) = event.pod_sandbox_status else {
        return;
    };
    let Some(key) = key_of(&sandbox.labels) else {
        return;
    };
    let sign = if event.container_id == sandbox.id {
        Sign::SandboxDown(SandboxId(sandbox.id))
    } else {
        Sign::Ended(ContainerId(event.container_id))
    };
    believers.tell(&key, sign);
}

async fn relist(runtime: &Runtime, host: &HostName, believers: &impl Believers) {
    // Asked first: what is believed only later may be newer than the lists.
    let believed = believers.believed();
    if believed.is_empty() {
        return;
    }
    if let Err(error) = compare(runtime, host, believers, believed).await {
        tracing::warn!(error = %error, "the runtime's containers cannot be listed");
    }
}

async fn compare(
    runtime: &Runtime,
    host: &HostName,
    believers: &impl Believers,
    believed: Vec<(SandboxKey, Option<SandboxId>, Vec<ContainerId>)>,
) -> Result<(), CriError> {
    let (sandboxes, containers) = tokio::try_join!(
        runtime.sandboxes(Labels::Host(host)),
        runtime.containers(Labels::Host(host))
    )?;
    let up: HashSet<SandboxId> = sandboxes.into_iter().filter(|s| s.ready).map(|s| s.id).collect();
    let running: HashSet<ContainerId> = containers
        .into_iter()
        .filter(|c| c.state == wire::ContainerState::ContainerRunning)
        .map(|c| c.id)
        .collect();
    for (key, sandbox, runs) in believed {
        for run in runs {
            if !running.contains(&run) {
                believers.tell(&key, Sign::Ended(run));
            }
        }
        if let Some(sandbox) = sandbox
            && !up.contains(&sandbox)
        {
            believers.tell(&key, Sign::SandboxDown(sandbox));
        }
    }
    Ok(())
}
