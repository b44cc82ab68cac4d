//! Holds what the kernel programs decide (`classify`, the same source that is
//! built for the kernel) to its promises, for every packet that can be.

use std::{collections::BTreeMap, net::Ipv4Addr};

use proptest::prelude::*;

use super::{
    abi::{ENROLLED, NO_DEADLINE, PodEntry, Range, Reason, Settings, UNMESHED, slot},
    classify::{
        Arrival, DNS_PORT, HBONE_PORT, HEADERS, ICMP, Packet, Selection, TCP, Tables, UDP, Verdict, from_pod,
        from_uplink, parse, select, to_uplink,
    },
};

const UPLINK: u32 = 2;
const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 2);
const ENROLLED_HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 2);
const UNMESHED_HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 3);
const POD_ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 2);
/// Of another tenant, in no range that this one says is its own.
const FOREIGN_POD: Ipv4Addr = Ipv4Addr::new(10, 78, 2, 2);
const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
/// Nanoseconds since the boot.
const NOW: u64 = 1_000_000;
const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);

/// Every kind of address there is.
const ADDRESSES: [Ipv4Addr; 18] = [
    DNS,
    SERVICE,
    HOST,
    GATEWAY,
    ROUTER,
    ENROLLED_HERE,
    UNMESHED_HERE,
    POD_ELSEWHERE,
    FOREIGN_POD,
    OTHER_HOST,
    STRANGER,
    Ipv4Addr::new(10, 77, 1, 99),
    Ipv4Addr::LOCALHOST,
    Ipv4Addr::UNSPECIFIED,
    Ipv4Addr::BROADCAST,
    Ipv4Addr::new(224, 0, 0, 251),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(240, 0, 0, 1),
];

const UNREACHABLE: [Ipv4Addr; 6] = [
    Ipv4Addr::LOCALHOST,
    Ipv4Addr::UNSPECIFIED,
    Ipv4Addr::BROADCAST,
    Ipv4Addr::new(224, 0, 0, 251),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(240, 0, 0, 1),
];

struct Host {
    pods: BTreeMap<u32, PodEntry>,
}

impl Tables for Host {
    fn pod(&self, address: u32) -> Option<&PodEntry> {
        self.pods.get(&address)
    }

    fn is_service(&self, address: u32) -> bool {
        address == u32::from(SERVICE)
    }

    fn is_host(&self, address: u32) -> bool {
        [HOST, GATEWAY, ROUTER].map(u32::from).contains(&address)
    }

    fn is_workload(&self, address: u32) -> bool {
        [ENROLLED_HERE, UNMESHED_HERE, POD_ELSEWHERE]
            .map(u32::from)
            .contains(&address)
    }

    fn is_allowed(&self, address: u32, port: u16) -> bool {
        (address, port) == (OTHER_HOST.into(), 6443)
    }

    fn now(&self) -> u64 {
        NOW
    }
}

fn host() -> Host {
    Host {
        pods: pods().into_iter().map(|pod| (pod.address, pod)).collect(),
    }
}

fn ranges<const N: usize>(some: &[Range]) -> [Range; N] {
    std::array::from_fn(|i| some.get(i).copied().unwrap_or(Range::NONE))
}

fn settings() -> Settings {
    let range = |address: Ipv4Addr, bits: u32| Range {
        address: address.into(),
        mask: u32::MAX << (32 - bits),
    };
    Settings {
        cluster_pods: range(Ipv4Addr::new(10, 77, 0, 0), 16),
        local_pods: range(Ipv4Addr::new(10, 77, 1, 0), 24),
        pool: ranges(&[
            range(Ipv4Addr::new(10, 77, 0, 0), 16),
            range(Ipv4Addr::new(10, 78, 0, 0), 16),
        ]),
        off_limits: ranges(&[range(Ipv4Addr::new(192, 0, 2, 0), 24)]),
        dns: DNS.into(),
        gateway: GATEWAY.into(),
        router: ROUTER.into(),
        uplink: UPLINK,
        proxy_ports: [10_240, 32_767],
    }
}

fn pod(address: Ipv4Addr, mode: u8) -> PodEntry {
    PodEntry {
        address: address.into(),
        device: 7,
        mac: [2, 0, 0, 0, 0, 1],
        mode,
        known: 1,
        deadline: NO_DEADLINE,
    }
}

