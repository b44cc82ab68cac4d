use hickory_proto::op::{MessageType, Query};
use mesh_api::istio::workload as wire;
use proptest::prelude::*;

use super::*;
use crate::state::{Change, Interner, Service, State, Workload};

fn zone() -> Zone {
    Zone {
        domain: "cluster.local".into(),
        network: "".into(),
        cluster_pods: "10.77.0.0/16".parse().unwrap(),
    }
}

fn pod(name: &str, ip: [u8; 4], service: &str) -> Change {
    let wire = wire::Workload {
        uid: format!("u/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![ip.to_vec()],
        services: [(
            format!("shop/{service}.shop.svc.cluster.local"),
            wire::PortList::default(),
        )]
        .into(),
        ..Default::default()
    };
    Change::Workload(Arc::new(
        Workload::parse(&wire, &mut Interner::default()).unwrap(),
    ))
}

fn service(hostname: &str, vips: &[[u8; 4]]) -> Change {
    let wire = wire::Service {
        namespace: "shop".to_owned(),
        hostname: hostname.to_owned(),
        addresses: vips
            .iter()
            .map(|ip| wire::NetworkAddress {
                address: ip.to_vec(),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    Change::Service(Arc::new(Service::parse(&wire, &mut Interner::default()).unwrap()))
}

fn state() -> State {
    let mut state = State::default();
    state.apply([
        service("web.shop.svc.cluster.local", &[[10, 96, 0, 80]]),
        service("db.shop.svc.cluster.local", &[]),
        service("idle.shop.svc.cluster.local", &[]),
        service("api.example.com", &[[10, 96, 0, 90]]),
        pod("web-0", [10, 77, 1, 5], "web"),
        pod("db-0", [10, 77, 1, 6], "db"),
        pod("db-1", [10, 77, 2, 7], "db"),
    ]);
    state
}

fn question(name: &str, query_type: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), query_type));
    message
}

fn ask(message: &Message) -> Answer {
    let client = Client {
        namespace: "shop".into(),
    };
    answer(message, &zone(), state().snapshot(), &client, 0)
}

/// The code, and the records' data in order of their text.
fn reply(name: &str, query_type: RecordType) -> (ResponseCode, Vec<String>) {
    match ask(&question(name, query_type)) {
        Answer::PassOn => panic!("{name} was passed on"),
        Answer::Reply(reply) => {
            let mut data: Vec<_> = reply.answers.iter().map(|r| r.data.to_string()).collect();
            data.sort();
            (reply.metadata.response_code, data)
        }
    }
}

fn passed_on(name: &str, query_type: RecordType) -> bool {
    matches!(ask(&question(name, query_type)), Answer::PassOn)
}

#[test]
fn cluster_names_are_answered_from_the_state() {
    use RecordType as T;
    use ResponseCode::{NXDomain, NoError};
    let table: &[(&str, T, ResponseCode, &[&str])] = &[
        ("web.shop.svc.cluster.local.", T::A, NoError, &["10.96.0.80"]),
        ("WEB.Shop.svc.Cluster.Local.", T::A, NoError, &["10.96.0.80"]),
        ("web.shop.svc.cluster.local.", T::AAAA, NoError, &[]),
        ("web.shop.svc.cluster.local.", T::MX, NoError, &[]),
        (
            "db.shop.svc.cluster.local.",
            T::A,
            NoError,
            &["10.77.1.6", "10.77.2.7"],
        ),
        ("idle.shop.svc.cluster.local.", T::A, NoError, &[]),
        ("db-1.db.shop.svc.cluster.local.", T::A, NoError, &["10.77.2.7"]),
        (
            "10-77-1-6.db.shop.svc.cluster.local.",
            T::A,
            NoError,
            &["10.77.1.6"],
        ),
        ("db-9.db.shop.svc.cluster.local.", T::A, NXDomain, &[]),
        ("web-0.web.shop.svc.cluster.local.", T::A, NXDomain, &[]),
        ("_http._tcp.web.shop.svc.cluster.local.", T::SRV, NoError, &[]),
        ("_http._tcp.no.shop.svc.cluster.local.", T::SRV, NXDomain, &[]),
        ("10-77-1-5.shop.pod.cluster.local.", T::A, NoError, &["10.77.1.5"]),
        ("10-77-1-5.other.pod.cluster.local.", T::A, NXDomain, &[]),
        ("10-77-9-9.shop.pod.cluster.local.", T::A, NXDomain, &[]),
        ("no.shop.svc.cluster.local.", T::A, NXDomain, &[]),
        ("example.com.shop.svc.cluster.local.", T::A, NXDomain, &[]),
        ("cluster.local.", T::A, NoError, &[]),
        ("svc.cluster.local.", T::A, NoError, &[]),
        ("api.example.com.", T::A, NoError, &["10.96.0.90"]),
        (
            "80.0.96.10.in-addr.arpa.",
            T::PTR,
            NoError,
            &["web.shop.svc.cluster.local."],
        ),
        ("9.9.77.10.in-addr.arpa.", T::PTR, NXDomain, &[]),
        ("web.shop.svc.cluster.local.", T::PTR, NoError, &[]),
        ("no.shop.svc.cluster.local.", T::PTR, NXDomain, &[]),
    ];
    for (name, query_type, code, data) in table {
        let data: Vec<String> = data.iter().map(|d| (*d).to_owned()).collect();
        assert_eq!(reply(name, *query_type), (*code, data), "{name} {query_type}");
    }
}

#[test]
fn other_names_are_passed_on_and_cluster_names_never_are() {
    for (name, query_type) in [
        ("example.com.", RecordType::A),
        ("notcluster.local.", RecordType::A),
        ("cluster.local.example.com.", RecordType::A),
        (".", RecordType::NS),
        ("1.2.0.192.in-addr.arpa.", RecordType::PTR),
    ] {
        assert!(passed_on(name, query_type), "{name} {query_type}");
    }
    let zone = zone();
    assert!(zone.owns(&question("x.Cluster.LOCAL.", RecordType::A)));
    assert!(!zone.owns(&question("x.cluster.local.com.", RecordType::A)));
}

#[test]
fn an_answer_is_authoritative_and_echoes_what_was_asked() {
    let mut asked = question("Web.shop.svc.cluster.local.", RecordType::A);
    asked.edns = Some(Edns::new());
    let Answer::Reply(reply) = ask(&asked) else {
        panic!("passed on")
    };
    assert_eq!(reply.metadata.id, 7);
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
    assert!(reply.metadata.recursion_desired);
    assert_eq!(reply.queries, asked.queries);
    assert_eq!(reply.answers[0].name.to_ascii(), "Web.shop.svc.cluster.local.");
    assert_eq!(reply.answers[0].ttl, TTL);
    assert!(reply.edns.is_some());
    let Answer::Reply(without) = ask(&question("no.cluster.local.", RecordType::A)) else {
        panic!("passed on")
    };
    assert!(without.edns.is_none());
    assert_eq!(without.authorities[0].record_type(), RecordType::SOA);
}

#[test]
fn every_endpoint_comes_first_for_somebody() {
    let client = Client {
        namespace: "shop".into(),
    };
    let state = state();
    let asked = question("db.shop.svc.cluster.local.", RecordType::A);
    let first: std::collections::BTreeSet<String> = (0..2)
        .map(
            |shuffle| match answer(&asked, &zone(), state.snapshot(), &client, shuffle) {
                Answer::Reply(reply) => reply.answers[0].data.to_string(),
                Answer::PassOn => panic!("passed on"),
            },
        )
        .collect();
    assert_eq!(first.len(), 2);
}

#[test]
fn what_is_not_one_plain_question_is_refused() {
    let mut two = question("a.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("b.").unwrap(), RecordType::A));
    let none = Message::new(1, MessageType::Query, OpCode::Query);
    let mut update = question("a.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    for (message, code) in [
        (two, ResponseCode::FormErr),
        (none, ResponseCode::FormErr),
        (update, ResponseCode::NotImp),
    ] {
        let Answer::Reply(reply) = ask(&message) else {
            panic!("passed on")
        };
        assert_eq!(reply.metadata.response_code, code);
    }
}

proptest! {
    #[test]
    fn any_bytes_that_parse_are_answered_or_passed_on(bytes: Vec<u8>, shuffle: u64) {
        if let Ok(message) = Message::from_vec(&bytes) {
            let client = Client { namespace: "shop".into() };
            if let Answer::Reply(reply) = answer(&message, &zone(), state().snapshot(), &client, shuffle) {
                reply.to_vec().unwrap();
            }
        }
    }

    #[test]
    fn any_name_is_answered_or_passed_on(name in "([a-z0-9_-]{1,12}\\.){0,6}(cluster\\.local\\.|example\\.|in-addr\\.arpa\\.)", kind in 0..300u16) {
        if let Ok(parsed) = Name::from_ascii(&name) {
            let mut message = Message::new(1, MessageType::Query, OpCode::Query);
            message.add_query(Query::query(parsed, RecordType::from(kind)));
            match ask(&message) {
                Answer::Reply(reply) => { reply.to_vec().unwrap(); }
                Answer::PassOn => prop_assert!(!name.ends_with("cluster.local.")),
            }
        }
    }
}
