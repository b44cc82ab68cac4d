//! Pods that opted out: they have a plain network, and Services.

use std::{io::ErrorKind, net::SocketAddr};

use mesh_runtime::redirect::Reason;

use crate::{
    frame::{self, Frame, ICMP, TCP, UDP, contains},
    lab::{
        DEADLINE, DNS, Lab, REFUSAL, REMOTE_POD, STRANGER, UPLINK, VIP, count, echo, eventually, greeting,
        serve,
    },
};

const MARKER: &[u8] = b"a marker";

#[tokio::test(flavor = "multi_thread")]
async fn an_unmeshed_pod_reaches_others_by_itself() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (one, two) = (lab.pod(2), lab.pod(3));
    for pod in [&one, &two] {
        router.attach(pod.unmeshed()).await.unwrap();
    }
    let _stranger = serve(&lab.outside, STRANGER, 443);
    let _remote = serve(&lab.outside, REMOTE_POD, 15008);
    let _local = serve(lab.space(&two), two.address, 8080);
    for to in [(STRANGER, 443), (REMOTE_POD, 15008), (two.address, 8080)] {
        let stream = lab.space(&one).connect(to, DEADLINE).unwrap();
        let said = greeting(&stream);
        assert_eq!(said.listener, "server", "{to:?}");
        assert_eq!(said.peer, stream.local_addr().unwrap());
    }
    // And is reached.
    let stream = lab.outside.dial(REMOTE_POD, (two.address, 8080)).unwrap();
    let said = greeting(&stream);
    assert_eq!(
        (said.listener.as_str(), said.peer.ip()),
        ("server", REMOTE_POD.into())
    );

    let server = lab.outside.udp(REMOTE_POD, 9999);
    lab.space(&one)
        .udp(one.address, 0)
        .send_to(b"udp", (REMOTE_POD, 9999))
        .unwrap();
    let mut buffer = [0; 8];
    assert_eq!(server.recv_from(&mut buffer).unwrap().1.ip(), one.address);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmeshed_pod_is_held_to_its_own_addresses() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (pod, enrolled) = (lab.pod(2), lab.pod(3));
    router.attach(pod.unmeshed()).await.unwrap();
    router.attach(enrolled.enrolled()).await.unwrap();
    router.set_services([VIP]).await.unwrap();

    let udp = |to| pod.frame(to, UDP, frame::udp(1234, 9999, MARKER));
    let syn = |to| pod.frame(to, TCP, frame::tcp_syn(1234, 80));
    let echo = pod.frame(enrolled.address, ICMP, frame::icmp(8, 0, [0; 4], MARKER));
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<u8>, Reason)> = vec![
        ("an enrolled pod's address", Frame { source: enrolled.address, ..udp(STRANGER) }.bytes(), Reason::SourceAddress),
        ("an enrolled pod's MAC", Frame { from: enrolled.mac, ..udp(STRANGER) }.bytes(), Reason::SourceMac),
        ("IPv6", Frame { ethertype: 0x86dd, ..udp(STRANGER) }.bytes(), Reason::Ipv6),
        ("TCP fragment", Frame { fragment: 3, ..syn(STRANGER) }.bytes(), Reason::Fragment),
        ("UDP to an enrolled pod", udp(enrolled.address).bytes(), Reason::UdpToPod),
        ("UDP fragment to an enrolled pod", Frame { fragment: 3, ..udp(enrolled.address) }.bytes(), Reason::UdpToPod),
        ("echo to an enrolled pod", echo.bytes(), Reason::IcmpToPod),
        ("UDP to a Service", udp(VIP).bytes(), Reason::NotTcpToService),
        ("UDP to the host", udp(crate::lab::HOST).bytes(), Reason::HostLocal),
        ("TCP to the host", syn(crate::lab::HOST).bytes(), Reason::HostLocal),
    ];
    let tap = lab.space(&pod).tap("eth0");
    let outside = lab.outside.tap(UPLINK);
    let next_door = lab.space(&enrolled).tap("eth0");
    for (name, bytes, reason) in cases {
        let before = count(&router.drops(), reason);
        tap.send(&bytes).unwrap();
        eventually(name, || count(&router.drops(), reason) > before);
    }
    for tap in [outside, next_door] {
        assert!(!tap.drain().iter().any(|frame| contains(frame, MARKER)));
    }
    // A datagram too long for one packet is its own business.
    let outside = lab.outside.tap(UPLINK);
    tap.send(
        &Frame {
            fragment: 0x2000,
            ..udp(STRANGER)
        }
        .bytes(),
    )
    .unwrap();
    assert!(outside.find(DEADLINE, |frame| contains(frame, MARKER)).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_works_from_an_unmeshed_pod() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.unmeshed()).await.unwrap();
    let space = lab.space(&pod);

    // Not known yet: forwarded, and there is nobody.
    assert!(space.connect((VIP, 80), REFUSAL).is_err());
    router.set_services([VIP]).await.unwrap();
    let stream = space.connect((VIP, 80), DEADLINE).unwrap();
    let said = greeting(&stream);
    assert_eq!(said.listener, "outbound");
    assert_eq!(said.local, SocketAddr::from((VIP, 80)));
    assert_eq!(said.peer, stream.local_addr().unwrap());
    // Known no more.
    router.set_services([]).await.unwrap();
    assert!(space.connect((VIP, 80), REFUSAL).is_err());

    let socket = space.udp(pod.address, 0);
    socket.send_to(b"who?", (DNS, 53)).unwrap();
    let mut buffer = [0; 64];
    assert_eq!(
        socket.recv_from(&mut buffer).unwrap().1,
        SocketAddr::from((DNS, 53))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_in_an_unmeshed_pods_name_and_its_own_connections_are_kept_apart() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (client, server) = (lab.pod(2), lab.pod(3));
    for pod in [&client, &server] {
        router.attach(pod.unmeshed()).await.unwrap();
    }
    let _remote = serve(&lab.outside, REMOTE_POD, 8080);
    let _local = serve(lab.space(&server), server.address, 8080);
    for to in [(REMOTE_POD, 8080), (server.address, 8080)] {
        let own = lab.space(&client).connect(to, DEADLINE).unwrap();
        let relay = lab.router.dial(client.address, to).unwrap();
        for stream in [&own, &relay] {
            let said = greeting(stream);
            assert_eq!(
                (said.listener.as_str(), said.peer.ip()),
                ("server", client.address.into())
            );
            assert_eq!(echo(stream, "hello").unwrap(), "hello");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmeshed_pod_comes_to_an_enrolled_one_of_its_host_like_any_stranger() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (unmeshed, enrolled) = (lab.pod(2), lab.pod(3));
    router.attach(unmeshed.unmeshed()).await.unwrap();
    router.attach(enrolled.enrolled()).await.unwrap();
    let _never = serve(lab.space(&enrolled), enrolled.address, 8080);
    for (port, listener) in [(8080, "inbound"), (15008, "hbone")] {
        let stream = lab
            .space(&unmeshed)
            .connect((enrolled.address, port), DEADLINE)
            .unwrap();
        let said = greeting(&stream);
        assert_eq!(said.listener, listener);
        assert_eq!(said.peer.ip(), unmeshed.address);
    }
    // The other way round it is the enrolled pod's outbound, and the proxy's own
    // connection to the unmeshed pod gets its answers.
    let _server = serve(lab.space(&unmeshed), unmeshed.address, 8080);
    let stream = lab
        .space(&enrolled)
        .connect((unmeshed.address, 8080), DEADLINE)
        .unwrap();
    assert_eq!(greeting(&stream).listener, "outbound");
    let upstream = lab
        .router
        .dial(enrolled.address, (unmeshed.address, 8080))
        .unwrap();
    assert_eq!(greeting(&upstream).peer.ip(), enrolled.address);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_port_of_an_unmeshed_pod_refuses_at_once() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.unmeshed()).await.unwrap();
    let error = lab.outside.dial(STRANGER, (pod.address, 20_000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}
