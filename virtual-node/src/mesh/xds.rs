//! The delta discovery service, as istiod serves it to a ztunnel: workloads and
//! services, and authorization policies. One task for each stream; what to say
//! when is `subscription`'s to decide.
//!
//! What always holds: no client is answered before the sources have told all there
//! is (absent is not gone); a stream has at most one answer of each type on its way.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        Resource as WireResource, aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
    google::protobuf::Any,
};
use futures::Stream;
use mesh_api::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use pool_agent_api::HostName;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    listener::PeerHost,
    metrics::{Kind, Metrics},
    snapshot::Snapshot,
    subscription::{self, Answer, Subscription, Verdict},
};

/// The newest of each type; None until its source has told all there is.
#[derive(Debug, Clone, Default)]
pub struct Snapshots {
    pub addresses: Option<Arc<Snapshot>>,
    pub authorizations: Option<Arc<Snapshot>>,
}

const KINDS: [Kind; 2] = [Kind::Address, Kind::Authorization];

impl Snapshots {
    fn of(&self, kind: Kind) -> Option<&Arc<Snapshot>> {
        match kind {
            Kind::Address => self.addresses.as_ref(),
            Kind::Authorization => self.authorizations.as_ref(),
        }
    }
}

fn type_url(kind: Kind) -> &'static str {
    match kind {
        Kind::Address => ADDRESS_TYPE,
        Kind::Authorization => AUTHORIZATION_TYPE,
    }
}

/// The service.
pub struct Discovery {
    snapshots: watch::Receiver<Snapshots>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
}

impl Discovery {
    pub fn new(
        snapshots: watch::Receiver<Snapshots>,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            snapshots,
            metrics,
            shutdown,
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented(
            "only delta xDS is served: DeltaAggregatedResources",
        ))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let Some(PeerHost(host)) = request.extensions().get().cloned() else {
            return Err(Status::unauthenticated(
                "the connection has no host's certificate",
            ));
        };
        // One answer of each type is on its way at most, and an error: sends never wait.
        let (answers, stream) = mpsc::channel(KINDS.len() + 1);
        let client = Client {
            host,
            snapshots: self.snapshots.clone(),
            subscriptions: BTreeMap::new(),
            answers,
            metrics: Arc::clone(&self.metrics),
            told_unknown: false,
        };
        let shutdown = self.shutdown.clone();
        let counted = self.metrics.client();
        tokio::spawn(async move {
            let _counted = counted;
            shutdown
                .run_until_cancelled(client.serve(request.into_inner()))
                .await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// One stream.
struct Client {
    host: HostName,
    snapshots: watch::Receiver<Snapshots>,
    subscriptions: BTreeMap<&'static str, (Kind, Subscription)>,
    answers: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    metrics: Arc<Metrics>,
    told_unknown: bool,
}

/// The stream has ended.
struct Ended;

impl Client {
    async fn serve(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        tracing::info!(host = %self.host, "mesh client came");
        loop {
            let step = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.request(request).await,
                    Ok(None) => Err(Ended),
                    Err(status) => {
                        tracing::debug!(host = %self.host, %status, "mesh client broke off");
                        Err(Ended)
                    }
                },
                changed = self.snapshots.changed() => changed.map_err(|_| Ended),
            };
            if step.is_err() || self.answer().await.is_err() {
                break;
            }
        }
        tracing::info!(host = %self.host, "mesh client went");
    }

    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Ended> {
        let Some(kind) = KINDS.into_iter().find(|kind| type_url(*kind) == request.type_url) else {
            // A newer client may ask for more than we have; it gets on without.
            if !std::mem::replace(&mut self.told_unknown, true) {
                let asked: String = request.type_url.chars().take(256).collect();
                tracing::warn!(host = %self.host, r#type = asked, "mesh client asks for a type that is not served");
            }
            return Ok(());
        };
        let (_, subscription) = self
            .subscriptions
            .entry(type_url(kind))
            .or_insert_with(|| (kind, Subscription::default()));
        match subscription.request(parse(request)) {
            Ok(Verdict::Rejected { reason }) => {
                self.metrics.rejected(kind);
                let reason: String = reason.chars().take(2048).collect();
                tracing::warn!(host = %self.host, kind = ?kind, reason, "mesh client rejected resources");
                Ok(())
            }
            Ok(Verdict::Accepted | Verdict::None) => Ok(()),
            Err(refusal) => {
                tracing::warn!(host = %self.host, kind = ?kind, reason = %refusal, "mesh client refused");
                let status = Status::invalid_argument(refusal.to_string());
                self.answers.send(Err(status)).await.ok();
                Err(Ended)
            }
        }
    }

    /// Sends what is due.
    async fn answer(&mut self) -> Result<(), Ended> {
        let now = self.snapshots.borrow_and_update().clone();
        for (kind, subscription) in self.subscriptions.values_mut() {
            let Some(answer) = now.of(*kind).and_then(|snapshot| subscription.poll(snapshot)) else {
                continue;
            };
            self.metrics
                .sent(*kind, answer.changed.len(), answer.removed.len());
            self.answers
                .send(Ok(write(*kind, answer)))
                .await
                .map_err(|_| Ended)?;
        }
        Ok(())
    }
}

fn parse(request: DeltaDiscoveryRequest) -> subscription::Request {
    subscription::Request {
        nonce: request.response_nonce,
        rejected: request.error_detail.map(|detail| detail.message),
        subscribe: request.resource_names_subscribe,
        unsubscribe: request.resource_names_unsubscribe,
        held: request.initial_resource_versions.into_iter().collect(),
    }
}

fn write(kind: Kind, answer: Answer) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url(kind).to_owned(),
        nonce: answer.nonce,
        resources: answer
            .changed
            .iter()
            .map(|resource| WireResource {
                name: resource.name.to_string(),
                version: resource.version.to_string(),
                aliases: resource.aliases.iter().map(|alias| alias.to_string()).collect(),
                resource: Some(Any {
                    type_url: type_url(kind).to_owned(),
                    value: resource.body.to_vec(),
                }),
                ..WireResource::default()
            })
            .collect(),
        removed_resources: answer.removed.iter().map(|name| name.to_string()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}
