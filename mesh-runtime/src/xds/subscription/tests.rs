use bounds::{Budget, Path, Rule, Shared, Step};
use envoy_types::pb::google::protobuf::Any;
use mesh_api::istio::{security, workload as wire};
use proptest::prelude::*;

use super::*;

/// With room for so many pages.
fn within(shared: &Shared<Account>) -> Subscriptions {
    let path = Path {
        trunk: Arc::from([Step {
            key: Account::Tenant(1),
            level: Level::Tenant,
            rule: Rule::FAIR,
        }]),
        leaf: None,
    };
    Subscriptions::within(Holding::new(shared.clone(), path))
}

fn subscriptions() -> Subscriptions {
    within(&Shared::new(Budget::new(1024, 0)))
}

fn resource(name: &str, version: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
        ..Default::default()
    }
}

fn workload(uid: &str, version: &str) -> Resource {
    let address = Address {
        r#type: Some(Type::Workload(wire::Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            ..Default::default()
        })),
    };
    resource(uid, version, ADDRESS_TYPE, address.encode_to_vec())
}

/// One address of three bytes.
fn bad_workload(uid: &str, version: &str) -> Resource {
    let address = Address {
        r#type: Some(Type::Workload(wire::Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![1, 2, 3]],
            ..Default::default()
        })),
    };
    resource(uid, version, ADDRESS_TYPE, address.encode_to_vec())
}

fn policy(name: &str, version: &str, port: u32) -> Resource {
    let policy = Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        groups: vec![security::Group {
            rules: vec![security::Rules {
                matches: vec![security::Match {
                    destination_ports: vec![port],
                    ..Default::default()
                }],
            }],
        }],
        ..Default::default()
    };
    resource(
        &format!("shop/{name}"),
        version,
        AUTHORIZATION_TYPE,
        policy.encode_to_vec(),
    )
}

fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: "n1".to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

fn held(subscriptions: &Subscriptions, index: usize) -> Vec<(String, String)> {
    let mut held: Vec<_> = subscriptions.open()[index]
        .initial_resource_versions
        .clone()
        .into_iter()
        .collect();
    held.sort();
    held
}

fn pair(name: &str, version: &str) -> (String, String) {
    (name.to_owned(), version.to_owned())
}

#[test]
fn a_new_stream_asks_for_everything_and_says_what_is_held() {
    let mut subscriptions = subscriptions();
    let [addresses, policies] = subscriptions.open();
    assert_eq!(addresses.type_url, ADDRESS_TYPE);
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    assert!(
        addresses.resource_names_subscribe.is_empty(),
        "the wildcard is an empty list"
    );
    assert!(addresses.initial_resource_versions.is_empty());
    let told = response(ADDRESS_TYPE, vec![workload("a", "1"), workload("b", "2")], &[]);
    subscriptions.receive(told).unwrap();
    subscriptions
        .receive(response(ADDRESS_TYPE, vec![workload("b", "3")], &["a"]))
        .unwrap();
    assert_eq!(held(&subscriptions, 0), [pair("b", "3")]);
}

#[test]
fn an_answer_has_the_nonce_and_is_an_ack_if_all_was_taken() {
    let mut subscriptions = subscriptions();
    let received = subscriptions
        .receive(response(ADDRESS_TYPE, vec![workload("a", "1")], &[]))
        .unwrap();
    assert_eq!(received.answer.response_nonce, "n1");
    assert_eq!(received.answer.type_url, ADDRESS_TYPE);
    assert!(received.answer.error_detail.is_none());
    assert_eq!(received.changes.len(), 1);
}

#[test]
fn a_bad_resource_is_refused_by_itself_with_its_reason() {
    let mut subscriptions = subscriptions();
    let told = vec![workload("a", "1"), bad_workload("b", "1"), workload("c", "1")];
    let received = subscriptions.receive(response(ADDRESS_TYPE, told, &[])).unwrap();
    assert_eq!(received.changes.len(), 2);
    assert_eq!(received.rejected.len(), 1);
    let nack = received.answer.error_detail.unwrap();
    assert_eq!(nack.code, 3);
    assert_eq!(
        nack.message,
        "b: addresses[0] has 3 bytes where 4 or 16 are needed"
    );
    assert_eq!(held(&subscriptions, 0), [pair("a", "1"), pair("c", "1")]);
}

#[test]
fn a_bad_new_version_leaves_the_one_before_it_held() {
    let mut subscriptions = subscriptions();
    subscriptions
        .receive(response(ADDRESS_TYPE, vec![workload("a", "1")], &[]))
        .unwrap();
    let received = subscriptions
        .receive(response(ADDRESS_TYPE, vec![bad_workload("a", "2")], &[]))
        .unwrap();
    assert!(received.changes.is_empty());
    assert_eq!(held(&subscriptions, 0), [pair("a", "1")]);
}

#[test]
fn what_a_resource_says_of_itself_has_to_fit_what_is_said_of_it() {
    let refuse = |bad: Resource, wanted: &str| {
        let received = subscriptions()
            .receive(response(ADDRESS_TYPE, vec![bad], &[]))
            .unwrap();
        assert!(received.changes.is_empty());
        assert_eq!(received.rejected[0].reason.to_string(), wanted);
    };
    let renamed = Resource {
        name: "other".to_owned(),
        ..workload("a", "1")
    };
    refuse(renamed, "it is named \"a\" inside");
    let empty = Resource {
        resource: None,
        ..workload("a", "1")
    };
    refuse(empty, "the resource is missing");
    refuse(
        resource("a", "1", AUTHORIZATION_TYPE, vec![]),
        "its type is \"type.googleapis.com/istio.security.Authorization\"",
    );
    refuse(
        resource("a", "1", ADDRESS_TYPE, vec![]),
        "it is neither a workload nor a service",
    );
}

