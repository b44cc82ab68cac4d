//! The agent, put together: opens the ledger, takes over what is there, and
//! serves until it is told to stop. Stopping leaves containers, network and mesh
//! as they are.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bounds::Bounds;
use certificates::member::MemberError;
use mesh_runtime::{
    control::{InvalidPoolTls, OpenControlError, PoolTls},
    runtime::{Config as MeshConfig, MeshRuntime},
};
use pool_agent_api::{Invalid, Resources, wire::pool_agent_server::PoolAgentServer};
use pool_usage::account::Place;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    admission::Admission,
    attachment::Mesh,
    board::Board,
    cell::{self, Claims, Station, claims::Index},
    cgroup::{CgroupError, Cgroups},
    cni::{self, Desk, ListenError},
    config::Config,
    cri::{CriError, Runtime, events, wire::CgroupDriver},
    fence::{self, Fence},
    host::{Host, Terms},
    housekeeping,
    image::{Images, egress},
    layout::Layout,
    ledger::{Ledger, LedgerError},
    metrics,
    network::{self, Network, NetworkError},
    policy::bounds::InvalidBounds,
    sandbox::{clock::Clock, perform::Workshop},
    service::{Calls, Facts, MAX_MESSAGE, Service, goarch, tls},
    usage::Meter,
};

