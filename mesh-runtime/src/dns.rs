//! DNS for the pods of one tenant on this host. Cluster names are answered from
//! the mesh's state ([`answer()`]), all else is passed on to the tenant's name
//! servers ([`upstream`]).
//!
//! `proxy` starts it on the two DNS listeners; what arrives there was sent by a
//! pod to the cluster DNS address, and is answered from that address.
//!
//! What always holds: a cluster name never leaves the cluster; a question that
//! cannot be answered gets SERVFAIL, not silence; queries under way are bounded,
//! and each ends.

mod answer;
mod upstream;

pub use answer::{Answer, Client, Zone, answer};

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bounds::Seldom;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::{netns::Netns, state::Reader, telemetry::Metrics};
use upstream::Upstream;

/// A question lives for `upstream::DEADLINE` at most, a silent connection for this.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Questions are short; this is what EDNS lets a client say at most.
const MAX_DATAGRAM: usize = 4096;
/// Answers over UDP do not become fragments (DNS flag day 2020).
const MAX_UDP_ANSWER: u16 = 1232;
/// After a restart the state is not here at once, and "no such name" would be
/// remembered by the client.
const SYNC_WAIT: Duration = Duration::from_secs(4);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub struct Config {
    pub zone: Zone,
    pub nameservers: Vec<IpAddr>,
    /// The tenant router's namespace, by which the name servers are reached.
    pub router: Netns,
    pub udp: std::net::UdpSocket,
    pub tcp: std::net::TcpListener,
    pub state: Reader,
    pub synced: watch::Receiver<bool>,
    pub metrics: Arc<Metrics>,
    /// Who the pod at an address is. None for nobody of this tenant.
    pub client: Arc<dyn Fn(IpAddr) -> Option<Client> + Send + Sync>,
    /// A place among the questions under way for the pod at an address. None if its
    /// share is used up.
    pub admit: Admit,
}