#[test]
fn a_type_nobody_asked_for_ends_the_stream() {
    let error = subscriptions()
        .receive(response("type.example/x", vec![], &[]))
        .unwrap_err();
    assert!(error.to_string().contains("type.example/x"));
}

#[test]
fn both_types_have_to_be_told_before_the_state_is_whole() {
    let mut subscriptions = subscriptions();
    assert!(
        !subscriptions
            .receive(response(ADDRESS_TYPE, vec![], &[]))
            .unwrap()
            .synced
    );
    assert!(
        !subscriptions
            .receive(response(ADDRESS_TYPE, vec![], &[]))
            .unwrap()
            .synced
    );
    assert!(
        subscriptions
            .receive(response(AUTHORIZATION_TYPE, vec![], &[]))
            .unwrap()
            .synced
    );
}

#[test]
fn an_unreadable_policy_stands_closed_until_it_can_be_read_and_never_unseats_a_good_one() {
    let mut subscriptions = subscriptions();
    let first = subscriptions
        .receive(response(AUTHORIZATION_TYPE, vec![policy("p", "1", 70000)], &[]))
        .unwrap();
    assert!(
        matches!(&first.changes[..], [Change::Policy(_)]),
        "{:?}",
        first.changes
    );
    assert_eq!(first.rejected.len(), 1);
    assert!(held(&subscriptions, 1).is_empty());
    let good = subscriptions
        .receive(response(AUTHORIZATION_TYPE, vec![policy("p", "2", 80)], &[]))
        .unwrap();
    assert!(good.rejected.is_empty());
    let bad = subscriptions
        .receive(response(AUTHORIZATION_TYPE, vec![policy("p", "3", 70000)], &[]))
        .unwrap();
    assert!(bad.changes.is_empty(), "the good one stays");
    assert_eq!(held(&subscriptions, 1), [pair("shop/p", "2")]);
}

#[test]
fn a_nack_of_many_reasons_stays_short() {
    let told = (0..1000).map(|i| bad_workload(&format!("w{i}"), "1")).collect();
    let received = subscriptions()
        .receive(response(ADDRESS_TYPE, told, &[]))
        .unwrap();
    let message = received.answer.error_detail.unwrap().message;
    assert!(message.len() < 2000, "{} bytes", message.len());
    assert!(message.ends_with("and 990 more"), "{message}");
}

proptest! {
    #[test]
    fn no_bytes_break_the_client(name: String, value: Vec<u8>, addresses: bool) {
        let url = if addresses { ADDRESS_TYPE } else { AUTHORIZATION_TYPE };
        let told = response(url, vec![resource(&name, "1", url, value)], &[]);
        let received = subscriptions().receive(told).unwrap();
        prop_assert!(received.changes.len() + received.rejected.len() >= 1);
    }
}

#[test]
fn what_is_told_without_end_is_refused_beyond_its_room_and_what_is_held_stays() {
    let shared = Shared::new(Budget::new(8, 0));
    let mut subscriptions = within(&shared);
    let mut taken = 0;
    let mut refused = None;
    // Each response is small, its names are new, and nothing is removed.
    for n in 0..100_000 {
        let told = response(ADDRESS_TYPE, vec![workload(&format!("w{n}"), "1")], &[]);
        let received = subscriptions.receive(told).unwrap();
        taken += received.changes.len();
        if let Some(error) = received.answer.error_detail {
            refused = Some(error.message);
            break;
        }
    }
    let refused = refused.expect("a bound on what is held");
    assert!(
        refused.contains("the tenant's share of room for mesh state is used up"),
        "{refused}"
    );
    assert!((100..=400).contains(&taken), "{taken} of 4 pages");
    assert_eq!(held(&subscriptions, 0).len(), taken);
    // The same in unreadable policies, which something has to stand for.
    let bad: Vec<_> = (0..1000).map(|n| policy(&format!("p{n}"), "1", 70_000)).collect();
    let received = subscriptions
        .receive(response(AUTHORIZATION_TYPE, bad, &[]))
        .unwrap();
    assert!(received.changes.len() < 100, "{}", received.changes.len());
    assert!(!received.synced, "policies are missing");
    assert!(shared.held() <= 4);
    // Room comes back, and is there again.
    let gone: Vec<String> = (0..taken).map(|n| format!("w{n}")).collect();
    let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
    let received = subscriptions
        .receive(response(ADDRESS_TYPE, vec![workload("new", "1")], &gone))
        .unwrap();
    assert!(received.answer.error_detail.is_none());
    drop(subscriptions);
    assert_eq!(shared.held(), 0);
}

#[test]
fn a_resource_that_cannot_be_read_takes_no_room() {
    let shared = Shared::new(Budget::new(8, 0));
    let mut subscriptions = within(&shared);
    for n in 0..10_000 {
        let told = response(ADDRESS_TYPE, vec![bad_workload(&format!("w{n}"), "1")], &[]);
        subscriptions.receive(told).unwrap();
    }
    assert_eq!(shared.held(), 0);
    // Nor does a new version of one that is held, again and again.
    for n in 0..10_000 {
        let told = response(
            ADDRESS_TYPE,
            vec![workload("w", &n.to_string()), bad_workload("w", "x")],
            &[],
        );
        assert_eq!(subscriptions.receive(told).unwrap().rejected.len(), 1);
    }
    assert_eq!(
        (shared.held(), held(&subscriptions, 0)),
        (1, vec![pair("w", "9999")])
    );
}
