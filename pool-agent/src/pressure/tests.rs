use pool_agent_api::Attempt;
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn candidate(name: &str, tenant: &str, priority: i32, claimed: u64, used: u64) -> Candidate {
    Candidate {
        key: SandboxKey {
            pod: name.parse().unwrap(),
            attempt: Attempt::FIRST,
        },
        tenant: tenant.parse().unwrap(),
        priority,
        claim: Resources {
            memory_bytes: claimed * MIB,
            ephemeral_storage_bytes: claimed * MIB,
            ..Resources::default()
        },
        memory_bytes: used * MIB,
        tasks: used,
        disk: Usage {
            bytes: used * MIB,
            inodes: used,
        },
        containers: BTreeMap::new(),
    }
}

fn goes(resource: Resource, candidates: &[Candidate]) -> &str {
    first_to_go(resource, candidates).unwrap().key.pod.as_str()
}

#[test]
fn of_one_tenant_the_kubelets_order_holds() {
    for resource in [Resource::Memory, Resource::Disk] {
        let pods = [
            candidate("within", "a", -5, 500, 400),
            candidate("over-low", "a", 0, 10, 50),
            candidate("over-high", "a", 9, 10, 900),
        ];
        assert_eq!(goes(resource, &pods), "over-low", "priority before amount");
        assert_eq!(goes(resource, &pods[..1]), "within", "if there is nobody else");
        let equal = [
            candidate("less", "a", 0, 10, 50),
            candidate("more", "a", 0, 100, 200),
        ];
        assert_eq!(goes(resource, &equal), "more");
    }
    let pods = [candidate("many", "a", 5, 0, 900), candidate("few", "a", 0, 0, 3)];
    assert_eq!(
        goes(Resource::Tasks, &pods),
        "few",
        "priority alone, as a kubelet"
    );
    assert_eq!(first_to_go(Resource::Memory, &[]), None);
}

#[test]
fn a_tenants_priority_does_not_save_its_pods_from_anothers_claim() {
    let pods = [
        candidate("honest", "a", 0, 500, 520),
        candidate("hog", "b", i32::MAX, 1, 400),
        candidate("hog-2", "b", i32::MAX - 1, 1, 50),
    ];
    assert_eq!(
        goes(Resource::Memory, &pods),
        "hog-2",
        "b is far beyond; its own order"
    );
    // A hog in many small pods is no less a hog.
    let mut pods: Vec<Candidate> = (0..10)
        .map(|i| candidate(&format!("small-{i}"), "b", 0, 0, 100))
        .collect();
    pods.push(candidate("honest", "a", 0, 500, 700));
    assert!(goes(Resource::Memory, &pods).starts_with("small"));
    // Of tasks everybody has some: the pod with the most names the tenant.
    pods[10].tasks = 20;
    pods.push(candidate("bomb", "c", 0, 0, 1800));
    assert_eq!(goes(Resource::Tasks, &pods), "bomb");
}

#[test]
fn what_is_below_its_threshold_is_short_and_memory_comes_first() {
    let eviction = Eviction::default();
    let level = |resource, available, all| Level {
        resource,
        available,
        all,
    };
    let short = shortages(
        &[
            level(Resource::Tasks, 10, 1000),
            level(Resource::Disk, 10, 100),
            level(Resource::Inodes, 4, 100),
            level(Resource::Memory, 100 * MIB, 1 << 34),
            level(Resource::Memory, 99 * MIB, 1 << 33),
        ],
        &eviction,
    );
    let names: Vec<&str> = short.iter().map(|s| s.resource.name()).collect();
    assert_eq!(names, ["memory", "inodes", "pids"]);
    assert_eq!((short[0].threshold, short[0].available), (100 * MIB, 99 * MIB));
}

#[test]
fn a_pressure_is_told_for_a_while_after_it_was_last_seen() {
    let at = |second| Timestamp::from_second(second).unwrap();
    let told_for = Duration::from_secs(300);
    let short = [Shortage {
        resource: Resource::Inodes,
        available: 0,
        threshold: 1,
    }];
    let (seen, pressure) = Seen::default().step(&short, at(1000), told_for);
    assert!(pressure.disk && !pressure.memory && !pressure.pids);
    let (seen, pressure) = seen.step(&[], at(1299), told_for);
    assert!(pressure.disk);
    let (_, pressure) = seen.step(&[], at(1300), told_for);
    assert!(!pressure.any());
    let (_, pressure) = Seen::default().step(&short, at(5), Duration::ZERO);
    assert!(pressure.disk, "while it lasts");
}

