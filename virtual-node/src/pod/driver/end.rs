//! The end of a sandbox and of the object: each call is repeated until it is
//! answered.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use pool_agent_api::{PodUid, SandboxKey};
use tracing::{debug, warn};

use super::{
    super::{
        lifecycle::{Event, Place},
        status,
    },
    Done, Driver, api,
    object::{is_gone, newer},
    retries::Retries,
};
use crate::{
    api_server::answered,
    pool::{CallError, Pool},
};

impl Driver {
    /// The final status, then the object itself.
    pub(super) fn remove(&mut self) {
        let Some(pod) = self.object.clone() else {
            self.step(Event::Removed);
            return;
        };
        let last = status::status(&self.observed(&pod));
        let writing = self.telling.take_writing();
        let (client, uid) = (self.tools.client.clone(), self.uid.clone());
        let removing = async move {
            let mut known = pod;
            if let Some(writing) = writing
                && let Ok(written) = writing.done.await
                && newer(&written, &known)
            {
                known = Arc::new(written);
            }
            remove(client, uid, &known, &last).await;
            Done::Removed
        };
        self.work = Some(removing.boxed());
    }
}

/// Repeats until the host answers.
pub(super) async fn stop(pool: Pool, uid: PodUid, place: Place, grace: Duration) -> Done {
    let key = SandboxKey {
        pod: uid,
        attempt: place.attempt,
    };
    let mut retries = Retries::of_calls();
    let mut told = false;
    loop {
        let Some(host) = pool.find(&place.host).await else {
            return Done::Stopped { place, known: false };
        };
        match host.stop(&key, grace).await {
            Ok(()) => return Done::Stopped { place, known: true },
            Err(CallError::NotFound { .. }) => return Done::Stopped { place, known: false },
            Err(error) => repeated(&error, &mut told, "stop"),
        }
        tokio::time::sleep(retries.pause()).await;
    }
}

/// Repeats until the host answers. Afterwards it is gone there, and fenced.
pub(super) async fn forget(pool: Pool, uid: PodUid, place: &Place) {
    let key = SandboxKey {
        pod: uid,
        attempt: place.attempt,
    };
    let mut retries = Retries::of_calls();
    let mut told = false;
    while let Some(host) = pool.find(&place.host).await {
        match host.forget(&key).await {
            Ok(()) | Err(CallError::NotFound { .. }) => return,
            Err(error) => repeated(&error, &mut told, "forget"),
        }
        tokio::time::sleep(retries.pause()).await;
    }
}

/// One line in the log for a call that is repeated until it succeeds.
fn repeated(error: &CallError, told: &mut bool, call: &'static str) {
    let error = error as &dyn std::error::Error;
    if std::mem::replace(told, true) {
        debug!(error, call, "a call is repeated again");
    } else {
        warn!(error, call, "a call is repeated until the host answers");
    }
}

/// Repeats until the object is gone, or is another pod's.
async fn remove(client: Client, uid: PodUid, pod: &Pod, last: &PodStatus) {
    let api = api(&client, pod);
    let name = pod.name_any();
    let current = pod.status.clone().unwrap_or_default();
    let mut patch = status::patch(uid.as_str(), &current, last);
    let delete = DeleteParams::default()
        .grace_period(0)
        .preconditions(Preconditions {
            uid: Some(uid.into()),
            resource_version: None,
        });
    let mut retries = Retries::of_calls();
    loop {
        let outcome = async {
            if let Some(body) = &patch {
                answered(api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(body))).await?;
                patch = None;
            }
            answered(api.delete(&name, &delete)).await
        };
        match outcome.await {
            Ok(_) => return,
            Err(error) if is_gone(&error) => return,
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "removing a pod is tried again"
                );
            }
        }
        tokio::time::sleep(retries.pause()).await;
    }
}
