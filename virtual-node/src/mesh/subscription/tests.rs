use proptest::prelude::*;

use super::*;

fn resource(name: &str, body: &str) -> Resource {
    Resource::new(name, body.as_bytes().to_vec())
}

fn snapshot(resources: &[(&str, &str)]) -> Arc<Snapshot> {
    Arc::new(
        resources
            .iter()
            .map(|(name, body)| resource(name, body))
            .collect(),
    )
}

fn subscribe(names: &[&str]) -> Request {
    Request {
        subscribe: names.iter().map(|&n| n.to_owned()).collect(),
        ..Request::default()
    }
}

fn ack(answer: &Answer) -> Request {
    Request {
        nonce: answer.nonce.clone(),
        ..Request::default()
    }
}

/// The names in an answer: changed, then removed.
fn told(answer: Option<&Answer>) -> Option<(Vec<&str>, Vec<&str>)> {
    answer.map(|a| {
        (
            a.changed.iter().map(|r| &*r.name).collect(),
            a.removed.iter().map(|n| &**n).collect(),
        )
    })
}

fn send(subscription: &mut Subscription, request: Request) -> Verdict {
    subscription.request(request).unwrap()
}

#[test]
fn nobody_is_told_anything_unasked() {
    assert_eq!(Subscription::default().poll(&snapshot(&[("a", "1")])), None);
}

#[test]
fn a_first_answer_is_sent_even_if_there_is_nothing_to_tell() {
    let mut client = Subscription::default();
    send(&mut client, Request::default());
    let answer = client.poll(&snapshot(&[]));
    assert_eq!(told(answer.as_ref()), Some((vec![], vec![])));
}

#[test]
fn a_slow_client_gets_the_newest_state_once() {
    let mut client = Subscription::default();
    send(&mut client, Request::default());
    let first = client.poll(&snapshot(&[("a", "1"), ("b", "1")])).unwrap();
    for body in ["2", "3", "4"] {
        assert_eq!(client.poll(&snapshot(&[("a", body)])), None);
    }
    assert_eq!(send(&mut client, ack(&first)), Verdict::Accepted);
    let second = client.poll(&snapshot(&[("a", "4")])).unwrap();
    assert_eq!(told(Some(&second)), Some((vec!["a"], vec!["b"])));
    assert_eq!(&*second.changed[0].body, b"4");
    send(&mut client, ack(&second));
    assert_eq!(client.poll(&snapshot(&[("a", "4")])), None);
}

#[test]
fn a_client_that_reconnects_is_told_only_what_changed() {
    let now = snapshot(&[("a", "1"), ("b", "2"), ("c", "1")]);
    let mut client = Subscription::default();
    let version = |body: &str| Version::of(body.as_bytes()).to_string();
    send(
        &mut client,
        Request {
            held: [
                ("a".to_owned(), version("1")),
                ("b".to_owned(), version("1")),
                ("c".to_owned(), "of another control plane".to_owned()),
                ("gone".to_owned(), version("1")),
            ]
            .into(),
            ..Request::default()
        },
    );
    let answer = client.poll(&now);
    assert_eq!(told(answer.as_ref()), Some((vec!["b", "c"], vec!["gone"])));
}

#[test]
fn what_was_rejected_is_sent_again_only_when_it_changes() {
    let mut client = Subscription::default();
    send(&mut client, Request::default());
    let first = client.poll(&snapshot(&[("a", "bad")])).unwrap();
    let rejected = Request {
        rejected: Some("a: nonsense".to_owned()),
        ..ack(&first)
    };
    assert_eq!(
        send(&mut client, rejected.clone()),
        Verdict::Rejected {
            reason: "a: nonsense".to_owned()
        }
    );
    // Said twice, it is counted once.
    assert_eq!(send(&mut client, rejected), Verdict::None);
    assert_eq!(client.poll(&snapshot(&[("a", "bad")])), None);
    assert!(client.poll(&snapshot(&[("a", "good")])).is_some());
}

#[test]
fn an_old_nonce_acknowledges_nothing() {
    let mut client = Subscription::default();
    send(&mut client, Request::default());
    let first = client.poll(&snapshot(&[("a", "1")])).unwrap();
    send(&mut client, ack(&first));
    let second = client.poll(&snapshot(&[("a", "2")])).unwrap();
    for nonce in [&first.nonce, "", "x", "999"] {
        let request = Request {
            nonce: nonce.to_owned(),
            ..Request::default()
        };
        assert_eq!(send(&mut client, request), Verdict::None);
        assert_eq!(client.poll(&snapshot(&[("a", "3")])), None);
    }
    assert_eq!(send(&mut client, ack(&second)), Verdict::Accepted);
    assert!(client.poll(&snapshot(&[("a", "3")])).is_some());
}

