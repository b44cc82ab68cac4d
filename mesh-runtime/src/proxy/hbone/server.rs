//! Tunnels that other hosts open to pods of this one.
//!
//! A tunnel is verified before it may ask for anything, and then asks for one
//! pod: the one whose address it was opened to. Each stream is decided upon by
//! that pod's policies and delivered with the client's own address.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bounds::{Guest, door::Queue};
use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Request, StatusCode};
use mesh_api::Identity;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    HANDSHAKE_TIMEOUT, MAX_FRAME, MAX_HEADERS, MAX_SERVER_STREAMS, SEND_BUFFER, STREAM_WINDOW, TLS_BUFFER,
    TUNNEL_WINDOW, keepalive, peer_identity, read_ahead::ReadAhead, request, time_left,
};
use crate::{
    limits::{self, Peer},
    proxy::{
        Mesh,
        copy::{self, Meter},
        failure::{Failure, causes},
        inbound::{self, Client},
        pods::LocalPod,
    },
    telemetry::Direction,
};

/// A tunnel without streams is closed after this long. Longer than a client
/// keeps one idle, so that it is the client who lets go.
const IDLE: Duration = Duration::from_secs(600);

/// Once its peer's certificate is over a tunnel takes no more streams; those that it has
/// may go on this long. Their client opens the next in a tunnel of its new certificate.
const LINGER: Duration = Duration::from_secs(3600);

/// Who comes from an address that no workload has gets this long for TLS, and again
/// for HTTP/2.
const STRANGERS_TIMEOUT: Duration = Duration::from_secs(4);

/// Serves a tunnel to `pod` until both ends are done with it. `guest` is its place
/// among those that have not proved who they are.
pub(crate) async fn serve(
    mesh: Arc<Mesh>,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    peer: SocketAddr,
    guest: Guest<limits::Source>,
) {
    let shaken = tokio::select! {
        shaken = shake_hands(&mesh, &pod, tcp, peer, guest.queue()) => shaken,
        () = guest.displaced() => return mesh.metrics.refused("displaced"),
    };
    let Some((connection, identity, left)) = shaken else {
        return;
    };
    let place = match pod.shares.inbound(Peer::Identity(identity.clone())) {
        Ok(place) => place,
        Err(used_up) => {
            pod.shares.tell(&pod.record, used_up, Some(peer.ip()));
            return mesh.metrics.refused("share");
        }
    };
    drop(guest);
    drive(mesh, pod, connection, peer, identity, left).await;
    drop(place);
}

type Connection = h2::server::Connection<TlsStream<ReadAhead>, Bytes>;

/// TLS, whom it proves, and HTTP/2. None once the peer was turned away.
async fn shake_hands(
    mesh: &Mesh,
    pod: &LocalPod,
    tcp: TcpStream,
    peer: SocketAddr,
    queue: Queue,
) -> Option<(Connection, Identity, Duration)> {
    let limit = match queue {
        Queue::Known => HANDSHAKE_TIMEOUT,
        Queue::Stranger => STRANGERS_TIMEOUT,
    };
    let Ok(certificate) = mesh.certificate(pod).await else {
        mesh.metrics.refused("no_certificate");
        return None;
    };
    let acceptor = TlsAcceptor::from(certificate.tls.server.clone());
    drop(certificate);
    let mut tls = match timeout(limit, acceptor.accept(ReadAhead::from(tcp))).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            tracing::info!(%peer, pod.uid = %pod.record.key.pod, error = %causes(&error), "tunnel refused: TLS failed");
            mesh.metrics.refused("tls");
            return None;
        }
        Err(_) => {
            tracing::info!(%peer, pod.uid = %pod.record.key.pod, "tunnel refused: TLS took too long");
            mesh.metrics.refused("tls_timeout");
            return None;
        }
    };
    let identity = match peer_identity(tls.get_ref().1) {
        Ok(identity) => identity,
        Err(error) => {
            tracing::info!(%peer, error = %causes(&error), "tunnel refused: no identity");
            mesh.metrics.refused("identity");
            return None;
        }
    };
    let left = time_left(tls.get_ref().1);
    tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_SERVER_STREAMS)
        .handshake::<_, Bytes>(tls);
    match timeout(limit, handshake).await {
        Ok(Ok(connection)) => Some((connection, identity, left)),
        Ok(Err(error)) => {
            tracing::info!(%peer, %identity, %error, "tunnel refused: HTTP/2 failed");
            mesh.metrics.refused("http2");
            None
        }
        Err(_) => {
            tracing::info!(%peer, %identity, "tunnel refused: HTTP/2 took too long");
            mesh.metrics.refused("http2_timeout");
            None
        }
    }
}

