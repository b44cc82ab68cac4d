//! How far a pod is in the mesh: a pure state machine, driven by `runtime`.
//!
//! ```text
//!            attach                    certificate            mesh state
//!            redirected                in hand (1)            in hand
//!  Detached ───────────▶ Redirected ──────────────▶ Identified ──────────▶ Serving
//!     ▲                    │     ▲                      │                     │
//!     │                    │     └────── certificate expired ─────────────────┤
//!     │  drained           ▼ drain                      ▼ drain               ▼ drain
//!     └──────────────── Draining ◀──────────────────────┴─────────────────────┘
//!
//!  (1) an unmeshed pod has no identity and needs none
//! ```
//!
//! What always holds:
//! - the proxy knows a pod before the kernel sends it the pod's connections, and
//!   has let them end before the kernel drops the pod's packets (in between, it
//!   resets what comes from a pod it has forgotten);
//! - no container starts before `Serving`: the agent waits for it;
//! - an attachment that drained stays `Detached`; the next attempt has another.

use crate::pod::Mode;

/// As the agent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AttachmentState {
    /// Nothing is in place; what a device of it sends is dropped.
    Detached,
    /// Every packet of the pod is the proxy's or dropped.
    Redirected,
    /// The pod's certificate is in hand.
    Identified,
    /// Workloads and services are known too: its connections go through.
    Serving,
    /// New connections are refused, old ones may end.
    Draining,
}

impl AttachmentState {
    pub const ALL: [Self; 5] = [
        Self::Detached,
        Self::Redirected,
        Self::Identified,
        Self::Serving,
        Self::Draining,
    ];

    /// As a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Detached => "detached",
            Self::Redirected => "redirected",
            Self::Identified => "identified",
            Self::Serving => "serving",
            Self::Draining => "draining",
        }
    }
}

/// What happened, or is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The agent wants the pod in the mesh.
    Attach,
    /// The effects of `Attach` are done.
    Redirected,
    CertificateHeld,
    /// It expired, and no other has come.
    CertificateLost,
    /// The first snapshot of workloads and services is here.
    Synced,
    /// The agent wants the pod out of the mesh.
    Drain,
    /// The effects of `Drain` are done.
    Drained,
}

/// What is to be done, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Tell the proxy of the pod; it asks for the certificate.
    AddToProxy,
    /// Write the pod's entry and put the program on its device.
    Redirect,
    /// No new connections; wait until the old ones ended, or their time is up.
    RemoveFromProxy,
    /// Take the pod's entry away: everything is dropped from now on.
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an attachment that is {} does not take {event:?}", state.name())]
pub struct Refusal {
    pub state: AttachmentState,
    pub event: Event,
}

/// One pod's attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    mode: Mode,
    phase: Phase,
    held: bool,
    synced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    New,
    /// The effects of `Attach` are under way.
    Attaching,
    Attached,
    Draining,
    Ended,
}

impl Attachment {
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            phase: Phase::New,
            held: false,
            synced: false,
        }
    }

    pub fn state(self) -> AttachmentState {
        let identified = self.held || self.mode == Mode::Unmeshed;
        match self.phase {
            Phase::New | Phase::Attaching | Phase::Ended => AttachmentState::Detached,
            Phase::Attached if !identified => AttachmentState::Redirected,
            Phase::Attached if !self.synced => AttachmentState::Identified,
            Phase::Attached => AttachmentState::Serving,
            Phase::Draining => AttachmentState::Draining,
        }
    }

    /// Takes an event, or refuses it and stays as it is.
    pub fn step(self, event: Event) -> Result<(Self, Vec<Effect>), Refusal> {
        use Phase::{Attached, Attaching, Draining, Ended, New};
        let (phase, effects) = match (self.phase, event) {
            (New, Event::Attach) => (Attaching, vec![Effect::AddToProxy, Effect::Redirect]),
            (Attaching, Event::Redirected) => (Attached, vec![]),
            // Also when attaching broke off half-way: nothing of it stays.
            (Attaching | Attached, Event::Drain) => (Draining, vec![Effect::RemoveFromProxy, Effect::Drop]),
            (New, Event::Drain) => (Ended, vec![]),
            (Draining, Event::Drained) => (Ended, vec![]),
            // Asked again: already done, or being done.
            (Attaching | Attached, Event::Attach) | (Draining | Ended, Event::Drain) => (self.phase, vec![]),
            // Facts may come at any time; what they mean is up to `state`.
            (phase, Event::CertificateHeld | Event::CertificateLost | Event::Synced) => (phase, vec![]),
            _ => {
                return Err(Refusal {
                    state: self.state(),
                    event,
                });
            }
        };
        let next = Self {
            phase,
            held: match event {
                Event::CertificateHeld => true,
                Event::CertificateLost => false,
                _ => self.held,
            },
            synced: self.synced || event == Event::Synced,
            ..self
        };
        Ok((next, effects))
    }
}

#[cfg(test)]
mod tests;
