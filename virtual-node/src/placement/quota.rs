//! What a tenant may use of the pool, from the ResourceQuotas of its namespace in the
//! cell. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceQuota;
use kube::runtime::watcher::Event;
use pool_agent_api::Resources;
use pool_cell::quantity;
use tracing::warn;

/// What nobody has bounded is offered as this much: a node has to say a number, and a
/// scheduler has to be able to add them up.
const UNBOUNDED: Resources = Resources {
    cpu_millis: 1_000_000,
    memory_bytes: 1 << 42,
    ephemeral_storage_bytes: 1 << 44,
    sandboxes: 10_000,
};

#[derive(Debug, Default)]
pub(super) struct Quotas {
    known: BTreeMap<String, ResourceQuota>,
    /// Of a listing in progress.
    listing: Option<BTreeMap<String, ResourceQuota>>,
}

impl Quotas {
    /// Whether there is something new to say: never in the midst of a listing.
    pub(super) fn take(&mut self, event: Event<ResourceQuota>) -> bool {
        let name = |quota: &ResourceQuota| quota.metadata.name.clone().unwrap_or_default();
        match event {
            Event::Init => {
                self.listing = Some(BTreeMap::new());
                false
            }
            Event::InitApply(quota) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(name(&quota), quota);
                }
                false
            }
            Event::InitDone => {
                self.known = self.listing.take().unwrap_or_default();
                true
            }
            Event::Apply(quota) => {
                self.known.insert(name(&quota), quota);
                true
            }
            Event::Delete(quota) => {
                self.known.remove(&name(&quota));
                true
            }
        }
    }

    /// The least that any quota grants to claims of that class.
    pub(super) fn offered(&self, priority_class: Option<&str>) -> Resources {
        let mut least = UNBOUNDED;
        for quota in self.known.values().filter(|quota| counts(quota, priority_class)) {
            let hard = quota.spec.iter().flat_map(|spec| spec.hard.iter().flatten());
            for (name, amount) in hard {
                let lower = |bound: &mut u64, parsed: Result<u64, quantity::InvalidQuantity>| match parsed {
                    Ok(amount) => *bound = amount.min(*bound),
                    Err(error) => warn!(error = %error, resource = name, "a quota cannot be understood"),
                };
                match name.as_str() {
                    "cpu" | "requests.cpu" => lower(&mut least.cpu_millis, quantity::millis(&amount.0)),
                    "memory" | "requests.memory" => {
                        lower(&mut least.memory_bytes, quantity::whole(&amount.0));
                    }
                    "ephemeral-storage" | "requests.ephemeral-storage" => {
                        lower(&mut least.ephemeral_storage_bytes, quantity::whole(&amount.0));
                    }
                    "pods" | "count/pods" => {
                        let mut pods = u64::from(least.sandboxes);
                        lower(&mut pods, quantity::whole(&amount.0));
                        least.sandboxes = u32::try_from(pods).unwrap_or(least.sandboxes);
                    }
                    _ => {}
                }
            }
        }
        least
    }
}

/// Whether claims of the class are counted. A scope that is not known here counts:
/// rather less is offered than what is refused later.
fn counts(quota: &ResourceQuota, priority_class: Option<&str>) -> bool {
    let selector = quota.spec.as_ref().and_then(|spec| spec.scope_selector.as_ref());
    let expressions = selector.and_then(|s| s.match_expressions.as_ref());
    expressions
        .into_iter()
        .flatten()
        .filter(|expression| expression.scope_name == "PriorityClass")
        .all(|expression| {
            let named = |class: &str| expression.values.iter().flatten().any(|value| value == class);
            match expression.operator.as_str() {
                "In" => priority_class.is_some_and(named),
                "NotIn" => !priority_class.is_some_and(named),
                "Exists" => priority_class.is_some(),
                "DoesNotExist" => priority_class.is_none(),
                _ => true,
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn quota(name: &str, hard: Value, class: Option<(&str, &str)>) -> ResourceQuota {
        let mut spec = json!({ "hard": hard });
        if let Some((operator, class)) = class {
            spec["scopeSelector"] = json!({"matchExpressions": [
                {"scopeName": "PriorityClass", "operator": operator, "values": [class]},
            ]});
        }
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
    }

    #[test]
    fn the_least_that_counts_for_the_class_is_offered() {
        let mut quotas = Quotas::default();
        assert!(!quotas.take(Event::Init));
        let standard = json!({"pods": "10", "requests.cpu": "4", "requests.memory": "8Gi"});
        assert!(!quotas.take(Event::InitApply(quota("a", standard, Some(("In", "standard"))))));
        let storage = json!({"requests.ephemeral-storage": "1Gi", "requests.cpu": "3500m"});
        assert!(!quotas.take(Event::InitApply(quota("b", storage, None))));
        let spot = json!({"pods": "1"});
        assert!(!quotas.take(Event::InitApply(quota("c", spot, Some(("In", "spot"))))));
        assert!(quotas.take(Event::InitDone));
        let offered = quotas.offered(Some("standard"));
        assert_eq!(
            (
                offered.sandboxes,
                offered.cpu_millis,
                offered.memory_bytes,
                offered.ephemeral_storage_bytes
            ),
            (10, 3500, 8 << 30, 1 << 30)
        );
        assert_eq!(quotas.offered(Some("spot")).sandboxes, 1);
        assert_eq!(quotas.offered(None).sandboxes, UNBOUNDED.sandboxes);
    }

    #[test]
    fn a_quota_that_is_gone_bounds_nothing_any_more_also_when_it_went_unseen() {
        let mut quotas = Quotas::default();
        quotas.take(Event::Apply(quota("a", json!({"pods": "1"}), None)));
        quotas.take(Event::Init);
        quotas.take(Event::InitApply(quota("b", json!({"pods": "2"}), None)));
        assert_eq!(quotas.offered(None).sandboxes, 1);
        quotas.take(Event::InitDone);
        assert_eq!(quotas.offered(None).sandboxes, 2);
        quotas.take(Event::Delete(quota("b", json!({}), None)));
        assert_eq!(quotas.offered(None), UNBOUNDED);
    }
}
