use proptest::prelude::*;

use super::*;

fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "shop", name).unwrap()
}

const DAY: Duration = Duration::from_secs(24 * 3600);

fn fresh(left: Duration) -> Life {
    Life {
        past: Duration::ZERO,
        left,
    }
}

#[test]
fn a_wanted_identity_is_fetched_at_once_and_again_at_half_its_life() {
    let mut schedule = Schedule::default();
    let (web, start) = (identity("web"), Instant::now());
    schedule.want(web.clone(), start);
    assert_eq!(schedule.start(start), std::slice::from_ref(&web));
    assert!(schedule.start(start).is_empty(), "it is under way");
    assert!(schedule.fetched(&web, fresh(DAY), start));
    assert_eq!(schedule.next(), Some(start + DAY / 2));
    assert!(
        schedule
            .start(start + DAY / 2 - Duration::from_secs(1))
            .is_empty()
    );
    assert_eq!(schedule.start(start + DAY / 2), [web]);
}

#[test]
fn half_a_life_counts_what_was_gone_before_it_arrived() {
    let mut schedule = Schedule::default();
    let (web, start) = (identity("web"), Instant::now());
    schedule.want(web.clone(), start);
    schedule.start(start);
    let hour = Duration::from_secs(3600);
    schedule.fetched(
        &web,
        Life {
            past: hour,
            left: 3 * hour,
        },
        start,
    );
    assert_eq!(schedule.next(), Some(start + hour));
}

#[test]
fn a_certificate_past_its_half_is_not_fetched_without_pause() {
    let mut schedule = Schedule::default();
    let (web, start) = (identity("web"), Instant::now());
    schedule.want(web.clone(), start);
    schedule.start(start);
    schedule.fetched(
        &web,
        Life {
            past: DAY,
            left: DAY / 2,
        },
        start,
    );
    assert_eq!(schedule.next(), Some(start + MIN_RENEWAL));
}

#[test]
fn failures_wait_longer_each_time_and_a_success_forgets_them() {
    let mut schedule = Schedule::default();
    let (web, mut now) = (identity("web"), Instant::now());
    schedule.want(web.clone(), now);
    let mut waits = Vec::new();
    for _ in 0..20 {
        assert_eq!(schedule.start(now), std::slice::from_ref(&web));
        let wait = schedule.failed(&web, now).unwrap();
        assert!(schedule.start(now).is_empty());
        now += wait;
        waits.push(wait);
    }
    assert!(waits[0] >= FIRST_RETRY && waits[0] <= 2 * FIRST_RETRY);
    // With jitter a wait is at most twice its step.
    assert!(waits.iter().all(|wait| *wait <= 2 * LAST_RETRY), "{waits:?}");
    assert!(waits[19] >= LAST_RETRY, "{waits:?}");
    schedule.start(now);
    schedule.fetched(&web, fresh(DAY), now);
    now += DAY / 2;
    schedule.start(now);
    assert!(schedule.failed(&web, now).unwrap() <= 2 * FIRST_RETRY);
}

#[test]
fn a_certificate_stays_until_it_expires_and_that_is_told_once() {
    let mut schedule = Schedule::default();
    let (web, start) = (identity("web"), Instant::now());
    schedule.want(web.clone(), start);
    schedule.start(start);
    schedule.fetched(&web, fresh(DAY), start);
    schedule.start(start + DAY / 2);
    schedule.failed(&web, start + DAY / 2);
    assert!(schedule.expired(start + DAY - Duration::from_secs(1)).is_empty());
    assert_eq!(schedule.expired(start + DAY), std::slice::from_ref(&web));
    assert!(schedule.expired(start + DAY).is_empty());
}

#[test]
fn a_result_for_what_is_no_longer_wanted_is_not_taken() {
    let mut schedule = Schedule::default();
    let (web, now) = (identity("web"), Instant::now());
    schedule.want(web.clone(), now);
    schedule.start(now);
    schedule.retain(|_| false);
    assert!(!schedule.fetched(&web, fresh(DAY), now));
    assert_eq!(schedule.next(), None);
    schedule.want(web.clone(), now);
    schedule.start(now);
    schedule.retain(|_| false);
    assert_eq!(schedule.failed(&web, now), None);
}

#[test]
fn who_has_no_certificate_goes_first() {
    let mut schedule = Schedule::default();
    let start = Instant::now();
    let old: Vec<_> = (0..MAX_FETCHES).map(|i| identity(&format!("old{i}"))).collect();
    for id in &old {
        schedule.want(id.clone(), start);
    }
    for id in schedule.start(start) {
        schedule.fetched(&id, fresh(DAY), start);
    }
    let now = start + DAY / 2;
    schedule.want(identity("new"), now);
    assert_eq!(schedule.start(now)[0], identity("new"));
}

proptest! {
    /// Whatever happens, fetches are bounded and nothing wanted is forgotten.
    #[test]
    fn fetches_are_bounded_and_every_wanted_identity_gets_its_turn(
        steps in prop::collection::vec((0..20u8, any::<bool>(), 0..100u64), 1..100),
    ) {
        let mut schedule = Schedule::default();
        let mut now = Instant::now();
        let mut under_way: Vec<Identity> = Vec::new();
        let mut wanted = std::collections::HashSet::new();
        for (name, succeeds, seconds) in steps {
            now += Duration::from_secs(seconds);
            let id = identity(&format!("i{name}"));
            schedule.want(id.clone(), now);
            wanted.insert(id);
            under_way.extend(schedule.start(now));
            prop_assert!(under_way.len() <= MAX_FETCHES);
            if let Some(id) = under_way.pop() {
                if succeeds {
                    schedule.fetched(&id, fresh(Duration::from_secs(60)), now);
                } else {
                    schedule.failed(&id, now);
                }
            }
        }
        // Let all of them through.
        let mut served = std::collections::HashSet::new();
        for _ in 0..200 {
            now += LAST_RETRY * 2;
            under_way.extend(schedule.start(now));
            for id in under_way.drain(..) {
                schedule.fetched(&id, fresh(DAY), now);
                served.insert(id);
            }
        }
        prop_assert_eq!(served, wanted);
    }
}
