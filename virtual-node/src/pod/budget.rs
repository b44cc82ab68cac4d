//! The tenant's PodDisruptionBudgets: before a pod is stopped because its host has to give
//! it up, they are asked.
//!
//! The eviction API is no help: the pod is not deleted and keeps its UID, and a dry run
//! takes nothing from a budget, so that two at once would both pass. So budgets are read
//! as the disruption controller keeps them, and each lets one pod of this node pass at
//! a time: until it is ready again on another host, or over.
//!
//! A budget that cannot be read holds nobody back. One that forbids holds the pod back
//! until its host stops it, when only the pod's own grace is left of the notice.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{core::v1::Pod, policy::v1::PodDisruptionBudget};
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    core::{Selector, SelectorExt},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, info};

use super::status::is_ready;
use crate::api_server::answered;

/// How often a budget that forbids is read again.
const AGAIN: Duration = Duration::from_secs(2);

/// One for a node. Bounded by the budgets of pods that leave at one time.
#[derive(Default)]
pub(crate) struct Budgets {
    gates: Mutex<BTreeMap<String, Arc<Semaphore>>>,
}

/// While it is held no other pod passes the same budgets.
#[derive(Debug, Default)]
pub(crate) struct Permit {
    _gates: Vec<OwnedSemaphorePermit>,
}

impl Budgets {
    /// Once every budget of the pod allows that it is stopped.
    pub(crate) async fn permit(&self, client: &Client, pod: &Pod) -> Permit {
        let mut told = false;
        loop {
            let Some(budgets) = read(client, pod).await else {
                return Permit::default();
            };
            let permit = self.pass(&budgets).await;
            // What was read before the turn came is old.
            match read(client, pod).await {
                None => return permit,
                Some(now) => match now.iter().find(|budget| !allows(budget, pod)) {
                    None if uids(&now) == uids(&budgets) => return permit,
                    Some(budget) if !std::mem::replace(&mut told, true) => {
                        info!(
                            budget = budget.name_any(),
                            "a disruption budget holds the pod back"
                        );
                    }
                    None | Some(_) => {}
                },
            }
            drop(permit);
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn pass(&self, budgets: &[PodDisruptionBudget]) -> Permit {
        let mut gates = vec![];
        // In one order: nobody waits for each other.
        for uid in uids(budgets) {
            let gate = self.gate(uid);
            // Never closed.
            gates.extend(gate.acquire_owned().await.ok());
        }
        Permit { _gates: gates }
    }

    fn gate(&self, uid: String) -> Arc<Semaphore> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        gates
            .entry(uid)
            .or_insert_with(|| Arc::new(Semaphore::new(1)))
            .clone()
    }
}

/// In order.
fn uids(budgets: &[PodDisruptionBudget]) -> Vec<String> {
    let mut uids: Vec<String> = budgets.iter().filter_map(|b| b.metadata.uid.clone()).collect();
    uids.sort();
    uids
}

/// Those that select the pod; None if they cannot be read.
async fn read(client: &Client, pod: &Pod) -> Option<Vec<PodDisruptionBudget>> {
    let api: Api<PodDisruptionBudget> = Api::namespaced(client.clone(), &pod.namespace()?);
    match answered(api.list(&ListParams::default())).await {
        Ok(budgets) => Some(budgets.items.into_iter().filter(|b| selects(b, pod)).collect()),
        Err(error) => {
            debug!(
                error = &error as &dyn std::error::Error,
                "disruption budgets were not read: they hold nobody back"
            );
            None
        }
    }
}

/// No selector selects nothing, an empty one all.
fn selects(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.clone());
    selector
        .and_then(|selector| Selector::try_from(selector).ok())
        .is_some_and(|selector| selector.matches(pod.labels()))
}

/// As the eviction API decides.
fn allows(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let Some(status) = &budget.status else {
        return false;
    };
    if status.observed_generation < budget.metadata.generation {
        return false;
    }
    let allowed = status.disruptions_allowed.unwrap_or(0) > 0;
    if allowed || pod.status.as_ref().is_some_and(is_ready) {
        return allowed;
    }
    let always = budget
        .spec
        .as_ref()
        .is_some_and(|spec| spec.unhealthy_pod_eviction_policy.as_deref() == Some("AlwaysAllow"));
    let desired = status.desired_healthy.unwrap_or(0);
    always || desired > 0 && status.current_healthy.unwrap_or(0) >= desired
}
