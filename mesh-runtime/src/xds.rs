//! The subscription to a tenant's mesh state: delta xDS towards its virtual
//! node, on the one channel of `control`. One task a tenant; it writes `state`.
//!
//! [`subscription`] decides what to take, what to refuse and what to answer;
//! here is the stream. A break loses nothing: readers keep what was last told,
//! and the next stream begins with the versions held.

mod subscription;

pub use subscription::{Received, Rejected, Subscriptions, UnknownType};

use std::{net::IpAddr, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{state::Writer, telemetry::Metrics};

const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// A stream that lived this long makes the next retry a first one again.
const LASTING: Duration = Duration::from_secs(30);
/// Answers not yet sent. A response has one answer and the next response waits
/// for it, so more than the two opening requests are never queued.
const ANSWERS: usize = 4;
/// Rejected resources of one push, in the log.
const TOLD: usize = 10;
/// Ten thousand workloads take about 4 MiB; a push beyond this is not believed.
const MAX_MESSAGE: usize = 64 << 20;

/// Who asks.
#[derive(Debug, Clone)]
pub struct Subscriber {
    pub host: String,
    pub address: IpAddr,
    pub cluster_domain: String,
}

impl Subscriber {
    /// In the shape that istiod knows a node proxy by.
    fn node(&self) -> Node {
        let text = |text: &str| Value {
            kind: Some(Kind::StringValue(text.to_owned())),
        };
        Node {
            id: format!(
                "ztunnel~{}~{}.pool~pool.svc.{}",
                self.address, self.host, self.cluster_domain
            ),
            metadata: Some(Struct {
                fields: [
                    ("NAME", self.host.as_str()),
                    ("NODE_NAME", self.host.as_str()),
                    ("NAMESPACE", "pool"),
                    ("INSTANCE_IPS", &self.address.to_string()),
                ]
                .map(|(key, value)| (key.to_owned(), text(value)))
                .into(),
            }),
            ..Node::default()
        }
    }
}

/// Keeps `writer` at what the control plane tells, until it is dropped.
/// `synced` turns true with the first push of both types.
pub async fn follow(
    channel: Channel,
    subscriber: Subscriber,
    mut subscriptions: Subscriptions,
    mut writer: Writer,
    synced: watch::Sender<bool>,
    metrics: Arc<Metrics>,
) {
    let retries = ExponentialBuilder::default()
        .with_min_delay(FIRST_RETRY)
        .with_max_delay(LAST_RETRY)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times();
    let mut delays = retries.build();
    // One line for an outage, not one for each attempt.
    let mut reported: Option<String> = None;
    loop {
        let begun = Instant::now();
        let ended = stream(
            channel.clone(),
            &subscriber,
            &mut subscriptions,
            &mut writer,
            &synced,
            &metrics,
            &mut reported,
        )
        .await;
        metrics.xds_terminated(ended.as_ref().err().map_or("closed", StreamError::reason));
        if begun.elapsed() >= LASTING {
            delays = retries.build();
        }
        if let Err(error) = ended {
            let text = error.to_string();
            if reported.as_ref() != Some(&text) {
                tracing::warn!(error = %text, cause = cause(&error), "mesh control stream failed");
                reported = Some(text);
            }
        }
        // The builder has no last delay, so there always is a next one.
        tokio::time::sleep(delays.next().unwrap_or(LAST_RETRY)).await;
    }
}

/// The innermost reason, which names what actually happened.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("the mesh control plane does not take the stream")]
    Open(#[source] Box<tonic::Status>),
    #[error("the mesh control stream broke")]
    Broken(#[source] Box<tonic::Status>),
    #[error(transparent)]
    Type(#[from] UnknownType),
}

impl StreamError {
    /// As the metrics name it.
    fn reason(&self) -> &'static str {
        match self {
            Self::Open(_) => "connect",
            Self::Broken(_) => "error",
            Self::Type(_) => "protocol",
        }
    }
}

async fn stream(
    channel: Channel,
    subscriber: &Subscriber,
    subscriptions: &mut Subscriptions,
    writer: &mut Writer,
    synced: &watch::Sender<bool>,
    metrics: &Metrics,
    reported: &mut Option<String>,
) -> Result<(), StreamError> {
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let (answers, requests) = mpsc::channel::<DeltaDiscoveryRequest>(ANSWERS);
    for mut request in subscriptions.open() {
        request.node = Some(subscriber.node());
        // There is room for both, and the receiver is in hand.
        let _sent = answers.try_send(request);
    }
    let mut responses = client
        .delta_aggregated_resources(ReceiverStream::new(requests))
        .await
        .map_err(|status| StreamError::Open(Box::new(status)))?
        .into_inner();
    while let Some(response) = responses
        .message()
        .await
        .map_err(|status| StreamError::Broken(Box::new(status)))?
    {
        metrics.xds_message(&response);
        let received = subscriptions.receive(response)?;
        if reported.take().is_some() {
            tracing::info!("mesh control stream restored");
        }
        for rejected in received.rejected.iter().take(TOLD) {
            tracing::warn!(resource = %rejected.name, reason = %rejected.reason, "mesh resource rejected");
        }
        if let Some(left_out @ 1..) = received.rejected.len().checked_sub(TOLD) {
            tracing::warn!(left_out, "more mesh resources of the same push rejected");
        }
        writer.apply(received.changes);
        if received.synced {
            synced.send_if_modified(|synced| !std::mem::replace(synced, true));
        }
        if answers.send(received.answer).await.is_err() {
            // tonic dropped the request stream: the response stream ends too.
            break;
        }
    }
    Ok(())
}
