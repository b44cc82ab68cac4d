//! What CRI forgets, removed by containerd's own services.
//!
//! A RunPodSandbox whose caller dies while the pause process is being made ends as a
//! sandbox that CRI lists but whose container it does not know any more, so its
//! RemovePodSandbox leaves that container in containerd's store (containerd 2.2,
//! internal/cri/server/podsandbox: the clean-up of a failed start forgets the
//! container also where it could not delete it). Nobody lists it again, and once the
//! pod is started anew there are two of one name: containerd's next start ends with
//! "failed to reserve sandbox name", and the host with it.

use backon::{ConstantBuilder, Retryable};
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};

use super::{CriError, LEFTOVER_POLL, LEFTOVER_POLLS, QUICK, absent_is_fine, within};

mod containers {
    #![allow(unreachable_pub)]
    tonic::include_proto!("containerd.services.containers.v1");
}

mod tasks {
    #![allow(unreachable_pub)]
    tonic::include_proto!("containerd.services.tasks.v1");
}

/// Where containerd keeps what CRI made.
const NAMESPACE: &str = "k8s.io";
const SIGKILL: u32 = 9;

#[derive(Debug, Clone)]
pub(super) struct Leftovers {
    containers: containers::containers_client::ContainersClient<Channel>,
    tasks: tasks::tasks_client::TasksClient<Channel>,
}

impl Leftovers {
    pub(super) fn at(channel: Channel) -> Self {
        Self {
            containers: containers::containers_client::ContainersClient::new(channel.clone()),
            tasks: tasks::tasks_client::TasksClient::new(channel),
        }
    }

    /// Removes the container of a sandbox that CRI has removed, if it is still there.
    pub(super) async fn remove(&self, id: &str) -> Result<(), CriError> {
        if !self.is_there(id).await? {
            return Ok(());
        }
        tracing::warn!(id, "removing a container that the runtime forgot");
        // Its process may only just be beginning to die.
        let patience = ConstantBuilder::new()
            .with_delay(LEFTOVER_POLL)
            .with_max_times(LEFTOVER_POLLS);
        (|| self.end(id)).retry(patience).await?;
        let request = containers::DeleteContainerRequest { id: id.to_owned() };
        let mut client = self.containers.clone();
        absent_is_fine(within("DeleteContainer", QUICK, client.delete(named(request))).await)
    }

    async fn is_there(&self, id: &str) -> Result<bool, CriError> {
        let request = containers::GetContainerRequest { id: id.to_owned() };
        let mut client = self.containers.clone();
        match within("GetContainer", QUICK, client.get(named(request))).await {
            Ok(_) => Ok(true),
            // Another runtime than containerd has no such service.
            Err(CriError::Answer {
                code: Code::NotFound | Code::Unimplemented,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn end(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.tasks.clone();
        let kill = tasks::KillRequest {
            container_id: id.to_owned(),
            signal: SIGKILL,
            all: true,
        };
        // Without a process there is still a task to delete.
        if let Err(error) = within("KillTask", QUICK, client.kill(named(kill))).await {
            tracing::debug!(id, error = %error, "killing what the runtime forgot");
        }
        let delete = tasks::DeleteTaskRequest {
            container_id: id.to_owned(),
        };
        absent_is_fine(within("DeleteTask", QUICK, client.delete(named(delete))).await)
    }
}

fn named<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    request
}
