//! What an enrolled pod's own connections become.

use std::net::SocketAddr;

use crate::lab::{DEADLINE, Lab, VIP, echo, greeting};

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_connection_keeps_both_its_addresses() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let pod = lab.pod(2);
    router.attach(pod.enrolled()).await.unwrap();

    let stream = lab.space(&pod).connect((VIP, 80), DEADLINE).unwrap();
    let said = greeting(&stream);
    assert_eq!(said.listener, "outbound");
    assert_eq!(
        said.local,
        SocketAddr::from((VIP, 80)),
        "the original destination"
    );
    assert_eq!(said.peer, stream.local_addr().unwrap(), "the pod's own address");
    assert_eq!(echo(&stream, "hello").unwrap(), "hello");
}
