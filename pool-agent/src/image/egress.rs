//! The way out for the runtime's pulls: an HTTP proxy on the host's loopback that
//! dials nothing but where images may be. Optional; the operator points the runtime's
//! `HTTPS_PROXY` and `HTTP_PROXY` at it.
//!
//! [`super::Images`] looks at the registry that a name leads to before the runtime is
//! asked. What the runtime meets on its way is met here: a name that resolves to
//! another address the second time, a blob or a token that the registry says is
//! somewhere else. One look-up both decides and is dialled.
//!
//! Go's HTTP client asks no proxy for `localhost` and for loopback addresses; those
//! only a rule of the host's firewall can keep from the runtime.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{Either, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use super::destination::{Destinations, NoWay};

/// Connections at a time. The pulls that the agent lets the runtime make hold far
/// fewer, some for each; whoever comes beyond waits.
const CONNECTIONS: usize = 1024;
/// For a request's head, and for a connection to come about.
const PATIENCE: Duration = Duration::from_secs(15);
/// A connection on which nothing has come for as long is given up, and the pull with
/// it: twice, or the runtime's own idle connections would be cut off.
const SILENCE: Duration = Duration::from_secs(60);

type Body = Either<Full<Bytes>, Incoming>;

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, destinations: Arc<Destinations>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let destinations = destinations.clone();
        tokio::spawn(async move {
            // Held by tunnels too, which outlive the connection's last request.
            let permit = Arc::new(permit);
            let answer = service_fn(|request| {
                let (destinations, permit) = (destinations.clone(), permit.clone());
                async move { Ok::<_, std::convert::Infallible>(respond(request, &destinations, permit).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), answer)
                .with_upgrades()
                .await;
            if let Err(error) = served {
                tracing::debug!(error = %error, "a connection of the runtime to the proxy broke off");
            }
        });
    }
}

async fn respond<P: Send + 'static>(
    request: Request<Incoming>,
    destinations: &Destinations,
    permit: P,
) -> Response<Body> {
    let tunnel = request.method() == Method::CONNECT;
    let Some(authority) = authority(request.uri(), tunnel) else {
        return refusal(
            StatusCode::BAD_REQUEST,
            "a proxy is asked for http:// or by CONNECT",
        );
    };
    let addresses = match destinations.reach(&authority).await {
        Ok(addresses) => addresses,
        Err(NoWay::Astray(astray)) => {
            tracing::warn!(registry = authority, reason = %astray, "the runtime was kept from where no image is");
            return refusal(StatusCode::FORBIDDEN, &astray.to_string());
        }
        Err(NoWay::Unknown) => {
            return refusal(StatusCode::BAD_GATEWAY, "the name is not known");
        }
    };
    let upstream = match dial(&addresses).await {
        Ok(upstream) => upstream,
        Err(error) => return refusal(StatusCode::BAD_GATEWAY, &error.to_string()),
    };
    if tunnel {
        tokio::spawn(async move {
            let _permit = permit;
            match hyper::upgrade::on(request).await {
                Ok(runtime) => relay(TokioIo::new(runtime), upstream).await,
                Err(error) => tracing::debug!(error = %error, "a tunnel was not taken up"),
            }
        });
        return Response::new(Either::Left(Full::default()));
    }
    forward(request, upstream).await.unwrap_or_else(|error| {
        tracing::debug!(registry = authority, error = %error, "a registry did not answer");
        refusal(StatusCode::BAD_GATEWAY, &error.to_string())
    })
}

/// `HOST:PORT` of what is asked for.
fn authority(uri: &Uri, tunnel: bool) -> Option<String> {
    let host = uri.host().filter(|host| !host.is_empty())?;
    let port = match (uri.port_u16(), tunnel) {
        (Some(port), _) => port,
        (None, true) => return None,
        (None, false) => 80,
    };
    (tunnel || uri.scheme_str() == Some("http")).then(|| format!("{host}:{port}"))
}

fn refusal(status: StatusCode, why: &str) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(Bytes::from(format!("{why}\n")))));
    *response.status_mut() = status;
    response
}

async fn dial(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// Both ways until one has ended (no client of a registry goes on reading after it
/// has closed), or nothing comes for [`SILENCE`].
async fn relay<A: AsyncRead + AsyncWrite>(runtime: A, upstream: TcpStream) {
    let upstream = Counted::new(upstream);
    let heard = upstream.heard.clone();
    let (mut from_runtime, mut to_runtime) = tokio::io::split(runtime);
    let (mut from_registry, mut to_registry) = tokio::io::split(upstream);
    let ended = tokio::select! {
        ended = tokio::io::copy(&mut from_runtime, &mut to_registry) => ended,
        ended = tokio::io::copy(&mut from_registry, &mut to_runtime) => ended,
        () = silence(heard) => Err(io::ErrorKind::TimedOut.into()),
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "a tunnel to a registry broke off");
    }
}

