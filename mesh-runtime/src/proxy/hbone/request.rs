//! What a CONNECT request says, and its answer. Pure.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header::HeaderName};

use crate::state::{Kind, Workload};

const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Ports on which a host of the mesh takes captured connections. No application
/// is reached through them, so nobody may ask for them.
const MESH_PORTS: [u16; 3] = [15001, 15006, 15008];

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidRequest {
    #[error("the method is not CONNECT")]
    Method,
    #[error("the authority is no IP:PORT")]
    Authority,
    #[error("the authority {asked} is not the address {tunnel} that the tunnel was opened to")]
    OtherAddress {
        asked: SocketAddr,
        tunnel: std::net::IpAddr,
    },
    #[error("port {port} is the mesh's own")]
    MeshPort { port: u16 },
}

/// Reads where a peer wants to go, by a tunnel that was opened to `tunnel`. A
/// tunnel leads to the one workload whose identity the TLS was made with, and to
/// no other address.
pub(crate) fn target<B>(
    request: &Request<B>,
    tunnel: std::net::IpAddr,
) -> Result<SocketAddr, InvalidRequest> {
    if request.method() != Method::CONNECT {
        return Err(InvalidRequest::Method);
    }
    let asked: SocketAddr = request
        .uri()
        .authority()
        .and_then(|authority| authority.as_str().parse().ok())
        .ok_or(InvalidRequest::Authority)?;
    if asked.ip() != tunnel {
        return Err(InvalidRequest::OtherAddress { asked, tunnel });
    }
    if asked.port() == 0 || MESH_PORTS.contains(&asked.port()) {
        return Err(InvalidRequest::MeshPort { port: asked.port() });
    }
    Ok(asked)
}

/// Asks for a connection to `target` on behalf of `client`.
pub(crate) fn connect(
    target: SocketAddr,
    client: SocketAddr,
    service: Option<&str>,
    source: Option<&Workload>,
) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    let mut uri = http::uri::Parts::default();
    // An address with a port always is an authority.
    uri.authority = target.to_string().parse().ok();
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    let headers = request.headers_mut();
    let forwarded = match service {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    };
    put(headers, FORWARDED, &forwarded);
    put(headers, BAGGAGE, &source.map(baggage).unwrap_or_default());
    // Version 00, a trace and a span of this connection alone, not sampled.
    let (trace, span) = (rand::random::<u128>(), rand::random::<u64>());
    put(headers, TRACEPARENT, &format!("00-{trace:032x}-{span:016x}-00"));
    request
}

pub(crate) fn answer(status: StatusCode, destination: Option<&Workload>) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Some(destination) = destination {
        put(response.headers_mut(), BAGGAGE, &baggage(destination));
    }
    response
}

/// Leaves a header out if it is empty or has what no header can.
fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if !value.is_empty()
        && let Ok(value) = HeaderValue::from_str(value)
    {
        headers.insert(name, value);
    }
}

/// A workload in W3C baggage, by OpenTelemetry's names.
fn baggage(w: &Workload) -> String {
    let kind = match w.kind {
        Kind::Deployment => "k8s.deployment.name",
        Kind::CronJob => "k8s.cronjob.name",
        Kind::Pod => "k8s.pod.name",
        Kind::Job => "k8s.job.name",
    };
    let members = [
        ("k8s.cluster.name", &w.cluster),
        ("k8s.namespace.name", &w.namespace),
        (kind, &w.owner),
        ("service.name", &w.canonical_name),
        ("service.version", &w.canonical_revision),
        ("cloud.region", &w.locality.region),
        ("cloud.availability_zone", &w.locality.zone),
    ];
    let mut text = String::new();
    for (key, value) in members {
        if !value.is_empty() {
            if !text.is_empty() {
                text.push(',');
            }
            text.push_str(key);
            text.push('=');
            text.push_str(value);
        }
    }
    text
}

#[cfg(test)]
mod tests;
