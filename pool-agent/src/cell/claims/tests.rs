use jiff::Timestamp;
use pool_agent_api::spec::SandboxParts;
use pool_cell::{Claim, ClaimParts, ClaimPhase, claim::Deletion};

use super::*;
use crate::sandbox::lifecycle::tests_support::spec;

fn host() -> HostName {
    "host-a".parse().unwrap()
}

fn wanted() -> SandboxSpec {
    spec("u-1", |_| {})
}

fn placed(change: impl FnOnce(&mut ClaimParts)) -> Placed {
    let spec = wanted();
    let mut parts = ClaimParts {
        tenant: spec.tenant.clone(),
        key: spec.key.clone(),
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        node_name: spec.node_name.clone(),
        requests: spec.claim,
        images: vec!["busybox:1".into()],
        runtime_class: None,
        priority_class: None,
        owner: None,
        zone: None,
        class: None,
        arch: None,
        grace: Duration::from_secs(60),
    };
    change(&mut parts);
    Placed {
        claim: Claim::new(parts).unwrap(),
        uid: "c-1".into(),
        resource_version: "1".into(),
        host: Some(host()),
        overhead: Resources::default(),
        phase: ClaimPhase::Pending,
        reason: String::new(),
        message: String::new(),
        agent: None,
        lapsed: None,
        deletion: None,
    }
}

fn pod(uid: &str) -> Pod {
    let mut pod = placed(|_| {}).claim.to_pod();
    pod.metadata.uid = Some(uid.into());
    pod.spec.as_mut().unwrap().node_name = Some("host-a".into());
    pod
}

