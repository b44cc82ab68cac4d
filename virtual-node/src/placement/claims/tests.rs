use std::time::Duration;

use k8s_openapi::api::core::v1::PodCondition;
use pool_agent_api::{Invalid, Resources};
use pool_cell::ClaimParts;
use proptest::prelude::*;

use super::*;

const NODE: &str = "node";
const AGENT: &str = "192.0.2.11:7443";

fn uid(text: &str) -> PodUid {
    PodUid::parse("uid", text).unwrap()
}

fn attempt(number: u32) -> Attempt {
    Attempt::parse("attempt", number).unwrap()
}

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn claim_of(node: &str, pod: &str, number: u32) -> Result<Claim, Invalid> {
    Claim::new(ClaimParts {
        tenant: "demo".parse().unwrap(),
        key: key(&uid(pod), attempt(number)),
        namespace: "shop".parse().unwrap(),
        name: "web".parse().unwrap(),
        node_name: node.into(),
        requests: Resources {
            cpu_millis: 100,
            sandboxes: 1,
            ..Resources::default()
        },
        images: vec!["app:1".into()],
        runtime_class: None,
        priority_class: None,
        owner: None,
        zone: None,
        class: None,
        arch: None,
        grace: Duration::from_secs(60),
    })
}

fn claim(pod: &str, number: u32) -> Claim {
    claim_of(NODE, pod, number).unwrap()
}

/// As the cell has it once it is created.
fn created(claim: &Claim) -> Pod {
    let mut pod = claim.to_pod();
    pod.metadata.uid = Some(format!("{}-uid", claim.cell_name()));
    pod
}

fn bound(claim: &Claim, to: &str) -> Pod {
    let mut pod = created(claim);
    pod.spec.as_mut().unwrap().node_name = Some(to.into());
    pod
}

fn told(claim: &Claim, to: &str) -> Pod {
    let mut pod = bound(claim, to);
    let annotations = pod.metadata.annotations.as_mut().unwrap();
    annotations.insert(pool_cell::names::AGENT.into(), AGENT.into());
    pod
}

fn ending(mut pod: Pod) -> Pod {
    let at = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH);
    pod.metadata.deletion_timestamp = Some(at);
    pod.metadata.deletion_grace_period_seconds = Some(60);
    pod
}

/// Everything there is has been listed, and host-a is in reach.
fn listed(pods: &[Pod]) -> Claims {
    let mut claims = Claims::new(NODE.into());
    claims.set_reachable([host("host-a")].into());
    claims.begin_listing();
    for pod in pods {
        assert_eq!(claims.seen(pod), []);
    }
    assert_eq!(claims.end_listing(), []);
    claims.hosts();
    claims
}

#[test]
fn a_claim_is_made_once_and_gives_room_where_it_is_bound_and_the_agent_is_in_reach() {
    let mut claims = listed(&[]);
    let one = claim("u-1", 1);
    assert_eq!(claims.want(one.clone()), [Effect::Create(one.clone())]);
    let looks = Waiting::for_host("The pool's scheduler looks for a host");
    assert_eq!(claims.seen(&created(&one)), [Effect::Tell(uid("u-1"), looks)]);
    let reach = Waiting::for_host("A host was found for the pod, and is not in reach yet");
    assert_eq!(
        claims.seen(&bound(&one, "host-a")),
        [Effect::Tell(uid("u-1"), reach)]
    );
    assert!(!claims.names_a_new_host());
    assert_eq!(
        claims.seen(&told(&one, "host-a")),
        [Effect::Room(uid("u-1"), host("host-a"))]
    );
    assert!(claims.names_a_new_host());
    let named = claims.hosts();
    assert_eq!(named.hosts[&host("host-a")], Some(AGENT.parse().unwrap()));
    // The same seen again grants nothing again.
    assert_eq!(claims.seen(&told(&one, "host-a")), []);
}

#[test]
fn a_host_that_comes_into_reach_gives_room_to_those_that_wait_for_it() {
    let mut claims = listed(&[]);
    let one = claim("u-1", 1);
    claims.want(one.clone());
    claims.seen(&told(&one, "host-b"));
    assert!(claims.names_a_new_host());
    assert_eq!(
        claims.set_reachable([host("host-a"), host("host-b")].into()),
        [Effect::Room(uid("u-1"), host("host-b"))]
    );
}

#[test]
fn the_schedulers_words_are_told_once() {
    let mut claims = listed(&[]);
    let one = claim("u-1", 1);
    claims.want(one.clone());
    let mut pod = created(&one);
    pod.status.get_or_insert_default().conditions = Some(vec![PodCondition {
        type_: "PodScheduled".into(),
        status: "False".into(),
        message: Some("0/2 nodes are available: 2 Insufficient memory.".into()),
        ..PodCondition::default()
    }]);
    let words = Waiting::for_host("0/2 nodes are available: 2 Insufficient memory.");
    assert_eq!(claims.seen(&pod), [Effect::Tell(uid("u-1"), words)]);
    assert_eq!(claims.seen(&pod), []);
}

