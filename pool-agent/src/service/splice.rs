//! `Splice`: one upgraded HTTP connection, byte for byte, between a caller and the
//! runtime's streaming server. What the two say to each other (SPDY, WebSocket) is
//! not looked at.
//!
//! What always holds: at most a few frames are held in either direction; a caller
//! that goes away takes the connection down; the end of one direction is carried
//! to the other side without ending the other direction.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use pool_agent_api::{
    Invalid, SandboxKey, TenantId,
    status::ContainerState,
    wire::{self, splice_frame::Frame, splice_open::Target},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Call;
use crate::{
    cri::{CriError, wire as cri},
    host::Host,
};

/// Frames on their way to the caller.
const IN_FLIGHT: usize = 8;
/// Bytes in a frame.
const FRAME: usize = 32 << 10;
/// For the caller to say what it wants, and for the runtime to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// An answer that is not an upgrade is an error message.
const MAX_ERROR: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

type Output = mpsc::Sender<Result<wire::SpliceFrame, Status>>;

pub(super) async fn start(
    host: &Host,
    caller: &TenantId,
    mut input: Streaming<wire::SpliceFrame>,
    call: Call,
) -> Result<ReceiverStream<Result<wire::SpliceFrame, Status>>, Status> {
    let first = tokio::time::timeout(PATIENCE, input.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the first frame did not come in time"))??;
    let Some(wire::SpliceFrame {
        frame: Some(Frame::Open(open)),
    }) = first
    else {
        return Err(Invalid::new("frame", "the first must be `open`").into());
    };
    // The runtime keeps each URL that it is asked for, of all tenants, for a minute, and
    // has room for a thousand: nothing is asked for that is not used.
    let upgrade = Upgrade::parse(&open)?;
    let (sender, output) = mpsc::channel(IN_FLIGHT);
    let (settled, is_settled) = oneshot::channel();
    let (host, caller) = (host.clone(), caller.clone());
    tokio::spawn(async move {
        // From here on whatever its caller does, or the URL would be left over. The call
        // counts as long as that.
        let dialled = match url(&host, &caller, &open).await {
            Ok(url) => {
                drop(settled.send(Ok(())));
                dial(&url, upgrade).await
            }
            Err(status) => {
                drop(settled.send(Err(status)));
                return;
            }
        };
        drop(call);
        let failed = match dialled {
            Ok(answer) => tokio::select! {
                result = splice(answer, input, &sender) => result.err(),
                () = sender.closed() => None,
            },
            Err(status) => Some(status),
        };
        if let Some(status) = failed {
            tracing::debug!(error = status.message(), "a stream broke off");
            if sender.send(Err(status)).await.is_err() {
                tracing::debug!("its caller has gone");
            }
        }
    });
    is_settled
        .await
        .map_err(|_| Status::internal("the call broke off in the agent"))??;
    Ok(ReceiverStream::new(output))
}

/// Where the runtime serves what is wanted.
async fn url(host: &Host, caller: &TenantId, open: &wire::SpliceOpen) -> Result<Uri, Status> {
    let key = SandboxKey::from_wire(open.key.clone())?;
    host.check(caller, &key)?;
    let running = |name: &str| -> Result<String, Status> {
        let status = host.board().status(caller, &key);
        let container = status.as_ref().and_then(|s| {
            s.init_containers
                .iter()
                .chain(&s.containers)
                .find(|c| c.name.as_str() == name)
        });
        match container {
            None => Err(Status::not_found(format!(
                "container {name:?} is not in sandbox {key}"
            ))),
            Some(c) if matches!(c.state, ContainerState::Running { .. }) => Ok(c
                .container_id
                .strip_prefix("containerd://")
                .unwrap_or(&c.container_id)
                .to_owned()),
            Some(_) => Err(Status::failed_precondition(format!(
                "container {name:?} is not running"
            ))),
        }
    };
    let runtime = &host.shop().runtime;
    let url = match &open.target {
        None => return Err(Invalid::new("open.target", "is required").into()),
        Some(Target::Exec(exec)) => {
            if exec.command.is_empty() {
                return Err(Invalid::new("open.exec.command", "must hold at least the program").into());
            }
            runtime
                .exec_url(cri::ExecRequest {
                    container_id: running(&exec.container)?,
                    cmd: exec.command.clone(),
                    tty: exec.tty,
                    stdin: exec.stdin,
                    stdout: exec.stdout,
                    // A terminal has one output; the runtime refuses both.
                    stderr: exec.stderr && !exec.tty,
                })
                .await
        }
        Some(Target::Attach(attach)) => {
            runtime
                .attach_url(cri::AttachRequest {
                    container_id: running(&attach.container)?,
                    stdin: attach.stdin,
                    tty: attach.tty,
                    stdout: attach.stdout,
                    stderr: attach.stderr && !attach.tty,
                })
                .await
        }
        Some(Target::PortForward(forward)) => {
            let ports = forward
                .ports
                .iter()
                .map(|&port| u16::try_from(port).ok().filter(|&p| p != 0))
                .collect::<Option<Vec<u16>>>()
                .ok_or_else(|| Invalid::new("open.port_forward.ports", "must be from 1 to 65535"))?;
            let sandbox = host
                .sandbox_id(caller, &key)?
                .ok_or_else(|| Status::failed_precondition(format!("sandbox {key} is not running")))?;
            runtime.port_forward_url(&sandbox, &ports).await
        }
    };
    let url = url.map_err(|error| match error {
        CriError::Answer { code, message, .. } => Status::new(code, message),
        other => Status::unavailable(other.to_string()),
    })?;
    url.parse()
        .map_err(|_| Status::internal("the runtime named a URL that does not read"))
}

/// What the caller says to the runtime's streaming server, but for where that is.
#[derive(Debug)]
struct Upgrade {
    method: Method,
    headers: HeaderMap,
}

impl Upgrade {
    fn parse(open: &wire::SpliceOpen) -> Result<Self, Status> {
        let method = match open.method.as_str() {
            "GET" => Method::GET,
            "POST" => Method::POST,
            _ => return Err(Invalid::new("open.method", "must be GET or POST").into()),
        };
        if open.headers.len() > MAX_HEADERS {
            return Err(Invalid::new("open.headers", format_args!("must be at most {MAX_HEADERS}")).into());
        }
        let mut headers = HeaderMap::new();
        for (i, header) in open.headers.iter().enumerate() {
            let invalid = |part: &str, problem: &dyn std::fmt::Display| {
                Invalid::new(format!("open.headers[{i}].{part}"), problem)
            };
            // The message has no body and one host: these would make it another message.
            let framing = ["host", "content-length", "transfer-encoding"];
            let name: HeaderName = header.name.parse().map_err(|e| invalid("name", &e))?;
            let value: HeaderValue = header.value.parse().map_err(|e| invalid("value", &e))?;
            if !framing.contains(&name.as_str()) {
                headers.append(name, value);
            }
        }
        // Whatever is no upgrade only uses a URL up.
        if !headers.contains_key(header::UPGRADE) {
            return Err(Invalid::new("open.headers", "must ask for an upgrade").into());
        }
        Ok(Self { method, headers })
    }

    fn to(self, url: &Uri) -> Result<Request<Empty<Bytes>>, Status> {
        let path = url.path_and_query().map_or("/", |p| p.as_str());
        let mut request = Request::new(Empty::new());
        *request.method_mut() = self.method;
        *request.uri_mut() = path
            .parse()
            .map_err(|_| Status::internal("the runtime named a URL that does not read"))?;
        *request.headers_mut() = self.headers;
        if let Some(authority) = url.authority() {
            let host = authority.as_str().parse();
            let host = host.map_err(|_| Status::internal("the runtime named a URL that does not read"))?;
            request.headers_mut().insert(header::HOST, host);
        }
        Ok(request)
    }
}

fn unavailable(error: &dyn std::fmt::Display) -> Status {
    Status::unavailable(format!("the runtime's streaming server: {error}"))
}

/// Asks the runtime's streaming server, which forgets a URL that was used.
async fn dial(url: &Uri, upgrade: Upgrade) -> Result<Response<Incoming>, Status> {
    let request = upgrade.to(url)?;
    let (Some(address), Some(port)) = (url.host(), url.port_u16()) else {
        return Err(Status::internal(
            "the runtime named a URL without a host or a port",
        ));
    };
    let address = address.trim_start_matches('[').trim_end_matches(']');
    let answer = tokio::time::timeout(PATIENCE, async {
        let stream = TcpStream::connect((address, port))
            .await
            .map_err(|e| unavailable(&e))?;
        // Keystrokes should not wait for each other.
        stream.set_nodelay(true).map_err(|e| unavailable(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| unavailable(&e))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(error = %error, "a connection to the streaming server broke off");
            }
        });
        sender.send_request(request).await.map_err(|e| unavailable(&e))
    });
    answer
        .await
        .map_err(|_| Status::deadline_exceeded("the runtime's streaming server did not answer"))?
}

