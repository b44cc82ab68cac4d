//! One pool host as deploy/local makes it, without a cluster: namespaces,
//! containerd, image registries and the agent, and one connection to the agent for
//! each of two tenants.

use std::{
    fmt::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use pool_agent::layout::Layout as AgentLayout;
use pool_agent_api::{
    SandboxKey,
    wire::{self, pool_agent_client::PoolAgentClient},
};
use sha2::{Digest, Sha256};
use spindrift_local::{
    InstanceName, Layout, Progress,
    artifacts::{self, Profile},
    cache::{self, Cache},
    component::Component,
    containerd::Runtime,
    images::{BUSYBOX_IMAGE, Images},
    lab,
    netns::Namespace,
    pool::{self, PoolPki, PoolTls, agent_address, agent_name},
    registry,
    tool::Tool,
    topology::{CLUSTER_DNS, POD_RANGE, Topology, VIRTUAL_NODE},
    usage,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{control, pod::Pod, seen::Seen};

/// How long anything that just has to happen may take. Far more than it takes:
/// two cores may be building something else.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(120);

/// What the registries hold: a busybox that the host has not.
const PULLED: &str = "host/busybox:1";

/// The lab's name; another runs beside.
fn instance() -> InstanceName {
    "host-suite".parse().unwrap()
}

/// A tenant of the host.
pub(super) struct Tenant {
    pub(super) name: &'static str,
    control: SocketAddr,
    own: PoolTls,
    client: PoolAgentClient<Channel>,
    pub(super) seen: Arc<Seen>,
}

pub(crate) struct Host {
    layout: Layout,
    topology: Topology,
    runtime: Runtime,
    images: Images,
    pub(super) ours: Tenant,
    pub(super) theirs: Tenant,
    pods: AtomicU32,
}

impl Host {
    pub(super) async fn up() -> anyhow::Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "it has to run as root");
        // Left by a run that was killed.
        remove().await?;
        let progress = Progress::stderr();
        let layout = Layout::new(instance());
        for directory in [layout.state(), layout.data()] {
            std::fs::create_dir_all(directory)?;
        }
        let cache = Cache::new(cache::standard()?);
        let programs = artifacts::built(Profile::Dev);
        let containerd = artifacts::containerd(&cache, &progress).await?;
        let images = artifacts::images(&cache, &progress).await?;

        let topology = Topology::new(&layout, 1)?;
        topology.ensure().await?;
        for registry in registry::ALL {
            registry
                .component(&layout, &topology.lab)?
                .start(&layout, START)
                .await?;
        }
        registry::push(&topology.lab, &images, BUSYBOX_IMAGE, PULLED).await?;
        let runtime = Runtime::new(&layout, &topology.hosts[0], &containerd);
        runtime
            .component(&programs.program("spindrift-cni")?)?
            .start(&layout, START)
            .await?;
        runtime.import(&images).await?;
        let pki = PoolPki::open(&layout)?;
        usage::collector(&layout, &topology.lab, &pki, &programs)?
            .start(&layout, START)
            .await?;
        pool::agent(&layout, &runtime, &pki, &programs, None)?
            .start(&layout, START)
            .await?;

        let ours = Tenant::join("ours", 15012, &topology, &pki).await?;
        let theirs = Tenant::join("theirs", 15013, &topology, &pki).await?;
        Ok(Self {
            layout,
            topology,
            runtime,
            images,
            ours,
            theirs,
            pods: AtomicU32::new(0),
        })
    }

    // ---- pods

    /// A UID that no test has had, of this run or of one before.
    pub(super) fn next_uid(&self) -> String {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        format!("pod-{}-{number}", std::process::id())
    }

    /// Asks the agent to start it; it has been accepted when this returns.
    pub(super) async fn start(&self, spec: wire::SandboxSpec) -> anyhow::Result<Pod<'_>> {
        self.start_for(&self.ours, spec).await
    }

    pub(super) async fn start_for<'a>(
        &'a self,
        tenant: &'a Tenant,
        mut spec: wire::SandboxSpec,
    ) -> anyhow::Result<Pod<'a>> {
        use wire::start_sandbox_response::Outcome;
        spec.tenant = tenant.name.into();
        spec.key.get_or_insert_with(|| wire::SandboxKey {
            pod_uid: self.next_uid(),
            attempt: 1,
        });
        let key = SandboxKey::from_wire(spec.key.clone())?;
        let request = wire::StartSandboxRequest { spec: Some(spec) };
        let answer = tenant.client().start_sandbox(request).await?;
        match answer.into_inner().outcome {
            Some(Outcome::Accepted(_)) => Ok(Pod::new(self, tenant, key)),
            other => anyhow::bail!("{key} was not accepted: {other:?}"),
        }
    }

    /// The reference of an image that the open registry has.
    pub(super) fn pulled() -> String {
        format!("{}/{PULLED}", registry::OPEN.name)
    }

    /// The same in the registry that wants credentials.
    pub(super) fn pulled_with_credentials() -> String {
        format!("{}/{PULLED}", registry::PRIVATE.name)
    }

    /// Puts the busybox into both registries as `repository:tag`.
    pub(super) async fn push(&self, repository: &str) -> anyhow::Result<()> {
        let lab = &self.topology.lab;
        Ok(registry::push(lab, &self.images, BUSYBOX_IMAGE, repository).await?)
    }

    /// Puts an image of one file into both registries: nobody has another like it.
    pub(super) async fn push_content(&self, repository: &str, content: &str) -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let layout = directory.path().join("layout");
        let blobs = layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        std::fs::write(directory.path().join("content"), content)?;
        let layer = directory.path().join("layer.tar");
        Tool::words("tar -cf")
            .arg(&layer)
            .arg("-C")
            .arg(directory.path())
            .arg("content")
            .run()
            .await?;
        let put = |kind: &str, bytes: Vec<u8>| -> anyhow::Result<serde_json::Value> {
            let hex: String = Sha256::digest(&bytes)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            std::fs::write(blobs.join(&hex), &bytes)?;
            Ok(serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": format!("sha256:{hex}"),
                "size": bytes.len(),
            }))
        };
        let json = |value: serde_json::Value| value.to_string().into_bytes();
        let layer = put("layer.v1.tar", std::fs::read(layer)?)?;
        let architecture = if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "amd64"
        };
        let config = serde_json::json!({
            "os": "linux", "architecture": architecture, "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = put("config.v1+json", json(config))?;
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let manifest = put("manifest.v1+json", json(manifest))?;
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
        std::fs::write(layout.join("index.json"), json(index))?;
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;
        self.topology
            .lab
            .tool("skopeo copy --quiet --insecure-policy --dest-tls-verify=false")
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{}/{repository}", registry::OPEN.address))
            .run()
            .await?;
        Ok(())
    }

    /// containerd's `certs.d`.
    pub(super) fn registries(&self) -> String {
        self.runtime.registries().display().to_string()
    }

    /// Where the registries and other machines stand.
    pub(super) fn outside(&self) -> &Namespace {
        &self.topology.lab
    }

    /// Where the agent and containerd stand.
    pub(super) fn inside(&self) -> &Namespace {
        &self.topology.hosts[0].namespace
    }

    /// Has containerd speak plain HTTP with a registry: `HOST:PORT`.
    pub(super) fn plain_http(&self, registry: &str) -> anyhow::Result<()> {
        let directory = self.runtime.registries().join(registry);
        std::fs::create_dir_all(&directory)?;
        let hosts = format!("server = \"http://{registry}\"\n");
        Ok(std::fs::write(directory.join("hosts.toml"), hosts)?)
    }

    // ---- the agent and containerd

    fn agent(&self) -> anyhow::Result<Component> {
        Ok(Component::find(
            &self.layout,
            &agent_name(&self.topology.hosts[0]),
        )?)
    }

    fn containerd(&self) -> anyhow::Result<Component> {
        let name = format!("containerd@{}", self.topology.hosts[0].name);
        Ok(Component::find(&self.layout, &name)?)
    }

    /// `kill -9`; nothing of its reports is believed any more when this returns.
    pub(super) async fn kill_agent(&self) -> anyhow::Result<()> {
        self.agent()?.kill(&self.layout).await?;
        for tenant in [&self.ours, &self.theirs] {
            let gone = tenant.seen.until(|told| (!told.connected).then_some(()));
            within("that a watch of a killed agent ends", gone).await?;
        }
        Ok(())
    }

    /// Starts it again, and waits until it has told what there is.
    pub(super) async fn start_agent(&self) -> anyhow::Result<()> {
        self.agent()?.start(&self.layout, START).await?;
        for tenant in [&self.ours, &self.theirs] {
            let back = tenant.seen.until(|told| told.connected.then_some(()));
            within("that the agent is watched again", back).await?;
        }
        Ok(())
    }

    fn collector(&self) -> anyhow::Result<Component> {
        Ok(Component::find(&self.layout, usage::COMPONENT)?)
    }

    pub(super) async fn kill_collector(&self) -> anyhow::Result<()> {
        Ok(self.collector()?.kill(&self.layout).await?)
    }

    pub(super) async fn start_collector(&self) -> anyhow::Result<()> {
        self.collector()?.start(&self.layout, START).await?;
        Ok(())
    }

    /// Where the collector's records are.
    pub(super) fn usage(&self) -> PathBuf {
        usage::directory(&self.layout)
    }

    /// The collector, called by a tenant.
    pub(super) fn dial_collector_as(&self, tenant: &Tenant) -> anyhow::Result<Channel> {
        dial(&self.topology.lab, usage::ADDRESS, &tenant.own)
    }

    pub(super) async fn kill_containerd(&self) -> anyhow::Result<()> {
        Ok(self.containerd()?.kill(&self.layout).await?)
    }

    pub(super) async fn start_containerd(&self) -> anyhow::Result<()> {
        self.containerd()?.start(&self.layout, START).await?;
        Ok(())
    }

    /// The host's own network.
    pub(super) fn namespace(&self) -> &Namespace {
        &self.topology.hosts[0].namespace
    }

    /// Where hosts and control planes are.
    pub(super) fn underlay(&self) -> &Namespace {
        &self.topology.lab
    }

    pub(super) fn address(&self) -> std::net::Ipv4Addr {
        self.topology.hosts[0].address
    }

    /// Of its pods' addresses.
    pub(super) fn range(&self) -> ipnet::IpNet {
        self.topology.hosts[0].pod_range.parse().unwrap()
    }

    pub(super) fn agent_log(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.agent()?.log(&self.layout))?)
    }

    /// Where the agent keeps things.
    pub(super) fn files(&self) -> AgentLayout {
        let name = &self.topology.hosts[0].name;
        AgentLayout::new(
            self.layout.host_data(name).join("agent"),
            self.layout.host_state(name).join("agent"),
        )
    }

    /// The cgroup of all its pods, below the root of each hierarchy.
    pub(super) fn cgroup(&self) -> String {
        self.layout.host_cgroup(&self.topology.hosts[0].name)
    }

    // ---- what containerd has, whatever the agent says

    pub(super) fn socket(&self) -> PathBuf {
        self.runtime.socket()
    }

    pub(super) async fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(self.runtime.ctr().args(arguments).run().await?)
    }

    /// Ids of the sandboxes, or of the containers, of a pod.
    pub(super) async fn ids(&self, kind: &str, pod: &SandboxKey) -> anyhow::Result<Vec<String>> {
        let filter = format!(
            "labels.\"io.cri-containerd.kind\"=={kind},labels.\"io.kubernetes.pod.uid\"=={}",
            pod.pod
        );
        let ids = self.ctr(&["containers", "list", "--quiet", &filter]).await?;
        Ok(ids.lines().map(str::to_owned).collect())
    }

    /// The first process of a container or a sandbox.
    pub(super) async fn pid(&self, id: &str) -> anyhow::Result<i32> {
        let tasks = self.ctr(&["tasks", "list"]).await?;
        let task = tasks
            .lines()
            .find(|line| line.split_whitespace().next() == Some(id));
        let pid = task.and_then(|line| line.split_whitespace().nth(1));
        Ok(pid.with_context(|| format!("{id} has no task"))?.parse()?)
    }

    /// Kills one process that a container of ours runs.
    pub(super) fn kill_process(&self, pid: i32) -> anyhow::Result<()> {
        Ok(nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            Signal::SIGKILL,
        )?)
    }

    /// How much has been told by now; see [`Self::told`].
    pub(super) fn mark(&self) -> [usize; 2] {
        [&self.ours, &self.theirs].map(|tenant| tenant.seen.look(|told| told.events.len()))
    }

    /// What a person would look at after a failure: what happened since.
    pub(super) fn told(&self, since: [usize; 2]) -> String {
        const WIDTH: usize = 300;
        let mut text = String::new();
        for (tenant, since) in [&self.ours, &self.theirs].into_iter().zip(since) {
            tenant.seen.look(|told| {
                for event in &told.events[since..] {
                    let line = format!("  event {} {}: {}", event.key, event.reason, event.message);
                    writeln!(text, "{}", line.chars().take(WIDTH).collect::<String>()).ok();
                }
            });
        }
        let log = self.agent_log().unwrap_or_default();
        let remarkable = |line: &&str| line.contains(" WARN ") || line.contains("ERROR");
        let lines: Vec<&str> = log.lines().filter(remarkable).collect();
        for line in &lines[lines.len().saturating_sub(20)..] {
            writeln!(text, "  log {}", line.chars().take(WIDTH).collect::<String>()).ok();
        }
        text
    }
}

