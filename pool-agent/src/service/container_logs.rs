//! `Logs`: finds the run that is meant and streams its log.

use pool_agent_api::{
    SandboxKey, TenantId,
    status::{ContainerState, timestamp},
    wire,
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::Status;

use crate::{
    host::Host,
    layout::SandboxDirs,
    logs::{self, Request},
};

/// Blocks on their way to the caller, 64 KiB each.
const IN_FLIGHT: usize = 4;

pub(super) fn start(
    host: &Host,
    caller: &TenantId,
    message: wire::LogsRequest,
) -> Result<ReceiverStream<Result<wire::LogChunk, Status>>, Status> {
    let key = SandboxKey::from_wire(message.key)?;
    host.check(caller, &key)?;
    let unknown = || {
        Status::not_found(format!(
            "container {:?} is not in sandbox {key}",
            message.container
        ))
    };
    let status = host.board().status(caller, &key).ok_or_else(unknown)?;
    let container = status
        .init_containers
        .iter()
        .chain(&status.containers)
        .find(|c| c.name.as_str() == message.container)
        .ok_or_else(unknown)?;
    let directory = host.shop().layout.sandbox(&key).logs();
    let log_of = |restart| directory.join(SandboxDirs::log_name(&container.name, restart));
    let newest = container.restart_count;
    let restart = if message.previous {
        newest
            .checked_sub(1)
            .filter(|&r| log_of(r).exists())
            .ok_or_else(|| {
                Status::not_found(format!(
                    "previous terminated container {:?} in pod {:?} not found",
                    message.container, status.name
                ))
            })?
    } else if log_of(newest).exists() {
        newest
    } else {
        // Being started again: the log of the run before it is what there is.
        newest
            .checked_sub(1)
            .filter(|&r| log_of(r).exists())
            .ok_or_else(|| {
                let reason = match &container.state {
                    ContainerState::Waiting { reason, .. } => reason.as_str(),
                    _ => "ContainerCreating",
                };
                Status::failed_precondition(format!(
                    "container {:?} in pod {:?} is waiting to start: {reason}",
                    message.container, status.name
                ))
            })?
    };
    let request = Request {
        follow: message.follow && !message.previous,
        timestamps: message.timestamps,
        tail_lines: message.tail_lines,
        limit_bytes: message.limit_bytes,
        since: message.since.map(|at| timestamp("since", at)).transpose()?,
    };
    let path = log_of(restart);
    let (board, tenant, name) = (host.board().clone(), caller.clone(), container.name.clone());
    let running = move || {
        board.status(&tenant, &key).is_some_and(|status| {
            status.init_containers.iter().chain(&status.containers).any(|c| {
                c.name == name
                    && c.restart_count == restart
                    && matches!(c.state, ContainerState::Running { .. })
            })
        })
    };
    let (sender, blocks) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(async move { logs::stream(&path, request, running, sender).await });
    let (chunks, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut blocks = ReceiverStream::new(blocks);
        while let Some(block) = blocks.next().await {
            let chunk = match block {
                Ok(data) => Ok(wire::LogChunk { data: data.to_vec() }),
                Err(error) => Err(Status::internal(format!("reading the log: {error}"))),
            };
            if chunks.send(chunk).await.is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(stream))
}