#[test]
fn a_claim_of_an_earlier_process_is_taken_over_and_not_made_again() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[told(&one, "host-a")]);
    assert_eq!(claims.want(one), [Effect::Room(uid("u-1"), host("host-a"))]);
}

#[test]
fn a_claim_that_cannot_be_taken_over_is_deleted_and_the_attempt_is_lost() {
    let one = claim("u-1", 1);
    let mut failed = told(&one, "host-a");
    failed.status.get_or_insert_default().phase = Some("Failed".into());
    let mut other = told(&one, "host-a");
    other.spec.as_mut().unwrap().containers[0].image = Some("app:2".into());
    for (pod, ends) in [
        (ending(told(&one, "host-a")), true),
        (failed, false),
        (other, false),
    ] {
        let mut claims = listed(&[pod]);
        let mut wanted = vec![Effect::Lost(uid("u-1"))];
        // One that ends already is not told again.
        wanted.extend((!ends).then(|| Effect::Delete(one.key.clone())));
        assert_eq!(claims.want(one.clone()), wanted);
        // The next one is made beside it.
        let two = claim("u-1", 2);
        assert_eq!(claims.want(two.clone()), [Effect::Create(two)]);
    }
}

#[test]
fn a_claim_is_deleted_when_nothing_is_left_of_its_attempt_and_only_once() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(one.clone());
    claims.seen(&told(&one, "host-a"));
    assert_eq!(claims.keep(&uid("u-1"), attempt(1), host("host-a")), []);
    assert_eq!(claims.release(&uid("u-1")), [Effect::Delete(one.key.clone())]);
    assert_eq!(claims.seen(&ending(told(&one, "host-a"))), []);
    // Until the agent has let it go, its host is one of ours.
    assert!(claims.hosts().hosts.contains_key(&host("host-a")));
    assert_eq!(claims.deleted(&told(&one, "host-a")), []);
    assert!(claims.hosts().hosts.is_empty());
    assert!(claims.wants.is_empty() && claims.seen.is_empty(), "{claims:?}");
}

#[test]
fn one_that_was_made_for_a_pod_that_wants_it_no_more_is_deleted_as_it_appears() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(one.clone());
    claims.release(&uid("u-1"));
    // The driver is gone; what it asked for arrives.
    assert_eq!(claims.seen(&created(&one)), []);
    assert_eq!(
        claims.orphans(),
        [Effect::LookForPod {
            key: one.key.clone(),
            namespace: "shop".parse().unwrap(),
            name: "web".parse().unwrap(),
        }]
    );
    assert_eq!(claims.orphaned(&uid("u-1")), [Effect::Delete(one.key.clone())]);
}

#[test]
fn nothing_is_concluded_before_all_is_listed_and_only_a_live_read_says_that_a_claim_is_gone() {
    let mut claims = Claims::new(NODE.into());
    assert_eq!(claims.keep(&uid("u-1"), attempt(3), host("host-a")), []);
    assert_eq!(claims.want(claim("u-2", 1)), []);
    assert!(!claims.hosts().complete);
    claims.begin_listing();
    let look = Effect::Look(key(&uid("u-1"), attempt(3)));
    assert_eq!(claims.end_listing(), [look, Effect::Create(claim("u-2", 1))]);
    let named = claims.hosts();
    assert!(named.complete && named.hosts[&host("host-a")].is_none());
    claims.looked_in_vain(&key(&uid("u-1"), attempt(3)));
    assert!(claims.hosts().hosts.is_empty());
}

#[test]
fn a_watch_that_begins_anew_keeps_what_is_there_and_drops_what_went_unseen() {
    let (one, two) = (claim("u-1", 1), claim("u-2", 1));
    let mut claims = listed(&[]);
    for claim in [&one, &two] {
        claims.want(claim.clone());
        claims.seen(&told(claim, "host-a"));
        claims.keep(&claim.key.pod, attempt(1), host("host-a"));
    }
    claims.begin_listing();
    assert_eq!(claims.seen(&told(&one, "host-a")), []);
    assert_eq!(claims.end_listing(), [Effect::Look(two.key.clone())]);
}

#[test]
fn claims_of_the_tenants_other_nodes_are_left_alone() {
    let other = claim_of("other", "u-1", 1).unwrap();
    let mut claims = listed(&[]);
    assert_eq!(claims.seen(&told(&other, "host-a")), []);
    assert_eq!(claims.orphans(), []);
    assert!(claims.hosts().hosts.is_empty());
}

#[test]
fn a_name_that_is_taken_is_looked_at_and_a_creation_that_failed_is_made_again() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(one.clone());
    assert_eq!(claims.exists(&one.key), [Effect::Look(one.key.clone())]);
    assert_eq!(claims.looked_in_vain(&one.key), [Effect::Create(one.clone())]);
    let why = Waiting::for_quota("exceeded quota");
    assert_eq!(
        claims.not_created(&one.key, why.clone()),
        [Effect::Tell(uid("u-1"), why)]
    );
    assert_eq!(claims.again(&uid("u-1")), [Effect::Create(one)]);
}

