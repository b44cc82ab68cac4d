//! `/exec`, `/attach`, `/portForward`: an upgraded connection, spliced to the
//! runtime on the pod's host.
//!
//! SPDY or WebSocket, the frames pass as bytes; what was negotiated is between
//! the API server and the runtime. Only the request that opens the stream is
//! read here, and its parameters become the contract's.

use axum::{
    body::Body,
    extract::{Path, RawQuery, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONNECTION},
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use pool_agent_api::wire::{
    AttachTarget, ExecTarget, HttpHeader, PortForwardTarget, SpliceFrame, SpliceOpen, splice_frame::Frame,
    splice_open::Target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{Instrument, debug};

use super::{Context, Refused, has_container, logs::flag};

/// Bytes read from the API server at once.
const READ: usize = 32 * 1024;
/// Frames in flight to the host; beyond them, the API server waits.
const FRAMES: usize = 8;

/// `(namespace, pod, container)` or `(namespace, pod, uid, container)`.
pub(super) async fn exec(
    State(context): State<Context>,
    Path(path): Path<Vec<String>>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, Refused> {
    let name = Name::of_container(path)?;
    let parameters = Parameters::parse(query.as_deref().unwrap_or_default())?;
    if parameters.command.is_empty() {
        return Err(Refused::Parameter(
            "command",
            "must be given at least once".into(),
        ));
    }
    let target = Target::Exec(ExecTarget {
        container: name.container.clone(),
        command: parameters.command,
        stdin: parameters.stdin,
        stdout: parameters.stdout,
        stderr: parameters.stderr,
        tty: parameters.tty,
    });
    splice(&context, &name, target, request).await
}

pub(super) async fn attach(
    State(context): State<Context>,
    Path(path): Path<Vec<String>>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, Refused> {
    let name = Name::of_container(path)?;
    let parameters = Parameters::parse(query.as_deref().unwrap_or_default())?;
    let target = Target::Attach(AttachTarget {
        container: name.container.clone(),
        stdin: parameters.stdin,
        stdout: parameters.stdout,
        stderr: parameters.stderr,
        tty: parameters.tty,
    });
    splice(&context, &name, target, request).await
}

pub(super) async fn port_forward(
    State(context): State<Context>,
    Path(path): Path<Vec<String>>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, Refused> {
    let name = Name::of_pod(path)?;
    let mut ports = vec![];
    for (key, value) in form_urlencoded::parse(query.as_deref().unwrap_or_default().as_bytes()) {
        if matches!(&*key, "port" | "ports") {
            for port in value.split(',') {
                let port: u16 = port.parse().ok().filter(|p| *p != 0).ok_or_else(|| {
                    Refused::Parameter("port", format!("{port:?} is not a port (1 to 65535)"))
                })?;
                ports.push(port.into());
            }
        }
    }
    splice(
        &context,
        &name,
        Target::PortForward(PortForwardTarget { ports }),
        request,
    )
    .await
}

#[derive(Debug)]
struct Name {
    namespace: String,
    pod: String,
    uid: Option<String>,
    /// Empty where the pod is meant.
    container: String,
}

impl Name {
    fn of_container(path: Vec<String>) -> Result<Self, Refused> {
        match <[String; 3]>::try_from(path) {
            Ok([namespace, pod, container]) => Ok(Self {
                namespace,
                pod,
                uid: None,
                container,
            }),
            Err(path) => match <[String; 4]>::try_from(path) {
                Ok([namespace, pod, uid, container]) => Ok(Self {
                    namespace,
                    pod,
                    uid: Some(uid),
                    container,
                }),
                Err(_) => Err(Refused::Parameter(
                    "path",
                    "must be namespace/pod[/uid]/container".into(),
                )),
            },
        }
    }

    fn of_pod(path: Vec<String>) -> Result<Self, Refused> {
        let mut parts = path.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some(pod), uid) => Ok(Self {
                namespace,
                pod,
                uid,
                container: String::new(),
            }),
            _ => Err(Refused::Parameter("path", "must be namespace/pod[/uid]".into())),
        }
    }
}

/// A kubelet's names: `input`, `output`, `error`; those of PodExecOptions do too.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parameters {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
    command: Vec<String>,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, Refused> {
        let mut p = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "input" | "stdin" => p.stdin = flag("input", &value)?,
                "output" | "stdout" => p.stdout = flag("output", &value)?,
                "error" | "stderr" => p.stderr = flag("error", &value)?,
                "tty" => p.tty = flag("tty", &value)?,
                "command" => p.command.push(value.into_owned()),
                _ => {}
            }
        }
        // A terminal has one output.
        if p.tty {
            p.stderr = false;
        }
        if !p.stdin && !p.stdout && !p.stderr {
            return Err(Refused::Parameter(
                "input, output, error",
                "at least one stream must be asked for".into(),
            ));
        }
        Ok(p)
    }
}

