use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::sandbox::lifecycle::tests_support::spec;

fn capacity() -> Resources {
    Resources {
        cpu_millis: 1000,
        memory_bytes: 1000,
        ephemeral_storage_bytes: 1000,
        sandboxes: 4,
    }
}

fn sandbox(pod: &str, attempt: u32, cpu_millis: u64) -> Arc<SandboxSpec> {
    Arc::new(spec(pod, |parts| {
        parts.key.attempt = Attempt::parse("", attempt).unwrap();
        parts.claim = Resources {
            cpu_millis,
            memory_bytes: 10,
            ephemeral_storage_bytes: 0,
            sandboxes: 1,
        };
    }))
}

fn with_capacity(capacity: Resources) -> Admission {
    let mut admission = Admission::new(capacity, "10.77.1.0/28".parse().unwrap());
    admission.admit_tenant(&"demo".parse().unwrap()).unwrap();
    admission
}

fn demo() -> TenantId {
    "demo".parse().unwrap()
}

fn sandbox_key(pod: &str, attempt: u32) -> SandboxKey {
    SandboxKey {
        pod: pod.parse().unwrap(),
        attempt: Attempt::parse("", attempt).unwrap(),
    }
}

fn open() -> Admission {
    with_capacity(capacity())
}

fn reason(outcome: Result<Answer, Refusal>) -> RefusalReason {
    outcome.unwrap_err().reason
}

#[test]
fn an_attempt_is_taken_once_and_its_repetition_has_the_same_answer() {
    let mut admission = open();
    let first = sandbox("a", 1, 100);
    assert!(matches!(
        admission.admit(&first),
        Ok(Answer::Admitted { supersedes: None, .. })
    ));
    assert_eq!(admission.admit(&first), Ok(Answer::Repeated));
    assert_eq!(
        reason(admission.admit(&sandbox("a", 1, 101))),
        RefusalReason::SpecConflict
    );
    assert_eq!(admission.free().cpu_millis, 900);
}

#[test]
fn contents_and_credentials_may_be_newer_in_a_repetition() {
    use pool_agent_api::spec::{File, RegistryCredential, Volume};
    let with = |token: &str| {
        spec("a", |parts| {
            let file = File {
                path: "token".into(),
                content: token.into(),
                mode: 0o600,
                owner: None,
            };
            parts.volumes = vec![Volume {
                name: "token".parse().unwrap(),
                source: VolumeSource::Files(Files::new(vec![file], true).unwrap()),
            }];
            parts.registry_credentials = vec![RegistryCredential {
                registry: "r".into(),
                username: "u".into(),
                password: token.into(),
            }];
        })
    };
    let mut admission = with_capacity(Resources {
        memory_bytes: 1 << 30,
        ..capacity()
    });
    assert!(admission.admit(&Arc::new(slim(with("one")))).is_ok());
    assert_eq!(admission.admit(&Arc::new(with("two"))), Ok(Answer::Repeated));
}

#[test]
fn an_attempt_that_is_older_or_has_ended_is_refused() {
    let mut admission = open();
    admission.admit(&sandbox("a", 2, 100)).unwrap();
    assert_eq!(
        reason(admission.admit(&sandbox("a", 1, 100))),
        RefusalReason::OlderAttempt
    );
    admission.end(&demo(), &sandbox("a", 2, 100).key);
    assert_eq!(
        reason(admission.admit(&sandbox("a", 2, 100))),
        RefusalReason::EndedAttempt
    );
    assert_eq!(
        reason(admission.admit(&sandbox("a", 1, 100))),
        RefusalReason::OlderAttempt
    );
    assert!(admission.admit(&sandbox("a", 3, 100)).is_ok());
}

#[test]
fn a_newer_attempt_supersedes_and_the_larger_claim_counts() {
    let mut admission = open();
    let old = sandbox("a", 1, 600);
    admission.admit(&old).unwrap();
    let answer = admission.admit(&sandbox("a", 2, 500)).unwrap();
    assert!(matches!(answer, Answer::Admitted { supersedes: Some(key), .. } if key == old.key));
    assert_eq!(
        (admission.free().cpu_millis, admission.free().sandboxes),
        (400, 3)
    );
    admission.end(&demo(), &old.key);
    assert_eq!(admission.free().cpu_millis, 500);
}

