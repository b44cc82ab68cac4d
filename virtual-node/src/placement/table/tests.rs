use std::sync::Arc;

use pool_agent_api::Host as PoolHost;
use proptest::prelude::*;

use super::*;
use crate::pool::HostView;

fn resources(cpu: u64, sandboxes: u32) -> Resources {
    Resources {
        cpu_millis: cpu,
        memory_bytes: 1 << 30,
        ephemeral_storage_bytes: 1 << 30,
        sandboxes,
    }
}

fn name(i: usize) -> HostName {
    format!("host-{i}").parse().unwrap()
}

fn pod(i: usize) -> PodUid {
    format!("pod-{i}").parse().unwrap()
}

fn view(i: usize, cpu: u64, free: u64) -> (HostName, HostView) {
    let host = PoolHost {
        name: name(i),
        version: String::new(),
        boot_id: String::new(),
        address: "192.0.2.1".parse().unwrap(),
        capacity: resources(cpu, 10),
        allocatable: resources(cpu, 10),
        pressure: Default::default(),
        free: resources(free, 10),
        runtime_version: String::new(),
        kernel_version: String::new(),
        os_image: String::new(),
        architecture: "amd64".into(),
    };
    let view = HostView {
        reachable: true,
        host: Some(Arc::new(host)),
    };
    (name(i), view)
}

fn ask(cpu: u64, owner: &str) -> Ask {
    Ask {
        claim: Resources {
            memory_bytes: 0,
            ephemeral_storage_bytes: 0,
            ..resources(cpu, 1)
        },
        requests: Resources::default(),
        runtime: None,
        owner: Some(owner.to_owned()).filter(|o| !o.is_empty()),
        namespace: "shop".parse().unwrap(),
        name: "web".parse().unwrap(),
        images: vec!["app:1".into()],
        grace: std::time::Duration::from_secs(30),
    }
}

fn table(hosts: impl IntoIterator<Item = (HostName, HostView)>) -> Table {
    let mut table = Table::default();
    table.set_hosts(&hosts.into_iter().collect());
    table
}

fn room(answers: Vec<(PodUid, Answer)>) -> Vec<(String, String)> {
    answers
        .into_iter()
        .map(|(pod, answer)| match answer {
            Answer::Room(host) => (pod.to_string(), host.to_string()),
            Answer::Never(shortage) => (pod.to_string(), format!("OutOf{}", shortage.resource)),
        })
        .collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
        .collect()
}

#[test]
fn replicas_of_one_owner_land_on_different_hosts() {
    let mut table = table([view(0, 4000, 4000), view(1, 4000, 4000)]);
    assert_eq!(
        room(table.claim(pod(0), ask(100, "web"))),
        pairs(&[("pod-0", "host-0")])
    );
    assert_eq!(
        room(table.claim(pod(1), ask(100, "web"))),
        pairs(&[("pod-1", "host-1")])
    );
    // Of another owner: the fullest host that has room.
    table.claim(pod(2), ask(3000, "db"));
    assert_eq!(
        room(table.claim(pod(3), ask(500, ""))),
        pairs(&[("pod-3", "host-0")])
    );
}

#[test]
fn a_claim_waits_until_there_is_room_and_older_claims_come_first() {
    let mut table = table([view(0, 1000, 1000)]);
    table.claim(pod(0), ask(800, ""));
    assert_eq!(room(table.claim(pod(1), ask(900, ""))), []);
    assert_eq!(room(table.claim(pod(2), ask(900, ""))), []);
    assert_eq!(room(table.release(&pod(0))), pairs(&[("pod-1", "host-0")]));
    assert_eq!(room(table.release(&pod(1))), pairs(&[("pod-2", "host-0")]));
}

#[test]
fn a_claim_that_fits_no_host_is_answered_at_once() {
    let mut table = table([view(0, 1000, 0), view(1, 2000, 2000)]);
    assert_eq!(
        room(table.claim(pod(0), ask(2001, ""))),
        pairs(&[("pod-0", "OutOfcpu")])
    );
    // But not while a host has not said what it has.
    let unheard = (name(2), HostView::default());
    let mut table = self::table([view(0, 1000, 1000), unheard]);
    assert_eq!(room(table.claim(pod(0), ask(2001, ""))), []);
}

