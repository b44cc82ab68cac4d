//! `Grant`: a virtual node's grants of the right to run, one after another.

use pool_agent_api::{Grant, TenantId, wire};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::{
    fence::Fence,
    right::{GrantRefused, Node},
};

/// Answers on their way; a caller that does not read them is not read either.
const IN_FLIGHT: usize = 4;

pub(super) fn start(
    fence: Fence,
    tenant: TenantId,
    mut grants: Streaming<wire::GrantRequest>,
) -> ReceiverStream<Result<wire::GrantResponse, Status>> {
    let (sender, stream) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(async move {
        // A stream that breaks has no answer; what was granted holds to its end.
        while let Ok(Some(grant)) = grants.message().await {
            let answer = take(&fence, &tenant, grant);
            let over = answer.is_err();
            if sender.send(answer).await.is_err() || over {
                return;
            }
        }
    });
    ReceiverStream::new(stream)
}

fn take(fence: &Fence, tenant: &TenantId, grant: wire::GrantRequest) -> Result<wire::GrantResponse, Status> {
    let grant = Grant::try_from(grant)?;
    let node = Node::new(tenant, &grant.node_name);
    fence
        .granted(&node, grant.epoch, grant.duration)
        .map_err(|refused| match refused {
            GrantRefused::EarlierEpoch { .. } => Status::failed_precondition(refused.to_string()),
            GrantRefused::TooManyNodes => Status::resource_exhausted(refused.to_string()),
        })?;
    let lease = fence.lease().unwrap_or_default();
    Ok(wire::GrantResponse {
        sequence: grant.sequence,
        lease_millis: u64::try_from(lease.as_millis()).unwrap_or(u64::MAX),
    })
}