/// How long calls may go on once the agent is told to stop.
const FAREWELL: Duration = Duration::from_secs(3);
/// A virtual node has one connection: logs and sessions that its tenant's users look
/// at, and as many calls. Beneath it, each kind has a share of its own ([`Calls`]).
const STREAMS_PER_CONNECTION: u32 = 384;
/// Bytes of a call's headers.
const MAX_HEADERS: u32 = 8 << 10;
/// The runtime may be starting beside us.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("making {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("opening the records of who may use which image")]
    Images(#[source] std::io::Error),
    #[error("the certificate that the cell signs for this host")]
    Certificate(#[from] MemberError),
    #[error("the configuration has no certificate of the pool, and no cell that signs one")]
    NoTls,
    #[error("the pool's TLS")]
    Tls(#[from] tls::TlsError),
    #[error("the pool's TLS towards tenants' control planes")]
    PoolTls(#[from] InvalidPoolTls),
    #[error("{0}")]
    Policy(String),
    #[error("opening the network")]
    Network(#[from] NetworkError),
    #[error("asking the container runtime for its version")]
    Runtime(#[source] CriError),
    #[error(
        "the container runtime uses systemd's cgroup driver, and this agent makes cgroups of its own: set \
         SystemdCgroup = false in the options of each runtime in containerd's configuration, and restart it"
    )]
    SystemdDriver,
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Room(#[from] Invalid),
    #[error("asking the container runtime what is on the host")]
    Adopt(#[source] CriError),
    #[error("raising RLIMIT_NOFILE")]
    Descriptors(#[source] std::io::Error),
    #[error("policy.bounds")]
    Bounds(#[from] InvalidBounds),
    #[error("metering usage")]
    Usage(#[source] OpenControlError),
    #[error(transparent)]
    Cni(#[from] ListenError),
    #[error("listening on {address}")]
    Listen {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("serving")]
    Serve(#[source] tonic::transport::Error),
}

/// Runs until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), AgentError> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    for path in layout.roots().into_iter().chain([layout.routers()]) {
        std::fs::create_dir_all(&path).map_err(|source| AgentError::Directory { path, source })?;
    }
    private(&config.run_dir)?;
    private(&config.state_dir)?;
    let enrolment = config
        .cell
        .as_ref()
        .map(|settings| cell::Enrolment::start(settings, layout.cell(), config.name.clone(), &shutdown));
    let tls = match (&config.tls, &enrolment) {
        (Some(files), _) => files.clone(),
        (None, Some(enrolment)) => {
            let Some(signed) = shutdown
                .run_until_cancelled(enrolment.certificate(&shutdown))
                .await
            else {
                return Ok(());
            };
            signed?.into()
        }
        (None, None) => return Err(AgentError::NoTls),
    };
    let credentials = tls::Credentials::load(&tls)?;
    let own_tls = || {
        let pem = &credentials.pem;
        PoolTls::from_pem(&pem.certificate, &pem.key, &pem.ca, tls.trust_domain.clone())
    };
    let pool_tls = own_tls()?;
    let room = config.policy.room.of(config.capacity, task_slots())?;
    let (ledger, contents) = Ledger::open(&layout.ledger())?;
    let clock = Clock::start();
    let board = Board::new(contents.generation);
    let runtime = Runtime::at(&config.containerd_socket);
    let runtime_version = wait_for(&runtime).await.map_err(AgentError::Runtime)?;
    if let Some(CgroupDriver::Systemd) = runtime.cgroup_driver().await.map_err(AgentError::Runtime)? {
        return Err(AgentError::SystemdDriver);
    }
    let cgroups = Cgroups::detect(&config.policy.room.parent);
    cgroups.hold(&room)?;
    let descriptors = bounds::descriptors::raise().map_err(AgentError::Descriptors)?;
    let limits = config
        .policy
        .bounds
        .share_out(descriptors.limit, config.capacity.sandboxes)?;
    tracing::info!(
        limit = descriptors.limit,
        before = descriptors.before,
        connections = limits.connections,
        "descriptors shared out"
    );
    let network = Network::open(layout.clone(), &config.uplink, config.pod_range).await?;
    let networks = network::networks(&config.uplink)?;
    let off_limits = config
        .policy
        .network
        .off_limits(config.pod_range, &networks)
        .map_err(AgentError::Policy)?;
    tracing::info!(off_limits = ?off_limits, "the pool's addresses");
    let off_limits = Arc::new(off_limits);
    let mut registry = Registry::default();
    let shown = Bounds::register(registry.sub_registry_with_prefix("pool_agent"));
    let mesh = MeshRuntime::start(
        MeshConfig {
            host: config.name.clone(),
            bpffs: config.bpffs.clone(),
            local_pods: config.pod_range,
            off_limits: off_limits.clone(),
            pool_tls,
            limits,
        },
        &mut registry,
    );
    let images = Images::open(
        runtime.clone(),
        &layout.images(),
        &config.policy.images,
        &mut registry,
    )
    .await
    .map_err(AgentError::Images)?;
    let usage = match &config.usage {
        Some(settings) => {
            let of_cell = |f: fn(&cell::Settings) -> &Option<String>| {
                config
                    .cell
                    .as_ref()
                    .and_then(|cell| f(cell).clone())
                    .unwrap_or_default()
            };
            let place = Place {
                class: of_cell(|cell| &cell.class),
                zone: of_cell(|cell| &cell.zone),
            };
            let boot_id = boot_id();
            let (cgroups, spool) = (cgroups.clone(), layout.usage());
            let meter = Meter::start(
                settings,
                place,
                &boot_id,
                cgroups,
                &spool,
                own_tls()?,
                &mut registry,
            );
            meter.map_err(AgentError::Usage)?
        }
        None => Meter::off(),
    };
    let desk = Desk::default();
    let fence = Fence::new(config.cell.as_ref().map(|cell| cell.lease));
    let facts = facts(runtime_version);
    let shop = Arc::new(Workshop {
        host: config.name.clone(),
        address: config.address,
        pod_range: config.pod_range,
        off_limits,
        room: room.clone(),
        runtime: runtime.clone(),
        mesh: Mesh::new(mesh, &mut registry),
        desk: desk.clone(),
        layout,
        cgroups,
        counts: watch::Sender::new(Arc::default()),
        pressure: watch::Sender::default(),
        disk_is_short: Notify::new(),
        image_directories: watch::Sender::default(),
        clock,
        files: config.policy.files,
        images,
        usage,
        fence,
        boot_id: facts.boot_id.clone(),
    });
    // Before anything is taken over, so that no sandbox starts without us.
    let cni = cni::listen(&config.cni_socket)?;
    let listen = |address, source| AgentError::Listen { address, source };
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|e| listen(config.listen, e))?;
    let metrics_listener = TcpListener::bind(config.metrics_listen)
        .await
        .map_err(|e| listen(config.metrics_listen, e))?;
    if let Some(address) = config.policy.images.egress_listen {
        let listener = TcpListener::bind(address).await.map_err(|e| listen(address, e))?;
        tokio::spawn(egress::serve(listener, shop.images.destinations()));
    }
    // What is taken over or swept away may have to be taken off its network, which the
    // runtime asks of us.
    tokio::spawn(cni::serve(cni, desk));
    let generation = contents.generation;
    let claims = match &config.cell {
        Some(_) => Claims::Needed(Index::new(config.name.clone())),
        None => Claims::Unneeded,
    };
    let host = Host::adopt(
        shop,
        board.clone(),
        ledger,
        contents,
        network,
        Admission::new(room.allocatable, config.pod_range),
        Terms {
            privilege: config.policy.privilege.clone(),
            claims: claims.clone(),
        },
    )
    .await
    .map_err(AgentError::Adopt)?;
    tokio::spawn(events::watch(
        runtime,
        config.name.clone(),
        Arc::new(host.clone()),
    ));
    tokio::spawn(housekeeping::record_statuses(host.clone()));
    tokio::spawn(housekeeping::rotate_logs(host.clone()));
    tokio::spawn(housekeeping::count_containers(host.clone()));
    tokio::spawn(host.clone().keep_room());
    tokio::spawn(housekeeping::collect_images(host.clone()));
    tokio::spawn(metrics::serve(metrics_listener, registry, host.clone()));
    tokio::spawn(fence::keep(host.clone()));
    if let (Some(settings), Some(enrolment), Claims::Needed(index)) = (config.cell, enrolment, claims) {
        let agent = SocketAddr::new(config.address, config.listen.port());
        let station = Station::detect(&facts, goarch());
        cell::start(
            settings,
            enrolment,
            host.clone(),
            index,
            agent,
            station,
            &shutdown,
        );
    }
    let credentials = tls::follow(tls.clone(), credentials);
    tokio::spawn(renew_towards_control_planes(host.clone(), credentials.clone()));
    let callers = config.policy.bounds.callers();
    let doorway = tls::Doorway::new(callers, &shown);
    let calls = Calls::new(callers, &shown);
    let callers = tls::accept(listener, tls.trust_domain, credentials, doorway);
    let service =
        PoolAgentServer::new(Service::new(host.clone(), facts)).max_decoding_message_size(MAX_MESSAGE);
    tracing::info!(
        host = %config.name, listen = %config.listen, generation,
        capacity = ?room.capacity, allocatable = ?room.allocatable, "the agent serves"
    );
    let stopping = shutdown.clone();
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(MAX_HEADERS)
        .layer(calls)
        .add_service(service)
        .serve_with_incoming_shutdown(callers, async move { stopping.cancelled().await });
    let farewell = async {
        shutdown.cancelled().await;
        host.drain();
        // Watches never end by themselves.
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        result = serving => result.map_err(AgentError::Serve)?,
        () = farewell => {}
    }
    tracing::info!("the agent ends; containers and redirection stay");
    Ok(())
}

async fn renew_towards_control_planes(host: Host, mut credentials: watch::Receiver<Arc<tls::Credentials>>) {
    while credentials.changed().await.is_ok() {
        let current = credentials.borrow_and_update().clone();
        if let Err(error) = host.shop().mesh.renew(&current.pem) {
            tracing::warn!(error = %error, "tenants' control planes are shown the old certificate");
        }
        if let Err(error) = host.shop().usage.renew(&current.pem) {
            tracing::warn!(error = %error, "the usage collector is shown the old certificate");
        }
    }
}

/// Only root looks into the agent's directories.
fn private(path: &Path) -> Result<(), AgentError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(|source| {
        AgentError::Directory {
            path: path.to_owned(),
            source,
        }
    })
}

async fn wait_for(runtime: &Runtime) -> Result<String, CriError> {
    let begun = tokio::time::Instant::now();
    loop {
        match runtime.version().await {
            Ok(version) => return Ok(version),
            Err(error) if begun.elapsed() > RUNTIME_PATIENCE => return Err(error),
            Err(error) => {
                tracing::debug!(error = %error, "the container runtime does not answer yet");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// A file of the kernel's or the system's, in one piece; empty if it cannot be read.
fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn boot_id() -> String {
    read("/proc/sys/kernel/random/boot_id")
}

fn facts(runtime_version: String) -> Facts {
    let os_image = read("/etc/os-release")
        .lines()
        .find_map(|line| {
            line.strip_prefix("PRETTY_NAME=")
                .map(|n| n.trim_matches('"').to_owned())
        })
        .unwrap_or_else(|| "Linux".into());
    Facts {
        boot_id: boot_id(),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        os_image,
        runtime_version,
    }
}

/// Tasks that may be at a time: the kernel's two bounds.
pub(crate) fn task_slots() -> u64 {
    ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"]
        .into_iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
        .min()
        .unwrap_or(32_768)
}

/// What this machine has: CPUs, memory, and the disk that `state_dir` is on.
pub fn detect(state_dir: &Path) -> Resources {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory_kib = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .unwrap_or(0);
    // The directory may not be there yet.
    let disk = state_dir
        .ancestors()
        .find_map(|path| nix::sys::statvfs::statvfs(path).ok())
        .map_or(0, |fs| fs.blocks().saturating_mul(fs.fragment_size()));
    Resources {
        cpu_millis: u64::try_from(cpus).unwrap_or(1).saturating_mul(1000),
        memory_bytes: memory_kib.saturating_mul(1024),
        ephemeral_storage_bytes: disk,
        sandboxes: 0,
    }
}
