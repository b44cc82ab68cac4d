//! A tenant's router with its pods and an outside, as network namespaces:
//!
//! ```text
//! outside (the host, and everything beyond) ── up ─ router ─ p1 ── eth0, pod 1
//!                                                          └ p2 ── eth0, pod 2
//! ```

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_runtime::{
    netns::Netns,
    off_limits::OffLimits,
    pod::Mode,
    redirect::{Deadline, Device, Drops, Listeners, Reason, Router, RouterConfig},
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

/// How long anything may take on a busy machine before a test gives up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Long enough for a connection that is dropped to show that it is.
pub(crate) const REFUSAL: Duration = Duration::from_millis(1500);

pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
/// A pod on another host.
pub(crate) const REMOTE_POD: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 9);
/// The host's own, in the underlay.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
/// Another host of the pool's, and what pods may reach in spite of where it lies.
pub(crate) const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
pub(crate) const ALLOWED: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 6443);
/// A pod on another host, of another tenant.
pub(crate) const FOREIGN_POD: Ipv4Addr = Ipv4Addr::new(10, 77, 3, 9);
/// Somebody outside the cluster.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
pub(crate) const ROUTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 2);
const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 1);
pub(crate) const UPLINK: &str = "uplink";
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0xfe, 2];
pub(crate) const OUTSIDE_MAC: [u8; 6] = [2, 0, 0, 0, 0xfe, 1];

static COUNTER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Lab {
    name: String,
    pub(crate) outside: Space,
    pub(crate) router: Space,
    pods: Vec<Space>,
    pub(crate) bpffs: Bpffs,
}

/// A network namespace.
pub(crate) struct Space {
    name: String,
    pub(crate) netns: Netns,
}

/// A pod's end of things.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) number: u8,
    pub(crate) address: Ipv4Addr,
    pub(crate) mac: [u8; 6],
    pub(crate) device: String,
    pub(crate) device_mac: [u8; 6],
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

    /// Runs `f` on a thread in this namespace.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.netns.stay().unwrap();
                    f()
                })
                .join()
                .unwrap()
        })
    }

    /// Output of a command in this namespace.
    pub(crate) fn output(&self, command: &str) -> String {
        let out = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.name))
            .args(["sh", "-c", command])
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    pub(crate) fn connect(&self, to: (Ipv4Addr, u16), within: Duration) -> std::io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&SocketAddr::V4(SocketAddrV4::new(to.0, to.1)), within))
    }

    /// As the proxy dials: with an address that is not this namespace's.
    pub(crate) fn dial(&self, source: Ipv4Addr, to: (Ipv4Addr, u16)) -> std::io::Result<TcpStream> {
        self.dial_within(source, to, DEADLINE)
    }

    pub(crate) fn dial_within(
        &self,
        source: Ipv4Addr,
        to: (Ipv4Addr, u16),
        within: Duration,
    ) -> std::io::Result<TcpStream> {
        self.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_ip_transparent_v4(true)?;
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::from((source, 0)).into())?;
            socket.connect_timeout(&SocketAddr::from(to).into(), within)?;
            Ok(socket.into())
        })
    }

    pub(crate) fn udp(&self, address: Ipv4Addr, port: u16) -> std::net::UdpSocket {
        let socket = self.run(|| std::net::UdpSocket::bind((address, port)).unwrap());
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    pub(crate) fn tap(&self, device: &str) -> crate::frame::Tap {
        self.run(|| crate::frame::Tap::open(device).unwrap())
    }
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

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}