impl Tenant {
    /// Configures the tenant on the host and begins to watch.
    async fn join(name: &'static str, port: u16, topology: &Topology, pki: &PoolPki) -> anyhow::Result<Self> {
        let own = pki.virtual_node(name)?;
        let control = SocketAddr::from((VIRTUAL_NODE, port));
        control::serve(&topology.lab, control, &own).await?;
        let client = PoolAgentClient::new(dial(&topology.lab, agent_address(&topology.hosts[0]), &own)?);
        let tenant = Self {
            name,
            control,
            own,
            client,
            seen: Arc::new(Seen::new()),
        };
        tenant.configure().await?;
        let (seen, client) = (tenant.seen.clone(), tenant.client());
        tokio::spawn(async move { seen.follow(client).await });
        Ok(tenant)
    }

    /// As its virtual node does whenever it has connected.
    pub(super) async fn configure(&self) -> anyhow::Result<()> {
        self.client().configure_tenant(self.settings()).await?;
        Ok(())
    }

    pub(super) fn settings(&self) -> wire::Tenant {
        wire::Tenant {
            id: self.name.into(),
            cluster_pod_range: POD_RANGE.into(),
            cluster_domain: "cluster.local".into(),
            dns_address: CLUSTER_DNS.to_string(),
            upstream_nameservers: vec![],
            mesh_control: Some(wire::MeshControl {
                address: self.control.to_string(),
                trust_domain: "cluster.local".into(),
                cluster_id: "Kubernetes".into(),
                network: String::new(),
            }),
        }
    }

