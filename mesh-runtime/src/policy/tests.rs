use proptest::prelude::*;
use wire::string_match::MatchType;

use super::*;

fn exact(text: &str) -> wire::StringMatch {
    wire::StringMatch {
        match_type: Some(MatchType::Exact(text.to_owned())),
    }
}

fn facts() -> Facts {
    Facts {
        source: Some("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()),
        source_address: [10, 0, 0, 1].into(),
        destination: "10.0.0.2:8080".parse().unwrap(),
    }
}

fn plaintext() -> Facts {
    Facts {
        source: None,
        ..facts()
    }
}

/// One match in one clause of one rule.
fn matching(m: wire::Match) -> Vec<wire::Group> {
    vec![wire::Group {
        rules: vec![wire::Rules { matches: vec![m] }],
    }]
}

fn policy(name: &str, action: wire::Action, groups: Vec<wire::Group>) -> wire::Authorization {
    wire::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: wire::Scope::Namespace.into(),
        action: action.into(),
        groups,
        ..Default::default()
    }
}

fn set(policies: &[wire::Authorization]) -> Set {
    let mut set = Set::default();
    for p in policies {
        set.insert(Arc::new(Policy::parse(p).unwrap()));
    }
    set
}

fn allows(policies: &[wire::Authorization], facts: &Facts) -> bool {
    set(policies).decide("shop", &[], facts).verdict.allows()
}

use wire::Action::{Allow, Deny};

fn from_shop() -> wire::Match {
    wire::Match {
        namespaces: vec![exact("shop")],
        ..Default::default()
    }
}

fn from_elsewhere() -> wire::Match {
    wire::Match {
        namespaces: vec![exact("elsewhere")],
        ..Default::default()
    }
}

#[test]
fn a_deny_that_matches_refuses_and_an_allow_has_to_match_if_there_is_any() {
    let allow_shop = policy("a", Allow, matching(from_shop()));
    let allow_elsewhere = policy("b", Allow, matching(from_elsewhere()));
    let deny_shop = policy("c", Deny, matching(from_shop()));
    let deny_elsewhere = policy("d", Deny, matching(from_elsewhere()));
    for (policies, allowed) in [
        (vec![], true),
        (vec![allow_shop.clone()], true),
        (vec![allow_elsewhere.clone()], false),
        (vec![allow_elsewhere.clone(), allow_shop.clone()], true),
        (vec![deny_shop.clone()], false),
        (vec![deny_elsewhere.clone()], true),
        (vec![allow_shop.clone(), deny_shop.clone()], false),
        (vec![allow_shop.clone(), deny_elsewhere.clone()], true),
        (vec![allow_elsewhere, deny_elsewhere], false),
    ] {
        let names: Vec<_> = policies.iter().map(|p| &p.name).collect();
        assert_eq!(allows(&policies, &facts()), allowed, "{names:?}");
    }
}

#[test]
fn the_refusal_names_the_policy_that_refused() {
    let set = set(&[policy("c", Deny, matching(from_shop()))]);
    let verdict = set.decide("shop", &[], &facts()).verdict;
    assert_eq!(verdict, Verdict::Denied { by: "shop/c".into() });
}

#[test]
fn empty_parts_match_as_istio_has_it() {
    let clauses = |rules: Vec<wire::Rules>| vec![wire::Group { rules }];
    for (groups, matches, what) in [
        (vec![], false, "no rules"),
        (clauses(vec![]), true, "a rule without clauses"),
        (clauses(vec![wire::Rules::default()]), true, "an empty clause"),
        (matching(wire::Match::default()), false, "an empty match"),
    ] {
        assert_eq!(
            allows(&[policy("p", Allow, groups.clone())], &facts()),
            matches,
            "ALLOW with {what}"
        );
        assert_eq!(
            allows(&[policy("p", Deny, groups)], &facts()),
            !matches,
            "DENY with {what}"
        );
    }
}

#[test]
fn rules_are_alternatives_and_clauses_hold_together() {
    let clause = |matches| wire::Rules { matches };
    let both = vec![wire::Group {
        rules: vec![clause(vec![from_shop()]), clause(vec![from_elsewhere()])],
    }];
    assert!(!allows(&[policy("p", Allow, both)], &facts()));
    let either_rule = [matching(from_elsewhere()), matching(from_shop())].concat();
    assert!(allows(&[policy("p", Allow, either_rule)], &facts()));
    let either_match = vec![wire::Group {
        rules: vec![clause(vec![from_elsewhere(), from_shop()])],
    }];
    assert!(allows(&[policy("p", Allow, either_match)], &facts()));
}