/// Kept while a question is under way, or a connection open to ask some.
pub type Place = crate::limits::Place;
type Admit = Arc<dyn Fn(IpAddr) -> Option<Place> + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum StartDnsError {
    #[error("cannot take over the DNS listeners")]
    Listener(#[source] io::Error),
}

struct Dns {
    zone: Zone,
    upstream: Upstream,
    state: Reader,
    synced: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
    client: Arc<dyn Fn(IpAddr) -> Option<Client> + Send + Sync>,
    admit: Admit,
}

/// Serves on `tasks`.
pub fn start(config: Config, tasks: &mut JoinSet<()>) -> Result<(), StartDnsError> {
    let udp = UdpSocket::from_std(config.udp).map_err(StartDnsError::Listener)?;
    let tcp = TcpListener::from_std(config.tcp).map_err(StartDnsError::Listener)?;
    let dns = Arc::new(Dns {
        zone: config.zone,
        upstream: Upstream::new(config.router, &config.nameservers, config.metrics.clone()),
        state: config.state,
        synced: config.synced,
        metrics: config.metrics,
        client: config.client,
        admit: config.admit,
    });
    tasks.spawn(datagrams(dns.clone(), udp));
    tasks.spawn(connections(dns, tcp));
    Ok(())
}

/// Questions, and their answers by the same socket: it is bound to the cluster DNS
/// address, from which a pod expects them.
async fn datagrams(dns: Arc<Dns>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let (length, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::warn!(%error, "cannot receive DNS questions");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let question = &buffer[..length];
        match dns.at_once(question, peer.ip()) {
            Step::Done(reply) => answer_by(&socket, reply, peer),
            Step::Nothing => {}
            Step::Wait => {
                let Some(place) = (dns.admit)(peer.ip()) else {
                    if let Step::Done(reply) = refuse(question, ResponseCode::ServFail) {
                        answer_by(&socket, reply, peer);
                    }
                    continue;
                };
                let (dns, socket, question) = (dns.clone(), socket.clone(), question.to_vec());
                tokio::spawn(async move {
                    if let Some(reply) = dns.later(&question, peer.ip(), Transport::Udp).await {
                        answer_by(&socket, reply, peer);
                    }
                    drop(place);
                });
            }
        }
    }
}

async fn connections(dns: Arc<Dns>, listener: TcpListener) {
    let told = Seldom::default();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let Some(place) = (dns.admit)(peer.ip()) else {
                    // If it is gone already, there is nothing to reset.
                    let _gone = stream.set_zero_linger();
                    continue;
                };
                let dns = dns.clone();
                tokio::spawn(async move {
                    // A client that breaks off has its answer in that.
                    let _broken = connection(&dns, stream, peer.ip()).await;
                    drop(place);
                });
            }
            Err(error) => {
                if let Some(left_out) = told.due(std::time::Instant::now()) {
                    tracing::warn!(%error, left_out, "cannot accept DNS connections");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Questions one after the other, each with its length before it (RFC 1035, 4.2.2).
async fn connection(dns: &Arc<Dns>, mut stream: TcpStream, peer: IpAddr) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let question = match timeout(TCP_IDLE, upstream::read_message(&mut stream)).await {
            Ok(question) => question?,
            Err(_) => return Ok(()),
        };
        let answer = match dns.at_once(&question, peer) {
            Step::Done(message) => Some(message),
            Step::Nothing => None,
            // Within the connection's own place.
            Step::Wait => dns.later(&question, peer, Transport::Tcp).await,
        };
        let Some(answer) = answer.and_then(|answer| answer.bytes(Transport::Tcp)) else {
            return Ok(());
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let mut framed = Vec::with_capacity(2 + answer.len());
        framed.extend(length.to_be_bytes());
        framed.extend(answer);
        timeout(TCP_IDLE, stream.write_all(&framed)).await??;
        stream.flush().await?;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// How far a question is answered without waiting.
enum Step {
    Done(Reply),
    /// It gets no answer.
    Nothing,
    /// [`Dns::later`] answers it.
    Wait,
}

enum Reply {
    Ours {
        message: Message,
        limit: u16,
    },
    /// As a name server gave it.
    Theirs(Vec<u8>),
}

impl Reply {
    fn bytes(self, transport: Transport) -> Option<Vec<u8>> {
        match self {
            Self::Theirs(bytes) => Some(bytes),
            Self::Ours { message, limit } => {
                let bytes = message.to_vec().ok()?;
                if transport == Transport::Udp && bytes.len() > limit.into() {
                    // The client asks again over TCP.
                    return message.truncate().to_vec().ok();
                }
                Some(bytes)
            }
        }
    }
}

/// A refusal of what may not even be a question, as far as it can be told.
fn refuse(question: &[u8], code: ResponseCode) -> Step {
    match question {
        // Whoever sends answers gets none: two servers could go on for ever.
        [id_high, id_low, flags, ..] if question.len() >= 12 && flags & 0x80 == 0 => {
            Step::Done(Reply::Ours {
                message: Message::error_msg(u16::from_be_bytes([*id_high, *id_low]), OpCode::Query, code),
                limit: MAX_UDP_ANSWER,
            })
        }
        _ => Step::Nothing,
    }
}

impl Dns {
    fn at_once(&self, question: &[u8], peer: IpAddr) -> Step {
        self.metrics.dns_request();
        let Ok(message) = Message::from_vec(question) else {
            return refuse(question, ResponseCode::FormErr);
        };
        if message.metadata.message_type != MessageType::Query {
            return Step::Nothing;
        }
        let Some(client) = (self.client)(peer) else {
            return refuse(question, ResponseCode::Refused);
        };
        if *self.synced.borrow() {
            let state = self.state.snapshot();
            match answer(&message, &self.zone, &state, &client, rand::random()) {
                Answer::Reply(reply) => return Step::Done(ours(&message, reply)),
                Answer::PassOn => {}
            }
        }
        Step::Wait
    }

    async fn later(&self, question: &[u8], peer: IpAddr, transport: Transport) -> Option<Reply> {
        let message = Message::from_vec(question).ok()?;
        let client = (self.client)(peer)?;
        let mut synced = self.synced.clone();
        let known = matches!(
            timeout(SYNC_WAIT, synced.wait_for(|synced| *synced)).await,
            Ok(Ok(_))
        );
        if known {
            let state = self.state.snapshot();
            if let Answer::Reply(reply) = answer(&message, &self.zone, &state, &client, rand::random()) {
                return Some(ours(&message, reply));
            }
        } else if self.zone.owns(&message) {
            return failed(&message);
        }
        let passed = match transport {
            Transport::Udp => self.upstream.datagram(question).await,
            Transport::Tcp => self.upstream.stream(question).await,
        };
        match passed {
            Some(bytes) => Some(Reply::Theirs(bytes)),
            None => failed(&message),
        }
    }
}

fn answer_by(socket: &UdpSocket, reply: Reply, peer: SocketAddr) {
    let Some(bytes) = reply.bytes(Transport::Udp) else {
        return;
    };
    // A full buffer loses it, as UDP may.
    let _lost = socket.try_send_to(&bytes, peer);
}

fn ours(question: &Message, message: Message) -> Reply {
    let asked = question.edns.as_ref().map_or(512, |edns| edns.max_payload());
    Reply::Ours {
        message,
        limit: asked.clamp(512, MAX_UDP_ANSWER),
    }
}

fn failed(question: &Message) -> Option<Reply> {
    Some(ours(question, answer::response(question, ResponseCode::ServFail)))
}
