//! The redirection of one tenant's router: a handle for `runtime`, a thread
//! that owns the kernel programs and stands in the router's namespace, and a
//! task that keeps the routing as it has to be.
//!
//! ```text
//!  runtime ──commands──▶ thread: Programs (bpf calls, in the router)
//!                          ▲
//!  netlink ──changes──▶ task: Routing (rules, routes; deleted devices)
//! ```
//!
//! bpf and netlink calls may block on the kernel's locks, so they are made on
//! that thread, one after another, and nobody's executor waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Deadline, Drops,
    abi::{Range, Settings, endpoint},
    listeners::{Listeners, OpenListenerError},
    programs::{self, Device, Programs, ProgramsError},
    routing::{self, Change, PROXY_PORTS, Routing, RoutingError},
};
use crate::{netns::Netns, off_limits::OffLimits};

/// The gateway that every pod has, and the source of what the host itself
/// sends to a pod: its probes, and a pod's call to itself through a Service. A
/// pod can answer it, never call it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Commands that wait for the thread: one for each pod that starts or stops at
/// the same time. Past it callers wait.
const COMMANDS: usize = 64;

/// How often the routing is looked at without having been told of a change.
const LOOK: Duration = Duration::from_secs(30);

/// How long to wait before a broken netlink socket is opened anew.
const REOPEN: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    #[error("cannot start the router's thread")]
    StartThread { source: io::Error },
    #[error("cannot enter {netns}")]
    Enter { netns: String, source: io::Error },
    #[error(transparent)]
    Listener(#[from] OpenListenerError),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    #[error(transparent)]
    Routing(#[from] RoutingError),
    #[error("cannot read the address of {uplink}")]
    UplinkAddress {
        uplink: String,
        source: nix::errno::Errno,
    },
    #[error("the router's redirection was closed")]
    Closed,
}

/// What a router is opened with.
#[derive(Debug, Clone)]
pub struct RouterConfig {
    pub router: Netns,
    /// The router's device towards the host.
    pub uplink: String,
    pub bpffs: PathBuf,
    /// Safe as a file name.
    pub tenant: String,
    /// The tenant's pods, over all hosts.
    pub cluster_pods: ipnet::Ipv4Net,
    /// The range of this host's pods, all tenants' alike.
    pub local_pods: ipnet::Ipv4Net,
    /// The cluster DNS address.
    pub dns: Ipv4Addr,
    /// The host's own addresses. Pods can't reach them, whatever they send.
    pub host_addresses: Vec<Ipv4Addr>,
    /// Whose addresses are whose in the pool.
    pub off_limits: Arc<OffLimits>,
}

/// A tenant's router with redirection in place. Dropping it leaves the kernel's
/// part as it is (fail closed); [`Router::close`] takes it away.
pub struct Router {
    commands: mpsc::Sender<Command>,
    drops: Arc<Drops>,
    _watch: DropGuard,
}

enum Command {
    Attach(Device, Reply<()>),
    Detach(Ipv4Addr, Reply<()>),
    Deadlines(BTreeMap<Ipv4Addr, Deadline>, Reply<()>),
    Deadline(Ipv4Addr, Reply<Option<Deadline>>),
    Services(BTreeSet<u32>, Reply<()>),
    Workloads(BTreeSet<u32>, Reply<()>),
    /// At a device that may be gone, or have lost its program.
    Look(u32),
    /// At all of them.
    Sweep,
    Close(Reply<()>),
}

type Reply<T> = oneshot::Sender<Result<T, ProgramsError>>;

impl Router {
    /// Opens listeners, routing and programs, in this order, and takes over what
    /// an earlier process left. Must be called within a tokio runtime.
    pub async fn open(config: RouterConfig) -> Result<(Self, Listeners), RouterError> {
        let routing = Routing::open(&config.router)?;
        routing.ensure().await?;
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (opened, ready) = oneshot::channel();
        let router = config.router.clone();
        std::thread::Builder::new()
            .name(format!("router-{}", config.tenant))
            .spawn(move || {
                match open(config) {
                    Ok((programs, listeners)) => {
                        if opened.send(Ok((programs.drops(), listeners))).is_ok() {
                            serve(programs, queue);
                        }
                    }
                    // The caller may be gone; then nobody wants to know.
                    Err(error) => drop(opened.send(Err(error))),
                }
            })
            .map_err(|source| RouterError::StartThread { source })?;
        let (drops, listeners) = ready.await.map_err(|_| RouterError::Closed)??;
        let stop = CancellationToken::new();
        tokio::spawn(watch(router, routing, commands.clone(), stop.clone()));
        Ok((
            Self {
                commands,
                drops,
                _watch: stop.drop_guard(),
            },
            listeners,
        ))
    }

    /// Redirects what comes from `device`, or makes sure that it is. To be done
    /// before the device is up: until then it is not classified; and after the
    /// proxy has been told of the pod: from now on it gets its connections.
    pub async fn attach(&self, device: Device) -> Result<(), RouterError> {
        self.ask(|reply| Command::Attach(device, reply)).await
    }

    /// Drops everything to and from the pod with this address, from now on.
    pub async fn detach(&self, address: Ipv4Addr) -> Result<(), RouterError> {
        self.ask(|reply| Command::Detach(address, reply)).await
    }

    /// Moves the deadlines of the attached pods with these addresses: past it everything
    /// to and from the pod is dropped, also when this process has stopped.
    pub async fn set_deadlines(&self, deadlines: BTreeMap<Ipv4Addr, Deadline>) -> Result<(), RouterError> {
        self.ask(|reply| Command::Deadlines(deadlines, reply)).await
    }

    /// That of the pod with this address; None if none is attached.
    pub async fn deadline(&self, address: Ipv4Addr) -> Result<Option<Deadline>, RouterError> {
        self.ask(|reply| Command::Deadline(address, reply)).await
    }

    /// Tells the kernel all addresses of the tenant's Services: unmeshed pods'
    /// TCP to them comes to [`Listeners::outbound`].
    pub async fn set_services(
        &self,
        addresses: impl IntoIterator<Item = Ipv4Addr>,
    ) -> Result<(), RouterError> {
        let addresses = addresses.into_iter().map(u32::from).collect();
        self.ask(|reply| Command::Services(addresses, reply)).await
    }

    /// Tells the kernel all addresses of the tenant's workloads, over all hosts: of the
    /// pool's pods, those that may be reached and may come in as they are.
    pub async fn set_workloads(
        &self,
        addresses: impl IntoIterator<Item = Ipv4Addr>,
    ) -> Result<(), RouterError> {
        let addresses = addresses.into_iter().map(u32::from).collect();
        self.ask(|reply| Command::Workloads(addresses, reply)).await
    }

    /// What the kernel dropped.
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Takes programs, links and maps out of the kernel. Only for a router that
    /// is about to be deleted: its devices are not classified any more.
    pub async fn close(&self) -> Result<(), RouterError> {
        self.ask(Command::Close).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, RouterError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| RouterError::Closed)?;
        Ok(answer.await.map_err(|_| RouterError::Closed)??)
    }
}

