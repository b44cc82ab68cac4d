//! Bytes there and back.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab::{Lab, VIP, service, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reaches_a_replica_on_the_other_host_through_its_service() {
    let lab = Lab::new().await;
    let client = lab.pod(0, "client").await;
    let web = lab.pod(1, "web").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.workload(web.endpoint_of("web", &[(80, 8080)]));
    lab.control.settled().await;
    let listener = web.listen(8080);

    let mut stream = within("connect", client.connect((VIP, 80))).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let (mut server, peer) = within("accept", listener.accept()).await.unwrap();
    assert_eq!(peer.ip(), client.address);
    let mut got = [0; 5];
    within("read", server.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"hello");
    server.write_all(b"goodbye").await.unwrap();
    server.shutdown().await.unwrap();
    let mut back = Vec::new();
    within("read back", stream.read_to_end(&mut back)).await.unwrap();
    assert_eq!(back, b"goodbye");
}
