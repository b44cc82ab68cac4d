//! `/metrics` and `/healthz` of this process, in plain HTTP on a local address:
//! for its operator, not for the tenant.

use std::{collections::BTreeMap, fmt, net::SocketAddr, sync::Arc};

use anyhow::Context;
use axum::{Router, extract::State, http::header::CONTENT_TYPE, response::IntoResponse, routing::get};
use prometheus_client::{
    encoding::text::{encode, encode_registry},
    registry::Registry,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The text of all there is, when it is asked for.
type Text = Arc<dyn Fn() -> Result<String, fmt::Error> + Send + Sync>;

/// Fails if the port is taken.
pub(crate) async fn serve(
    address: SocketAddr,
    registry: Registry,
    shutdown: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let text = move || {
        let mut text = String::new();
        encode(&mut text, &registry).map(|()| text)
    };
    serve_text(address, Arc::new(text), shutdown).await
}

/// The same of many, which come and go: `all` is asked for them at each request.
pub(crate) async fn serve_many(
    address: SocketAddr,
    all: impl Fn() -> Vec<Arc<Registry>> + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let text = move || {
        let mut texts = vec![];
        for registry in all() {
            let mut text = String::new();
            encode_registry(&mut text, &registry)?;
            texts.push(text);
        }
        Ok(merged(&texts))
    };
    serve_text(address, Arc::new(text), shutdown).await
}

async fn serve_text(
    address: SocketAddr,
    text: Text,
    shutdown: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for metrics"))?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok" }))
        .with_state(text);
    Ok(tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned());
        if let Err(error) = served.await {
            warn!(
                error = &error as &dyn std::error::Error,
                "metrics are no longer served"
            );
        }
    }))
}

async fn metrics(State(text): State<Text>) -> impl IntoResponse {
    match text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => axum::http::StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Several registries as one: each family once, with the samples of all. OpenMetrics
/// forbids to tell a family twice.
fn merged(texts: &[String]) -> String {
    /// What is said of a family, and its samples.
    type Family<'a> = (Vec<&'a str>, Vec<&'a str>);
    let mut families: BTreeMap<&str, Family<'_>> = BTreeMap::new();
    for text in texts {
        let mut at = None;
        let mut begins = false;
        for line in text.lines() {
            if let Some(said) = line.strip_prefix("# ") {
                let name = said.split(' ').nth(1).unwrap_or_default();
                if at != Some(name) {
                    begins = !families.contains_key(name);
                }
                at = Some(name);
                let (about, _) = families.entry(name).or_default();
                if begins {
                    about.push(line);
                }
            } else if let Some(name) = at {
                families.entry(name).or_default().1.push(line);
            }
        }
    }
    let mut text = String::new();
    for (about, samples) in families.values() {
        for line in about.iter().chain(samples) {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.push_str("# EOF\n");
    text
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

    use super::*;

    #[test]
    fn a_family_of_many_nodes_is_told_once_with_the_samples_of_each() {
        let texts: Vec<String> = ["a", "b"]
            .map(|tenant| {
                let mut registry = Registry::with_labels([("tenant".into(), tenant.into())].into_iter());
                registry.register("pods", "Pods", Gauge::<i64>::default());
                registry.register("starts", "Starts", Counter::<u64>::default());
                let mut text = String::new();
                encode_registry(&mut text, &registry).unwrap();
                text
            })
            .into();
        assert_eq!(
            merged(&texts),
            "# HELP pods Pods.\n# TYPE pods gauge\npods{tenant=\"a\"} 0\npods{tenant=\"b\"} 0\n\
             # HELP starts Starts.\n# TYPE starts counter\n\
             starts_total{tenant=\"a\"} 0\nstarts_total{tenant=\"b\"} 0\n# EOF\n"
        );
    }
}
