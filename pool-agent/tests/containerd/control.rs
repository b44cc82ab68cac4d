//! A tenant's mesh control plane that knows of nothing and says so, which is all
//! that a pod outside the mesh waits for. It signs no certificate: a pod in the
//! mesh stays where it is redirected and has no identity.

use std::{net::SocketAddr, pin::Pin};

use anyhow::Context;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use spindrift_local::{netns::Namespace, pool::PoolTls};
use tokio::sync::mpsc;
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};

struct Nothing;

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Nothing {
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
        let (answers, responses) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                // What has a nonce is an answer to us, not a subscription.
                if !request.response_nonce.is_empty() {
                    continue;
                }
                let empty = DeltaDiscoveryResponse {
                    type_url: request.type_url,
                    nonce: "1".into(),
                    ..Default::default()
                };
                if answers.send(Ok(empty)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

/// Serves in the namespace, as the virtual node these credentials are of.
pub(super) async fn serve(namespace: &Namespace, address: SocketAddr, own: &PoolTls) -> anyhow::Result<()> {
    let read = |path| std::fs::read(path).with_context(|| format!("{}", own.certificate.display()));
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(read(&own.certificate)?, read(&own.key)?))
        .client_ca_root(Certificate::from_pem(read(&own.ca)?));
    let listener = namespace.enter(|| std::net::TcpListener::bind(address))?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let server = Server::builder()
        .tls_config(tls)?
        .add_service(AggregatedDiscoveryServiceServer::new(Nothing))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(async move {
        if let Err(error) = server.await {
            eprintln!("the control plane of the tests ended: {error}");
        }
    });
    Ok(())
}
