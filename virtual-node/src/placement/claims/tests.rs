use std::{collections::VecDeque, time::Duration};

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
    assert_eq!(claims.want(Seat::Pod, one.clone()), [Effect::Create(one.clone())]);
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
    claims.want(Seat::Pod, one.clone());
    claims.seen(&told(&one, "host-b"));
    assert!(claims.names_a_new_host());
    assert_eq!(
        claims.set_reachable([host("host-a"), host("host-b")].into()),
        [Effect::Room(uid("u-1"), host("host-b"))]
    );
}

/// As the cell has it in that version, with what was said of its host in that second.
fn leaving(claim: &Claim, version: u32, said: Option<i64>) -> Pod {
    let mut pod = ending(told(claim, "host-b"));
    if let Some(second) = said {
        let patch = pool_cell::lapse::patch(&pod, jiff::Timestamp::from_second(second).unwrap());
        pod.status = Some(serde_json::from_value(patch["status"].clone()).unwrap());
    }
    pod.metadata.resource_version = Some(version.to_string());
    pod
}

/// One that is held on host-b, seen in version 5.
fn held(claim: &Claim) -> Claims {
    let mut pod = told(claim, "host-b");
    pod.metadata.resource_version = Some("5".into());
    let mut claims = listed(&[pod]);
    claims.keep(Seat::Pod, &uid("u-1"), attempt(1), host("host-b"));
    claims
}

#[test]
fn what_is_given_up_is_over_when_its_hosts_lapse_was_said_twice_since() {
    let one = claim("u-1", 1);
    let mut claims = held(&one);
    let asked = claims.give_up(&one.key, Proof::Lapsed);
    assert_eq!(
        asked,
        [Effect::Witness(one.key.clone()), Effect::Delete(one.key.clone())]
    );
    // Told late: nobody knows when it was looked at.
    assert_eq!(claims.seen(&leaving(&one, 6, Some(1))), []);
    assert_eq!(claims.seen(&leaving(&one, 7, Some(3))), []);
    assert_eq!(claims.unwitnessed(), [Effect::Witness(one.key.clone())]);
    assert_eq!(claims.witnessed(&leaving(&one, 8, Some(5))), []);
    assert_eq!(claims.unwitnessed(), []);
    // What stood there is not new, nor is what was written before.
    assert_eq!(claims.seen(&leaving(&one, 9, Some(5))), []);
    assert_eq!(claims.seen(&leaving(&one, 7, Some(3))), []);
    // Its look may have been before.
    assert_eq!(claims.seen(&leaving(&one, 10, Some(7))), []);
    assert_eq!(claims.seen(&leaving(&one, 11, Some(7))), []);
    let over = [Effect::Remove(one.key.clone()), Effect::Over(one.key.clone())];
    assert_eq!(claims.seen(&leaving(&one, 12, Some(9))), over);
    assert_eq!(claims.seen(&leaving(&one, 13, Some(11))), [], "once");
}

#[test]
fn a_lapse_is_no_proof_for_what_runs_at_most_once_and_a_claim_that_is_gone_is_for_all() {
    for proof in [Proof::Lapsed, Proof::Gone] {
        let one = claim("u-1", 1);
        let mut claims = held(&one);
        claims.give_up(&one.key, proof);
        claims.witnessed(&leaving(&one, 8, None));
        let mut said = claims.seen(&leaving(&one, 9, Some(1)));
        said.extend(claims.seen(&leaving(&one, 10, Some(3))));
        assert_eq!(!said.is_empty(), proof == Proof::Lapsed, "{said:?}");
        let mut claims = held(&one);
        claims.give_up(&one.key, proof);
        assert_eq!(
            claims.deleted(&leaving(&one, 9, None)),
            [Effect::Look(one.key.clone())]
        );
        assert_eq!(claims.looked_in_vain(&one.key), [Effect::Over(one.key.clone())]);
    }
    // Of another attempt than the one that is held.
    let mut claims = held(&claim("u-1", 1));
    assert_eq!(claims.give_up(&key(&uid("u-1"), attempt(2)), Proof::Gone), []);
}

