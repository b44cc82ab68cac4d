//! How pulls end, and how often an image that is there had to be proven.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::{ImageError, Pulled};

#[derive(Debug)]
pub(super) struct Metrics {
    pulls: Family<Ended, Counter>,
    unproven: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    outcome: Outcome,
}

/// What a pull came to. One that nobody waited for any more is not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub(super) enum Outcome {
    pulled,
    failed,
    /// The registry's name led where none may be.
    forbidden,
    /// Too many of the tenant waited.
    refused,
}

impl Outcome {
    pub(super) fn of(pulled: &Pulled) -> Self {
        match pulled {
            Ok(_) => Self::pulled,
            Err(ImageError::NamedAstray(_) | ImageError::ResolvedAstray(_)) => Self::forbidden,
            Err(ImageError::TooMany(_)) => Self::refused,
            Err(_) => Self::failed,
        }
    }
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            pulls: Family::default(),
            unproven: Counter::default(),
        };
        registry.register(
            "pool_agent_image_pulls",
            "Image pulls that ended, by outcome",
            metrics.pulls.clone(),
        );
        registry.register(
            "pool_agent_images_unproven",
            "Images that were on the host and that the tenant had not proven access to",
            metrics.unproven.clone(),
        );
        metrics
    }

    pub(super) fn ended(&self, outcome: Outcome) {
        self.pulls.get_or_create(&Ended { outcome }).inc();
    }

    pub(super) fn unproven(&self) {
        self.unproven.inc();
    }
}