#[test]
fn what_has_stopped_holds_neither_room_nor_address_but_its_name() {
    let mut admission = open();
    let stopped = sandbox("a", 1, 1000);
    admission.admit(&stopped).unwrap();
    admission.release(&stopped.key);
    assert_eq!(admission.free(), capacity());
    assert_eq!(admission.admit(&stopped), Ok(Answer::Repeated));
}

#[test]
fn what_does_not_fit_is_refused_with_what_is_free() {
    let mut admission = open();
    admission.admit(&sandbox("a", 1, 800)).unwrap();
    let refusal = admission.admit(&sandbox("b", 1, 300)).unwrap_err();
    assert_eq!(
        (refusal.reason, refusal.free.cpu_millis),
        (RefusalReason::NoRoom, 200)
    );
    assert!(
        refusal.message.contains("300 wanted, 200 free"),
        "{}",
        refusal.message
    );
    let strange = Arc::new(spec("c", |parts| parts.tenant = "other".parse().unwrap()));
    assert_eq!(reason(admission.admit(&strange)), RefusalReason::UnknownTenant);
    admission.drain();
    assert_eq!(
        reason(admission.admit(&sandbox("d", 1, 1))),
        RefusalReason::Draining
    );
    assert_eq!(admission.admit(&sandbox("a", 1, 800)), Ok(Answer::Repeated));
}

#[test]
fn no_two_pods_or_routers_of_any_tenants_have_one_address() {
    let plenty = Resources {
        sandboxes: 100,
        ..capacity()
    };
    let mut admission = with_capacity(plenty);
    let (demo, other): (TenantId, TenantId) = ("demo".parse().unwrap(), "other".parse().unwrap());
    let mut given = HashSet::from([admission.admit_tenant(&demo).unwrap()]);
    assert!(given.insert(admission.admit_tenant(&other).unwrap()));
    assert!(
        !given.insert(admission.admit_tenant(&other).unwrap()),
        "the same again"
    );
    for pod in 0..12 {
        let tenant = if pod % 2 == 0 { &demo } else { &other };
        let spec = Arc::new(spec(&format!("p{pod}"), |parts| {
            parts.tenant = tenant.clone();
            parts.claim = Resources {
                sandboxes: 1,
                ..Resources::default()
            };
        }));
        match admission.admit(&spec) {
            Ok(Answer::Admitted { address, .. }) => assert!(given.insert(address), "{address} twice"),
            other => panic!("{other:?}"),
        }
    }
    // A /28 has 14.
    assert_eq!(
        reason(admission.admit(&sandbox("late", 1, 0))),
        RefusalReason::NoRoom
    );
    assert!(matches!(
        admission.admit_tenant(&"third".parse().unwrap()),
        Err(TenantRefusal::NoAddress(_))
    ));
}

#[test]
fn addresses_are_held_again_after_a_restart_whosever_they_are() {
    let range: Ipv4Net = "10.77.1.0/29".parse().unwrap();
    let (demo, other): (TenantId, TenantId) = ("demo".parse().unwrap(), "other".parse().unwrap());
    let mut admission = Admission::new(capacity(), range);
    let at = |last| Ipv4Addr::new(10, 77, 1, last);
    admission.restore_tenant(&demo, at(1));
    admission.restore_tenant(&other, Ipv4Addr::new(10, 9, 9, 9));
    let key = |pod: &str| sandbox(pod, 1, 0).key.clone();
    admission.restore(&key("a"), &demo, None, Resources::default(), at(2));
    // Given to another tenant's pod since the first one stopped.
    admission.restore(&key("b"), &other, None, Resources::default(), at(2));
    admission.resume_addresses_after(at(4));
    assert_eq!(admission.admit_tenant(&demo), Ok(at(1)));
    assert_eq!(
        admission.admit_tenant(&other),
        Ok(at(5)),
        "its old one was of another range"
    );
    admission.release(&key("a"));
    let mut next = |pod: &str| match admission.admit(&sandbox(pod, 1, 0)) {
        Ok(Answer::Admitted { address, .. }) => address,
        other => panic!("{other:?}"),
    };
    assert_eq!([next("c"), next("d"), next("e")], [at(6), at(3), at(4)]);
}