#[test]
fn a_name_that_nothing_is_called_by_is_told_to_be_absent() {
    let mut client = Subscription::default();
    send(&mut client, subscribe(&["a", "nothing"]));
    let answer = client.poll(&snapshot(&[("a", "1"), ("b", "1")])).unwrap();
    assert_eq!(told(Some(&answer)), Some((vec!["a"], vec!["nothing"])));
    send(&mut client, ack(&answer));
    // It is not told again and again, but it is when it comes.
    assert_eq!(client.poll(&snapshot(&[("a", "1"), ("b", "2")])), None);
    let answer = client.poll(&snapshot(&[("a", "1"), ("nothing", "1")]));
    assert_eq!(told(answer.as_ref()), Some((vec!["nothing"], vec![])));
}

#[test]
fn on_demand_begins_with_a_wildcard_given_and_taken_back() {
    // As a ztunnel with XDS_ON_DEMAND does.
    let mut client = Subscription::default();
    let mut request = subscribe(&["*"]);
    request.unsubscribe = vec!["*".to_owned()];
    send(&mut client, request);
    let now = snapshot(&[("a", "1"), ("b", "1")]);
    let answer = client.poll(&now).unwrap();
    assert_eq!(told(Some(&answer)), Some((vec![], vec![])));
    send(&mut client, ack(&answer));
    send(&mut client, subscribe(&["b"]));
    let answer = client.poll(&now);
    assert_eq!(told(answer.as_ref()), Some((vec!["b"], vec![])));
}

#[test]
fn a_name_asked_for_again_is_sent_again() {
    let now = snapshot(&[("a", "1"), ("b", "1")]);
    for first in [subscribe(&["a", "b"]), Request::default()] {
        let mut client = Subscription::default();
        send(&mut client, first);
        let answer = client.poll(&now).unwrap();
        send(&mut client, ack(&answer));
        send(&mut client, subscribe(&["a"]));
        let answer = client.poll(&now);
        assert_eq!(told(answer.as_ref()), Some((vec!["a"], vec![])));
    }
}

#[test]
fn a_wildcard_repeated_with_each_ack_does_not_run_in_circles() {
    let now = snapshot(&[("a", "1")]);
    let mut client = Subscription::default();
    send(&mut client, subscribe(&["*"]));
    let answer = client.poll(&now).unwrap();
    let mut request = ack(&answer);
    request.subscribe = vec!["*".to_owned()];
    send(&mut client, request);
    assert_eq!(client.poll(&now), None);
}

#[test]
fn a_subscription_has_bounds() {
    let mut client = Subscription::default();
    assert_eq!(
        client.request(subscribe(&[&"x".repeat(MAX_NAME_BYTES + 1)])),
        Err(Refusal::NameTooLong)
    );
    let mut client = Subscription::default();
    let many = Request {
        subscribe: (0..=MAX_NAMES).map(|n| n.to_string()).collect(),
        ..Request::default()
    };
    assert_eq!(client.request(many), Err(Refusal::TooManyNames));
}

/// What a client holds.
type View = BTreeMap<Arc<str>, Arc<Resource>>;

/// A client as the protocol has it: a view, and what it subscribed to.
#[derive(Default)]
struct Client {
    wildcard: bool,
    names: BTreeSet<String>,
    view: View,
    /// The answer on its way.
    arriving: Option<Answer>,
}

impl Client {
    /// Forgets at once what it is no longer subscribed to, as far as it knows.
    fn drop_unsubscribed(&mut self) {
        if !self.wildcard {
            let mut known = Snapshot::default();
            self.view.values().for_each(|r| known.set((**r).clone()));
            self.view = known.select(&self.names);
        }
    }

    fn take(&mut self, answer: &Answer) {
        for name in &answer.removed {
            self.view.remove(name);
        }
        for resource in &answer.changed {
            self.view.insert(Arc::clone(&resource.name), Arc::clone(resource));
        }
    }

