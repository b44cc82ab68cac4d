//! `Stats`: what the tenant's containers use, as the runtime counts it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pool_agent_api::{
    SandboxKey, TenantId,
    status::{ContainerState, wire_timestamp},
    wire,
};
use tonic::Status;

use crate::{
    cri::{self, LABEL_CONTAINER},
    host::Host,
};

pub(super) async fn collect(host: &Host, caller: &TenantId) -> Result<wire::StatsResponse, Status> {
    let all = host
        .shop()
        .runtime
        .container_stats()
        .await
        .map_err(|e| Status::unavailable(e.to_string()))?;
    let mut sandboxes: BTreeMap<SandboxKey, wire::SandboxStats> = BTreeMap::new();
    for stats in all {
        let Some(attributes) = stats.attributes else {
            continue;
        };
        let Some(key) = cri::key_of(&attributes.labels) else {
            continue;
        };
        let Some(name) = attributes.labels.get(LABEL_CONTAINER) else {
            continue;
        };
        // Another tenant's sandboxes are on another page.
        let Some(status) = host.board().status(caller, &key) else {
            continue;
        };
        let of_container = status
            .init_containers
            .iter()
            .chain(&status.containers)
            .find(|c| c.name.as_str() == name);
        let Some(ContainerState::Running { started_at }) = of_container.map(|c| &c.state) else {
            continue;
        };
        let at = stats
            .cpu
            .as_ref()
            .and_then(|cpu| Timestamp::from_nanosecond(cpu.timestamp.into()).ok())
            .unwrap_or_else(|| host.shop().clock.now());
        let entry = sandboxes
            .entry(key.clone())
            .or_insert_with(|| wire::SandboxStats {
                key: Some((&key).into()),
                namespace: status.namespace.to_string(),
                name: status.name.to_string(),
                at: Some(wire_timestamp(at)),
                started_at: Some(wire_timestamp(status.accepted_at)),
                containers: vec![],
            });
        let value = |v: Option<cri::wire::UInt64Value>| v.map_or(0, |v| v.value);
        entry.containers.push(wire::ContainerStats {
            name: name.clone(),
            started_at: Some(wire_timestamp(*started_at)),
            at: Some(wire_timestamp(at)),
            cpu_usage_core_nanos: value(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds)),
            memory_working_set_bytes: value(stats.memory.and_then(|m| m.working_set_bytes)),
            memory_rss_bytes: value(stats.memory.and_then(|m| m.rss_bytes)),
            memory_usage_bytes: value(stats.memory.and_then(|m| m.usage_bytes)),
        });
    }
    Ok(wire::StatsResponse {
        sandboxes: sandboxes.into_values().collect(),
    })
}
