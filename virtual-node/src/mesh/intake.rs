//! What a host may have under way here: a layer beneath the services of [`super`].
//! A stream of xDS is counted when its headers are there, and each message is paid for
//! as it arrives ([`bounds::intake`]), so that a host that was stolen fills no memory.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bounds::{
    Bounds, Budget, Level, Path, Rule, Shared, Step,
    intake::{Metered, Overrun, PAGE, Paid, Sends},
};
use futures::future::{Either, Ready, ready};
use http::{Request, Response};
use pool_agent_api::HostName;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{MAX_CSR_REQUEST, MAX_XDS_REQUEST, listener::PeerHost};

/// xDS streams of one host: its agent's, and those of agents that ended which are not
/// gone yet. Each remembers what its client says that it holds.
const STREAMS_OF_ONE_HOST: u32 = 4;
/// Of all hosts: as many as have connections.
const STREAMS: u32 = 2048;
/// Bytes of messages that are not read yet, of one host and of all. All hosts of a pool
/// come back at once after a restart, each with what it holds.
const BYTES_OF_ONE_HOST: usize = 2 * MAX_XDS_REQUEST;
const BYTES: usize = 16 * MAX_XDS_REQUEST;
/// For a CSR to be there.
const PATIENCE: Duration = Duration::from_secs(30);

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Intake {
    streams: Shared<HostName>,
    messages: Shared<HostName>,
}

impl Intake {
    pub(super) fn new(shown: &Bounds) -> Self {
        let intake = Self {
            streams: Shared::new(Budget::new(STREAMS, 0)),
            messages: Shared::new(Budget::new((BYTES / PAGE) as u32, 0)),
        };
        shown.show("xds_streams", intake.streams.clone());
        shown.show("message_pages", intake.messages.clone());
        intake
    }

    pub(super) fn admit(&self, request: Request<Body>) -> Result<Request<Body>, Status> {
        let Some(PeerHost(host)) = request.extensions().get().cloned() else {
            return Err(Status::unauthenticated(
                "the connection has no host's certificate",
            ));
        };
        let xds = request.uri().path().ends_with("AggregatedResources");
        let (sends, stream) = if xds {
            let place = self.streams.take(share(&host, STREAMS_OF_ONE_HOST));
            let place = place.map_err(|level| {
                Status::resource_exhausted(format!("the {level}'s share of xDS streams is used up: end some"))
            })?;
            let longest = MAX_XDS_REQUEST;
            (Sends::Many { longest }, Some(place))
        } else {
            let (longest, within) = (MAX_CSR_REQUEST, PATIENCE);
            (Sends::One { longest, within }, None)
        };
        let path = share(&host, (BYTES_OF_ONE_HOST / PAGE) as u32);
        let paid = Arc::new(Paid::new(self.messages.clone(), path));
        Ok(request.map(|body| Body::new(Metered::new((body, refused), sends, paid, stream))))
    }
}

fn share(host: &HostName, limit: u32) -> Path<HostName> {
    let step = Step {
        key: host.clone(),
        level: Level::Peer,
        rule: Rule { limit, ..Rule::FAIR },
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

impl<S> Layer<S> for Intake {
    type Service = Bounded<S>;

    fn layer(&self, inner: S) -> Bounded<S> {
        Bounded {
            intake: self.clone(),
            inner,
        }
    }
}

/// A service that is asked no more than a host may ask.
#[derive(Clone)]
pub(super) struct Bounded<S> {
    intake: Intake,
    inner: S,
}

impl<S> Service<Request<Body>> for Bounded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.intake.admit(request) {
            Ok(request) => Either::Left(self.inner.call(request)),
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}
