//! Two hosts' routers of one tenant on a wire, with pods:
//!
//! ```text
//!  wire ─┬─ up ─ router 1 ─ pods 10.77.1.…
//!        └─ up ─ router 2 ─ pods 10.77.2.…
//! ```
//!
//! The runtimes of both hosts run in the test's own process.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use mesh_api::istio::workload as wire;
use mesh_runtime::{
    attachment::AttachmentState,
    limits::Limits,
    netns::Netns,
    off_limits::OffLimits,
    pod::{Mode, PodRecord},
    runtime::{Attachment, Config, MeshRuntime, PodAttachment},
};
use pool_agent_api::{Attempt, SandboxKey, Tenant, tenant::MeshControl};
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};

pub(crate) use crate::control::TRUST_DOMAIN;
use crate::control::{Control, TENANT};

/// How long anything may take on a busy machine before a test gives up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
/// Somebody outside the cluster, and the name server.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
/// Another host of the pool, and what pods may reach in spite of where it lies.
pub(crate) const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
pub(crate) const ALLOWED: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 6443);
pub(crate) const NAMESERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
pub(crate) const CLUSTER: &str = "Kubernetes";
pub(crate) const NAMESPACE: &str = "shop";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Waits for an end that has to come.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}"))
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// A network namespace.
pub(crate) struct Space {
    name: String,
    pub(crate) netns: Netns,
}

impl Space {
    fn new(name: String) -> Self {
        ip(&["netns", "add", &name], "");
        let netns = Netns::open(Path::new("/run/netns").join(&name)).unwrap();
        let space = Self { name, netns };
        space.ip("link set lo up\n");
        space
    }

    /// Runs `ip` with these lines as a batch.
    pub(crate) fn ip(&self, batch: &str) {
        ip(&["-n", &self.name, "-batch", "-"], batch);
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub(crate) fn listen(&self, address: impl Into<SocketAddr>) -> TcpListener {
        let address = address.into();
        let socket = self
            .netns
            .enter(|| Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), None))
            .unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(1024).unwrap();
        TcpListener::from_std(socket.into()).unwrap()
    }

    pub(crate) async fn connect(&self, to: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
        let socket = self
            .netns
            .enter(|| Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), None))?;
        timeout(
            DEADLINE,
            TcpSocket::from_std_stream(socket.into()).connect(to.into()),
        )
        .await
        .map_err(|_| std::io::ErrorKind::TimedOut)?
    }

    pub(crate) fn udp(&self, address: impl Into<SocketAddr>) -> UdpSocket {
        let address = address.into();
        let socket = self
            .netns
            .enter(|| Socket::new(Domain::IPV4, Type::DGRAM.nonblocking().cloexec(), None))
            .unwrap();
        socket.bind(&address.into()).unwrap();
        UdpSocket::from_std(socket.into()).unwrap()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let status = Command::new("ip").args(["netns", "del", &self.name]).status();
        if !status.is_ok_and(|s| s.success()) {
            eprintln!("left behind: namespace {}", self.name);
        }
    }
}

/// From one of several addresses that a namespace has.
pub(crate) async fn connect_from(
    netns: &Netns,
    from: Ipv4Addr,
    to: SocketAddr,
) -> std::io::Result<TcpStream> {
    let socket = netns.enter(|| Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), None))?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

fn ip(arguments: &[&str], input: &str) {
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(
        out.status.success(),
        "ip {arguments:?} {input}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// A BPF file system of a host's own.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self(directory)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount(self.0.path()) {
            eprintln!("left behind: {}: {error}", self.0.path().display());
        }
    }
}

pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) router: Space,
    pub(crate) runtime: MeshRuntime,
    pub(crate) registry: Registry,
    _bpffs: Bpffs,
}

pub(crate) struct Pod {
    pub(crate) key: SandboxKey,
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) space: Space,
    pub(crate) host: usize,
    attachment: Attachment,
}

impl Pod {
    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address.into(), port)
    }

    pub(crate) fn uid(&self) -> String {
        format!("{CLUSTER}//Pod/{NAMESPACE}/{}", self.name)
    }

    pub(crate) fn identity(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{}", self.name)
    }

    pub(crate) fn listen(&self, port: u16) -> TcpListener {
        self.space.listen((self.address, port))
    }

    pub(crate) async fn connect(&self, to: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
        self.space.connect(to).await
    }

    /// As the mesh knows it.
    pub(crate) fn workload(&self) -> wire::Workload {
        wire::Workload {
            uid: self.uid(),
            name: self.name.clone(),
            namespace: NAMESPACE.to_owned(),
            addresses: vec![self.address.octets().to_vec()],
            tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
            trust_domain: TRUST_DOMAIN.to_owned(),
            service_account: self.name.clone(),
            cluster_id: CLUSTER.to_owned(),
            node: format!("host-{}", self.host + 1),
            workload_name: self.name.clone(),
            canonical_name: self.name.clone(),
            ..Default::default()
        }
    }

    /// The same, as an endpoint of a service.
    pub(crate) fn endpoint_of(&self, service: &str, ports: &[(u16, u16)]) -> wire::Workload {
        let mut workload = self.workload();
        workload.services.insert(
            service_key(service),
            wire::PortList {
                ports: port_list(ports),
            },
        );
        workload
    }
}

