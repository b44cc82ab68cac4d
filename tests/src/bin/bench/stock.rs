//! What ours is held against: hosts beside the pool's with the same containerd
//! and the stock ptp and host-local CNI plugins. One of them has a stock
//! kubelet of the cluster's own version, a node of the same cluster; on the
//! other the containerd is used alone. (A kubelet ends sandboxes it does not
//! know, so they cannot share.)
//!
//! They are named like hosts of the instance, so the lab's `down` removes them
//! with the rest; only their cgroups are removed here.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;
use spindrift_local::{
    Lab, Layout, Progress,
    artifacts::{self, Containerd},
    cache::{Cache, CacheError, Key},
    component::{Component, Ready},
    containerd::Runtime,
    control_plane::{Endpoint, write_kubeconfig},
    netns::Namespace,
    pki::{Authority, Subject},
    process::Process,
    tool::{Tool, ToolError},
    topology::{API_SERVER, API_SERVER_PORT, CLUSTER_DNS, Host},
};

use crate::cri::Cri;

pub(crate) const NODE: &str = "stock";
/// Addresses beside those of the pool's hosts, which count up from .11.
const KUBELET_HOST: Place = Place {
    name: "host-stock",
    address: Ipv4Addr::new(192, 0, 2, 100),
    pod_range: "10.78.0.0/24",
};
const ALONE_HOST: Place = Place {
    name: "host-alone",
    address: Ipv4Addr::new(192, 0, 2, 101),
    pod_range: "10.78.1.0/24",
};
const PLUGINS: &str = "v1.9.0";
/// Of deploy/devcluster's go.mod.
const KUBERNETES: &str = "v1.37.2";
const KUBELET_PORT: u16 = 10250;
const START: Duration = Duration::from_secs(120);

struct Place {
    name: &'static str,
    address: Ipv4Addr,
    pod_range: &'static str,
}

/// The hosts, running.
pub(crate) struct Stock {
    kubelet: Component,
    with_kubelet: Runtime,
    alone: Runtime,
}

/// What they need beside the lab's own programs.
struct Programs {
    kubelet: PathBuf,
    plugins: PathBuf,
}

impl Stock {
    pub(crate) async fn start(lab: &Lab, cache: &Cache, progress: &Progress) -> Result<Self> {
        let programs = Programs::build(cache, progress).await?;
        let containerd = artifacts::containerd(cache, progress).await?;
        let step = progress.step("Start a stock kubelet beside the pool");
        let with_kubelet = start_host(lab, &KUBELET_HOST, &containerd, &programs).await?;
        let alone = start_host(lab, &ALONE_HOST, &containerd, &programs).await?;
        let kubelet = kubelet(lab, &with_kubelet, &programs.kubelet)?;
        kubelet.start(lab.layout(), START).await?;
        lab.cluster().wait_node(NODE, START).await?;
        step.done();
        Ok(Self {
            kubelet,
            with_kubelet,
            alone,
        })
    }

    pub(crate) fn kubelet(&self, lab: &Lab) -> Result<Process> {
        self.kubelet
            .process(lab.layout())
            .context("the stock kubelet has ended")
    }

    /// The kubelet's containerd.
    pub(crate) async fn kubelets_cri(&self) -> Result<Cri> {
        Cri::connect(&self.with_kubelet.socket(), "").await
    }

    /// The containerd that nobody else uses.
    pub(crate) async fn cri_alone(&self, layout: &Layout) -> Result<Cri> {
        let cgroups = Cgroups::of(layout, &ALONE_HOST);
        cgroups.make()?;
        Cri::connect(&self.alone.socket(), &cgroups.root()).await
    }
}

