//! What the pod takes of the pool: whether it is admitted, where it gets room, and
//! what the placer is told.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::ResourceExt;
use pool_agent_api::{Attempt, HostName, Namespace, PodName, Refusal, spec::MeshMode, status::Severity};
use tokio::sync::watch;
use tracing::debug;

use super::{
    super::{
        admission,
        lifecycle::{Event, Place, Room},
        resolve::{Extent, runtime_handler},
        status::{Phase, Verdict},
        translate::{self, Untranslatable},
    },
    Done, Driver, Tools, nothing_to_wait_for,
};
use crate::{
    event::{Happening, Object},
    placement::{Arrival, Ask, Claimed, Placement, Seat, Shortage, Waiting},
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
    Left(Place),
    /// This host did not take it.
    Refused(HostName),
}

impl Told {
    /// Whether the placer knows of this place.
    pub(super) fn names(&self, place: &Place) -> bool {
        match self {
            Self::Held(placement) => placement.host == place.host && placement.attempt == place.attempt,
            Self::Left(left) => left == place,
            Self::Unsaid | Self::Nothing | Self::Wanted(_) | Self::Refused(_) => false,
        }
    }
}

/// What came of asking for room.
pub(super) enum Sought {
    Room(HostName),
    Never(Verdict),
    /// Not under this attempt.
    Lost(Attempt),
    /// Not for two attempts at once.
    NoOverlap,
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
        if self.exchange(&pod).await {
            return;
        }
        self.settle_beside(&pod).await;
        let room = match self.lifecycle.room() {
            Room::Nothing => Told::Nothing,
            Room::Wanted(attempt) => Told::Wanted(attempt),
            Room::Held(place) => self.placement(&pod, place).map_or(Told::Nothing, Told::Held),
            Room::Left(place) => Told::Left(place.clone()),
        };
        if room == self.room {
            return;
        }
        match &room {
            Told::Wanted(attempt) => self.claim(&pod, Seat::Pod, *attempt),
            Told::Held(placement) => {
                if let Ok(ask) = ask(&pod) {
                    let (uid, placement) = (self.uid.clone(), placement.clone());
                    self.tools.placer.hold(uid, Seat::Pod, ask, placement).await;
                    if Phase::of(&pod).is_final() {
                        self.tools.placer.finished(self.uid.clone()).await;
                    }
                }
            }
            Told::Left(place) => {
                let Place { host, attempt } = place.clone();
                self.tools.placer.leave(self.uid.clone(), host, attempt).await;
            }
            Told::Nothing | Told::Unsaid | Told::Refused(_) => {
                self.tools.placer.release(self.uid.clone(), Seat::Pod).await;
            }
        }
        self.room = room;
    }

    /// What a switch comes to: both attempts change their seats at once.
    async fn exchange(&mut self, pod: &Pod) -> bool {
        let (Room::Held(place), Room::Held(beside)) = (self.lifecycle.room(), self.lifecycle.room_beside())
        else {
            return false;
        };
        let came = matches!(&self.room_beside, Told::Held(old) if old.host == place.host && old.attempt == place.attempt);
        let placements = (self.placement(pod, place), self.placement(pod, beside));
        let ((Some(placement), Some(beside)), Ok(ask)) = (placements, ask(pod)) else {
            return false;
        };
        if !came {
            return false;
        }
        let uid = self.uid.clone();
        self.tools
            .placer
            .exchange(uid, ask, placement.clone(), beside.clone())
            .await;
        self.room = Told::Held(placement);
        self.room_beside = Told::Held(beside);
        true
    }

    async fn settle_beside(&mut self, pod: &Arc<Pod>) {
        let room = match self.lifecycle.room_beside() {
            Room::Wanted(attempt) => Told::Wanted(attempt),
            Room::Held(place) => self.placement(pod, place).map_or(Told::Nothing, Told::Held),
            Room::Nothing | Room::Left(_) => Told::Nothing,
        };
        if room == self.room_beside {
            return;
        }
        match &room {
            Told::Wanted(attempt) => self.claim(pod, Seat::Beside, *attempt),
            Told::Held(placement) => {
                if let Ok(ask) = ask(pod) {
                    let (uid, placement) = (self.uid.clone(), placement.clone());
                    self.tools.placer.hold(uid, Seat::Beside, ask, placement).await;
                }
            }
            _ => self.tools.placer.release(self.uid.clone(), Seat::Beside).await,
        }
        self.room_beside = room;
    }

    /// None if the place is not on record, which cannot be.
    fn placement(&self, pod: &Pod, place: &Place) -> Option<Placement> {
        let record = self.record.as_ref().filter(|r| r.names(place))?;
        Some(Placement {
            host: place.host.clone(),
            attempt: place.attempt,
            namespace: Namespace::parse("metadata.namespace", pod.namespace()?).ok()?,
            name: PodName::parse("metadata.name", pod.name_any()).ok()?,
            service_account: translate::service_account(pod).ok()?,
            enrolled: record.mesh == MeshMode::Enrolled,
        })
    }

    fn claim(&mut self, pod: &Arc<Pod>, seat: Seat, attempt: Attempt) {
        let (tools, uid, pod) = (self.tools.clone(), self.uid.clone(), pod.clone());
        // A pod that was placed before was admitted then.
        let arrival = match self.record {
            Some(_) => Arrival::Before,
            None => Arrival::New {
                created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
            },
        };
        let (show, shown) = watch::channel(None);
        if seat == Seat::Pod {
            self.waiting = shown;
        }
        let seeking = async move {
            if arrival != Arrival::Before
                && let Err(rejection) = admitted(&tools, &pod).await
            {
                return Done::Sought(Sought::Never(rejection));
            }
            let mut ask = match ask(&pod) {
                Ok(ask) => ask,
                Err(why) => return Done::Sought(Sought::Never(unsupported(&why))),
            };
            let class = pod.spec.as_ref().and_then(|s| s.runtime_class_name.as_deref());
            // One that is not there holds the pod up later, and is told then.
            if let Ok(Some(handler)) = runtime_handler(&tools.client, class, Extent::Start).await {
                ask.runtime = handler;
            }
            let (why, waits) = watch::channel(None);
            let mut claim = std::pin::pin!(tools.placer.claim(uid, seat, attempt, ask, arrival, why));
            let claimed = tokio::select! {
                claimed = &mut claim => claimed,
                () = refused_for_good(waits.clone()), if seat == Seat::Beside => {
                    return Done::Sought(Sought::NoOverlap);
                }
                () = tell_of_waiting(&tools, &pod, waits, &show), if seat == Seat::Pod => claim.await,
            };
            Done::Sought(match claimed {
                Ok(Claimed::Room(host)) => {
                    if show.borrow().is_some() {
                        let message = "A host of the pool has room for the pod";
                        tools
                            .recorder
                            .record(happening(&pod, Severity::Normal, "HostFound", message));
                    }
                    Sought::Room(host)
                }
                Ok(Claimed::Never(_) | Claimed::Unfit(_)) if seat == Seat::Beside => Sought::NoOverlap,
                Ok(Claimed::Never(shortage)) => Sought::Never(out_of(&shortage)),
                Ok(Claimed::Unfit(invalid)) => Sought::Never(unsupported(&invalid.into())),
                Ok(Claimed::Lost) => Sought::Lost(attempt),
                Err(stopped) => {
                    debug!(
                        error = &stopped as &dyn std::error::Error,
                        "a claim was abandoned"
                    );
                    Sought::Abandoned
                }
            })
        };
        self.work = Some(seeking.boxed());
    }

    pub(super) fn sought(&mut self, sought: Sought) {
        self.waiting = nothing_to_wait_for();
        match sought {
            Sought::NoOverlap => self.without_overlap(),
            Sought::Room(host) => self.step(Event::Claimed(host)),
            Sought::Never(verdict) => self.conclude(verdict),
            Sought::Lost(attempt) => self.step(Event::Lost(attempt)),
            Sought::Abandoned => {}
        }
    }
}

