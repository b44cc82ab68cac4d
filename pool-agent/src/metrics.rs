//! `/metrics` and `/healthz` over plain HTTP, on an address of the host's own.

use std::{
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use bounds::{
    Gate, Seldom,
    door::{Places, Queue},
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::net::TcpListener;

use crate::host::Host;

/// Scrapers are few. Beyond, the oldest connection of the address with the most is cut.
const CONNECTIONS: Places = Places { all: 64, of_one: 8 };
const PATIENCE: Duration = Duration::from_secs(10);
/// A connection's whole life: whoever looks again connects again.
const LIFE: Duration = Duration::from_secs(120);

pub async fn serve(listener: TcpListener, registry: Registry, host: Host) {
    answer(listener, move |path| respond(path, &registry, &host)).await;
}

type Respond = dyn Fn(&str) -> Response<Full<Bytes>> + Send + Sync;

async fn answer(
    listener: TcpListener,
    respond: impl Fn(&str) -> Response<Full<Bytes>> + Send + Sync + 'static,
) {
    let respond: Arc<Respond> = Arc::new(respond);
    let gate = Gate::new(CONNECTIONS, CONNECTIONS);
    let told = Seldom::default();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(left_out) = told.due(Instant::now()) {
                    tracing::warn!(error = %error, left_out, "a scrape was not accepted");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let respond = respond.clone();
        let guest = gate.come(Queue::Stranger, from.ip().to_canonical());
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let response = respond(request.uri().path());
                async move { Ok::<_, std::convert::Infallible>(response) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), answer);
            tokio::select! {
                served = served => if let Err(error) = served {
                    tracing::debug!(error = %error, "a scrape broke off");
                },
                () = guest.displaced() => tracing::debug!("others came, and a scrape was cut"),
                () = tokio::time::sleep(LIFE) => {}
            }
        });
    }
}

fn respond(path: &str, registry: &Registry, host: &Host) -> Response<Full<Bytes>> {
    let (status, kind, text) = match path {
        "/healthz" => (StatusCode::OK, "text/plain", "ok".to_owned()),
        "/metrics" => {
            let mut text = own(host);
            match encode(&mut text, registry) {
                Ok(()) => (
                    StatusCode::OK,
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    text,
                ),
                Err(_) => (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "text/plain",
                    "the metrics could not be written".to_owned(),
                ),
            }
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", "not found".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// Counted when they are asked for: the board and admission know.
fn own(host: &Host) -> String {
    use pool_agent_api::status::SandboxState;
    let mut counts = [
        ("preparing", SandboxState::Preparing, 0),
        ("running", SandboxState::Running, 0),
        ("stopping", SandboxState::Stopping, 0),
        ("stopped", SandboxState::Stopped, 0),
    ];
    for (_, status) in host.board().all() {
        for (_, state, count) in &mut counts {
            *count += u64::from(*state == status.state);
        }
    }
    let mut text = String::from(
        "# HELP pool_agent_sandboxes Sandboxes on this host, by state.\n# TYPE pool_agent_sandboxes gauge\n",
    );
    let mut line = |name: &str, label: &str, value: u64| {
        // Writing to a String cannot fail.
        let _written = writeln!(text, "{name}{label} {value}").is_ok();
    };
    for (state, _, count) in counts {
        line("pool_agent_sandboxes", &format!("{{state=\"{state}\"}}"), count);
    }
    // 0: root in a pod is root on the host; the agent's log says what is missing.
    line(
        "pool_agent_user_namespaces",
        "",
        u64::from(host.has_user_namespaces()),
    );
    let (waiting, running) = host.shop().images.counts();
    for (state, count) in [("waiting", waiting), ("running", running)] {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        line(
            "pool_agent_image_pulls_under_way",
            &format!("{{state=\"{state}\"}}"),
            count,
        );
    }
    for (of, resources) in [
        ("capacity", host.capacity()),
        ("allocatable", host.allocatable()),
        ("free", host.free()),
    ] {
        line(&format!("pool_agent_{of}_cpu_millis"), "", resources.cpu_millis);
        line(
            &format!("pool_agent_{of}_memory_bytes"),
            "",
            resources.memory_bytes,
        );
        line(
            &format!("pool_agent_{of}_ephemeral_storage_bytes"),
            "",
            resources.ephemeral_storage_bytes,
        );
        line(
            &format!("pool_agent_{of}_sandboxes"),
            "",
            resources.sandboxes.into(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpSocket, TcpStream},
    };

    use super::*;

    /// From one of the loopback's many addresses.
    async fn come_from(last: u8, to: std::net::SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket
            .bind(std::net::SocketAddr::from(([127, 0, 2, last], 0)))
            .unwrap();
        socket.connect(to).await.unwrap()
    }

    #[tokio::test]
    async fn whoever_connects_and_says_nothing_keeps_no_scraper_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = tokio::spawn(answer(listener, |path| {
            Response::new(Full::new(Bytes::from(path.to_owned())))
        }));
        let mut silent = vec![];
        for n in 0..400_u16 {
            let mut stream = come_from(1 + (n % 40) as u8, address).await;
            if n % 2 == 0 {
                // Or asks, and does not read.
                let _cut = stream
                    .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
                    .await;
            }
            silent.push(stream);
        }
        let ask = async {
            let mut stream = come_from(250, address).await;
            let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(PATIENCE / 2, ask)
            .await
            .expect("it was kept out");
        assert!(answer.ends_with("/healthz"), "{answer}");
        served.abort();
    }
}
