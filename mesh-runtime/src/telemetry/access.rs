//! A line for each connection when it closes, under tracing's target `access`.
//!
//! Lines are queued, and written by a thread of their own: whoever reads the
//! process' output may stop doing so, and the data path must not stop with him.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, mpsc},
    time::Duration,
};

use mesh_api::Identity;
use prometheus_client::metrics::counter::Counter;

use super::Flag;

/// Lines that wait for the writer; a second's worth at a rate no log of this
/// kind is read at. Beyond it they are dropped and counted.
const QUEUE: usize = 8192;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A pod of this host is the client.
    Outbound,
    /// A pod of this host is the server.
    Inbound,
}

impl Direction {
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Whose connection it is.
#[derive(Debug)]
pub struct Access {
    pub direction: Direction,
    pub source: SocketAddr,
    pub source_workload: Option<Arc<str>>,
    pub source_namespace: Option<Arc<str>>,
    /// Verified by TLS (inbound), or that of this host's pod (outbound).
    pub source_identity: Option<Identity>,
    /// Where the application was reached, or was to be.
    pub destination: SocketAddr,
    /// The tunnel's far end.
    pub hbone: Option<SocketAddr>,
    pub destination_workload: Option<Arc<str>>,
    pub destination_namespace: Option<Arc<str>>,
    pub destination_identity: Option<Identity>,
    /// Host name.
    pub service: Option<Arc<str>>,
}

#[derive(Debug)]
pub(super) struct Line {
    pub(super) access: Box<Access>,
    pub(super) received: u64,
    pub(super) sent: u64,
    pub(super) duration: Duration,
    pub(super) flag: Flag,
    pub(super) error: Option<String>,
}

#[derive(Debug)]
pub(super) struct Log {
    /// Boxed, because the queue has its room from the start: 128 KiB of pointers,
    /// or most of a megabyte of lines.
    lines: mpsc::SyncSender<Box<Line>>,
    dropped: Counter,
}

impl Log {
    pub(super) fn start() -> Self {
        let (lines, queue) = mpsc::sync_channel::<Box<Line>>(QUEUE);
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        let dropped = Counter::default();
        let write = move || {
            tracing::dispatcher::with_default(&dispatch, || {
                for line in queue {
                    line.write();
                }
            });
        };
        if let Err(error) = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(write)
        {
            // The queue's receiver went with the closure: every line is counted
            // as dropped.
            tracing::error!(%error, "access log cannot be written");
        }
        Self { lines, dropped }
    }

    pub(super) fn write(&self, line: Line) {
        if self.lines.try_send(Box::new(line)).is_err() {
            self.dropped.inc();
        }
    }

    pub(super) fn dropped(&self) -> Counter {
        self.dropped.clone()
    }
}

/// Absent rather than empty.
fn shown<T: fmt::Display>(value: &Option<T>) -> Option<tracing::field::DisplayValue<&T>> {
    value.as_ref().map(tracing::field::display)
}

impl Line {
    fn write(&self) {
        let a = &*self.access;
        macro_rules! line {
            ($level:expr) => {
                tracing::event!(
                    target: "access",
                    $level,
                    direction = a.direction.name(),
                    src.addr = %a.source,
                    src.workload = a.source_workload.as_deref(),
                    src.namespace = a.source_namespace.as_deref(),
                    src.identity = shown(&a.source_identity),
                    dst.addr = %a.destination,
                    dst.hbone_addr = shown(&a.hbone),
                    dst.workload = a.destination_workload.as_deref(),
                    dst.namespace = a.destination_namespace.as_deref(),
                    dst.identity = shown(&a.destination_identity),
                    dst.service = a.service.as_deref(),
                    bytes_recv = self.received,
                    bytes_sent = self.sent,
                    duration_ms = self.duration.as_millis() as u64,
                    flags = self.flag.name(),
                    error = self.error.as_deref(),
                    "connection closed"
                )
            };
        }
        match self.error {
            None => line!(tracing::Level::INFO),
            Some(_) => line!(tracing::Level::ERROR),
        }
    }
}
