//! The services over real TLS on loopback, as a host's mesh runtime meets them.

use std::{collections::BTreeMap, future::Future, io, time::Duration};

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    google::rpc::Status as RpcStatus,
};
use hyper_util::rt::TokioIo;
use mesh_api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE,
    istio::certificate::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
};
use pool_agent_api::{Attempt, HostName, Namespace, PodName, PodUid, ServiceAccountName};
use prost_types::{Struct, Value, value};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    snapshot::{Resource, Snapshot},
    *,
};
use crate::{
    placement::Placement,
    pool_tls::test_pool::{Issued, TestPool},
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What is not answered within this is not answered.
const DEADLINE: Duration = Duration::from_secs(20);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("no answer in time")
}

fn host(name: &str) -> HostName {
    HostName::parse("host", name).unwrap()
}

/// `web` is placed on host-a, and that is all there is.
fn placements() -> Placements {
    let web = Placement {
        host: host("host-a"),
        attempt: Attempt::FIRST,
        namespace: Namespace::parse("namespace", "shop").unwrap(),
        name: PodName::parse("name", "web-0").unwrap(),
        service_account: ServiceAccountName::parse("account", "web").unwrap(),
        enrolled: true,
    };
    Placements {
        pods: [(PodUid::parse("uid", "u-1").unwrap(), web)].into(),
        beside: BTreeMap::new(),
        complete: true,
    }
}

struct Served {
    pool: TestPool,
    address: SocketAddr,
    snapshots: watch::Sender<Snapshots>,
    placements: watch::Sender<Arc<Placements>>,
    stop: CancellationToken,
    serving: JoinHandle<Result<(), Error>>,
    registry: Registry,
    _ca: tempfile::TempDir,
}

impl Served {
    async fn start() -> Self {
        let pool = TestPool::new();
        let ca = tempfile::tempdir().unwrap();
        let config = Config {
            node_name: "spindrift".to_owned(),
            cluster: Cluster {
                id: "Kubernetes".to_owned(),
                network: String::new(),
                trust_domain: "cluster.local".to_owned(),
                domain: "cluster.local".to_owned(),
            },
        };
        let mut registry = Registry::default();
        let authority = Authority::open(&ca.path().join("ca"), SystemTime::now()).unwrap();
        let incoming = Incoming::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let control = Control::new(config, authority, incoming, &mut registry);
        let address = control.address().unwrap();
        let tls = Arc::new(PoolTls::load(pool.files("node", &pool.virtual_node())).unwrap());
        let (placements, placed) = watch::channel(Arc::new(placements()));
        let (snapshots, newest) = watch::channel(Snapshots::default());
        let stop = CancellationToken::new();
        let serving = tokio::spawn(control.answer(tls, placed, newest, stop.clone()));
        Self {
            pool,
            address,
            snapshots,
            placements,
            stop,
            serving,
            registry,
            _ca: ca,
        }
    }

    async fn dial(&self, issued: Option<&Issued>) -> Result<Channel, tonic::transport::Error> {
        let connector = TlsConnector::from(Arc::new(self.pool.dialer(issued)));
        let address = self.address;
        Endpoint::from_static("http://mesh")
            .connect_with_connector(tower::service_fn(move |_| {
                let connector = connector.clone();
                async move {
                    let tcp = TcpStream::connect(address).await?;
                    tcp.set_nodelay(true)?;
                    let name = ServerName::try_from("mesh").map_err(io::Error::other)?;
                    Ok::<_, io::Error>(TokioIo::new(connector.connect(name, tcp).await?))
                }
            }))
            .await
    }

    async fn host(&self, name: &str) -> Channel {
        self.dial(Some(&self.pool.host(name))).await.unwrap()
    }

    fn publish(&self, resources: &[(&str, &str)]) {
        let snapshot: Snapshot = resources
            .iter()
            .map(|(name, body)| Resource::new(*name, body.as_bytes().to_vec()))
            .collect();
        self.snapshots.send_modify(|snapshots| {
            snapshots.addresses = Some(Arc::new(snapshot));
            snapshots.authorizations = Some(Arc::default());
        });
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    async fn stop(self) {
        self.stop.cancel();
        soon(self.serving).await.unwrap().unwrap();
    }
}

fn csr(uri: &str) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    let key = KeyPair::generate().unwrap();
    params.serialize_request(&key).unwrap().pem().unwrap()
}

fn impersonating(identity: &str) -> Option<Struct> {
    let value = Value {
        kind: Some(value::Kind::StringValue(identity.to_owned())),
    };
    Some(Struct {
        fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
    })
}

