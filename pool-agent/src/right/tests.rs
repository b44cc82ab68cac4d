use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn at(seconds: u64) -> BootTime {
    BootTime::since_boot(Duration::from_secs(seconds))
}

fn node(name: &str) -> Node {
    Node {
        tenant: "acme".parse().unwrap(),
        name: name.into(),
    }
}

fn epoch(number: u64) -> Epoch {
    Epoch::parse("", number).unwrap()
}

#[test]
fn a_lease_or_a_grant_alone_is_enough_and_the_later_of_both_is_the_end() {
    let mut rights = Rights::default();
    let (a, b) = (node("a"), node("b"));
    assert_eq!(rights.admit(&a, at(1)), Err(NoRight));
    rights.granted(&a, epoch(1), at(30), at(1)).unwrap();
    assert_eq!(rights.admit(&a, at(30)), Ok(()));
    assert_eq!(rights.admit(&b, at(1)), Err(NoRight), "another node's grant");
    rights.renewed(at(40), at(1));
    assert_eq!(rights.admit(&b, at(1)), Ok(()));
    assert_eq!((rights.until(&a), rights.until(&b)), (at(40), at(40)));
    // The cell is away: those whose virtual node grants go on.
    rights.granted(&a, epoch(1), at(60), at(35)).unwrap();
    assert_eq!(rights.look(at(40)), []);
    assert_eq!(rights.next(), Some(at(40)));
    assert_eq!(rights.look(at(41)), [b]);
    // The virtual node is away, too.
    assert_eq!(rights.look(at(60)), [node("b")]);
    assert_eq!(rights.look(at(61)), [a, node("b")]);
}

#[test]
fn what_was_over_is_fenced_whatever_comes_late() {
    let mut rights = Rights::default();
    let a = node("a");
    rights.renewed(at(40), at(0));
    rights.admit(&a, at(0)).unwrap();
    // Stopped for a while: the first things that are heard are a renewal and a grant.
    rights.renewed(at(140), at(100));
    rights.granted(&a, epoch(1), at(130), at(100)).unwrap();
    assert_eq!(rights.until(&a), at(40), "the deadline does not move");
    assert_eq!(
        rights.admit(&a, at(100)),
        Err(NoRight),
        "before the old are fenced"
    );
    assert_eq!(rights.look(at(100)), std::slice::from_ref(&a));
    rights.fenced(&a, at(101));
    assert_eq!(rights.look(at(101)), []);
    assert_eq!(rights.admit(&a, at(101)), Ok(()));
    assert_eq!(rights.until(&a), at(140));
}

#[test]
fn an_earlier_epoch_grants_nothing_and_is_told_so() {
    let mut rights = Rights::default();
    let a = node("a");
    rights.granted(&a, epoch(2), at(30), at(0)).unwrap();
    let refused = rights.granted(&a, epoch(1), at(90), at(1)).unwrap_err();
    let (epoch_1, newest) = (epoch(1), epoch(2));
    assert_eq!(
        refused,
        GrantRefused::EarlierEpoch {
            epoch: epoch_1,
            newest
        }
    );
    assert_eq!(rights.until(&a), at(30));
    rights.granted(&node("b"), epoch(1), at(30), at(1)).unwrap();
    rights.granted(&a, epoch(3), at(31), at(1)).unwrap();
}

#[test]
fn a_tenant_has_so_many_nodes_and_takes_no_other_tenants_place() {
    let mut rights = Rights::default();
    for i in 0..NODES_PER_TENANT {
        rights
            .granted(&node(&format!("n{i}")), epoch(1), at(30), at(0))
            .unwrap();
    }
    let more = node("more");
    assert_eq!(
        rights.granted(&more, epoch(1), at(30), at(0)),
        Err(GrantRefused::TooManyNodes)
    );
    let theirs = Node {
        tenant: "other".parse().unwrap(),
        name: "n".into(),
    };
    rights.granted(&theirs, epoch(1), at(30), at(0)).unwrap();
    // Those whose grants have ended, and what they had is fenced, make room.
    for over in rights.look(at(31)) {
        rights.fenced(&over, at(31));
    }
    rights.granted(&more, epoch(1), at(90), at(31)).unwrap();
}

#[derive(Debug, Clone)]
enum Act {
    Renew(u64),
    Grant(usize, u64),
    Begin(usize),
    Look,
    Fence(usize),
    Pass(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        (0_u64..50).prop_map(Act::Renew),
        (0_usize..3, 0_u64..50).prop_map(|(n, d)| Act::Grant(n, d)),
        (0_usize..3).prop_map(Act::Begin),
        Just(Act::Look),
        (0_usize..3).prop_map(Act::Fence),
        (0_u64..60).prop_map(Act::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    /// Against a model that keeps for each sandbox whether it has been without lease and
    /// grant at any second of its life.
    #[test]
    fn no_sandbox_runs_on_after_a_moment_with_neither_lease_nor_grant(acts in proptest::collection::vec(act(), 0..60)) {
        let nodes: Vec<Node> = ["a", "b", "c"].map(node).into();
        let mut rights = Rights::default();
        let mut now = 10;
        let (mut lease, mut grants) = (0, [0; 3]);
        // For each sandbox that is here: its node, and whether it has lost its right.
        let mut here: Vec<(usize, bool)> = vec![];
        for act in acts {
            match act {
                Act::Renew(length) => {
                    rights.renewed(at(now + length), at(now));
                    lease = lease.max(now + length);
                }
                Act::Grant(n, length) => {
                    rights.granted(&nodes[n], epoch(1), at(now + length), at(now)).unwrap();
                    grants[n] = grants[n].max(now + length);
                }
                Act::Begin(n) => {
                    let admitted = rights.admit(&nodes[n], at(now)).is_ok();
                    let lost = here.iter().any(|(of, lost)| *of == n && *lost);
                    prop_assert!(!admitted || lease.max(grants[n]) >= now);
                    // Also the other way: nothing is held back without a reason.
                    prop_assert!(admitted || lost || lease.max(grants[n]) < now
                        || rights.look(at(now)).contains(&nodes[n]));
                    if admitted {
                        here.push((n, false));
                    }
                }
                Act::Look => {}
                Act::Fence(n) => {
                    if rights.look(at(now)).contains(&nodes[n]) {
                        here.retain(|(of, _)| *of != n);
                        rights.fenced(&nodes[n], at(now));
                    }
                }
                Act::Pass(seconds) => {
                    for (n, lost) in &mut here {
                        *lost |= lease.max(grants[*n]) < now + seconds;
                    }
                    now += seconds;
                }
            }
            let over = rights.look(at(now));
            for (n, lost) in &here {
                prop_assert_eq!(over.contains(&nodes[*n]), *lost, "node {}", n);
                if *lost {
                    prop_assert!(rights.until(&nodes[*n]) < at(now), "its packets pass");
                } else {
                    prop_assert!(rights.until(&nodes[*n]) >= at(now), "its packets are dropped");
                }
            }
        }
    }
}
