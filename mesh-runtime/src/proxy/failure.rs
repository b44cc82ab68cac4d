//! Why a connection was not carried, and how that is told.

use std::sync::Arc;

use mesh_api::Identity;

use super::{dial::DialError, hbone::TunnelError};
use crate::off_limits::Refused;
use crate::{balance::NoEndpoint, limits::UsedUp, policy::Verdict, state::Unsupported, telemetry::Flag};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("refused: {0}")]
    Refused(#[from] Refused),
    #[error("the mesh's state has not arrived")]
    NoState,
    #[error("the pod's certificate has not arrived")]
    NoCertificate,
    #[error("no workload has this address")]
    UnknownPod,
    #[error("another pod has this address by now")]
    OtherPod,
    #[error("the pod's own workload has not arrived")]
    UnknownSelf,
    #[error("the destination cannot be reached from here: {0}")]
    Unsupported(Unsupported),
    #[error("no endpoint: {0}")]
    NoEndpoint(#[from] NoEndpoint),
    #[error("denied by policy {by}")]
    Denied { by: Arc<str> },
    #[error("allowed by no policy")]
    NotAllowed,
    #[error("cannot dial: {}", causes(.0))]
    Dial(#[from] DialError),
    #[error("no tunnel: {}", causes(&**.0))]
    Tunnel(#[from] Arc<TunnelError>),
    #[error("the tunnel to {expected} broke: {source}")]
    TunnelBroke { expected: Identity, source: h2::Error },
    #[error("the far side refused by its policy")]
    DeniedThere,
    #[error("the far side answered {status}")]
    Answer { status: http::StatusCode },
    #[error("the far side did not answer in time")]
    NoAnswer,
    #[error("{0}")]
    Share(#[from] UsedUp),
    #[error("the connection broke: {0}")]
    Broken(#[from] super::copy::CopyError),
}

impl Failure {
    pub(crate) fn flag(&self) -> Flag {
        match self {
            Self::Refused(_) | Self::Unsupported(_) => Flag::NetworkPolicy,
            Self::NoCertificate => Flag::Identity,
            Self::Denied { .. } | Self::NotAllowed | Self::DeniedThere => Flag::Denied,
            Self::Tunnel(error) => error.flag(),
            Self::Broken(_) => Flag::None,
            Self::NoState
            | Self::UnknownPod
            | Self::OtherPod
            | Self::UnknownSelf
            | Self::NoEndpoint(_)
            | Self::Dial(_)
            | Self::TunnelBroke { .. }
            | Self::Answer { .. }
            | Self::Share(_)
            | Self::NoAnswer => Flag::Connect,
        }
    }

    /// Whether another endpoint may do better.
    pub(crate) fn is_the_endpoints(&self) -> bool {
        match self {
            Self::Dial(error) => error.is_the_peers(),
            Self::Tunnel(error) => error.is_the_peers(),
            // A pod of this host that is full.
            Self::Share(_) => true,
            Self::OtherPod | Self::TunnelBroke { .. } | Self::NoAnswer => true,
            // 503 says that the endpoint's application took no connection.
            Self::Answer { status } => *status == http::StatusCode::SERVICE_UNAVAILABLE,
            _ => false,
        }
    }
}

impl From<Verdict> for Result<(), Failure> {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allowed => Ok(()),
            Verdict::Denied { by } => Err(Failure::Denied { by }),
            Verdict::NotAllowed => Err(Failure::NotAllowed),
        }
    }
}

/// An error with all its sources, for a log line that stands alone.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