async fn splice(
    mut answer: Response<Incoming>,
    input: Streaming<wire::SpliceFrame>,
    output: &Output,
) -> Result<(), Status> {
    let opened = wire::SpliceOpened {
        status: answer.status().as_u16().into(),
        headers: answer
            .headers()
            .iter()
            .take(MAX_HEADERS)
            .map(|(name, value)| wire::HttpHeader {
                name: name.to_string(),
                value: String::from_utf8_lossy(value.as_bytes()).into_owned(),
            })
            .collect(),
    };
    let upgraded = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    if send(output, Frame::Opened(opened)).await.is_err() {
        return Ok(());
    }
    if !upgraded {
        let body = Limited::new(answer.into_body(), MAX_ERROR).collect().await;
        if let Ok(body) = body {
            // Nobody may be left to read it.
            let _sent = send(output, Frame::Data(body.to_bytes().to_vec())).await.is_ok();
        }
        return Ok(());
    }
    let connection = hyper::upgrade::on(&mut answer)
        .await
        .map_err(|e| unavailable(&e))?;
    let (mut from_runtime, mut to_runtime) = tokio::io::split(TokioIo::new(connection));
    let upstream = async {
        let mut input = input;
        while let Some(frame) = input.message().await? {
            match frame.frame {
                Some(Frame::Data(bytes)) => {
                    to_runtime.write_all(&bytes).await.map_err(|e| unavailable(&e))?
                }
                _ => return Err(Invalid::new("frame", "must be `data` after `open`").into()),
            }
        }
        to_runtime.shutdown().await.map_err(|e| unavailable(&e))
    };
    let downstream = async {
        let mut buffer = vec![0; FRAME];
        loop {
            let read = from_runtime
                .read(&mut buffer)
                .await
                .map_err(|e| unavailable(&e))?;
            if read == 0 || send(output, Frame::Data(buffer[..read].to_vec())).await.is_err() {
                return Ok::<(), Status>(());
            }
        }
    };
    tokio::pin!(upstream, downstream);
    // The runtime's end is the end; the caller's is only of its own direction.
    tokio::select! {
        result = &mut downstream => result,
        result = &mut upstream => match result {
            Ok(()) => downstream.await,
            // What the runtime still has to say comes before a broken pipe.
            Err(status) if status.code() == tonic::Code::Unavailable => downstream.await,
            Err(status) => Err(status),
        },
    }
}