async fn drive(
    mesh: Arc<Mesh>,
    pod: Arc<LocalPod>,
    mut connection: Connection,
    peer: SocketAddr,
    identity: Identity,
    left: Duration,
) {
    let _open = mesh.metrics.tunnel(Direction::Inbound);
    let tunnel = Arc::new(Tunnel {
        peer,
        identity,
        streams: AtomicUsize::new(0),
    });
    let mut gone = std::pin::pin!(keepalive(connection.ping_pong()));
    let closing = pod.live.closing().clone();
    let mut closing = std::pin::pin!(closing.cancelled());
    let mut idle = std::pin::pin!(tokio::time::sleep(IDLE));
    let mut certified = std::pin::pin!(tokio::time::sleep(left));
    let mut certificate_is_over = false;
    let mut leaving = false;
    loop {
        tokio::select! {
            // Before its own work: one that is never idle would never be asked.
            biased;
            () = &mut certified => {
                if certificate_is_over {
                    tracing::info!(%peer, identity = %tunnel.identity, "tunnel ended: its peer's certificate is over");
                    return;
                }
                certificate_is_over = true;
                certified.as_mut().reset(Instant::now() + LINGER);
                if !leaving {
                    leaving = true;
                    connection.graceful_shutdown();
                }
            }
            // A busy tunnel's own work first.
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => stream(&mesh, &pod, &tunnel, request, respond),
                Some(Err(error)) => {
                    tracing::debug!(%peer, identity = %tunnel.identity, %error, "tunnel broke");
                    return;
                }
                None => return,
            },
            () = &mut gone => {
                tracing::info!(%peer, identity = %tunnel.identity, "tunnel given up: its peer does not answer");
                return;
            }
            () = &mut closing, if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            () = &mut idle => {
                if tunnel.streams.load(Ordering::Acquire) == 0 && !leaving {
                    leaving = true;
                    connection.graceful_shutdown();
                }
                idle.as_mut().reset(Instant::now() + IDLE);
            }
        }
    }
}

/// Who is at the other end.
struct Tunnel {
    peer: SocketAddr,
    identity: Identity,
    streams: AtomicUsize,
}

struct OpenStream(Arc<Tunnel>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts on a request. What is wrong with the request itself is answered here.
fn stream(
    mesh: &Arc<Mesh>,
    pod: &Arc<LocalPod>,
    tunnel: &Arc<Tunnel>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let target = match request::target(&request, pod.record.address.into()) {
        Ok(target) => target,
        Err(error) => {
            tracing::info!(peer = %tunnel.peer, identity = %tunnel.identity, %error, "stream refused");
            mesh.metrics.refused("request");
            return refuse(&mut respond, StatusCode::BAD_REQUEST);
        }
    };
    tunnel.streams.fetch_add(1, Ordering::AcqRel);
    let open = OpenStream(tunnel.clone());
    let receive = request.into_body();
    let place = match pod.shares.inbound(Peer::Identity(tunnel.identity.clone())) {
        Ok(place) => place,
        Err(used_up) => {
            pod.shares.tell(&pod.record, used_up, Some(tunnel.peer.ip()));
            mesh.metrics.refused("share");
            return refuse(&mut respond, StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    let (mesh, to) = (mesh.clone(), pod.clone());
    // A pod that is going takes no stream: dropping it resets it.
    pod.live.spawn(move |subject| async move {
        let client = Client {
            address: open.0.peer,
            identity: Some(open.0.identity.clone()),
            subject,
            opened: std::time::Instant::now(),
        };
        deliver(mesh, to, client, target, receive, respond).await;
        drop((open, place));
    });
}

async fn deliver(
    mesh: Arc<Mesh>,
    pod: Arc<LocalPod>,
    client: Client,
    target: SocketAddr,
    mut receive: RecvStream,
    mut respond: SendResponse<Bytes>,
) {
    let flow = inbound::flow(&mesh, &pod, &client, target);
    let dialled = match inbound::authorize(&mesh, &pod, &client, target).await {
        Ok(()) => inbound::dial(&mesh, &pod, client.address.ip(), target).await,
        Err(refused) => Err(refused),
    };
    let mut server = match dialled {
        Ok(server) => server,
        Err(failure) => {
            let status = match failure {
                Failure::Denied { .. } | Failure::NotAllowed => StatusCode::UNAUTHORIZED,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            refuse(&mut respond, status);
            return flow.fail(failure.flag(), failure.to_string());
        }
    };
    let snapshot = mesh.state.snapshot();
    let answer = request::answer(StatusCode::OK, snapshot.workload(&pod.uid).map(|w| &**w));
    drop(snapshot);
    let mut send = match respond.send_response(answer, false) {
        Ok(send) => send,
        Err(error) => return flow.fail(crate::telemetry::Flag::None, error.to_string()),
    };
    let copied = {
        let meter = Meter::new(std::slice::from_ref(&flow));
        copy::tunnel_to_server(&mut server, &mut send, &mut receive, meter, mesh.patience()).await
    };
    match copied {
        Ok(()) => {
            server.finish();
            flow.succeed();
        }
        Err(error) => {
            send.send_reset(h2::Reason::CANCEL);
            let failure = Failure::from(error);
            flow.fail(failure.flag(), failure.to_string());
        }
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    // A peer that is gone needs no answer.
    let _gone = respond.send_response(request::answer(status, None), true);
}