fn pods() -> [PodEntry; 2] {
    [pod(ENROLLED_HERE, ENROLLED), pod(UNMESHED_HERE, UNMESHED)]
}

/// As `pod` may send it.
fn packet(pod: &PodEntry, destination: Ipv4Addr, protocol: u8, port: u16) -> Packet {
    Packet {
        source_mac: pod.mac,
        source: pod.address,
        destination: destination.into(),
        protocol,
        fragment: false,
        source_port: 40_000,
        destination_port: port,
        icmp_type: if protocol == ICMP { 8 } else { 0 },
        tcp_flags: if protocol == TCP { 0x02 } else { 0 },
    }
}

#[test]
fn headers_are_read_where_they_stand() {
    let mut frame = [0u8; HEADERS];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[23] = TCP;
    frame[26..30].copy_from_slice(&ENROLLED_HERE.octets());
    frame[30..34].copy_from_slice(&SERVICE.octets());
    frame[34..38].copy_from_slice(&[0x9c, 0x40, 0x1f, 0x90]);
    assert_eq!(
        parse(&frame),
        Ok(Packet {
            source_mac: [2, 0, 0, 0, 0, 9],
            source: ENROLLED_HERE.into(),
            destination: SERVICE.into(),
            protocol: TCP,
            fragment: false,
            source_port: 0x9c40,
            destination_port: 8080,
            icmp_type: 0,
            tcp_flags: 0,
        })
    );
    // "Don't fragment" is no fragment; "more fragments" and any offset are.
    for (flags, fragment) in [(0x4000u16, false), (0x2000, true), (0x0001, true), (0x1fff, true)] {
        frame[20..22].copy_from_slice(&flags.to_be_bytes());
        assert_eq!(parse(&frame).map(|p| p.fragment), Ok(fragment), "{flags:#x}");
    }
}

#[test]
fn a_frame_that_is_not_plain_ipv4_is_told_by_its_kind() {
    let mut frame = [0u8; HEADERS];
    frame[14] = 0x45;
    for (ethertype, reason) in [
        (0x0806u16, Reason::Arp),
        (0x86dd, Reason::Ipv6),
        (0x8100, Reason::Vlan),
        (0x88a8, Reason::Vlan),
        (0x8847, Reason::Ethertype),
        (0x0000, Reason::Ethertype),
    ] {
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        assert_eq!(parse(&frame), Err(reason), "{ethertype:#x}");
    }
    frame[12..14].copy_from_slice(&[8, 0]);
    for (first, reason) in [
        (0x46, Reason::IpOptions),
        (0x4f, Reason::IpOptions),
        (0x44, Reason::Malformed),
        (0x65, Reason::Malformed),
    ] {
        frame[14] = first;
        assert_eq!(parse(&frame), Err(reason), "{first:#x}");
    }
}

#[test]
fn what_an_enrolled_pod_sends() {
    use Verdict::{Capture, Drop, Pass};
    let pod = pod(ENROLLED_HERE, ENROLLED);
    #[rustfmt::skip]
    let cases = [
        (STRANGER, TCP, 443, Capture),
        (POD_ELSEWHERE, TCP, 15008, Capture),
        (SERVICE, TCP, 80, Capture),
        (DNS, TCP, 53, Capture),
        (DNS, UDP, 53, Capture),
        (GATEWAY, TCP, 1, Capture),
        (STRANGER, UDP, 53, Pass),
        (STRANGER, ICMP, 0, Pass),
        (POD_ELSEWHERE, UDP, 53, Drop(Reason::UdpToPod)),
        (UNMESHED_HERE, UDP, 53, Drop(Reason::UdpToPod)),
        (POD_ELSEWHERE, ICMP, 0, Drop(Reason::IcmpToPod)),
        (SERVICE, UDP, 80, Drop(Reason::NotTcpToService)),
        (DNS, UDP, 54, Drop(Reason::NotTcpToService)),
        (HOST, UDP, 80, Drop(Reason::HostLocal)),
        (GATEWAY, UDP, 80, Drop(Reason::HostLocal)),
        (ROUTER, ICMP, 0, Drop(Reason::HostLocal)),
        (STRANGER, 132, 0, Drop(Reason::Protocol)),
        (FOREIGN_POD, TCP, 80, Capture),
        (FOREIGN_POD, UDP, 53, Drop(Reason::UdpToPod)),
        (FOREIGN_POD, ICMP, 0, Drop(Reason::IcmpToPod)),
        (OTHER_HOST, UDP, 53, Drop(Reason::OffLimits)),
        (OTHER_HOST, UDP, 6443, Pass),
        (OTHER_HOST, ICMP, 0, Drop(Reason::OffLimits)),
    ];
    for (destination, protocol, port, verdict) in cases {
        let packet = packet(&pod, destination, protocol, port);
        let found = from_pod(&pod, &settings(), &packet, &host());
        assert_eq!(found, verdict, "{destination} protocol {protocol} port {port}");
    }
}