async fn send(output: &Output, frame: Frame) -> Result<(), ()> {
    output
        .send(Ok(wire::SpliceFrame { frame: Some(frame) }))
        .await
        .map_err(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(method: &str, headers: &[(&str, &str)]) -> wire::SpliceOpen {
        wire::SpliceOpen {
            method: method.into(),
            headers: headers
                .iter()
                .map(|(name, value)| wire::HttpHeader {
                    name: (*name).into(),
                    value: (*value).into(),
                })
                .collect(),
            ..wire::SpliceOpen::default()
        }
    }

    #[test]
    fn what_will_not_be_used_asks_the_runtime_for_nothing() {
        let upgrade = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
        for (wrong, field) in [
            (open("PUT", &upgrade), "open.method: "),
            (open("POST", &[]), "open.headers: must ask for an upgrade"),
            (open("POST", &[("upgrade", "a\nb")]), "open.headers[0].value: "),
            (open("POST", &[("up grade", "x")]), "open.headers[0].name: "),
            (
                open("POST", &[("x", "y"); MAX_HEADERS + 1]),
                "open.headers: must be at most",
            ),
        ] {
            let status = Upgrade::parse(&wrong).unwrap_err();
            assert!(status.message().starts_with(field), "{status}");
        }
        let framed = [
            upgrade.as_slice(),
            &[("Host", "other"), ("Transfer-Encoding", "chunked")],
        ]
        .concat();
        let url = "http://127.0.0.1:10010/exec/token".parse().unwrap();
        let request = Upgrade::parse(&open("POST", &framed)).unwrap().to(&url).unwrap();
        assert_eq!(request.headers()[header::HOST], "127.0.0.1:10010");
        assert_eq!(
            (request.headers().len(), request.uri().path()),
            (3, "/exec/token")
        );
    }
}
