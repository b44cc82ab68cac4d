//! A mesh control plane that says what a test wants, over the pool's mutual TLS:
//! delta xDS and a certificate broker.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    google::protobuf::Any,
};
use mesh_api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE,
    istio::{
        certificate::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
        },
        security::Authorization,
        workload::{Address, Service, Workload, address::Type},
    },
};
use mesh_runtime::control::PoolTls;
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, SanType,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};

pub(crate) const POOL: &str = "pool.test";
pub(crate) const TENANT: &str = "acme";
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";

pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Certificate and key, PEM.
    pub(crate) fn issue(&self, uris: &[&str]) -> (String, String) {
        self.issue_for(uris, Duration::from_secs(3600))
    }

    pub(crate) fn issue_for(&self, uris: &[&str], life: Duration) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = params(uris, life).signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

fn params(uris: &[&str], life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris
        .iter()
        .map(|uri| SanType::URI((*uri).try_into().unwrap()))
        .collect();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - Duration::from_secs(1);
    params.not_after = now + life;
    params
}

/// A resource's version and bytes; None once it was removed.
type Versioned = (u64, Option<Vec<u8>>);

/// What is told, by type and name; with the number of the change that put it
/// there, which is its version too.
#[derive(Default)]
struct Told {
    resources: BTreeMap<(&'static str, String), Versioned>,
    changes: u64,
}

struct Shared {
    told: Mutex<Told>,
    changed: watch::Sender<u64>,
    pub(crate) mesh: Authority,
    life: Mutex<Duration>,
    broker_up: Mutex<bool>,
    issued: AtomicU64,
    put_off: AtomicU64,
    nacks: Mutex<Vec<String>>,
    /// By live stream and type: the last change it answered to.
    answered: Mutex<BTreeMap<(u64, &'static str), u64>>,
    streams: AtomicU64,
    stopped: watch::Sender<u64>,
}

pub(crate) struct Control {
    shared: Arc<Shared>,
    pool: Authority,
    pub(crate) address: std::net::SocketAddr,
    server: Mutex<tokio::task::AbortHandle>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Control {
    pub(crate) async fn start() -> Self {
        let pool = Authority::new();
        let shared = Arc::new(Shared {
            told: Mutex::default(),
            changed: watch::Sender::new(0),
            mesh: Authority::new(),
            life: Mutex::new(Duration::from_secs(3600)),
            broker_up: Mutex::new(true),
            issued: AtomicU64::new(0),
            put_off: AtomicU64::new(0),
            nacks: Mutex::default(),
            answered: Mutex::default(),
            streams: AtomicU64::new(0),
            stopped: watch::Sender::new(0),
        });
        let (address, server) = serve(&pool, &shared, "127.0.0.1:0".parse().unwrap()).await;
        Self {
            shared,
            pool,
            address,
            server: Mutex::new(server),
        }
    }

    /// As if its process had died.
    pub(crate) fn stop(&self) {
        self.server.lock().unwrap().abort();
        self.shared.stopped.send_modify(|n| *n += 1);
    }

    pub(crate) async fn restart(&self) {
        let (_, server) = serve(&self.pool, &self.shared, self.address).await;
        *self.server.lock().unwrap() = server;
    }

    /// Streams that are open, one for each host and type.
    pub(crate) fn streams(&self) -> usize {
        self.shared.answered.lock().unwrap().len()
    }

    pub(crate) fn host_tls(&self, host: &str) -> PoolTls {
        let (certificate, key) = self.pool.issue(&[&format!("spiffe://{POOL}/host/{host}")]);
        PoolTls::from_pem(
            certificate.as_bytes(),
            key.as_bytes(),
            self.pool.pem.as_bytes(),
            POOL,
        )
        .unwrap()
    }

    /// The tenant's mesh CA.
    pub(crate) fn mesh(&self) -> &Authority {
        &self.shared.mesh
    }

    fn tell(&self, type_url: &'static str, name: String, resource: Option<Vec<u8>>) {
        let mut told = self.shared.told.lock().unwrap();
        told.changes += 1;
        let change = told.changes;
        told.resources.insert((type_url, name), (change, resource));
        self.shared.changed.send_replace(change);
    }

    pub(crate) fn workload(&self, workload: Workload) {
        let name = workload.uid.clone();
        let address = Address {
            r#type: Some(Type::Workload(workload)),
        };
        self.tell(ADDRESS_TYPE, name, Some(address.encode_to_vec()));
    }

    pub(crate) fn service(&self, service: Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let address = Address {
            r#type: Some(Type::Service(service)),
        };
        self.tell(ADDRESS_TYPE, name, Some(address.encode_to_vec()));
    }

    pub(crate) fn remove_address(&self, name: &str) {
        self.tell(ADDRESS_TYPE, name.to_owned(), None);
    }

    pub(crate) fn policy(&self, policy: Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.tell(AUTHORIZATION_TYPE, name, Some(policy.encode_to_vec()));
    }

    pub(crate) fn remove_policy(&self, name: &str) {
        self.tell(AUTHORIZATION_TYPE, name.to_owned(), None);
    }

    /// Waits until every host has applied all that was told.
    pub(crate) async fn settled(&self) {
        crate::lab::until("all hosts know what was told", async || {
            let last = |url: &str| {
                let told = self.shared.told.lock().unwrap();
                told.resources
                    .iter()
                    .filter(|((u, _), _)| *u == url)
                    .map(|(_, (change, _))| *change)
                    .max()
                    .unwrap_or(0)
            };
            let answered = self.shared.answered.lock().unwrap().clone();
            answered.iter().all(|((_, url), change)| *change >= last(url))
        })
        .await;
    }

    /// How long certificates issued from now on are valid.
    pub(crate) fn certificates_live(&self, life: Duration) {
        *self.shared.life.lock().unwrap() = life;
    }

    pub(crate) fn broker_up(&self, up: bool) {
        *self.shared.broker_up.lock().unwrap() = up;
    }

    pub(crate) fn issued(&self) -> u64 {
        self.shared.issued.load(Ordering::Relaxed)
    }

    /// How many requests for a certificate came while the broker was down.
    pub(crate) fn put_off(&self) -> u64 {
        self.shared.put_off.load(Ordering::Relaxed)
    }

    pub(crate) fn nacks(&self) -> Vec<String> {
        self.shared.nacks.lock().unwrap().clone()
    }
}

async fn serve(
    pool: &Authority,
    shared: &Arc<Shared>,
    address: std::net::SocketAddr,
) -> (std::net::SocketAddr, tokio::task::AbortHandle) {
    let (certificate, key) = pool.issue(&[&format!("spiffe://{POOL}/tenant/{TENANT}/virtual-node")]);
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(&pool.pem));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder()
        .tls_config(tls)
        .unwrap()
        .add_service(AggregatedDiscoveryServiceServer::new(Ads(shared.clone())))
        .add_service(IstioCertificateServiceServer::new(Broker(shared.clone())))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    let task = tokio::spawn(async move { server.await.unwrap() });
    (address, task.abort_handle())
}

struct Ads(Arc<Shared>);

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = request.into_inner();
        let shared = self.0.clone();
        let (send, responses) = mpsc::channel(4);
        let stream = shared.streams.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let _gone = Gone(shared.clone(), stream);
            let mut changed = shared.changed.subscribe();
            let mut stopped = shared.stopped.subscribe();
            // By type: the last change it was told, once it has subscribed.
            let mut subscribed: BTreeMap<&'static str, u64> = BTreeMap::new();
            loop {
                tokio::select! {
                    _ = stopped.changed() => return,
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        if let Some(error) = request.error_detail {
                            shared.nacks.lock().unwrap().push(error.message);
                        }
                        let url = [ADDRESS_TYPE, AUTHORIZATION_TYPE]
                            .into_iter()
                            .find(|url| *url == request.type_url)
                            .unwrap();
                        if let Some(change) = request.response_nonce.strip_prefix('n') {
                            let change = change.parse().unwrap();
                            shared.answered.lock().unwrap().insert((stream, url), change);
                        } else {
                            shared.answered.lock().unwrap().insert((stream, url), 0);
                            let held = request
                                .initial_resource_versions
                                .values()
                                .filter_map(|v| v.parse().ok())
                                .max()
                                .unwrap_or(0);
                            let response = shared.since(url, held);
                            subscribed.insert(url, shared.told.lock().unwrap().changes);
                            if send.send(Ok(response)).await.is_err() { return }
                        }
                    }
                    Ok(()) = changed.changed() => {
                        let now = *changed.borrow_and_update();
                        for (url, last) in &mut subscribed {
                            let response = shared.since(url, *last);
                            *last = now;
                            let empty = response.resources.is_empty() && response.removed_resources.is_empty();
                            if !empty && send.send(Ok(response)).await.is_err() { return }
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

struct Gone(Arc<Shared>, u64);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0
            .answered
            .lock()
            .unwrap()
            .retain(|(stream, _), _| *stream != self.1);
    }
}

impl Shared {
    fn since(&self, url: &'static str, last: u64) -> DeltaDiscoveryResponse {
        let told = self.told.lock().unwrap();
        let mut response = DeltaDiscoveryResponse {
            type_url: url.to_owned(),
            nonce: format!("n{}", told.changes),
            ..Default::default()
        };
        for ((_, name), (change, value)) in told
            .resources
            .iter()
            .filter(|((u, _), (change, _))| *u == url && *change > last)
        {
            match value {
                Some(value) => response.resources.push(Resource {
                    name: name.clone(),
                    version: change.to_string(),
                    resource: Some(Any {
                        type_url: url.to_owned(),
                        value: value.clone(),
                    }),
                    ..Default::default()
                }),
                None => response.removed_resources.push(name.clone()),
            }
        }
        response
    }
}

struct Broker(Arc<Shared>);

#[tonic::async_trait]
impl IstioCertificateService for Broker {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        if !*self.0.broker_up.lock().unwrap() {
            self.0.put_off.fetch_add(1, Ordering::Relaxed);
            return Err(Status::unavailable("the broker is down"));
        }
        let request = request.into_inner();
        let csr = CertificateSigningRequestParams::from_pem(&request.csr)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let metadata = request.metadata.unwrap_or_default();
        let wanted = metadata
            .fields
            .get("ImpersonatedIdentity")
            .and_then(|v| v.kind.clone());
        let Some(prost_types::value::Kind::StringValue(identity)) = wanted else {
            return Err(Status::invalid_argument("no identity"));
        };
        let life = *self.0.life.lock().unwrap();
        let certificate = params(&[&identity], life)
            .signed_by(&csr.public_key, &self.0.mesh.issuer)
            .map_err(|e| Status::internal(e.to_string()))?;
        self.0.issued.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: vec![certificate.pem(), self.0.mesh.pem.clone()],
        }))
    }
}