    pub(super) fn client(&self) -> PoolAgentClient<Channel> {
        self.client.clone()
    }

    pub(super) fn router(&self, host: &Host) -> PathBuf {
        host.files().router(&self.name.parse().unwrap())
    }
}

/// Dials from inside the namespace, and again after a break.
fn dial(namespace: &Namespace, address: SocketAddr, own: &PoolTls) -> anyhow::Result<Channel> {
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read(&own.ca)?))
        .identity(Identity::from_pem(read(&own.certificate)?, read(&own.key)?));
    let endpoint = Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?;
    let namespace = namespace.clone();
    let connector = tower::service_fn(move |_: http::Uri| {
        let namespace = namespace.clone();
        async move {
            let dialling = tokio::task::spawn_blocking(move || {
                namespace.enter(|| std::net::TcpStream::connect_timeout(&address, PATIENCE))
            });
            let stream = dialling.await.map_err(std::io::Error::other)??;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(TokioIo::new(tokio::net::TcpStream::from_std(stream)?))
        }
    });
    Ok(endpoint.connect_with_connector_lazy(connector))
}

pub(super) async fn within<T>(what: &str, future: impl Future<Output = T>) -> anyhow::Result<T> {
    tokio::time::timeout(PATIENCE, future)
        .await
        .with_context(|| format!("waited in vain {what}"))
}

/// Asks again until there is an answer. What was seen last is in the error.
pub(super) async fn wait<T>(what: &str, ask: impl AsyncFnMut() -> Result<T, String>) -> anyhow::Result<T> {
    Ok(spindrift_local::cluster::wait(what, PATIENCE, ask).await?)
}

/// Takes the host down, as far as there is one.
pub(super) async fn remove() -> anyhow::Result<()> {
    lab::down(&instance(), &Progress::silent())
        .await
        .context("cannot remove the host of the tests")
}
