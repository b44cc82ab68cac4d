//! The session with one host: introduce the tenant, follow its sandboxes, ping.
//! One task a host, for as long as the process lives; a broken session is begun
//! again after a back-off.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use backon::BackoffBuilder;
use pool_agent_api::{HostName, Invalid, SandboxKey, SandboxStatus, Tenant, status::PodEvent, wire};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tracing::{Instrument, info, info_span, warn};

use super::{
    CallError, HostClient, HostTable, HostView, Membership, News, PoolEvent, Rights,
    right::{self, Granting},
};

/// How often a host says what it has free.
const PING: Duration = Duration::from_secs(5);
/// After the first failure; doubles.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// A host is to be heard again before its pods count as unready for its silence.
const RETRY_MOST: Duration = Duration::from_secs(2);

pub(super) struct Link {
    client: HostClient,
    tenant: Tenant,
    node_name: String,
    events: mpsc::Sender<PoolEvent>,
    table: Arc<watch::Sender<HostTable>>,
    rights: Rights,
    known: Told,
}

/// Bytes of statuses that are kept of one host, as they are sent: ten thousand sandboxes
/// of an ordinary size.
const MOST_TOLD: usize = 32 << 20;
/// What a sandbox takes here beside its status.
const BESIDE: usize = 2048;

/// What the host was last known to have, over sessions, and how much that is: a host
/// that was stolen may tell of sandboxes without end.
#[derive(Debug, Default)]
struct Told {
    sizes: BTreeMap<SandboxKey, usize>,
    bytes: usize,
}

impl Told {
    /// Whether there is room for a status of `size` bytes, which is then counted.
    fn take(&mut self, key: &SandboxKey, size: usize) -> bool {
        let size = size.saturating_add(BESIDE);
        let before = self.sizes.get(key).copied().unwrap_or(0);
        let bytes = (self.bytes - before).saturating_add(size);
        if bytes > MOST_TOLD {
            return false;
        }
        self.sizes.insert(key.clone(), size);
        self.bytes = bytes;
        true
    }

    fn forget(&mut self, key: &SandboxKey) {
        self.bytes -= self.sizes.remove(key).unwrap_or(0);
    }