/// Once the cell does not take the claim now: a handover does not wait for that.
async fn refused_for_good(mut waits: watch::Receiver<Option<Waiting>>) {
    let refused = |waiting: &Option<Waiting>| waiting.as_ref().is_some_and(|w| w.is_refusal());
    if waits.wait_for(refused).await.is_err() {
        // It is answered.
        std::future::pending().await
    }
}

/// Says why the pod waits, once it has for a while and whenever the reason becomes
/// another: in an event, and to the driver for the status.
async fn tell_of_waiting(
    tools: &Tools,
    pod: &Pod,
    mut waits: watch::Receiver<Option<Waiting>>,
    show: &watch::Sender<Option<Waiting>>,
) {
    tokio::time::sleep(PATIENCE).await;
    let mut reason = "";
    loop {
        let waiting = waits.borrow_and_update().clone();
        if let Some(waiting) = waiting {
            // The words may change with every other pod; that is no news.
            if waiting.reason != reason {
                reason = waiting.reason;
                tools
                    .recorder
                    .record(happening(pod, Severity::Warning, reason, &waiting.message));
                show.send_replace(Some(waiting));
            }
        }
        if waits.changed().await.is_err() {
            return;
        }
    }
}

fn happening(pod: &Pod, severity: Severity, reason: &str, message: &str) -> Happening {
    Happening {
        object: Object::pod(pod),
        severity,
        reason: reason.to_owned(),
        message: message.to_owned(),
        at: Timestamp::now(),
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
    let requests = translate::claim(&PodSpec {
        overhead: None,
        ..spec.clone()
    })?;
    let mut distinct = BTreeSet::new();
    let images = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .filter_map(|container| container.image.clone())
        .filter(|image| distinct.insert(image.clone()))
        .collect();
    let grace = spec
        .termination_grace_period_seconds
        .and_then(|s| u64::try_from(s).ok());
    Ok(Ask {
        claim,
        requests,
        runtime: None,
        owner,
        namespace: Namespace::parse("metadata.namespace", pod.namespace().unwrap_or_default())?,
        name: PodName::parse("metadata.name", pod.name_any())?,
        images,
        grace: Duration::from_secs(grace.unwrap_or(DEFAULT_GRACE)),
    })
}

/// Kubernetes' own, in seconds.
pub(super) const DEFAULT_GRACE: u64 = 30;

/// As a kubelet rejects a pod that asks for what the node does not have.
pub(super) fn unsupported(why: &Untranslatable) -> Verdict {
    Verdict {
        reason: "PodFeatureUnsupported".into(),
        message: format!("Pod was rejected: {why}"),
    }
}

/// What a host's operator does not allow.
pub(super) fn forbidden(refusal: &Refusal) -> Verdict {
    Verdict {
        reason: "PodForbidden".into(),
        message: format!("Pod was rejected: {refusal}"),
    }
}

/// As a kubelet rejects a pod that cannot fit.
fn out_of(shortage: &Shortage) -> Verdict {
    let Shortage {
        resource,
        requested,
        used,
        capacity,
    } = shortage;
    let of = match used {
        Some(used) => format!("used: {used}, capacity: {capacity}"),
        None => format!("capacity of the largest host: {capacity}"),
    };
    Verdict {
        reason: format!("OutOf{resource}"),
        message: format!(
            "Pod was rejected: Node didn't have enough resource: {resource}, requested: {requested}, {of}"
        ),
    }
}
