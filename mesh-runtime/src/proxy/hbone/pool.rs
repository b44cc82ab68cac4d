//! The tunnels of one pod, shared by its connections.
//!
//! ```text
//!  connection ─▶ a tunnel with room? ── yes ──▶ place in it
//!                    │ no
//!                    ▼
//!                an attempt with room? ── no ──▶ new attempt
//!                    │ yes                          │
//!                    └────────────▶ wait ◀──────────┘
//!                                    │ success: look again   failure: told to all who wait
//! ```
//!
//! What always holds: those who wait for the same peer wait for the same
//! attempt and share its failure, so a peer that swallows packets costs each of
//! them one timeout, not one for each before it; a client that gives up cancels
//! nothing for the others; tunnels and attempts grow with the open connections
//! and go with them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio_util::sync::CancellationToken;

use super::{
    SharedTunnelError, TunnelError,
    client::{self, Key, Source, Tunnel},
};
use crate::{
    limits::{Place, PodShares, UsedUp},
    proxy::dial::Dialer,
    telemetry::Metrics,
};

/// A tunnel without streams is kept this long for the next one.
const IDLE: Duration = Duration::from_secs(300);
/// Connections that one attempt may hope to carry; more begin another.
const HOPES: usize = 100;

pub(crate) struct Pool(Arc<Inner>);

struct Inner {
    dialer: Dialer,
    metrics: Arc<Metrics>,
    shares: Arc<PodShares>,
    peers: Mutex<HashMap<Key, Peer>>,
    closing: CancellationToken,
}

#[derive(Default)]
struct Peer {
    tunnels: Vec<Arc<Tunnel>>,
    attempts: Vec<Attempt>,
}

struct Attempt {
    id: u64,
    hopes: usize,
    outcome: Shared<BoxFuture<'static, Result<(), SharedTunnelError>>>,
}

impl Pool {
    /// `closing` ends it: no tunnel is opened any more, and idle ones go.
    pub(crate) fn new(
        dialer: Dialer,
        metrics: Arc<Metrics>,
        shares: Arc<PodShares>,
        closing: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            dialer,
            metrics,
            shares,
            peers: Mutex::default(),
            closing,
        }))
    }

    /// A place in a tunnel to `key`, opened as `source` if there is none.
    pub(crate) async fn place(&self, key: &Key, source: &Source) -> Result<client::Place, SharedTunnelError> {
        loop {
            if self.0.closing.is_cancelled() {
                return Err(Arc::new(TunnelError::Closed));
            }
            let outcome = {
                let mut peers = self.0.peers();
                let peer = peers.entry(key.clone()).or_default();
                if let Some(place) = peer.place(source) {
                    return Ok(place);
                }
                match peer.attempts.iter_mut().find(|a| a.hopes < HOPES) {
                    Some(attempt) => {
                        attempt.hopes += 1;
                        attempt.outcome.clone()
                    }
                    None => {
                        let attempt = self.attempt(key, source);
                        let outcome = attempt.outcome.clone();
                        peer.attempts.push(attempt);
                        outcome
                    }
                }
            };
            outcome.await?;
        }
    }

    /// Begins to dial. The task, not those who wait for it, carries the attempt.
    fn attempt(&self, key: &Key, source: &Source) -> Attempt {
        let id = rand::random();
        let (inner, key, source) = (self.0.clone(), key.clone(), source.clone());
        let task = tokio::spawn(async move {
            let _over = AttemptOver {
                inner: &inner,
                key: &key,
                id,
            };
            let place = inner.place().map_err(|e| Arc::new(e.into()))?;
            let opened = tokio::select! {
                opened = Tunnel::open(&inner.dialer, &key, &source, &inner.metrics, place) => opened,
                () = inner.closing.cancelled() => Err(TunnelError::Closed),
            };
            let tunnel = opened.map_err(Arc::new)?;
            inner
                .peers()
                .entry(key.clone())
                .or_default()
                .tunnels
                .push(tunnel.clone());
            tokio::spawn(retire(Arc::downgrade(&inner), key.clone(), tunnel));
            Ok(())
        });
        let outcome = async move { task.await.unwrap_or_else(|_| Err(Arc::new(TunnelError::Died))) };
        Attempt {
            id,
            hopes: 1,
            outcome: outcome.boxed().shared(),
        }
    }
}

impl Peer {
    /// In the tunnel with the fewest streams. A tunnel that was opened with an
    /// older certificate carries its streams to their ends, and no others. A newer
    /// one is as good: who asks may have waited since before it was issued.
    fn place(&mut self, source: &Source) -> Option<client::Place> {
        self.tunnels
            .iter()
            .filter(|tunnel| tunnel.is_older_than(&source.certificate))
            .for_each(|tunnel| tunnel.spend());
        self.tunnels.retain(|tunnel| !tunnel.is_spent());
        self.tunnels.sort_by_key(|tunnel| tunnel.streams());
        self.tunnels.iter().find_map(Tunnel::place)
    }

    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.attempts.is_empty()
    }
}

impl Inner {
    fn peers(&self) -> MutexGuard<'_, HashMap<Key, Peer>> {
        // Nothing that can panic runs under it.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a tunnel. Where the pod's share is used up, one that nobody uses goes for it.
    fn place(&self) -> Result<Place, UsedUp> {
        self.shares.outbound().or_else(|used_up| {
            let peers = self.peers();
            peers
                .values()
                .flat_map(|peer| &peer.tunnels)
                .filter(|tunnel| tunnel.streams() == 0 && !tunnel.is_spent())
                // Streams are given under this lock, so none is given meanwhile.
                .find_map(|tunnel| tunnel.hand_over())
                .ok_or(used_up)
        })
    }

    fn forget_spent(&self, key: &Key) {
        self.change(key, |peer| peer.tunnels.retain(|tunnel| !tunnel.is_spent()));
    }

    fn change(&self, key: &Key, change: impl FnOnce(&mut Peer)) {
        let mut peers = self.peers();
        if let Some(peer) = peers.get_mut(key) {
            change(peer);
            if peer.is_empty() {
                peers.remove(key);
            }
        }
    }
}

/// Takes a tunnel out of the pool when it was idle for long, when it is spent,
/// or when the pod goes. Its connection ends with the last that holds it.
async fn retire(pool: Weak<Inner>, key: Key, tunnel: Arc<Tunnel>) {
    let Some(closing) = pool.upgrade().map(|inner| inner.closing.clone()) else {
        return;
    };
    loop {
        tokio::select! {
            () = closing.cancelled() => break,
            () = tunnel.idle() => {}
            () = tokio::time::sleep(IDLE), if tunnel.streams() == 0 => {
                let Some(inner) = pool.upgrade() else { break };
                // Places are given under this lock, so none is given meanwhile.
                let _peers = inner.peers();
                if tunnel.streams() == 0 {
                    tunnel.spend();
                }
            }
        }
        if tunnel.is_spent() {
            break;
        }
    }
    tunnel.spend();
    if let Some(inner) = pool.upgrade() {
        inner.forget_spent(&key);
    }
}

/// Takes an attempt away in whatever way it ends, or the next would wait for it.
struct AttemptOver<'a> {
    inner: &'a Inner,
    key: &'a Key,
    id: u64,
}

impl Drop for AttemptOver<'_> {
    fn drop(&mut self) {
        self.inner.change(self.key, |peer| {
            peer.attempts.retain(|attempt| attempt.id != self.id);
        });
    }
}
