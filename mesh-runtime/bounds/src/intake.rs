//! What a caller's message takes of memory, counted as it arrives: a gRPC server
//! gathers a whole message before anybody is asked whether it is wanted.
//!
//! [`Meter`] knows where messages begin and end, and is pure; [`Metered`] is a body that
//! takes [`PAGE`]s from a [`Shared`] for what it lets through, and gives its reader an
//! error for what it does not.
//!
//! What always holds: of a caller's messages no more is in memory than its share, but
//! for what the transport's window lets in unread; a message that is to be read whole
//! has a deadline.

use std::{
    hash::Hash,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use crate::{Holding, Level, Path, Shared};

/// Bytes that one place in a budget stands for.
pub const PAGE: usize = 64 << 10;
/// What gRPC puts before a message: a flag, and its length in four bytes.
const HEAD: usize = 5;

/// How a call sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sends {
    /// One message, which has to be there in time. It is paid for as long as the call
    /// goes on.
    One { longest: usize, within: Duration },
    /// Messages without end, one after the other. Each is paid for until the next one
    /// is asked for.
    Many { longest: usize },
}

/// Why a message is not read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Overrun {
    #[error("a message of this call may have {0} bytes at most")]
    TooLong(usize),
    #[error("the message was not there within {} s", .0.as_secs())]
    TooSlow(Duration),
    #[error("the {0}'s share of memory for messages is used up: try again later")]
    Share(Level),
}

/// What a call has in memory. Shared by its body and by whoever serves it.
#[derive(Debug)]
pub struct Paid<K: Eq + Hash + Clone>(Mutex<Holding<K>>);

impl<K: Eq + Hash + Clone> Paid<K> {
    /// Takes from `shared`, along `path`.
    pub fn new(shared: Shared<K>, path: Path<K>) -> Self {
        Self(Mutex::new(Holding::new(shared, path)))
    }

    fn hold(&self, bytes: usize) -> Result<(), Level> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.resize(bytes.div_ceil(PAGE))
    }
}

/// Where in a stream of gRPC messages one is.
#[derive(Debug)]
struct Meter {
    sends: Sends,
    head: [u8; HEAD],
    /// Bytes of the message under way that have come, its head with them.
    come: usize,
    /// How long that message is in all, once its head is there.
    length: usize,
    /// Bytes of all messages.
    total: usize,
}

impl Meter {
    fn new(sends: Sends) -> Self {
        Self {
            sends,
            head: [0; HEAD],
            come: 0,
            length: 0,
            total: 0,
        }
    }

    /// What its reader holds when it asks for more.
    fn kept(&self) -> usize {
        match self.sends {
            Sends::One { .. } => self.total,
            Sends::Many { .. } => self.come,
        }
    }

    /// Takes `bytes` in. The answer is what is in memory with them.
    fn pass(&mut self, mut bytes: &[u8]) -> Result<usize, Overrun> {
        let held = self.kept().saturating_add(bytes.len());
        let (Sends::One { longest, .. } | Sends::Many { longest }) = self.sends;
        self.total = self.total.saturating_add(bytes.len());
        if matches!(self.sends, Sends::One { .. }) && self.total > longest.saturating_add(HEAD) {
            return Err(Overrun::TooLong(longest));
        }
        while !bytes.is_empty() {
            if self.come < HEAD {
                let (now, later) = bytes.split_at(bytes.len().min(HEAD - self.come));
                self.head[self.come..self.come + now.len()].copy_from_slice(now);
                self.come += now.len();
                bytes = later;
                if self.come < HEAD {
                    break;
                }
                let [_, a, b, c, d] = self.head;
                let declared = u32::from_be_bytes([a, b, c, d]) as usize;
                if declared > longest {
                    return Err(Overrun::TooLong(longest));
                }
                self.length = HEAD + declared;
            }
            let now = bytes.len().min(self.length - self.come);
            self.come += now;
            bytes = &bytes[now..];
            if self.come == self.length {
                self.come = 0;
            }
        }
        Ok(held)
    }
}

/// A request's body that pays for what it lets through. `C` is kept until it goes.
pub struct Metered<B: Body, K: Eq + Hash + Clone, C> {
    body: B,
    refuse: fn(Overrun) -> B::Error,
    meter: Meter,
    paid: Arc<Paid<K>>,
    overdue: Option<Pin<Box<Sleep>>>,
    broken: bool,
    _kept: C,
}

impl<B: Body, K: Eq + Hash + Clone, C> Metered<B, K, C> {
    /// `refuse` makes of an overrun the error that its reader knows.
    pub fn new(
        (body, refuse): (B, fn(Overrun) -> B::Error),
        sends: Sends,
        paid: Arc<Paid<K>>,
        kept: C,
    ) -> Self {
        let overdue = match sends {
            Sends::One { within, .. } => Some(Box::pin(sleep(within))),
            Sends::Many { .. } => None,
        };
        Self {
            body,
            refuse,
            meter: Meter::new(sends),
            paid,
            overdue,
            broken: false,
            _kept: kept,
        }
    }

    fn late(&mut self, cx: &mut Context<'_>) -> Option<Overrun> {
        let overdue = self.overdue.as_mut()?;
        match (overdue.as_mut().poll(cx), self.meter.sends) {
            (Poll::Ready(()), Sends::One { within, .. }) => Some(Overrun::TooSlow(within)),
            _ => None,
        }
    }

    fn pay(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        let held = self.meter.pass(bytes)?;
        self.paid.hold(held).map_err(Overrun::Share)
    }
}

impl<B, K, C> Body for Metered<B, K, C>
where
    B: Body<Data = Bytes> + Unpin,
    K: Eq + Hash + Clone + Unpin,
    C: Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if this.broken {
            return Poll::Ready(None);
        }
        if matches!(this.meter.sends, Sends::Many { .. }) {
            // Whole messages have been taken out: asking for more says so.
            // No more than before, which cannot be refused.
            let _given_back = this.paid.hold(this.meter.kept()).is_ok();
        }
        let overrun = match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Pending => match this.late(cx) {
                Some(late) => late,
                None => return Poll::Pending,
            },
            ready => {
                let frame = match ready!(ready) {
                    Some(Ok(frame)) => frame,
                    other => return Poll::Ready(other),
                };
                let paid = match frame.data_ref() {
                    // Bytes that trickle in keep it from waiting, not from being late.
                    Some(bytes) => match this.late(cx) {
                        None => this.pay(bytes),
                        Some(late) => Err(late),
                    },
                    None => Ok(()),
                };
                match paid {
                    Ok(()) => return Poll::Ready(Some(Ok(frame))),
                    Err(overrun) => overrun,
                }
            }
        };
        this.broken = true;
        Poll::Ready(Some(Err((this.refuse)(overrun))))
    }

    fn is_end_stream(&self) -> bool {
        self.broken || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