#[derive(Debug, Clone)]
enum Step {
    Want(u32),
    Keep(u32),
    Release,
    /// The cell carries out what it was asked.
    Serve,
    Bind,
    Relist,
    /// The claim is deleted by somebody else.
    Notice,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..4_u32).prop_map(Step::Want),
        (1..4_u32).prop_map(Step::Keep),
        Just(Step::Release),
        Just(Step::Serve),
        Just(Step::Bind),
        Just(Step::Relist),
        Just(Step::Notice),
    ]
}

proptest! {
    /// Whatever drivers say and the cell does, once it has served all that was asked
    /// there is the one claim that is wanted or kept, and no other.
    #[test]
    fn in_the_end_there_is_the_claim_that_is_wanted_and_no_other(
        steps in proptest::collection::vec(step(), 1..40)
    ) {
        let mut claims = listed(&[]);
        let mut cell: BTreeMap<SandboxKey, Pod> = BTreeMap::new();
        let mut asked: Vec<Effect> = vec![];
        let pod = uid("u-1");
        let answered = std::cell::Cell::new(false);
        let serve = |claims: &mut Claims, cell: &mut BTreeMap<SandboxKey, Pod>, asked: &mut Vec<Effect>| {
            while let Some(effect) = asked.pop() {
                let more = match effect {
                    Effect::Create(claim) => match cell.get(&claim.key) {
                        Some(_) => claims.exists(&claim.key),
                        None => {
                            cell.insert(claim.key.clone(), created(&claim));
                            claims.seen(&created(&claim))
                        }
                    },
                    Effect::Delete(key) => match cell.remove(&key) {
                        Some(pod) => claims.deleted(&pod),
                        None => vec![],
                    },
                    Effect::Look(key) => match cell.get(&key) {
                        Some(pod) => claims.seen(pod),
                        None => claims.looked_in_vain(&key),
                    },
                    Effect::Lost(_) | Effect::Room(..) => {
                        answered.set(true);
                        vec![]
                    }
                    _ => vec![],
                };
                asked.extend(more);
            }
        };
        let mut last = None;
        for step in steps {
            let effects = match step {
                Step::Want(number) => {
                    last = Some((number, true));
                    // Of the want before it.
                    asked.retain(|effect| !matches!(effect, Effect::Lost(_) | Effect::Room(..)));
                    answered.set(false);
                    claims.want(claim("u-1", number))
                }
                Step::Keep(number) => {
                    last = Some((number, false));
                    claims.keep(&pod, attempt(number), host("host-a"))
                }
                Step::Release => {
                    last = None;
                    claims.release(&pod)
                }
                Step::Serve => {
                    serve(&mut claims, &mut cell, &mut asked);
                    vec![]
                }
                Step::Bind => {
                    let mut effects = vec![];
                    for (key, pod) in &mut cell {
                        *pod = told(&claim("u-1", key.attempt.get()), "host-a");
                        effects.extend(claims.seen(pod));
                    }
                    effects
                }
                Step::Relist => {
                    claims.begin_listing();
                    let mut effects: Vec<Effect> = cell.values().flat_map(|pod| claims.seen(pod)).collect();
                    effects.extend(claims.end_listing());
                    effects
                }
                Step::Notice => {
                    let gone = std::mem::take(&mut cell);
                    gone.values().flat_map(|pod| claims.deleted(pod)).collect()
                }
            };
            // Room is only ever given for the attempt that is wanted.
            for effect in &effects {
                if let Effect::Room(..) = effect {
                    prop_assert!(matches!(last, Some((_, true))));
                }
            }
            asked.extend(effects);
        }
        serve(&mut claims, &mut cell, &mut asked);
        claims.begin_listing();
        let effects: Vec<Effect> = cell.values().flat_map(|pod| claims.seen(pod)).collect();
        asked.extend(effects);
        asked.extend(claims.end_listing());
        asked.extend(claims.orphans());
        let orphaned = asked.iter().any(|e| matches!(e, Effect::LookForPod { .. }));
        if orphaned {
            asked.extend(claims.orphaned(&pod));
        }
        serve(&mut claims, &mut cell, &mut asked);
        let left: Vec<u32> = cell.keys().map(|key| key.attempt.get()).collect();
        match last {
            // Once it was answered the driver goes on: with the next attempt if it was
            // lost, to the host if it got room, which takes nothing without a claim.
            Some((number, true)) => prop_assert!(
                left == [number] || answered.get() && left.is_empty(),
                "{:?}", left
            ),
            Some((number, false)) => prop_assert!(left.iter().all(|n| *n == number), "{:?}", left),
            None => prop_assert!(left.is_empty(), "{:?}", left),
        }
    }
}
