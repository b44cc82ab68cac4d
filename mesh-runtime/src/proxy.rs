//! The proxy of one tenant on this host: the data path of its pods.
//!
//! `runtime` starts one for each tenant, when the router's namespace and its
//! listeners stand, and adds and removes pods as sandboxes come and go. What
//! the listeners accept was put there by `redirect`; from then on a connection
//! belongs to one task here until both of its ends are closed.
//!
//! ```text
//!  pod ──▶ outbound ──▶ hbone::pool ══ TLS, HTTP/2 ══▶ hbone::server ──▶ inbound ──▶ pod
//!             │                                                            ▲
//!             └──────────────── a pod of the same host ────────────────────┘
//! ```

mod connection;
mod copy;
mod destination;
mod dial;
mod failure;
mod hbone;
mod inbound;
mod intake;
mod live;
mod outbound;
mod outliers;
mod pods;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bounds::Seldom;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::{Identity, InvalidIdentity};
use pool_agent_api::{HostName, SandboxKey, Tenant};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use crate::{
    control::{self, OpenControlError, PoolTls},
    dns::{self, StartDnsError, Zone},
    identity::{Certificate, CertificateState, Certificates},
    limits::{Peer, Shares, TenantShares, UsedUp},
    netns::Netns,
    off_limits::OffLimits,
    pod::{Mode, PodRecord},
    policy::{Facts, Verdict},
    redirect::{GATEWAY, Listeners},
    state::{self, Workload},
    telemetry::{Carried, Metrics, Party},
    xds::{self, Subscriber, Subscriptions},
};
use copy::Patience;
use destination::Network;
use dial::Dialer;
use failure::Failure;
use live::Live;
use outliers::Outliers;
use pods::{LocalPod, Pods};