async fn ask(channel: &Channel, csr: String, metadata: Option<Struct>) -> Result<Vec<String>, tonic::Status> {
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    let request = IstioCertificateRequest {
        csr,
        validity_duration: 3600,
        metadata,
    };
    let answer = soon(client.create_certificate(request)).await?;
    Ok(answer.into_inner().cert_chain)
}

/// One delta stream.
struct Xds {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    answers: Streaming<DeltaDiscoveryResponse>,
}

impl Xds {
    async fn open(channel: &Channel) -> Self {
        let (requests, stream) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
        let answers = soon(client.delta_aggregated_resources(ReceiverStream::new(stream)))
            .await
            .unwrap()
            .into_inner();
        Self { requests, answers }
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn subscribe(&self, type_url: &str) {
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            ..Default::default()
        })
        .await;
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        soon(self.answers.message()).await.unwrap().unwrap()
    }

    async fn ack(&self, answer: &DeltaDiscoveryResponse) {
        self.send(DeltaDiscoveryRequest {
            type_url: answer.type_url.clone(),
            response_nonce: answer.nonce.clone(),
            ..Default::default()
        })
        .await;
    }
}

fn names(answer: &DeltaDiscoveryResponse) -> (Vec<&str>, Vec<&str>) {
    (
        answer.resources.iter().map(|r| r.name.as_str()).collect(),
        answer.removed_resources.iter().map(String::as_str).collect(),
    )
}

#[tokio::test]
async fn a_host_gets_a_certificate_for_a_pod_it_runs() {
    let served = Served::start().await;
    let channel = served.host("host-a").await;
    for metadata in [impersonating(WEB), None] {
        let chain = ask(&channel, csr(WEB), metadata).await.unwrap();
        assert_eq!(chain.len(), 3, "leaf, intermediate, roots");
        let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI(WEB)]);
    }
    assert!(
        served
            .metrics()
            .contains(r#"virtual_node_mesh_certificates_total{outcome="Signed"} 2"#),
        "{}",
        served.metrics()
    );
    served.stop().await;
}

#[tokio::test]
async fn a_host_is_refused_the_identity_of_another_hosts_pod_by_name() {
    let served = Served::start().await;
    let channel = served.host("host-b").await;
    let refusal = ask(&channel, csr(WEB), impersonating(WEB)).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert_eq!(
        refusal.message(),
        format!("host host-b asked for {WEB}: no enrolled pod of that identity is placed on it")
    );
    served.stop().await;
}

#[tokio::test]
async fn a_host_is_asked_to_come_again_until_all_placements_are_known() {
    let served = Served::start().await;
    let channel = served.host("host-b").await;
    served
        .placements
        .send_modify(|placements| Arc::make_mut(placements).complete = false);
    let put_off = ask(&channel, csr(WEB), None).await.unwrap_err();
    assert_eq!(put_off.code(), Code::Unavailable);
    served
        .placements
        .send_modify(|placements| Arc::make_mut(placements).complete = true);
    let refusal = ask(&channel, csr(WEB), None).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    served.stop().await;
}

#[tokio::test]
async fn a_malformed_request_is_refused_and_the_next_one_is_served() {
    let served = Served::start().await;
    let channel = served.host("host-a").await;
    for (bad, expected) in [
        (String::new(), "the CSR is not PEM: "),
        ("garbage".to_owned(), "the CSR is not PEM: "),
        ("x".repeat(9_000), "the CSR has 9000 bytes, more than 8192"),
        (csr("https://example.com"), "the CSR's name is no identity: "),
    ] {
        let refusal = ask(&channel, bad, None).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument);
        assert!(refusal.message().starts_with(expected), "{}", refusal.message());
    }
    // Larger than any message that is taken at all.
    let refusal = ask(&channel, "x".repeat(1 << 20), None).await.unwrap_err();
    assert_eq!(refusal.code(), Code::OutOfRange, "{refusal}");
    let metadata = impersonating("spiffe://cluster.local/ns/shop/sa/db");
    let refusal = ask(&channel, csr(WEB), metadata).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert!(ask(&channel, csr(WEB), None).await.is_ok());
    served.stop().await;
}

#[tokio::test]
async fn a_host_that_asks_without_end_is_slowed_down() {
    let served = Served::start().await;
    let channel = served.host("host-a").await;
    let asked = (0..600).map(|_| ask(&channel, "garbage".to_owned(), None));
    let refusal = futures::future::join_all(asked)
        .await
        .into_iter()
        .filter_map(Result::err)
        .find(|status| status.code() == Code::ResourceExhausted)
        .expect("no bound on requests");
    assert_eq!(refusal.message(), "host host-a asks for too many certificates");
    let other = served.host("host-b").await;
    let refusal = ask(&other, "garbage".to_owned(), None).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    served.stop().await;
}

