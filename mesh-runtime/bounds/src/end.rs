//! When a connection has to end whatever it carries: what its peer proved it with is over.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Ready once, and from then on.
pub struct End {
    overdue: Pin<Box<Sleep>>,
    revoked: Pin<Box<WaitForCancellationFutureOwned>>,
    over: bool,
}

impl End {
    /// After `left`, or when `revoked` is cancelled.
    pub fn new(left: Duration, revoked: CancellationToken) -> Self {
        Self {
            overdue: Box::pin(sleep(left)),
            revoked: Box::pin(revoked.cancelled_owned()),
            over: false,
        }
    }

    /// Whether it has come. If not, its task is woken when it does.
    pub fn has_come(&mut self, cx: &mut Context<'_>) -> bool {
        self.over = self.over
            || self.overdue.as_mut().poll(cx) != Poll::Pending
            || self.revoked.as_mut().poll(cx) != Poll::Pending;
        self.over
    }

    /// What is read of a connection that has ended so.
    pub fn error() -> std::io::Error {
        std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            "the certificate that the connection was made with is over",
        )
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End")
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn come(end: &mut End) {
        poll_fn(|cx| {
            if end.has_come(cx) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn it_comes_in_time_or_when_it_is_said() {
        let minute = Duration::from_secs(60);
        let mut end = End::new(minute, CancellationToken::new());
        assert!(
            tokio::time::timeout(minute - Duration::from_secs(1), come(&mut end))
                .await
                .is_err()
        );
        come(&mut end).await;
        come(&mut end).await;
        let revoked = CancellationToken::new();
        let mut end = End::new(minute, revoked.clone());
        revoked.cancel();
        assert!(
            tokio::time::timeout(Duration::from_secs(1), come(&mut end))
                .await
                .is_ok()
        );
    }
}
