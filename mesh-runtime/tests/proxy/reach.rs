//! Who can be reached, how, and who can't.

use std::{io::ErrorKind, net::Ipv4Addr, time::Duration};

use mesh_runtime::pod::Mode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::lab::{Lab, STRANGER, VIP, service, until, within};

/// Says its name and whom it sees, and closes.
fn serve(listener: TcpListener, name: &'static str) {
    tokio::spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            let line = format!("{name} {}", peer.ip());
            // A client may not wait for it.
            let _gone = stream.write_all(line.as_bytes()).await;
        }
    });
}

/// What the server said; the kind of error if there was none.
async fn ask(stream: std::io::Result<TcpStream>) -> Result<String, ErrorKind> {
    let mut stream = stream.map_err(|e| e.kind())?;
    let mut said = String::new();
    within("an answer or an end", stream.read_to_string(&mut said))
        .await
        .map_err(|e| e.kind())?;
    Ok(said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_reached_by_its_own_address_on_either_host() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let near = lab.pod(0, "near").await;
    let far = lab.pod(1, "far").await;
    lab.control.settled().await;
    serve(near.listen(8080), "near");
    serve(far.listen(8080), "far");
    let seen = client.address;
    assert_eq!(
        ask(client.connect(near.at(8080)).await).await,
        Ok(format!("near {seen}"))
    );
    assert_eq!(
        ask(client.connect(far.at(8080)).await).await,
        Ok(format!("far {seen}"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_reaches_itself_through_its_service() {
    let lab = Lab::new().await;
    let web = lab.pod(0, "web").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[]));
    lab.control.settled().await;
    serve(web.listen(8080), "web");
    assert_eq!(
        ask(web.connect((VIP, 80)).await).await,
        Ok("web 169.254.1.1".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_world_outside_is_reached_as_it_is_and_reaches_pods_in_plaintext() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    lab.control.settled().await;
    serve(lab.wire.listen((STRANGER, 443)), "stranger");
    let said = ask(client.connect((STRANGER, 443)).await).await;
    assert_eq!(said, Ok(format!("stranger {}", client.address)));

    serve(client.listen(9000), "client");
    let said = ask(lab.wire.connect(client.at(9000)).await).await.unwrap();
    assert!(said.starts_with("client "), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unmeshed_and_meshed_pods_reach_each_other_in_plaintext() {
    let lab = Lab::new().await;
    let meshed = lab.pod(0, "meshed").await;
    let mut unmeshed = Vec::new();
    for (host, name) in [(0, "plain-near"), (1, "plain-far")] {
        let pod = lab.start(host, name, Mode::Unmeshed).await;
        let mut workload = pod.workload();
        workload.tunnel_protocol = 0;
        lab.control.workload(workload);
        unmeshed.push(pod);
    }
    lab.control.service(service("meshed", &[VIP], &[(80, 8080)]));
    lab.control.workload(meshed.endpoint_of("meshed", &[]));
    lab.control.settled().await;
    serve(meshed.listen(8080), "meshed");
    for pod in &unmeshed {
        serve(pod.listen(8080), "plain");
        let said = ask(meshed.connect(pod.at(8080)).await).await;
        assert_eq!(said, Ok(format!("plain {}", meshed.address)), "to {}", pod.name);
        let said = ask(pod.connect(meshed.at(8080)).await).await;
        assert_eq!(said, Ok(format!("meshed {}", pod.address)), "from {}", pod.name);
        let said = ask(pod.connect((VIP, 80)).await).await;
        assert_eq!(
            said,
            Ok(format!("meshed {}", pod.address)),
            "from {} by the Service",
            pod.name
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reached_is_reset_at_once() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    let empty = Ipv4Addr::new(10, 96, 0, 81);
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.service(service("empty", &[empty], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[]));
    let local = Ipv4Addr::new(10, 96, 0, 82);
    lab.control.service(service("local", &[local], &[(80, 8080)]));
    let mut here = web.endpoint_of("local", &[]);
    here.uid = "slice".to_owned();
    here.tunnel_protocol = 0;
    here.addresses = vec![vec![127, 0, 0, 1]];
    lab.control.workload(here);
    lab.control.settled().await;
    let _open = lab.hosts[0].router.listen((Ipv4Addr::LOCALHOST, 8080));
    for (what, to) in [
        ("a Service without endpoints", (empty, 80)),
        ("a port that the Service has not", (VIP, 81)),
        ("a port on which nobody listens", (web.address, 9999)),
        ("a Service whose endpoint is the host", (local, 80)),
        ("a mesh port of a pod", (web.address, 15008)),
    ] {
        let begun = std::time::Instant::now();
        let error = ask(client.connect(to).await).await.unwrap_err();
        assert!(
            matches!(error, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused),
            "{what}: {error:?}"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(4),
            "{what} took {:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_pod_is_waited_for_and_never_spoken_to_in_plaintext() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let known = lab.pod(1, "known").await;
    let late = lab.start(1, "late", Mode::Enrolled).await;
    lab.control.settled().await;
    serve(known.listen(8080), "known");
    serve(late.listen(8080), "late");
    let asked = tokio::spawn({
        let stream = client.connect(late.at(8080)).await;
        ask(stream)
    });
    // Those that were begun later are served meanwhile, tunnel and all: a proxy that
    // did not wait would have failed the first by now.
    for _ in 0..5 {
        let said = ask(client.connect(known.at(8080)).await).await;
        assert_eq!(said, Ok(format!("known {}", client.address)));
    }
    assert!(!asked.is_finished());
    lab.control.workload(late.workload());
    assert_eq!(asked.await.unwrap(), Ok(format!("late {}", client.address)));
    assert!(!lab.metrics(1).contains("connection_security_policy=\"none\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_cannot_be_dialled_is_passed_over() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let good = lab.pod(1, "good").await;
    let refusing = lab.pod(1, "refusing").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(good.endpoint_of("web", &[]));
    lab.control.workload(refusing.endpoint_of("web", &[]));
    lab.control.settled().await;
    serve(good.listen(8080), "good");
    for _ in 0..20 {
        let said = ask(client.connect((VIP, 80)).await).await;
        assert_eq!(said, Ok(format!("good {}", client.address)));
    }
    assert!(
        lab.metrics(1).contains("response_flags=\"CONNECT\""),
        "the refusing endpoint was never tried"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_failed_is_left_alone_for_a_while_but_not_for_ever() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let good = lab.pod(1, "good").await;
    let late = lab.pod(1, "late").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(good.endpoint_of("web", &[]));
    lab.control.workload(late.endpoint_of("web", &[]));
    lab.control.settled().await;
    serve(good.listen(8080), "good");
    let refused = || {
        let metrics = lab.metrics(1);
        let line = metrics
            .lines()
            .find(|l| l.starts_with("istio_tcp_connections_closed") && l.contains("=\"CONNECT\""));
        line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse::<u32>().unwrap())
    };
    let ask_web = async || ask(client.connect((VIP, 80)).await).await.unwrap();
    until("the late endpoint was tried", async || {
        assert!(ask_web().await.starts_with("good "));
        refused() > 0
    })
    .await;
    for _ in 0..40 {
        assert!(ask_web().await.starts_with("good "));
    }
    // Half of them, if each had to find out for itself. It may have rested
    // meanwhile, more than once on a slow machine.
    assert!(refused() <= 4, "tried {} times", refused());

    // The last one left is tried all the same, and then counts again.
    serve(late.listen(8080), "late");
    lab.control.remove_address(&good.uid());
    lab.control.settled().await;
    assert!(ask_web().await.starts_with("late "));
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_clients_of_a_peer_that_swallows_packets_fail_together() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let hole = lab.pod(1, "hole").await;
    lab.control.settled().await;
    lab.wire.ip(&format!("route add blackhole {}/32\n", hole.address));
    let begun = std::time::Instant::now();
    let all = (0..8).map(async |_| ask(client.connect(hole.at(8080)).await).await);
    for end in futures::future::join_all(all).await {
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
    }
    // One connect's timeout, not eight of them one after the other.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_somebody_else_than_the_mesh_says_is_not_spoken_to() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    let mut wrong = web.workload();
    wrong.service_account = "other".to_owned();
    lab.control.workload(wrong);
    lab.control.settled().await;
    serve(web.listen(8080), "web");
    assert_eq!(
        ask(client.connect(web.at(8080)).await).await,
        Err(ErrorKind::ConnectionReset)
    );
    until("the refusal is counted", async || {
        lab.metrics(0).contains("response_flags=\"TLS_FAILURE\"")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_mesh_reaches_in_a_way_not_spoken_here_is_refused() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    let mut behind = web.workload();
    behind.waypoint = Some(Default::default());
    lab.control.workload(behind);
    lab.control.settled().await;
    serve(web.listen(8080), "web");
    assert_eq!(
        ask(client.connect(web.at(8080)).await).await,
        Err(ErrorKind::ConnectionReset)
    );
}
