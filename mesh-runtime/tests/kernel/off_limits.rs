//! The pool's own addresses: hosts, infrastructure, other tenants' pods. None is a
//! pod's to reach, by whatever protocol, in the mesh or out of it, and nobody who has
//! one comes in but a workload of the tenant's, and the mesh.

use std::{io::ErrorKind, net::Ipv4Addr};

use mesh_runtime::redirect::Reason;

use crate::{
    frame::{self, Frame, ICMP, TCP, UDP, contains},
    lab::{
        ALLOWED, DEADLINE, FOREIGN_POD, Lab, OTHER_HOST, OUTSIDE_MAC, Pod, REFUSAL, REMOTE_POD, STRANGER,
        UPLINK, UPLINK_MAC, count, echo, eventually, greeting, serve,
    },
};

const MARKER: &[u8] = b"must not get there";
/// Azure's wire server: off limits in every pool.
const METADATA: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);
const AGENT_PORT: u16 = 7443;

fn udp(pod: &Pod, to: (Ipv4Addr, u16)) -> Frame {
    pod.frame(to.0, UDP, frame::udp(1234, to.1, MARKER))
}

fn ping(pod: &Pod, to: Ipv4Addr) -> Frame {
    pod.frame(to, ICMP, frame::icmp(8, 0, [0, 1, 0, 1], MARKER))
}

