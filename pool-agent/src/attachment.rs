//! The one place where this agent meets the mesh. Called by `host` (tenants) and
//! by a sandbox's `perform` (its attachment).

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use mesh_runtime::{
    attachment::AttachmentState,
    control::InvalidPoolTls,
    pod::{Mode, PodRecord},
    redirect::{Deadline, RouterError},
    runtime::{AttachError, Attachment, CloseTenantError, MeshRuntime, OpenTenantError, PodAttachment},
};
use pool_agent_api::{SandboxKey, SandboxSpec, Tenant, TenantId, spec::MeshMode, status::MeshState};
use prometheus_client::{metrics::histogram::Histogram, registry::Registry};

use crate::{
    network::{PodDevice, ROUTER_UPLINK, Router},
    service::tls::Pem,
};

/// How long a pod's connections may go on once its processes are dead: what is
/// left is what the proxy still has to deliver to others.
const DRAIN: Duration = Duration::from_millis(500);

pub struct Mesh {
    runtime: MeshRuntime,
    attach_seconds: Histogram,
}

impl Mesh {
    pub fn new(runtime: MeshRuntime, registry: &mut Registry) -> Self {
        // 500 µs to 2 s, doubling.
        let attach_seconds = Histogram::new((0..13).map(|n| 0.0005 * f64::from(1 << n)));
        registry.register(
            "pool_agent_attach_seconds",
            "From a pod's network namespace being handed over until its attachment serves",
            attach_seconds.clone(),
        );
        Self {
            runtime,
            attach_seconds,
        }
    }

    /// New connections to tenants' control planes show these from now on.
    pub fn renew(&self, pem: &Pem) -> Result<(), InvalidPoolTls> {
        self.runtime.replace_pool_tls(&pem.certificate, &pem.key, &pem.ca)
    }

    /// Notes, once the attachment serves, how long that took.
    pub fn time(&self, attachment: &Attachment, handed_over: Instant) {
        let (mut state, attach_seconds) = (attachment.state(), self.attach_seconds.clone());
        tokio::spawn(async move {
            // One that is detached before it served is not counted.
            if state
                .wait_for(|state| *state == AttachmentState::Serving)
                .await
                .is_ok()
            {
                attach_seconds.observe(handed_over.elapsed().as_secs_f64());
            }
        });
    }

    /// Takes over what an earlier agent left in the tenant's router, or begins.
    pub async fn open_tenant(&self, tenant: &Tenant, router: &Router) -> Result<(), OpenTenantError> {
        self.runtime
            .open_tenant(tenant, router.path(), ROUTER_UPLINK)
            .await
    }

    /// Takes the mesh out of a tenant's router. Refused while pods are attached.
    pub async fn close_tenant(&self, tenant: &TenantId) -> Result<(), CloseTenantError> {
        self.runtime.close_tenant(tenant).await
    }

    /// Returns once every packet of the pod is the mesh's or dropped. The device
    /// must still be down, unless it was attached before: then the deadline it has stays.
    pub async fn attach(
        &self,
        spec: &SandboxSpec,
        device: &PodDevice,
        deadline: Deadline,
    ) -> Result<Attachment, AttachError> {
        self.runtime.attach(wanted(spec, device, deadline)).await
    }

    /// Moves deadlines in the kernel; returns whose were there to be moved.
    pub async fn set_deadlines(
        &self,
        deadlines: Vec<(SandboxKey, Deadline)>,
    ) -> Result<BTreeSet<SandboxKey>, RouterError> {
        self.runtime.set_deadlines(deadlines).await
    }

    /// What stands in the kernel. None if no pod of the tenant's has the address.
    pub async fn deadline(
        &self,
        tenant: &TenantId,
        address: Ipv4Addr,
    ) -> Result<Option<Deadline>, RouterError> {
        self.runtime.deadline(tenant, address).await
    }

    pub async fn detach(&self, key: &SandboxKey) {
        self.runtime.detach(key, DRAIN).await;
    }
}

fn wanted(spec: &SandboxSpec, device: &PodDevice, deadline: Deadline) -> PodAttachment {
    let address: Ipv4Addr = device.address;
    PodAttachment {
        pod: PodRecord {
            key: spec.key.clone(),
            tenant: spec.tenant.clone(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            service_account: spec.service_account.clone(),
            address,
            mode: match spec.mesh {
                MeshMode::Enrolled => Mode::Enrolled,
                MeshMode::Unmeshed => Mode::Unmeshed,
            },
        },
        device: device.name.clone(),
        mac: device.mac,
        deadline,
    }
}

/// The mesh's states in the contract's words.
pub fn reported(state: AttachmentState) -> MeshState {
    match state {
        AttachmentState::Detached => MeshState::Detached,
        AttachmentState::Redirected => MeshState::Redirected,
        AttachmentState::Identified => MeshState::Identified,
        AttachmentState::Serving => MeshState::Serving,
        AttachmentState::Draining => MeshState::Draining,
    }
}