#[test]
fn the_newest_fences_are_kept_and_one_that_is_raised_again_is_new() {
    let key = |pod: usize, attempt| SandboxKey {
        pod: format!("p{pod}").parse().unwrap(),
        attempt: Attempt::parse("", attempt).unwrap(),
    };
    let mut fences = Fences::default();
    let demo = demo();
    for pod in 0..FENCES {
        fences.raise(&demo, &key(pod, 3));
    }
    // An older attempt lowers nothing.
    fences.raise(&demo, &key(0, 2));
    fences.raise(&demo, &key(FENCES, 1));
    let of = |pod| fences.of(&demo, &key(pod, 1).pod).map(Attempt::get);
    assert_eq!(
        [of(0), of(1), of(2), of(FENCES)],
        [Some(3), None, Some(3), Some(1)]
    );
    let own = &fences.tenants[&demo];
    assert!(own.by_pod.len() <= FENCES && own.raised.len() <= FENCES);
}

#[test]
fn a_tenant_fences_no_pod_of_another_and_pushes_out_no_fence_of_anothers() {
    let other: TenantId = "other".parse().unwrap();
    let mut admission = open();
    let ended = sandbox("a", 1, 100);
    admission.admit(&ended).unwrap();
    admission.end(&demo(), &ended.key);
    admission.fence(&other, &sandbox("b", 7, 100).key);
    assert!(admission.admit(&sandbox("b", 1, 100)).is_ok());
    // As many as they like, by as many tenants as there may be.
    let mut fences = std::mem::take(&mut admission.fences);
    for tenant in 0..2 * ALL_FENCES / FENCES {
        let tenant: TenantId = format!("t{tenant}").parse().unwrap();
        for pod in 0..FENCES {
            fences.raise(&tenant, &sandbox_key(&format!("p{pod}"), 1));
        }
    }
    assert_eq!(fences.raised, ALL_FENCES);
    assert_eq!(
        fences.tenants.values().map(|t| t.raised.len()).sum::<usize>(),
        ALL_FENCES
    );
    admission.fences = fences;
    assert_eq!(reason(admission.admit(&ended)), RefusalReason::EndedAttempt);
}

#[derive(Debug, Clone)]
enum Turn {
    Admit(usize, u32, u64),
    End(usize, u32),
}

fn turn() -> impl Strategy<Value = Turn> {
    let pod = 0usize..5;
    prop_oneof![
        3 => (pod.clone(), 1u32..5, 0u64..700).prop_map(|(p, a, c)| Turn::Admit(p, a, c)),
        1 => (pod, 1u32..5).prop_map(|(p, a)| Turn::End(p, a)),
    ]
}

proptest! {
    #[test]
    fn claims_never_exceed_capacity_and_attempts_never_go_back(
        turns in proptest::collection::vec(turn(), 0..80),
    ) {
        let mut admission = open();
        // What a careful observer knows: the live attempts with claim and address.
        let mut live: HashMap<(usize, u32), (u64, Ipv4Addr)> = HashMap::new();
        let mut fenced: HashMap<usize, u32> = HashMap::new();
        for turn in turns {
            match turn {
                Turn::Admit(pod, attempt, cpu) => {
                    let spec = sandbox(&format!("p{pod}"), attempt, cpu);
                    if let Ok(Answer::Admitted { address, supersedes }) = admission.admit(&spec) {
                        prop_assert!(fenced.get(&pod).is_none_or(|f| *f < attempt));
                        let older = live.keys().filter(|(p, _)| *p == pod).map(|(_, a)| *a).max();
                        prop_assert!(older.is_none_or(|older| older < attempt));
                        prop_assert_eq!(supersedes.map(|k| k.attempt.get()), older);
                        let held: HashSet<Ipv4Addr> = live.values().map(|(_, a)| *a).collect();
                        prop_assert!(!held.contains(&address), "{} is taken", address);
                        live.insert((pod, attempt), (cpu, address));
                    }
                }
                Turn::End(pod, attempt) => {
                    admission.end(&demo(), &sandbox(&format!("p{pod}"), attempt, 0).key);
                    live.remove(&(pod, attempt));
                    let fence = fenced.entry(pod).or_default();
                    *fence = (*fence).max(attempt);
                }
            }
            let mut by_pod: HashMap<usize, u64> = HashMap::new();
            for ((pod, _), (cpu, _)) in &live {
                let claim = by_pod.entry(*pod).or_default();
                *claim = (*claim).max(*cpu);
            }
            let used: u64 = by_pod.values().sum();
            prop_assert!(used <= capacity().cpu_millis, "{} of {}", used, capacity().cpu_millis);
            prop_assert!(by_pod.len() <= 4);
            prop_assert_eq!(admission.free().cpu_millis, capacity().cpu_millis - used);
        }
    }
}
