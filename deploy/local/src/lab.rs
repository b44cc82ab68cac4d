//! A whole lab: made, looked at, broken and removed.
//!
//! `up` is level-driven: it makes what is missing and restarts what was started
//! otherwise, so it may be called at any time, also after a crash of itself or
//! of the machine. `down` needs nothing but the instance's name.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::{
    artifacts::{self, ArtifactError, Profile, Spindrift},
    cache::{self, Cache},
    cell::{self, Cell, CellError},
    cluster::{self, Cluster, ClusterError},
    component::{Component, ComponentError, Ready},
    containerd::{self, ContainerdError, Runtime},
    control_plane::{ControlPlane, ControlPlaneError, Endpoint, Owner, write_kubeconfig},
    driver,
    elastic::{self, ElasticError},
    file::{self, Mode},
    fleet::{self, FleetError},
    images::Images,
    instance::{InstanceName, Layout},
    netns::Namespace,
    node::{self, NodeError},
    pool::{self, PoolError, PoolPki},
    process::{self, Process},
    progress::{Progress, Step},
    registry::{self, RegistryError},
    relay, supervisor,
    tool::ToolError,
    topology::{API_SERVER, API_SERVER_PORT, Topology, TopologyError, VIRTUAL_NODE},
    usage,
};

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct Options {
    pub instance: InstanceName,
    /// How many pool hosts.
    pub hosts: usize,
    pub profile: Profile,
    pub build: Build,
    pub extent: Extent,
    pub cluster: ClusterSource,
    /// The pool has a cluster of its own, its [`cell`]: hosts are
    /// Nodes there, and claims are Pods.
    pub cell: bool,
    /// The cell's hosts come and go: there are none at the start. `hosts` is nothing then.
    pub elastic: bool,
    /// Image registries inside the lab. See [`registry`].
    pub registry: bool,
    /// Where built things are kept between runs.
    pub cache: PathBuf,
}

impl Options {
    /// Two hosts, a cluster of its own, our programs as cargo last built them.
    pub fn for_tests(instance: InstanceName, cache: PathBuf) -> Self {
        Self {
            instance,
            hosts: 2,
            profile: Profile::Dev,
            build: Build::Taken,
            extent: Extent::Whole,
            cluster: ClusterSource::Made,
            cell: false,
            elastic: false,
            registry: false,
            cache,
        }
    }

    fn has_cell(&self) -> bool {
        self.cell || self.elastic
    }
}

/// Where our own programs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// cargo is run.
    Made,
    /// They were built already, as tests are together with them.
    Taken,
}

/// How much of a lab is started: parts can be tried, and measured beside
/// others, on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Extent {
    ControlPlane,
    /// Also a containerd on each host, with the images.
    Runtimes,
    /// Also the agents and the virtual node.
    Whole,
}

/// Whose API server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterSource {
    /// One of the lab's own.
    Made,
    /// The user's. The API server is dialled from this machine; for logs and
    /// exec it must reach `node_address`, one of this machine's, on port 10250.
    Joined {
        kubeconfig: PathBuf,
        node_address: Option<Ipv4Addr>,
    },
}

