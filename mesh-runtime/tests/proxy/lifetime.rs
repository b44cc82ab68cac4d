//! What comes and goes: pods, certificates, the control plane.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab::{Lab, Pod, VIP, carries, lives, service, until, within};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_goes_lets_its_connections_end_and_then_cuts_them() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    let mut ending = client.connect(web.at(8080)).await.unwrap();
    let mut staying = client.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut ending).await && lives(&mut staying).await);
    let drain = Duration::from_secs(3);
    let begun = std::time::Instant::now();
    let detached = lab.hosts[1].runtime.detach(&web.key, drain);
    let meanwhile = async {
        until("no new one is taken", async || {
            !carries(client.connect(web.at(8080)).await).await
        })
        .await;
        assert!(lives(&mut ending).await, "cut before its time");
        ending.shutdown().await.unwrap();
        let mut rest = Vec::new();
        within("its end", ending.read_to_end(&mut rest)).await.unwrap();
    };
    within("detached", async { tokio::join!(detached, meanwhile) }).await;
    assert!(begun.elapsed() >= drain, "it did not wait for who stayed");
    assert!(!lives(&mut staying).await);
    until("nothing is live", async || lab.live(1) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_connections_all_end_goes_at_once() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    let mut stream = client.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut stream).await);
    drop(stream);
    // The tunnel is still there, idle.
    let begun = std::time::Instant::now();
    within(
        "detached",
        lab.hosts[1].runtime.detach(&web.key, Duration::from_secs(15)),
    )
    .await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_before_they_end_and_connections_do_not_notice() {
    let lab = Lab::new().await;
    lab.control.certificates_live(Duration::from_secs(14));
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    let mut old = client.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut old).await);
    let first = lab.control.issued();
    until("both are renewed", async || lab.control.issued() >= first + 2).await;
    assert!(lives(&mut old).await);
    assert!(lives(&mut client.connect(web.at(8080)).await.unwrap()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_of_an_older_certificate_carries_its_streams_to_their_end_and_no_others() {
    let lab = Lab::new().await;
    lab.control.certificates_live(Duration::from_secs(14));
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    let mut old = client.connect(web.at(8080)).await.unwrap();
    let mut beside = client.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut old).await && lives(&mut beside).await);
    assert_eq!(lab.tunnels(0), 1, "they share one");
    drop(beside);
    until("a new connection has a tunnel of its own", async || {
        assert!(lives(&mut client.connect(web.at(8080)).await.unwrap()).await);
        lab.tunnels(0) == 2
    })
    .await;
    assert!(lives(&mut old).await);
    drop(old);
    until("the old one ends with its last stream", async || {
        lab.tunnels(0) == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_waits_for_the_pods_first_certificate() {
    let lab = Lab::new().await;
    let web = lab.pod(1, "web").await;
    echo(&web);
    lab.control.broker_up(false);
    let client = lab.attach(0, "client", mesh_runtime::pod::Mode::Enrolled).await;
    lab.control.workload(client.workload());
    lab.control.settled().await;
    let mut stream = client.connect(web.at(8080)).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    until("a certificate is asked for in vain", async || {
        lab.control.put_off() > 0
    })
    .await;
    lab.control.broker_up(true);
    let mut got = [0];
    within("the echo", stream.read_exact(&mut got)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_goes_on_as_it_was_while_its_control_plane_is_away() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    echo(&web);
    lab.control.stop();
    until("the streams are gone", async || lab.control.streams() == 0).await;
    assert!(lives(&mut client.connect(web.at(8080)).await.unwrap()).await);
    // What changed meanwhile is told when it is back.
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[]));
    lab.control.restart().await;
    until("both hosts are back", async || lab.control.streams() == 4).await;
    lab.control.settled().await;
    assert!(lives(&mut client.connect((VIP, 80)).await.unwrap()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_cannot_be_taken_is_refused_by_name_and_the_rest_is_taken() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    let mut bad = web.workload();
    bad.uid = "bad".to_owned();
    bad.addresses = vec![vec![1, 2, 3]];
    lab.control.workload(bad);
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[]));
    lab.control.settled().await;
    echo(&web);
    assert!(lives(&mut client.connect((VIP, 80)).await.unwrap()).await);
    let nacks = lab.control.nacks();
    assert!(
        nacks
            .iter()
            .any(|n| n == "bad: addresses[0] has 3 bytes where 4 or 16 are needed"),
        "{nacks:?}"
    );
    lab.control.remove_address(&web.uid());
    lab.control.settled().await;
    assert!(!carries(client.connect((VIP, 80)).await).await);
}