/// Headers that belong to the upgrade; the host passes no others on.
fn upgrade_headers(headers: &HeaderMap) -> Vec<HttpHeader> {
    headers
        .iter()
        .filter(|(name, _)| {
            let name = name.as_str();
            matches!(name, "connection" | "upgrade" | "x-stream-protocol-version")
                || name.starts_with("sec-websocket-")
        })
        .filter_map(|(name, value)| {
            Some(HttpHeader {
                name: name.to_string(),
                value: value.to_str().ok()?.to_owned(),
            })
        })
        .collect()
}

async fn splice(
    context: &Context,
    name: &Name,
    target: Target,
    mut request: Request,
) -> Result<Response, Refused> {
    if !request.headers().contains_key(CONNECTION) {
        return Err(Refused::NoUpgrade);
    }
    let (host, key, found) = context
        .sandbox(&name.namespace, &name.pod, name.uid.as_deref())
        .await?;
    if !name.container.is_empty() {
        has_container(&found, &name.container)?;
    }
    let open = SpliceOpen {
        key: Some(key.into()),
        target: Some(target),
        method: request.method().to_string(),
        headers: upgrade_headers(request.headers()),
    };
    let (frames, receiver) = mpsc::channel(FRAMES);
    // The channel is new and empty.
    drop(frames.try_send(SpliceFrame {
        frame: Some(Frame::Open(open)),
    }));
    let mut answer = host.splice(ReceiverStream::new(receiver)).await?;
    let opened = match answer.next().await {
        Some(Ok(SpliceFrame {
            frame: Some(Frame::Opened(opened)),
        })) => opened,
        Some(Err(status)) => return Err(host.refused(status).into()),
        Some(Ok(_)) | None => return Err(Refused::NoAnswer),
    };
    let status = u16::try_from(opened.status)
        .ok()
        .and_then(|s| StatusCode::from_u16(s).ok())
        .ok_or(Refused::NoAnswer)?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    for header in opened.headers {
        if let (Ok(name), Ok(value)) = (
            HeaderName::try_from(header.name),
            HeaderValue::try_from(header.value),
        ) {
            response.headers_mut().append(name, value);
        }
    }
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let mut text = BytesMut::new();
        while let Some(Ok(SpliceFrame {
            frame: Some(Frame::Data(data)),
        })) = answer.next().await
        {
            text.extend_from_slice(&data);
        }
        return Ok((status, text.freeze()).into_response());
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let session = async move {
        let connection = match upgrade.await {
            Ok(upgraded) => TokioIo::new(upgraded),
            Err(error) => return debug!(%error, "the caller did not finish the upgrade"),
        };
        let (mut from, mut to) = tokio::io::split(connection);
        let mut inward = std::pin::pin!(async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(READ);
                match from.read_buf(&mut buffer).await {
                    Ok(1..) => {
                        let data = buffer.split().to_vec();
                        if frames
                            .send(SpliceFrame {
                                frame: Some(Frame::Data(data)),
                            })
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                    Ok(0) | Err(_) => return,
                }
            }
        });
        let mut outward = std::pin::pin!(async {
            while let Some(Ok(SpliceFrame {
                frame: Some(Frame::Data(data)),
            })) = answer.next().await
            {
                if to.write_all(&data).await.is_err() || to.flush().await.is_err() {
                    return;
                }
            }
            drop(to.shutdown().await);
        });
        // The runtime's end ends the session; the caller's end must reach the
        // runtime, and dropping the frames carries it there.
        tokio::select! {
            () = &mut inward => {}
            () = &mut outward => {}
        }
    };
    tokio::spawn(session.in_current_span());
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_a_kubelets_or_the_api_servers() {
        let kubelet =
            Parameters::parse("input=1&output=1&error=1&command=sh&command=-c&command=a%20b").unwrap();
        let server =
            Parameters::parse("stdin=true&stdout=true&stderr=true&command=sh&command=-c&command=a+b")
                .unwrap();
        assert_eq!(kubelet, server);
        assert_eq!(kubelet.command, ["sh", "-c", "a b"]);
    }

    #[test]
    fn a_terminal_has_no_error_stream() {
        let p = Parameters::parse("input=1&output=1&error=1&tty=1&command=sh").unwrap();
        assert!(p.tty && !p.stderr);
    }

    #[test]
    fn no_stream_at_all_is_refused() {
        assert!(Parameters::parse("command=sh").is_err());
        assert!(Parameters::parse("tty=1&error=1&command=sh").is_err());
    }

    #[test]
    fn only_headers_of_the_upgrade_go_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("sec-websocket-key", "x"),
            ("authorization", "Bearer secret"),
            ("host", "node"),
            ("cookie", "c"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let mut names: Vec<_> = upgrade_headers(&headers).into_iter().map(|h| h.name).collect();
        names.sort();
        assert_eq!(
            names,
            [
                "connection",
                "sec-websocket-key",
                "upgrade",
                "x-stream-protocol-version"
            ]
        );
    }
}