/// What stays the same for as long as the instance lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    boot: String,
    hosts: usize,
    profile: Profile,
    cluster: ClusterSource,
    /// On the machine's loopback, for the user's kubectl.
    relay_port: u16,
    /// The same for the cell; none without one.
    #[serde(default)]
    cell_port: Option<u16>,
    #[serde(default)]
    elastic: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("instance {0} exists with other options: take it down first, or use another --instance")]
    Differs(InstanceName),
    #[error("there is no instance {0}")]
    Absent(InstanceName),
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
    #[error(transparent)]
    Component(#[from] ComponentError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Elastic(#[from] ElasticError),
    #[error("cannot remove a namespace")]
    Namespace(#[source] ToolError),
}

/// How long a component may take to serve. Generous: two cores may be building
/// other things.
const START: Duration = Duration::from_secs(120);

/// How long the demo's pods may take to end.
const LEAVE: Duration = Duration::from_secs(60);

/// A running lab.
pub struct Lab {
    layout: Layout,
    topology: Topology,
    cluster: Cluster,
    /// How its API server is reached from inside the lab.
    endpoint: Endpoint,
    cell: Option<Cell>,
    runtimes: Vec<Runtime>,
    images: Images,
}

impl Lab {
    /// Makes the instance, or completes and mends what there is of it.
    pub async fn up(options: &Options, progress: &Progress) -> Result<Self, LabError> {
        let layout = Layout::new(options.instance.clone());
        let _lock = hold(&layout, progress).await?;
        let cache = Cache::new(options.cache.clone());
        let programs = match options.build {
            Build::Made => artifacts::spindrift(options.profile, progress).await?,
            Build::Taken => artifacts::built(options.profile),
        };
        let devcluster = artifacts::devcluster(&cache, progress).await?;
        let containerd = artifacts::containerd(&cache, progress).await?;
        let images = artifacts::images(&cache, progress).await?;
        let karpenter = match options.elastic {
            true => Some(artifacts::karpenter(&cache, progress).await?),
            false => None,
        };

        let record = Record::settle(&layout, options, progress).await?;
        // Of a start that was killed before it wrote a pid file.
        for stray in Component::strays(&layout) {
            stray.end(Duration::ZERO).await;
        }
        let step = progress.step("Lay out the network");
        let topology = match record.elastic {
            true => Topology::elastic(&layout),
            false => Topology::new(&layout, record.hosts)?,
        };
        topology.ensure().await?;
        step.done();

        let runtimes: Vec<Runtime> = topology
            .hosts
            .iter()
            .map(|host| Runtime::new(&layout, host, &containerd))
            .collect();
        let site = Site {
            layout: &layout,
            topology: &topology,
            record: &record,
            programs: &programs,
            progress,
        };
        if options.registry {
            for registry in registry::ALL {
                registry
                    .component(&layout, &topology.lab)?
                    .start(&layout, START)
                    .await?;
            }
        }
        let cell = match record.cell_port {
            Some(port) => Some(site.make_cell(&devcluster, port).await?),
            None => None,
        };
        let hosts = site.start_hosts(&runtimes, &images, options.extent, cell.as_ref());
        let ((cluster, endpoint, address), ()) = match &record.cluster {
            ClusterSource::Made => tokio::try_join!(site.make_cluster(&devcluster), hosts)?,
            ClusterSource::Joined {
                kubeconfig,
                node_address,
            } => tokio::try_join!(site.reach_cluster(kubeconfig, *node_address), hosts)?,
        };
        if options.extent == Extent::Whole {
            site.start_node(&cluster, &endpoint, address, cell.as_ref())
                .await?;
            if let (Some(karpenter), Some(cell)) = (&karpenter, &cell) {
                let parts = elastic::Parts {
                    karpenter,
                    containerd: &containerd,
                    images: &images,
                    programs: &programs,
                    first_boot: &artifacts::workspace().join("deploy/host/first-boot"),
                };
                let step = progress.step("Start what brings hosts");
                elastic::furnish(&layout, &topology, cell, &parts, START, &step).await?;
                step.done();
            }
        }
        supervisor::component(&layout, &programs)?
            .start(&layout, START)
            .await?;
        Ok(Self {
            layout,
            topology,
            cluster,
            endpoint,
            cell,
            runtimes,
            images,
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// None where the hosts are written into the virtual node's configuration.
    pub fn cell(&self) -> Option<&Cell> {
        self.cell.as_ref()
    }

    /// Lets another tenant in, for a VirtualNode of the node `node` in the lab's
    /// cluster; false without a cell.
    pub async fn enroll(&self, tenant: &str, node: &str) -> Result<bool, LabError> {
        let Some(cell) = &self.cell else {
            return Ok(false);
        };
        let (layout, cluster, endpoint) = (&self.layout, &self.cluster, &self.endpoint);
        fleet::enroll(layout, cell, cluster, endpoint, tenant, node, &cell::QUOTA).await?;
        Ok(true)
    }

    pub fn client(&self) -> kube::Client {
        self.cluster.client()
    }

    pub fn images(&self) -> &Images {
        &self.images
    }

    pub fn component(&self, name: &str) -> Result<Component, LabError> {
        Ok(Component::find(&self.layout, name)?)
    }

    /// The containerd of a host.
    pub fn runtime(&self, host: &str) -> Option<&Runtime> {
        self.runtimes.iter().find(|runtime| runtime.host().name == host)
    }

    /// Starts what was killed or stopped and not started again; None: it is whole.
    /// Otherwise what was missing, once the node is Ready.
    pub async fn mend(&self) -> Result<Option<Vec<String>>, LabError> {
        let missing: Vec<Component> = Component::all(&self.layout)
            .into_iter()
            .filter(|component| component.process(&self.layout).is_none())
            .collect();
        if missing.is_empty() {
            return Ok(None);
        }
        // etcd, then the API server, …: by their names they come in the order in which
        // they need each other.
        for component in &missing {
            component.start(&self.layout, START).await?;
        }
        self.cluster.wait_ready(START).await?;
        if Component::find(&self.layout, node::COMPONENT).is_ok() {
            self.cluster.wait_node(&self.layout.node_name(), START).await?;
        }
        Ok(Some(
            missing.into_iter().map(|component| component.name).collect(),
        ))
    }

    /// `kill -9`, and gone when this returns.
    pub async fn kill(&self, component: &str) -> Result<(), LabError> {
        Ok(self.component(component)?.kill(&self.layout).await?)
    }

    /// Starts what was killed, and waits until it serves.
    pub async fn start(&self, component: &str) -> Result<(), LabError> {
        self.component(component)?.start(&self.layout, START).await?;
        Ok(())
    }
}

impl Record {
    /// The record of the instance, made if there is none. What an earlier boot
    /// left is cleared away: its processes, namespaces and mounts are gone.
    async fn settle(layout: &Layout, options: &Options, progress: &Progress) -> Result<Self, LabError> {
        let at = |path: PathBuf| move |source| LabError::File { path, source };
        let boot = process::boot_id().unwrap_or_default();
        if let Some(record) = Self::read(layout) {
            if record.boot == boot {
                let same = (
                    record.hosts,
                    record.profile,
                    &record.cluster,
                    record.cell_port.is_some(),
                    record.elastic,
                ) == (
                    options.hosts,
                    options.profile,
                    &options.cluster,
                    options.has_cell(),
                    options.elastic,
                );
                return if same {
                    Ok(record)
                } else {
                    Err(LabError::Differs(options.instance.clone()))
                };
            }
            progress.say("The machine has been restarted since: the instance is made anew");
        }
        // Without a record whatever is there is a half-made or half-removed one.
        remove(layout).await?;
        let port = || relay::free_port().map_err(at(layout.state()));
        let record = Self {
            boot,
            hosts: options.hosts,
            profile: options.profile,
            cluster: options.cluster.clone(),
            relay_port: port()?,
            cell_port: options.has_cell().then(port).transpose()?,
            elastic: options.elastic,
        };
        for directory in [layout.state(), layout.data()] {
            std::fs::create_dir_all(&directory).map_err(at(directory))?;
        }
        let text = serde_json::to_vec_pretty(&record).map_err(|e| at(layout.record())(e.into()))?;
        file::write(&layout.record(), text, Mode::Public).map_err(at(layout.record()))?;
        Ok(record)
    }

    fn read(layout: &Layout) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(layout.record()).ok()?).ok()
    }
}

/// What the steps of `up` share.
struct Site<'a> {
    layout: &'a Layout,
    topology: &'a Topology,
    record: &'a Record,
    programs: &'a Spindrift,
    progress: &'a Progress,
}

/// A cluster, how its API server is reached from inside the lab, and the
/// address by which it reaches the node.
type Reached = (Cluster, Endpoint, Ipv4Addr);

impl Site<'_> {
    async fn make_cluster(&self, devcluster: &Path) -> Result<Reached, LabError> {
        let step = self.progress.step("Start the Kubernetes control plane");
        let kubeconfig = self.layout.kubeconfig();
        let port = self.record.relay_port;
        let (cluster, inside) = self
            .start_control_plane(Owner::Tenant, devcluster, port, &kubeconfig, &step)
            .await?;
        self.link_kubectl(devcluster)?;
        step.done();
        Ok((cluster, inside, VIRTUAL_NODE))
    }

    async fn make_cell(&self, devcluster: &Path, port: u16) -> Result<Cell, LabError> {
        let step = self.progress.step("Start the pool's cell");
        let kubeconfig = self.layout.cell_kubeconfig();
        let (cluster, inside) = self
            .start_control_plane(Owner::Cell, devcluster, port, &kubeconfig, &step)
            .await?;
        step.note("what the pool needs in it");
        let cell = Cell::furnish(self.layout, cluster, inside).await?;
        step.note("who lets hosts in");
        let kubeconfig = cell.kubeconfig(cell::CONTROLLER).await?;
        let authority = PoolPki::open(self.layout).map_err(PoolError::from)?.authority();
        Component::new(cell::CONTROLLER, self.programs.program(cell::CONTROLLER)?)
            .within(&self.topology.lab)
            .path_flag("kubeconfig", &kubeconfig)
            .path_flag("pool-ca", &authority.certificate)
            .path_flag("pool-ca-key", &authority.key)
            .flag("trust-domain", pool::TRUST_DOMAIN)
            .input(kubeconfig)
            .input(authority.certificate)
            .start(self.layout, START)
            .await?;
        step.done();
        Ok(cell)
    }

    /// The kubeconfig is for the user, by way of a relay on `port`.
    async fn start_control_plane(
        &self,
        owner: Owner,
        devcluster: &Path,
        port: u16,
        kubeconfig: &Path,
        step: &Step,
    ) -> Result<(Cluster, Endpoint), LabError> {
        let layout = self.layout;
        let plane = ControlPlane::new(owner, layout, &self.topology.lab, devcluster)?;
        step.note("etcd");
        plane.etcd.start(layout, START).await?;
        step.note("API server");
        plane.api_server.start(layout, START).await?;
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        let relay = self
            .relay(&owner.component("relay"))?
            .flag("listen", listen)
            .flag("dial-in", self.topology.lab.name())
            .flag("target", format_args!("{}:{API_SERVER_PORT}", owner.address()))
            .ready_when(Ready::Accepts(listen));
        relay.start(layout, START).await?;
        let inside = plane.endpoint()?;
        let outside = Endpoint {
            url: format!("https://{listen}"),
            ..inside.clone()
        };
        write_kubeconfig(kubeconfig, &outside, &plane.admin).map_err(ControlPlaneError::from)?;
        let cluster = Cluster::connect(kubeconfig).await?;
        cluster.wait_ready(START).await?;
        step.note("controllers");
        for controller in &plane.controllers {
            controller.start(layout, START).await?;
        }
        cluster.wait_service_account("default", START).await?;
        Ok((cluster, inside))
    }

    /// Lets the lab in on a cluster that the user has. The API server is dialled
    /// from the machine's namespace, on behalf of the virtual node and of pods.
    async fn reach_cluster(
        &self,
        kubeconfig: &Path,
        node_address: Option<Ipv4Addr>,
    ) -> Result<Reached, LabError> {
        let (layout, lab) = (self.layout, &self.topology.lab);
        let step = self.progress.step("Reach your cluster");
        let cluster = Cluster::connect(kubeconfig).await?;
        cluster.wait_ready(START).await?;
        let endpoint = cluster.endpoint_by_way_of(API_SERVER, API_SERVER_PORT)?;
        let listen = SocketAddr::from((API_SERVER, API_SERVER_PORT));
        let relay = self
            .relay("relay")?
            .flag("listen", listen)
            .flag("listen-in", lab.name())
            .flag("target", cluster.authority()?)
            .ready_when(Ready::AcceptsWithin(lab.clone(), listen));
        relay.start(layout, START).await?;
        if let Some(address) = node_address {
            let listen = SocketAddr::from((address, node::KUBELET_PORT));
            let relay = self
                .relay("relay-kubelet")?
                .flag("listen", listen)
                .flag("dial-in", lab.name())
                .flag("target", format_args!("{VIRTUAL_NODE}:{}", node::KUBELET_PORT))
                .ready_when(Ready::Accepts(listen));
            relay.start(layout, START).await?;
        }
        // The user's own, under the name that everything else looks for.
        let content = std::fs::read(kubeconfig).map_err(|source| LabError::File {
            path: kubeconfig.to_owned(),
            source,
        })?;
        file::write(&layout.kubeconfig(), content, Mode::Private).map_err(|source| LabError::File {
            path: layout.kubeconfig(),
            source,
        })?;
        step.done();
        Ok((cluster, endpoint, node_address.unwrap_or(VIRTUAL_NODE)))
    }

    fn relay(&self, name: &str) -> Result<Component, LabError> {
        Ok(Component::new(name, self.programs.program("spindrift-local")?).arg("relay"))
    }

    /// The multi-call binary is kubectl under that name.
    fn link_kubectl(&self, devcluster: &Path) -> Result<(), LabError> {
        let link = self.layout.bin().join("kubectl");
        std::fs::create_dir_all(self.layout.bin())
            .and_then(|()| file::remove(&link))
            .and_then(|()| std::os::unix::fs::symlink(devcluster, &link))
            .map_err(|source| LabError::File { path: link, source })
    }

    async fn start_hosts(
        &self,
        runtimes: &[Runtime],
        images: &Images,
        extent: Extent,
        cell: Option<&Cell>,
    ) -> Result<(), LabError> {
        if extent < Extent::Runtimes {
            return Ok(());
        }
        let step = self.progress.step("Start the pool's hosts");
        let plugin = self.programs.program("spindrift-cni")?;
        let pki = PoolPki::open(self.layout).map_err(PoolError::from)?;
        if extent == Extent::Whole {
            usage::collector(self.layout, &self.topology.lab, &pki, self.programs)?
                .start(self.layout, START)
                .await?;
        }
        let start = runtimes.iter().map(async |runtime| -> Result<(), LabError> {
            runtime.component(&plugin)?.start(self.layout, START).await?;
            runtime.import(images).await?;
            if extent == Extent::Whole {
                let token = match cell {
                    Some(cell) => Some(cell.bootstrap_kubeconfig(&runtime.host().name).await?),
                    None => None,
                };
                let agent = pool::agent(self.layout, runtime, &pki, self.programs, token)?;
                agent.start(self.layout, START).await?;
            }
            Ok(())
        });
        futures::future::try_join_all(start).await?;
        if let Some(cell) = cell.filter(|_| extent == Extent::Whole) {
            step.note("waiting until each is a Node of the cell");
            for runtime in runtimes {
                cell.cluster().wait_node(&runtime.host().name, START).await?;
            }
        }
        step.done();
        Ok(())
    }

    async fn start_node(
        &self,
        cluster: &Cluster,
        endpoint: &Endpoint,
        address: Ipv4Addr,
        cell: Option<&Cell>,
    ) -> Result<(), LabError> {
        let step = self
            .progress
            .step(format!("Start the virtual node {}", self.layout.node_name()));
        let claims = match cell {
            Some(cell) => {
                step.note("its namespace in the cell");
                // One tenant, named like the instance.
                let tenant = self.layout.instance().as_str();
                Some(cell.admit_tenant(tenant, &cell::QUOTA).await?)
            }
            None => None,
        };
        if let Some(cell) = cell {
            step.note("those who serve virtual nodes of the cell");
            for replica in fleet::replicas(self.topology, cell, self.programs).await? {
                replica.start(self.layout, START).await?;
            }
        }
        step.note("its own certificates");
        let node = node::join(
            self.layout,
            self.topology,
            cluster,
            endpoint,
            address,
            self.programs,
            claims.as_deref(),
        )
        .await?;
        step.note("its process");
        node.start(self.layout, START).await?;
        step.note("waiting until it is Ready");
        cluster.wait_node(&self.layout.node_name(), START).await?;
        step.done();
        Ok(())
    }
}

