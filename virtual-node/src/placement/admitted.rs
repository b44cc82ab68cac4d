//! What the node's pods may claim together, where its settings say so. Pure; the
//! placer's task asks it before a claim goes to the table.
//!
//! The scheduler counts the same, but whoever sets `spec.nodeName` has not counted: as
//! under a kubelet a pod that is too much then is refused, for good.
//!
//! What always holds:
//! - a pod is counted from its admission until its status says that it is over, whether
//!   or not a host has room for it yet, or still holds some;
//! - a pod on record was admitted when it came: it is counted and never refused;
//! - after a restart nothing is admitted before all that is on record is counted; what
//!   came meanwhile is admitted in the order of its creation.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pool_agent_api::{PodUid, Resources};

use super::Shortage;

/// Whether a pod is new to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// It is on record.
    Before,
    New {
        created: Option<Timestamp>,
    },
}

#[derive(Debug, Default)]
pub(super) struct Admitted {
    /// None: the hosts alone bound the node.
    limit: Option<Resources>,
    counted: BTreeMap<PodUid, Resources>,
    /// By creation, then arrival.
    waiting: BTreeMap<(Option<Timestamp>, u64), (PodUid, Resources)>,
    turns: u64,
    /// All that is on record is counted.
    open: bool,
}

impl Admitted {
    pub(super) fn new(limit: Option<Resources>) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// None: it is answered by [`Self::open`].
    pub(super) fn claim(
        &mut self,
        pod: &PodUid,
        claim: Resources,
        arrival: Arrival,
    ) -> Option<Result<(), Shortage>> {
        match arrival {
            Arrival::New { created } if !self.open && !self.counted.contains_key(pod) => {
                if self.limit.is_none() {
                    self.counted.insert(pod.clone(), claim);
                    return Some(Ok(()));
                }
                self.forget_waiting(pod);
                self.turns += 1;
                self.waiting.insert((created, self.turns), (pod.clone(), claim));
                None
            }
            Arrival::New { .. } => Some(self.admit(pod, claim)),
            Arrival::Before => {
                self.count(pod, claim);
                Some(Ok(()))
            }
        }
    }

    /// It runs, or may.
    pub(super) fn count(&mut self, pod: &PodUid, claim: Resources) {
        self.forget_waiting(pod);
        self.counted.insert(pod.clone(), claim);
    }

    /// Its status says that it is over, or is about to.
    pub(super) fn finish(&mut self, pod: &PodUid) {
        self.counted.remove(pod);
    }

    pub(super) fn release(&mut self, pod: &PodUid) {
        self.forget_waiting(pod);
        self.counted.remove(pod);
    }

    /// All that is on record is counted: what came meanwhile has its answer.
    pub(super) fn open(&mut self) -> Vec<(PodUid, Result<(), Shortage>)> {
        self.open = true;
        std::mem::take(&mut self.waiting)
            .into_values()
            .map(|(pod, claim)| {
                let answer = self.admit(&pod, claim);
                (pod, answer)
            })
            .collect()
    }

    fn admit(&mut self, pod: &PodUid, claim: Resources) -> Result<(), Shortage> {
        // An attempt after the first: the pod has been counted.
        if !self.counted.contains_key(pod)
            && let Some(limit) = self.limit
            && let Some(shortage) = self.short_of(limit, claim)
        {
            return Err(shortage);
        }
        self.counted.insert(pod.clone(), claim);
        Ok(())
    }

    /// In a kubelet's order. What is not asked for is not looked at: other pods may
    /// take more of it than there is, since the quota was lowered.
    fn short_of(&self, limit: Resources, claim: Resources) -> Option<Shortage> {
        let used = self
            .counted
            .values()
            .fold(Resources::default(), |sum, claim| sum.saturating_add(*claim));
        let slots = |r: Resources| u64::from(r.sandboxes);
        [
            ("pods", slots(claim), slots(used), slots(limit)),
            ("cpu", claim.cpu_millis, used.cpu_millis, limit.cpu_millis),
            (
                "memory",
                claim.memory_bytes,
                used.memory_bytes,
                limit.memory_bytes,
            ),
            (
                "ephemeral-storage",
                claim.ephemeral_storage_bytes,
                used.ephemeral_storage_bytes,
                limit.ephemeral_storage_bytes,
            ),
        ]
        .into_iter()
        .find(|(_, requested, used, capacity)| *requested > 0 && used.saturating_add(*requested) > *capacity)
        .map(|(resource, requested, used, capacity)| Shortage {
            resource,
            requested,
            used: Some(used),
            capacity,
        })
    }

