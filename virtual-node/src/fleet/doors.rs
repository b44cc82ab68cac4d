//! The ports of all virtual nodes, whoever has them: a replica listens on each, serves
//! what is its own and hands the rest on to the holder, byte by byte. TLS is with the
//! holder; whoever hands on sees nothing and holds no key.
//!
//! ```text
//!  API server ─▶ shared address:20000 ─▶ replica b ──▶ peer port of replica a ─▶ kubelet API of the node
//!                                        └ or served here, if b has it
//! ```
//!
//! What always holds: what was handed on is not handed on again; a connection for
//! nobody waits a little, for a change of the holder, and then ends.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tracing::{debug, warn};

use super::resource::{Key, Ports};
use crate::incoming::Arrived;

/// Connections that wait to be taken by a node's own server; more are hung up on.
pub(crate) const WAITING: usize = 32;
/// Connections of one virtual node that this replica hands on at a time.
const HANDED: usize = 512;
/// Connections to the peer port that have not said for whom.
const UNSAID: usize = 256;
/// How long a connection for nobody waits for a holder.
const CHANGE: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(3);
/// What is said before what is handed on: its length in one byte, then text.
const SAID: usize = 255;
const BACKLOG: u32 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    Kubelet,
    Mesh,
}

/// Who has a virtual node, as connections to it need to know.
#[derive(Debug, Clone)]
pub(crate) enum Route {
    Here {
        kubelet: mpsc::Sender<Arrived>,
        mesh: mpsc::Sender<Arrived>,
    },
    There(SocketAddr),
    Nobody,
}

/// What there is to listen on.
pub(crate) type Routes = BTreeMap<Key, (Option<Ports>, watch::Receiver<Route>)>;

pub(crate) struct Doors {
    /// Of this replica, or any.
    listen: IpAddr,
    /// Other processes of the machine listen there, too.
    shared: bool,
    open: BTreeMap<Key, Open>,
}

struct Open {
    ports: Ports,
    _tasks: JoinSet<()>,
}

impl Doors {
    pub(crate) fn new(listen: IpAddr, shared: bool) -> Self {
        Self {
            listen,
            shared,
            open: BTreeMap::new(),
        }
    }

    /// Opens and closes as is wanted now.
    pub(crate) fn follow(&mut self, wanted: &Routes) {
        self.open
            .retain(|key, open| wanted.get(key).and_then(|w| w.0) == Some(open.ports));
        for (key, (ports, route)) in wanted {
            let Some(ports) = *ports else { continue };
            if self.open.contains_key(key) {
                continue;
            }
            let mut tasks = JoinSet::new();
            let handed = Arc::new(Semaphore::new(HANDED));
            for (door, port) in [(Door::Kubelet, ports.kubelet), (Door::Mesh, ports.mesh)] {
                match listen((self.listen, port).into(), self.shared) {
                    Ok(listener) => {
                        let at = At {
                            key: key.clone(),
                            door,
                            route: route.clone(),
                            handed: handed.clone(),
                        };
                        tasks.spawn(accept(listener, at));
                    }
                    // Tried again at the next change; another replica serves meanwhile.
                    Err(error) => warn!(%key, port, %error, "cannot listen for a virtual node"),
                }
            }
            if tasks.len() == 2 {
                self.open.insert(key.clone(), Open { ports, _tasks: tasks });
            }
        }
    }
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(shared)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[derive(Clone)]
struct At {
    key: Key,
    door: Door,
    route: watch::Receiver<Route>,
    handed: Arc<Semaphore>,
}

async fn accept(listener: TcpListener, at: At) {
    // Those that are handed on end with the door.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (socket, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!(key = %at.key, %error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let arrived = Arrived {
            socket,
            from: SocketAddr::new(from.ip().to_canonical(), from.port()),
        };
        let route = at.route.borrow().clone();
        if let Route::Here { kubelet, mesh } = &route {
            give(at.door, kubelet, mesh, arrived);
        } else if let Ok(permit) = at.handed.clone().try_acquire_owned() {
            let at = at.clone();
            connections.spawn(async move {
                at.lead(arrived).await;
                drop(permit);
            });
        }
    }
}

fn give(door: Door, kubelet: &mpsc::Sender<Arrived>, mesh: &mpsc::Sender<Arrived>, arrived: Arrived) {
    let to = match door {
        Door::Kubelet => kubelet,
        Door::Mesh => mesh,
    };
    // Full or ended: the connection is dropped, and so hung up on.
    if to.try_send(arrived).is_err() {
        debug!(?door, "a connection found nobody to take it");
    }
}

impl At {
    /// To whoever has it, or will soon.
    async fn lead(&self, arrived: Arrived) {
        let mut route = self.route.clone();
        let known = timeout(CHANGE, route.wait_for(|route| !matches!(route, Route::Nobody))).await;
        let Ok(Ok(known)) = known.map(|known| known.map(|known| known.clone())) else {
            return;
        };
        match known {
            Route::Here { kubelet, mesh } => give(self.door, &kubelet, &mesh, arrived),
            Route::There(peer) => {
                if let Err(error) = self.hand_on(arrived, peer).await {
                    debug!(key = %self.key, %peer, %error, "a connection that was handed on ended");
                }
            }
            Route::Nobody => {}
        }
    }