#[test]
fn what_others_take_of_a_host_is_not_given_out() {
    let mut table = table([view(0, 1000, 300)]);
    assert_eq!(room(table.claim(pod(0), ask(400, ""))), []);
    let answers = table.set_hosts(&[view(0, 1000, 1000)].into());
    assert_eq!(room(answers), pairs(&[("pod-0", "host-0")]));
}

#[test]
fn a_host_out_of_reach_gets_nothing_new_and_keeps_what_it_has() {
    let mut silent = view(0, 1000, 1000);
    silent.1.reachable = false;
    let mut table = table([silent]);
    table.hold(pod(0), ask(600, ""), name(0));
    assert_eq!(room(table.claim(pod(1), ask(100, ""))), []);
    let answers = table.set_hosts(&[view(0, 1000, 400)].into());
    assert_eq!(room(answers), pairs(&[("pod-1", "host-0")]));
    assert_eq!(room(table.claim(pod(2), ask(400, ""))), []);
}

#[test]
fn a_host_that_is_short_of_something_gets_nothing_new() {
    let mut pressed = view(0, 1000, 1000);
    let host = Arc::make_mut(pressed.1.host.as_mut().unwrap());
    host.pressure.disk = true;
    let mut table = table([pressed, view(1, 300, 300)]);
    assert_eq!(
        room(table.claim(pod(0), ask(100, ""))),
        pairs(&[("pod-0", "host-1")])
    );
    // It fits the host that is short: it waits for that to pass.
    assert_eq!(room(table.claim(pod(1), ask(500, ""))), []);
    let answers = table.set_hosts(&[view(0, 1000, 1000), view(1, 300, 200)].into());
    assert_eq!(room(answers), pairs(&[("pod-1", "host-0")]));
}

#[test]
fn a_host_that_refused_a_pod_is_passed_over_for_a_while() {
    let mut table = table([view(0, 1000, 1000), view(1, 1000, 1000)]);
    table.claim(pod(0), ask(100, ""));
    table.refused(&pod(0), name(0));
    assert_eq!(
        room(table.claim(pod(0), ask(100, ""))),
        pairs(&[("pod-0", "host-1")])
    );
    table.refused(&pod(0), name(1));
    assert_eq!(room(table.claim(pod(0), ask(100, ""))), []);
    assert_eq!(room(table.retry()), pairs(&[("pod-0", "host-0")]));
}

#[derive(Debug, Clone)]
enum Step {
    Claim(usize, u64),
    Hold(usize, u64, usize),
    Release(usize),
    Refused(usize, usize),
    Retry,
}

proptest! {
    #[test]
    fn no_host_is_given_more_than_it_has(steps in prop::collection::vec(
        prop_oneof![
            (0..20usize, 0..1500u64).prop_map(|(p, c)| Step::Claim(p, c)),
            (0..20usize, 0..100u64, 0..3usize).prop_map(|(p, c, h)| Step::Hold(p, c, h)),
            (0..20usize).prop_map(Step::Release),
            (0..20usize, 0..3usize).prop_map(|(p, h)| Step::Refused(p, h)),
            Just(Step::Retry),
        ],
        0..80,
    )) {
        let mut table = table([view(0, 1000, 1000), view(1, 1000, 700), view(2, 500, 500)]);
        for step in steps {
            // What is held was decided elsewhere and may exceed; what is given may not.
            let answers = match step {
                Step::Claim(p, cpu) => table.claim(pod(p), ask(cpu, "web")),
                Step::Hold(p, cpu, h) => table.hold(pod(p), ask(cpu, "web"), name(h)),
                Step::Release(p) => table.release(&pod(p)),
                Step::Refused(p, h) => table.refused(&pod(p), name(h)),
                Step::Retry => table.retry(),
            };
            for (_, answer) in answers {
                if let Answer::Room(host) = answer {
                    let known = &table.hosts[&host];
                    let used = table.taken(&host).saturating_add(known.foreign);
                    prop_assert!(known.allocatable.unwrap().checked_sub(used).is_some());
                }
            }
        }
    }
}
