//! Calls under way, bounded for each tenant by kind, so that one who asks without end
//! keeps nobody else waiting.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bounds::{Budget, Level, Path, Place, Rule, Shared, Step};
use pool_agent_api::TenantId;
use tokio_stream::Stream;
use tonic::Status;

use crate::policy::bounds::{Callers, STREAMS_PER_HOST};

/// Calls with one answer, of all tenants. They hold memory, not descriptors.
const CALLS_PER_HOST: u32 = 4096;
/// A tenant that is alone may hold this many times what it leaves.
const GREED: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// With one answer.
    Call,
    Watch,
    Logs,
    Splice,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Call => "calls",
            Self::Watch => "watches",
            Self::Logs => "logs",
            Self::Splice => "splices",
        }
    }
}

pub struct Calls {
    limits: Callers,
    calls: Shared<TenantId>,
    watches: Shared<TenantId>,
    logs: Shared<TenantId>,
    splices: Shared<TenantId>,
}

/// A call under way.
pub(super) type Call = Place<TenantId>;

impl Calls {
    pub fn new(limits: Callers, shown: &bounds::Bounds) -> Self {
        let of = |kind: Kind, capacity| {
            let shared = Shared::new(Budget::new(capacity, 0));
            shown.show(kind.name(), shared.clone());
            shared
        };
        Self {
            limits,
            calls: of(Kind::Call, CALLS_PER_HOST),
            watches: of(Kind::Watch, STREAMS_PER_HOST),
            logs: of(Kind::Logs, STREAMS_PER_HOST),
            splices: of(Kind::Splice, STREAMS_PER_HOST),
        }
    }

    pub(super) fn begin(&self, tenant: &TenantId, kind: Kind) -> Result<Call, Status> {
        let (shared, limit) = match kind {
            Kind::Call => (&self.calls, self.limits.calls_per_tenant),
            Kind::Watch => (&self.watches, self.limits.watches_per_tenant),
            Kind::Logs => (&self.logs, self.limits.logs_per_tenant),
            Kind::Splice => (&self.splices, self.limits.splices_per_tenant),
        };
        let step = Step {
            key: tenant.clone(),
            level: Level::Tenant,
            rule: Rule {
                promised: 0,
                limit,
                greed: GREED,
            },
        };
        let path = Path {
            trunk: Arc::from([step]),
            leaf: None,
        };
        shared.take(path).map_err(|level| {
            Status::resource_exhausted(format!(
                "the {level}'s share of {} is used up: end some, or try again later",
                kind.name()
            ))
        })
    }
}

/// A stream that is a call under way until it is dropped.
pub struct Counted<S> {
    stream: S,
    _call: Call,
}

impl<S> Counted<S> {
    pub(super) fn new(stream: S, call: Call) -> Self {
        Self { stream, _call: call }
    }
}

impl<S: Stream + Unpin> Stream for Counted<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        Pin::new(&mut self.stream).poll_next(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::bounds::Bounds;

    #[test]
    fn a_tenant_that_asks_without_end_is_refused_alone() {
        let calls = Calls::new(Bounds::default().callers(), &bounds::Bounds::default());
        let tenant = |name: &str| name.parse::<TenantId>().unwrap();
        let (greedy, modest) = (tenant("greedy"), tenant("modest"));
        for kind in [Kind::Call, Kind::Watch, Kind::Logs, Kind::Splice] {
            let mut held = vec![];
            let status = loop {
                match calls.begin(&greedy, kind) {
                    Ok(call) => held.push(call),
                    Err(status) => break status,
                }
            };
            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
            assert!(status.message().contains("tenant's share"), "{status}");
            assert!(calls.begin(&modest, kind).is_ok());
            held.pop();
            assert!(calls.begin(&greedy, kind).is_ok(), "one has ended");
        }
    }
}
