use super::*;

fn request(command: &str, args: &str) -> Vec<u8> {
    serde_json::to_vec(&json!({
        "command": command,
        "container_id": "c1",
        "netns": "/run/netns/x",
        "ifname": "eth0",
        "args": args,
        "config": {"cniVersion": "1.0.0", "name": "spindrift"},
    }))
    .unwrap()
}

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1";

#[tokio::test]
async fn a_pod_nobody_starts_is_refused_by_name() {
    let reply = answer(&request("ADD", ARGS), &Desk::default()).await;
    assert!(!reply.ok);
    let message = reply.output["msg"].as_str().unwrap();
    assert!(
        message.contains("shop/web-0") && message.contains("u-1"),
        "{message}"
    );
}

#[tokio::test]
async fn an_expected_pod_gets_what_its_driver_answers() {
    let desk = Desk::default();
    let mut expectation = desk.expect(&"u-1".parse().unwrap());
    let driver = tokio::spawn(async move {
        let add = expectation.next().await.unwrap();
        assert_eq!(
            (add.sandbox.as_str(), add.netns.to_str()),
            ("c1", Some("/run/netns/x"))
        );
        let joined = Joined {
            address: "10.77.1.2".parse().unwrap(),
            gateway: "169.254.1.1".parse().unwrap(),
            mac: [2, 0, 10, 77, 1, 2],
            mtu: 1500,
        };
        add.answer.send(Ok(joined)).unwrap();
    });
    let reply = answer(&request("ADD", ARGS), &desk).await;
    driver.await.unwrap();
    assert!(reply.ok);
    assert_eq!(reply.output["ips"][0]["address"], "10.77.1.2/32");
    assert_eq!(reply.output["interfaces"][0]["mac"], "02:00:0a:4d:01:02");
    assert!(
        desk.of(&"u-1".parse().unwrap()).is_none(),
        "the expectation has ended"
    );
}

#[tokio::test]
async fn a_new_expectation_outlives_the_one_it_replaced() {
    let desk = Desk::default();
    let pod: PodUid = "u-1".parse().unwrap();
    let old = desk.expect(&pod);
    let _new = desk.expect(&pod);
    drop(old);
    assert!(desk.of(&pod).is_some());
}

#[tokio::test]
async fn garbage_is_answered_with_an_error_of_the_specification() {
    let desk = Desk::default();
    for (bytes, code) in [
        (b"".to_vec(), code::DECODING),
        (b"{\"command\":7}".to_vec(), code::DECODING),
        (vec![b'['; 400 << 10], code::DECODING),
        (request("NOPE", ARGS), code::INVALID_ENVIRONMENT),
        (request("ADD", ""), code::INVALID_ENVIRONMENT),
        (request("ADD", "K8S_POD_UID=../x"), code::INVALID_ENVIRONMENT),
    ] {
        let reply = answer(&bytes, &desk).await;
        assert_eq!(
            (reply.ok, reply.output["code"].as_u64()),
            (false, Some(code.into()))
        );
    }
}

#[tokio::test]
async fn a_delete_of_what_is_unknown_succeeds() {
    assert!(answer(&request("DEL", ""), &Desk::default()).await.ok);
    assert!(answer(&request("GC", ""), &Desk::default()).await.ok);
}
