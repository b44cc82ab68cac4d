//! What an enrolled pod's own connections become.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd,
};

use mesh_runtime::redirect::GATEWAY;
use socket2::{Domain, Socket, Type};

use crate::{
    frame::{self, TCP},
    lab::{DEADLINE, DNS, Lab, REMOTE_POD, STRANGER, VIP, echo, greeting, serve},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_connection_keeps_both_its_addresses() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    // A Service's address, to which nothing has a route; somebody outside; a pod
    // of another host; the HBONE port of one.
    for to in [
        (VIP, 80),
        (STRANGER, 443),
        (REMOTE_POD, 8080),
        (REMOTE_POD, 15008),
    ] {
        let stream = lab.space(&pod).connect(to, DEADLINE).unwrap();
        let said = greeting(&stream);
        assert_eq!(said.listener, "outbound");
        assert_eq!(said.local, SocketAddr::from(to), "the original destination");
        assert_eq!(said.peer, stream.local_addr().unwrap(), "the pod's own address");
        assert_eq!(said.peer.ip(), pod.address);
        assert_eq!(echo(&stream, "hello").unwrap(), "hello");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_another_pod_of_this_host_is_captured_too() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (one, two) = (lab.pod(2), lab.pod(3));
    for pod in [&one, &two] {
        router.attach(pod.enrolled()).await.unwrap();
    }
    let _server = serve(lab.space(&two), two.address, 8080);
    let stream = lab.space(&one).connect((two.address, 8080), DEADLINE).unwrap();
    assert_eq!(greeting(&stream).listener, "outbound");
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_dns_is_the_proxys_over_udp_and_tcp() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    let socket = lab.space(&pod).udp(pod.address, 0);
    socket.send_to(b"who?", (DNS, 53)).unwrap();
    let mut buffer = [0; 512];
    let (n, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(
        from,
        SocketAddr::from((DNS, 53)),
        "the answer comes from where it was asked"
    );
    let me = socket.local_addr().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&buffer[..n]),
        format!("dns-udp {me} who?")
    );

    let stream = lab.space(&pod).connect((DNS, 53), DEADLINE).unwrap();
    assert_eq!(greeting(&stream).listener, "dns-tcp");
    // Any other port of that address is a Service like others.
    let stream = lab.space(&pod).connect((DNS, 9153), DEADLINE).unwrap();
    assert_eq!(greeting(&stream).listener, "outbound");
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_a_packet_socket_are_steered_like_any() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    // What a user-space network stack does. The pod's kernel must not reset it.
    lab.space(&pod).output(
        "nft add table ip t; nft add chain ip t o '{ type filter hook output priority 0; policy drop; }'",
    );
    let tap = lab.space(&pod).tap("eth0");
    tap.send(&pod.frame(STRANGER, TCP, frame::tcp_syn(4321, 80)).bytes())
        .unwrap();
    let answer = tap.find(DEADLINE, |f| {
        f.len() >= 54 && f[26..30] == STRANGER.octets() && f[34..36] == 80u16.to_be_bytes() && f[47] == 0x12
    });
    assert!(
        answer.is_some(),
        "no SYN-ACK from the proxy in the stranger's name"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_rules_its_own_namespace_stays_captured() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let space = lab.space(&pod);

    space.output("nft flush ruleset && ip rule flush && ip route flush table main");
    space.ip("route add default dev eth0\n");
    space.ip(&format!(
        "neigh replace {STRANGER} lladdr 02:00:00:00:02:02 dev eth0 nud permanent\n"
    ));
    // Without rules there is no route at all; the default ones are put back.
    space.ip("rule add lookup main pref 32766\nrule add lookup local pref 0\n");
    let stream = space.connect((STRANGER, 80), DEADLINE).unwrap();
    assert_eq!(greeting(&stream).listener, "outbound");

    // Marks that mean something elsewhere: the router's own, a stock proxy's.
    for mark in [0x15, 0x539] {
        let stream = space.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_mark(mark).unwrap();
            socket
                .connect_timeout(&SocketAddr::from((STRANGER, 80)).into(), DEADLINE)
                .unwrap();
            std::net::TcpStream::from(socket)
        });
        assert_eq!(greeting(&stream).listener, "outbound", "marked {mark:#x}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tuple_in_time_wait_is_taken_again_at_once() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let space = lab.space(&pod);

    let connect = || {
        space.run(|| {
            let started = std::time::Instant::now();
            loop {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket
                    .bind(&SocketAddr::from((pod.address, 40_000)).into())
                    .unwrap();
                match socket.connect_timeout(&SocketAddr::from((VIP, 80)).into(), DEADLINE) {
                    Ok(()) => return std::net::TcpStream::from(socket),
                    // The pod's own last ACK is still under way, so its end is taken.
                    Err(e)
                        if e.kind() == std::io::ErrorKind::AddrNotAvailable
                            && started.elapsed() < DEADLINE =>
                    {
                        std::thread::yield_now();
                    }
                    Err(e) => panic!("no connection: {e}"),
                }
            }
        })
    };
    for _ in 0..50 {
        let stream = connect();
        assert_eq!(greeting(&stream).listener, "outbound");
        assert_eq!(retransmits(&stream), 0, "a SYN went unanswered");
        // The proxy closes first, so the wait is on its side, in the router.
        std::io::Write::write_all(&mut &stream, b"close").unwrap();
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut &stream, &mut rest).unwrap();
    }
}