#[test]
fn both_attempts_of_a_handover_are_given_up_each_by_itself() {
    let (one, two) = (claim("u-1", 1), claim("u-1", 2));
    let mut claims = held(&one);
    claims.keep(Seat::Beside, &uid("u-1"), attempt(2), host("host-c"));
    claims.seen(&at(told(&two, "host-c"), 6));
    let asked = claims.give_up(&two.key, Proof::Lapsed);
    assert_eq!(
        asked,
        [Effect::Witness(two.key.clone()), Effect::Delete(two.key.clone())]
    );
    claims.give_up(&one.key, Proof::Lapsed);
    claims.witnessed(&leaving(&two, 7, None));
    assert_eq!(claims.unwitnessed(), [Effect::Witness(one.key.clone())]);
    // A switch meanwhile: what is known of each goes with it.
    claims.seen(&leaving(&two, 8, Some(1)));
    claims.exchange(
        &uid("u-1"),
        (attempt(2), host("host-c")),
        (attempt(1), host("host-b")),
    );
    let over = |key: &SandboxKey| [Effect::Remove(key.clone()), Effect::Over(key.clone())];
    assert_eq!(claims.seen(&leaving(&two, 9, Some(3))), over(&two.key));
    claims.witnessed(&leaving(&one, 10, None));
    assert_eq!(claims.seen(&leaving(&one, 11, Some(5))), []);
    assert_eq!(claims.seen(&leaving(&one, 12, Some(7))), over(&one.key));
}

#[test]
fn the_schedulers_words_are_told_once() {
    let mut claims = listed(&[]);
    let one = claim("u-1", 1);
    claims.want(Seat::Pod, one.clone());
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
    assert_eq!(
        claims.want(Seat::Pod, one),
        [Effect::Room(uid("u-1"), host("host-a"))]
    );
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
        assert_eq!(claims.want(Seat::Pod, one.clone()), wanted);
        // The next one is made beside it.
        let two = claim("u-1", 2);
        assert_eq!(claims.want(Seat::Pod, two.clone()), [Effect::Create(two)]);
    }
}

#[test]
fn a_claim_is_deleted_when_nothing_is_left_of_its_attempt_and_only_once() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(Seat::Pod, one.clone());
    claims.seen(&told(&one, "host-a"));
    assert_eq!(
        claims.keep(Seat::Pod, &uid("u-1"), attempt(1), host("host-a")),
        []
    );
    assert_eq!(
        claims.release(Seat::Pod, &uid("u-1")),
        [Effect::Delete(one.key.clone())]
    );
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
    claims.want(Seat::Pod, one.clone());
    claims.release(Seat::Pod, &uid("u-1"));
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
    assert_eq!(
        claims.keep(Seat::Pod, &uid("u-1"), attempt(3), host("host-a")),
        []
    );
    assert_eq!(claims.want(Seat::Pod, claim("u-2", 1)), []);
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
        claims.want(Seat::Pod, claim.clone());
        claims.seen(&told(claim, "host-a"));
        claims.keep(Seat::Pod, &claim.key.pod, attempt(1), host("host-a"));
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
    claims.want(Seat::Pod, one.clone());
    assert_eq!(claims.exists(&one.key), [Effect::Look(one.key.clone())]);
    assert_eq!(claims.looked_in_vain(&one.key), [Effect::Create(one.clone())]);
    let why = Waiting::for_quota("exceeded quota");
    assert_eq!(
        claims.not_created(&one.key, why.clone()),
        [Effect::Tell(uid("u-1"), why)]
    );
    assert_eq!(claims.again(&uid("u-1")), [Effect::Create(one)]);
}

#[test]
fn a_claim_that_the_cell_changes_is_refused_in_words_deleted_and_asked_for_again_later() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(Seat::Pod, one.clone());
    let mut changed = created(&one);
    changed.spec.as_mut().unwrap().service_account_name = Some("theirs".into());
    let why = "The pool has changed what it was asked for: spec.serviceAccountName: is not as in a claim";
    let (again, words) = (Effect::Again(uid("u-1")), Waiting::refused(why));
    assert_eq!(
        claims.answered(&changed),
        [
            Effect::Tell(uid("u-1"), words),
            again.clone(),
            Effect::Delete(one.key.clone())
        ]
    );
    // Told, and deleted, once.
    assert_eq!(claims.seen(&ending(changed.clone())), [again]);
    assert_eq!(claims.deleted(&changed), []);
    assert_eq!(claims.again(&uid("u-1")), [Effect::Create(one.clone())]);
    // The next is as it was asked for.
    claims.seen(&told(&one, "host-a"));
    assert!(matches!(
        claims.wants[&uid("u-1")],
        Want::Room { answered: true, .. }
    ));
}