/// Removes the instance and everything it has made. One that is not there, or
/// only half, is fine.
pub async fn down(instance: &InstanceName, progress: &Progress) -> Result<(), LabError> {
    let layout = Layout::new(instance.clone());
    let lock = hold(&layout, progress).await?;
    if let Some(Record {
        cluster: ClusterSource::Joined { .. },
        ..
    }) = Record::read(&layout)
    {
        let step = progress.step("Leave your cluster");
        match leave(&layout).await {
            Ok(()) => step.done(),
            // Then it stays as it is there; that must not keep it here.
            Err(error) => {
                step.done_with(&format!("not all was removed there: {error}"));
            }
        }
    }
    let step = progress.step(format!("Remove {instance}"));
    remove(&layout).await?;
    step.done();
    file::remove(&layout.lock()).map_err(|source| LabError::File {
        path: layout.lock(),
        source,
    })?;
    drop(lock);
    // The directory of all instances, if this was the last.
    for shared in [layout.state(), layout.data()] {
        shared.parent().map(std::fs::remove_dir);
    }
    Ok(())
}

/// Takes the demo and the node out of the user's cluster, in this order: the
/// virtual node still runs, and ends its pods as it should.
async fn leave(layout: &Layout) -> Result<(), ClusterError> {
    let cluster = Cluster::connect(&layout.kubeconfig()).await?;
    let emptied = cluster.delete_namespace(cluster::DEMO, LEAVE).await;
    // It would register itself again.
    if let Ok(node) = Component::find(layout, node::COMPONENT) {
        node.stop(layout, Duration::from_secs(10)).await.ok();
    }
    // Pods that are left go with their Node: Kubernetes collects them.
    node::leave(layout, &cluster).await.and(emptied)
}

