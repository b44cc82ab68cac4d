//! Leases in the cell: who lives, and who has which virtual node.
//!
//! Each replica renews **one** Lease, its own, in the namespace of the process. Each
//! virtual node has a Lease in its tenant's namespace, which names the replica that
//! has it and is written only when that changes; its `leaseTransitions` is the epoch.
//! A virtual node's Lease holds for as long as its holder's own does: so renewing
//! costs the same for ten thousand virtual nodes as for one.
//!
//! Clocks of replicas are not compared. Whether a replica lives is judged by when its
//! renewals were *seen* here, on this process's own clock, as client-go does; and before
//! anything is taken from one that seems dead, its Lease is read once more. A replica
//! stops its own work [`STOP`] after it has last begun a renewal that succeeded, which
//! is before any other can see [`LIFE`] pass without one.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client, Error, Resource,
    api::{DeleteParams, PostParams, Preconditions},
};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::resource::{Key, VirtualNode};
use crate::api_server::answered;

/// Whoever has not renewed for so long is dead.
pub(crate) const LIFE: Duration = Duration::from_secs(15);
/// Whoever could not renew for so long has stopped.
pub(crate) const STOP: Duration = Duration::from_secs(10);
const RENEW: Duration = Duration::from_secs(3);
/// Of one renewal: several fit in before the stop.
const RENEWAL: Duration = Duration::from_secs(3);

/// Label of all Leases here: what of.
pub(crate) const KIND: &str = "spindrift.dev/lease";
pub(crate) const OF_REPLICA: &str = "replica";
pub(crate) const OF_NODE: &str = "virtual-node";
/// Annotation of a replica's Lease: where the others hand on connections.
const PEER: &str = "spindrift.dev/peer";

/// A Lease of a virtual node, as last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tenure {
    /// None: it was given back.
    pub(crate) holder: Option<String>,
    pub(crate) epoch: i64,
}

/// A replica, as last seen.
#[derive(Debug, Clone)]
struct Replica {
    renewed: Option<Timestamp>,
    seen: Instant,
    peer: Option<SocketAddr>,
}

/// All Leases, as the watch has told them.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    nodes: BTreeMap<Key, Tenure>,
    replicas: BTreeMap<String, Replica>,
    listing: Option<(Vec<Key>, Vec<String>)>,
}

/// What a Lease is of.
enum Of {
    Node(Key),
    Replica(String),
}

fn of(lease: &Lease) -> Option<Of> {
    // Those are the hosts' to write, labels and all.
    if lease.metadata.namespace.as_deref() == Some(pool_cell::names::LEASES) {
        return None;
    }
    let labels = lease.metadata.labels.as_ref()?;
    match labels.get(KIND)?.as_str() {
        OF_NODE => Some(Of::Node(Key {
            namespace: lease.metadata.namespace.clone()?,
            name: lease.metadata.name.as_deref()?.strip_prefix(PREFIX)?.to_owned(),
        })),
        OF_REPLICA => {
            let holder = lease.spec.as_ref()?.holder_identity.clone()?;
            (lease.metadata.name.as_ref() == Some(&holder)).then_some(Of::Replica(holder))
        }
        _ => None,
    }
}

/// Of the name of a virtual node's Lease, before its own.
const PREFIX: &str = "virtual-node-";

fn name_of(key: &Key) -> String {
    format!("{PREFIX}{}", key.name)
}

impl Seen {
    pub(crate) fn begin_listing(&mut self) {
        self.listing = Some(Default::default());
    }

    pub(crate) fn end_listing(&mut self) {
        if let Some((nodes, replicas)) = self.listing.take() {
            self.nodes.retain(|key, _| nodes.contains(key));
            self.replicas.retain(|name, _| replicas.contains(name));
        }
    }