#[tokio::test]
async fn a_host_that_opens_streams_without_end_is_refused_alone() {
    let served = Served::start().await;
    let mut open = vec![];
    // Over any number of connections.
    let refusal = 'refused: {
        for _ in 0..3 {
            let channel = served.host("host-a").await;
            for _ in 0..4 {
                let (requests, stream) = mpsc::channel(16);
                let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
                match soon(client.delta_aggregated_resources(ReceiverStream::new(stream))).await {
                    Ok(answers) => open.push((requests, answers)),
                    Err(refusal) => break 'refused refusal,
                }
            }
        }
        panic!("{} streams of one host are open", open.len());
    };
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    served.publish(&[("a", "1")]);
    let mut other = Xds::open(&served.host("host-b").await).await;
    other.subscribe(ADDRESS_TYPE).await;
    assert_eq!(names(&other.next().await).0, ["a"]);
    served.stop().await;
}

#[tokio::test]
async fn a_host_whose_messages_never_end_fills_its_own_share_alone() {
    use bounds::intake::PAGE;
    use http_body_util::{BodyExt, StreamBody};
    let intake = intake::Intake::new(&Bounds::default());
    let sent = |name: &str, mib: usize| {
        let mut frames = (0..mib * 64).map(|n| {
            let mut frame = vec![0; 16 << 10];
            if n == 0 {
                // The head of a message of 16 MiB.
                frame[..5].copy_from_slice(&[0, 1, 0, 0, 0]);
            }
            hyper::body::Frame::data(bytes::Bytes::from(frame))
        });
        let body = futures::stream::poll_fn(move |_| match frames.next() {
            Some(frame) => std::task::Poll::Ready(Some(Ok::<_, tonic::Status>(frame))),
            None => std::task::Poll::Pending,
        });
        http::Request::post("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources")
            .extension(listener::PeerHost(host(name)))
            .body(tonic::body::Body::new(StreamBody::new(body)))
            .unwrap()
    };
    let mut bodies = vec![];
    let mut read = async |name: &str| {
        let mut body = intake.admit(sent(name, 15)).unwrap().into_body();
        let mut held = 0;
        loop {
            match futures::poll!(std::pin::pin!(body.frame())) {
                std::task::Poll::Ready(Some(Ok(frame))) => {
                    held += frame.data_ref().map_or(0, bytes::Bytes::len)
                }
                std::task::Poll::Ready(Some(Err(status))) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    break;
                }
                _ => break,
            }
        }
        bodies.push(body);
        held
    };
    let mut held = 0;
    for _ in 0..4 {
        held += read("host-a").await;
    }
    assert!(held <= 2 * MAX_XDS_REQUEST + PAGE, "{held} bytes of one host");
    assert_eq!(read("host-b").await, 15 << 20);
}

#[tokio::test]
async fn a_stranger_is_not_spoken_with() {
    let served = Served::start().await;
    let stranger = TestPool::new().host("host-a");
    let tenant = served.pool.virtual_node();
    for issued in [None, Some(&stranger), Some(&tenant)] {
        // TLS 1.3: the dial may succeed before the refusal arrives; no call does.
        if let Ok(channel) = served.dial(issued).await {
            assert!(ask(&channel, csr(WEB), None).await.is_err());
        }
    }
    assert!(
        served
            .metrics()
            .contains("virtual_node_mesh_connections_refused_total 3"),
        "{}",
        served.metrics()
    );
    served.stop().await;
}

#[tokio::test]
async fn bytes_that_are_no_tls_are_hung_up_on_and_others_are_served() {
    let served = Served::start().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 64],
        &[0x16, 3, 1, 0xff, 0xff],
    ] {
        let mut tcp = TcpStream::connect(served.address).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        tcp.shutdown().await.unwrap();
        // An alert at most, then the end.
        let mut answer = Vec::new();
        soon(tcp.read_to_end(&mut answer)).await.ok();
        assert!(answer.len() < 16, "{answer:?}");
    }
    let channel = served.host("host-a").await;
    assert!(ask(&channel, csr(WEB), None).await.is_ok());
    served.stop().await;
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_only_its_own_connection() {
    let served = Served::start().await;
    let connector = TlsConnector::from(Arc::new(served.pool.dialer(Some(&served.pool.host("host-b")))));
    let tcp = TcpStream::connect(served.address).await.unwrap();
    let mut tls = connector
        .connect(ServerName::try_from("mesh").unwrap(), tcp)
        .await
        .unwrap();
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    tls.write_all(&[0xff; 4096]).await.unwrap();
    let mut answer = Vec::new();
    soon(tls.read_to_end(&mut answer)).await.ok();
    let channel = served.host("host-a").await;
    assert!(ask(&channel, csr(WEB), None).await.is_ok());
    served.stop().await;
}

