//! Why a host did not take a sandbox. An answer, not an error: the placer tries
//! elsewhere or tells the user.

use crate::{Resources, wire};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// A newer attempt is or was on this host.
    OlderAttempt,
    /// This attempt was here and has been forgotten.
    EndedAttempt,
    /// This attempt is here with another spec.
    SpecConflict,
    /// Something is short; see [`Refusal::free`].
    NoRoom,
    /// `ConfigureTenant` has not been called.
    UnknownTenant,
    /// The host takes no new sandboxes.
    Draining,
    /// The host lacks what the spec asks for.
    Unsupported,
    /// No claim in the cell for this attempt is bound to this host.
    NoClaim,
    /// The spec asks for more than its claim in the cell.
    ExceedsClaim,
    /// The host's operator does not allow what the spec asks for. The pool has one
    /// operator: no other host is asked.
    Forbidden,
    /// A reason of a newer agent.
    Unknown,
}

impl RefusalReason {
    /// Whether another host may take the same sandbox.
    pub fn another_host_may_accept(self) -> bool {
        matches!(
            self,
            Self::NoRoom
                | Self::Draining
                | Self::Unsupported
                | Self::Unknown
                | Self::UnknownTenant
                | Self::NoClaim
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub reason: RefusalReason,
    pub message: String,
    pub free: Resources,
}

impl From<wire::Refused> for Refusal {
    fn from(refused: wire::Refused) -> Self {
        use wire::RefusalReason as W;
        let reason = match refused.reason() {
            W::OlderAttempt => RefusalReason::OlderAttempt,
            W::EndedAttempt => RefusalReason::EndedAttempt,
            W::SpecConflict => RefusalReason::SpecConflict,
            W::NoRoom => RefusalReason::NoRoom,
            W::UnknownTenant => RefusalReason::UnknownTenant,
            W::Draining => RefusalReason::Draining,
            W::Unsupported => RefusalReason::Unsupported,
            W::NoClaim => RefusalReason::NoClaim,
            W::ExceedsClaim => RefusalReason::ExceedsClaim,
            W::Forbidden => RefusalReason::Forbidden,
            W::Unspecified => RefusalReason::Unknown,
        };
        Self {
            reason,
            message: refused.message,
            free: refused.free.unwrap_or_default().into(),
        }
    }
}

impl From<Refusal> for wire::Refused {
    fn from(refusal: Refusal) -> Self {
        use wire::RefusalReason as W;
        let reason = match refusal.reason {
            RefusalReason::OlderAttempt => W::OlderAttempt,
            RefusalReason::EndedAttempt => W::EndedAttempt,
            RefusalReason::SpecConflict => W::SpecConflict,
            RefusalReason::NoRoom => W::NoRoom,
            RefusalReason::UnknownTenant => W::UnknownTenant,
            RefusalReason::Draining => W::Draining,
            RefusalReason::Unsupported => W::Unsupported,
            RefusalReason::NoClaim => W::NoClaim,
            RefusalReason::ExceedsClaim => W::ExceedsClaim,
            RefusalReason::Forbidden => W::Forbidden,
            RefusalReason::Unknown => W::Unspecified,
        };
        Self {
            reason: reason.into(),
            message: refusal.message,
            free: Some(refusal.free.into()),
        }
    }
}