    pub(crate) fn saw(&mut self, lease: &Lease, now: Instant) {
        match of(lease) {
            Some(Of::Node(key)) => {
                if let Some((nodes, _)) = &mut self.listing {
                    nodes.push(key.clone());
                }
                self.nodes.insert(key, tenure(lease));
            }
            Some(Of::Replica(name)) => {
                if let Some((_, replicas)) = &mut self.listing {
                    replicas.push(name.clone());
                }
                let renewed = renewed(lease);
                let annotations = lease.metadata.annotations.as_ref();
                let peer = annotations.and_then(|a| a.get(PEER)).and_then(|p| p.parse().ok());
                let known = self.replicas.entry(name).or_insert(Replica {
                    renewed,
                    seen: now,
                    peer,
                });
                known.peer = peer;
                if known.renewed != renewed {
                    known.renewed = renewed;
                    known.seen = now;
                }
            }
            None => {}
        }
    }

    pub(crate) fn gone(&mut self, lease: &Lease) {
        match of(lease) {
            Some(Of::Node(key)) => drop(self.nodes.remove(&key)),
            Some(Of::Replica(name)) => drop(self.replicas.remove(&name)),
            None => {}
        }
    }

    pub(crate) fn tenure(&self, key: &Key) -> Option<&Tenure> {
        self.nodes.get(key)
    }

    pub(crate) fn lives(&self, replica: &str, now: Instant) -> bool {
        self.replicas
            .get(replica)
            .is_some_and(|r| now.duration_since(r.seen) < LIFE)
    }

    /// Replicas that live, without `me`.
    pub(crate) fn others(&self, me: &str, now: Instant) -> usize {
        self.replicas
            .keys()
            .filter(|name| *name != me && self.lives(name, now))
            .count()
    }

    pub(crate) fn peer(&self, replica: &str) -> Option<SocketAddr> {
        self.replicas.get(replica)?.peer
    }

    /// What was seen of a replica's last renewal.
    fn last(&self, replica: &str) -> Option<Timestamp> {
        self.replicas.get(replica)?.renewed
    }
}

fn renewed(lease: &Lease) -> Option<Timestamp> {
    lease.spec.as_ref()?.renew_time.as_ref().map(|t| t.0)
}

fn tenure(lease: &Lease) -> Tenure {
    let spec = lease.spec.clone().unwrap_or_default();
    Tenure {
        holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
        epoch: spec.lease_transitions.unwrap_or(0).into(),
    }
}

/// This replica's own Lease.
pub(crate) struct Own {
    api: Api<Lease>,
    name: String,
    peer: SocketAddr,
}

impl Own {
    pub(crate) fn new(client: Client, namespace: &str, replica: &str, peer: SocketAddr) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: replica.to_owned(),
            peer,
        }
    }

    /// Renews until `shutdown`; tells until when this replica may work.
    pub(crate) async fn renew(self, until: watch::Sender<Option<Instant>>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(RENEW);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            let began = Instant::now();
            let renewal = tokio::time::timeout(RENEWAL, self.renewed());
            match shutdown.run_until_cancelled(renewal).await {
                None => break,
                Some(Ok(Ok(()))) => {
                    failing = false;
                    until.send_replace(Some(began + STOP));
                }
                Some(failed) => {
                    if !std::mem::replace(&mut failing, true) {
                        let error = match failed {
                            Ok(Err(error)) => error.to_string(),
                            _ => "no answer".to_owned(),
                        };
                        warn!(error, "cannot renew this replica's lease");
                    }
                    ticks.reset_after(Duration::from_secs(1));
                }
            }
        }
        until.send_replace(None);
    }

    async fn renewed(&self) -> Result<(), Error> {
        let found = self.api.get_opt(&self.name).await?;
        let now = MicroTime(Timestamp::now());
        match found {
            None => {
                let lease = Lease {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        labels: Some([(KIND.into(), OF_REPLICA.into())].into()),
                        annotations: Some([(PEER.into(), self.peer.to_string())].into()),
                        ..ObjectMeta::default()
                    },
                    spec: Some(LeaseSpec {
                        holder_identity: Some(self.name.clone()),
                        lease_duration_seconds: Some(LIFE.as_secs() as i32),
                        acquire_time: Some(now.clone()),
                        renew_time: Some(now),
                        ..LeaseSpec::default()
                    }),
                };
                self.api.create(&PostParams::default(), &lease).await?;
            }
            Some(mut lease) => {
                lease.metadata.managed_fields = None;
                lease.spec.get_or_insert_with(LeaseSpec::default).renew_time = Some(now);
                self.api
                    .replace(&self.name, &PostParams::default(), &lease)
                    .await?;
            }
        }
        Ok(())
    }

    /// Nobody waits for this replica any more.
    pub(crate) async fn remove(client: Client, namespace: &str, replica: &str) {
        let api = Api::<Lease>::namespaced(client, namespace);
        if let Err(error) = answered(api.delete(replica, &DeleteParams::default())).await {
            warn!(%error, "this replica's lease was not removed; it ends by itself");
        }
    }
}