    async fn hand_on(&self, arrived: Arrived, peer: SocketAddr) -> io::Result<()> {
        let mut near = arrived.socket;
        let mut far = timeout(CONNECT, TcpStream::connect(peer))
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        far.write_all(&say(&self.key, self.door, arrived.from)?).await?;
        // No end of its own: a log that is followed may be silent for days. The server
        // at the far end hangs up on who does not say who he is.
        tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await?;
        Ok(())
    }
}

/// For each direction of what is handed on.
const BUFFER: usize = 8 << 10;

fn word(door: Door) -> &'static str {
    match door {
        Door::Kubelet => "kubelet",
        Door::Mesh => "mesh",
    }
}

fn say(key: &Key, door: Door, from: SocketAddr) -> io::Result<Vec<u8>> {
    let text = format!("{key} {} {from}", word(door));
    let length = u8::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut said = vec![length];
    said.extend(text.as_bytes());
    Ok(said)
}

fn understand(text: &[u8]) -> Option<(Key, Door, SocketAddr)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split(' ');
    let (namespace, name) = words.next()?.split_once('/')?;
    let door = match words.next()? {
        "kubelet" => Door::Kubelet,
        "mesh" => Door::Mesh,
        _ => return None,
    };
    let from = words.next()?.parse().ok()?;
    let key = Key {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    words.next().is_none().then_some((key, door, from))
}

/// Takes what other replicas hand on. Whoever reaches the port can say where it comes
/// from, which counts in whose share its handshake is, and for nothing else.
pub(crate) async fn serve_peers(listener: TcpListener, routes: watch::Receiver<Routes>) {
    let unsaid = Arc::new(Semaphore::new(UNSAID));
    loop {
        let Ok((mut socket, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = unsaid.clone().try_acquire_owned() else {
            continue;
        };
        let routes = routes.clone();
        tokio::spawn(async move {
            let heard = timeout(CONNECT, async {
                let length = socket.read_u8().await?;
                let mut text = [0; SAID];
                let text = &mut text[..length.into()];
                socket.read_exact(text).await?;
                io::Result::Ok(understand(text))
            })
            .await;
            drop(permit);
            let Ok(Ok(Some((key, door, from)))) = heard else {
                return;
            };
            let route = routes.borrow().get(&key).map(|(_, route)| route.borrow().clone());
            // Whoever hands on may know of the holder before it is one.
            if let Some(Route::Here { kubelet, mesh }) = route {
                give(door, &kubelet, &mesh, Arrived { socket, from });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key {
            namespace: "tenant-acme".into(),
            name: "burst".into(),
        }
    }

    #[test]
    fn what_is_said_is_understood_and_nothing_else_is() {
        let from = "[2001:db8::1]:40000".parse().unwrap();
        let said = say(&key(), Door::Mesh, from).unwrap();
        assert_eq!(usize::from(said[0]), said.len() - 1);
        assert_eq!(understand(&said[1..]), Some((key(), Door::Mesh, from)));
        for wrong in [
            "",
            "a/b",
            "a/b mesh",
            "a/b door 1.2.3.4:5",
            "a mesh 1.2.3.4:5",
            "a/b mesh 1.2.3.4:5 x",
            "a/b mesh 1.2.3.4",
            "a/b mesh x",
        ] {
            assert_eq!(understand(wrong.as_bytes()), None, "{wrong}");
        }
    }

    fn free() -> Ports {
        let port = || {
            let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            bound.local_addr().unwrap().port()
        };
        Ports {
            kubelet: port(),
            mesh: port(),
        }
    }

    /// Two replicas at one address: whichever the kernel gives a connection to, the
    /// holder serves it, and knows where it came from.
    #[tokio::test]
    async fn a_connection_reaches_the_holder_whichever_replica_it_comes_to() {
        let ports = free();
        let listen = "127.0.0.1".parse().unwrap();
        let (kubelet, mut taken) = mpsc::channel(WAITING);
        let (mesh, _meshed) = mpsc::channel(WAITING);
        let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = peer.local_addr().unwrap();

        let (_here, here) = watch::channel(Route::Here { kubelet, mesh });
        let holders = Routes::from([(key(), (Some(ports), here))]);
        let (_routes, routes) = watch::channel(holders.clone());
        tokio::spawn(serve_peers(peer, routes));
        let mut holder = Doors::new(listen, true);
        holder.follow(&holders);
        // The other learns who has it only when connections are there already.
        let (change, away) = watch::channel(Route::Nobody);
        let mut other = Doors::new(listen, true);
        other.follow(&Routes::from([(key(), (Some(ports), away))]));

        let mut clients = vec![];
        for n in 0..32u8 {
            let mut client = TcpStream::connect(("127.0.0.1", ports.kubelet)).await.unwrap();
            client.write_all(&[n]).await.unwrap();
            clients.push(client);
        }
        change.send_replace(Route::There(there));
        let mut heard = vec![];
        for _ in 0..clients.len() {
            let mut arrived = timeout(Duration::from_secs(20), taken.recv())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(arrived.from.ip(), listen);
            let n = arrived.socket.read_u8().await.unwrap();
            arrived.socket.write_all(&[n + 100]).await.unwrap();
            heard.push(n);
            // The holder's own is not mixed up with another's.
            let client = &mut clients[usize::from(n)];
            assert_eq!(client.read_u8().await.unwrap(), n + 100);
        }
        heard.sort_unstable();
        assert_eq!(heard, (0..32).collect::<Vec<u8>>());
    }
}