fn retransmits(stream: &std::net::TcpStream) -> u32 {
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as u32;
    // SAFETY: the buffer is of the type this option fills.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    info.tcpi_total_retrans
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_proxy_dials_in_a_pods_name_comes_back_to_the_proxy() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (one, two) = (lab.pod(2), lab.pod(3));
    for pod in [&one, &two] {
        router.attach(pod.enrolled()).await.unwrap();
    }
    let _remote = serve(&lab.outside, REMOTE_POD, 15008);
    let _local = serve(lab.space(&two), two.address, 8080);

    for to in [(REMOTE_POD, 15008), (two.address, 8080)] {
        let stream = lab.router.dial(one.address, to).unwrap();
        let said = greeting(&stream);
        assert_eq!(said.listener, "server");
        assert_eq!(said.peer.ip(), one.address, "the far end sees the pod");
        let port = said.peer.port();
        assert!(
            (10_240..32_768).contains(&port),
            "port {port} could be one of the pod's own"
        );
        assert_eq!(echo(&stream, "hello").unwrap(), "hello");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_reaches_a_pod_from_the_gateways_address() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    for (number, enrolled) in [(2, true), (3, false)] {
        let pod = lab.pod(number);
        router
            .attach(if enrolled { pod.enrolled() } else { pod.unmeshed() })
            .await
            .unwrap();
        let _server = serve(lab.space(&pod), pod.address, 8080);
        let stream = lab.router.dial(GATEWAY, (pod.address, 8080)).unwrap();
        let said = greeting(&stream);
        assert_eq!(
            (said.listener.as_str(), said.peer.ip()),
            ("server", GATEWAY.into())
        );
        assert_eq!(echo(&stream, "probe").unwrap(), "probe");
        // Told apart by the socket: the address is no way in for the pod.
        let peer = (Ipv4Addr::from(GATEWAY.to_bits()), said.peer.port());
        assert!(lab.space(&pod).connect(peer, crate::lab::REFUSAL).is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_with_equal_addresses_do_not_meet() {
    use crate::lab::Proxy;
    use mesh_runtime::redirect::Router;

    let (mut one, mut two) = (Lab::new(), Lab::new());
    let (router_one, listeners) = Router::open(one.config("one")).await.unwrap();
    let _proxy_one = Proxy::tagged(listeners, "-one");
    // On the same host, so under the same file system.
    let config = mesh_runtime::redirect::RouterConfig {
        bpffs: one.bpffs.path().to_owned(),
        ..two.config("two")
    };
    let (router_two, listeners) = Router::open(config).await.unwrap();
    let _proxy_two = Proxy::tagged(listeners, "-two");

    let (pod_one, pod_two) = (one.pod(2), two.pod(2));
    assert_eq!(pod_one.address, pod_two.address);
    router_one.attach(pod_one.enrolled()).await.unwrap();
    router_two.attach(pod_two.enrolled()).await.unwrap();
    for (lab, pod, listener) in [(&one, &pod_one, "outbound-one"), (&two, &pod_two, "outbound-two")] {
        let stream = lab.space(pod).connect((VIP, 80), DEADLINE).unwrap();
        assert_eq!(greeting(&stream).listener, listener);
    }
}
