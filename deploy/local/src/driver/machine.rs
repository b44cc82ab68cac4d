//! One host of a lab: made from nothing, and removed so that nothing is left.

use std::{path::PathBuf, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};

use super::inventory::Record;
use crate::{
    artifacts::{ArtifactError, Containerd, Spindrift},
    component::{Component, ComponentError},
    containerd::{self, ContainerdError, Runtime},
    elastic, file,
    images::Images,
    instance::Layout,
    netns::Namespace,
    pool::{self, Handover, PoolError},
    tool::ToolError,
    topology::{Host, Topology, TopologyError},
};

/// How long a part of a host may take to serve.
const START: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub(super) enum MachineError {
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Component(#[from] ComponentError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("cannot remove the namespace")]
    Namespace(#[source] ToolError),
    #[error("cannot remove {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Knows how hosts of this lab are made.
#[derive(Clone)]
pub(super) struct Maker {
    layout: Layout,
    containerd: Containerd,
    images: Images,
    programs: Spindrift,
    first_boot: PathBuf,
}

impl Maker {
    pub(super) fn new(
        layout: &Layout,
        containerd: Containerd,
        images: Images,
        programs: Spindrift,
        first_boot: PathBuf,
    ) -> Self {
        Self {
            layout: layout.clone(),
            containerd,
            images,
            programs,
            first_boot,
        }
    }

    fn host(&self, record: &Record) -> Host {
        Topology::host_in(&self.layout, &record.name, record.slot)
    }

    /// Makes what is missing of it, until its agent runs. It joins the cell by itself.
    pub(super) async fn make(&self, record: &Record) -> Result<(), MachineError> {
        let host = self.host(record);
        let topology = Topology::elastic(&self.layout);
        topology.join(&host).await?;
        topology.lead(&self.layout, &host).await?;
        let runtime = Runtime::new(&self.layout, &host, &self.containerd);
        let plugin = self.programs.program("spindrift-cni")?;
        runtime.component(&plugin)?.start(&self.layout, START).await?;
        runtime.import(&self.images).await?;
        let handover = Handover {
            class: &record.class,
            zone: &record.zone,
            provider_id: &record.provider_id,
            taints: record
                .taints
                .iter()
                .map(|taint| format!("{}={}", taint.key, taint.effect))
                .collect(),
            cell: &record.bootstrap.server,
            authority: BASE64_STANDARD.encode(&record.bootstrap.authority),
            token: &record.bootstrap.token,
            capacity: elastic::capacity(&record.shape),
        };
        let agent = pool::first_boot(
            &self.layout,
            &runtime,
            &self.programs,
            &self.first_boot,
            &handover,
        )
        .await?;
        agent.start(&self.layout, START).await?;
        Ok(())
    }

    /// Removes whatever there is of it, as a machine that is switched off.
    pub(super) async fn remove(&self, record: &Record) -> Result<(), MachineError> {
        let host = self.host(record);
        for name in [pool::agent_name(&host), containerd::component_name(&host)] {
            if let Ok(component) = Component::find(&self.layout, &name) {
                component.kill(&self.layout).await?;
                component.forget(&self.layout).await?;
            }
        }
        containerd::remove_containers(&self.layout, [host.name.clone()]).await;
        let directories = [
            self.layout.host_state(&host.name),
            self.layout.host_data(&host.name),
        ];
        containerd::unmount_below(&directories)?;
        let own = host.namespace.name();
        let routers = format!("{own}-");
        for namespace in Namespace::existing() {
            if namespace.name() == own || namespace.name().starts_with(&routers) {
                namespace.remove().await.map_err(MachineError::Namespace)?;
            }
        }
        Topology::elastic(&self.layout).part(&host).await?;
        for path in directories {
            file::remove_tree(&path).map_err(|source| MachineError::File { path, source })?;
        }
        Ok(())
    }
}