async fn start_host(
    lab: &Lab,
    place: &Place,
    containerd: &Containerd,
    programs: &Programs,
) -> Result<Runtime> {
    let layout = lab.layout();
    let host = Host {
        name: place.name.into(),
        address: place.address,
        pod_range: place.pod_range.into(),
        namespace: Namespace::named(layout.namespace(place.name)),
    };
    lab.topology().join(&host).await?;
    let runtime = Runtime::new(layout, &host, containerd);
    // The pool's configuration to the letter but for the network: the first
    // file in the directory is the one that counts.
    let component = runtime.component(&programs.plugins.join("ptp"))?;
    let cni = layout.host_state(place.name).join("cni");
    fs::write(
        cni.join("net.d/00-ptp.conflist"),
        network(place, &cni.join("addresses")).to_string(),
    )?;
    for plugin in ["ptp", "host-local"] {
        fs::copy(programs.plugins.join(plugin), cni.join("bin").join(plugin))?;
    }
    component.start(layout, START).await?;
    runtime.import(lab.images()).await?;
    Ok(runtime)
}

impl Programs {
    async fn build(cache: &Cache, progress: &Progress) -> Result<Self> {
        let step = progress.step("Build a stock kubelet");
        let source = artifacts::workspace().join("deploy/devcluster");
        let package = "k8s.io/component-base/version";
        let flags = format!(
            "-s -w -X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor=1 -X {package}.gitMinor=37"
        );
        let key = Key::default()
            .text(&go("env GOVERSION GOARCH").directory(&source).run().await?)
            .text(&flags)
            .file(&source.join("go.mod"))?
            .file(&source.join("go.sum"))?;
        let kubelet = cache.ensure::<BuildError>("kubelet", key.clone(), &step, async |directory: &Path| {
            let build = go("build -v -trimpath -ldflags")
                .arg(&flags)
                .arg("-o")
                .arg(directory.join("kubelet"));
            Ok(build
                .arg("k8s.io/kubernetes/cmd/kubelet")
                .directory(&source)
                .run_showing(&step)
                .await?)
        });
        let kubelet = kubelet.await?.join("kubelet");
        let plugins = cache.ensure::<BuildError>(
            "cni-plugins",
            key.text(PLUGINS),
            &step,
            async |directory: &Path| {
                let module = "github.com/containernetworking/plugins/plugins";
                let install = go("install -v -trimpath -ldflags")
                    .arg("-s -w")
                    .env("GOBIN", directory);
                let plugins =
                    ["main/ptp", "ipam/host-local"].map(|plugin| format!("{module}/{plugin}@{PLUGINS}"));
                Ok(install.args(plugins).run_showing(&step).await?)
            },
        );
        let plugins = plugins.await?;
        step.done_quietly();
        Ok(Self { kubelet, plugins })
    }
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("cannot keep what was built")]
    Cache(#[from] CacheError),
    #[error("cannot build what ours is held against")]
    Build(#[from] ToolError),
}

fn go(words: &str) -> Tool {
    Tool::new("go")
        .args(words.split_whitespace())
        .env("CGO_ENABLED", "0")
        .limit(Duration::from_secs(3600))
}

/// `addresses`: the directory where those in use are noted.
fn network(place: &Place, addresses: &Path) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "ptp",
        "plugins": [{
            "type": "ptp",
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": place.pod_range}]],
                "dataDir": addresses,
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
}

fn kubelet(lab: &Lab, runtime: &Runtime, program: &Path) -> Result<Component> {
    let layout = lab.layout();
    let host = runtime.host();
    let state = layout.host_state(&host.name).join("kubelet");
    fs::create_dir_all(&state)?;
    let authority = Authority::open(layout.pki().join("cluster"), "kubernetes")?;
    let credential = |name: &str, subject: Subject| authority.credential(name, &subject);
    let client = credential(
        "stock-kubelet",
        Subject {
            common_name: format!("system:node:{NODE}"),
            organization: Some("system:nodes".into()),
            ..Subject::default()
        },
    )?;
    let serving = credential(
        "stock-kubelet-serving",
        Subject {
            common_name: NODE.into(),
            addresses: vec![host.address.into()],
            ..Subject::default()
        },
    )?;
    let endpoint = Endpoint {
        url: format!("https://{API_SERVER}:{API_SERVER_PORT}"),
        authority: Some(fs::read_to_string(authority.certificate())?),
        server_name: None,
    };
    let kubeconfig = state.join("kubeconfig");
    write_kubeconfig(&kubeconfig, &endpoint, &client)?;
    let resolv = state.join("resolv.conf");
    fs::write(&resolv, format!("nameserver {API_SERVER}\n"))?;
    let cgroups = Cgroups::of(layout, &KUBELET_HOST);
    cgroups.make()?;

    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": host.address.to_string(),
        "port": KUBELET_PORT,
        "tlsCertFile": serving.certificate,
        "tlsPrivateKeyFile": serving.key,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": authority.certificate()},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": format!("unix://{}", runtime.socket().display()),
        "clusterDNS": [CLUSTER_DNS.to_string()],
        "clusterDomain": "cluster.local",
        "resolvConf": resolv,
        "cgroupDriver": "cgroupfs",
        // So that a kubelet of this machine's own keeps its pods.
        "cgroupRoot": cgroups.root(),
        "podLogsDir": state.join("logs"),
        // What a machine without these would refuse to start with.
        "failCgroupV1": false,
        "failSwapOn": false,
        "oomScoreAdj": 0,
        // Disk space is not what is measured.
        "evictionHard": {"memory.available": "1Mi"},
        "imageGCHighThresholdPercent": 100,
        // Of the machine, or of the instance's namespace: neither is ours to set.
        "protectKernelDefaults": false,
        "maxPods": 110,
    });
    let file = state.join("config.json");
    fs::write(&file, config.to_string())?;
    Ok(Component::new("stock-kubelet", program)
        .within(&host.namespace)
        .path_flag("config", &file)
        .path_flag("kubeconfig", &kubeconfig)
        .path_flag("root-dir", layout.host_data(&host.name).join("kubelet"))
        .path_flag("cert-dir", state.join("pki"))
        .flag("hostname-override", NODE)
        .flag("node-ip", host.address)
        .input(file)
        .ready_when(Ready::Accepts((host.address, KUBELET_PORT).into())))
}