#[test]
fn each_kind_matches_what_it_says_and_its_negation_the_rest() {
    let pattern = |m: MatchType| vec![wire::StringMatch { match_type: Some(m) }];
    let account = |namespace: &str, account: &str| {
        vec![wire::ServiceAccountMatch {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
        }]
    };
    let net = |ip: [u8; 4], length| {
        vec![wire::Address {
            address: ip.to_vec(),
            length,
        }]
    };
    let principal = |m: MatchType| {
        (
            wire::Match {
                principals: pattern(m.clone()),
                ..Default::default()
            },
            wire::Match {
                not_principals: pattern(m),
                ..Default::default()
            },
        )
    };
    let namespace = |m: MatchType| {
        (
            wire::Match {
                namespaces: pattern(m.clone()),
                ..Default::default()
            },
            wire::Match {
                not_namespaces: pattern(m),
                ..Default::default()
            },
        )
    };
    let accounts = |a: Vec<wire::ServiceAccountMatch>| {
        (
            wire::Match {
                service_accounts: a.clone(),
                ..Default::default()
            },
            wire::Match {
                not_service_accounts: a,
                ..Default::default()
            },
        )
    };
    let source = |a: Vec<wire::Address>| {
        (
            wire::Match {
                source_ips: a.clone(),
                ..Default::default()
            },
            wire::Match {
                not_source_ips: a,
                ..Default::default()
            },
        )
    };
    let destination = |a: Vec<wire::Address>| {
        (
            wire::Match {
                destination_ips: a.clone(),
                ..Default::default()
            },
            wire::Match {
                not_destination_ips: a,
                ..Default::default()
            },
        )
    };
    let port = |p: u32| {
        (
            wire::Match {
                destination_ports: vec![p],
                ..Default::default()
            },
            wire::Match {
                not_destination_ports: vec![p],
                ..Default::default()
            },
        )
    };
    let text = str::to_owned;
    // The pair, whether it matches the peer with an identity, and plaintext.
    let table = [
        (
            principal(MatchType::Exact(text("cluster.local/ns/shop/sa/web"))),
            true,
            false,
        ),
        (
            principal(MatchType::Exact(text("spiffe://cluster.local/ns/shop/sa/web"))),
            false,
            false,
        ),
        (
            principal(MatchType::Prefix(text("cluster.local/ns/shop/"))),
            true,
            false,
        ),
        (principal(MatchType::Suffix(text("/sa/web"))), true, false),
        (principal(MatchType::Suffix(text("/sa/we"))), false, false),
        (principal(MatchType::Presence(())), true, false),
        (namespace(MatchType::Exact(text("shop"))), true, false),
        (namespace(MatchType::Exact(text("sho"))), false, false),
        (namespace(MatchType::Presence(())), true, false),
        (accounts(account("shop", "web")), true, false),
        (accounts(account("other", "web")), false, false),
        (source(net([10, 0, 0, 0], 24)), true, true),
        (source(net([10, 0, 1, 0], 24)), false, false),
        (source(net([0, 0, 0, 0], 0)), true, true),
        (destination(net([10, 0, 0, 2], 32)), true, true),
        (destination(net([10, 0, 0, 3], 32)), false, false),
        (port(8080), true, true),
        (port(80), false, false),
    ];
    for ((is, is_not), known, unknown) in table {
        let matches = |m: &wire::Match, f: &Facts| Match::parse(m).unwrap().matches(f);
        assert_eq!(matches(&is, &facts()), known, "{is:?}");
        assert_eq!(matches(&is_not, &facts()), !known, "{is_not:?}");
        assert_eq!(matches(&is, &plaintext()), unknown, "{is:?} for plaintext");
        assert_eq!(
            matches(&is_not, &plaintext()),
            !unknown,
            "{is_not:?} for plaintext"
        );
    }
}

#[test]
fn scopes_reach_whom_they_name() {
    let scoped = |scope: wire::Scope| wire::Authorization {
        scope: scope.into(),
        ..policy("p", Deny, matching(from_shop()))
    };
    let decide = |scope, namespace: &str, listed: &[Arc<str>]| {
        set(&[scoped(scope)])
            .decide(namespace, listed, &facts())
            .verdict
            .allows()
    };
    let listed = ["shop/p".into()];
    assert!(!decide(wire::Scope::Global, "elsewhere", &[]));
    assert!(!decide(wire::Scope::Namespace, "shop", &[]));
    assert!(decide(wire::Scope::Namespace, "elsewhere", &[]));
    assert!(decide(wire::Scope::WorkloadSelector, "shop", &[]));
    assert!(!decide(wire::Scope::WorkloadSelector, "shop", &listed));
}

#[test]
fn a_dry_run_policy_only_reports() {
    let dry = |p: wire::Authorization| wire::Authorization { dry_run: true, ..p };
    let deny = set(&[dry(policy("deny", Deny, matching(from_shop())))]).decide("shop", &[], &facts());
    assert!(deny.verdict.allows());
    assert_eq!(deny.report.would_deny, ["shop/deny".into()]);
    let allow = set(&[dry(policy("allow", Allow, matching(from_elsewhere())))]).decide("shop", &[], &facts());
    assert!(allow.verdict.allows());
    assert_eq!(allow.report.would_deny, ["shop/allow".into()]);
    let met = set(&[dry(policy("allow", Allow, matching(from_shop())))]).decide("shop", &[], &facts());
    assert!(met.report.would_deny.is_empty());
}

