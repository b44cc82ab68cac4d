//! Names, as a pod asks for them.

use std::net::{Ipv4Addr, SocketAddr};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
};

use mesh_runtime::limits::Limits;

use crate::lab::{DNS, Lab, NAMESERVER, Pod, VIP, hostname, service, until, within};

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

fn read(answer: &[u8]) -> (ResponseCode, Vec<String>) {
    let message = Message::from_vec(answer).unwrap();
    assert_eq!(message.metadata.id, 77);
    let mut data: Vec<_> = message.answers.iter().map(|r| r.data.to_string()).collect();
    data.sort();
    (message.metadata.response_code, data)
}

async fn ask_udp(pod: &Pod, bytes: &[u8]) -> Vec<u8> {
    let socket = pod.space.udp((pod.address, 0));
    socket.connect(SocketAddr::from((DNS, 53))).await.unwrap();
    socket.send(bytes).await.unwrap();
    let mut buffer = vec![0; 4096];
    // Connected, it only takes an answer that comes from where it asked.
    let length = within("an answer", socket.recv(&mut buffer)).await.unwrap();
    buffer.truncate(length);
    buffer
}

async fn ask(pod: &Pod, name: &str) -> (ResponseCode, Vec<String>) {
    read(&ask_udp(pod, &question(name)).await)
}

async fn ask_tcp(pod: &Pod, names: &[&str]) -> Vec<(ResponseCode, Vec<String>)> {
    let mut stream = within("connect", pod.connect((DNS, 53))).await.unwrap();
    let mut answers = Vec::new();
    for name in names {
        let bytes = question(name);
        stream.write_u16(bytes.len() as u16).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let length = within("an answer", stream.read_u16()).await.unwrap();
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await.unwrap();
        answers.push(read(&answer));
    }
    answers
}

