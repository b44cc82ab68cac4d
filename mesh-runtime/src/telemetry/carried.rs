//! Bytes that the mesh carried for one pod, from it and to it, whoever was the client.
//! Read by the agent, for the pod's usage.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts from the pod's attachment, or the agent's start if that came later.
#[derive(Debug, Default)]
pub struct Carried {
    sent: AtomicU64,
    received: AtomicU64,
}

/// Which end of a connection the pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

impl Carried {
    /// From the pod.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// To it.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(super) fn by_client(&self, side: Side, bytes: u64) {
        let way = match side {
            Side::Client => &self.sent,
            Side::Server => &self.received,
        };
        way.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn by_server(&self, side: Side, bytes: u64) {
        self.by_client(
            match side {
                Side::Client => Side::Server,
                Side::Server => Side::Client,
            },
            bytes,
        );
    }
}
