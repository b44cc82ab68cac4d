//! A pod's right to run ends by the clock, whatever has become of the agent.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::{Duration, Instant},
};

use mesh_runtime::redirect::{BootTime, Deadline, Device, Reason, Router};

use crate::{
    frame::{self, Tap, UDP, contains},
    lab::{
        DEADLINE, Lab, Pod, Proxy, REFUSAL, REMOTE_POD, STRANGER, UPLINK, VIP, count, echo, eventually,
        greeting, serve,
    },
};

const MARKER: &[u8] = b"after the end";
/// Long enough for what a test does before it.
const LIFE: Duration = Duration::from_secs(3);

fn until(device: Device, deadline: Deadline) -> Device {
    Device { deadline, ..device }
}

fn has_passed(deadline: Deadline) -> bool {
    deadline.has_passed(BootTime::now())
}

/// Whether bytes still come back, in less time than a test has.
fn answers(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(REFUSAL)).unwrap();
    let mut byte = [0];
    stream.write_all(b"?").is_ok() && stream.read_exact(&mut byte).is_ok()
}

fn of(tap: &Tap, address: Ipv4Addr) -> Option<Vec<u8>> {
    tap.drain()
        .into_iter()
        .find(|f| f.len() > 34 && f[26..30] == address.octets())
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_deadline_nothing_of_a_pod_or_to_it_passes_though_no_agent_looks_after_it() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let (meshed, plain, other) = (lab.pod(2), lab.pod(3), lab.pod(4));
    let end = Deadline::At(BootTime::now() + LIFE);
    router.attach(until(meshed.enrolled(), end)).await.unwrap();
    router.attach(until(plain.unmeshed(), end)).await.unwrap();
    router.attach(other.unmeshed()).await.unwrap();
    let _remote = serve(&lab.outside, REMOTE_POD, 15008);
    let _next_door = serve(lab.space(&other), other.address, 8080);
    let _own = serve(lab.space(&plain), plain.address, 8080);

    let outbound = lab.space(&meshed).connect((VIP, 80), DEADLINE).unwrap();
    let inbound = lab.outside.dial(REMOTE_POD, (meshed.address, 15008)).unwrap();
    let tunnel = lab.router.dial(meshed.address, (REMOTE_POD, 15008)).unwrap();
    let local = lab
        .space(&plain)
        .connect((other.address, 8080), DEADLINE)
        .unwrap();
    let from_outside = lab.outside.dial(REMOTE_POD, (plain.address, 8080)).unwrap();
    let control = lab.outside.dial(REMOTE_POD, (other.address, 8080)).unwrap();
    let all = [&outbound, &inbound, &tunnel, &local, &from_outside];
    for stream in all.into_iter().chain([&control]) {
        greeting(stream);
        assert_eq!(echo(stream, "before").unwrap(), "before");
    }
    assert!(!has_passed(end), "the machine is too slow for this test");

    // What moves deadlines is gone; the proxy's sockets still stand.
    let drops = router.drops();
    drop(router);
    eventually("the end", || has_passed(end));
    let outside = lab.outside.tap(UPLINK);
    let next_door = lab.space(&other).tap("eth0");
    let inside = lab.space(&plain).tap("eth0");
    for (i, stream) in all.into_iter().enumerate() {
        assert!(!answers(stream), "connection {i} goes on");
    }
    // Datagrams of the plain pod's, out and next door, and one to it from there.
    for to in [STRANGER, other.address] {
        let sent = plain.frame(to, UDP, frame::udp(1234, 9999, MARKER)).bytes();
        inside.send(&sent).unwrap();
    }
    for to in [plain.address, STRANGER] {
        let sent = other.frame(to, UDP, frame::udp(1234, 9999, MARKER)).bytes();
        next_door.send(&sent).unwrap();
    }
    let last = outside.find(DEADLINE, |f| contains(f, MARKER)).unwrap();
    assert_eq!(
        last[26..30],
        other.address.octets(),
        "the last that was sent, and the only one to get out"
    );
    assert!(count(&drops, Reason::RightEnded) >= 3);
    assert_eq!(of(&next_door, plain.address), None);
    assert_eq!(of(&inside, other.address), None);
    for pod in [&meshed, &plain] {
        assert_eq!(of(&outside, pod.address), None, "left the router");
    }
    assert_eq!(echo(&control, "after").unwrap(), "after", "the others go on");
}

async fn open_again(lab: &Lab) -> (Router, Proxy) {
    let (router, listeners) = Router::open(lab.config("acme")).await.unwrap();
    (router, Proxy::start(listeners))
}

fn talks(lab: &Lab, pod: &Pod) -> bool {
    lab.space(pod)
        .connect((VIP, 80), REFUSAL)
        .is_ok_and(|stream| answers(&stream))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_is_moved_ahead_keeps_a_pod_going_and_the_next_agent_finds_it() {
    let mut lab = Lab::new();
    let (router, proxy) = lab.open().await;
    let pod = lab.pod(2);
    let first = Deadline::At(BootTime::now() + LIFE);
    router.attach(until(pod.enrolled(), first)).await.unwrap();
    let stream = lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap();
    greeting(&stream);
    let mut last = first;
    while !has_passed(first) {
        last = Deadline::At(BootTime::now() + LIFE);
        router.set_deadlines([(pod.address, last)].into()).await.unwrap();
        tokio::time::sleep(LIFE / 10).await;
    }
    assert_eq!(echo(&stream, "still here").unwrap(), "still here");
    drop(router);
    proxy.die().await;

    // An agent that dies and comes back moves nothing by that.
    let begun = Instant::now();
    let (router, proxy) = open_again(&lab).await;
    router
        .attach(until(pod.enrolled(), Deadline::Never))
        .await
        .unwrap();
    assert_eq!(router.deadline(pod.address).await.unwrap(), Some(last));
    eventually("the end", || has_passed(last));
    assert!(begun.elapsed() <= LIFE + REFUSAL);
    assert!(!talks(&lab, &pod));
    drop(router);
    proxy.die().await;
    let (router, _proxy) = open_again(&lab).await;
    router
        .attach(until(pod.enrolled(), Deadline::Never))
        .await
        .unwrap();
    assert!(!talks(&lab, &pod), "what is over stays over");
    router
        .set_deadlines([(pod.address, Deadline::Never)].into())
        .await
        .unwrap();
    assert!(talks(&lab, &pod), "until somebody says otherwise");
    assert_eq!(router.deadline(STRANGER).await.unwrap(), None);
}