/// On the thread: puts it into the router for good, then opens everything.
fn open(config: RouterConfig) -> Result<(Programs, Listeners), RouterError> {
    let RouterConfig {
        router,
        uplink,
        bpffs,
        tenant,
        cluster_pods,
        local_pods,
        dns,
        host_addresses,
        off_limits,
    } = config;
    router.stay().map_err(|source| RouterError::Enter {
        netns: router.path().display().to_string(),
        source,
    })?;
    routing::set_sysctls()?;
    let listeners = Listeners::open(dns)?;
    let settings = Settings {
        cluster_pods: range(cluster_pods),
        local_pods: range(local_pods),
        pool: ranges(off_limits.pool()),
        off_limits: ranges(off_limits.off_limits()),
        dns: dns.into(),
        gateway: GATEWAY.into(),
        router: address_of(&uplink)
            .map_err(|source| RouterError::UplinkAddress {
                uplink: uplink.clone(),
                source,
            })?
            .map_or(0, u32::from),
        // Known once the device is looked up.
        uplink: 0,
        proxy_ports: PROXY_PORTS,
    };
    let directory = programs::directory(&bpffs, &tenant);
    let host_addresses = host_addresses.into_iter().map(u32::from).collect();
    let allowed = off_limits
        .allowed()
        .map(|to| endpoint((*to.ip()).into(), to.port()))
        .collect();
    let programs = Programs::open(
        directory,
        router,
        uplink,
        settings,
        &host_addresses,
        &allowed,
        &listeners,
    )?;
    Ok((programs, listeners))
}