#[test]
fn a_listed_policy_that_nobody_told_of_is_reported_and_skipped() {
    let decision = set(&[]).decide("shop", &["shop/late".into()], &facts());
    assert!(decision.verdict.allows());
    assert_eq!(decision.report.missing, ["shop/late".into()]);
}

#[test]
fn a_policy_with_a_part_that_cannot_be_read_is_refused_whole() {
    let bad = |m: wire::Match| Policy::parse(&policy("p", Allow, matching(m))).unwrap_err();
    let net = |address: Vec<u8>, length| wire::Address { address, length };
    assert_eq!(
        bad(wire::Match {
            source_ips: vec![net(vec![10, 0, 0, 1], 33)],
            ..Default::default()
        }),
        InvalidPolicy::Address {
            field: "source_ips",
            index: 0
        }
    );
    assert_eq!(
        bad(wire::Match {
            not_source_ips: vec![net(vec![0; 4], 0), net(vec![1, 2, 3], 8)],
            ..Default::default()
        }),
        InvalidPolicy::Address {
            field: "not_source_ips",
            index: 1
        }
    );
    assert_eq!(
        bad(wire::Match {
            principals: vec![wire::StringMatch { match_type: None }],
            ..Default::default()
        }),
        InvalidPolicy::NoPattern {
            field: "principals",
            index: 0
        }
    );
    assert_eq!(
        bad(wire::Match {
            destination_ports: vec![65536],
            ..Default::default()
        }),
        InvalidPolicy::Port {
            field: "destination_ports",
            index: 0,
            port: 65536
        }
    );
}

#[test]
fn what_cannot_be_read_refuses_whatever_it_could_have_refused() {
    for action in [Allow, Deny] {
        let mut set = Set::default();
        let unreadable = Policy::unreadable(&policy("p", action, vec![])).unwrap();
        set.insert(Arc::new(unreadable));
        assert!(!set.decide("shop", &[], &facts()).verdict.allows(), "{action:?}");
        assert!(
            set.decide("elsewhere", &[], &facts()).verdict.allows(),
            "{action:?} elsewhere"
        );
    }
}

#[test]
fn a_policy_that_changes_scope_leaves_its_old_one() {
    let mut set = set(&[policy("p", Deny, matching(from_shop()))]);
    let moved = wire::Authorization {
        scope: wire::Scope::WorkloadSelector.into(),
        ..policy("p", Deny, matching(from_shop()))
    };
    set.insert(Arc::new(Policy::parse(&moved).unwrap()));
    assert!(set.decide("shop", &[], &facts()).verdict.allows());
    assert!(set.remove("shop/p"));
    assert!(!set.remove("shop/p"));
}

fn any_match() -> impl Strategy<Value = wire::Match> {
    let names = prop::collection::vec(prop_oneof![Just("shop"), Just("x")], 0..2);
    (
        names.clone(),
        names,
        prop::collection::vec(0..3u32, 0..2),
        prop::collection::vec(0..3u32, 0..2),
    )
        .prop_map(|(namespaces, not_namespaces, ports, not_ports)| wire::Match {
            namespaces: namespaces.into_iter().map(exact).collect(),
            not_namespaces: not_namespaces.into_iter().map(exact).collect(),
            destination_ports: ports,
            not_destination_ports: not_ports,
            ..Default::default()
        })
}

fn any_groups() -> impl Strategy<Value = Vec<wire::Group>> {
    let clause = prop::collection::vec(any_match(), 0..3).prop_map(|matches| wire::Rules { matches });
    let group = prop::collection::vec(clause, 0..3).prop_map(|rules| wire::Group { rules });
    prop::collection::vec(group, 0..3)
}

proptest! {
    /// The same rules deny exactly where they would allow.
    #[test]
    fn deny_is_the_mirror_of_allow(groups in any_groups(), port in 0..3u16, known: bool) {
        let facts = Facts {
            destination: ([10, 0, 0, 2], port).into(),
            ..if known { facts() } else { plaintext() }
        };
        let allowed = allows(&[policy("p", Allow, groups.clone())], &facts);
        let denied = !allows(&[policy("p", Deny, groups)], &facts);
        prop_assert_eq!(allowed, denied);
    }

    /// Another DENY never opens, and another ALLOW beside one never closes.
    #[test]
    fn adding_a_policy_moves_the_verdict_one_way(
        base in prop::collection::vec((any::<bool>(), any_groups()), 0..4),
        added in any_groups(),
        port in 0..3u16,
    ) {
        let facts = Facts { destination: ([10, 0, 0, 2], port).into(), ..facts() };
        let policies: Vec<_> = base
            .into_iter()
            .enumerate()
            .map(|(i, (allow, groups))| policy(&format!("p{i}"), if allow { Allow } else { Deny }, groups))
            .collect();
        let before = allows(&policies, &facts);
        let with = |action| [policies.clone(), vec![policy("added", action, added.clone())]].concat();
        prop_assert!(before || !allows(&with(Deny), &facts));
        if policies.iter().any(|p| p.action == i32::from(Allow)) {
            prop_assert!(!before || allows(&with(Allow), &facts));
        }
    }
}