fn refused(placed: &Placed, spec: &SandboxSpec) -> (RefusalReason, String) {
    match covers(placed, &host(), spec) {
        Err(Unclaimed::Refused { reason, message }) => (reason, message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_claim_covers_the_sandbox_that_it_is_for() {
    assert_eq!(covers(&placed(|_| {}), &host(), &wanted()), Ok(()));
}

#[test]
fn a_claim_of_another_attempt_pod_tenant_or_host_covers_nothing() {
    for other in [
        placed(|p| p.key.attempt = p.key.attempt.next().unwrap()),
        placed(|p| p.key.pod = "u-2".parse().unwrap()),
        placed(|p| p.tenant = "other".parse().unwrap()),
        Placed {
            host: Some("host-b".parse().unwrap()),
            ..placed(|_| {})
        },
        Placed {
            host: None,
            ..placed(|_| {})
        },
    ] {
        assert_eq!(refused(&other, &wanted()).0, RefusalReason::NoClaim);
    }
}

#[test]
fn a_claim_that_ends_starts_nothing() {
    let ending = Placed {
        deletion: Some(Deletion {
            deadline: Timestamp::UNIX_EPOCH,
            grace: Duration::ZERO,
        }),
        ..placed(|_| {})
    };
    assert_eq!(refused(&ending, &wanted()).0, RefusalReason::NoClaim);
    for phase in [ClaimPhase::Failed, ClaimPhase::Succeeded] {
        let over = Placed {
            phase,
            ..placed(|_| {})
        };
        assert_eq!(refused(&over, &wanted()).0, RefusalReason::NoClaim);
    }
}

#[test]
fn a_sandbox_that_asks_for_more_than_its_claim_is_refused_by_field() {
    type Change = fn(&mut SandboxParts);
    let more: [(&str, Change); 7] = [
        ("claim.cpu_millis", |p| p.claim.cpu_millis += 1),
        ("claim.memory_bytes", |p| p.claim.memory_bytes += 1),
        ("claim.ephemeral_storage_bytes", |p| {
            p.claim.ephemeral_storage_bytes += 1
        }),
        ("runtime_handler", |p| p.runtime_handler = Some("runsc".into())),
        ("namespace", |p| p.namespace = "bank".parse().unwrap()),
        ("name", |p| p.name = "web-1".parse().unwrap()),
        ("node_name", |p| p.node_name = "another".into()),
    ];
    for (field, change) in more {
        let (reason, message) = refused(&placed(|_| {}), &spec("u-1", change));
        assert_eq!(reason, RefusalReason::ExceedsClaim, "{field}");
        assert!(message.starts_with(field), "{message}");
    }
    // The operator's overhead is room too, and less is always covered.
    let with_overhead = Placed {
        overhead: Resources {
            memory_bytes: 1,
            ..Resources::default()
        },
        ..placed(|_| {})
    };
    let more = spec("u-1", |p| p.claim.memory_bytes += 1);
    assert_eq!(covers(&with_overhead, &host(), &more), Ok(()));
    let less = spec("u-1", |p| p.claim.cpu_millis -= 1);
    assert_eq!(covers(&placed(|_| {}), &host(), &less), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_the_watch_told_counts_only_while_the_cell_is_heard() {
    let index = Index::new(host());
    let (tenant, key) = (wanted().tenant.clone(), wanted().key.clone());
    index.take(Event::Init);
    index.take(Event::InitApply(pod("c-1")));
    index.take(Event::InitDone);
    assert!(index.seen(&tenant, &key).is_none(), "nobody has answered yet");
    assert!(index.all().is_none());
    index.heard(Duration::from_secs(40));
    assert!(index.seen(&tenant, &key).is_some());
    tokio::time::advance(Duration::from_secs(41)).await;
    assert!(index.all().is_none(), "the cell is away");
    index.heard(Duration::from_secs(40));
    index.interrupted();
    assert!(index.all().is_none(), "the watch is not");
}

#[tokio::test(start_paused = true)]
async fn what_a_list_does_not_hold_at_its_end_is_gone_and_not_before() {
    let index = Index::new(host());
    index.heard(Duration::from_secs(40));
    index.take(Event::Init);
    index.take(Event::InitApply(pod("c-1")));
    index.take(Event::InitDone);
    index.take(Event::Init);
    assert_eq!(index.all().map(|all| all.len()), Some(1));
    index.take(Event::InitDone);
    assert_eq!(index.all().map(|all| all.len()), Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_the_cell_cannot_settle_is_not_refused_for_good() {
    let index = Index::new(host());
    let claims = Claims::Needed(index.clone());
    assert!(matches!(
        claims.check(&wanted()).await,
        Err(Unclaimed::Unsettled(_))
    ));
    index.heard(Duration::from_secs(40));
    index.take(Event::Init);
    index.take(Event::InitApply(pod("c-1")));
    index.take(Event::InitDone);
    assert_eq!(claims.check(&wanted()).await, Ok(()));
    assert_eq!(Claims::Unneeded.check(&spec("u-9", |_| {})).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_another_shape_under_a_claims_name_starts_nothing() {
    let index = Index::new(host());
    index.heard(Duration::from_secs(40));
    let mut other = pod("c-1");
    other.spec.as_mut().unwrap().host_network = Some(true);
    index.take(Event::Init);
    index.take(Event::InitApply(other));
    index.take(Event::InitDone);
    let refused = Claims::Needed(index).check(&wanted()).await.unwrap_err();
    assert!(refused.to_string().contains("spec.hostNetwork"), "{refused}");
}

#[test]
fn a_tenant_is_here_while_one_of_its_claims_is() {
    let index = Index::new(host());
    let claims = Claims::Needed(index.clone());
    let (tenant, other) = (wanted().tenant.clone(), "another".parse().unwrap());
    assert!(!claims.are_here(&tenant));
    index.take(Event::Apply(pod("c-1")));
    assert!(claims.are_here(&tenant) && !claims.are_here(&other));
    index.take(Event::Delete(pod("c-1")));
    assert!(!claims.are_here(&tenant));
    assert!(Claims::Unneeded.are_here(&other), "there is no cell");
}

#[test]
fn what_a_write_answered_is_not_taken_back_by_what_the_watch_told_before_it() {
    let index = Index::new(host());
    let at = |version: &str| {
        let mut pod = pod("c-1");
        pod.metadata.resource_version = Some(version.into());
        pod
    };
    let known = |index: &Index| {
        let pods: Vec<_> = index.state().pods.values().cloned().collect();
        pods[0].metadata.resource_version.clone().unwrap()
    };
    index.take(Event::Apply(at("7")));
    index.wrote(at("12"));
    index.take(Event::Apply(at("9")));
    assert_eq!(known(&index), "12");
    for event in [Event::Init, Event::InitApply(at("9")), Event::InitDone] {
        index.take(event);
    }
    assert_eq!(known(&index), "12");
    // Nor does an answer that comes late.
    index.take(Event::Apply(at("100")));
    index.wrote(at("12"));
    assert_eq!(known(&index), "100");
    // Another object of that name is another.
    let mut other = at("3");
    other.metadata.uid = Some("c-2".into());
    index.take(Event::Apply(other));
    assert_eq!(known(&index), "3");
}
