use pool_agent_api::spec::SandboxParts;
use proptest::prelude::*;

use super::*;
use crate::{
    policy::room::Room,
    sandbox::lifecycle::tests_support::{container, spec},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub(crate) fn room() -> HostRoom {
    let host = Resources {
        cpu_millis: 4000,
        memory_bytes: 16 * GIB,
        ephemeral_storage_bytes: 100 * GIB,
        sandboxes: 110,
    };
    Room::default().of(host, 32_768).unwrap()
}

fn claim(cpu_millis: u64, memory_bytes: u64, ephemeral_storage_bytes: u64) -> Resources {
    Resources {
        cpu_millis,
        memory_bytes,
        ephemeral_storage_bytes,
        sandboxes: 1,
    }
}

fn with(resources: &[ContainerResources]) -> SandboxSpec {
    spec("a", |parts: &mut SandboxParts| {
        parts.containers = resources
            .iter()
            .enumerate()
            .map(|(i, r)| Container {
                resources: *r,
                ..container(&format!("c{i}"))
            })
            .collect();
    })
}

#[test]
fn a_pod_gets_its_limits_and_without_them_what_its_claim_allows() {
    let memory = |request, limit| ContainerResources {
        memory_request_bytes: request,
        memory_limit_bytes: limit,
        ..Default::default()
    };
    let allowed = |claimed: u64, containers: &[ContainerResources]| {
        let allowance = Allowance::of(claim(0, claimed, 0), &with(containers), &room());
        allowance.map(|a| a.memory_bytes / MIB).map_err(|e| e.to_string())
    };
    let unlimited = memory(None, None);
    assert_eq!(allowed(0, &[unlimited]), Ok(512), "best effort: the least bound");
    assert_eq!(allowed(GIB, &[memory(Some(GIB), None)]), Ok(4096), "the ratio");
    assert_eq!(allowed(GIB, &[memory(Some(GIB), Some(2 * GIB))]), Ok(2048));
    assert_eq!(
        allowed(64 * MIB, &[memory(Some(64 * MIB), Some(64 * MIB)), unlimited]),
        Ok(512),
        "one without a limit"
    );
    // Claimed beyond the requests: the runtime's overhead.
    assert_eq!(
        allowed(100 * MIB, &[memory(Some(64 * MIB), Some(64 * MIB))]),
        Ok(100)
    );
    let all_there_is = room().memory_bytes / MIB;
    assert_eq!(
        allowed(10 * GIB, &[memory(Some(10 * GIB), None)]),
        Ok(all_there_is),
        "never more than all pods together"
    );
}

#[test]
fn limits_that_the_claim_does_not_allow_are_refused_by_name() {
    let tib = 1 << 40;
    let hostile = |change: fn(&mut ContainerResources, u64)| {
        let mut resources = ContainerResources::default();
        change(&mut resources, tib);
        let resources = ContainerResources {
            memory_request_bytes: Some(0),
            ephemeral_storage_request_bytes: Some(0),
            ..resources
        };
        let spec = with(&[ContainerResources::default(), resources]);
        let refused = Allowance::of(claim(1, MIB, 0), &spec, &room()).unwrap_err();
        refused.to_string()
    };
    let memory = hostile(|r, n| r.memory_limit_bytes = Some(n));
    assert!(
        memory.starts_with("containers[1].resources.memory_limit_bytes: 1099511627776 is more than"),
        "{memory}"
    );
    let storage = hostile(|r, n| r.ephemeral_storage_limit_bytes = Some(n));
    assert!(
        storage.starts_with("containers[1].resources.ephemeral_storage_limit_bytes"),
        "{storage}"
    );
    // Each fits; together they do not.
    let each = ContainerResources {
        memory_request_bytes: Some(0),
        memory_limit_bytes: Some(400 * MIB),
        ..Default::default()
    };
    let together = Allowance::of(claim(1, MIB, 0), &with(&[each, each]), &room()).unwrap_err();
    assert!(together.to_string().contains("the sum of"), "{together}");
}

#[test]
fn a_class_that_was_not_claimed_is_not_granted() {
    let guaranteed = ContainerResources {
        cpu_limit_millis: Some(64_000),
        memory_limit_bytes: Some(128 * MIB),
        ..Default::default()
    };
    let refused = Allowance::of(claim(1, 128 * MIB, 0), &with(&[guaranteed]), &room()).unwrap_err();
    assert!(
        refused.to_string().starts_with("claim.cpu_millis: 1 is less"),
        "{refused}"
    );
    let honest = Allowance::of(claim(64_000, 128 * MIB, 0), &with(&[guaranteed]), &room()).unwrap();
    assert_eq!(honest.qos, Qos::Guaranteed);
    assert_eq!(honest.cpu_limit_millis, Some(64_000));
}

#[test]
fn init_containers_run_beside_the_sidecars_before_them() {
    let limited = |name: &str, mib: u64, sidecar: bool| Container {
        restartable_init: sidecar,
        resources: ContainerResources {
            memory_request_bytes: Some(0),
            memory_limit_bytes: Some(mib * MIB),
            ..Default::default()
        },
        ..container(name)
    };
    let spec = spec("a", |parts| {
        parts.init_containers = vec![limited("side", 100, true), limited("init", 300, false)];
        parts.containers = vec![limited("app", 50, false)];
    });
    let allowance = Allowance::of(claim(0, 0, 0), &spec, &room()).unwrap();
    assert_eq!(allowance.memory_bytes, 400 * MIB);
}

proptest! {
    #[test]
    fn nothing_a_caller_says_gets_a_pod_more_than_policy(
        cpu in any::<u64>(), memory in any::<u64>(), storage in any::<u64>(),
        limits in proptest::collection::vec(proptest::option::of(any::<u64>()), 6),
    ) {
        let claim = claim(cpu, memory, storage);
        let resources = |i: usize| ContainerResources {
            cpu_limit_millis: limits[i],
            memory_limit_bytes: limits[i + 1],
            ephemeral_storage_limit_bytes: limits[i + 2],
            cpu_request_millis: Some(0),
            memory_request_bytes: Some(0),
            ephemeral_storage_request_bytes: Some(0),
        };
        let room = room();
        if let Ok(allowance) = Allowance::of(claim, &with(&[resources(0), resources(3)]), &room) {
            let bound = memory.saturating_mul(4).max(512 * MIB).min(room.memory_bytes);
            prop_assert!(allowance.memory_bytes <= bound);
            let bound = storage.saturating_mul(4).max(10 * GIB);
            prop_assert!(allowance.ephemeral_storage_bytes <= bound);
            prop_assert!(allowance.ephemeral_storage_bytes <= room.allocatable.ephemeral_storage_bytes);
            prop_assert_eq!(allowance.pids, room.pod_pids);
            prop_assert_eq!(allowance.claim, claim);
        }
    }
}