impl Lab {
    /// What is pinned of a tenant, as `redirect::abi::SCHEMA` has it.
    pub(crate) fn pins(&self, tenant: &str) -> std::path::PathBuf {
        self.bpffs.path().join("v3").join(tenant)
    }

    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make network namespaces: run them as root"
        );
        let name = format!(
            "sd-kernel-{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let outside = Space::new(format!("{name}-out"));
        let router = Space::new(format!("{name}-rtr"));
        outside.ip(&format!(
            "link add {UPLINK} address {out} type veth peer name {UPLINK} netns {rtr} address {up}\n\
             addr add {OUTSIDE_ADDRESS}/30 dev {UPLINK}\n\
             addr add {REMOTE_POD}/32 dev lo\n\
             addr add {STRANGER}/32 dev lo\n\
             addr add {HOST}/32 dev lo\n\
             addr add {OTHER_HOST}/32 dev lo\n\
             addr add {allowed}/32 dev lo\n\
             addr add {FOREIGN_POD}/32 dev lo\n\
             link set {UPLINK} up\n\
             route add 10.77.1.0/24 via {ROUTER_ADDRESS}\n",
            out = mac(OUTSIDE_MAC),
            up = mac(UPLINK_MAC),
            rtr = router.name,
            allowed = ALLOWED.0,
        ));
        router.ip(&format!(
            "addr add {ROUTER_ADDRESS}/30 dev {UPLINK}\n\
             link set {UPLINK} up\n\
             route add default via {OUTSIDE_ADDRESS}\n",
        ));
        router.output("echo 1 > /proc/sys/net/ipv4/ip_forward");
        Self {
            name,
            outside,
            router,
            pods: Vec::new(),
            bpffs: Bpffs::mount(),
        }
    }

    /// A pod's namespace and devices, up. Not attached yet.
    pub(crate) fn pod(&mut self, number: u8) -> Pod {
        let pod = Pod {
            number,
            address: Ipv4Addr::new(10, 77, 1, number),
            mac: [2, 0, 0, 0, 1, number],
            device: format!("p{number}"),
            device_mac: [2, 0, 0, 0, 2, number],
        };
        let space = Space::new(format!("{}-p{number}", self.name));
        let Pod { address, device, .. } = &pod;
        let (inside, host) = (mac(pod.mac), mac(pod.device_mac));
        self.router.ip(&format!(
            "link add {device} address {host} type veth peer name eth0 netns {} address {inside}\n\
             link set {device} up\n\
             route add {address}/32 dev {device}\n\
             neigh add {address} lladdr {inside} dev {device} nud permanent\n",
            space.name,
        ));
        space.ip(&format!(
            "addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0 scope link\n\
             route add default via 169.254.1.1\n\
             neigh add 169.254.1.1 lladdr {host} dev eth0 nud permanent\n",
        ));
        self.pods.push(space);
        pod
    }

    pub(crate) fn space(&self, pod: &Pod) -> &Space {
        let wanted = format!("{}-p{}", self.name, pod.number);
        self.pods.iter().find(|space| space.name == wanted).unwrap()
    }

    pub(crate) fn delete_device(&self, pod: &Pod) {
        self.router.ip(&format!("link del {}\n", pod.device));
    }

    pub(crate) fn config(&self, tenant: &str) -> RouterConfig {
        RouterConfig {
            router: self.router.netns.clone(),
            uplink: UPLINK.to_owned(),
            bpffs: self.bpffs.path().to_owned(),
            tenant: tenant.to_owned(),
            cluster_pods: "10.77.0.0/16".parse().unwrap(),
            local_pods: "10.77.1.0/24".parse().unwrap(),
            dns: DNS,
            host_addresses: vec![HOST],
            off_limits: Arc::new(
                OffLimits::new(
                    &["10.77.0.0/16".parse().unwrap()],
                    &["192.0.2.0/24".parse().unwrap()],
                    [SocketAddrV4::new(ALLOWED.0, ALLOWED.1)],
                )
                .unwrap(),
            ),
        }
    }

    pub(crate) async fn open(&self) -> (Router, Proxy) {
        let (router, listeners) = Router::open(self.config("acme")).await.unwrap();
        router.set_workloads([REMOTE_POD]).await.unwrap();
        (router, Proxy::start(listeners))
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

/// A BPF file system of a test's own.
pub(crate) struct Bpffs {
    directory: tempfile::TempDir,
}

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
        Self { directory }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount(self.path()) {
            eprintln!("left behind: {}: {error}", self.path().display());
        }
    }
}

impl Pod {
    pub(crate) fn enrolled(&self) -> Device {
        self.attached(Mode::Enrolled)
    }

    pub(crate) fn unmeshed(&self) -> Device {
        self.attached(Mode::Unmeshed)
    }