#[test]
fn under_pressure_a_host_takes_what_a_kubelet_would() {
    let claim = |memory_bytes| Resources {
        memory_bytes,
        ..Resources::default()
    };
    let memory = Pressure {
        memory: true,
        ..Pressure::default()
    };
    let disk = Pressure {
        disk: true,
        ..Pressure::default()
    };
    assert_eq!(refuses(Pressure::default(), claim(0), Qos::BestEffort), None);
    assert_eq!(refuses(memory, claim(1), Qos::Burstable), None);
    assert_eq!(
        refuses(memory, claim(0), Qos::BestEffort).as_deref(),
        Some("The node had condition: [MemoryPressure]. ")
    );
    assert_eq!(
        refuses(disk, claim(1), Qos::Guaranteed).as_deref(),
        Some("The node had condition: [DiskPressure]. ")
    );
}

#[test]
fn the_pod_is_told_in_a_kubelets_words() {
    let mut pod = candidate("a", "a", 0, 1, 300);
    let taken = ContainerUse {
        memory_bytes: 300 * MIB,
        memory_request_bytes: 64 * MIB,
        ..Default::default()
    };
    pod.containers = BTreeMap::from([
        ("app".parse().unwrap(), taken),
        ("idle".parse().unwrap(), ContainerUse::default()),
    ]);
    let shortage = Shortage {
        resource: Resource::Memory,
        available: 40 * MIB,
        threshold: 100 * MIB,
    };
    assert_eq!(
        message(shortage, &pod),
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 40Mi. \
         Container app was using 300Mi, request is 64Mi, has larger consumption of memory. "
    );
}

proptest! {
    #[test]
    fn a_pod_within_its_claim_outlives_any_that_is_beyond(
        pods in proptest::collection::vec((0_u8..3, any::<i32>(), 0_u64..1000, 0_u64..1000), 1..12),
    ) {
        let pods: Vec<Candidate> = pods
            .into_iter()
            .enumerate()
            .map(|(i, (tenant, priority, claimed, used))| {
                candidate(&format!("pod-{i}"), &format!("t{tenant}"), priority, claimed, used)
            })
            .collect();
        for resource in [Resource::Memory, Resource::Disk] {
            let goes = first_to_go(resource, &pods).unwrap();
            let anybody_beyond = pods.iter().any(|p| p.excess(resource) > 0);
            prop_assert_eq!(goes.excess(resource) > 0, anybody_beyond);
        }
    }
}

#[test]
fn images_go_before_each_pod_that_goes_for_the_disk_whatever_else_is_short() {
    let short = |resource| Shortage {
        resource,
        available: 1,
        threshold: 2,
    };
    let (disk, tasks, memory) = (
        short(Resource::Disk),
        short(Resource::Tasks),
        short(Resource::Memory),
    );
    let start = Instant::now();
    let mut reclaim = Reclaim::default();
    let mut at = |seconds: u64, short: &[Shortage]| {
        let next;
        (reclaim, next) = reclaim.step(short, start + Duration::from_secs(seconds));
        next
    };
    for begin in [0, 100] {
        assert_eq!(at(begin, &[disk, tasks]), Next::Reclaim);
        assert_eq!(at(begin + 19, &[disk, tasks]), Next::Nothing);
        assert_eq!(at(begin + 20, &[disk, tasks]), Next::Evict(disk));
        // Still short: what the pod left goes first.
        assert_eq!(at(begin + 22, &[disk, tasks]), Next::Reclaim);
        // Tasks stay short all the time, and the disk is short again later.
        assert_eq!(at(begin + 60, &[tasks]), Next::Evict(tasks));
    }
    assert_eq!(at(200, &[memory, disk]), Next::Evict(memory));
    assert_eq!(at(202, &[disk]), Next::Reclaim);
    assert_eq!(at(204, &[]), Next::Nothing);
}
