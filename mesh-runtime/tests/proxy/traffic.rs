//! Bytes there and back.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::lab::{Lab, Pod, VIP, service, until, within};

/// A client on one host, and a replica of the Service `web` on the other.
async fn client_and_web(lab: &Lab) -> (Pod, Pod, TcpListener) {
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[(80, 8080)]));
    lab.control.settled().await;
    let listener = web.listen(8080);
    (client, web, listener)
}

async fn both_ends(client: &Pod, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let stream = within("connect", client.connect((VIP, 80))).await.unwrap();
    let (server, _) = within("accept", listener.accept()).await.unwrap();
    (stream, server)
}

async fn read_all(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    within("the end", stream.read_to_end(&mut bytes))
        .await
        .map(|_| bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reaches_a_replica_on_the_other_host_through_its_service() {
    let lab = Lab::new().await;
    let (client, web, listener) = client_and_web(&lab).await;
    let mut stream = within("connect", client.connect((VIP, 80))).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), SocketAddr::new(VIP.into(), 80));
    stream.write_all(b"hello").await.unwrap();
    let (mut server, peer) = within("accept", listener.accept()).await.unwrap();
    assert_eq!(peer.ip(), client.address, "the app sees the client's own address");
    assert_eq!(server.local_addr().unwrap(), web.at(8080));
    let mut got = [0; 5];
    within("read", server.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"hello");
    server.write_all(b"goodbye").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap(), b"goodbye");
    drop((stream, server));

    until("both ends report it", async || {
        let counted = |host: usize, reporter: &str| {
            lab.metrics(host).lines().any(|l| {
                l.starts_with("istio_tcp_connections_closed_total")
                    && l.contains(&format!("reporter=\"{reporter}\""))
                    && l.contains(&format!("source_principal=\"{}\"", client.identity()))
                    && l.contains(&format!("destination_principal=\"{}\"", web.identity()))
                    && l.contains("response_flags=\"-\"")
                    && l.ends_with(" 1")
            })
        };
        counted(0, "source") && counted(1, "destination")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_end_its_half_and_still_receive() {
    let lab = Lab::new().await;
    let (client, _web, listener) = client_and_web(&lab).await;

    let (mut stream, mut server) = both_ends(&client, &listener).await;
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    assert_eq!(read_all(&mut stream).await.unwrap(), b"answer");

    let (mut stream, mut server) = both_ends(&client, &listener).await;
    server.write_all(b"greeting").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap(), b"greeting");
    stream.write_all(b"late").await.unwrap();
    drop(stream);
    assert_eq!(read_all(&mut server).await.unwrap(), b"late");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_of_either_side_reaches_the_other_as_a_reset() {
    let lab = Lab::new().await;
    let (client, _web, listener) = client_and_web(&lab).await;
    let reset = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;

    let (stream, mut server) = both_ends(&client, &listener).await;
    stream.set_zero_linger().unwrap();
    drop(stream);
    assert!(reset(read_all(&mut server).await.unwrap_err()));

    let (mut stream, server) = both_ends(&client, &listener).await;
    server.set_zero_linger().unwrap();
    drop(server);
    assert!(reset(read_all(&mut stream).await.unwrap_err()));
}

/// Bytes that differ from their neighbours, so that a lost piece shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn megabytes_in_both_directions_at_once_arrive_whole() {
    let lab = Lab::new().await;
    let (client, _web, listener) = client_and_web(&lab).await;
    let (stream, server) = both_ends(&client, &listener).await;
    let data = pattern(8 << 20);
    let mut tasks = JoinSet::new();
    for end in [stream, server] {
        let data = data.clone();
        tasks.spawn(async move {
            let (mut read, mut write) = end.into_split();
            let sent = data.clone();
            let sending = tokio::spawn(async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.unwrap();
            sending.await.unwrap();
            assert!(got == data, "{} bytes of {}", got.len(), data.len());
        });
    }
    within("both directions", async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_does_not_read_stalls_only_itself() {
    let lab = Lab::new().await;
    let (client, _web, listener) = client_and_web(&lab).await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let (mut stream, server) = both_ends(&client, &listener).await;
        let sending = tokio::spawn(async move {
            // More than all windows and buffers on the way take.
            let _cut_at_the_end = stream.write_all(&vec![0; 64 << 20]).await;
        });
        stalled.push((sending, server));
    }
    let (mut stream, mut server) = both_ends(&client, &listener).await;
    for _ in 0..20 {
        stream.write_all(b"ping").await.unwrap();
        let mut got = [0; 4];
        within("through", server.read_exact(&mut got)).await.unwrap();
    }
    for (sending, _server) in stalled {
        assert!(!sending.is_finished(), "nothing held the sender back");
        sending.abort();
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_at_once_are_all_served_and_leave_no_descriptor() {
    let lab = Lab::new().await;
    let (client, _web, listener) = client_and_web(&lab).await;
    let server = tokio::spawn(async move {
        let mut echoes = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            echoes.spawn(async move {
                let (mut read, mut write) = stream.split();
                // A client may be gone before its last byte is echoed.
                let _gone = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let exchange = async |number: u32| {
        let mut stream = within("connect", client.connect((VIP, 80))).await.unwrap();
        let message = number.to_be_bytes();
        stream.write_all(&message).await.unwrap();
        let mut got = [0; 4];
        within("echo", stream.read_exact(&mut got)).await.unwrap();
        assert_eq!(got, message);
        stream
    };
    drop(exchange(0).await);
    until("the first is gone", async || lab.live(0) + lab.live(1) == 0).await;
    let before = descriptors();
    let streams = futures::future::join_all((0..1000).map(exchange)).await;
    assert!(descriptors() > before + 3000, "they were not open at once");
    drop(streams);
    until("nothing is left of them", async || {
        // Tunnels that were opened for the crowd stay for a while, two ends each.
        descriptors() <= before + 2 * 20
    })
    .await;
    server.abort();
}