    fn forget_waiting(&mut self, pod: &PodUid) {
        self.waiting.retain(|_, (waiting, _)| waiting != pod);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pod(i: usize) -> PodUid {
        format!("pod-{i}").parse().unwrap()
    }

    fn cpu(cpu_millis: u64) -> Resources {
        Resources {
            cpu_millis,
            sandboxes: 1,
            ..Resources::default()
        }
    }

    fn limited() -> Admitted {
        Admitted::new(Some(Resources {
            cpu_millis: 1000,
            memory_bytes: 0,
            ephemeral_storage_bytes: 0,
            sandboxes: 3,
        }))
    }

    fn new(second: i64) -> Arrival {
        Arrival::New {
            created: Some(Timestamp::from_second(second).unwrap()),
        }
    }

    fn opened() -> Admitted {
        let mut quota = limited();
        assert_eq!(quota.open(), []);
        quota
    }

    #[test]
    fn a_pod_beyond_the_quota_is_refused_and_one_that_ended_makes_room() {
        let mut quota = opened();
        assert_eq!(quota.claim(&pod(0), cpu(600), new(1)), Some(Ok(())));
        let refused = Shortage {
            resource: "cpu",
            requested: 500,
            used: Some(600),
            capacity: 1000,
        };
        assert_eq!(quota.claim(&pod(1), cpu(500), new(2)), Some(Err(refused)));
        // Its next attempt takes what it has.
        assert_eq!(quota.claim(&pod(0), cpu(600), new(1)), Some(Ok(())));
        quota.release(&pod(0));
        assert_eq!(quota.claim(&pod(1), cpu(500), new(2)), Some(Ok(())));
    }

    #[test]
    fn slots_run_out_before_anything_else_is_looked_at_and_what_is_not_asked_for_is_not() {
        let mut quota = opened();
        for i in 0..3 {
            assert_eq!(quota.claim(&pod(i), cpu(0), new(1)), Some(Ok(())));
        }
        let refused = quota.claim(&pod(3), cpu(2000), new(1)).unwrap().unwrap_err();
        assert_eq!(
            (refused.resource, refused.used, refused.capacity),
            ("pods", Some(3), 3)
        );
        // Admitted before the quota was lowered: more than all of it.
        let mut quota = opened();
        quota.count(&pod(0), cpu(5000));
        assert_eq!(quota.claim(&pod(1), cpu(0), new(1)), Some(Ok(())));
    }

    #[test]
    fn after_a_restart_what_is_on_record_counts_first_and_the_older_of_the_others_next() {
        let mut quota = limited();
        assert_eq!(quota.claim(&pod(2), cpu(300), new(9)), None);
        assert_eq!(quota.claim(&pod(1), cpu(300), new(5)), None);
        // On record, whether it runs or is to be placed anew.
        quota.count(&pod(0), cpu(200));
        assert_eq!(quota.claim(&pod(3), cpu(300), Arrival::Before), Some(Ok(())));
        let answers = quota.open();
        assert_eq!(answers[0], (pod(1), Ok(())));
        assert_eq!(answers[1].0, pod(2));
        assert_eq!(answers[1].1.unwrap_err().resource, "pods");
    }

    #[test]
    fn a_node_without_a_quota_waits_for_nothing() {
        let mut quota = Admitted::new(None);
        assert_eq!(quota.claim(&pod(0), cpu(u64::MAX), new(1)), Some(Ok(())));
    }

    proptest! {
        #[test]
        fn new_pods_never_take_more_than_the_quota(
            claims in proptest::collection::vec((0_usize..6, 0_u64..700, any::<bool>()), 0..40),
        ) {
            let mut quota = opened();
            for (i, millis, release) in claims {
                if release {
                    quota.release(&pod(i));
                } else {
                    quota.claim(&pod(i), cpu(if quota.counted.contains_key(&pod(i)) { 0 } else { millis }), new(1));
                }
                let used: u64 = quota.counted.values().map(|c| c.cpu_millis).sum();
                prop_assert!(used <= 1000 && quota.counted.len() <= 3);
            }
        }
    }
}