/// A name server that knows one name, after so many questions it did not hear.
async fn nameserver(socket: UdpSocket, mut deaf: usize) {
    let mut buffer = vec![0; 4096];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
        if deaf > 0 {
            deaf -= 1;
            continue;
        }
        let Ok(question) = Message::from_vec(&buffer[..length]) else {
            continue;
        };
        let name = question.queries[0].name.clone();
        if name.to_ascii().ends_with(".slow.") {
            continue;
        }
        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.queries = question.queries.clone();
        if name.to_ascii() == "example.com." {
            let address = RData::A(A(Ipv4Addr::new(198, 51, 100, 7)));
            answer.add_answer(Record::from_rdata(name, 60, address));
        } else {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        // Somebody who only guesses comes first, and is not believed.
        let mut forged = answer.to_vec().unwrap();
        forged[0] ^= 0x55;
        socket.send_to(&forged, peer).await.unwrap();
        socket.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_services_and_of_the_world_are_answered_over_udp_and_tcp() {
    let lab = Lab::new().await;
    let pod = lab.pod(0, "client").await;
    let db = lab.pod(1, "db-0").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.service(service("db", &[], &[(5432, 5432)]));
    lab.control.workload(db.endpoint_of("db", &[]));
    lab.control.settled().await;
    tokio::spawn(nameserver(lab.wire.udp((NAMESERVER, 53)), 1));

    let web = format!("{}.", hostname("web"));
    let found = |ip: Ipv4Addr| (ResponseCode::NoError, vec![ip.to_string()]);
    assert_eq!(ask(&pod, &web).await, found(VIP));
    assert_eq!(
        ask(&pod, &format!("{}.", hostname("db"))).await,
        found(db.address)
    );
    assert_eq!(
        ask(&pod, "no.shop.svc.cluster.local.").await,
        (ResponseCode::NXDomain, vec![])
    );
    assert_eq!(
        ask(&pod, "example.com.").await,
        found(Ipv4Addr::new(198, 51, 100, 7))
    );
    assert_eq!(ask(&pod, "example.org.").await, (ResponseCode::NXDomain, vec![]));
    assert_eq!(
        ask_tcp(&pod, &[&web, "no.shop.svc.cluster.local."]).await,
        [found(VIP), (ResponseCode::NXDomain, vec![])]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_is_silent_is_told_as_a_failure() {
    let lab = Lab::new().await;
    let pod = lab.pod(0, "client").await;
    lab.control.settled().await;
    let _silent = lab.wire.udp((NAMESERVER, 53));
    assert_eq!(ask(&pod, "example.com.").await, (ResponseCode::ServFail, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_questions_are_refused_or_ignored_and_the_next_is_answered() {
    let lab = Lab::new().await;
    let pod = lab.pod(0, "client").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.settled().await;
    let web = format!("{}.", hostname("web"));
    let socket = pod.space.udp((pod.address, 0));
    socket.connect(SocketAddr::from((DNS, 53))).await.unwrap();
    let good = question(&web);
    let mut answer = good.clone();
    answer[2] |= 0x80;
    // A name that points at itself.
    let mut pointer = good[..12].to_vec();
    pointer.extend(b"\xc0\x0c\x00\x01\x00\x01");
    let mut many = good.clone();
    many[4..6].copy_from_slice(&[0xff, 0xff]);
    let hostile: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        good[..11].to_vec(),
        good[..good.len() - 1].to_vec(),
        answer,
        pointer,
        many,
        vec![0xff; 4096],
        vec![0; 60_000],
    ];
    for bytes in &hostile {
        // Too large to send at all is refused too.
        let _sent = socket.send(bytes).await;
    }
    until("a good question is answered", async || {
        ask(&pod, &web).await == (ResponseCode::NoError, vec![VIP.to_string()])
    })
    .await;
    let mut stream = pod.connect((DNS, 53)).await.unwrap();
    stream.write_all(b"\xff\xff not that long").await.unwrap();
    let mut second = pod.connect((DNS, 53)).await.unwrap();
    second.write_all(b"\x00\x05hello").await.unwrap();
    assert_eq!(within("the end", second.read(&mut [0; 16])).await.unwrap(), 0);
    assert_eq!(
        ask_tcp(&pod, &[&web]).await,
        [(ResponseCode::NoError, vec![VIP.to_string()])]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_floods_the_resolver_keeps_no_other_from_an_answer() {
    let lab = Lab::within(Limits {
        pods: 4,
        questions: 40,
        questions_promised: 3,
        ..Limits::default()
    })
    .await;
    let greedy = lab.pod(0, "greedy").await;
    let modest = lab.pod(0, "modest").await;
    lab.control.settled().await;
    tokio::spawn(nameserver(lab.wire.udp((NAMESERVER, 53)), 0));
    let flood = greedy.space.udp((greedy.address, 0));
    flood.connect(SocketAddr::from((DNS, 53))).await.unwrap();
    let refused = || {
        let text = lab.metrics(0);
        let line = text
            .lines()
            .find(|l| l.starts_with("mesh_bound_refusals_total{bound=\"questions\",level=\"pod\"}"));
        line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse::<u32>().unwrap())
    };
    let mut open = Vec::new();
    for round in 0..3 {
        // Nobody answers these.
        for n in 0..40 {
            flood
                .send(&question(&format!("q{n}.r{round}.slow.")))
                .await
                .unwrap();
        }
        // Connections on which nothing is asked.
        for _ in 0..10 {
            open.push(greedy.connect((DNS, 53)).await);
        }
        until("it is refused", async || refused() > 0).await;
        let found = (ResponseCode::NoError, vec!["198.51.100.7".to_owned()]);
        assert_eq!(ask(&modest, "example.com.").await, found);
    }
    let web = format!("{}.", hostname("web"));
    let answers = ask_tcp(&modest, &[&web]).await;
    assert_eq!(answers, [(ResponseCode::NXDomain, vec![])]);
}
