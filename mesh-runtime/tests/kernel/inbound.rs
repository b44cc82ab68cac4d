//! What comes from outside the host to its pods.

use std::{net::SocketAddr, os::fd::AsRawFd};

use mesh_runtime::redirect::Reason;

use crate::{
    frame::{self, Frame, ICMP, TCP, UDP, contains},
    lab::{
        DEADLINE, Lab, OUTSIDE_MAC, Pod, REMOTE_POD, STRANGER, UPLINK, UPLINK_MAC, count, eventually,
        greeting, serve,
    },
};

const MARKER: &[u8] = b"must never reach the pod";

/// A frame from outside to a pod.
fn to(pod: &Pod, source: std::net::Ipv4Addr, protocol: u8, payload: Vec<u8>) -> Frame {
    Frame {
        to: UPLINK_MAC,
        from: OUTSIDE_MAC,
        source,
        ..pod.frame(pod.address, protocol, payload)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_an_enrolled_pod_go_to_the_listener_of_their_port() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let _never = serve(lab.space(&pod), pod.address, 8080);

    for (port, listener) in [(15008, "hbone"), (8080, "inbound"), (53, "inbound")] {
        for source in [REMOTE_POD, STRANGER] {
            let stream = lab.outside.dial(source, (pod.address, port)).unwrap();
            let said = greeting(&stream);
            assert_eq!(said.listener, listener);
            assert_eq!(said.local, SocketAddr::from((pod.address, port)));
            assert_eq!(said.peer.ip(), source);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_come_in_is_dropped_and_counted_by_reason() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (pod, neighbour) = (lab.pod(2), lab.pod(3));
    for pod in [&pod, &neighbour] {
        router.attach(pod.enrolled()).await.unwrap();
    }
    let nobody = Pod {
        address: [10, 77, 1, 200].into(),
        ..pod.clone()
    };
    let udp = |to_pod: &Pod, source| to(to_pod, source, UDP, frame::udp(1, 9999, MARKER));
    let good = || udp(&pod, STRANGER);
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<u8>, Reason)> = vec![
        ("to no pod", udp(&nobody, STRANGER).bytes(), Reason::NoSuchPod),
        ("to no pod, TCP", to(&nobody, STRANGER, TCP, frame::tcp_syn(1, 80)).bytes(), Reason::NoSuchPod),
        ("in a local pod's name", udp(&pod, neighbour.address).bytes(), Reason::SourceAddress),
        ("in a local pod's name, TCP", to(&pod, neighbour.address, TCP, frame::tcp_syn(1, 80)).bytes(), Reason::SourceAddress),
        ("UDP of a pod elsewhere", udp(&pod, REMOTE_POD).bytes(), Reason::UdpToPod),
        ("echo of a pod elsewhere", to(&pod, REMOTE_POD, ICMP, frame::icmp(8, 0, [0; 4], MARKER)).bytes(), Reason::IcmpToPod),
        ("redirect", to(&pod, STRANGER, ICMP, frame::icmp(5, 1, [9, 9, 9, 9], MARKER)).bytes(), Reason::IcmpType),
        ("options", Frame { options: vec![7, 3, 4, 0], ..good() }.bytes(), Reason::IpOptions),
        ("fragment", Frame { fragment: 0x2000, ..good() }.bytes(), Reason::Fragment),
        ("later fragment, TCP", Frame { fragment: 3, ..to(&pod, STRANGER, TCP, frame::tcp_syn(1, 80)) }.bytes(), Reason::Fragment),
        ("another station", Frame { to: [2, 9, 9, 9, 9, 9], ..good() }.bytes(), Reason::NotForThisHost),
        ("LLDP", Frame { ethertype: 0x88cc, ..good() }.bytes(), Reason::Ethertype),
        ("IP in IP", Frame { protocol: 4, ..good() }.bytes(), Reason::Protocol),
    ];
    let outside = lab.outside.tap(UPLINK);
    let inside = lab.space(&pod).tap("eth0");
    for (name, bytes, reason) in cases {
        let before = count(&router.drops(), reason);
        outside.send(&bytes).unwrap();
        eventually(name, || count(&router.drops(), reason) == before + 1);
    }
    assert!(!inside.drain().iter().any(|frame| contains(frame, MARKER)));
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_and_echo_of_outside_the_cluster_reach_the_pod() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    let server = lab.space(&pod).udp(pod.address, 9999);
    let client = lab.outside.udp(STRANGER, 0);
    client.send_to(b"ask", (pod.address, 9999)).unwrap();
    let mut buffer = [0; 64];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..n], from), (&b"ask"[..], client.local_addr().unwrap()));

    let outside = lab.outside.tap(UPLINK);
    outside
        .send(&to(&pod, STRANGER, ICMP, frame::icmp(8, 0, [0, 1, 0, 1], b"ping")).bytes())
        .unwrap();
    let reply = outside.find(DEADLINE, |f| {
        f.len() > 42 && f[23] == ICMP && f[34] == 0 && f[26..30] == pod.address.octets()
    });
    assert!(reply.is_some(), "no echo reply");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxys_connection_learns_a_smaller_path_mtu() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let _remote = serve(&lab.outside, REMOTE_POD, 15008);
    let stream = lab.router.dial(pod.address, (REMOTE_POD, 15008)).unwrap();
    let said = greeting(&stream);
    assert_eq!(mtu(&stream), 1500);

    // A router on the way answers a segment of the proxy's, which went no
    // further and is not acknowledged: too long for me.
    lab.outside.output(
        "nft add table ip t; nft add chain ip t i '{ type filter hook input priority 0; policy drop; }'",
    );
    let outside = lab.outside.tap(UPLINK);
    std::io::Write::write_all(&mut &stream, b"a segment").unwrap();
    let segment = outside
        .find(DEADLINE, |f| {
            f.len() > 54 && f[23] == TCP && f[34..36] == said.peer.port().to_be_bytes()
        })
        .unwrap();
    let quoted = segment[14..14 + 28].to_vec();
    let needed = frame::icmp(3, 4, [0, 0, 0x04, 0xb0], &quoted);
    outside.send(&to(&pod, STRANGER, ICMP, needed).bytes()).unwrap();
    eventually("the path's MTU is 1200", || mtu(&stream) == 1200);
}

fn mtu(stream: &std::net::TcpStream) -> i32 {
    let mut value = 0i32;
    let mut length = size_of::<i32>() as u32;
    // SAFETY: the buffer is of the type this option fills.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    value
}
