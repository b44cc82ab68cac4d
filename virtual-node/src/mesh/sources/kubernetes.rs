//! Watches of the tenant's API server, as changes for `index`; its snapshots, as
//! they are due, for `xds`. One task owns the index.
//!
//! What always holds: a list replaces what was known only once it is complete; a
//! lost watch is resumed, and meanwhile what was known stands.

use std::{collections::BTreeMap, fmt::Debug, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, future, stream};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{sync::watch, time::Instant};
use tokio_stream::wrappers::WatchStream;

use super::super::{
    index::{Change, Event, Index},
    metrics::{Kind, Metrics, Watched},
    object::{Key, Namespace, Pod, Service, Slice},
    xds::Snapshots,
};
use crate::placement::Placements;

/// Objects to a page of a list: while one is read it is in memory whole.
const PAGE: u32 = 250;

/// Events taken together before a snapshot is made.
const BATCH: usize = 256;

/// Least time between two snapshots: the first change of many is told at once, the
/// others together.
const SPACING: Duration = Duration::from_millis(10);

/// Watches, translates and publishes; ends only when dropped.
pub async fn run(
    client: Client,
    mut index: Index,
    placements: watch::Receiver<Arc<Placements>>,
    publish: watch::Sender<Snapshots>,
    metrics: Arc<Metrics>,
) {
    let events = stream::select_all([
        objects(&client, &metrics, PODS),
        objects(&client, &metrics, SERVICES),
        objects(&client, &metrics, SLICES),
        objects(&client, &metrics, NAMESPACES),
        WatchStream::new(placements).map(Event::Placements).boxed(),
    ]);
    drive(events, &mut index, &publish, &metrics).await;
}

/// How objects of one kind become events.
struct Rule<K, Id, T> {
    watched: Watched,
    id: fn(&K) -> Option<Id>,
    /// What the mesh has to know of the object; None if nothing.
    parse: fn(&K) -> Option<T>,
    event: fn(Change<Id, T>) -> Event,
}

const PODS: Rule<core::Pod, Key, Pod> = Rule {
    watched: Watched::Pod,
    id: |pod| Key::of(&pod.metadata),
    parse: Pod::parse,
    event: Event::Pod,
};
const SERVICES: Rule<core::Service, Key, Service> = Rule {
    watched: Watched::Service,
    id: |service| Key::of(&service.metadata),
    parse: Service::parse,
    event: Event::Service,
};
const SLICES: Rule<discovery::EndpointSlice, Key, Slice> = Rule {
    watched: Watched::EndpointSlice,
    id: |slice| Key::of(&slice.metadata),
    parse: Slice::parse,
    event: Event::Slice,
};
const NAMESPACES: Rule<core::Namespace, Arc<str>, Namespace> = Rule {
    watched: Watched::Namespace,
    id: |namespace| namespace.metadata.name.as_deref().map(Arc::from),
    parse: |namespace| Some(Namespace::parse(&namespace.metadata)),
    event: Event::Namespace,
};

impl<K, Id: Ord, T> Rule<K, Id, T> {
    /// The change in an event of the watch. A list is collected in `listing` until it
    /// is complete.
    fn change(&self, listing: &mut BTreeMap<Id, T>, event: watcher::Event<K>) -> Option<Change<Id, T>> {
        match event {
            watcher::Event::Init => {
                listing.clear();
                None
            }
            watcher::Event::InitApply(object) => {
                if let (Some(id), Some(parsed)) = ((self.id)(&object), (self.parse)(&object)) {
                    listing.insert(id, parsed);
                }
                None
            }
            watcher::Event::InitDone => Some(Change::Listed(std::mem::take(listing))),
            watcher::Event::Apply(object) => {
                let id = (self.id)(&object)?;
                Some(match (self.parse)(&object) {
                    Some(parsed) => Change::Set(id, parsed),
                    None => Change::Gone(id),
                })
            }
            watcher::Event::Delete(object) => Some(Change::Gone((self.id)(&object)?)),
        }
    }
}

/// All changes of one kind of object, for ever.
fn objects<K, Id, T>(
    client: &Client,
    metrics: &Arc<Metrics>,
    rule: Rule<K, Id, T>,
) -> stream::BoxStream<'static, Event>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    Id: Ord + Send + 'static,
    T: Send + 'static,
{
    let metrics = Arc::clone(metrics);
    let mut listing = BTreeMap::new();
    let mut failing = false;
    ::objects::watch(
        Api::all(client.clone()),
        watcher::Config::default().page_size(PAGE),
    )
    .default_backoff()
    .filter_map(move |event| {
        let kind = rule.watched;
        future::ready(match event {
            Ok(event) => {
                if std::mem::replace(&mut failing, false) {
                    tracing::info!(?kind, "watch resumed");
                }
                rule.change(&mut listing, event).map(rule.event)
            }
            Err(error) => {
                metrics.watch_failed(kind);
                // Once for each outage; the count goes on.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(?kind, %error, "watch failed, is retried");
                }
                None
            }
        })
    })
    .boxed()
}

/// Applies events and publishes what comes of them, until there are no more.
async fn drive(
    events: impl Stream<Item = Event>,
    index: &mut Index,
    publish: &watch::Sender<Snapshots>,
    metrics: &Metrics,
) {
    let mut batches = std::pin::pin!(events.ready_chunks(BATCH));
    let mut next = Instant::now();
    while let Some(batch) = batches.next().await {
        batch.into_iter().for_each(|event| index.apply(event));
        if Instant::now() < next {
            // What comes meanwhile is taken with the next batch.
            tokio::time::sleep_until(next).await;
        }
        if let Some(snapshot) = index.publish() {
            next = Instant::now() + SPACING;
            metrics.served(Kind::Address, snapshot.len());
            publish.send_modify(|snapshots| snapshots.addresses = Some(snapshot));
        }
    }
}

#[cfg(test)]
mod tests;
