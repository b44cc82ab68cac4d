//! What stays when the agent goes, and what the next one does with it.

use std::{io::ErrorKind, time::Instant};

use mesh_runtime::redirect::{ProgramsError, Reason, Router, RouterConfig, RouterError};

use crate::{
    frame::{self, TCP},
    lab::{
        DEADLINE, Lab, Pod, Proxy, REFUSAL, REMOTE_POD, STRANGER, Space, UPLINK, VIP, count, echo,
        eventually, greeting,
    },
};

/// No frame of the pod's own left the router.
fn nothing_left(outside: &crate::frame::Tap, pod: &Pod) {
    let leaked = outside
        .drain()
        .into_iter()
        .find(|f| f.len() > 34 && f[26..30] == pod.address.octets());
    assert!(leaked.is_none(), "left the router: {leaked:x?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_agents_pods_are_cut_off_not_let_out() {
    let mut lab = Lab::new();
    let (router, proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let old = lab.space(&pod).connect((STRANGER, 80), DEADLINE).unwrap();
    assert_eq!(greeting(&old).listener, "outbound");

    let drops = router.drops();
    let outside = lab.outside.tap(UPLINK);
    drop(router);
    proxy.die().await;
    let before = count(&drops, Reason::NoListener);
    let error = lab.space(&pod).connect((STRANGER, 80), REFUSAL).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "dropped, not refused");
    assert!(count(&drops, Reason::NoListener) > before);
    // Nor in.
    let error = lab.outside.dial(REMOTE_POD, (pod.address, 8080)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    // What was open got an end, and does not hang.
    eventually("an end", || echo(&old, "hello?").is_err());
    // The pod that was told its connection is over may say so; nothing else.
    nothing_left(&outside, &pod);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_agent_takes_over_and_old_connections_end_in_peace() {
    let mut lab = Lab::new();
    let (router, listeners) = Router::open(lab.config("acme")).await.unwrap();
    let old_proxy = Proxy::tagged(listeners, "-old");
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let connect = || lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap();
    let long = connect();
    assert_eq!(greeting(&long).listener, "outbound-old");

    // The next one has the listeners, but has not been told of the pod yet: a
    // connection waits, and none is reset.
    let (next, listeners) = Router::open(lab.config("acme")).await.unwrap();
    let new_proxy = Proxy::tagged(listeners, "-new");
    let before = count(&next.drops(), Reason::NoListener);
    let meanwhile = std::thread::scope(|scope| {
        let connecting = scope.spawn(connect);
        eventually("tried", || count(&next.drops(), Reason::NoListener) > before);
        let attach = || tokio::runtime::Handle::current().block_on(next.attach(pod.enrolled()));
        tokio::task::block_in_place(attach).unwrap();
        connecting.join().unwrap()
    });
    assert_eq!(greeting(&meanwhile).listener, "outbound-new");
    assert_eq!(greeting(&connect()).listener, "outbound-new");
    drop(router);
    assert_eq!(echo(&long, "still here").unwrap(), "still here");
    old_proxy.die().await;
    eventually("an end", || echo(&long, "gone").is_err());
    assert_eq!(greeting(&connect()).listener, "outbound-new");
    // And a third time, from a process that died and left nothing but the pins.
    drop(next);
    new_proxy.die().await;
    let (third, listeners) = Router::open(lab.config("acme")).await.unwrap();
    let _proxy = Proxy::tagged(listeners, "-third");
    third.attach(pod.enrolled()).await.unwrap();
    assert_eq!(greeting(&connect()).listener, "outbound-third");
}

fn rules(space: &Space) -> String {
    space.output("ip rule; ip route show table 100 2>/dev/null || true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_policy_route_lets_nothing_out() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let drops = router.drops();
    // The agent's watch is off; its listeners still stand.
    drop(router);
    let outside = lab.outside.tap(UPLINK);
    let syn = pod.frame(STRANGER, TCP, frame::tcp_syn(7777, 80)).bytes();
    let pod_tap = lab.space(&pod).tap("eth0");

    // Every way in which it can be missing.
    for removal in ["rule del pref 10\n", "route flush table 100\n"] {
        lab.router.ip(removal);
        let error = lab.space(&pod).connect((STRANGER, 80), REFUSAL).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        lab.router.ip("route replace local default dev lo table 100\n");
        if !rules(&lab.router).contains("lookup 100") {
            lab.router.ip("rule add fwmark 0x15 lookup 100 pref 10\n");
        }
        assert_eq!(
            greeting(&lab.space(&pod).connect((STRANGER, 80), DEADLINE).unwrap()).listener,
            "outbound"
        );
    }
    assert_eq!(count(&drops, Reason::Leak), 0, "the rule after it caught them");
    // Both rules: the packet is forwarded, and stopped at the last door.
    lab.router.ip("rule del pref 10\nrule del pref 11\n");
    pod_tap.send(&syn).unwrap();
    eventually("stopped at the uplink", || count(&drops, Reason::Leak) >= 1);
    nothing_left(&outside, &pod);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_away_is_put_back() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    for removal in [
        "ip rule del pref 10",
        "ip rule del pref 11",
        "ip route flush table 100",
        "tc qdisc del dev p2 clsact",
    ] {
        lab.router.output(removal);
        eventually(removal, || {
            let now = rules(&lab.router) + &lab.router.output("tc filter show dev p2 ingress");
            ["10:", "11:", "local default", "pod_ingress"]
                .iter()
                .all(|part| now.contains(part))
        });
        assert_eq!(
            greeting(&lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap()).listener,
            "outbound"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_device_is_forgotten_and_its_address_free() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    // While it is there, its address is its own.
    let thief = lab.pod(3);
    let stolen = mesh_runtime::redirect::Device {
        address: pod.address,
        ..thief.enrolled()
    };
    let error = router.attach(stolen.clone()).await.unwrap_err();
    assert!(
        matches!(error, RouterError::Programs(ProgramsError::AddressTaken { .. })),
        "{error}"
    );

    lab.delete_device(&pod);
    eventually("forgotten", || {
        let outside = lab.outside.udp(STRANGER, 0);
        let before = count(&router.drops(), Reason::NoSuchPod);
        outside.send_to(b"anybody?", (pod.address, 9)).unwrap();
        count(&router.drops(), Reason::NoSuchPod) > before
    });
    router.attach(stolen).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_went_while_no_agent_ran_are_forgotten() {
    let mut lab = Lab::new();
    let (router, proxy) = lab.open().await;
    let (gone, stays) = (lab.pod(2), lab.pod(3));
    for pod in [&gone, &stays] {
        router.attach(pod.enrolled()).await.unwrap();
    }
    drop(router);
    proxy.die().await;
    lab.delete_device(&gone);
    let (router, _proxy) = lab.open().await;
    router.attach(stays.enrolled()).await.unwrap();
    assert_eq!(
        greeting(&lab.space(&stays).connect((VIP, 80), DEADLINE).unwrap()).listener,
        "outbound"
    );
    let before = count(&router.drops(), Reason::NoSuchPod);
    lab.outside
        .udp(STRANGER, 0)
        .send_to(b"anybody?", (gone.address, 9))
        .unwrap();
    eventually("no pod any more", || {
        count(&router.drops(), Reason::NoSuchPod) > before
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_made_anew_is_redirected_anew() {
    let mut lab = Lab::new();
    let (router, proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    drop(router);
    proxy.die().await;

    // The same tenant, the same file system, another router with devices of the
    // same numbers; the old one still exists somewhere.
    let mut anew = Lab::new();
    let config = RouterConfig {
        bpffs: lab.bpffs.path().to_owned(),
        ..anew.config("acme")
    };
    let (router, listeners) = Router::open(config).await.unwrap();
    let _proxy = Proxy::start(listeners);
    let pod = anew.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    assert_eq!(
        greeting(&anew.space(&pod).connect((VIP, 80), DEADLINE).unwrap()).listener,
        "outbound"
    );
    let stream = anew.outside.dial(REMOTE_POD, (pod.address, 15008)).unwrap();
    assert_eq!(greeting(&stream).listener, "hbone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_router_leaves_nothing_pinned() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();
    let pins = lab.pins("acme");
    assert!(pins.join("links/uplink-ingress").exists());
    router.close().await.unwrap();
    assert!(!pins.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_map_of_another_shape_is_refused() {
    let lab = Lab::new();
    let (router, proxy) = lab.open().await;
    drop(router);
    proxy.die().await;
    // As an agent with other shapes under the same schema would have left it.
    let maps = lab.pins("acme").join("maps");
    let map = maps.join("SETTINGS");
    std::fs::remove_file(&map).unwrap();
    std::fs::rename(maps.join("DROPS"), &map).unwrap();
    let error = Router::open(lab.config("acme")).await.err().unwrap();
    assert!(
        matches!(&error, RouterError::Programs(ProgramsError::Shape { path }) if *path == map),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_no_bpf_file_system_is_refused() {
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let config = RouterConfig {
        bpffs: directory.path().to_owned(),
        ..lab.config("acme")
    };
    let error = Router::open(config).await.err().unwrap();
    assert!(
        matches!(error, RouterError::Programs(ProgramsError::NotBpffs { .. })),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_pods_are_attached_and_the_time_it_takes_is_told() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let mut times = Vec::new();
    let mut pods = Vec::new();
    for number in 2..52 {
        let pod = lab.pod(number);
        let start = Instant::now();
        router.attach(pod.enrolled()).await.unwrap();
        times.push(start.elapsed());
        pods.push(pod);
    }
    for pod in pods {
        let stream = lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap();
        assert_eq!(greeting(&stream).peer.ip(), pod.address);
    }
    times.sort();
    // Told, not judged: what else the machine does is not this test's to say.
    println!(
        "attach of 50 pods: p50 {:?}, worst {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
}