#[test]
fn what_an_unmeshed_pod_sends() {
    use Verdict::{Capture, CaptureIfConnected, Drop, Pass};
    let pod = pod(UNMESHED_HERE, UNMESHED);
    #[rustfmt::skip]
    let cases = [
        (STRANGER, TCP, 443, Pass),
        (STRANGER, UDP, 443, Pass),
        (STRANGER, ICMP, 0, Pass),
        (STRANGER, 132, 0, Pass),
        (POD_ELSEWHERE, TCP, 15008, Pass),
        (POD_ELSEWHERE, TCP, 20_000, Pass),
        (POD_ELSEWHERE, UDP, 53, Pass),
        (UNMESHED_HERE, TCP, 8080, Pass),
        (UNMESHED_HERE, TCP, 10_240, CaptureIfConnected),
        (UNMESHED_HERE, TCP, 32_767, CaptureIfConnected),
        (UNMESHED_HERE, TCP, 32_768, Pass),
        (ENROLLED_HERE, TCP, 8080, Capture),
        (ENROLLED_HERE, UDP, 8080, Drop(Reason::UdpToPod)),
        (ENROLLED_HERE, ICMP, 0, Drop(Reason::IcmpToPod)),
        (ENROLLED_HERE, 132, 0, Drop(Reason::Protocol)),
        (SERVICE, TCP, 80, Capture),
        (SERVICE, UDP, 80, Drop(Reason::NotTcpToService)),
        (DNS, UDP, 53, Capture),
        (DNS, TCP, 53, Capture),
        (GATEWAY, TCP, 1, Capture),
        (HOST, TCP, 22, Drop(Reason::HostLocal)),
        (HOST, 132, 0, Drop(Reason::HostLocal)),
        (FOREIGN_POD, TCP, 80, Drop(Reason::OffLimits)),
        (FOREIGN_POD, TCP, HBONE_PORT, Drop(Reason::OffLimits)),
        (FOREIGN_POD, UDP, 53, Drop(Reason::OffLimits)),
        (FOREIGN_POD, ICMP, 0, Drop(Reason::OffLimits)),
        (OTHER_HOST, TCP, 7443, Drop(Reason::OffLimits)),
        (OTHER_HOST, TCP, 6443, Pass),
        (OTHER_HOST, UDP, 7443, Drop(Reason::OffLimits)),
        (OTHER_HOST, 132, 0, Drop(Reason::OffLimits)),
    ];
    for (destination, protocol, port, verdict) in cases {
        let packet = packet(&pod, destination, protocol, port);
        let found = from_pod(&pod, &settings(), &packet, &host());
        assert_eq!(found, verdict, "{destination} protocol {protocol} port {port}");
    }
}

#[test]
fn an_icmp_error_about_tcp_is_the_proxys_and_about_udp_the_pods() {
    let error = |kind| Packet {
        source: STRANGER.into(),
        icmp_type: kind,
        ..packet(&pod(ENROLLED_HERE, ENROLLED), ENROLLED_HERE, ICMP, 0)
    };
    for kind in [3, 11, 12] {
        assert_eq!(
            from_uplink(&settings(), &error(kind), TCP, &host()),
            Verdict::Capture
        );
        assert_eq!(
            from_uplink(&settings(), &error(kind), UDP, &host()),
            Verdict::Pass
        );
    }
    assert_eq!(
        from_uplink(&settings(), &error(8), TCP, &host()),
        Verdict::Pass,
        "echo quotes nothing"
    );
}

