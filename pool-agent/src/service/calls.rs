//! Calls under way, bounded for each tenant by kind, so that one who asks without end
//! keeps nobody else waiting; and what they send, bounded in memory.
//!
//! [`Calls`] is a layer beneath the service: a call is counted when its headers are
//! there, before any of its message is read, and its message is paid for as it arrives
//! ([`bounds::intake`]). The service finds its [`Call`] in the request's extensions and
//! keeps it until what was asked for is done.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bounds::{
    Budget, Level, Path, Place, Rule, Shared, Step,
    intake::{Metered, Overrun, PAGE, Paid, Sends},
};
use futures::future::{Either, Ready, ready};
use pool_agent_api::TenantId;
use tokio_stream::Stream;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{Caller, MAX_MESSAGE};
use crate::policy::bounds::{Callers, STREAMS_PER_HOST};

/// Calls with one answer, of all tenants. They hold memory, not descriptors.
const CALLS_PER_HOST: u32 = 4096;
/// A tenant that is alone may hold this many times what it leaves.
const GREED: u32 = 4;
/// For a call's message to be there: half a megabyte each second, at the largest.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of a message with no contents of files: a tenant's settings, a key, a question.
const MAX_QUESTION: usize = 64 << 10;
/// Of a frame of a spliced stream, whose command and headers are in the first.
const MAX_FRAME: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With one answer.
    Call,
    Watch,
    /// As many as watches: each session has one of both.
    Grants,
    Logs,
    Splice,
}

impl Kind {
    /// By the method's name. What there is no such method for is answered by tonic, and
    /// counts meanwhile as any.
    fn of(method: &str) -> Self {
        match method {
            "Watch" => Self::Watch,
            "Grant" => Self::Grants,
            "Logs" => Self::Logs,
            "Splice" => Self::Splice,
            _ => Self::Call,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Call => "calls",
            Self::Watch => "watches",
            Self::Grants => "grants",
            Self::Logs => "logs",
            Self::Splice => "splices",
        }
    }
}

fn sends(method: &str) -> Sends {
    match method {
        "StartSandbox" | "UpdateSandbox" => Sends::One {
            longest: MAX_MESSAGE,
            within: PATIENCE,
        },
        "Splice" => Sends::Many { longest: MAX_FRAME },
        "Grant" => Sends::Many {
            longest: MAX_QUESTION,
        },
        _ => Sends::One {
            longest: MAX_QUESTION,
            within: PATIENCE,
        },
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Calls {
    limits: Callers,
    calls: Shared<TenantId>,
    watches: Shared<TenantId>,
    grants: Shared<TenantId>,
    logs: Shared<TenantId>,
    splices: Shared<TenantId>,
    /// Of [`PAGE`] bytes each.
    messages: Shared<TenantId>,
}

/// A call under way, with what it has sent. Lasts as long as any clone of it.
#[derive(Debug, Clone)]
pub(super) struct Call {
    _place: Arc<Place<TenantId>>,
    paid: Arc<Paid<TenantId>>,
}

impl Calls {
    pub fn new(limits: Callers, shown: &bounds::Bounds) -> Self {
        let of = |name: &'static str, capacity| {
            let shared = Shared::new(Budget::new(capacity, 0));
            shown.show(name, shared.clone());
            shared
        };
        Self {
            limits,
            calls: of(Kind::Call.name(), CALLS_PER_HOST),
            watches: of(Kind::Watch.name(), STREAMS_PER_HOST),
            grants: of(Kind::Grants.name(), STREAMS_PER_HOST),
            logs: of(Kind::Logs.name(), STREAMS_PER_HOST),
            splices: of(Kind::Splice.name(), STREAMS_PER_HOST),
            messages: of("message_pages", pages(limits.message_mib)),
        }
    }

    fn begin(&self, tenant: &TenantId, kind: Kind) -> Result<Call, Status> {
        let (shared, limit) = match kind {
            Kind::Call => (&self.calls, self.limits.calls_per_tenant),
            Kind::Watch => (&self.watches, self.limits.watches_per_tenant),
            Kind::Grants => (&self.grants, self.limits.watches_per_tenant),
            Kind::Logs => (&self.logs, self.limits.logs_per_tenant),
            Kind::Splice => (&self.splices, self.limits.splices_per_tenant),
        };
        let place = shared.take(share(tenant, limit)).map_err(|level| {
            Status::resource_exhausted(format!(
                "the {level}'s share of {} is used up: end some, or try again later",
                kind.name()
            ))
        })?;
        let path = share(tenant, pages(self.limits.message_mib_per_tenant));
        Ok(Call {
            _place: Arc::new(place),
            paid: Arc::new(Paid::new(self.messages.clone(), path)),
        })
    }

    /// The request as the service gets it.
    fn admit(&self, request: http::Request<Body>) -> Result<http::Request<Body>, Status> {
        let Some(Caller(tenant)) = request.extensions().get().cloned() else {
            return Err(Status::unauthenticated("the connection has no tenant"));
        };
        let path = request.uri().path();
        let method = path.rsplit_once('/').map_or(path, |(_, method)| method);
        let (kind, sends) = (Kind::of(method), sends(method));
        let call = self.begin(&tenant, kind)?;
        let (mut parts, body) = request.into_parts();
        let body = Metered::new((body, refused), sends, call.paid.clone(), call.clone());
        parts.extensions.insert(call);
        Ok(http::Request::from_parts(parts, Body::new(body)))
    }
}

fn pages(mib: u32) -> u32 {
    mib.saturating_mul(((1 << 20) / PAGE) as u32)
}

fn share(tenant: &TenantId, limit: u32) -> Path<TenantId> {
    let step = Step {
        key: tenant.clone(),
        level: Level::Tenant,
        rule: Rule {
            promised: 0,
            limit,
            greed: GREED,
        },
    };
    Path {
        trunk: Arc::from([step]),
        leaf: None,
    }
}

fn refused(overrun: Overrun) -> Status {
    let message = overrun.to_string();
    match overrun {
        Overrun::TooLong(_) => Status::out_of_range(message),
        Overrun::TooSlow(_) => Status::deadline_exceeded(message),
        Overrun::Share(_) => Status::resource_exhausted(message),
    }
}

impl<S> Layer<S> for Calls {
    type Service = CountedCalls<S>;

    fn layer(&self, inner: S) -> CountedCalls<S> {
        CountedCalls {
            calls: self.clone(),
            inner,
        }
    }
}

/// A service whose calls are counted.
#[derive(Clone)]
pub struct CountedCalls<S> {
    calls: Calls,
    inner: S,
}

impl<S> Service<http::Request<Body>> for CountedCalls<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<http::Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self.calls.admit(request) {
            Ok(request) => Either::Left(self.inner.call(request)),
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
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
mod tests;