pub(crate) fn hostname(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

pub(crate) fn service_key(service: &str) -> String {
    format!("{NAMESPACE}/{}", hostname(service))
}

fn port_list(ports: &[(u16, u16)]) -> Vec<wire::Port> {
    ports
        .iter()
        .map(|&(service, target)| wire::Port {
            service_port: service.into(),
            target_port: target.into(),
            ..Default::default()
        })
        .collect()
}

pub(crate) fn service(name: &str, vips: &[Ipv4Addr], ports: &[(u16, u16)]) -> wire::Service {
    wire::Service {
        name: name.to_owned(),
        namespace: NAMESPACE.to_owned(),
        hostname: hostname(name),
        addresses: vips
            .iter()
            .map(|vip| wire::NetworkAddress {
                address: vip.octets().to_vec(),
                ..Default::default()
            })
            .collect(),
        ports: port_list(ports),
        ..Default::default()
    }
}

pub(crate) struct Lab {
    name: String,
    pub(crate) control: Control,
    pub(crate) wire: Space,
    pub(crate) hosts: Vec<Host>,
    limits: Limits,
    next_pod: std::cell::Cell<u8>,
}

impl Lab {
    pub(crate) async fn new() -> Self {
        Self::within(Limits::default()).await
    }

    /// Each host with these limits.
    pub(crate) async fn within(limits: Limits) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make network namespaces: run them as root"
        );
        // Shown for a test that fails. Another test may have been first.
        let _first = tracing_subscriber::fmt()
            .with_env_filter("mesh_runtime=debug,access=debug")
            .with_test_writer()
            .try_init();
        let name = format!(
            "sd-proxy-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let control = Control::start().await;
        let wire = Space::new(format!("{name}-wire"));
        // Of the pool's infrastructure.
        wire.ip(&format!(
            "addr add {OTHER_HOST}/32 dev lo\naddr add {}/32 dev lo\n",
            ALLOWED.0
        ));
        wire.ip(&format!(
            "addr add {STRANGER}/32 dev lo\n\
             addr add {NAMESERVER}/32 dev lo\n",
        ));
        wire.netns
            .enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))
            .unwrap();
        let mut lab = Self {
            name,
            control,
            wire,
            hosts: Vec::new(),
            limits,
            next_pod: std::cell::Cell::new(2),
        };
        for number in 1..=2 {
            let host = lab.host(number).await;
            lab.hosts.push(host);
        }
        lab
    }

    fn tenant(&self) -> Tenant {
        Tenant {
            id: TENANT.parse().unwrap(),
            cluster_pod_range: "10.77.0.0/16".parse().unwrap(),
            cluster_domain: "cluster.local".to_owned(),
            dns_address: DNS.into(),
            upstream_nameservers: vec![IpAddr::V4(NAMESERVER)],
            mesh_control: MeshControl {
                address: self.control.address.to_string(),
                trust_domain: TRUST_DOMAIN.to_owned(),
                cluster_id: CLUSTER.to_owned(),
                network: String::new(),
            },
        }
    }

    async fn host(&self, number: u8) -> Host {
        let router = Space::new(format!("{}-r{number}", self.name));
        let address = format!("10.77.{number}.0");
        self.wire.ip(&format!(
            "link add up{number} address 02:00:00:00:01:0{number} type veth peer name uplink netns {} address 02:00:00:00:02:0{number}\n\
             link set up{number} up\n",
            router.name
        ));
        router.ip(&format!(
            "addr add {address}/32 dev uplink\n\
             link set uplink up\n\
             route add 169.254.1.3 dev uplink scope link\n\
             route add default via 169.254.1.3 dev uplink src {address}\n\
             neigh add 169.254.1.3 lladdr 02:00:00:00:01:0{number} dev uplink nud permanent\n"
        ));
        self.wire.ip(&format!(
            "neigh add 169.254.1.2 lladdr 02:00:00:00:02:0{number} dev up{number} nud permanent\n\
             route add {address}/24 via 169.254.1.2 dev up{number} onlink\n"
        ));
        router
            .netns
            .enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))
            .unwrap();
        let bpffs = Bpffs::mount();
        let mut registry = Registry::default();
        let host = format!("host-{number}");
        let runtime = MeshRuntime::start(
            Config {
                host: host.parse().unwrap(),
                bpffs: bpffs.0.path().to_owned(),
                local_pods: format!("10.77.{number}.0/24").parse().unwrap(),
                off_limits: Arc::new(
                    OffLimits::new(
                        &["10.77.0.0/16".parse().unwrap()],
                        &["192.0.2.0/24".parse().unwrap()],
                        [SocketAddrV4::new(ALLOWED.0, ALLOWED.1)],
                    )
                    .unwrap(),
                ),
                pool_tls: self.control.host_tls(&host),
                limits: self.limits.clone(),
            },
            &mut registry,
        );
        runtime
            .open_tenant(&self.tenant(), &router.path(), "uplink")
            .await
            .unwrap();
        Host {
            number,
            router,
            runtime,
            registry,
            _bpffs: bpffs,
        }
    }

    /// A pod that is in the mesh, known to it, and serving. Its service account
    /// has its name.
    pub(crate) async fn pod(&self, host: usize, name: &str) -> Pod {
        let pod = self.start(host, name, Mode::Enrolled).await;
        self.control.workload(pod.workload());
        pod
    }

    pub(crate) async fn start(&self, host: usize, name: &str, mode: Mode) -> Pod {
        let pod = self.attach(host, name, mode).await;
        let mut state = pod.attachment.state();
        within(
            "the pod serves",
            state.wait_for(|s| *s == AttachmentState::Serving),
        )
        .await
        .unwrap();
        pod
    }

    /// A pod that is redirected, and no more than that.
    pub(crate) async fn attach(&self, host: usize, name: &str, mode: Mode) -> Pod {
        let number = self.next_pod.get();
        self.next_pod.set(number + 1);
        let at = &self.hosts[host];
        let address = Ipv4Addr::new(10, 77, at.number, number);
        let (inside, outside) = (
            format!("02:00:00:00:03:{number:02x}"),
            format!("02:00:00:00:04:{number:02x}"),
        );
        let device = format!("p{number}");
        let space = Space::new(format!("{}-p{number}", self.name));
        at.router.ip(&format!(
            "link add {device} address {outside} type veth peer name eth0 netns {} address {inside}\n",
            space.name
        ));
        space.ip(&format!(
            "addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0 scope link\n\
             route add default via 169.254.1.1\n\
             neigh add 169.254.1.1 lladdr {outside} dev eth0 nud permanent\n"
        ));
        let key = SandboxKey {
            pod: format!("uid-{name}").parse().unwrap(),
            attempt: Attempt::FIRST,
        };
        let attachment = at
            .runtime
            .attach(PodAttachment {
                pod: PodRecord {
                    key: key.clone(),
                    tenant: TENANT.parse().unwrap(),
                    namespace: NAMESPACE.parse().unwrap(),
                    name: name.parse().unwrap(),
                    service_account: name.parse().unwrap(),
                    address,
                    mode,
                },
                device: device.clone(),
                mac: [2, 0, 0, 0, 3, number],
                deadline: mesh_runtime::redirect::Deadline::Never,
            })
            .await
            .unwrap();
        at.router.ip(&format!(
            "link set {device} up\n\
             route add {address}/32 dev {device}\n\
             neigh add {address} lladdr {inside} dev {device} nud permanent\n"
        ));
        Pod {
            key,
            attachment,
            name: name.to_owned(),
            address,
            space,
            host,
        }
    }

    /// Connections of the host's pods that are open, as the metrics have it.
    pub(crate) fn live(&self, host: usize) -> i64 {
        let text = self.metrics(host);
        let sum = |name: &str| -> i64 {
            text.lines()
                .filter(|l| l.starts_with(name))
                .map(|l| l.rsplit(' ').next().unwrap().parse::<i64>().unwrap())
                .sum()
        };
        sum("istio_tcp_connections_opened_total") - sum("istio_tcp_connections_closed_total")
    }

    /// Tunnels that the host's pods have opened.
    pub(crate) fn tunnels(&self, host: usize) -> i64 {
        let text = self.metrics(host);
        let line = text
            .lines()
            .find(|l| l.starts_with("mesh_tunnels{") && l.contains("direction=\"outbound\""));
        line.map_or(0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
    }

    pub(crate) fn metrics(&self, host: usize) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.hosts[host].registry).unwrap();
        text
    }
}

/// Whether an echo comes back over the connection.
pub(crate) async fn lives(stream: &mut TcpStream) -> bool {
    let mut got = [0];
    stream.write_all(b"x").await.is_ok() && within("echo or end", stream.read_exact(&mut got)).await.is_ok()
}

/// The same for a connection to be: a proxy that refuses it may reset it before
/// `connect` has returned.
pub(crate) async fn carries(connected: std::io::Result<TcpStream>) -> bool {
    match connected {
        Ok(mut stream) => lives(&mut stream).await,
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => false,
        Err(e) => panic!("neither connected nor refused: {e}"),
    }
}
