//! One container of a sandbox: the image it needs, the run it is in, and how
//! often it has been started. Pure; [`super::lifecycle`] moves it.
//!
//! ```text
//!            image ready                      exit
//!  Absent ───────────────▶ Starting ──▶ Running ──▶ Exited ──▶ Starting (restart + 1) …
//!    ▲                        │            │ kill: preStop ▸ signal
//!    └── back-off ── Refused ◀┘            ▼
//!                                       Stopping (still Running until the exit is seen)
//! ```

use std::{collections::VecDeque, time::Duration};

use jiff::Timestamp;
use pool_agent_api::status::Terminated;

use super::{
    backoff::Backoff,
    event::{ContainerId, Trouble},
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    /// How often it has been started again: the number of the current run.
    pub restarts: u32,
    pub image: Image,
    pub pulls: Backoff,
    pub image_id: String,
    pub run: Run,
    /// How the run before the current one ended.
    pub last: Option<Terminated>,
    pub crashes: Backoff,
    pub refusals: Backoff,
    /// Dead runs the runtime still has, oldest first, with their numbers.
    pub dead: VecDeque<(ContainerId, u32)>,
    /// A back-off is announced once.
    pub announced_backoff: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Image {
    /// Not looked at for this run.
    Unknown,
    Checking,
    Pulling,
    Ready,
    /// Tried again at `until`. From `since` on a user reads "back-off".
    Failed {
        trouble: Trouble,
        since: Timestamp,
        until: Timestamp,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Run {
    Absent,
    Starting,
    /// Not created; tried again at `until`.
    Refused {
        trouble: Trouble,
        until: Timestamp,
    },
    Running(Running),
    Exited(Terminated),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    pub id: ContainerId,
    pub started_at: Timestamp,
    pub post_start: PostStart,
    /// The startup probe has passed, or there is none.
    pub started: bool,
    pub ready: bool,
    pub stopping: Option<Stopping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PostStart {
    InFlight,
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stopping {
    pub deadline: Timestamp,
    /// What is left to it even after the deadline.
    pub floor: Duration,
    pub phase: StopPhase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopPhase {
    PreStop,
    /// A sidecar whose containers still run.
    Waiting,
    /// The runtime has been asked, to kill at the named time.
    Signalled {
        kill_at: Timestamp,
        answered: bool,
    },
    /// The runtime did not answer; asked again then.
    Retry {
        at: Timestamp,
    },
}

impl Container {
    pub(super) fn new() -> Self {
        Self {
            restarts: 0,
            image: Image::Unknown,
            pulls: Backoff::default(),
            image_id: String::new(),
            run: Run::Absent,
            last: None,
            crashes: Backoff::default(),
            refusals: Backoff::default(),
            dead: VecDeque::new(),
            announced_backoff: false,
        }
    }

    /// A process of it exists or may come to exist.
    pub(super) fn alive(&self) -> bool {
        matches!(self.run, Run::Starting | Run::Running(_))
    }

    pub(super) fn running(&self) -> Option<&Running> {
        match &self.run {
            Run::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Up as far as what comes after it is concerned.
    pub(super) fn started(&self) -> bool {
        self.running()
            .is_some_and(|r| r.started && r.post_start == PostStart::Done && r.stopping.is_none())
    }

    /// Being started, its postStart hook included.
    pub(super) fn coming_up(&self) -> bool {
        match &self.run {
            Run::Starting => true,
            Run::Running(running) => running.post_start == PostStart::InFlight && running.stopping.is_none(),
            _ => false,
        }
    }
}