    fn hello(&self) -> Request {
        let mut subscribe: Vec<String> = self.names.iter().cloned().collect();
        let mut unsubscribe = Vec::new();
        subscribe.push("*".to_owned());
        if !self.wildcard {
            unsubscribe.push("*".to_owned());
        }
        Request {
            subscribe,
            unsubscribe,
            held: self
                .view
                .iter()
                .map(|(name, r)| (name.to_string(), r.version.to_string()))
                .collect(),
            ..Request::default()
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    SetPod {
        pod: u8,
        body: u8,
        services: u8,
    },
    RemovePod(u8),
    SetService {
        service: u8,
        body: u8,
    },
    RemoveService(u8),
    Subscribe(Vec<String>),
    Unsubscribe(Vec<String>),
    /// The answer on its way arrives and is acknowledged.
    Deliver,
    /// The stream breaks, with what was on its way.
    Reconnect,
}

fn steps() -> impl Strategy<Value = Step> {
    let name = || {
        prop_oneof![
            1 => Just("*".to_owned()),
            2 => (0..4u8).prop_map(|n| format!("pod/{n}")),
            2 => (0..4u8).prop_map(|n| format!("/10.0.0.{n}")),
            2 => (0..2u8).prop_map(|n| format!("svc/{n}")),
            1 => (0..2u8).prop_map(|n| format!("/10.96.0.{n}")),
            1 => Just("nothing".to_owned()),
        ]
    };
    prop_oneof![
        4 => (0..4u8, 0..3u8, 0..4u8).prop_map(|(pod, body, services)| Step::SetPod { pod, body, services }),
        1 => (0..4u8).prop_map(Step::RemovePod),
        2 => (0..2u8, 0..3u8).prop_map(|(service, body)| Step::SetService { service, body }),
        1 => (0..2u8).prop_map(Step::RemoveService),
        2 => prop::collection::vec(name(), 1..3).prop_map(Step::Subscribe),
        2 => prop::collection::vec(name(), 1..3).prop_map(Step::Unsubscribe),
        5 => Just(Step::Deliver),
        1 => Just(Step::Reconnect),
    ]
}

fn change(snapshot: &mut Snapshot, step: &Step) {
    match step {
        Step::SetPod { pod, body, services } => {
            let groups: Box<[Arc<str>]> = (0..2)
                .filter(|n| services & (1 << n) != 0)
                .map(|n| format!("svc/{n}").into())
                .collect();
            snapshot.set(Resource {
                aliases: [format!("/10.0.0.{pod}").into()].into(),
                groups: groups.clone(),
                ..resource(&format!("pod/{pod}"), &format!("{body} {groups:?}"))
            });
        }
        Step::SetService { service, body } => snapshot.set(Resource {
            aliases: [format!("/10.96.0.{service}").into()].into(),
            ..resource(&format!("svc/{service}"), &body.to_string())
        }),
        Step::RemovePod(pod) => snapshot.remove(&format!("pod/{pod}")),
        Step::RemoveService(service) => snapshot.remove(&format!("svc/{service}")),
        _ => {}
    }
}

/// Plays the steps and lets the world hold still. What the client's view is then,
/// and what it ought to be.
fn play(wildcard: bool, steps: &[Step]) -> Result<[View; 2], &'static str> {
    let mut snapshot = Arc::new(Snapshot::default());
    let mut client = Client {
        wildcard,
        ..Client::default()
    };
    let mut server = Subscription::default();
    send(&mut server, client.hello());
    let deliver = |client: &mut Client, server: &mut Subscription| {
        if let Some(answer) = client.arriving.take() {
            client.take(&answer);
            send(server, ack(&answer));
        }
    };
    for step in steps {
        change(Arc::make_mut(&mut snapshot), step);
        match step {
            Step::Subscribe(names) => {
                for name in names {
                    match name.as_str() {
                        "*" => client.wildcard = true,
                        _ => drop(client.names.insert(name.clone())),
                    }
                }
                let request = Request {
                    subscribe: names.clone(),
                    ..Request::default()
                };
                send(&mut server, request);
            }
            Step::Unsubscribe(names) => {
                for name in names {
                    match name.as_str() {
                        "*" => client.wildcard = false,
                        _ => drop(client.names.remove(name)),
                    }
                }
                client.drop_unsubscribed();
                let request = Request {
                    unsubscribe: names.clone(),
                    ..Request::default()
                };
                send(&mut server, request);
            }
            Step::Deliver => deliver(&mut client, &mut server),
            Step::Reconnect => {
                client.arriving = None;
                server = Subscription::default();
                send(&mut server, client.hello());
            }
            _ => {}
        }
        if let Some(answer) = server.poll(&snapshot)
            && client.arriving.replace(answer).is_some()
        {
            return Err("two answers on their way");
        }
    }
    // It takes at most the answer on its way and one more.
    for _ in 0..2 {
        deliver(&mut client, &mut server);
        client.arriving = server.poll(&snapshot);
    }
    deliver(&mut client, &mut server);
    if server.poll(&snapshot).is_some() {
        return Err("it comes to no rest");
    }
    let wanted = if client.wildcard {
        snapshot
            .iter()
            .map(|r| (Arc::clone(&r.name), Arc::clone(r)))
            .collect()
    } else {
        snapshot.select(&client.names)
    };
    Ok([client.view, wanted])
}

/// A client that reports at its reconnect what came too late to be dropped, and
/// drops it with a request that changes nothing of its subscription.
#[test]
fn what_is_dropped_with_a_needless_unsubscription_is_sent_again() {
    let subscribe = |name: &str| Step::Subscribe(vec![name.to_owned()]);
    let unsubscribe = |name: &str| Step::Unsubscribe(vec![name.to_owned()]);
    let steps = [
        subscribe("svc/0"),
        unsubscribe("*"),
        subscribe("pod/3"),
        Step::SetPod {
            pod: 3,
            body: 0,
            services: 1,
        },
        Step::Deliver,
        unsubscribe("pod/3"),
        Step::Deliver,
        Step::SetService { service: 0, body: 0 },
        Step::Reconnect,
        unsubscribe("*"),
    ];
    for wildcard in [true, false] {
        let [view, wanted] = play(wildcard, &steps).unwrap();
        assert_eq!(view, wanted);
        assert_eq!(view.len(), 2, "the Service and its endpoint");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_clients_view_ends_as_what_it_subscribed_to(
        wildcard: bool,
        steps in prop::collection::vec(steps(), 0..60),
    ) {
        let [view, wanted] = play(wildcard, &steps).map_err(TestCaseError::fail)?;
        prop_assert_eq!(view, wanted);
    }
}