/// Removes the cgroups that the hosts had, whose processes are gone.
pub(crate) fn remove_cgroups(layout: &Layout) {
    for place in [KUBELET_HOST, ALONE_HOST] {
        Cgroups::of(layout, &place).remove();
    }
}

/// One cgroup in each hierarchy of the machine, under which a host makes its
/// own. A kubelet wants all of them to exist when it starts.
struct Cgroups {
    name: String,
}

impl Cgroups {
    fn of(layout: &Layout, place: &Place) -> Self {
        Self {
            name: layout.namespace(place.name),
        }
    }

    fn root(&self) -> String {
        format!("/{}", self.name)
    }

    /// In each mounted hierarchy, of either version.
    fn directories(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
            kind.starts_with("cgroup")
                .then(|| Path::new(point).join(&self.name))
        });
        points.collect()
    }

    fn make(&self) -> Result<()> {
        for directory in self.directories() {
            fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
            let cpus = directory.join("cpuset.cpus");
            // Version 1 gives a new cpuset no processors: none could run in it.
            if cpus.exists() {
                for setting in ["cpuset.cpus", "cpuset.mems"] {
                    let parent = directory.parent().unwrap_or(&directory).join(setting);
                    if let Ok(value) = fs::read_to_string(parent) {
                        fs::write(directory.join(setting), value.trim()).ok();
                    }
                }
            }
        }
        Ok(())
    }

    fn remove(&self) {
        fn remove(directory: &Path) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    remove(&entry.path());
                }
            }
            // One that still holds a process stays, and says so by being there.
            fs::remove_dir(directory).ok();
        }
        self.directories().iter().for_each(|directory| remove(directory));
    }
}
