//! Workload identities of this host's pods: keys made here, in memory, and
//! certificates from the tenant's broker.
//!
//! ```text
//!            wanted                fetched               half of its life gone
//! (unknown) ───────▶ Pending ─────────────────▶ Held ──────────────────────────▶ Held (fetching)
//!                      ▲ failed: wait, again      │ expired                          │ fetched: Held
//!                      └──────────────────────────┴──────────────────────────────────┘ failed: wait, again
//! ```
//!
//! `proxy` wants an identity when the first pod with it is added, reads its
//! [`CertificateState`] for each handshake, and releases it with the last pod.
//! One task a tenant ([`Certificates::maintain`]) does the fetching; what it
//! does when is decided in [`schedule`].

mod broker;
pub mod crypto;
pub mod schedule;
pub mod tls;
pub mod verify;

pub use broker::{FetchError, InvalidAnswer};

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use mesh_api::Identity;
use schedule::{Life, Schedule};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};
use tonic::transport::Channel;

/// A certificate that passed every check, and what is built of it.
#[derive(Debug)]
pub struct Certificate {
    pub identity: Identity,
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub tls: tls::Tls,
}

/// What stands for an identity now.
#[derive(Debug, Clone, Default)]
pub enum CertificateState {
    /// None yet, or the last one expired. Connections wait for a while.
    #[default]
    Pending,
    /// The newest. It stays while its successor is fetched.
    Held(Arc<Certificate>),
}

impl CertificateState {
    pub fn held(&self) -> Option<&Arc<Certificate>> {
        match self {
            Self::Pending => None,
            Self::Held(certificate) => Some(certificate),
        }
    }
}

/// The identities that are wanted, each with its state. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Certificates(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    wanted: Mutex<HashMap<Identity, Wanted>>,
    /// The set of wanted identities changed.
    changed: Notify,
}

#[derive(Debug)]
struct Wanted {
    users: usize,
    state: watch::Sender<CertificateState>,
}

/// Keeps an identity wanted. When the last lease goes, its key goes too.
#[derive(Debug)]
pub struct Lease {
    identity: Identity,
    state: watch::Receiver<CertificateState>,
    certificates: Certificates,
}

impl Lease {
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn state(&self) -> &watch::Receiver<CertificateState> {
        &self.state
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut wanted = self.certificates.lock();
        if let Some(entry) = wanted.get_mut(&self.identity) {
            entry.users -= 1;
            if entry.users == 0 {
                wanted.remove(&self.identity);
                self.certificates.0.changed.notify_one();
            }
        }
    }
}

impl Certificates {
    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Wanted>> {
        // Nothing that can panic runs under it.
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the identity's certificate fetched and kept fresh.
    pub fn want(&self, identity: &Identity) -> Lease {
        let mut wanted = self.lock();
        let entry = wanted.entry(identity.clone()).or_insert_with(|| {
            self.0.changed.notify_one();
            Wanted {
                users: 0,
                state: watch::Sender::default(),
            }
        });
        entry.users += 1;
        Lease {
            identity: identity.clone(),
            state: entry.state.subscribe(),
            certificates: self.clone(),
        }
    }

    /// The state of an identity that is wanted.
    pub fn state(&self, identity: &Identity) -> Option<watch::Receiver<CertificateState>> {
        self.lock().get(identity).map(|wanted| wanted.state.subscribe())
    }

    fn publish(&self, identity: &Identity, state: CertificateState) {
        if let Some(wanted) = self.lock().get(identity) {
            wanted.state.send_replace(state);
        }
    }

    /// Fetches what is wanted, until it is dropped. `clock` tells the time that
    /// certificates speak of.
    pub async fn maintain(self, channel: Channel, clock: fn() -> SystemTime) {
        let mut schedule = Schedule::default();
        let mut fetches = JoinSet::new();
        let mut fetching = HashMap::new();
        loop {
            let now = Instant::now().into_std();
            {
                let wanted = self.lock();
                for identity in wanted.keys() {
                    schedule.want(identity.clone(), now);
                }
                schedule.retain(|identity| wanted.contains_key(identity));
            }
            for identity in schedule.expired(now) {
                tracing::warn!(%identity, "certificate expired");
                self.publish(&identity, CertificateState::Pending);
            }
            for identity in schedule.start(now) {
                let channel = channel.clone();
                let wanted = identity.clone();
                let task = fetches.spawn(async move { broker::fetch(channel, &wanted, clock).await });
                fetching.insert(task.id(), identity);
            }
            let next = schedule.next();
            tokio::select! {
                () = self.0.changed.notified() => {}
                Some(ended) = fetches.join_next_with_id() => {
                    let (id, fetched) = match ended {
                        Ok((id, fetched)) => (id, fetched),
                        Err(error) => (error.id(), Err(FetchError::Died(error))),
                    };
                    if let Some(identity) = fetching.remove(&id) {
                        self.settle(&mut schedule, identity, fetched, clock());
                    }
                }
                () = at(next) => {}
            }
        }
    }

    fn settle(
        &self,
        schedule: &mut Schedule,
        identity: Identity,
        fetched: Result<Certificate, FetchError>,
        clock: SystemTime,
    ) {
        let now = Instant::now().into_std();
        match fetched {
            Ok(certificate) => {
                let life = Life {
                    past: clock.duration_since(certificate.not_before).unwrap_or_default(),
                    left: certificate.not_after.duration_since(clock).unwrap_or_default(),
                };
                if schedule.fetched(&identity, life, now) {
                    tracing::info!(
                        %identity,
                        serial = %certificate.serial,
                        valid_seconds = life.left.as_secs(),
                        "certificate held"
                    );
                    self.publish(&identity, CertificateState::Held(Arc::new(certificate)));
                }
            }
            Err(error) => {
                if let Some(wait) = schedule.failed(&identity, now) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(
                        %identity,
                        %error,
                        cause,
                        retry_milliseconds = wait.as_millis() as u64,
                        "certificate not fetched"
                    );
                }
            }
        }
    }
}

async fn at(instant: Option<std::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