/// Removes the Leases of replicas that are long dead.
pub(crate) async fn sweep(client: Client, namespace: &str, dead: Vec<String>) {
    let api = Api::<Lease>::namespaced(client, namespace);
    for name in dead {
        let Ok(Some(lease)) = answered(api.get_opt(&name)).await else {
            continue;
        };
        let unchanged = DeleteParams::default().preconditions(Preconditions {
            resource_version: lease.metadata.resource_version,
            uid: lease.metadata.uid,
        });
        if answered(api.delete(&name, &unchanged)).await.is_ok() {
            info!(replica = name, "the lease of a dead replica was removed");
        }
    }
}

impl Seen {
    /// Replicas that have been dead for long enough that nobody asks about them.
    pub(crate) fn long_dead(&self, now: Instant) -> Vec<String> {
        let dead = |r: &Replica| now.duration_since(r.seen) > LIFE * 20;
        let dead = self.replicas.iter().filter(|(_, r)| dead(r));
        dead.map(|(name, _)| name.clone()).collect()
    }

    /// What [`take`] has to find unchanged of the holder, if it is dead.
    pub(crate) fn case(&self, key: &Key) -> Case {
        let holder = self.tenure(key).and_then(|tenure| tenure.holder.clone());
        Case {
            renewed: holder.as_deref().and_then(|holder| self.last(holder)),
            holder,
        }
    }
}

/// Why a virtual node is thought to be nobody's.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    holder: Option<String>,
    renewed: Option<Timestamp>,
}

/// Of a virtual node whose Lease begins. Hosts remember the latest epoch of a node that
/// they have heard, and one of the same name may have been there before: in minutes since
/// 1970, which is more than any that was taken less than once a minute has come to.
fn first_epoch(now: Timestamp) -> i64 {
    now.as_second() / 60 + 1
}

