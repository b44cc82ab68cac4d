//! Images: which a sandbox may start from, and how they come to the host. Called by
//! a sandbox's `perform` and by the housekeeping; calls the runtime.
//!
//! ```text
//!  present ─▶ name may be asked (destination) ─▶ on the host ─▶ access proven (access) ─▶ held
//!  pull    ─▶ name may be asked ─▶ one for all that wait, in turn (pulls, turns) ─▶ the runtime
//!               ─▶ proven for this tenant ─▶ held
//! ```
//!
//! What always holds:
//! - a sandbox starts from an image only by a [`Held`], and gets one only if its
//!   tenant has proven access to that very image, or the operator waives it;
//! - an image that is held is not removed.

pub mod access;
pub mod destination;
pub mod egress;
mod held;
mod metrics;
mod pulls;
mod records;
mod reference;
mod turns;

pub use held::Held;
pub use reference::{InvalidImage, Reference};

use std::{
    collections::HashSet,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use pool_agent_api::{TenantId, spec::RegistryCredential};
use prometheus_client::registry::Registry;

use crate::{
    cri::{CriError, Runtime, wire},
    policy::{self, images::Verification},
};
use access::ImageId;
use destination::{Destinations, LeadsAstray};
use held::Holds;
use metrics::{Metrics, Outcome};
use pulls::{PullKey, Pulls, Turn};
use records::Records;
use turns::Full;

/// Looks that a removal beside them made void; each removal is over by the next.
const LOOKS: usize = 8;

/// An image as a container's spec asks for it.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub tenant: &'a TenantId,
    /// As the user wrote it.
    pub name: &'a str,
    pub handler: Option<&'a str>,
    pub credentials: &'a [RegistryCredential],
}

/// Why there is no image to start from. Shown to users.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Name(#[from] InvalidImage),
    /// The registry's name alone says so.
    #[error(transparent)]
    NamedAstray(LeadsAstray),
    /// A resolver says so, now.
    #[error(transparent)]
    ResolvedAstray(LeadsAstray),
    #[error("{0}")]
    Inspect(Arc<CriError>),
    #[error("{0}")]
    Pull(Arc<CriError>),
    #[error("{0}")]
    TooMany(#[from] Full),
    #[error("the image is gone right after its pull")]
    Gone,
    #[error("the runtime names the image {0:?}, which is no digest")]
    Id(String),
    #[error("marking the pull: {0}")]
    Disk(Arc<io::Error>),
}

impl ImageError {
    /// A kubelet's reason for a container that waits.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Name(_) | Self::NamedAstray(_) => "InvalidImageName",
            Self::Inspect(_) => "ImageInspectError",
            _ => "ErrImagePull",
        }
    }
}

/// What came of a pull: the image's id.
type Pulled = Result<ImageId, ImageError>;

pub struct Images {
    shared: Arc<Shared>,
    pulls: Pulls<Pulled>,
}

struct Shared {
    runtime: Runtime,
    destinations: Arc<Destinations>,
    verification: Verification,
    longest: Duration,
    records: Arc<Records>,
    holds: Holds,
    metrics: Metrics,
}

/// An image that a collection may remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removable {
    id: ImageId,
    /// As the runtime has it.
    pub name: String,
    pub bytes: u64,
}

impl Images {
    /// `directory` is where the proofs are kept.
    pub async fn open(
        runtime: Runtime,
        directory: &Path,
        policy: &policy::images::Images,
        registry: &mut Registry,
    ) -> io::Result<Self> {
        let (records, interrupted) = Records::open(directory)?;
        let shared = Shared {
            runtime,
            destinations: Arc::new(Destinations::of_host(policy)?),
            verification: policy.verification.clone(),
            longest: policy.pulls.longest,
            records: Arc::new(records),
            holds: Holds::default(),
            metrics: Metrics::register(registry),
        };
        for name in interrupted {
            // It may have ended in the runtime all the same.
            match shared.runtime.image(&name, None).await {
                Ok(image) => {
                    if let Some(id) = image.and_then(|image| ImageId::parse(&image.id)) {
                        shared.records.note(&id);
                    }
                }
                Err(error) => {
                    tracing::warn!(image = name, error = %error, "what came of a pull that was cut off is not known");
                }
            }
        }
        Ok(Self {
            shared: Arc::new(shared),
            pulls: Pulls::new(policy.pulls.clone()),
        })
    }

    /// The image if it is on the host and the tenant may start from it. That it is
    /// there but was not proven is not told: to its tenant it is not there.
    pub async fn present(&self, wanted: Wanted<'_>) -> Result<Option<Held>, ImageError> {
        let reference = self.reference(wanted.name)?;
        let canonical = reference.canonical();
        let looked = self.shared.look(&canonical, wanted.handler).await?;
        let Some((id, held)) = looked else {
            return Ok(None);
        };
        let repository = reference.repository();
        let allowed = self.shared.records.proven(wanted.tenant, &id, &repository)
            || self.shared.verification.waived(&repository, held.info.pinned);
        if !allowed {
            self.shared.metrics.unproven();
        }
        Ok(allowed.then_some(held))
    }

