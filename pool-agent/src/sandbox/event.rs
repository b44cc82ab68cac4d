//! What the lifecycle is told and what it asks for. Every [`Effect`] but
//! [`Effect::Announce`] is answered by its [`Event`], also when it fails (a stop
//! also by the exit that was seen); each is idempotent, so a repetition after a crash does no harm.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use pool_agent_api::status::{MeshState, Severity, Terminated};

/// A container of the sandbox: its place among init containers, then app
/// containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

/// The runtime's name for one run of a container, without `containerd://`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(pub String);

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The runtime's name for the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SandboxId(pub String);

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why an effect failed, in words for the user who runs `kubectl describe`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The kubelet's reason: `FailedMount`, `ErrImagePull`, `CreateContainerError`, …
    pub reason: &'static str,
    pub message: String,
}

impl Trouble {
    pub fn new(reason: &'static str, message: impl fmt::Display) -> Self {
        Self {
            reason,
            message: message.to_string(),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A container that has been started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    pub id: ContainerId,
    pub image_id: String,
    pub started_at: Timestamp,
}

/// Why a container was not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartFailure {
    /// Nothing was made; tried again after a back-off.
    NotCreated(Trouble),
    /// It was made and died at once: counts as a run that ended.
    Died {
        trouble: Trouble,
        id: ContainerId,
        end: Terminated,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    pub image_id: String,
    pub took: Duration,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        })
    }
}

/// What a probe has come to think, past its thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Passing,
    Failing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HookKind {
    PostStart,
    PreStop,
}

/// The steps of taking a sandbox down, in the only order they are done in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Teardown {
    /// The runtime's sandbox; its containers are dead already.
    Sandbox,
    /// The mesh attachment, with a drain.
    Attachment,
    /// Device, routes and address.
    Network,
    /// Mounts and contents.
    Volumes,
}

impl Teardown {
    pub fn next(self) -> Option<Self> {
        match self {
            Self::Sandbox => Some(Self::Attachment),
            Self::Attachment => Some(Self::Network),
            Self::Network => Some(Self::Volumes),
            Self::Volumes => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Admitted, and whatever this attempt replaces is gone.
    Begin,
    VolumesPrepared(Result<(), Trouble>),
    SandboxRan(Result<SandboxId, Trouble>),
    /// The sandbox died under its containers.
    SandboxLost,
    Attachment(MeshState),
    /// The image's id if it is on the host.
    ImageChecked(Slot, Result<Option<String>, Trouble>),
    ImagePulled(Slot, Result<Pulled, Trouble>),
    ContainerStarted(Slot, Result<Started, StartFailure>),
    ContainerExited(Slot, ContainerId, Terminated),
    HookRan(Slot, ContainerId, HookKind, Result<(), String>),
    /// The runtime has answered a stop; that it died is a `ContainerExited`.
    StopAnswered(Slot, ContainerId, Result<(), Trouble>),
    ContainerRemoved,
    Probed(Slot, ContainerId, ProbeKind, Verdict),
    /// A probe failed; maybe not often enough for a verdict.
    ProbeFailed(Slot, ContainerId, ProbeKind, String),
    /// The pod has to go though nobody asked: reason and message for its status.
    Evict(&'static str, String),
    /// Its right to run is over: at once, whatever grace it was given.
    Fence,
    Stop {
        grace: Duration,
    },
    /// Stop if need be, then leave nothing behind.
    Forget,
    TornDown(Teardown, Result<(), Trouble>),
    Removed(Result<(), Trouble>),
    /// A time [`super::Lifecycle::wake_at`] named has come.
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    PrepareVolumes,
    /// Runs the sandbox: namespaces, address and attachment by way of CNI.
    RunSandbox,
    CheckImage(Slot),
    PullImage(Slot),
    /// Creates and starts. `restart` numbers the run from 0.
    StartContainer {
        slot: Slot,
        sandbox: SandboxId,
        restart: u32,
    },
    RunHook {
        slot: Slot,
        id: ContainerId,
        kind: HookKind,
        /// None: as long as it takes.
        limit: Option<Duration>,
    },
    /// The stop signal, and SIGKILL once `grace` is over.
    StopContainer {
        slot: Slot,
        id: ContainerId,
        grace: Duration,
    },
    /// Removes a dead run that nobody can ask the log of any more.
    RemoveContainer {
        slot: Slot,
        id: ContainerId,
        restart: u32,
    },
    TearDown(Teardown),
    /// Containers, logs and files: all that outlives [`Effect::TearDown`].
    Remove,
    Announce(Announcement),
}

/// An event for `kubectl describe`, before it is stamped and addressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub severity: Severity,
    pub reason: &'static str,
    pub message: String,
    pub slot: Option<Slot>,
}