fn syn(pod: &Pod, to: (Ipv4Addr, u16)) -> Frame {
    pod.frame(to.0, TCP, frame::tcp_syn(1234, to.1))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_of_a_pod_gets_to_what_is_off_limits() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (meshed, plain) = (lab.pod(2), lab.pod(3));
    router.attach(meshed.enrolled()).await.unwrap();
    router.attach(plain.unmeshed()).await.unwrap();

    let fragment = |frame: Frame| Frame {
        fragment: 0x2000,
        ..frame
    };
    #[rustfmt::skip]
    let cases: Vec<(&str, &Pod, Frame, Reason)> = vec![
        ("plain: TCP to another host's agent", &plain, syn(&plain, (OTHER_HOST, AGENT_PORT)), Reason::OffLimits),
        ("plain: TCP to another port of the API server", &plain, syn(&plain, (ALLOWED.0, 2379)), Reason::OffLimits),
        ("plain: TCP to a metadata service", &plain, syn(&plain, (METADATA, 80)), Reason::OffLimits),
        ("plain: TCP to another tenant's pod", &plain, syn(&plain, (FOREIGN_POD, 8080)), Reason::OffLimits),
        ("plain: a tunnel to another tenant's pod", &plain, syn(&plain, (FOREIGN_POD, 15008)), Reason::OffLimits),
        ("plain: UDP to another host", &plain, udp(&plain, (OTHER_HOST, 53)), Reason::OffLimits),
        ("plain: UDP to another tenant's pod", &plain, udp(&plain, (FOREIGN_POD, 53)), Reason::OffLimits),
        ("plain: a fragment to what is allowed", &plain, fragment(udp(&plain, ALLOWED)), Reason::OffLimits),
        ("plain: echo to another host", &plain, ping(&plain, OTHER_HOST), Reason::OffLimits),
        ("plain: echo to another tenant's pod", &plain, ping(&plain, FOREIGN_POD), Reason::OffLimits),
        ("plain: SCTP to another host", &plain, Frame { protocol: 132, ..udp(&plain, (OTHER_HOST, 53)) }, Reason::OffLimits),
        ("meshed: UDP to another host", &meshed, udp(&meshed, (OTHER_HOST, 53)), Reason::OffLimits),
        ("meshed: UDP to a metadata service", &meshed, udp(&meshed, (METADATA, 53)), Reason::OffLimits),
        ("meshed: echo to another host", &meshed, ping(&meshed, OTHER_HOST), Reason::OffLimits),
        ("meshed: UDP to another tenant's pod", &meshed, udp(&meshed, (FOREIGN_POD, 53)), Reason::UdpToPod),
        ("meshed: echo to another tenant's pod", &meshed, ping(&meshed, FOREIGN_POD), Reason::IcmpToPod),
    ];
    let outside = lab.outside.tap(UPLINK);
    for (name, pod, frame, reason) in cases {
        let before = count(&router.drops(), reason);
        lab.space(pod).tap("eth0").send(&frame.bytes()).unwrap();
        eventually(name, || count(&router.drops(), reason) == before + 1);
    }
    for frame in outside.drain() {
        assert!(!contains(&frame, MARKER), "{frame:x?}");
        let port = frame.get(34..36);
        assert!(frame.get(23) != Some(&TCP) || port != Some(&1234u16.to_be_bytes()[..]));
    }

    // Beside it goes what may.
    let _allowed = serve(&lab.outside, ALLOWED.0, ALLOWED.1);
    let _workload = serve(&lab.outside, REMOTE_POD, 8080);
    for to in [ALLOWED, (REMOTE_POD, 8080)] {
        let stream = lab.space(&plain).connect(to, DEADLINE).unwrap();
        assert_eq!(greeting(&stream).listener, "server", "{to:?}");
    }
    for pod in [&plain, &meshed] {
        let outside = lab.outside.tap(UPLINK);
        lab.space(pod)
            .tap("eth0")
            .send(&udp(pod, (STRANGER, 9999)).bytes())
            .unwrap();
        assert!(outside.find(DEADLINE, |frame| contains(frame, MARKER)).is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_answers_the_infrastructure_which_it_may_not_call() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let plain = lab.pod(3);
    router.attach(plain.unmeshed()).await.unwrap();
    let _webhook = serve(lab.space(&plain), plain.address, 8443);
    let stream = lab.outside.dial(OTHER_HOST, (plain.address, 8443)).unwrap();
    assert_eq!(greeting(&stream).peer.ip(), OTHER_HOST);
    assert_eq!(echo(&stream, "admit this").unwrap(), "admit this");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_socket_in_the_router_sends_is_held_too() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let servers = [
        (OTHER_HOST, AGENT_PORT),
        (FOREIGN_POD, 8080),
        ALLOWED,
        (REMOTE_POD, 8080),
    ];
    let _serving = servers.map(|(address, port)| serve(&lab.outside, address, port));
    for to in [(OTHER_HOST, AGENT_PORT), (FOREIGN_POD, 8080)] {
        let before = count(&router.drops(), Reason::OffLimits);
        let error = lab.router.dial_within(pod.address, to, REFUSAL).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
            "{to:?}: {error}"
        );
        assert!(count(&router.drops(), Reason::OffLimits) > before, "{to:?}");
    }
    let before = count(&router.drops(), Reason::OffLimits);
    let question = lab.router.udp(crate::lab::ROUTER_ADDRESS, 0);
    // The kernel may tell the sender so.
    let _refused = question.send_to(MARKER, (OTHER_HOST, 53));
    eventually("a question is dropped", || {
        count(&router.drops(), Reason::OffLimits) > before
    });
    for to in [ALLOWED, (REMOTE_POD, 8080)] {
        let stream = lab.router.dial(pod.address, to).unwrap();
        assert_eq!(greeting(&stream).peer.ip(), pod.address, "{to:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_in_from_a_pod_of_the_pool_but_of_workloads_and_the_mesh() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (meshed, plain) = (lab.pod(2), lab.pod(3));
    router.attach(meshed.enrolled()).await.unwrap();
    router.attach(plain.unmeshed()).await.unwrap();
    let forged = |to: &Pod, protocol, payload| Frame {
        to: UPLINK_MAC,
        from: OUTSIDE_MAC,
        ethertype: 0x0800,
        source: FOREIGN_POD,
        destination: to.address,
        protocol,
        fragment: 0,
        payload,
        options: Vec::new(),
    };
    let data = || frame::udp(1234, 9999, MARKER);
    #[rustfmt::skip]
    let cases = vec![
        ("TCP to a pod out of the mesh", forged(&plain, TCP, frame::tcp_syn(1234, 8080))),
        ("the mesh's port of a pod out of the mesh", forged(&plain, TCP, frame::tcp_syn(1234, 15008))),
        ("UDP to a pod out of the mesh", forged(&plain, UDP, data())),
        ("echo to a pod out of the mesh", forged(&plain, ICMP, frame::icmp(8, 0, [0; 4], MARKER))),
        ("plaintext to a pod in the mesh", forged(&meshed, TCP, frame::tcp_syn(1234, 8080))),
        ("UDP to a pod in the mesh", forged(&meshed, UDP, data())),
        ("a new connection from the mesh's port", forged(&meshed, TCP, frame::tcp_syn(15008, 8080))),
        ("UDP to the router", Frame { destination: crate::lab::ROUTER_ADDRESS, ..forged(&plain, UDP, data()) }),
    ];
    let outside = lab.outside.tap(UPLINK);
    let inside = [&meshed, &plain].map(|pod| lab.space(pod).tap("eth0"));
    for (name, frame) in cases {
        let before = count(&router.drops(), Reason::ForeignPod);
        outside.send(&frame.bytes()).unwrap();
        eventually(name, || count(&router.drops(), Reason::ForeignPod) == before + 1);
    }
    for tap in inside {
        for frame in tap.drain() {
            assert!(frame.get(26..30) != Some(&FOREIGN_POD.octets()[..]), "{frame:x?}");
        }
    }

    // A tunnel's far end proves who it is, whosever it is; a workload's address will do.
    let stream = lab.outside.dial(FOREIGN_POD, (meshed.address, 15008)).unwrap();
    assert_eq!(greeting(&stream).listener, "hbone");
    let _served = serve(lab.space(&plain), plain.address, 8080);
    for (pod, listener) in [(&meshed, "inbound"), (&plain, "server")] {
        for from in [REMOTE_POD, STRANGER] {
            let stream = lab.outside.dial(from, (pod.address, 8080)).unwrap();
            assert_eq!(greeting(&stream).listener, listener, "from {from}");
        }
    }
    router.set_workloads([]).await.unwrap();
    let before = count(&router.drops(), Reason::ForeignPod);
    let gone = lab
        .outside
        .dial_within(REMOTE_POD, (plain.address, 8080), REFUSAL);
    assert!(gone.is_err(), "it is a workload no more");
    assert!(count(&router.drops(), Reason::ForeignPod) > before);
}