    /// What is not in `seen`.
    fn beside(&self, seen: &BTreeSet<SandboxKey>) -> Vec<SandboxKey> {
        let unseen = |key: &&SandboxKey| !seen.contains(*key);
        self.sizes.keys().filter(unseen).cloned().collect()
    }
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the host calls itself {name}")]
    AnotherName { name: HostName },
    #[error("the stream of sandboxes broke")]
    Stream(#[source] Box<tonic::Status>),
    #[error(transparent)]
    Grants(#[from] right::GrantError),
    #[error("the host ended the stream of sandboxes")]
    Ended,
    #[error("nobody listens any more")]
    Unheard,
}

impl Link {
    pub(super) fn new(
        client: HostClient,
        membership: &Membership,
        events: mpsc::Sender<PoolEvent>,
        table: Arc<watch::Sender<HostTable>>,
    ) -> Self {
        let Membership {
            tenant,
            node_name,
            cluster,
            mesh,
            rights,
        } = membership;
        Self {
            client,
            tenant: Tenant {
                id: tenant.clone(),
                cluster_pod_range: cluster.pod_range,
                cluster_domain: cluster.domain.clone(),
                dns_address: cluster.dns_address,
                upstream_nameservers: cluster.upstream_nameservers.clone(),
                mesh_control: mesh.clone(),
            },
            node_name: node_name.clone(),
            events,
            table,
            rights: rights.clone(),
            known: Told::default(),
        }
    }

    pub(super) async fn run(mut self) {
        let span = info_span!("link", host = %self.client.name());
        async move {
            let policy = backon::ExponentialBuilder::new()
                .with_min_delay(RETRY_FIRST)
                .with_max_delay(RETRY_MOST)
                .with_jitter()
                .without_max_times();
            let mut delays = policy.build();
            // A host that stays away is worth one line, not one every few seconds.
            let mut reported = false;
            loop {
                let mut synced = false;
                let Err(error) = self.session(&mut synced).await;
                if let SessionError::Unheard = error {
                    return;
                }
                if synced {
                    delays = policy.build();
                }
                if synced || !reported {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "no session with the host"
                    );
                    reported = true;
                }
                self.set(|view| view.reachable = false);
                if self.send(News::Lost).await.is_err() {
                    return;
                }
                tokio::time::sleep(delays.next().unwrap_or(RETRY_MOST)).await;
            }
        }
        .instrument(span)
        .await;
    }

    async fn session(&mut self, synced: &mut bool) -> Result<std::convert::Infallible, SessionError> {
        let host = self.client.get_host().await?;
        if host.name != *self.client.name() {
            return Err(SessionError::AnotherName { name: host.name });
        }
        self.client.configure_tenant(self.tenant.clone().into()).await?;
        let mut granting = Granting::begin(&self.client, self.rights.clone(), &self.node_name).await?;
        let mut stream = self.client.watch().await?;
        let mut host = Some(Arc::new(host));
        let mut seen = BTreeSet::new();
        let client = self.client.clone();
        let next_ping = || async {
            tokio::time::sleep(PING).await;
            client.get_host().await
        };
        let mut ping = std::pin::pin!(next_ping());
        loop {
            tokio::select! {
                message = stream.message() => {
                    let event = message
                        .map_err(|status| SessionError::Stream(Box::new(status)))?
                        .ok_or(SessionError::Ended)?;
                    self.take(event, &mut seen, synced, &mut host).await?;
                }
                granted = granting.go_on() => granted?,
                answer = &mut ping => {
                    let fresh = Arc::new(answer?);
                    if *synced {
                        self.set(|view| view.host = Some(fresh));
                    } else {
                        host = Some(fresh);
                    }
                    ping.set(next_ping());
                }
            }
        }
    }

    /// Passes one event on. One that cannot be understood is dropped with a
    /// warning: the other sandboxes of the host are not to suffer.
    async fn take(
        &mut self,
        event: wire::WatchEvent,
        seen: &mut BTreeSet<SandboxKey>,
        synced: &mut bool,
        host: &mut Option<Arc<pool_agent_api::Host>>,
    ) -> Result<(), SessionError> {
        use wire::watch_event::Event;
        match event.event {
            Some(Event::Status(status)) => match with_size(status) {
                Ok((status, size)) if status.node_name == self.node_name => {
                    if !self.known.take(&status.key, size) {
                        warn!(key = %status.key, "the host tells of more than it could run: left out");
                        return Ok(());
                    }
                    if !*synced {
                        seen.insert(status.key.clone());
                    }
                    self.send(News::Sandbox(Box::new(status))).await?;
                }
                // Of another virtual node of the tenant.
                Ok(_) => {}
                Err(invalid) => misunderstood(&invalid),
            },
            Some(Event::Forgotten(key)) => match SandboxKey::from_wire(Some(key)) {
                Ok(key) => {
                    self.known.forget(&key);
                    self.send(News::Missing(key)).await?;
                }
                Err(invalid) => misunderstood(&invalid),
            },
            Some(Event::PodEvent(event)) => match PodEvent::try_from(event) {
                Ok(event) => self.send(News::PodEvent(Box::new(event))).await?,
                Err(invalid) => misunderstood(&invalid),
            },
            Some(Event::Synced(_)) if !*synced => {
                for key in self.known.beside(seen) {
                    self.known.forget(&key);
                    self.send(News::Missing(key)).await?;
                }
                seen.clear();
                *synced = true;
                info!(sandboxes = self.known.sizes.len(), "in sync with the host");
                self.send(News::Synced).await?;
                let host = host.take();
                self.set(|view| {
                    view.reachable = true;
                    view.host = host;
                });
            }
            Some(Event::Synced(_)) => {}
            None => misunderstood(&Invalid::new("event", "is required")),
        }
        Ok(())
    }

    async fn send(&self, news: News) -> Result<(), SessionError> {
        let event = PoolEvent {
            host: self.client.name().clone(),
            news,
        };
        self.events.send(event).await.map_err(|_| SessionError::Unheard)
    }

    fn set(&self, change: impl FnOnce(&mut HostView)) {
        self.table.send_if_modified(|table| {
            let Some(view) = table.get_mut(self.client.name()) else {
                return false;
            };
            let before = view.clone();
            change(view);
            *view != before
        });
    }
}

fn misunderstood(invalid: &Invalid) {
    warn!(error = %invalid, "the host sent an event that cannot be understood");
}

/// A status, and its bytes as they were sent.
fn with_size(status: wire::SandboxStatus) -> Result<(SandboxStatus, usize), Invalid> {
    let size = status.encoded_len();
    Ok((SandboxStatus::try_from(status)?, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pod: u32, attempt: u32) -> SandboxKey {
        SandboxKey {
            pod: format!("u-{pod}").parse().unwrap(),
            attempt: pool_agent_api::Attempt::parse("attempt", attempt).unwrap(),
        }
    }

    #[test]
    fn a_host_that_tells_of_sandboxes_without_end_is_listened_to_only_so_far() {
        // By ever new pods, by ever new attempts of one, and by few that are large.
        type Next = fn(u32) -> (SandboxKey, usize);
        let attacks: [Next; 3] = [
            |n| (key(n, 1), 100),
            |n| (key(1, n + 1), 100),
            |n| (key(n, 1), 1 << 20),
        ];
        for next in attacks {
            let mut told = Told::default();
            let taken = (0..100_000).filter(|&n| {
                let (key, size) = next(n);
                told.take(&key, size)
            });
            let taken = taken.count();
            assert!(taken * BESIDE <= MOST_TOLD && taken > 0, "{taken}");
            assert!(told.bytes <= MOST_TOLD);
            // What is known goes on being followed, and room comes back.
            let known = next(0).0;
            assert!(told.take(&known, 100));
            told.forget(&known);
            assert!(told.take(&key(200_000, 1), 100));
        }
    }

    #[test]
    fn what_a_session_did_not_tell_of_is_missing() {
        let mut told = Told::default();
        assert!(told.take(&key(1, 1), 10) && told.take(&key(2, 1), 10));
        assert_eq!(told.beside(&[key(1, 1)].into()), [key(2, 1)]);
        told.forget(&key(1, 1));
        told.forget(&key(2, 1));
        assert_eq!(told.bytes, 0);
    }
}
