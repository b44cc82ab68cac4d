//! Bounds of what one tenant's API server can make this process hold: requests that
//! wait for it, and bytes that it sends without an end.
//!
//! The client reads an answer whole, and a watch line by line; neither has a bound of
//! its own. A server that sends on and on would have all the memory there is.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::Semaphore;
use tower::{BoxError, Layer, Service};

/// Requests that wait for the server's first word, or for their turn: as many as an API
/// server's fairness gives one user without queueing, and half as many again.
const WAITING: usize = 48;
/// Bytes without an end of line: of an answer as a whole, which is one line, and of
/// each line of a watch. A page of 500 pods of 30 kB, and as much again; the API server
/// takes no object above 3 MB.
const LINE: usize = 32 << 20;

#[derive(Clone)]
pub(super) struct Bounding {
    waiting: Arc<Semaphore>,
}

impl Bounding {
    pub(super) fn new() -> Self {
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
        }
    }
}

impl<S> Layer<S> for Bounding {
    type Service = Bounded<S>;

    fn layer(&self, inner: S) -> Bounded<S> {
        Bounded {
            inner,
            waiting: self.waiting.clone(),
        }
    }
}

pub(super) struct Bounded<S> {
    inner: S,
    waiting: Arc<Semaphore>,
}

impl<S, A, B> Service<Request<A>> for Bounded<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = Response<Lines<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let waiting = self.waiting.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let _turn = waiting.acquire_owned().await?;
            let answer = answer.await.map_err(Into::into)?;
            Ok(answer.map(|body| Lines { body, line: 0 }))
        })
    }
}

/// A body of which no line is too long.
pub(super) struct Lines<B> {
    body: B,
    /// Bytes since the last end of a line.
    line: usize,
}

impl<B> Body for Lines<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else {
            return Poll::Ready(None);
        };
        let frame = frame.map_err(Into::into)?;
        if let Some(data) = frame.data_ref() {
            self.line = match data.iter().rposition(|byte| *byte == b'\n') {
                Some(end) => data.len() - end - 1,
                None => self.line + data.len(),
            };
            if self.line > LINE {
                let problem = format!(
                    "the API server sent {} bytes without an end: over {LINE}",
                    self.line
                );
                return Poll::Ready(Some(Err(io::Error::other(problem).into())));
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn body(
        chunk: &'static [u8],
        chunks: usize,
    ) -> Lines<impl Body<Data = Bytes, Error = io::Error> + Unpin> {
        let frames = (0..chunks).map(move |_| Ok(Frame::data(Bytes::from_static(chunk))));
        Lines {
            body: StreamBody::new(futures::stream::iter(frames)),
            line: 0,
        }
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_cut_off_and_a_long_watch_is_not() {
        static DUMB: [u8; 1 << 20] = [b'x'; 1 << 20];
        let error = body(&DUMB, LINE / DUMB.len() + 1).collect().await.unwrap_err();
        assert!(error.to_string().contains("without an end"), "{error}");
        body(&DUMB, LINE / DUMB.len()).collect().await.unwrap();
        static LINES: [u8; 1 << 20] = [b'\n'; 1 << 20];
        body(&LINES, LINE / LINES.len() + 8).collect().await.unwrap();
    }

    #[tokio::test]
    async fn no_more_requests_than_that_wait_for_a_server_that_hangs() {
        use futures::future::join_all;
        use std::sync::atomic::{AtomicUsize, Ordering};

        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let hangs = tower::service_fn(|_: Request<()>| async {
            ASKED.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<Result<Response<Lines<http_body_util::Empty<Bytes>>>, io::Error>>().await
        });
        let mut client = Bounding::new().layer(hangs);
        let asking = (0..WAITING * 3).map(|_| client.call(Request::new(())));
        let asking = join_all(asking.collect::<Vec<_>>());
        let hung = tokio::time::timeout(std::time::Duration::from_millis(200), asking).await;
        assert!(hung.is_err());
        assert_eq!(ASKED.load(Ordering::SeqCst), WAITING);
    }
}