#[test]
fn a_claim_of_another_release_is_left_where_its_pod_runs_and_deleted_when_nobody_wants_it() {
    let one = claim("u-1", 1);
    let mut other = told(&one, "host-b");
    other.spec.as_mut().unwrap().priority_class_name = Some("not a name".into());
    // After a restart: the record says where the pod runs, the claim where its agent is.
    let mut claims = listed(&[other.clone()]);
    assert_eq!(
        claims.keep(Seat::Pod, &uid("u-1"), attempt(1), host("host-b")),
        []
    );
    assert!(!claims.misses(&uid("u-1")));
    assert_eq!(
        claims.hosts().hosts[&host("host-b")],
        Some(AGENT.parse().unwrap())
    );
    assert_eq!(claims.seen(&other), []);
    assert_eq!(
        claims.release(Seat::Pod, &uid("u-1")),
        [Effect::Delete(one.key.clone())]
    );
    assert_eq!(claims.deleted(&other), []);
    assert!(
        claims.wants.is_empty() && claims.misshapen.is_empty(),
        "{claims:?}"
    );
    // One of a pod that is gone is found by what it says of its pod.
    let mut claims = listed(&[other]);
    assert!(matches!(claims.orphans()[..], [Effect::LookForPod { .. }]));
    assert_eq!(claims.orphaned(&uid("u-1")), [Effect::Delete(one.key.clone())]);
}

#[test]
fn an_answer_from_before_the_watch_told_that_the_claim_is_gone_brings_nothing_back() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(Seat::Pod, one.clone());
    let made = at(created(&one), 7);
    assert_eq!(claims.seen(&made).len(), 1);
    claims.keep(Seat::Pod, &uid("u-1"), attempt(1), host("host-a"));
    assert_eq!(
        claims.deleted(&at(made.clone(), 9)),
        [Effect::Look(one.key.clone())]
    );
    // The creation's own answer, late; it is still looked for.
    assert_eq!(claims.answered(&made), [Effect::Look(one.key.clone())]);
    assert!(claims.seen.is_empty());
    claims.looked_in_vain(&one.key);
    assert!(claims.hosts().hosts.is_empty());
}

#[test]
fn an_answer_that_comes_while_the_watch_lists_anew_is_looked_into() {
    let one = claim("u-1", 1);
    let mut claims = listed(&[]);
    claims.want(Seat::Pod, one.clone());
    claims.begin_listing();
    claims.answered(&at(created(&one), 7));
    let look = Effect::Look(one.key.clone());
    assert_eq!(claims.end_listing(), std::slice::from_ref(&look));
    // A read that failed is made again.
    assert!(claims.misses(&uid("u-1")));
    assert_eq!(claims.again(&uid("u-1")), [look]);
    assert_eq!(claims.looked_in_vain(&one.key), [Effect::Create(one)]);
}

#[derive(Debug, Clone)]
enum Step {
    Want(u32),
    Keep(u32),
    Release,
    /// The cell carries out what it was asked; its answers and what the watch tells are
    /// on their way.
    Serve,
    /// The next answer arrives.
    Answer,
    /// The watch tells the next change.
    Tell,
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
        Just(Step::Answer),
        Just(Step::Tell),
        Just(Step::Bind),
        Just(Step::Relist),
        Just(Step::Notice),
    ]
}

fn at(mut pod: Pod, version: u64) -> Pod {
    pod.metadata.resource_version = Some(version.to_string());
    pod
}

enum Answer {
    Found(Box<Pod>),
    Absent(SandboxKey),
    Exists(SandboxKey),
}

/// A cell whose watch and whose answers come when they come, each in order.
#[derive(Default)]
struct LateCell {
    version: u64,
    pods: BTreeMap<SandboxKey, Pod>,
    /// Whether it is there, and how it is or was.
    changes: VecDeque<(bool, Pod)>,
    answers: VecDeque<Answer>,
}

impl LateCell {
    fn put(&mut self, key: &SandboxKey, pod: Pod) -> Pod {
        self.version += 1;
        let pod = at(pod, self.version);
        self.pods.insert(key.clone(), pod.clone());
        self.changes.push_back((true, pod.clone()));
        pod
    }

    fn remove(&mut self, key: &SandboxKey) {
        if let Some(pod) = self.pods.remove(key) {
            self.version += 1;
            self.changes.push_back((false, at(pod, self.version)));
        }
    }

    fn serve(&mut self, effect: Effect) {
        match effect {
            Effect::Create(claim) if self.pods.contains_key(&claim.key) => {
                self.answers.push_back(Answer::Exists(claim.key.clone()));
            }
            Effect::Create(claim) => {
                let pod = self.put(&claim.key, created(&claim));
                self.answers.push_back(Answer::Found(Box::new(pod)));
            }
            Effect::Delete(key) => self.remove(&key),
            Effect::Look(key) => self.answers.push_back(match self.pods.get(&key) {
                Some(pod) => Answer::Found(Box::new(pod.clone())),
                None => Answer::Absent(key),
            }),
            _ => {}
        }
    }

