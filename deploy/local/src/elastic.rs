//! A lab whose hosts come and go: Karpenter beside the cell, and the lab's
//! [`driver`], which makes hosts as a cloud makes machines.
//!
//! An operator of a real pool does the same: `karpenter install`, the manifests of
//! `deploy/karpenter`, a driver for his cloud (`docs/guide/elastic.md`).

use std::{path::Path, time::Duration};

use crate::{
    artifacts::{ArtifactError, Containerd, Spindrift},
    cell::{Cell, CellError},
    cluster::ClusterError,
    component::{Component, ComponentError, Ready},
    driver::{self, Amounts, DriverError, Offering, Settings, Shape},
    images::Images,
    instance::Layout,
    pool::{Capacity, EVICTION_DISK, EVICTION_MEMORY, Kept},
    progress::Step,
    tool::{Tool, ToolError},
    topology::Topology,
};

pub const KARPENTER: &str = "karpenter";
/// Of the hosts: their label `spindrift.dev/class`.
pub const CLASS: &str = "standard";
pub const ZONES: [&str; 2] = ["zone-a", "zone-b"];
/// As many as two cores bear beside everything else of a lab.
pub const MOST_HOSTS: usize = 6;

const RBAC: &str = include_str!("../../karpenter/rbac.yaml");
const POOL: &str = include_str!("../../karpenter/pool.yaml");
const METRICS_PORT: u16 = 18080;
const HEALTH_PORT: u16 = 18081;
/// How long definitions may take to be served, once they are applied.
const ESTABLISHED: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum ElasticError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error(transparent)]
    Component(#[from] ComponentError),
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("cannot install Karpenter's definitions")]
    Install(#[source] ToolError),
}

/// What is needed to make hosts.
pub struct Parts<'a> {
    pub karpenter: &'a Path,
    pub containerd: &'a Containerd,
    pub images: &'a Images,
    pub programs: &'a Spindrift,
    /// deploy/host/first-boot
    pub first_boot: &'a Path,
}

/// Starts the driver and Karpenter, and applies what the pool's operator would.
pub async fn furnish(
    layout: &Layout,
    topology: &Topology,
    cell: &Cell,
    parts: &Parts<'_>,
    limit: Duration,
    step: &Step,
) -> Result<(), ElasticError> {
    step.note("the host driver");
    let settings = Settings {
        shapes: shapes(),
        most_hosts: MOST_HOSTS,
        containerd: parts.containerd.directory.clone(),
        runc: parts.containerd.runc.clone(),
        images: parts.images.directory().to_owned(),
        programs: parts.programs.directory.clone(),
        first_boot: parts.first_boot.to_owned(),
    };
    driver::component(layout, &parts.programs.program("spindrift-local")?, &settings)?
        .start(layout, limit)
        .await?;
    step.note("Karpenter's definitions");
    Tool::new(parts.karpenter)
        .arg("install")
        .env("KUBECONFIG", layout.cell_kubeconfig())
        .run()
        .await
        .map_err(ElasticError::Install)?;
    cell.cluster().apply("rbac.yaml", RBAC, &[]).await?;
    let values = [("CLASS", CLASS), ("CPU", "16"), ("GRACE", "5m"), ("IDLE", "10s")];
    let since = std::time::Instant::now();
    while let Err(error) = cell.cluster().apply("pool.yaml", POOL, &values).await {
        if since.elapsed() > ESTABLISHED {
            return Err(error.into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    step.note("Karpenter");
    let kubeconfig = cell.kubeconfig(KARPENTER).await?;
    Component::new(KARPENTER, parts.karpenter)
        .within(&topology.lab)
        .flag(
            "driver",
            format_args!("unix://{}", driver::socket(layout).display()),
        )
        .flag("metrics-port", METRICS_PORT)
        .flag("health-probe-port", HEALTH_PORT)
        // There is one of it.
        .flag("disable-leader-election", true)
        // A person watches: a burst is over when nothing has come for so long.
        .flag("batch-idle-duration", "1s")
        .flag("batch-max-duration", "5s")
        // Long enough not to ask in each round, short enough for a test.
        .flag("out-of-capacity-memory", "20s")
        .environment("KUBECONFIG", kubeconfig.display().to_string())
        .environment("SYSTEM_NAMESPACE", "kube-system")
        .input(kubeconfig)
        .ready_when(Ready::Accepts(([127, 0, 0, 1], HEALTH_PORT).into()))
        .start(layout, limit)
        .await?;
    Ok(())
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Shape, cores, GiB of memory, price of an hour.
const SHAPES: [(&str, u64, u64, f64); 2] = [("small", 1, 2, 0.06), ("medium", 2, 4, 0.10)];

/// What a host of the shape is given. The machine has less than all of them together:
/// they share it, as pods share a host.
pub fn capacity(shape: &str) -> Capacity {
    let (_, cores, gibibytes, _) = *SHAPES
        .iter()
        .find(|(name, ..)| *name == shape)
        .unwrap_or(&SHAPES[0]);
    Capacity {
        cpu_millis: cores * 1000,
        memory_bytes: gibibytes * GIB,
        ephemeral_storage_bytes: 20 * GIB,
        pods: 110,
        kept: Kept {
            cpu_millis: 70,
            memory_bytes: 256 * MIB,
            ephemeral_storage_bytes: GIB,
        },
    }
}

/// As the driver tells them.
pub fn shapes() -> Vec<Shape> {
    SHAPES
        .iter()
        .map(|&(name, _, _, price)| {
            let all = capacity(name);
            Shape {
                name: name.into(),
                arch: "amd64".into(),
                capacity: amounts(
                    all.cpu_millis,
                    all.memory_bytes,
                    all.ephemeral_storage_bytes,
                    all.pods,
                ),
                allocatable: amounts(
                    all.cpu_millis - all.kept.cpu_millis,
                    all.memory_bytes - all.kept.memory_bytes - EVICTION_MEMORY,
                    all.ephemeral_storage_bytes
                        - all.kept.ephemeral_storage_bytes
                        - all.ephemeral_storage_bytes / 100 * EVICTION_DISK,
                    all.pods,
                ),
                offerings: ZONES
                    .map(|zone| Offering {
                        zone: zone.into(),
                        capacity_type: "on-demand".into(),
                        price,
                        available: true,
                    })
                    .into(),
            }
        })
        .collect()
}

fn amounts(cpu_millis: u64, memory: u64, storage: u64, pods: u32) -> Amounts {
    [
        ("cpu", format!("{cpu_millis}m")),
        ("memory", memory.to_string()),
        ("ephemeral-storage", storage.to_string()),
        ("pods", pods.to_string()),
    ]
    .map(|(name, amount)| (name.to_owned(), amount))
    .into()
}
