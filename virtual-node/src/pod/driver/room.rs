//! What the pod takes of the pool: whether it is admitted, where it gets room, and
//! what the placer is told.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use pool_agent_api::{Attempt, HostName, Namespace, PodName, spec::MeshMode, status::Severity};
use tracing::debug;

use super::{
    super::{
        admission,
        lifecycle::{Event, Place, Room},
        status::Verdict,
        translate::{self, Untranslatable},
    },
    Done, Driver, Tools,
};
use crate::{
    event::{Happening, Object},
    placement::{Ask, Placement, Shortage},
};

/// A pod that waits for room longer than this is told so.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the driver last told the placer.
#[derive(PartialEq, Eq)]
pub(super) enum Told {
    Unsaid,
    Nothing,
    Wanted(Attempt),
    Held(Placement),
    /// This host did not take it.
    Refused(HostName),
}

/// What came of asking for room.
pub(super) enum Claimed {
    Room(HostName),
    Never(Verdict),
    /// The process is stopping.
    Abandoned,
}

impl Driver {
    /// Tells the placer what the pod takes, if that has changed. A placement is
    /// published before this returns, and so before its host is asked.
    pub(super) async fn settle_room(&mut self) {
        let Some(pod) = self.object.clone() else { return };
        if let Told::Refused(host) = &self.room {
            self.tools.placer.refused(self.uid.clone(), host.clone()).await;
            self.room = Told::Nothing;
        }
        let room = match self.lifecycle.room() {
            Room::Nothing => Told::Nothing,
            Room::Wanted(attempt) => Told::Wanted(attempt),
            Room::Held(place) => self.placement(&pod, place).map_or(Told::Nothing, Told::Held),
        };
        if room == self.room {
            return;
        }
        match &room {
            Told::Wanted(_) => self.claim(&pod),
            Told::Held(placement) => {
                if let Ok(ask) = ask(&pod) {
                    let (uid, placement) = (self.uid.clone(), placement.clone());
                    self.tools.placer.hold(uid, ask, placement).await;
                }
            }
            Told::Nothing | Told::Unsaid | Told::Refused(_) => {
                self.tools.placer.release(self.uid.clone()).await;
            }
        }
        self.room = room;
    }

    /// None if the place is not the one on record, which cannot be.
    fn placement(&self, pod: &Pod, place: &Place) -> Option<Placement> {
        let record = self.record.as_ref().filter(|r| r.place == *place)?;
        Some(Placement {
            host: place.host.clone(),
            attempt: place.attempt,
            namespace: Namespace::parse("metadata.namespace", pod.namespace()?).ok()?,
            name: PodName::parse("metadata.name", pod.name_any()).ok()?,
            service_account: translate::service_account(pod).ok()?,
            enrolled: record.mesh == MeshMode::Enrolled,
        })
    }

    fn claim(&mut self, pod: &Arc<Pod>) {
        let (tools, uid, pod) = (self.tools.clone(), self.uid.clone(), pod.clone());
        // A pod that was placed before was admitted then.
        let admit = self.record.is_none();
        let claiming = async move {
            if admit && let Err(rejection) = admitted(&tools, &pod).await {
                return Done::Claimed(Claimed::Never(rejection));
            }
            let ask = match ask(&pod) {
                Ok(ask) => ask,
                Err(why) => return Done::Claimed(Claimed::Never(unsupported(&why))),
            };
            let mut claim = std::pin::pin!(tools.placer.claim(uid, ask));
            let claimed = tokio::select! {
                claimed = &mut claim => claimed,
                () = tokio::time::sleep(PATIENCE) => {
                    tools.recorder.record(Happening {
                        object: Object::pod(&pod),
                        severity: Severity::Warning,
                        reason: "WaitingForRoom".into(),
                        message: "No host of the pool has room for the pod now; it starts when one has".into(),
                        at: Timestamp::now(),
                    });
                    claim.await
                }
            };
            Done::Claimed(match claimed {
                Ok(Ok(host)) => Claimed::Room(host),
                Ok(Err(shortage)) => Claimed::Never(out_of(&shortage)),
                Err(stopped) => {
                    debug!(
                        error = &stopped as &dyn std::error::Error,
                        "a claim was abandoned"
                    );
                    Claimed::Abandoned
                }
            })
        };
        self.work = Some(claiming.boxed());
    }

    pub(super) fn claimed(&mut self, claimed: Claimed) {
        match claimed {
            Claimed::Room(host) => self.step(Event::Claimed(host)),
            Claimed::Never(verdict) => self.conclude(verdict),
            Claimed::Abandoned => {}
        }
    }
}

/// As a kubelet decides on a pod that was bound to its node, by whomever.
async fn admitted(tools: &Tools, pod: &Pod) -> Result<(), Verdict> {
    let mut node = tools.node.clone();
    // Fails only when the process stops.
    let node = match node.wait_for(Option::is_some).await {
        Ok(node) => node.clone(),
        Err(_) => None,
    };
    match node {
        Some(node) => admission::admit(pod, &node),
        None => Ok(()),
    }
}

fn ask(pod: &Pod) -> Result<Ask, Untranslatable> {
    let spec = pod.spec.clone().unwrap_or_default();
    let owner = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .map(|o| o.uid.clone());
    let claim = translate::claim(&spec)?;
    Ok(Ask { claim, owner })
}

/// As a kubelet rejects a pod that asks for what the node does not have.
pub(super) fn unsupported(why: &Untranslatable) -> Verdict {
    Verdict {
        reason: "PodFeatureUnsupported".into(),
        message: format!("Pod was rejected: {why}"),
    }
}

/// As a kubelet rejects a pod that cannot fit.
fn out_of(shortage: &Shortage) -> Verdict {
    Verdict {
        reason: format!("OutOf{}", shortage.resource),
        message: format!(
            "Pod was rejected: Node didn't have enough resource: {}, requested: {}, capacity of the largest host: {}",
            shortage.resource, shortage.requested, shortage.capacity
        ),
    }
}
