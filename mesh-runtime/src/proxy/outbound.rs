//! Connections of pods of this host, to wherever they go.
//!
//! ```text
//!  captured ──▶ whose? where to?
//!                 ├─ a Service ──▶ choose an endpoint ─┐   (another one, if that can't be reached)
//!                 ├─ a workload ───────────────────────┤
//!                 │                                    ├─ on this host: its policies, then its socket
//!                 │                                    ├─ HBONE: a stream of a tunnel to its host
//!                 │                                    └─ out of the mesh: TCP
//!                 ├─ outside ──▶ TCP
//!                 └─ refused: reset
//! ```
//!
//! What always holds: an enrolled pod reaches a workload of the mesh under its
//! own identity and finds there the identity that the mesh's state names, or
//! the connection is reset. Nothing is sent in plaintext because something else
//! failed.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::StatusCode;
use mesh_api::HBONE_PORT;
use tokio::net::TcpStream;

use super::{
    Mesh, WAIT,
    connection::Connection,
    copy::{self, Meter, Patience},
    destination::{self, Destination},
    failure::Failure,
    hbone::{
        client::{Key, Place, Source},
        request,
    },
    inbound::{self, Client},
    live::Subject,
    pods::LocalPod,
};
use crate::{
    balance,
    limits::{self, Peer},
    state::{Mode, Reach, Service, ServiceKey, Snapshot, Workload},
    telemetry::{Access, Direction, Flow, Labels, Party, Reporter, Security, Side},
};

/// Endpoints of one Service that are tried for one connection.
const MAX_ENDPOINTS: usize = 3;
/// The far side has dialled its application, or failed to, within this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(12);

/// Carries one captured connection of `pod` to `target`.
pub(crate) async fn serve(
    mesh: Arc<Mesh>,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    client: SocketAddr,
    target: SocketAddr,
    subject: Subject,
) {
    let mut socket = Connection::from(tcp);
    let captured = Captured {
        mesh: &mesh,
        pod: &pod,
        client,
        target,
        subject: &subject,
        opened: Instant::now(),
    };
    // Reaching takes much more room than carrying; it is given back.
    match Box::pin(captured.reach()).await {
        Ok(Reached { server, flows, place }) => {
            let carried = server
                .carry(&mut socket, Meter::new(&flows), mesh.patience())
                .await;
            match carried {
                Ok(()) => {
                    socket.finish();
                    flows.into_iter().for_each(Flow::succeed);
                }
                Err(error) => {
                    let failure = Failure::from(error);
                    for flow in flows {
                        flow.fail(failure.flag(), failure.to_string());
                    }
                }
            }
            drop(place);
        }
        Err((failure, hop)) => captured.flow(&hop).fail(failure.flag(), failure.to_string()),
    }
}

struct Captured<'a> {
    mesh: &'a Arc<Mesh>,
    pod: &'a Arc<LocalPod>,
    client: SocketAddr,
    target: SocketAddr,
    subject: &'a Subject,
    opened: Instant,
}

/// A connection with both of its ends.
struct Reached {
    server: Server,
    /// Ours, and the server's too if that is on this host.
    flows: Vec<Flow>,
    /// Among the connections to the server, if that is a pod of this host.
    place: Option<limits::Place>,
}

enum Server {
    Socket(Connection),
    Tunnel(Box<Stream>),
}

struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    _place: Place,
}

