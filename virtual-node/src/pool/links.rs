//! Which hosts there is a link to: opened when a host is named, ended a while after it
//! is named no more. One task for the process.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use pool_agent_api::HostName;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{Instant, MissedTickBehavior},
};
use tonic::transport::Channel;
use tracing::info;

use super::{HostClient, HostTable, HostView, Hosts, Membership, Named, News, PoolEvent, link::Link};

/// A host that is named no more is kept this long: the next pod may be there again,
/// and what it still has to say is heard.
const LINGER: Duration = Duration::from_secs(60);
/// How often it is looked for whether that has passed.
const TICK: Duration = Duration::from_secs(5);

struct Open {
    address: SocketAddr,
    client: HostClient,
    link: AbortHandle,
    /// Since when nobody names it.
    unnamed: Option<Instant>,
}

pub(super) struct Links<C> {
    connect: C,
    membership: Membership,
    events: mpsc::Sender<PoolEvent>,
    table: Arc<watch::Sender<HostTable>>,
    hosts: watch::Sender<Arc<Hosts>>,
    open: BTreeMap<HostName, Open>,
}

impl<C> Links<C>
where
    C: Fn(&HostName, SocketAddr) -> Channel + Send + 'static,
{
    pub(super) fn new(
        connect: C,
        membership: Membership,
        events: mpsc::Sender<PoolEvent>,
        table: watch::Sender<HostTable>,
        hosts: watch::Sender<Arc<Hosts>>,
    ) -> Self {
        Self {
            connect,
            membership,
            events,
            table: Arc::new(table),
            hosts,
            open: BTreeMap::new(),
        }
    }

    pub(super) async fn run(mut self, mut named: watch::Receiver<Named>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut listed = false;
        loop {
            tokio::select! {
                () = self.events.closed() => return,
                changed = named.changed(), if !listed => listed = changed.is_err(),
                _ = tick.tick(), if self.open.values().any(|open| open.unnamed.is_some()) => {}
            }
            let wanted = named.borrow_and_update().clone();
            for gone in self.follow(&wanted) {
                let event = PoolEvent {
                    host: gone,
                    news: News::Gone,
                };
                if self.events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Opens and ends links as is wanted now; returns the hosts that are gone.
    pub(super) fn follow(&mut self, wanted: &Named) -> Vec<HostName> {
        for (name, address) in &wanted.hosts {
            if let Some(address) = address {
                self.keep(name, *address);
            }
        }
        let mut gone = vec![];
        for (name, open) in &mut self.open {
            if wanted.hosts.contains_key(name) || !wanted.complete {
                open.unnamed = None;
            } else if open.unnamed.get_or_insert_with(Instant::now).elapsed() >= LINGER {
                open.link.abort();
                gone.push(name.clone());
            }
        }
        for name in &gone {
            info!(host = %name, "nothing of this node is on the host any more");
            self.open.remove(name);
            self.membership.rights.forget(name);
        }
        self.table.send_if_modified(|table| {
            let before = table.len();
            table.retain(|name, _| self.open.contains_key(name));
            table.len() != before
        });
        let mut clients: BTreeMap<HostName, Option<HostClient>> =
            wanted.hosts.keys().map(|name| (name.clone(), None)).collect();
        clients.extend(
            self.open
                .iter()
                .map(|(name, open)| (name.clone(), Some(open.client.clone()))),
        );
        self.hosts.send_replace(Arc::new(Hosts {
            clients,
            complete: wanted.complete,
        }));
        gone
    }

    fn keep(&mut self, name: &HostName, address: SocketAddr) {
        if let Some(open) = self.open.get(name) {
            if open.address == address {
                return;
            }
            // It serves elsewhere now; its sandboxes are what they were.
            open.link.abort();
        }
        let client = HostClient::new(name.clone(), (self.connect)(name, address));
        self.table.send_modify(|table| {
            table.insert(name.clone(), HostView::default());
        });
        let link = Link::new(
            client.clone(),
            &self.membership,
            self.events.clone(),
            self.table.clone(),
        );
        let open = Open {
            address,
            client,
            link: tokio::spawn(link.run()).abort_handle(),
            unnamed: None,
        };
        self.open.insert(name.clone(), open);
    }
}
