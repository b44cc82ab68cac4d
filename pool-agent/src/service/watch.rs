//! `Watch`: the tenant's page of the board, as a stream.

use pool_agent_api::{TenantId, wire};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::watch_event::Event;

use crate::board::{Board, Change};

/// Changes on their way to the caller. While it is full nothing is queued: the
/// reader's next look takes the newest of each sandbox.
const IN_FLIGHT: usize = 32;

pub(super) fn start(board: &Board, tenant: TenantId) -> ReceiverStream<Result<wire::WatchEvent, Status>> {
    let (sender, stream) = mpsc::channel(IN_FLIGHT);
    let board = board.clone();
    tokio::spawn(async move {
        if feed(&board, tenant, &sender).await.is_none() {
            tracing::debug!("a watch has ended");
        }
    });
    ReceiverStream::new(stream)
}

/// Ends (None) when nobody receives.
async fn feed(
    board: &Board,
    tenant: TenantId,
    to: &mpsc::Sender<Result<wire::WatchEvent, Status>>,
) -> Option<()> {
    // Events first, so that none falls between.
    let mut events = board.events(&tenant);
    let mut reader = board.reader(Some(tenant));
    let mut synced = false;
    let send = async |event: Event| to.send(Ok(wire::WatchEvent { event: Some(event) })).await.ok();
    loop {
        match reader.take() {
            Ok(changes) => {
                for change in changes {
                    send(match change {
                        Change::Status(status) => Event::Status((*status).clone().into()),
                        Change::Forgotten(key) => Event::Forgotten(key.into()),
                    })
                    .await?;
                }
            }
            Err(behind) => {
                to.send(Err(Status::aborted(behind.to_string()))).await.ok()?;
                return Some(());
            }
        }
        if !synced {
            send(Event::Synced(wire::Synced {})).await?;
            synced = true;
        }
        tokio::select! {
            more = reader.changed() => {
                if !more {
                    return Some(());
                }
            }
            event = events.recv() => match event {
                Ok(event) => send(Event::PodEvent(event.into())).await?,
                // "At most once": what a slow reader missed is gone.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Some(()),
            },
            () = to.closed() => return None,
        }
    }
}