/// One request in plain HTTP.
async fn forward(request: Request<Incoming>, upstream: TcpStream) -> hyper::Result<Response<Body>> {
    let upstream = Counted::new(upstream);
    let heard = upstream.heard.clone();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(upstream)).await?;
    tokio::spawn(async move {
        tokio::select! {
            ended = connection => {
                if let Err(error) = ended {
                    tracing::debug!(error = %error, "a connection to a registry broke off");
                }
            }
            () = silence(heard) => tracing::debug!("a registry fell silent"),
        }
    });
    let (mut parts, body) = request.into_parts();
    if let Some(host) = parts.uri.authority().and_then(|a| a.as_str().parse().ok()) {
        parts.headers.insert(header::HOST, host);
    }
    // What is between the runtime and us alone.
    for name in [
        header::CONNECTION,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::UPGRADE,
    ] {
        parts.headers.remove(name);
    }
    parts.headers.remove("proxy-connection");
    let path = parts.uri.path_and_query().cloned();
    parts.uri = path.map_or_else(|| Uri::from_static("/"), Uri::from);
    let mut response = sender.send_request(Request::from_parts(parts, body)).await?;
    response.headers_mut().remove(header::CONNECTION);
    response.headers_mut().remove(header::UPGRADE);
    Ok(response.map(Either::Right))
}

/// Returns once nothing was heard for [`SILENCE`].
async fn silence(heard: Arc<AtomicU64>) {
    let mut before = heard.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(SILENCE).await;
        let now = heard.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

/// A connection that counts what comes from its far end.
struct Counted {
    stream: TcpStream,
    heard: Arc<AtomicU64>,
}

impl Counted {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            heard: Arc::default(),
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let came = buffer.filled().len() - before;
        self.heard
            .fetch_add(u64::try_from(came).unwrap_or(u64::MAX), Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::policy::images::Images;

    /// The proxy, by a policy in TOML.
    async fn proxy(policy: &str) -> SocketAddr {
        let policy: Images = toml::from_str(policy).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let destinations = Destinations::of_host(&policy).unwrap();
        tokio::spawn(serve(listener, Arc::new(destinations)));
        address
    }

    /// A registry that answers each connection's first bytes with its own, once.
    async fn registry() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut bytes = [0; 4096];
                    let n = stream.read(&mut bytes).await.unwrap();
                    let asked = String::from_utf8_lossy(&bytes[..n]).replace("\r\n", "|");
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{asked}",
                        asked.len()
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                });
            }
        });
        address
    }

    async fn ask(proxy: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(proxy).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = vec![];
        // Until it is closed, or the first part has come.
        let read = async {
            let mut bytes = [0; 4096];
            loop {
                match stream.read(&mut bytes).await {
                    Ok(n) if n > 0 => answer.extend(&bytes[..n]),
                    _ => return,
                }
                if answer.windows(4).any(|w| w == b"\r\n\r\n") {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), read).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn what_leads_inside_is_not_dialled_whoever_names_it() {
        let (proxy, registry) = (proxy("").await, registry().await);
        let port = registry.port();
        for target in [
            format!("127.0.0.1:{port}"),
            format!("[::ffff:127.0.0.1]:{port}"),
            format!("localhost:{port}"),
            "169.254.169.254:80".to_owned(),
            "10.0.0.1:443".to_owned(),
        ] {
            for head in [
                format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"),
                format!("GET http://{target}/v2/ HTTP/1.1\r\nHost: {target}\r\n\r\n"),
            ] {
                let answer = ask(proxy, &head).await;
                assert!(answer.starts_with("HTTP/1.1 403 "), "{head}{answer}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_allowed_is_reached_in_plain_and_through_a_tunnel() {
        let (proxy, registry) = (
            proxy("allow_networks = [\"127.0.0.1/32\"]").await,
            registry().await,
        );
        let plain = format!(
            "GET http://{registry}/v2/?x HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\r\n"
        );
        let mut stream = TcpStream::connect(proxy).await.unwrap();
        stream.write_all(plain.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let mut bytes = [0; 4096];
        while !answer.contains("GET /v2/?x HTTP/1.1|") {
            let read = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut bytes));
            let n = read.await.unwrap().unwrap();
            assert!(n > 0, "{answer}");
            answer.push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
        assert!(answer.contains(&format!("host: {registry}")), "{answer}");
        assert!(!answer.to_lowercase().contains("proxy-connection"), "{answer}");

        let mut stream = TcpStream::connect(proxy).await.unwrap();
        let connect = format!("CONNECT {registry} HTTP/1.1\r\nHost: {registry}\r\n\r\n");
        stream.write_all(connect.as_bytes()).await.unwrap();
        let mut seen = vec![];
        while !seen.ends_with(b"\r\n\r\n") {
            seen.push(stream.read_u8().await.unwrap());
        }
        assert!(seen.starts_with(b"HTTP/1.1 200 "), "{seen:?}");
        stream.write_all(b"hello").await.unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).await.unwrap();
        assert!(all.ends_with("hello"), "{all}");
    }

    #[tokio::test]
    async fn what_is_no_request_to_a_proxy_is_told_so() {
        let proxy = proxy("").await;
        for head in [
            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            "GET https://x.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
        ] {
            let answer = ask(proxy, head).await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{head}{answer}");
        }
    }
}