#[test]
fn each_arrival_finds_its_listener() {
    use Selection::{Ordinary, Refuse, Slot};
    let [enrolled, unmeshed] = pods();
    let from_uplink = (None, UPLINK);
    let from_enrolled = (Some(&enrolled), enrolled.device);
    let from_unmeshed = (Some(&unmeshed), unmeshed.device);
    #[rustfmt::skip]
    let cases = [
        (from_enrolled, TCP, STRANGER, 80, Slot(slot::OUTBOUND)),
        (from_enrolled, TCP, POD_ELSEWHERE, HBONE_PORT, Slot(slot::OUTBOUND)),
        (from_enrolled, TCP, UNMESHED_HERE, 80, Slot(slot::OUTBOUND)),
        (from_enrolled, TCP, DNS, DNS_PORT, Slot(slot::DNS_TCP)),
        (from_enrolled, UDP, DNS, DNS_PORT, Slot(slot::DNS_UDP)),
        (from_enrolled, TCP, DNS, 9153, Slot(slot::OUTBOUND)),
        (from_enrolled, TCP, GATEWAY, 80, Refuse(Reason::HostLocal)),
        (from_enrolled, TCP, ROUTER, 80, Refuse(Reason::HostLocal)),
        (from_enrolled, TCP, HOST, 80, Refuse(Reason::HostLocal)),
        (from_enrolled, UDP, STRANGER, 53, Ordinary),
        (from_unmeshed, TCP, SERVICE, 80, Slot(slot::OUTBOUND)),
        (from_unmeshed, TCP, DNS, 9153, Slot(slot::OUTBOUND)),
        (from_unmeshed, TCP, ENROLLED_HERE, 80, Slot(slot::INBOUND)),
        (from_unmeshed, TCP, ENROLLED_HERE, HBONE_PORT, Slot(slot::HBONE)),
        (from_unmeshed, TCP, STRANGER, 80, Ordinary),
        (from_unmeshed, TCP, GATEWAY, 80, Refuse(Reason::HostLocal)),
        (from_uplink, TCP, ENROLLED_HERE, 80, Slot(slot::INBOUND)),
        (from_uplink, TCP, ENROLLED_HERE, HBONE_PORT, Slot(slot::HBONE)),
        (from_uplink, TCP, UNMESHED_HERE, HBONE_PORT, Ordinary),
        (from_uplink, TCP, STRANGER, 80, Ordinary),
        ((None, 1), TCP, ENROLLED_HERE, 80, Ordinary),
        ((None, 99), TCP, ENROLLED_HERE, 80, Ordinary),
    ];
    for ((pod, device), protocol, destination, port, selection) in cases {
        let arrival = Arrival {
            device,
            protocol,
            destination: destination.into(),
            port,
        };
        assert_eq!(
            select(pod, &settings(), &arrival, &host()),
            selection,
            "{arrival:?} to {destination}"
        );
    }
}

#[test]
fn nothing_new_of_a_pod_or_to_it_is_heard_before_the_proxy_knows_it() {
    let unknown = Host {
        pods: pods()
            .into_iter()
            .map(|pod| (pod.address, PodEntry { known: 0, ..pod }))
            .collect(),
    };
    let [enrolled, unmeshed] = pods().map(|pod| PodEntry { known: 0, ..pod });
    for (pod, device, destination, port) in [
        (Some(&enrolled), enrolled.device, STRANGER, 80),
        (Some(&enrolled), enrolled.device, DNS, DNS_PORT),
        (Some(&unmeshed), unmeshed.device, SERVICE, 80),
        (Some(&unmeshed), unmeshed.device, ENROLLED_HERE, 80),
        (None, UPLINK, ENROLLED_HERE, 80),
        (None, UPLINK, ENROLLED_HERE, HBONE_PORT),
    ] {
        let arrival = Arrival {
            device,
            protocol: TCP,
            destination: destination.into(),
            port,
        };
        let selection = select(pod, &settings(), &arrival, &unknown);
        assert_eq!(selection, Selection::Refuse(Reason::NoListener), "{arrival:?}");
    }
}

/// The host's pods, whose right to run ended a moment ago.
fn over() -> Host {
    Host {
        pods: pods()
            .into_iter()
            .map(|pod| {
                let deadline = NOW - 1;
                (pod.address, PodEntry { deadline, ..pod })
            })
            .collect(),
    }
}