/// How long a connection waits for what may still be on its way: the mesh's
/// state, its pod's certificate, its peer's workload.
const WAIT: Duration = Duration::from_secs(5);
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub struct TenantProxyConfig {
    pub tenant: Tenant,
    /// This host, as the mesh control plane knows it.
    pub host: HostName,
    /// The range of this host's pods, all tenants' alike.
    pub local_pods: Ipv4Net,
    /// Whose addresses are whose in the pool.
    pub off_limits: Arc<OffLimits>,
    /// Addresses of the host and of the tenant's router. Pods may not reach them
    /// through the proxy, which stands where they are local.
    pub host_addresses: Vec<IpAddr>,
    /// The tenant router's namespace: upstream sockets are made here.
    pub router: Netns,
    pub listeners: Listeners,
    /// The host's credentials towards the tenant's mesh control plane.
    pub pool_tls: Arc<PoolTls>,
    /// Shared by all tenants of the process.
    pub metrics: Arc<Metrics>,
    /// The same: what its connections may hold of the host's.
    pub shares: Arc<Shares>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartProxyError {
    #[error(transparent)]
    Control(#[from] OpenControlError),
    #[error(transparent)]
    Dns(#[from] StartDnsError),
    #[error("cannot take over the {name} listener")]
    Listener {
        name: &'static str,
        #[source]
        source: io::Error,
    },
}

/// A running proxy. Dropping it cuts every connection; [`TenantProxy::shutdown`]
/// lets them end first.
pub struct TenantProxy {
    mesh: Arc<Mesh>,
    tenant: Tenant,
    /// Aborted when dropped.
    tasks: JoinSet<()>,
}

/// What all connections of the tenant share.
struct Mesh {
    network: Network,
    local_pods: IpNet,
    cluster: Arc<str>,
    trust_domain: String,
    /// The client that a pod sees when it calls itself through a Service. Its own
    /// address would not leave it again; its gateway's comes back here.
    self_call: IpAddr,
    state: state::Reader,
    synced: watch::Sender<bool>,
    pods: Pods,
    certificates: Certificates,
    dialer: Dialer,
    outliers: Mutex<Outliers>,
    metrics: Arc<Metrics>,
    shares: TenantShares,
}

impl TenantProxy {
    /// Takes the listeners into the current tokio runtime and begins to serve:
    /// accept loops, state and certificates from the control plane, DNS.
    pub fn start(config: TenantProxyConfig) -> Result<Self, StartProxyError> {
        let TenantProxyConfig {
            tenant,
            host,
            local_pods,
            off_limits,
            host_addresses,
            router,
            listeners,
            pool_tls,
            metrics,
            shares,
        } = config;
        let reach = control::Reach {
            off_limits: off_limits.clone(),
            host: host_addresses.as_slice().into(),
        };
        let channel = control::connect(&tenant, &pool_tls, reach)?;
        let (writer, state) = state::open();
        let subscriber = Subscriber {
            host: host.to_string(),
            address: host_addresses
                .first()
                .copied()
                .unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            cluster_domain: tenant.cluster_domain.clone(),
        };
        let mesh = Arc::new(Mesh {
            network: Network {
                name: tenant.mesh_control.network.as_str().into(),
                cluster_pods: tenant.cluster_pod_range,
                host: host_addresses.into(),
                off_limits,
            },
            local_pods: local_pods.into(),
            cluster: tenant.mesh_control.cluster_id.as_str().into(),
            trust_domain: tenant.mesh_control.trust_domain.clone(),
            self_call: GATEWAY.into(),
            state,
            synced: watch::Sender::new(false),
            pods: Pods::default(),
            certificates: Certificates::default(),
            dialer: Dialer::new(router.clone()),
            outliers: Mutex::default(),
            metrics,
            shares: shares.tenant(),
        });

        let Listeners {
            outbound,
            inbound,
            hbone,
            dns_udp,
            dns_tcp,
        } = listeners;
        let take = |name, listener| {
            TcpListener::from_std(listener).map_err(|source| StartProxyError::Listener { name, source })
        };
        let outbound = take("outbound", outbound)?;
        let inbound = take("inbound", inbound)?;
        let hbone = take("HBONE", hbone)?;

        let mut tasks = JoinSet::new();
        tasks.spawn(accept(outbound, mesh.clone(), Mesh::captured));
        tasks.spawn(accept(inbound, mesh.clone(), Mesh::arrived));
        tasks.spawn(accept(hbone, mesh.clone(), Mesh::tunnelled));
        let asking = mesh.clone();
        let admitting = mesh.clone();
        dns::start(
            dns::Config {
                zone: Zone {
                    domain: tenant.cluster_domain.to_ascii_lowercase().as_str().into(),
                    network: mesh.network.name.clone(),
                    cluster_pods: tenant.cluster_pod_range,
                },
                nameservers: tenant.upstream_nameservers.clone(),
                router,
                udp: dns_udp,
                tcp: dns_tcp,
                state: mesh.state.clone(),
                synced: mesh.synced.subscribe(),
                metrics: mesh.metrics.clone(),
                client: Arc::new(move |address| {
                    let pod = asking.pods.at(address)?;
                    Some(dns::Client {
                        namespace: pod.namespace.clone(),
                    })
                }),
                admit: Arc::new(move |address| admitting.question(address)),
            },
            &mut tasks,
        )?;
        tasks.spawn(xds::follow(
            channel.clone(),
            subscriber,
            Subscriptions::within(mesh.shares.state()),
            writer,
            mesh.synced.clone(),
            mesh.metrics.clone(),
        ));
        tasks.spawn(mesh.certificates.clone().maintain(channel, SystemTime::now));
        tasks.spawn(recheck(mesh.clone()));
        Ok(Self { mesh, tenant, tasks })
    }

    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// Serves the pod's connections from now on, and asks for its certificate.
    /// Idempotent. To be called before the pod's first packet is redirected:
    /// the connection of a pod that is not known here is reset.
    ///
    /// Its bytes are counted in `carried`. The state of its certificate is in the answer;
    /// None for an unmeshed pod.
    pub fn add_pod(
        &self,
        pod: PodRecord,
        carried: Arc<Carried>,
    ) -> Result<Option<watch::Receiver<CertificateState>>, InvalidIdentity> {
        let mesh = &self.mesh;
        let key = pod.key.clone();
        let added = mesh.pods.add(&key, || {
            let lease = match pod.mode {
                Mode::Enrolled => Some(mesh.certificates.want(&pod.identity(&mesh.trust_domain)?)),
                Mode::Unmeshed => None,
            };
            let live = Arc::new(Live::default());
            let shares = Arc::new(mesh.shares.pod());
            Ok(LocalPod {
                uid: format!("{}//Pod/{}/{}", mesh.cluster, pod.namespace, pod.name).into(),
                namespace: pod.namespace.as_str().into(),
                name: pod.name.as_str().into(),
                lease,
                tunnels: hbone::Pool::new(
                    mesh.dialer.clone(),
                    mesh.metrics.clone(),
                    shares.clone(),
                    live.closing().clone(),
                ),
                shares,
                live,
                carried,
                record: pod,
            })
        })?;
        Ok(added.lease.as_ref().map(|lease| lease.state().clone()))
    }

    /// The certificate of an identity of this host's pods. None if no pod has it.
    pub fn identified(&self, identity: &Identity) -> Option<watch::Receiver<CertificateState>> {
        self.mesh.certificates.state(identity)
    }

    /// Whether the control plane's first snapshot of workloads and services is
    /// here. It stays true through disconnects: stale state beats none.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.mesh.synced.subscribe()
    }

    /// The IPv4 addresses of all Services of the tenant, again whenever they
    /// change: `runtime` gives them to the kernel, so that unmeshed pods' TCP to
    /// them comes to the outbound listener too.
    pub fn service_addresses(&self) -> watch::Receiver<Arc<BTreeSet<Ipv4Addr>>> {
        self.mesh.state.service_addresses()
    }

    /// The IPv4 addresses of all workloads of the tenant, again whenever they change:
    /// the kernel lets unmeshed pods reach and be reached by no others of the pool.
    pub fn workload_addresses(&self) -> watch::Receiver<Arc<BTreeSet<Ipv4Addr>>> {
        self.mesh.state.workload_addresses()
    }

    /// The mesh as this host knows it.
    pub fn state(&self) -> &state::Reader {
        &self.mesh.state
    }

    /// Takes no new connection of the pod or to it, tells its tunnels so
    /// (GOAWAY), and cuts what still lives after `drain`. Returns when nothing
    /// of the pod is left.
    pub async fn remove_pod(&self, key: &SandboxKey, drain: Duration) {
        if let Some(pod) = self.mesh.pods.remove(key) {
            pod.live.close(drain).await;
            // Pods of this host reach each other without a tunnel.
            for other in self.mesh.pods.all() {
                other.live.cut_unless(|server, _| !Arc::ptr_eq(server, &pod));
            }
        }
    }

    /// The same for all pods, then ends the proxy's tasks.
    pub async fn shutdown(self, drain: Duration) {
        let pods = self.mesh.pods.take();
        futures::future::join_all(pods.iter().map(|pod| pod.live.close(drain))).await;
    }
}

impl Drop for TenantProxy {
    fn drop(&mut self) {
        self.tasks.abort_all();
        for pod in self.mesh.pods.take() {
            pod.live.cut();
        }
    }
}

/// A connection that a listener took.
struct Accepted {
    tcp: TcpStream,
    peer: SocketAddr,
    /// Where it was going when it was captured.
    target: SocketAddr,
}

/// Takes every connection at once: whether it has a place is decided by whose it is,
/// so nobody waits behind another's.
async fn accept(listener: TcpListener, mesh: Arc<Mesh>, serve: impl Fn(&Arc<Mesh>, Accepted)) {
    let told = Seldom::default();
    loop {
        let taken = match listener.accept().await {
            Ok((tcp, peer)) => tcp
                .local_addr()
                .and_then(|target| dial::prepare(&tcp).map(|()| (tcp, peer, target))),
            Err(error) => {
                if !is_the_connections(&error) {
                    if let Some(left_out) = told.due(Instant::now()) {
                        tracing::warn!(%error, left_out, "cannot accept connections");
                    }
                    mesh.metrics.refused("accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        // A connection that is gone already leaves nothing to serve.
        if let Ok((tcp, peer, target)) = taken {
            serve(&mesh, Accepted { tcp, peer, target });
        }
    }
}

/// Errors of accept(2) that say nothing of the listener (see its man page).
fn is_the_connections(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Has live connections decided upon anew whenever a decision may have changed.
async fn recheck(mesh: Arc<Mesh>) {
    let mut changes = mesh.state.changes();
    let mut decided = mesh.state.policy_epoch();
    while changes.changed().await.is_ok() {
        let epoch = mesh.state.policy_epoch();
        if std::mem::replace(&mut decided, epoch) == epoch {
            continue;
        }
        for pod in mesh.pods.all() {
            let cut = pod
                .live
                .cut_unless(|server, facts| mesh.decide(server, facts).allows());
            if cut > 0 {
                tracing::info!(
                    pod.uid = %pod.record.key.pod,
                    pod.namespace = %pod.record.namespace,
                    pod.name = %pod.record.name,
                    connections = cut,
                    "connections cut: no longer allowed"
                );
            }
        }
    }
}

impl Mesh {
    /// Of a pod of this host.
    fn captured(self: &Arc<Self>, accepted: Accepted) {
        let Accepted { tcp, peer, target } = accepted;
        let Some(pod) = self.pods.at(peer.ip()) else {
            return self.stranger(&tcp, "unknown_pod");
        };
        let place = match pod.shares.outbound() {
            Ok(place) => place,
            Err(used_up) => return self.used_up(&tcp, &pod, used_up, None),
        };
        let (mesh, served) = (self.clone(), pod.clone());
        pod.live.spawn(move |subject| async move {
            outbound::serve(mesh, served, tcp, peer, target, subject).await;
            drop(place);
        });
    }

    /// Plaintext to a pod of this host.
    fn arrived(self: &Arc<Self>, accepted: Accepted) {
        let Accepted { tcp, peer, target } = accepted;
        let Some(pod) = self.pods.at(target.ip()) else {
            return self.stranger(&tcp, "unknown_pod");
        };
        let place = match pod.shares.inbound(Peer::Address(peer.ip())) {
            Ok(place) => place,
            Err(used_up) => return self.used_up(&tcp, &pod, used_up, Some(peer.ip())),
        };
        let (mesh, served) = (self.clone(), pod.clone());
        pod.live.spawn(move |subject| async move {
            let client = inbound::Client {
                address: peer,
                identity: None,
                subject,
                opened: Instant::now(),
            };
            inbound::plaintext(mesh, served, tcp, client, target).await;
            drop(place);
        });
    }

    /// A tunnel to a pod of this host.
    fn tunnelled(self: &Arc<Self>, accepted: Accepted) {
        let Accepted { tcp, peer, target } = accepted;
        let Some(pod) = self.pods.at(target.ip()) else {
            return self.stranger(&tcp, "unknown_pod");
        };
        let guest = self.shares.come(peer.ip(), self.is_known(peer.ip()));
        let (mesh, served) = (self.clone(), pod.clone());
        pod.live.spawn(move |_| async move {
            hbone::server::serve(mesh, served, tcp, peer, guest).await;
        });
    }

    /// Whether the mesh has a workload at the address. It proves nothing, but who is
    /// none of them does not stand in their way.
    fn is_known(&self, address: IpAddr) -> bool {
        let state = self.state.snapshot();
        self.pods.at(address).is_some() || state.workload_at(&self.network.name, address).is_some()
    }

    /// For a DNS question of the pod at the address.
    fn question(&self, address: IpAddr) -> Option<dns::Place> {
        let pod = self.pods.at(address)?;
        match pod.shares.question() {
            Ok(place) => Some(place),
            Err(used_up) => {
                pod.shares.tell(&pod.record, used_up, None);
                None
            }
        }
    }

    fn used_up(&self, tcp: &TcpStream, pod: &LocalPod, used_up: UsedUp, peer: Option<IpAddr>) {
        pod.shares.tell(&pod.record, used_up, peer);
        self.stranger(tcp, "share");
    }

    fn patience(&self) -> Patience {
        let limits = self.shares.limits();
        Patience {
            idle: limits.idle,
            half_closed: limits.half_closed,
        }
    }

    fn stranger(&self, tcp: &TcpStream, reason: &'static str) {
        self.metrics.refused(reason);
        // If it is gone already, there is nothing to reset.
        let _gone = tcp.set_zero_linger();
    }

    /// Waits for the first of the mesh's state.
    async fn synced(&self) -> Result<(), Failure> {
        if *self.synced.borrow() {
            return Ok(());
        }
        let mut synced = self.synced.subscribe();
        match tokio::time::timeout(WAIT, synced.wait_for(|synced| *synced)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Failure::NoState),
        }
    }

    /// Waits for the pod's certificate.
    async fn certificate(&self, pod: &LocalPod) -> Result<Arc<Certificate>, Failure> {
        let Some(lease) = &pod.lease else {
            return Err(Failure::NoCertificate);
        };
        if let CertificateState::Held(certificate) = &*lease.state().borrow() {
            return Ok(certificate.clone());
        }
        let mut state = lease.state().clone();
        match tokio::time::timeout(WAIT, state.wait_for(|state| state.held().is_some())).await {
            Ok(Ok(state)) => state.held().cloned().ok_or(Failure::NoCertificate),
            _ => Err(Failure::NoCertificate),
        }
    }

    /// Waits for the workload that a pod of this host is to the mesh.
    async fn own_workload(&self, pod: &LocalPod) -> Result<Arc<Workload>, Failure> {
        let own = self.state.wait_for(|state| state.workload(&pod.uid).cloned());
        tokio::time::timeout(WAIT, own)
            .await
            .map_err(|_| Failure::UnknownSelf)
    }

    fn outliers(&self) -> MutexGuard<'_, Outliers> {
        // Nothing that can panic runs under it.
        self.outliers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decide(&self, pod: &LocalPod, facts: &Facts) -> Verdict {
        let state = self.state.snapshot();
        let listed = state.workload(&pod.uid).map(|w| &*w.policies).unwrap_or_default();
        let decision = state.policies().decide(&pod.namespace, listed, facts);
        if !decision.report.would_deny.is_empty() {
            tracing::info!(
                pod.uid = %pod.record.key.pod,
                source = facts.source.as_ref().map(tracing::field::display),
                destination = %facts.destination,
                policies = ?decision.report.would_deny,
                "dry-run policies would refuse a connection"
            );
        }
        if !decision.report.missing.is_empty() {
            tracing::warn!(
                pod.uid = %pod.record.key.pod,
                policies = ?decision.report.missing,
                "listed policies are unknown"
            );
        }
        decision.verdict
    }
}

impl LocalPod {
    fn identity(&self) -> Option<&Identity> {
        self.lease.as_ref().map(|lease| lease.identity())
    }

    /// As metrics name it, by its workload once that is known.
    fn party(&self, workload: Option<&Arc<Workload>>) -> Party {
        workload
            .map(|w| Party::of(w))
            .unwrap_or_else(|| Party {
                namespace: Some(self.namespace.clone()),
                ..Party::default()
            })
            .with_principal(self.identity().cloned())
    }
}
