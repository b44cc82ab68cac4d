//! What a pod takes of a host, by the scheduler's own sum: app containers and
//! sidecars together, or the hungriest moment of initialisation, whichever is
//! more, plus the runtime's overhead.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, PodSpec},
    apimachinery::pkg::api::resource::Quantity,
};
use pool_agent_api::{Invalid, Resources};

use crate::quantity;

/// The pod's claim on a host.
pub(crate) fn claim(spec: &PodSpec) -> Result<Resources, Invalid> {
    let mut sidecars = Resources::default();
    let mut most = Resources::default();
    for (i, container) in spec.init_containers.iter().flatten().enumerate() {
        let own = requests(container, &format!("spec.initContainers[{i}]"))?;
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars = sidecars.saturating_add(own);
            most = larger(most, sidecars);
        } else {
            most = larger(most, sidecars.saturating_add(own));
        }
    }
    let mut together = sidecars;
    for (i, container) in spec.containers.iter().enumerate() {
        together = together.saturating_add(requests(container, &format!("spec.containers[{i}]"))?);
    }
    let overhead = match &spec.overhead {
        Some(overhead) => amounts(overhead, "spec.overhead")?,
        None => Resources::default(),
    };
    let claim = larger(most, together).saturating_add(overhead);
    Ok(Resources {
        sandboxes: 1,
        ..claim
    })
}

fn larger(a: Resources, b: Resources) -> Resources {
    Resources {
        cpu_millis: a.cpu_millis.max(b.cpu_millis),
        memory_bytes: a.memory_bytes.max(b.memory_bytes),
        ephemeral_storage_bytes: a.ephemeral_storage_bytes.max(b.ephemeral_storage_bytes),
        sandboxes: a.sandboxes.max(b.sandboxes),
    }
}

fn requests(container: &Container, at: &str) -> Result<Resources, Invalid> {
    let Some(resources) = &container.resources else {
        return Ok(Resources::default());
    };
    // The API server defaults a request to its limit; a bare limit counts the same.
    let mut merged = resources.limits.clone().unwrap_or_default();
    merged.extend(resources.requests.clone().unwrap_or_default());
    amounts(&merged, &format!("{at}.resources.requests"))
}

/// A resource that no host has is refused: it would not be there.
fn amounts(map: &BTreeMap<String, Quantity>, at: &str) -> Result<Resources, Invalid> {
    let mut out = Resources::default();
    for (name, amount) in map {
        let wrong = |e: quantity::InvalidQuantity| Invalid::new(format!("{at}.{name}"), e);
        match name.as_str() {
            "cpu" => out.cpu_millis = quantity::millis(&amount.0).map_err(wrong)?,
            "memory" => out.memory_bytes = quantity::whole(&amount.0).map_err(wrong)?,
            "ephemeral-storage" => out.ephemeral_storage_bytes = quantity::whole(&amount.0).map_err(wrong)?,
            _ if quantity::whole(&amount.0).map_err(wrong)? == 0 => {}
            _ => {
                return Err(Invalid::new(
                    format!("{at}.{name}"),
                    "is not a resource of this node",
                ));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claimed(spec: serde_json::Value) -> Result<(u64, u64), String> {
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        claim(&spec)
            .map(|c| (c.cpu_millis, c.memory_bytes))
            .map_err(|e| e.to_string())
    }

    fn container(cpu: &str, always: bool) -> serde_json::Value {
        let mut c = json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        if always {
            c["restartPolicy"] = json!("Always");
        }
        c
    }

    #[test]
    fn the_claim_is_the_schedulers_sum() {
        for (init, app, expected) in [
            (vec![], vec!["100m", "200m"], 300),
            // An init container runs alone: only the hungriest counts.
            (vec![("500m", false), ("400m", false)], vec!["100m"], 500),
            (vec![("50m", false)], vec!["100m"], 100),
            // A sidecar runs beside everything that follows it.
            (vec![("100m", true), ("500m", false)], vec!["200m"], 600),
            (vec![("500m", false), ("100m", true)], vec!["450m"], 550),
        ] {
            let spec = json!({
                "initContainers": init.iter().map(|(c, a)| container(c, *a)).collect::<Vec<_>>(),
                "containers": app.iter().map(|c| container(c, false)).collect::<Vec<_>>(),
            });
            assert_eq!(claimed(spec.clone()).unwrap().0, expected, "{spec}");
        }
    }

    #[test]
    fn overhead_is_added_and_a_limit_counts_as_its_request() {
        let spec = json!({
            "overhead": {"memory": "64Mi"},
            "containers": [{"name": "c", "resources": {"limits": {"memory": "128Mi"}}}],
        });
        assert_eq!(claimed(spec).unwrap(), (0, 192 << 20));
    }

    #[test]
    fn a_resource_that_no_host_has_is_refused_by_name() {
        let spec = json!({"containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]});
        assert_eq!(
            claimed(spec).unwrap_err(),
            "spec.containers[0].resources.requests.nvidia.com/gpu: is not a resource of this node"
        );
    }
}
