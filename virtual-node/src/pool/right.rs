//! The grants of the right to run that this process gives to hosts ([`Granting`], part of
//! a session), and until when the last of each is good ([`Rights`]): nobody starts a
//! successor before that.
//!
//! ```text
//!  link ──(before it sends)──▶ Rights ◀──(may another begin?)── pods' drivers
//! ```
//!
//! Counted from before a grant was sent, by this machine's clock, with a margin: the
//! host counts from when it was received, by its own. What an earlier process of this
//! node granted is not known here, so for as long as a grant lasts after the start
//! every host is taken to hold one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pool_agent_api::{Epoch, Grant, HostName, wire};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{CallError, HostClient};

/// How long a grant is good for, and how often one is given: several may be lost before
/// a pod is. Together with a host's Lease (40 s) it is what a cut costs.
pub(crate) const GRANT: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_secs(3);
/// A host that has not answered a grant by then is silent.
const ANSWER: Duration = Duration::from_secs(6);
/// Grants on their way; with as many unanswered the host is silent by far.
const IN_FLIGHT: usize = 4;
/// Of a host that has not said what its Lease is.
const USUAL_LEASE: Duration = Duration::from_secs(40);

/// Of a time that the other side counts by its own clock: two clocks that are off by
/// 1 % of each other are broken.
fn margin(time: Duration) -> Duration {
    Duration::from_millis(500) + time / 100
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Rights(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Epoch,
    started: Instant,
    hosts: Mutex<BTreeMap<HostName, Held>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Held {
    /// The last grant was sent after this.
    granted: Option<Instant>,
    /// It was heard then: its own Lease may be good from then on.
    heard: Option<Instant>,
    /// None: it has not said. Zero: it is in no cell.
    lease: Option<Duration>,
}

impl Rights {
    /// Of one process of the virtual node, which starts now.
    pub(crate) fn new(epoch: Epoch) -> Self {
        Self(Arc::new(Inner {
            epoch,
            started: Instant::now(),
            hosts: Mutex::default(),
        }))
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.0.epoch
    }

    /// To be called before a grant is sent.
    pub(super) fn grants(&self, host: &HostName) {
        self.hosts().entry(host.clone()).or_default().granted = Some(Instant::now());
    }

    /// The host has answered a grant.
    pub(super) fn answered(&self, host: &HostName, lease: Duration) {
        let mut hosts = self.hosts();
        let held = hosts.entry(host.clone()).or_default();
        held.heard = Some(Instant::now());
        held.lease = Some(lease);
    }

    /// The host is of the pool no more, and holds nothing of this node.
    pub(super) fn forget(&self, host: &HostName) {
        let ended = Instant::now() >= self.granted_until(host);
        if ended {
            self.hosts().remove(host);
        }
    }

    /// When the last grant that may have been given to the host is over.
    pub(crate) fn granted_until(&self, host: &HostName) -> Instant {
        let granted = self.hosts().get(host).and_then(|held| held.granted);
        granted.unwrap_or(self.0.started).max(self.0.started) + GRANT + margin(GRANT)
    }

    /// When a host that is silent has, as far as can be told from here, lost its Lease
    /// as well, if it is cut off from everything. No proof of it: it may have lost
    /// touch with this process alone.
    pub(crate) fn may_be_over(&self, host: &HostName) -> Instant {
        let held = self.hosts().get(host).copied().unwrap_or_default();
        let lease = held.lease.unwrap_or(USUAL_LEASE);
        let heard = held.heard.unwrap_or(self.0.started);
        self.granted_until(host).max(heard + lease + margin(lease))
    }

    /// When the host last answered.
    pub(crate) fn heard(&self, host: &HostName) -> Option<Instant> {
        self.hosts().get(host)?.heard
    }

    fn hosts(&self) -> MutexGuard<'_, BTreeMap<HostName, Held>> {
        // Every change is made whole before the guard goes.
        self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum GrantError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the stream of grants broke")]
    Stream(#[source] Box<tonic::Status>),
    #[error("the host ended the stream of grants")]
    Ended,
    #[error("the host did not answer a grant within {} s", ANSWER.as_secs())]
    Silent,
}

/// The grants of one session.
pub(super) struct Granting {
    rights: Rights,
    host: HostName,
    node_name: String,
    grants: mpsc::Sender<wire::GrantRequest>,
    answers: Streaming<wire::GrantResponse>,
    sequence: u64,
    next: Instant,
    /// Since when an answer is waited for.
    unanswered: Option<Instant>,
}

impl Granting {
    pub(super) async fn begin(
        client: &HostClient,
        rights: Rights,
        node_name: &str,
    ) -> Result<Self, GrantError> {
        let (grants, stream) = mpsc::channel(IN_FLIGHT);
        Ok(Self {
            rights,
            host: client.name().clone(),
            node_name: node_name.to_owned(),
            answers: client.grant(ReceiverStream::new(stream)).await?,
            grants,
            sequence: 0,
            next: Instant::now(),
            unanswered: None,
        })
    }

    /// Gives the next grant or takes an answer, whichever comes first. May be dropped
    /// at any moment.
    pub(super) async fn go_on(&mut self) -> Result<(), GrantError> {
        let late = self.unanswered.map_or(self.next + ANSWER, |since| since + ANSWER);
        tokio::select! {
            // What has arrived counts before the time that has passed.
            biased;
            answer = self.answers.message() => {
                let answer = answer
                    .map_err(|status| GrantError::Stream(Box::new(status)))?
                    .ok_or(GrantError::Ended)?;
                if answer.sequence == self.sequence {
                    self.unanswered = None;
                }
                self.rights.answered(&self.host, Duration::from_millis(answer.lease_millis));
                Ok(())
            }
            () = tokio::time::sleep_until(self.next) => {
                self.give();
                Ok(())
            }
            () = tokio::time::sleep_until(late) => Err(GrantError::Silent),
        }
    }

    fn give(&mut self) {
        self.next = Instant::now() + EVERY;
        let Ok(place) = self.grants.try_reserve() else {
            // The host does not read; its silence is seen by what it does not answer.
            return;
        };
        self.rights.grants(&self.host);
        self.sequence += 1;
        self.unanswered.get_or_insert_with(Instant::now);
        place.send(
            Grant {
                node_name: self.node_name.clone(),
                epoch: self.rights.epoch(),
                duration: GRANT,
                sequence: self.sequence,
            }
            .into(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights() -> (Rights, HostName) {
        (
            Rights::new(Epoch::parse("", 1).unwrap()),
            "host-1".parse().unwrap(),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_has_just_started_takes_every_host_to_hold_a_grant() {
        let (rights, host) = rights();
        let begun = Instant::now();
        assert!(rights.granted_until(&host) > begun + GRANT);
        assert!(rights.may_be_over(&host) > begun + USUAL_LEASE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_grant_counts_from_before_it_was_sent_with_a_margin_and_an_answer_moves_no_grant() {
        let (rights, host) = rights();
        tokio::time::advance(Duration::from_secs(100)).await;
        rights.grants(&host);
        let sent = Instant::now();
        tokio::time::advance(Duration::from_secs(5)).await;
        rights.answered(&host, Duration::from_secs(40));
        assert_eq!(rights.granted_until(&host), sent + GRANT + margin(GRANT));
        assert!(margin(GRANT) >= Duration::from_millis(800));
        // A host that is cut off from everything has its Lease from the last answer on.
        assert!(rights.may_be_over(&host) >= Instant::now() + Duration::from_secs(40));
        rights.forget(&host);
        assert_eq!(
            rights.granted_until(&host),
            sent + GRANT + margin(GRANT),
            "it may still run there"
        );
    }
}
