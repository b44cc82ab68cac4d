//! Hands the spool's batches to the operator's collector, one after the other, each
//! until it is taken. It speaks to nobody else: the far end has to hold the pool's
//! certificate of a usage collector.

use std::{sync::Arc, time::Duration};

use mesh_runtime::control::{self, OpenControlError, PoolTls};
use pool_agent_api::{
    Peer,
    usage_wire::{Batch, usage_collector_client::UsageCollectorClient},
};
use tonic::{Status, transport::Channel};

use super::spool::Spool;
use crate::causes::described;

/// A collector that does not answer is asked again.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between tries, doubling.
const SOONEST: Duration = Duration::from_millis(500);
const LATEST: Duration = Duration::from_secs(30);

pub(super) fn dial(
    collector: &str,
    tls: &Arc<PoolTls>,
) -> Result<UsageCollectorClient<Channel>, OpenControlError> {
    let channel = control::channel(collector, Peer::UsageCollector, tls)?;
    Ok(UsageCollectorClient::new(channel))
}

/// Goes on for ever.
pub(super) async fn carry(spool: Spool, client: UsageCollectorClient<Channel>) {
    let mut written = spool.written();
    let (mut pause, mut told) = (SOONEST, false);
    loop {
        let Some(number) = spool.oldest() else {
            if written.changed().await.is_err() {
                return;
            }
            continue;
        };
        match hand(&spool, client.clone(), number).await {
            Ok(()) => {
                spool.taken(number);
                if told {
                    tracing::info!("the collector takes usage records again");
                }
                (pause, told) = (SOONEST, false);
            }
            Err(error) => {
                if !told {
                    tracing::warn!(error, "the collector does not take usage records; they are kept");
                }
                told = true;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LATEST);
            }
        }
    }
}

async fn hand(spool: &Spool, mut client: UsageCollectorClient<Channel>, number: u64) -> Result<(), String> {
    let read = spool.clone();
    let records = tokio::task::spawn_blocking(move || read.records(number))
        .await
        .map_err(|_| "reading a batch broke off".to_owned())?
        .map_err(|error| described(&error))?;
    let batch = Batch {
        spool: spool.id().to_owned(),
        number,
        records: records.iter().map(Into::into).collect(),
    };
    let answer = tokio::time::timeout(PATIENCE, client.hand(batch)).await;
    answer
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("it does not answer")))
        .map(drop)
        .map_err(|status| described(&status))
}