impl Server {
    async fn carry(
        self,
        socket: &mut Connection,
        meter: Meter<'_>,
        patience: Patience,
    ) -> Result<(), copy::CopyError> {
        match self {
            Self::Socket(mut server) => {
                copy::sockets(socket, &mut server, meter, patience).await?;
                server.finish();
            }
            Self::Tunnel(mut stream) => {
                let Stream { send, receive, .. } = &mut *stream;
                if let Err(error) = copy::client_to_tunnel(socket, send, receive, meter, patience).await {
                    send.send_reset(h2::Reason::CANCEL);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Where a connection goes, as far as it is decided.
struct Hop {
    workload: Option<Arc<Workload>>,
    address: SocketAddr,
    service: Option<Arc<Service>>,
}

enum Plan {
    /// There is one way.
    Hop(Hop),
    /// There are several: the Service's endpoints.
    Service(ServiceKey),
}

impl Captured<'_> {
    async fn reach(&self) -> Result<Reached, (Failure, Hop)> {
        let planned = match self.mesh.synced().await {
            Ok(()) => self.plan().await,
            Err(failure) => Err(failure),
        };
        match planned {
            Ok(Plan::Hop(hop)) => match self.attempt(&hop).await {
                Ok(reached) => Ok(reached),
                Err(failure) => Err((failure, hop)),
            },
            Ok(Plan::Service(key)) => self.reach_service(&key).await,
            Err(failure) => {
                let nowhere = Hop {
                    workload: None,
                    address: self.target,
                    service: None,
                };
                Err((failure, nowhere))
            }
        }
    }

    /// A pod's address may be known to its peers before its workload is here.
    async fn plan(&self) -> Result<Plan, Failure> {
        let decide = |state: &Snapshot| {
            let hop = |workload: Option<&Arc<Workload>>| {
                Plan::Hop(Hop {
                    workload: workload.cloned(),
                    address: self.target,
                    service: None,
                })
            };
            match destination::resolve(&self.mesh.network, state, &self.pod.namespace, self.target) {
                Destination::Service(view) if view.service.balance.mode == Mode::Passthrough => {
                    Some(Ok(hop(None)))
                }
                Destination::Service(view) => Some(Ok(Plan::Service(view.service.key.clone()))),
                Destination::Workload(workload) => Some(Ok(hop(Some(workload)))),
                Destination::Outside => Some(Ok(hop(None))),
                Destination::Refused(refused) => Some(Err(refused.into())),
                Destination::UnknownPod => None,
            }
        };
        tokio::time::timeout(WAIT, self.mesh.state.wait_for(decide))
            .await
            .unwrap_or(Err(Failure::UnknownPod))
    }

    async fn reach_service(&self, key: &ServiceKey) -> Result<Reached, (Failure, Hop)> {
        let mut tried: Vec<Arc<str>> = Vec::new();
        let mut last = None;
        for _ in 0..MAX_ENDPOINTS {
            let hop = match self.choose(key, &tried) {
                Ok(hop) => hop,
                Err((failure, hop)) => {
                    // With every endpoint tried, what went wrong with the last
                    // one says more.
                    return Err(last.unwrap_or((failure, hop)));
                }
            };
            match self.attempt(&hop).await {
                Ok(reached) => {
                    self.mesh.outliers().reached(hop.address);
                    return Ok(reached);
                }
                Err(failure) => {
                    let again = failure.is_the_endpoints();
                    if again {
                        self.mesh.outliers().failed(hop.address, Instant::now());
                    }
                    tried.extend(hop.workload.as_ref().map(|w| w.uid.clone()));
                    last = Some((failure, hop));
                    if !again {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or((balance::NoEndpoint::AllTried.into(), self.service_hop(None))))
    }

    fn service_hop(&self, service: Option<Arc<Service>>) -> Hop {
        Hop {
            workload: None,
            address: self.target,
            service,
        }
    }

    fn choose(&self, key: &ServiceKey, tried: &[Arc<str>]) -> Result<Hop, (Failure, Hop)> {
        let state = self.mesh.state.snapshot();
        // Gone since it was found: as if it had no endpoints.
        let Some(view) = state.service(key) else {
            return Err((balance::NoEndpoint::None.into(), self.service_hop(None)));
        };
        let service = &view.service;
        if let Some(what) = service.unsupported {
            return Err((
                Failure::Unsupported(what),
                self.service_hop(Some(service.clone())),
            ));
        }
        let client = balance::Client {
            workload: state.workload(&self.pod.uid).cloned(),
            network: self.mesh.network.name.clone(),
            cluster: self.mesh.cluster.clone(),
            node: state
                .workload(&self.pod.uid)
                .map(|w| w.node.clone())
                .unwrap_or_default(),
        };
        let port = self.target.port();
        let choose = |left_out: &dyn Fn(&Workload) -> bool| {
            balance::choose(&client, service, &view.endpoints, port, rand::random(), left_out)
        };
        let was_tried = |w: &Workload| tried.contains(&w.uid);
        let resting = self.mesh.outliers().resting(Instant::now());
        let rests = |w: &Workload| {
            let endpoint = || Some(SocketAddr::new(ipv4(w)?, w.target_port(service, port)?));
            !resting.is_empty() && endpoint().is_some_and(|endpoint| resting.contains(&endpoint))
        };
        let chosen = match choose(&|w| was_tried(w) || rests(w)) {
            // Better one that failed a moment ago than none.
            Err(balance::NoEndpoint::AllTried | balance::NoEndpoint::NoneNear) => choose(&was_tried),
            chosen => chosen,
        };
        let address = chosen.map(|c| (c, ipv4(c.endpoint)));
        match address {
            Ok((chosen, Some(ip))) => Ok(Hop {
                workload: Some(chosen.endpoint.clone()),
                address: SocketAddr::new(ip, chosen.port),
                service: Some(service.clone()),
            }),
            Ok((_, None)) => Err((
                balance::NoEndpoint::None.into(),
                self.service_hop(Some(service.clone())),
            )),
            Err(none) => Err((none.into(), self.service_hop(Some(service.clone())))),
        }
    }

    async fn attempt(&self, hop: &Hop) -> Result<Reached, Failure> {
        if let Some(refused) = destination::refuse(&self.mesh.network, hop.address) {
            return Err(refused.into());
        }
        if let Some(there) = self.mesh.pods.at(hop.address.ip()) {
            return self.deliver(&there, hop).await;
        }
        match hop.workload.as_deref().map(|w| (w, w.reach)) {
            Some((_, Reach::Unsupported(what))) => return Err(Failure::Unsupported(what)),
            Some((w, Reach::Hbone)) if self.pod.lease.is_some() => return self.tunnel(hop, w).await,
            _ => {}
        }
        let ip = hop.address.ip();
        if self.mesh.local_pods.contains(&ip)
            || (hop.workload.is_none() && self.mesh.network.off_limits.is_pods(ip))
        {
            // In a range of pods, but no pod's of this host's tenant, or none that is known.
            return Err(Failure::UnknownPod);
        }
        let server = self.mesh.dialer.connect(self.source(), hop.address).await?;
        Ok(Reached {
            server: Server::Socket(server.into()),
            flows: vec![self.flow(hop)],
            place: None,
        })
    }

    fn source(&self) -> IpAddr {
        self.client.ip()
    }

    /// To a pod of this host, whose traffic never leaves it: no tunnel, but the
    /// same decision that a tunnel's far end would take.
    async fn deliver(&self, there: &Arc<LocalPod>, hop: &Hop) -> Result<Reached, Failure> {
        // The address may have changed hands before the mesh's state has.
        if hop.workload.as_ref().is_some_and(|w| w.uid != there.uid) {
            return Err(Failure::OtherPod);
        }
        let peer = match self.pod.identity() {
            Some(identity) => Peer::Identity(identity.clone()),
            None => Peer::Address(self.client.ip()),
        };
        let place = there
            .shares
            .inbound(peer)
            .inspect_err(|&used_up| there.shares.tell(&there.record, used_up, Some(self.client.ip())))?;
        let client = Client {
            address: self.client,
            identity: self.pod.identity().cloned(),
            subject: self.subject.clone(),
            opened: self.opened,
        };
        let flow = inbound::flow(self.mesh, there, &client, hop.address);
        let dialled = match inbound::authorize(self.mesh, there, &client, hop.address).await {
            Ok(()) => inbound::dial(self.mesh, there, self.source(), hop.address).await,
            Err(refused) => Err(refused),
        };
        match dialled {
            Ok(server) => Ok(Reached {
                server: Server::Socket(server),
                flows: vec![self.flow(hop), flow],
                place: Some(place),
            }),
            Err(failure) => {
                self.subject.clear();
                flow.fail(failure.flag(), failure.to_string());
                Err(failure)
            }
        }
    }

    async fn tunnel(&self, hop: &Hop, to: &Workload) -> Result<Reached, Failure> {
        let key = Key {
            to: SocketAddr::new(hop.address.ip(), HBONE_PORT),
            expected: to.identity.clone(),
        };
        // What was allowed is another port of it.
        if let Some(refused) = destination::refuse(&self.mesh.network, key.to) {
            return Err(refused.into());
        }
        let source = Source {
            address: self.source(),
            certificate: self.mesh.certificate(self.pod).await?,
        };
        let host = hop.service.as_ref().map(|s| s.key.hostname.clone());
        // A tunnel that was open before may have ended unnoticed; that is found
        // out by using it, and is no failure of the peer. Once.
        let mut again = true;
        loop {
            let place = self.pod.tunnels.place(&key, &source).await?;
            let own = self.mesh.state.snapshot().workload(&self.pod.uid).cloned();
            let ask = request::connect(hop.address, self.client, host.as_deref(), own.as_deref());
            let asked = tokio::time::timeout(ANSWER_TIMEOUT, ask_for(&place, ask)).await;
            match asked {
                Ok(Ok((response, send))) if response.status() == StatusCode::OK => {
                    return Ok(Reached {
                        server: Server::Tunnel(Box::new(Stream {
                            send,
                            receive: response.into_body(),
                            _place: place,
                        })),
                        flows: vec![self.flow(hop)],
                        place: None,
                    });
                }
                Ok(Ok((response, _))) => {
                    return Err(match response.status() {
                        StatusCode::UNAUTHORIZED => Failure::DeniedThere,
                        status => Failure::Answer { status },
                    });
                }
                Ok(Err(_)) if again => {
                    again = false;
                    place.tunnel().spend();
                }
                Ok(Err(source)) => {
                    return Err(Failure::TunnelBroke {
                        expected: key.expected,
                        source,
                    });
                }
                Err(_) => return Err(Failure::NoAnswer),
            }
        }
    }

    /// The connection as this end reports it.
    fn flow(&self, hop: &Hop) -> Flow {
        let snapshot = self.mesh.state.snapshot();
        let own = snapshot.workload(&self.pod.uid);
        let there = hop.workload.as_deref();
        let meshed = self.pod.lease.is_some() && there.is_some_and(|w| w.reach == Reach::Hbone);
        let expected = there.filter(|_| meshed).map(|w| w.identity.clone());
        let labels = Labels {
            reporter: Reporter::Source,
            source: self.pod.party(own),
            destination: there
                .map(Party::of)
                .unwrap_or_default()
                .with_principal(expected.clone()),
            service: None,
            security: if meshed {
                Security::MutualTls
            } else {
                Security::None
            },
        };
        let labels = match &hop.service {
            Some(service) => labels.with_service(service),
            None => labels,
        };
        let access = Access {
            direction: Direction::Outbound,
            source: self.client,
            source_workload: Some(self.pod.name.clone()),
            source_namespace: Some(self.pod.namespace.clone()),
            source_identity: self.pod.identity().cloned(),
            destination: hop.address,
            hbone: meshed
                .then(|| SocketAddr::new(hop.address.ip(), HBONE_PORT))
                .filter(|to| self.mesh.pods.at(to.ip()).is_none()),
            destination_workload: there.map(|w| w.name.clone()),
            destination_namespace: there.map(|w| w.namespace.clone()),
            destination_identity: expected,
            service: hop.service.as_ref().map(|s| s.key.hostname.clone()),
        };
        let flow = Flow::open(&self.mesh.metrics, labels, access, self.opened);
        flow.on_account_of(&self.pod.carried, Side::Client)
    }
}

fn ipv4(workload: &Workload) -> Option<IpAddr> {
    workload.addresses.iter().copied().find(IpAddr::is_ipv4)
}

async fn ask_for(
    place: &Place,
    ask: http::Request<()>,
) -> Result<(http::Response<RecvStream>, SendStream<Bytes>), h2::Error> {
    let (response, send) = place.requests().await?.send_request(ask, false)?;
    Ok((response.await?, send))
}