async fn hold(layout: &Layout, progress: &Progress) -> Result<Flock<File>, LabError> {
    let path = layout.lock();
    let at = |source| LabError::File {
        path: path.clone(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(at)?;
    }
    let step = progress.step(format!("Wait for instance {}", layout.instance()));
    let lock = cache::lock(&path, &step).await.map_err(at)?;
    step.done_quietly();
    Ok(lock)
}

async fn remove(layout: &Layout) -> Result<(), LabError> {
    // Whoever would start things anew goes first.
    let components = Component::all(layout);
    for name in [supervisor::COMPONENT, driver::COMPONENT] {
        for maker in components.iter().filter(|c| c.name == name) {
            maker.kill(layout).await?;
        }
    }
    // The driver may have made more until then.
    let components = Component::all(layout);
    futures::future::try_join_all(components.iter().map(|component| component.kill(layout))).await?;
    for stray in Component::strays(layout) {
        stray.end(Duration::ZERO).await;
    }
    let hosts = || {
        std::fs::read_dir(layout.state())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                entry
                    .file_name()
                    .into_string()
                    .ok()
                    .filter(|name| name.starts_with("host-"))
            })
    };
    containerd::remove_containers(layout, hosts()).await;
    for straggler in Process::with_environment(crate::component::MARK, layout.instance().as_str()) {
        straggler.end(Duration::ZERO).await;
    }
    containerd::unmount_below(&[layout.state(), layout.data()])?;
    for namespace in Namespace::existing()
        .iter()
        .filter(|namespace| is_ours(namespace, layout))
    {
        namespace.remove().await.map_err(LabError::Namespace)?;
    }
    for directory in [layout.state(), layout.data()] {
        file::remove_tree(&directory).map_err(|source| LabError::File {
            path: directory,
            source,
        })?;
    }
    Ok(())
}

/// `sd-demo-lab` and `sd-demo-host-a…` are demo's; `sd-demo-2-lab` is another's.
fn is_ours(namespace: &Namespace, layout: &Layout) -> bool {
    let place = namespace.name().strip_prefix(&layout.namespace_prefix());
    place.is_some_and(|place| place == "lab" || place.starts_with("host-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_takes_only_its_own_namespaces_down() {
        let layout = Layout::new("demo".parse().unwrap());
        let ours = |name: &str| is_ours(&Namespace::named(name), &layout);
        assert!(ours("sd-demo-lab") && ours("sd-demo-host-a") && ours("sd-demo-host-b-demo"));
        assert!(!ours("sd-demo-2-lab") && !ours("sd-demo2-lab") && !ours("lab") && !ours("sd-other-host-a"));
    }
}