    fn attached(&self, mode: Mode) -> Device {
        Device {
            name: self.device.clone(),
            mac: self.mac,
            address: self.address,
            mode,
            deadline: Deadline::Never,
        }
    }

    /// A frame as this pod may send it.
    pub(crate) fn frame(&self, destination: Ipv4Addr, protocol: u8, payload: Vec<u8>) -> crate::frame::Frame {
        crate::frame::Frame {
            to: self.device_mac,
            from: self.mac,
            ethertype: 0x0800,
            source: self.address,
            destination,
            protocol,
            fragment: 0,
            payload,
            options: Vec::new(),
        }
    }
}

/// Stands in for the proxy: tells each connection which listener took it and
/// between which addresses, then echoes. Dropping it is the agent's death.
pub(crate) struct Proxy {
    tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) fn start(listeners: Listeners) -> Self {
        Self::tagged(listeners, "")
    }

    /// One that adds `tag` to its listeners' names.
    pub(crate) fn tagged(listeners: Listeners, tag: &'static str) -> Self {
        let mut tasks = JoinSet::new();
        let Listeners {
            outbound,
            inbound,
            hbone,
            dns_udp,
            dns_tcp,
        } = listeners;
        for (name, listener) in [
            ("outbound", outbound),
            ("inbound", inbound),
            ("hbone", hbone),
            ("dns-tcp", dns_tcp),
        ] {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            tasks.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((mut stream, peer)) = listener.accept().await {
                    let local = stream.local_addr().unwrap();
                    connections.spawn(async move {
                        let greeting = format!("{name}{tag} {peer} {local}\n");
                        stream.write_all(greeting.as_bytes()).await.ok();
                        let mut buffer = vec![0; 4096];
                        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                            // The client asks this side to close first.
                            if &buffer[..n] == b"close" || stream.write_all(&buffer[..n]).await.is_err() {
                                break;
                            }
                        }
                    });
                }
            });
        }
        let dns = tokio::net::UdpSocket::from_std(dns_udp).unwrap();
        tasks.spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok((n, peer)) = dns.recv_from(&mut buffer).await {
                let answer = [format!("dns-udp {peer} ").as_bytes(), &buffer[..n]].concat();
                dns.send_to(&answer, peer).await.unwrap();
            }
        });
        Self { tasks }
    }

    /// The agent's death: its sockets are closed when this returns.
    pub(crate) async fn die(mut self) {
        self.tasks.shutdown().await;
    }
}

/// What the proxy said of the connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    pub(crate) listener: String,
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
}

pub(crate) fn greeting(stream: &TcpStream) -> Greeting {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut line = String::new();
    // One byte at a time, so that nothing after the line is swallowed.
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    let mut parts = line.split_whitespace();
    let mut next = || parts.next().unwrap_or_else(|| panic!("greeting {line:?}"));
    Greeting {
        listener: next().to_owned(),
        peer: next().parse().unwrap(),
        local: next().parse().unwrap(),
    }
}

pub(crate) fn echo(mut stream: &TcpStream, text: &str) -> std::io::Result<String> {
    use std::io::Read;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(text.as_bytes())?;
    let mut buffer = vec![0; text.len()];
    stream.read_exact(&mut buffer)?;
    Ok(String::from_utf8(buffer).unwrap())
}

/// A TCP server that says where its connections come from.
pub(crate) fn serve(space: &Space, address: Ipv4Addr, port: u16) -> Server {
    let listener = space.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from((address, port)).into()).unwrap();
        socket.listen(64).unwrap();
        std::net::TcpListener::from(socket)
    });
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, peer)) = listener.accept().await {
            let local = stream.local_addr().unwrap();
            connections.spawn(async move {
                let greeting = format!("server {peer} {local}\n");
                stream.write_all(greeting.as_bytes()).await.ok();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
        }
    });
    Server { _tasks: tasks }
}

pub(crate) struct Server {
    _tasks: JoinSet<()>,
}

/// Waits for a condition, by looking at it.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn count(drops: &Drops, reason: Reason) -> u64 {
    drops.count(reason).unwrap()
}