fn range(net: ipnet::Ipv4Net) -> Range {
    Range {
        address: net.network().into(),
        mask: net.netmask().into(),
    }
}

/// As many as there is room for, which is as many as [`OffLimits`] lets be.
fn ranges<const N: usize>(nets: &[ipnet::Ipv4Net]) -> [Range; N] {
    std::array::from_fn(|i| nets.get(i).map_or(Range::NONE, |&net| range(net)))
}

fn address_of(device: &str) -> Result<Option<Ipv4Addr>, nix::errno::Errno> {
    Ok(nix::ifaddrs::getifaddrs()?
        .filter(|interface| interface.interface_name == device)
        .find_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip())))
}

/// On the thread: until the last handle is gone, or it is told to close. A
/// reply that nobody waits for is no error: the caller gave up.
fn serve(mut programs: Programs, mut queue: mpsc::Receiver<Command>) {
    while let Some(command) = queue.blocking_recv() {
        match command {
            Command::Attach(device, reply) => drop(reply.send(programs.attach(&device))),
            Command::Detach(address, reply) => drop(reply.send(programs.detach(address))),
            Command::Deadlines(deadlines, reply) => drop(reply.send(programs.set_deadlines(&deadlines))),
            Command::Deadline(address, reply) => drop(reply.send(programs.deadline(address))),
            Command::Services(addresses, reply) => drop(reply.send(programs.set_services(&addresses))),
            Command::Workloads(addresses, reply) => drop(reply.send(programs.set_workloads(&addresses))),
            Command::Look(device) => warn_of(programs.look_after(device)),
            Command::Sweep => warn_of(programs.sweep()),
            Command::Close(reply) => {
                drop(reply.send(programs.close()));
                return;
            }
        }
    }
}

fn warn_of(result: Result<(), ProgramsError>) {
    if let Err(error) = result {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot look after the pods' devices"
        );
    }
}

/// Keeps the routing, and passes on which devices went, until told to stop.
async fn watch(router: Netns, routing: Routing, commands: mpsc::Sender<Command>, stop: CancellationToken) {
    let mut routing = Some(routing);
    let mut look = tokio::time::interval(LOOK);
    let work = async {
        loop {
            let change = match &mut routing {
                Some(open) => tokio::select! {
                    change = open.changed() => change,
                    _ = look.tick() => Some(Change::Unknown),
                },
                None => {
                    tokio::time::sleep(REOPEN).await;
                    match Routing::open(&router) {
                        Ok(open) => routing = Some(open),
                        Err(error) => {
                            tracing::warn!(
                                error = &error as &dyn std::error::Error,
                                "cannot watch the router"
                            );
                            continue;
                        }
                    }
                    Some(Change::Unknown)
                }
            };
            let Some(change) = change else {
                routing = None;
                continue;
            };
            if let (Change::Routing | Change::Unknown, Some(open)) = (change, &routing)
                && let Err(error) = open.ensure().await
            {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot restore the router's policy route"
                );
            }
            let told = match change {
                Change::Routing => Ok(()),
                Change::Device(device) => commands.send(Command::Look(device)).await,
                Change::Unknown => commands.send(Command::Sweep).await,
            };
            if told.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}
