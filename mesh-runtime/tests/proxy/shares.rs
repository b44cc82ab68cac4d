//! Who takes more than his share: a pod, a peer, strangers. The others are served
//! meanwhile, and what was taken comes back.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use bounds::door::Places;
use mesh_runtime::limits::Limits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use crate::lab::{Lab, Pod, carries, lives, until, within};

/// Small enough to be used up by a test: a pod may hold a good third of it.
fn few_connections() -> Limits {
    Limits {
        pods: 4,
        connections: 160,
        connections_promised: 4,
        ..Limits::default()
    }
}

/// More than any pod may have of [`few_connections`].
const MANY: usize = 200;

fn echo(pod: &Pod) {
    let listener = pod.listen(8080);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _gone = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

/// What a metric says of a bound; 0 if it says nothing.
fn bound(lab: &Lab, host: usize, metric: &str, labels: &str) -> u64 {
    let start = format!("mesh_bound_{metric}{{{labels}}} ");
    let text = lab.metrics(host);
    let value = text.lines().find_map(|line| line.strip_prefix(&start));
    value.map_or(0, |value| value.parse().unwrap())
}

fn held(lab: &Lab, host: usize, what: &str) -> u64 {
    bound(lab, host, "held", &format!("bound=\"{what}\""))
}

/// Connections until one is refused.
async fn take_all(pod: &Pod, to: SocketAddr) -> Vec<TcpStream> {
    let mut taken = Vec::new();
    while taken.len() < MANY {
        let Ok(mut stream) = pod.connect(to).await else {
            return taken;
        };
        if !lives(&mut stream).await {
            return taken;
        }
        taken.push(stream);
    }
    panic!("{MANY} connections, and none was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_takes_all_the_connections_it_can_keeps_no_other_from_connecting() {
    let lab = Lab::within(few_connections()).await;
    let greedy = lab.pod(0, "greedy").await;
    let modest = lab.pod(0, "modest").await;
    let web = lab.pod(1, "web").await;
    let near = lab.pod(0, "near").await;
    lab.control.settled().await;
    echo(&web);
    echo(&near);
    for to in [web.at(8080), near.at(8080)] {
        let taken = take_all(&greedy, to).await;
        assert!(taken.len() > 8, "{} to {to}: it was alone", taken.len());
        // To where the greedy one goes, and to where it doesn't.
        let mut beside = Vec::new();
        for n in 0..few_connections().connections_promised {
            for to in [web.at(8080), near.at(8080)] {
                let mut stream = modest.connect(to).await.unwrap();
                assert!(lives(&mut stream).await, "the {n}th to {to}");
                beside.push(stream);
            }
        }
        drop((taken, beside));
        until("all is given back", async || {
            // Idle tunnels are kept.
            let tunnels = lab.tunnels(0) as u64;
            held(&lab, 0, "connections") == tunnels && held(&lab, 1, "connections") <= tunnels
        })
        .await;
    }
    let refusals: u64 = [0, 1]
        .into_iter()
        .flat_map(|host| ["pod", "peer"].map(|level| (host, level)))
        .map(|(host, level)| {
            let labels = format!("bound=\"connections\",level=\"{level}\"");
            bound(&lab, host, "refusals_total", &labels)
        })
        .sum();
    assert!(refusals >= 2, "{refusals}");
    assert!(carries(greedy.connect(web.at(8080)).await).await);
}

/// An address of the wire's for each of so many strangers.
fn strangers(lab: &Lab, count: u8) -> Vec<Ipv4Addr> {
    let addresses: Vec<_> = (1..=count).map(|n| Ipv4Addr::new(198, 51, 100, n)).collect();
    for address in &addresses {
        lab.wire.ip(&format!("addr add {address}/32 dev lo\n"));
    }
    addresses
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_crowd_the_mesh_port_keep_no_known_peer_out() {
    let lab = Lab::within(Limits {
        strangers: Places { all: 32, of_one: 4 },
        handshakes: Places { all: 32, of_one: 16 },
        ..Limits::default()
    })
    .await;
    let mut clients = Vec::new();
    for n in 0..5 {
        clients.push(lab.pod(0, &format!("client-{n}")).await);
    }
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    // As many as there are places, thrice; each comes again as soon as it is hung up on.
    let mut crowd = JoinSet::new();
    for address in strangers(&lab, 24) {
        for _ in 0..4 {
            let (netns, to) = (lab.wire.netns.clone(), web.at(15008));
            crowd.spawn(async move {
                loop {
                    if let Ok(mut stream) = crate::lab::connect_from(&netns, address, to).await {
                        let _ended = stream.read(&mut [0; 16]).await;
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
    }
    until("they crowd the port", async || {
        held(&lab, 1, "handshakes") >= 32
            && bound(&lab, 1, "refusals_total", "bound=\"handshakes\",level=\"peer\"") > 96
    })
    .await;
    // Each needs a tunnel of its own, and with it a handshake.
    for client in &clients {
        assert!(
            carries(client.connect(web.at(8080)).await).await,
            "{}",
            client.name
        );
    }
    assert!(held(&lab, 1, "handshakes") <= 64);
    crowd.abort_all();
    until("the port is quiet", async || held(&lab, 1, "handshakes") == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_closed_pair_on_one_host_is_reaped() {
    let lab = Lab::within(Limits {
        half_closed: Duration::from_secs(1),
        ..Limits::default()
    })
    .await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(0, "web").await;
    let far = lab.pod(1, "far").await;
    lab.control.settled().await;
    for to in [&web, &far] {
        let listener = to.listen(8080);
        let mut stream = client.connect(to.at(8080)).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        let (mut server, _) = within("accept", listener.accept()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut got = Vec::new();
        within("the client's last", server.read_to_end(&mut got))
            .await
            .unwrap();
        // From here on nobody says anything, and the server would go on for ever.
        let end = within("the end", stream.read(&mut [0; 1])).await;
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        until("nothing is left of it", async || {
            lab.live(0) == 0 && lab.live(1) == 0
        })
        .await;
        drop(server);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_dies_after_its_last_word_takes_its_server_with_it() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(0, "web").await;
    lab.control.settled().await;
    let listener = web.listen(8080);
    let mut stream = client.connect(web.at(8080)).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    let (mut server, _) = within("accept", listener.accept()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    within("the client's last", server.read_to_end(&mut got))
        .await
        .unwrap();
    assert_eq!(lab.live(0), 2, "both ends' reports");
    stream.set_zero_linger().unwrap();
    drop(stream);
    until("it is over", async || lab.live(0) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_cut_and_one_that_carries_is_not() {
    let lab = Lab::within(Limits {
        idle: Duration::from_secs(2),
        half_closed: Duration::from_secs(1),
        ..Limits::default()
    })
    .await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    let mut busy = client.connect(web.at(8080)).await.unwrap();
    let mut silent = client.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut busy).await && lives(&mut silent).await);
    let mut buffer = [0; 1];
    let ended = within("the silent one's end", async {
        loop {
            assert!(lives(&mut busy).await, "cut though it carried");
            let wait = tokio::time::timeout(Duration::from_millis(100), silent.read(&mut buffer));
            if let Ok(ended) = wait.await {
                return ended;
            }
        }
    })
    .await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert!(lives(&mut busy).await);
}