#[tokio::test]
async fn nothing_is_told_before_all_is_known_and_then_each_type_is_answered() {
    let served = Served::start().await;
    let channel = served.host("host-a").await;
    let mut xds = Xds::open(&channel).await;
    xds.subscribe(ADDRESS_TYPE).await;
    xds.subscribe(AUTHORIZATION_TYPE).await;
    let early = timeout(Duration::from_millis(200), xds.answers.message()).await;
    assert!(early.is_err(), "{early:?}");
    served.publish(&[("Kubernetes//Pod/shop/web-0", "1")]);
    let (first, second) = (xds.next().await, xds.next().await);
    let mut types = [first.type_url.as_str(), second.type_url.as_str()];
    types.sort();
    assert_eq!(types, [AUTHORIZATION_TYPE, ADDRESS_TYPE]);
    for answer in [&first, &second] {
        if answer.type_url == ADDRESS_TYPE {
            assert_eq!(names(answer), (vec!["Kubernetes//Pod/shop/web-0"], vec![]));
            let resource = answer.resources[0].resource.as_ref().unwrap();
            assert_eq!(
                (resource.type_url.as_str(), &resource.value[..]),
                (ADDRESS_TYPE, &b"1"[..])
            );
        } else {
            assert_eq!(names(answer), (vec![], vec![]), "an empty type is answered too");
        }
    }
    served.stop().await;
}

#[tokio::test]
async fn changes_follow_and_a_reconnect_is_told_only_the_difference() {
    let served = Served::start().await;
    served.publish(&[("a", "1"), ("b", "1"), ("c", "1")]);
    let channel = served.host("host-a").await;
    let mut xds = Xds::open(&channel).await;
    xds.subscribe(ADDRESS_TYPE).await;
    let first = xds.next().await;
    assert_eq!(names(&first), (vec!["a", "b", "c"], vec![]));
    xds.ack(&first).await;
    served.publish(&[("a", "1"), ("b", "2")]);
    let second = xds.next().await;
    assert_eq!(names(&second), (vec!["b"], vec!["c"]));
    drop(xds);

    served.publish(&[("a", "1"), ("b", "3"), ("d", "1")]);
    let mut xds = Xds::open(&channel).await;
    let held = [&first.resources[0], &second.resources[0]];
    xds.send(DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        initial_resource_versions: held.iter().map(|r| (r.name.clone(), r.version.clone())).collect(),
        ..Default::default()
    })
    .await;
    assert_eq!(names(&xds.next().await), (vec!["b", "d"], vec![]));
    served.stop().await;
}

#[tokio::test]
async fn a_rejection_is_counted_and_the_stream_goes_on() {
    let served = Served::start().await;
    served.publish(&[("a", "bad")]);
    let channel = served.host("host-a").await;
    let mut xds = Xds::open(&channel).await;
    xds.subscribe(ADDRESS_TYPE).await;
    let first = xds.next().await;
    xds.send(DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        response_nonce: first.nonce,
        error_detail: Some(RpcStatus {
            code: 3,
            message: "a: nonsense".to_owned(),
            details: vec![],
        }),
        ..Default::default()
    })
    .await;
    served.publish(&[("a", "good")]);
    assert_eq!(names(&xds.next().await), (vec!["a"], vec![]));
    assert!(
        served
            .metrics()
            .contains(r#"virtual_node_mesh_answers_rejected_total{kind="Address"} 1"#)
    );
    served.stop().await;
}

#[tokio::test]
async fn a_type_that_is_not_served_does_not_end_the_stream() {
    let served = Served::start().await;
    served.publish(&[("a", "1")]);
    let channel = served.host("host-a").await;
    let mut xds = Xds::open(&channel).await;
    xds.subscribe("type.googleapis.com/envoy.config.cluster.v3.Cluster")
        .await;
    xds.subscribe(ADDRESS_TYPE).await;
    assert_eq!(names(&xds.next().await), (vec!["a"], vec![]));
    served.stop().await;
}

#[tokio::test]
async fn a_subscription_beyond_all_bounds_is_refused() {
    let served = Served::start().await;
    served.publish(&[]);
    let channel = served.host("host-a").await;
    let mut xds = Xds::open(&channel).await;
    xds.send(DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        resource_names_subscribe: vec!["x".repeat(5000)],
        ..Default::default()
    })
    .await;
    let status = soon(xds.answers.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    served.stop().await;
}

#[tokio::test]
async fn the_older_protocol_is_refused_by_name() {
    let served = Served::start().await;
    let mut client = AggregatedDiscoveryServiceClient::new(served.host("host-a").await);
    let requests = tokio_stream::once(DiscoveryRequest::default());
    let refusal = soon(client.stream_aggregated_resources(requests))
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::Unimplemented);
    assert!(refusal.message().contains("delta"));
    served.stop().await;
}