fn address() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => proptest::sample::select(&ADDRESSES[..]).prop_map(u32::from),
        1 => any::<u32>(),
    ]
}

fn any_packet() -> impl Strategy<Value = Packet> {
    let mac = prop_oneof![Just([2, 0, 0, 0, 0, 1]), any::<[u8; 6]>()];
    let protocol = prop_oneof![4 => proptest::sample::select(&[TCP, UDP, ICMP][..]), 1 => any::<u8>()];
    let port = prop_oneof![
        proptest::sample::select(&[53, 80, 15008, 10_240, 32_767][..]),
        any::<u16>()
    ];
    let kind = prop_oneof![proptest::sample::select(&[0, 3, 5, 8, 11, 12][..]), any::<u8>()];
    (mac, address(), address(), protocol, any::<bool>(), port, kind).prop_map(
        |(source_mac, source, destination, protocol, fragment, port, kind)| Packet {
            source_mac,
            source,
            destination,
            protocol,
            fragment,
            source_port: 0,
            destination_port: if protocol == TCP || protocol == UDP {
                port
            } else {
                0
            },
            icmp_type: if protocol == ICMP { kind } else { 0 },
            tcp_flags: if protocol == TCP { kind } else { 0 },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn any_bytes_are_parsed_or_refused(frame in any::<[u8; HEADERS]>()) {
        if let Ok(packet) = parse(&frame) {
            prop_assert_eq!(&frame[12..14], &[8, 0]);
            prop_assert_eq!(frame[14], 0x45);
            prop_assert_eq!(packet.source.to_be_bytes(), &frame[26..30]);
        }
    }

    #[test]
    fn what_gets_past_a_pods_device_is_the_pods_own(which in 0..2usize, packet in any_packet()) {
        let pod = pods()[which];
        if !matches!(from_pod(&pod, &settings(), &packet, &host()), Verdict::Drop(_)) {
            prop_assert_eq!(packet.source_mac, pod.mac);
            prop_assert_eq!(packet.source, pod.address);
            prop_assert!(!UNREACHABLE.map(u32::from).contains(&packet.destination));
        }
    }

    #[test]
    fn past_its_deadline_nothing_of_a_pod_or_to_it_passes(which in 0..2usize, packet in any_packet()) {
        let ended = over();
        let here = |address| ended.pod(address).is_some();
        let pod = PodEntry { deadline: NOW - 1, ..pods()[which] };
        let dropped = |verdict| matches!(verdict, Verdict::Drop(_));
        prop_assert_eq!(from_pod(&pod, &settings(), &packet, &ended), Verdict::Drop(Reason::RightEnded));
        prop_assert!(!here(packet.destination) || dropped(from_uplink(&settings(), &packet, 0, &ended)));
        prop_assert!(!here(packet.source) || dropped(to_uplink(&settings(), &packet, &ended)));
        // From one that may run to one that may not: the proxy's to refuse, or dropped.
        let living = pods()[1];
        let to_ended = Packet { destination: pod.address, ..packet };
        prop_assert!(dropped(from_pod(&living, &settings(), &to_ended, &ended)));
        // A deadline that is now has not passed.
        let last = PodEntry { deadline: NOW, ..pods()[which] };
        prop_assert!(from_pod(&last, &settings(), &packet, &host()) != Verdict::Drop(Reason::RightEnded));
    }

    #[test]
    fn nothing_of_an_enrolled_pod_passes_but_datagrams_and_echo_to_outside(packet in any_packet()) {
        let pod = pod(ENROLLED_HERE, ENROLLED);
        if from_pod(&pod, &settings(), &packet, &host()) == Verdict::Pass {
            prop_assert!(matches!(packet.protocol, UDP | ICMP));
            prop_assert!(!settings().cluster_pods.contains(packet.destination));
            prop_assert!(!host().is_host(packet.destination));
            prop_assert!(!host().is_service(packet.destination) && packet.destination != u32::from(DNS));
            prop_assert!(!packet.fragment);
        }
    }

    #[test]
    fn nothing_but_the_proxy_speaks_tcp_to_an_enrolled_pod(which in 0..2usize, packet in any_packet()) {
        let to_enrolled = Packet { destination: ENROLLED_HERE.into(), protocol: TCP, ..packet };
        let pod = pods()[which];
        for verdict in [
            from_pod(&pod, &settings(), &to_enrolled, &host()),
            from_uplink(&settings(), &to_enrolled, 0, &host()),
        ] {
            prop_assert!(matches!(verdict, Verdict::Capture | Verdict::Drop(_)), "{verdict:?}");
        }
    }

    #[test]
    fn no_datagram_goes_from_a_pod_to_an_enrolled_pod(packet in any_packet(), source in address()) {
        let source = settings().cluster_pods.address | (source & !settings().cluster_pods.mask);
        let datagram = Packet { source, destination: ENROLLED_HERE.into(), protocol: UDP, ..packet };
        prop_assert!(matches!(from_uplink(&settings(), &datagram, 0, &host()), Verdict::Drop(_)));
        let [_, unmeshed] = pods();
        let datagram = Packet { source_mac: unmeshed.mac, source: unmeshed.address, ..datagram };
        prop_assert!(matches!(from_pod(&unmeshed, &settings(), &datagram, &host()), Verdict::Drop(_)));
    }

    #[test]
    fn what_comes_in_goes_to_a_pod_of_this_host_or_nowhere(packet in any_packet(), quoted in any::<u8>()) {
        if !matches!(from_uplink(&settings(), &packet, quoted, &host()), Verdict::Drop(_))
            && packet.destination != u32::from(ROUTER)
        {
            prop_assert!(host().pod(packet.destination).is_some());
            prop_assert!(!settings().local_pods.contains(packet.source), "one of ours, from outside");
        }
    }

    #[test]
    fn nothing_opens_a_way_to_what_is_off_limits(which in 0..2usize, packet in any_packet()) {
        let limits = |to| packet.destination == u32::from(to);
        let allowed = limits(OTHER_HOST) && packet.destination_port == 6443 && !packet.fragment;
        if (limits(FOREIGN_POD) || limits(OTHER_HOST)) && !allowed {
            let pod = pods()[which];
            // An enrolled pod's is the proxy's to refuse; a plain pod may only answer.
            let from_pod = from_pod(&pod, &settings(), &packet, &host());
            prop_assert!(from_pod != Verdict::Pass || (packet.protocol == TCP && !packet.is_opening()));
            prop_assert!(!(limits(FOREIGN_POD) && from_pod == Verdict::Pass));
            let out = to_uplink(&settings(), &packet, &host());
            let tunnel = limits(FOREIGN_POD) && packet.protocol == TCP && packet.destination_port == HBONE_PORT;
            let answer = packet.protocol == TCP && !packet.is_opening() || packet.is_icmp_error();
            prop_assert!(out != Verdict::Pass || tunnel || answer);
        }
    }

    #[test]
    fn a_foreign_pod_comes_to_nobody_but_a_tunnels_listener(packet in any_packet(), source_port in any::<u16>()) {
        let packet = Packet { source: FOREIGN_POD.into(), source_port, ..packet };
        match from_uplink(&settings(), &packet, 0, &host()) {
            Verdict::Drop(_) => {}
            Verdict::Capture => {
                prop_assert_eq!(packet.destination, u32::from(ENROLLED_HERE));
                prop_assert_eq!(packet.protocol, TCP);
                if packet.is_opening() {
                    prop_assert_eq!(packet.destination_port, HBONE_PORT);
                }
            }
            passed => prop_assert!(false, "{:?}", passed),
        }
    }

    /// What is captured and asks for a listener finds one of the proxy's, or is
    /// refused: the router's ordinary sockets hear nothing of pods.
    #[test]
    fn what_is_captured_is_heard_by_the_proxy_or_nobody(which in 0..2usize, packet in any_packet()) {
        let pod = pods()[which];
        let from_device = from_pod(&pod, &settings(), &packet, &host());
        if from_device == Verdict::Capture && packet.is_opening() {
            let selection = select(Some(&pod), &settings(), &packet.arrival(pod.device), &host());
            prop_assert!(selection != Selection::Ordinary);
        }
        let from_outside = from_uplink(&settings(), &packet, 0, &host());
        if from_outside == Verdict::Capture && packet.is_opening() {
            let selection = select(None, &settings(), &packet.arrival(UPLINK), &host());
            prop_assert!(matches!(selection, Selection::Slot(slot::INBOUND | slot::HBONE)));
        }
    }
}