    /// Asks the image's registry for it, with the tenant's credential if one fits.
    /// What is on the host already is not fetched again, but the registry has to
    /// answer for it: the runtime asks for the manifest each time.
    pub async fn pull(
        &self,
        wanted: Wanted<'_>,
        sandbox: wire::PodSandboxConfig,
    ) -> Result<(Held, Duration), ImageError> {
        let begun = Instant::now();
        let reference = self.reference(wanted.name)?;
        let credential = reference.credential(wanted.credentials);
        let key = PullKey::new(wanted.tenant, &reference.canonical(), wanted.handler, credential);
        let auth = credential.map(|c| wire::AuthConfig {
            username: c.username.clone(),
            password: c.password.clone(),
            server_address: String::new(),
        });
        let (tenant, handler) = (wanted.tenant.clone(), wanted.handler.map(str::to_owned));
        let shared = self.shared.clone();
        let pulled = self.pulls.join(key, move |turn| async move {
            let pull = shared.pull(turn, &tenant, &reference, handler.as_deref(), auth, sandbox);
            let pulled = pull.await;
            shared.metrics.ended(Outcome::of(&pulled));
            pulled
        });
        let id = pulled.await?;
        // By its id: its name may lead to another by now.
        let looked = self.shared.look(&id.to_string(), wanted.handler).await?;
        let (_, held) = looked.ok_or(ImageError::Gone)?;
        Ok((held, begun.elapsed()))
    }

    fn reference(&self, name: &str) -> Result<Reference, ImageError> {
        let reference = Reference::parse(name)?;
        self.shared
            .destinations
            .named(&reference.registry)
            .map_err(ImageError::NamedAstray)?;
        Ok(reference)
    }

    // ---- collection

    /// Forgets the proofs for images that the runtime has no more; `all` is what it
    /// has said a moment ago.
    pub async fn tidy(&self, all: &[wire::Image]) -> Result<(), CriError> {
        let there: HashSet<ImageId> = all.iter().filter_map(|image| ImageId::parse(&image.id)).collect();
        for id in self.shared.records.images() {
            // It may have come since.
            if there.contains(&id) || self.shared.runtime.image(&id.to_string(), None).await?.is_some() {
                continue;
            }
            let records = self.shared.records.clone();
            let forgotten = tokio::task::spawn_blocking(move || records.forget(&id));
            if let Err(error) = forgotten.await {
                tracing::warn!(error = %error, "the proofs for an image that has gone stay");
            }
        }
        Ok(())
    }

    /// Those of the runtime's images that came by a pull through this agent and that
    /// nothing holds or is about to hold.
    pub fn removable(&self, all: &[wire::Image]) -> Vec<Removable> {
        let pulled: HashSet<String> = self.pulls.names().into_iter().collect();
        let being_pulled = |image: &wire::Image| {
            let mut names = image.repo_tags.iter().chain(&image.repo_digests);
            names.any(|name| pulled.contains(name))
        };
        all.iter()
            .filter(|image| !image.pinned && !being_pulled(image))
            .filter_map(|image| {
                let id = ImageId::parse(&image.id)?;
                let ours = self.shared.records.pulled_here(&id) && !self.shared.holds.held(&id);
                ours.then(|| Removable {
                    id,
                    name: image.id.clone(),
                    bytes: image.size,
                })
            })
            .collect()
    }

    /// Removes it, unless a sandbox has come to hold it meanwhile (false).
    pub async fn remove(&self, image: &Removable) -> Result<bool, CriError> {
        let Some(_removal) = self.shared.holds.begin_removal(&image.id) else {
            return Ok(false);
        };
        self.shared.runtime.remove_image(&image.name).await?;
        Ok(true)
    }

    /// Where images may be.
    pub fn destinations(&self) -> Arc<Destinations> {
        self.shared.destinations.clone()
    }

    /// Pulls that wait for their turn, and that run.
    pub fn counts(&self) -> (usize, usize) {
        self.pulls.counts()
    }
}

impl Shared {
    /// Looks for an image, and holds it.
    async fn look(&self, name: &str, handler: Option<&str>) -> Result<Option<(ImageId, Held)>, ImageError> {
        for _ in 0..LOOKS {
            let before = self.holds.removals();
            let inspect = |e| ImageError::Inspect(Arc::new(e));
            let Some(info) = self.runtime.image(name, handler).await.map_err(inspect)? else {
                return Ok(None);
            };
            let id = ImageId::parse(&info.id).ok_or_else(|| ImageError::Id(info.id.clone()))?;
            if let Some(held) = self.holds.hold(&id, info, before) {
                return Ok(Some((id, held)));
            }
        }
        // It is being removed: to whoever asks it is not there.
        Ok(None)
    }

    async fn pull(
        &self,
        turn: Result<Turn, Full>,
        tenant: &TenantId,
        reference: &Reference,
        handler: Option<&str>,
        auth: Option<wire::AuthConfig>,
        sandbox: wire::PodSandboxConfig,
    ) -> Pulled {
        let mut turn = turn?;
        turn.comes().await;
        self.destinations
            .check(reference)
            .await
            .map_err(ImageError::ResolvedAstray)?;
        let canonical = reference.canonical();
        let (records, name) = (self.records.clone(), canonical.clone());
        let _intent = blocking(move || records.intend(&name))
            .await
            .map_err(|e| ImageError::Disk(Arc::new(e)))?;
        let answer = self
            .runtime
            .pull(&canonical, handler, auth, sandbox, self.longest)
            .await
            .map_err(|e| ImageError::Pull(Arc::new(e)))?;
        let id = ImageId::parse(&answer).ok_or(ImageError::Id(answer))?;
        let (records, tenant, repository) = (self.records.clone(), tenant.clone(), reference.repository());
        let proven = id.clone();
        blocking(move || {
            records.prove(&tenant, &proven, &repository);
            Ok(())
        })
        .await
        .map_err(|e| ImageError::Disk(Arc::new(e)))?;
        Ok(id)
    }
}

/// Work that may wait for the disk, on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}