/// Takes a virtual node; its new epoch, or None if it is another's after all.
pub(crate) async fn take(
    client: Client,
    namespace: String,
    node: &VirtualNode,
    key: Key,
    me: String,
    case: Case,
) -> Result<Option<i64>, Error> {
    if let Some(holder) = case.holder.as_deref().filter(|holder| *holder != me) {
        // The watch may be late, and it alive.
        let replicas = Api::<Lease>::namespaced(client.clone(), &namespace);
        let lease = answered(replicas.get_opt(holder)).await?;
        if lease.as_ref().and_then(renewed) != case.renewed && lease.is_some() {
            return Ok(None);
        }
    }
    let api = Api::<Lease>::namespaced(client, &key.namespace);
    let name = name_of(&key);
    let now = MicroTime(Timestamp::now());
    let Some(mut lease) = answered(api.get_opt(&name)).await? else {
        let first = first_epoch(now.0);
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name),
                labels: Some([(KIND.into(), OF_NODE.into())].into()),
                owner_references: Some(vec![OwnerReference {
                    api_version: VirtualNode::api_version(&()).into_owned(),
                    kind: VirtualNode::kind(&()).into_owned(),
                    name: key.name.clone(),
                    uid: node.uid().to_owned(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(me),
                lease_duration_seconds: Some(LIFE.as_secs() as i32),
                lease_transitions: i32::try_from(first).ok(),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        };
        return settled(
            answered(api.create(&PostParams::default(), &lease))
                .await
                .map(|_| first),
        );
    };
    let found = tenure(&lease);
    if found.holder != case.holder {
        return Ok(None);
    }
    let epoch = found.epoch + 1;
    lease.metadata.managed_fields = None;
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(me);
    // Beyond, the API server refuses the write; 2^31 changes of one a second are 68 years.
    spec.lease_transitions = i32::try_from(epoch).ok();
    spec.acquire_time = Some(now.clone());
    spec.renew_time = Some(now);
    // Guarded by its version: who was first has it.
    let taken = answered(api.replace(&name, &PostParams::default(), &lease)).await;
    settled(taken.map(|_| epoch))
}

fn settled(taken: Result<i64, Error>) -> Result<Option<i64>, Error> {
    match taken {
        Ok(epoch) => Ok(Some(epoch)),
        // Overtaken.
        Err(Error::Api(refused)) if refused.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives a virtual node back, for another to take at once.
pub(crate) async fn give(client: Client, key: Key, me: String) -> Result<(), Error> {
    let api = Api::<Lease>::namespaced(client, &key.namespace);
    let name = name_of(&key);
    let Some(mut lease) = answered(api.get_opt(&name)).await? else {
        return Ok(());
    };
    if tenure(&lease).holder.as_deref() != Some(me.as_str()) {
        return Ok(());
    }
    lease.metadata.managed_fields = None;
    if let Some(spec) = &mut lease.spec {
        // Empty is what client-go writes, too.
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(Timestamp::now()));
    }
    settled(
        answered(api.replace(&name, &PostParams::default(), &lease))
            .await
            .map(|_| 0),
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn replica(name: &str, second: i64) -> Lease {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "s", "labels": {KIND: OF_REPLICA},
                "annotations": {PEER: "192.0.2.5:7001"}},
            "spec": {"holderIdentity": name,
                "renewTime": MicroTime(Timestamp::from_second(second).unwrap())},
        }))
        .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_lives_by_what_is_seen_of_it_whatever_its_clock_says() {
        let mut seen = Seen::default();
        let began = Instant::now();
        // Its clock is years behind; it is new here.
        seen.saw(&replica("a", 5), began);
        assert!(seen.lives("a", began) && !seen.lives("b", began));
        // Told again without a renewal: nothing new.
        seen.saw(&replica("a", 5), began + LIFE / 2);
        assert!(!seen.lives("a", began + LIFE));
        seen.saw(&replica("a", 6), began + LIFE);
        assert!(seen.lives("a", began + LIFE));
        assert_eq!((seen.others("a", began), seen.others("b", began + LIFE)), (0, 1));
        assert_eq!(seen.peer("a"), "192.0.2.5:7001".parse().ok());
    }

    #[test]
    fn a_replica_stops_before_another_may_take_what_it_has() {
        // It stops STOP after it began its last renewal; the other has seen that no
        // sooner, and waits for LIFE. What is left is for stopping.
        assert!(STOP + Duration::from_secs(3) < LIFE && RENEW + RENEWAL < STOP);
    }

    #[test]
    fn a_node_that_is_made_anew_begins_in_a_later_epoch_than_the_one_before_it_ended_in() {
        let made = Timestamp::from_second(1_800_000_000).unwrap();
        let taken = 1_000;
        let anew = made + jiff::SignedDuration::from_mins(taken + 1);
        assert!(first_epoch(anew) > first_epoch(made) + taken);
        assert!(i32::try_from(first_epoch(anew)).is_ok());
    }

    #[test]
    fn the_epoch_is_the_leases_count_of_transitions() {
        let lease: Lease = serde_json::from_value(json!({
            "metadata": {"name": "virtual-node-burst", "namespace": "tenant-acme", "labels": {KIND: OF_NODE}},
            "spec": {"holderIdentity": "", "leaseTransitions": 7},
        }))
        .unwrap();
        let mut seen = Seen::default();
        seen.saw(&lease, Instant::now());
        let key = Key {
            namespace: "tenant-acme".into(),
            name: "burst".into(),
        };
        let tenure = seen.tenure(&key).unwrap();
        assert_eq!((tenure.holder.as_deref(), tenure.epoch), (None, 7));
    }
}
