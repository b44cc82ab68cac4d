//! The gRPC service towards virtual nodes: `spindrift.pool.v1.PoolAgent` over the
//! pool's mutual TLS ([`tls`]). It parses, asks [`crate::host`], and answers.
//!
//! What always holds: the tenant a caller acts for is the one in its certificate;
//! a message that names another tenant, or another tenant's sandbox, is refused;
//! every message has a bound, and nothing a caller sends makes the agent panic; a
//! call that changes the host is done whole, whenever its caller goes away.

pub mod tls;

mod calls;
mod container_logs;
mod grants;
mod splice;
mod stats;
mod watch;

use std::time::Duration;

use pool_agent_api::{
    Host as HostDescription, Invalid, Refusal, SandboxKey, SandboxSpec, Tenant, TenantId,
    spec::{Volume, VolumeSource},
    wire::{self, pool_agent_server::PoolAgent},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use calls::{Call, Counted};

pub use calls::Calls;

use crate::{
    causes::described,
    host::{Host, SandboxError, StartError, TenantError},
    sandbox::driver::UpdateError,
};

/// A spec with its ConfigMaps and Secrets, each at most 1 MiB.
pub const MAX_MESSAGE: usize = 32 << 20;
/// A year: longer graces are asked for by nobody who means it.
const LONGEST_GRACE: Duration = Duration::from_secs(365 * 86_400);

/// The tenant that a connection's certificate names.
#[derive(Debug, Clone)]
pub struct Caller(pub TenantId);

/// What does not change while the host is up.
#[derive(Debug, Clone)]
pub struct Facts {
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
    pub runtime_version: String,
}

pub struct Service {
    host: Host,
    facts: Facts,
}

impl Service {
    /// To be served beneath [`Calls`].
    pub fn new(host: Host, facts: Facts) -> Self {
        Self { host, facts }
    }
}

fn caller<T>(request: &Request<T>) -> Result<TenantId, Status> {
    request
        .extensions()
        .get::<Caller>()
        .map(|caller| caller.0.clone())
        .ok_or_else(|| Status::unauthenticated("the connection has no tenant"))
}

/// What counts it, until what was asked for is done.
fn call<T>(request: &Request<T>) -> Result<Call, Status> {
    request
        .extensions()
        .get::<Call>()
        .cloned()
        .ok_or_else(|| Status::internal("the call is not counted"))
}

/// What a caller said of a tenant has to be its own.
fn own(caller: &TenantId, named: &TenantId) -> Result<(), Status> {
    if caller == named {
        Ok(())
    } else {
        Err(Status::permission_denied(format!(
            "your certificate is of tenant {caller}, not {named}"
        )))
    }
}

impl From<SandboxError> for Status {
    fn from(error: SandboxError) -> Self {
        let message = described(&error);
        match error {
            SandboxError::Unknown(_) => Self::not_found(message),
            SandboxError::Update(UpdateError::Invalid(_)) => Self::invalid_argument(message),
            SandboxError::Update(UpdateError::Failed(_)) => Self::failed_precondition(message),
        }
    }
}

/// Goes on to its end when its caller goes away: what changes the host is done whole,
/// and whoever asks again finds it so.
/// The call counts as long as it goes on.
async fn whole<T: Send + 'static>(
    call: Call,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Status> {
    let counted = async move {
        let done = work.await;
        drop(call);
        done
    };
    tokio::spawn(counted.in_current_span())
        .await
        .map_err(|_| Status::internal("the call broke off in the agent"))
}

#[tonic::async_trait]
impl PoolAgent for Service {
    type WatchStream = Counted<ReceiverStream<Result<wire::WatchEvent, Status>>>;
    type GrantStream = Counted<ReceiverStream<Result<wire::GrantResponse, Status>>>;
    type LogsStream = Counted<ReceiverStream<Result<wire::LogChunk, Status>>>;
    type SpliceStream = Counted<ReceiverStream<Result<wire::SpliceFrame, Status>>>;

    async fn get_host(&self, request: Request<wire::GetHostRequest>) -> Result<Response<wire::Host>, Status> {
        let _call = call(&request)?;
        let shop = self.host.shop();
        let description = HostDescription {
            name: shop.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.facts.boot_id.clone(),
            address: shop.address,
            capacity: self.host.capacity(),
            allocatable: self.host.allocatable(),
            pressure: *shop.pressure.borrow(),
            free: self.host.free(),
            runtime_version: self.facts.runtime_version.clone(),
            kernel_version: self.facts.kernel_version.clone(),
            os_image: self.facts.os_image.clone(),
            architecture: goarch().to_owned(),
        };
        Ok(Response::new(description.into()))
    }

    async fn configure_tenant(
        &self,
        request: Request<wire::Tenant>,
    ) -> Result<Response<wire::ConfigureTenantResponse>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let tenant = Tenant::try_from(request.into_inner())?;
        own(&caller, &tenant.id)?;
        let host = self.host.clone();
        whole(call, async move { host.configure_tenant(tenant).await })
            .await?
            .map_err(|error| {
                let message = described(&error);
                tracing::warn!(tenant = %caller, error = message, "a tenant was not configured");
                match error {
                    TenantError::Refused(_) | TenantError::InUse(_) | TenantError::NameServer { .. } => {
                        Status::failed_precondition(message)
                    }
                    TenantError::Network(_) | TenantError::Open(_) | TenantError::Close(_) => {
                        Status::internal(message)
                    }
                    TenantError::Ledger(_) => Status::unavailable(message),
                    TenantError::TooMany => Status::resource_exhausted(message),
                }
            })?;
        Ok(Response::new(wire::ConfigureTenantResponse {}))
    }

    async fn start_sandbox(
        &self,
        request: Request<wire::StartSandboxRequest>,
    ) -> Result<Response<wire::StartSandboxResponse>, Status> {
        use wire::start_sandbox_response::Outcome;
        let caller = caller(&request)?;
        let call = call(&request)?;
        let spec = request
            .into_inner()
            .spec
            .ok_or_else(|| Invalid::new("spec", "is required"))?;
        let spec = SandboxSpec::try_from(spec).map_err(|e| e.within("spec"))?;
        own(&caller, &spec.tenant)?;
        let key = spec.key.clone();
        let host = self.host.clone();
        let outcome = match whole(call, async move { host.start(spec).await }).await? {
            Ok(()) => Outcome::Accepted(wire::Accepted {}),
            Err(StartError::Refused(refusal)) => {
                tracing::info!(
                    pod.uid = %key.pod, attempt = %key.attempt, tenant = %caller,
                    reason = ?refusal.reason, detail = refusal.message, "sandbox refused"
                );
                Outcome::Refused(Refusal::into(refusal))
            }
            Err(error) => {
                let message = described(&error);
                tracing::error!(pod.uid = %key.pod, attempt = %key.attempt, error = message, "sandbox not started");
                return Err(Status::unavailable(message));
            }
        };
        Ok(Response::new(wire::StartSandboxResponse {
            outcome: Some(outcome),
        }))
    }

    async fn update_sandbox(
        &self,
        request: Request<wire::UpdateSandboxRequest>,
    ) -> Result<Response<wire::UpdateSandboxResponse>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let message = request.into_inner();
        let key = SandboxKey::from_wire(message.key)?;
        let mut volumes = vec![];
        for (i, volume) in message.volumes.into_iter().enumerate() {
            let field = format!("volumes[{i}]");
            let volume = Volume::try_from(volume).map_err(|e| e.within(&field))?;
            if !matches!(volume.source, VolumeSource::Files(_)) {
                return Err(Invalid::new(field, "is not a file volume: nothing else can change").into());
            }
            volumes.push(volume);
        }
        let host = self.host.clone();
        whole(call, async move { host.update(&caller, &key, volumes).await }).await??;
        Ok(Response::new(wire::UpdateSandboxResponse {}))
    }

    async fn stop_sandbox(
        &self,
        request: Request<wire::StopSandboxRequest>,
    ) -> Result<Response<wire::StopSandboxResponse>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let message = request.into_inner();
        let key = SandboxKey::from_wire(message.key)?;
        let grace = Duration::from_secs(message.grace_seconds).min(LONGEST_GRACE);
        let host = self.host.clone();
        whole(call, async move { host.stop(&caller, &key, grace).await }).await??;
        Ok(Response::new(wire::StopSandboxResponse {}))
    }

    async fn forget_sandbox(
        &self,
        request: Request<wire::ForgetSandboxRequest>,
    ) -> Result<Response<wire::ForgetSandboxResponse>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let key = SandboxKey::from_wire(request.into_inner().key)?;
        let host = self.host.clone();
        whole(call, async move { host.forget(&caller, &key).await }).await??;
        Ok(Response::new(wire::ForgetSandboxResponse {}))
    }

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let stream = watch::start(self.host.board(), caller);
        Ok(Response::new(Counted::new(stream, call)))
    }

    async fn grant(
        &self,
        request: Request<Streaming<wire::GrantRequest>>,
    ) -> Result<Response<Self::GrantStream>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let stream = grants::start(self.host.shop().fence.clone(), caller, request.into_inner());
        Ok(Response::new(Counted::new(stream, call)))
    }

    async fn logs(&self, request: Request<wire::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let stream = container_logs::start(&self.host, &caller, request.into_inner())?;
        Ok(Response::new(Counted::new(stream, call)))
    }

    async fn splice(
        &self,
        request: Request<Streaming<wire::SpliceFrame>>,
    ) -> Result<Response<Self::SpliceStream>, Status> {
        let caller = caller(&request)?;
        let call = call(&request)?;
        let stream = splice::start(&self.host, &caller, request.into_inner(), call.clone()).await?;
        Ok(Response::new(Counted::new(stream, call)))
    }

    async fn stats(
        &self,
        request: Request<wire::StatsRequest>,
    ) -> Result<Response<wire::StatsResponse>, Status> {
        let caller = caller(&request)?;
        let _call = call(&request)?;
        Ok(Response::new(stats::collect(&self.host, &caller).await?))
    }
}

/// Go's name for the architecture, which Kubernetes uses.
pub fn goarch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
