use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{
    test_pool::{Issued, TRUST_DOMAIN, TestPool},
    *,
};

const DEADLINE: Duration = Duration::from_secs(20);

fn host(name: &str) -> HostName {
    HostName::parse("host", name).unwrap()
}

/// Both ends of a handshake. In TLS 1.3 the client learns of a refusal only when it
/// reads, so each end writes a byte and reads the other's.
async fn shake(
    server: Arc<ServerConfig>,
    client: ClientConfig,
) -> (
    io::Result<server::TlsStream<DuplexStream>>,
    io::Result<client::TlsStream<DuplexStream>>,
) {
    let (near, far) = duplex(16 * 1024);
    let serve = async {
        let mut stream = TlsAcceptor::from(server).accept(near).await?;
        stream.write_all(b"s").await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let dial = async {
        let name = ServerName::try_from("means.nothing").unwrap();
        let mut stream = TlsConnector::from(Arc::new(client)).connect(name, far).await?;
        stream.write_all(b"c").await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    timeout(DEADLINE, async { tokio::join!(serve, dial) })
        .await
        .expect("a handshake ends")
}

/// Our credentials.
fn node(pool: &TestPool) -> PoolTls {
    PoolTls::load(pool.files("node", &pool.virtual_node())).unwrap()
}

/// A host's, to serve us: as the agent does.
fn agent(pool: &TestPool, issued: &Issued) -> Arc<ServerConfig> {
    let files = pool.files("agent", issued);
    let chain = certificates(&files.certificate, issued.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    Arc::new(config)
}

#[tokio::test]
async fn a_host_is_known_by_the_name_in_its_certificate() {
    let pool = TestPool::new();
    let tls = node(&pool);
    let (served, dialled) = shake(tls.server(), pool.dialer(Some(&pool.host("host-a")))).await;
    dialled.unwrap();
    let served = served.unwrap();
    let chain = served.get_ref().1.peer_certificates();
    assert_eq!(tls.host(chain).unwrap(), host("host-a"));
    assert_eq!(served.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
}

#[tokio::test]
async fn nobody_but_a_host_of_the_pool_is_served() {
    let (pool, other) = (TestPool::new(), TestPool::new());
    let tls = node(&pool);
    let uri = |uri: &str| pool.issue(&[uri]);
    let a = format!("spiffe://{TRUST_DOMAIN}/host/host-a");
    let b = format!("spiffe://{TRUST_DOMAIN}/host/host-b");
    for (who, issued) in [
        ("nobody", None),
        ("a host of another pool", Some(other.host("host-a"))),
        ("a tenant", Some(pool.virtual_node())),
        (
            "a host of another trust domain",
            Some(uri("spiffe://elsewhere/host/host-a")),
        ),
        ("a workload", Some(uri("spiffe://pool.test/ns/shop/sa/web"))),
        ("a member without a name", Some(pool.issue(&[]))),
        ("a member with two names", Some(pool.issue(&[&a, &b]))),
    ] {
        let (served, dialled) = shake(tls.server(), pool.dialer(issued.as_ref())).await;
        assert!(served.is_err(), "{who} was served");
        assert!(dialled.is_err(), "{who} was not told");
    }
}

#[tokio::test]
async fn only_the_host_that_is_meant_is_spoken_with() {
    let (pool, other) = (TestPool::new(), TestPool::new());
    let tls = node(&pool);
    let meant = host("host-a");
    let right = agent(&pool, &pool.host("host-a"));
    let (served, dialled) = shake(right, tls.client(&meant).unwrap()).await;
    served.unwrap();
    dialled.unwrap();
    for (who, config) in [
        ("another host", agent(&pool, &pool.host("host-b"))),
        (
            "the host's name of another pool",
            agent(&other, &other.host("host-a")),
        ),
        ("a tenant", agent(&pool, &pool.virtual_node())),
    ] {
        let (_, dialled) = shake(config, tls.client(&meant).unwrap()).await;
        let error = dialled.expect_err(who).to_string();
        assert!(error.contains("certificate"), "{who}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn changed_files_are_taken_up_and_broken_ones_are_not() {
    let pool = TestPool::new();
    let first = pool.virtual_node();
    let files = pool.files("node", &first);
    let tls = Arc::new(PoolTls::load(files.clone()).unwrap());
    let stop = CancellationToken::new();
    let following = tokio::spawn({
        let (tls, stop) = (Arc::clone(&tls), stop.clone());
        async move { tls.follow_files(Duration::from_secs(30), stop).await }
    });
    let before = tls.server();

    std::fs::write(&files.certificate, "half a certifi").unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(Arc::ptr_eq(&before, &tls.server()), "a broken file was taken");

    let second = pool.virtual_node();
    // A certificate without its key, as while both are being replaced.
    std::fs::write(&files.certificate, &second.certificate).unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(Arc::ptr_eq(&before, &tls.server()), "half of a pair was taken");

    std::fs::write(&files.key, &second.key).unwrap();
    timeout(Duration::from_secs(600), async {
        while Arc::ptr_eq(&before, &tls.server()) {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
    .await
    .expect("the new pair is taken up");
    stop.cancel();
    following.await.unwrap();
}

#[test]
fn what_cannot_be_used_is_named() {
    let pool = TestPool::new();
    let issued = pool.virtual_node();
    let good = pool.files("node", &issued);
    let missing = Files {
        key: "/nowhere/key.pem".into(),
        ..good.clone()
    };
    let message = |files| PoolTls::load(files).err().unwrap().to_string();
    assert_eq!(message(missing), "cannot read /nowhere/key.pem");
    let mixed = pool.files(
        "mixed",
        &Issued {
            key: pool.host("x").key,
            ..issued
        },
    );
    assert!(message(mixed).ends_with("are no pair that TLS can use"));
    let swapped = Files {
        certificate: good.key.clone(),
        ..good
    };
    assert!(message(swapped).ends_with("holds no certificate"));
}