    fn answer(&mut self, claims: &mut Claims) -> Option<Vec<Effect>> {
        Some(match self.answers.pop_front()? {
            Answer::Found(pod) => claims.answered(&pod),
            Answer::Absent(key) => claims.looked_in_vain(&key),
            Answer::Exists(key) => claims.exists(&key),
        })
    }

    fn tell(&mut self, claims: &mut Claims) -> Option<Vec<Effect>> {
        let (there, pod) = self.changes.pop_front()?;
        Some(if there {
            claims.seen(&pod)
        } else {
            claims.deleted(&pod)
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Whatever drivers say and the cell does, and however late its answers are behind
    /// its watch, once all has arrived there is the one claim that is wanted or kept,
    /// and no other, and what is known is what there is.
    #[test]
    fn in_the_end_there_is_the_claim_that_is_wanted_and_no_other(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let mut claims = listed(&[]);
        let mut cell = LateCell::default();
        let mut asked: Vec<Effect> = vec![];
        let pod = uid("u-1");
        let mut answered = false;
        let mut last = None;
        for step in steps {
            let effects = match step {
                Step::Want(number) => {
                    last = Some((number, true));
                    answered = false;
                    claims.want(Seat::Pod, claim("u-1", number))
                }
                Step::Keep(number) => {
                    last = Some((number, false));
                    claims.keep(Seat::Pod, &pod, attempt(number), host("host-a"))
                }
                Step::Release => {
                    last = None;
                    claims.release(Seat::Pod, &pod)
                }
                Step::Serve => {
                    asked.drain(..).for_each(|effect| cell.serve(effect));
                    vec![]
                }
                Step::Answer => cell.answer(&mut claims).unwrap_or_default(),
                Step::Tell => cell.tell(&mut claims).unwrap_or_default(),
                Step::Bind => {
                    for key in cell.pods.keys().cloned().collect::<Vec<_>>() {
                        cell.put(&key, told(&claim("u-1", key.attempt.get()), "host-a"));
                    }
                    vec![]
                }
                Step::Relist => {
                    cell.changes.clear();
                    claims.begin_listing();
                    let listed: Vec<Pod> = cell.pods.values().cloned().collect();
                    // One answer may come in the middle of it.
                    let mut effects = cell.answer(&mut claims).unwrap_or_default();
                    effects.extend(listed.iter().flat_map(|pod| claims.seen(pod)));
                    effects.extend(claims.end_listing());
                    effects
                }
                Step::Notice => {
                    for key in cell.pods.keys().cloned().collect::<Vec<_>>() {
                        cell.remove(&key);
                    }
                    vec![]
                }
            };
            // Room is only ever given for the attempt that is wanted.
            for effect in &effects {
                if let Effect::Room(..) | Effect::Lost(_) = effect {
                    prop_assert!(matches!(last, Some((_, true))));
                    answered = true;
                }
            }
            asked.extend(effects);
        }
        // Everything arrives, the answers behind the watch.
        for round in 0.. {
            prop_assert!(round < 100, "it never settles: {claims:?}");
            asked.drain(..).for_each(|effect| cell.serve(effect));
            while let Some(effects) = cell.tell(&mut claims) {
                asked.extend(effects);
            }
            while let Some(effects) = cell.answer(&mut claims) {
                asked.extend(effects);
            }
            for effect in claims.orphans() {
                match effect {
                    Effect::LookForPod { .. } => asked.extend(claims.orphaned(&pod)),
                    effect => asked.push(effect),
                }
            }
            let over = |effect: &Effect| matches!(effect, Effect::Room(..) | Effect::Lost(_));
            answered |= asked.iter().any(over);
            let quiet = |effect: &Effect| over(effect) || matches!(effect, Effect::Tell(..));
            if asked.iter().all(quiet) && cell.changes.is_empty() {
                break;
            }
        }
        let left: Vec<u32> = cell.pods.keys().map(|key| key.attempt.get()).collect();
        match last {
            // Once it was answered the driver goes on: with the next attempt if it was
            // lost, to the host if it got room, which takes nothing without a claim.
            Some((number, true)) => prop_assert!(
                left == [number] || answered && left.is_empty(),
                "{:?}", left
            ),
            Some((number, false)) => prop_assert!(left.iter().all(|n| *n == number), "{:?}", left),
            None => prop_assert!(left.is_empty(), "{:?}", left),
        }
        let known: Vec<SandboxKey> = claims.keys();
        prop_assert_eq!(known, cell.pods.keys().cloned().collect::<Vec<_>>());
    }
}
