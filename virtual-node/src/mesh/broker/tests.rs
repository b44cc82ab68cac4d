use pool_agent_api::{Attempt, Namespace, PodName, PodUid, ServiceAccountName};

use super::*;
use crate::placement::Placement;

const DOMAIN: &str = "cluster.local";

fn host(name: &str) -> HostName {
    HostName::parse("host", name).unwrap()
}

fn placement(on: &str, namespace: &str, account: &str, enrolled: bool) -> Placement {
    Placement {
        host: host(on),
        attempt: Attempt::FIRST,
        namespace: Namespace::parse("namespace", namespace).unwrap(),
        name: PodName::parse("name", "pod").unwrap(),
        service_account: ServiceAccountName::parse("account", account).unwrap(),
        enrolled,
    }
}

/// `web` is placed on host-a, `db` on host-b and being handed over to host-c, `plain` on
/// host-a outside the mesh.
fn placements() -> Placements {
    let pods = [
        ("u-1", placement("host-a", "shop", "web", true)),
        ("u-2", placement("host-b", "shop", "db", true)),
        ("u-3", placement("host-a", "shop", "plain", false)),
    ];
    Placements {
        pods: pods
            .into_iter()
            .map(|(uid, placement)| (PodUid::parse("uid", uid).unwrap(), placement))
            .collect(),
        beside: [(
            PodUid::parse("uid", "u-2").unwrap(),
            placement("host-c", "shop", "db", true),
        )]
        .into(),
        complete: true,
    }
}

fn decided(on: &str, identity: &str, named: Option<&str>) -> Result<(), Refusal> {
    decide(
        &host(on),
        &identity.parse().unwrap(),
        named,
        DOMAIN,
        &placements(),
    )
}

#[test]
fn both_hosts_of_a_handover_get_the_pods_identity_and_no_third() {
    let db = "spiffe://cluster.local/ns/shop/sa/db";
    for host in ["host-b", "host-c"] {
        assert_eq!(decided(host, db, None), Ok(()), "{host}");
    }
    assert!(matches!(
        decided("host-a", db, None),
        Err(Refusal::NotPlaced { .. })
    ));
}

#[test]
fn a_host_gets_the_identities_of_the_pods_it_runs() {
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(decided("host-a", web, None), Ok(()));
    assert_eq!(decided("host-a", web, Some(web)), Ok(()));
}

#[test]
fn a_host_gets_no_identity_of_another_hosts_pod() {
    let refused = |on: &str, identity: &str| decided(on, identity, None).unwrap_err().to_string();
    for (on, identity) in [
        ("host-b", "spiffe://cluster.local/ns/shop/sa/web"),
        ("host-a", "spiffe://cluster.local/ns/shop/sa/db"),
        // Same account name, another namespace; and the other way round.
        ("host-a", "spiffe://cluster.local/ns/other/sa/web"),
        ("host-a", "spiffe://cluster.local/ns/shop/sa/other"),
        // Opted out of the mesh: no identity.
        ("host-a", "spiffe://cluster.local/ns/shop/sa/plain"),
    ] {
        assert_eq!(
            refused(on, identity),
            format!("host {on} asked for {identity}: no enrolled pod of that identity is placed on it"),
        );
    }
}

#[test]
fn an_identity_of_another_trust_domain_is_refused() {
    let refusal = decided("host-a", "spiffe://elsewhere/ns/shop/sa/web", None);
    assert!(matches!(refusal, Err(Refusal::TrustDomain { .. })));
}

#[test]
fn metadata_that_says_otherwise_than_the_csr_is_refused() {
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let long = "x".repeat(10_000);
    for named in [
        "",
        "spiffe://cluster.local/ns/shop/sa/db",
        "SPIFFE://cluster.local/ns/shop/sa/web",
        &long,
    ] {
        match decided("host-a", web, Some(named)) {
            Err(Refusal::Metadata { named, .. }) => assert!(named.len() <= 256),
            other => panic!("{named:?}: {other:?}"),
        }
    }
}

#[test]
fn what_is_not_known_yet_is_put_off_rather_than_refused() {
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let placements = Placements {
        complete: false,
        ..placements()
    };
    let decided = |on: &str| decide(&host(on), &web.parse().unwrap(), None, DOMAIN, &placements);
    // What is on record counts at once.
    assert_eq!(decided("host-a"), Ok(()));
    for on in ["host-b", "host-c"] {
        let refusal = decided(on);
        assert!(
            matches!(refusal, Err(Refusal::NotKnown { .. })),
            "{on}: {refusal:?}"
        );
    }
}
