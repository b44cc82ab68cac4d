//! What pods may not send, and that nothing of it arrives anywhere.

use std::{io::ErrorKind, net::Ipv4Addr};

use mesh_runtime::redirect::{GATEWAY, Reason};

use crate::{
    frame::{self, Frame, ICMP, TCP, UDP, contains},
    lab::{
        DEADLINE, DNS, HOST, Lab, Pod, REFUSAL, REMOTE_POD, ROUTER_ADDRESS, STRANGER, UPLINK, VIP, count,
        eventually, greeting,
    },
};

const MARKER: &[u8] = b"must never leave the pod";

fn udp(pod: &Pod, to: Ipv4Addr) -> Frame {
    pod.frame(to, UDP, frame::udp(1234, 9999, MARKER))
}

fn icmp(pod: &Pod, to: Ipv4Addr, kind: u8) -> Frame {
    pod.frame(to, ICMP, frame::icmp(kind, 0, [0, 1, 0, 1], MARKER))
}

/// An 802.1Q or 802.1ad tag between the addresses and what follows.
fn tagged(frame: &Frame, ethertype: u16) -> Vec<u8> {
    let mut bytes = frame.bytes();
    let tag = [ethertype.to_be_bytes(), 5u16.to_be_bytes()].concat();
    bytes.splice(12..12, tag);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pod_may_not_send_is_dropped_and_counted_by_reason() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (pod, neighbour) = (lab.pod(2), lab.pod(3));
    for pod in [&pod, &neighbour] {
        router.attach(pod.enrolled()).await.unwrap();
    }
    router.set_services([VIP]).await.unwrap();

    let good = || udp(&pod, STRANGER);
    let syn = || pod.frame(STRANGER, TCP, frame::tcp_syn(1234, 80));
    let spoofed = Ipv4Addr::new(10, 77, 1, 3);
    let mut bad_length = good().bytes();
    bad_length[14] = 0x44;
    let mut bad_version = good().bytes();
    bad_version[14] = 0x65;
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<u8>, Reason)> = vec![
        ("a neighbour's address", Frame { source: spoofed, ..good() }.bytes(), Reason::SourceAddress),
        ("a neighbour's address, TCP", Frame { source: spoofed, ..syn() }.bytes(), Reason::SourceAddress),
        ("a neighbour's MAC", Frame { from: neighbour.mac, ..good() }.bytes(), Reason::SourceMac),
        ("a neighbour's MAC, TCP", Frame { from: neighbour.mac, ..syn() }.bytes(), Reason::SourceMac),
        ("another station", Frame { to: neighbour.device_mac, ..good() }.bytes(), Reason::NotForThisHost),
        ("broadcast", Frame { to: [0xff; 6], ..good() }.bytes(), Reason::NotForThisHost),
        ("802.1Q", tagged(&good(), 0x8100), Reason::Vlan),
        ("802.1Q, TCP", tagged(&syn(), 0x8100), Reason::Vlan),
        ("802.1ad", tagged(&good(), 0x88a8), Reason::Vlan),
        ("ARP", Frame { ethertype: 0x0806, ..good() }.bytes(), Reason::Arp),
        ("IPv6", Frame { ethertype: 0x86dd, ..good() }.bytes(), Reason::Ipv6),
        ("LLDP", Frame { ethertype: 0x88cc, ..good() }.bytes(), Reason::Ethertype),
        ("MPLS", Frame { ethertype: 0x8847, ..good() }.bytes(), Reason::Ethertype),
        ("cut short", good().bytes()[..40].to_vec(), Reason::Malformed),
        ("header too short", bad_length, Reason::Malformed),
        ("IP version 6 as 4", bad_version, Reason::Malformed),
        ("options", Frame { options: vec![7, 3, 4, 0], ..good() }.bytes(), Reason::IpOptions),
        ("options, TCP", Frame { options: vec![7, 3, 4, 0], ..syn() }.bytes(), Reason::IpOptions),
        ("first fragment", Frame { fragment: 0x2000, ..good() }.bytes(), Reason::Fragment),
        ("later fragment", Frame { fragment: 0x0003, ..good() }.bytes(), Reason::Fragment),
        ("first fragment, TCP", Frame { fragment: 0x2000, ..syn() }.bytes(), Reason::Fragment),
        ("later fragment, TCP", Frame { fragment: 0x0003, ..syn() }.bytes(), Reason::Fragment),
        ("later fragment, DNS", Frame { fragment: 0x0003, ..udp(&pod, DNS) }.bytes(), Reason::Fragment),
        ("loopback", udp(&pod, Ipv4Addr::LOCALHOST).bytes(), Reason::Destination),
        ("loopback, TCP", Frame { destination: Ipv4Addr::LOCALHOST, ..syn() }.bytes(), Reason::Destination),
        ("metadata service", udp(&pod, Ipv4Addr::new(169, 254, 169, 254)).bytes(), Reason::Destination),
        ("metadata service, TCP", Frame { destination: Ipv4Addr::new(169, 254, 169, 254), ..syn() }.bytes(), Reason::Destination),
        ("multicast", udp(&pod, Ipv4Addr::new(224, 0, 0, 251)).bytes(), Reason::Destination),
        ("IP broadcast", udp(&pod, Ipv4Addr::BROADCAST).bytes(), Reason::Destination),
        ("this network", udp(&pod, Ipv4Addr::new(0, 0, 0, 1)).bytes(), Reason::Destination),
        ("UDP to a pod of this host", udp(&pod, neighbour.address).bytes(), Reason::UdpToPod),
        ("UDP to a pod elsewhere", udp(&pod, REMOTE_POD).bytes(), Reason::UdpToPod),
        ("echo to a pod of this host", icmp(&pod, neighbour.address, 8).bytes(), Reason::IcmpToPod),
        ("echo to a pod elsewhere", icmp(&pod, REMOTE_POD, 8).bytes(), Reason::IcmpToPod),
        ("ICMP redirect", icmp(&pod, STRANGER, 5).bytes(), Reason::IcmpType),
        ("ICMP timestamp", icmp(&pod, STRANGER, 13).bytes(), Reason::IcmpType),
        ("SCTP", Frame { protocol: 132, ..good() }.bytes(), Reason::Protocol),
        ("IP in IP", Frame { protocol: 4, ..good() }.bytes(), Reason::Protocol),
        ("UDP to a Service", udp(&pod, VIP).bytes(), Reason::NotTcpToService),
        ("echo to a Service", icmp(&pod, VIP, 8).bytes(), Reason::NotTcpToService),
        ("UDP to the DNS address, not DNS", udp(&pod, DNS).bytes(), Reason::NotTcpToService),
        ("UDP to the host", udp(&pod, HOST).bytes(), Reason::HostLocal),
        ("echo to the host", icmp(&pod, HOST, 8).bytes(), Reason::HostLocal),
        ("UDP to the router", udp(&pod, ROUTER_ADDRESS).bytes(), Reason::HostLocal),
        ("UDP to the gateway", udp(&pod, GATEWAY).bytes(), Reason::HostLocal),
    ];

    let tap = lab.space(&pod).tap("eth0");
    let outside = lab.outside.tap(UPLINK);
    let next_door = lab.space(&neighbour).tap("eth0");
    for (name, bytes, reason) in cases {
        let before = Reason::ALL.map(|reason| count(&router.drops(), reason));
        tap.send(&bytes).unwrap();
        eventually(name, || {
            Reason::ALL.map(|reason| count(&router.drops(), reason)) != before
        });
        let after = Reason::ALL.map(|reason| count(&router.drops(), reason));
        for (index, counted) in Reason::ALL.into_iter().enumerate() {
            let expected = before[index] + u64::from(counted == reason);
            // Kernels speak IPv6 and ARP unasked.
            if !matches!(counted, Reason::Ipv6 | Reason::Arp) || counted == reason {
                assert!(after[index] >= expected, "{name}: {counted:?} not counted");
            }
            if !matches!(counted, Reason::Ipv6 | Reason::Arp) {
                assert_eq!(after[index], expected, "{name}: {counted:?}");
            }
        }
    }
    for (place, tap) in [("outside", outside), ("next door", next_door)] {
        for frame in tap.drain() {
            assert!(!contains(&frame, MARKER), "{place}: {frame:x?}");
            assert!(
                !(frame.len() >= 54 && frame[23] == TCP && frame[34..36] == 1234u16.to_be_bytes()),
                "{place}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_and_echo_to_outside_the_cluster_pass() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    let server = lab.outside.udp(STRANGER, 9999);
    let client = lab.space(&pod).udp(pod.address, 0);
    client.send_to(b"ask", (STRANGER, 9999)).unwrap();
    let mut buffer = [0; 64];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..n], from), (&b"ask"[..], client.local_addr().unwrap()));
    server.send_to(b"answer", from).unwrap();
    assert_eq!(client.recv_from(&mut buffer).unwrap().0, 6);

    let tap = lab.space(&pod).tap("eth0");
    tap.send(&icmp(&pod, STRANGER, 8).bytes()).unwrap();
    let reply = tap.find(DEADLINE, |f| {
        f.len() > 42 && f[23] == ICMP && f[34] == 0 && f[26..30] == STRANGER.octets()
    });
    assert!(reply.is_some(), "no echo reply");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_host_can_be_dialled_not_even_the_proxys_own_listeners() {
    let mut lab = Lab::new();
    let (router, listeners) = mesh_runtime::redirect::Router::open(lab.config("acme"))
        .await
        .unwrap();
    let ports = [
        listeners.outbound.local_addr().unwrap().port(),
        listeners.inbound.local_addr().unwrap().port(),
        listeners.hbone.local_addr().unwrap().port(),
    ];
    let _proxy = crate::lab::Proxy::start(listeners);
    let (meshed, unmeshed) = (lab.pod(2), lab.pod(3));
    router.attach(meshed.enrolled()).await.unwrap();
    router.attach(unmeshed.unmeshed()).await.unwrap();

    for pod in [&meshed, &unmeshed] {
        let tap = lab.space(pod).tap("eth0");
        for address in [ROUTER_ADDRESS, GATEWAY, HOST] {
            let before = count(&router.drops(), Reason::HostLocal);
            for port in ports {
                tap.send(&pod.frame(address, TCP, frame::tcp_syn(5555, port)).bytes())
                    .unwrap();
            }
            eventually("refused", || {
                count(&router.drops(), Reason::HostLocal) == before + 3
            });
        }
        let answered = tap
            .drain()
            .into_iter()
            .any(|f| f.len() >= 54 && f[36..38] == 5555u16.to_be_bytes());
        assert!(!answered, "something of the host answered");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_a_pod_gets_nothing_through() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    assert_eq!(
        greeting(&lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap()).listener,
        "outbound"
    );

    router.detach(pod.address).await.unwrap();
    let outside = lab.outside.tap(UPLINK);
    let before = count(&router.drops(), Reason::UnknownDevice);
    let error = lab.space(&pod).connect((STRANGER, 80), REFUSAL).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "dropped, not refused");
    lab.space(&pod)
        .udp(pod.address, 0)
        .send_to(MARKER, (STRANGER, 9))
        .unwrap();
    eventually("counted", || {
        count(&router.drops(), Reason::UnknownDevice) >= before + 2
    });
    assert!(
        !outside
            .drain()
            .iter()
            .any(|f| f.len() > 30 && f[26..30] == pod.address.octets())
    );
    // And to it: it is no pod any more.
    let before = count(&router.drops(), Reason::NoSuchPod);
    lab.outside
        .udp(STRANGER, 0)
        .send_to(MARKER, (pod.address, 9))
        .unwrap();
    eventually("counted", || count(&router.drops(), Reason::NoSuchPod) > before);
}
