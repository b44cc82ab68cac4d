use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use prometheus_client::registry::Registry;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use crate::mesh::Cluster;

fn namespace(name: &str) -> core::Namespace {
    core::Namespace {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..Default::default()
        },
        ..Default::default()
    }
}

fn service(name: &str) -> Service {
    Service::parse(&core::Service {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some("shop".to_owned()),
            ..Default::default()
        },
        spec: Some(core::ServiceSpec::default()),
        ..Default::default()
    })
    .unwrap()
}

#[test]
fn a_list_replaces_what_was_known_only_once_it_is_complete() {
    let mut listing = BTreeMap::new();
    let mut change = |event| NAMESPACES.change(&mut listing, event);
    for event in [
        watcher::Event::Init,
        watcher::Event::InitApply(namespace("half")),
        // The connection broke: the list begins anew.
        watcher::Event::Init,
        watcher::Event::InitApply(namespace("a")),
        watcher::Event::InitApply(namespace("b")),
    ] {
        assert!(change(event).is_none());
    }
    match change(watcher::Event::InitDone) {
        Some(Change::Listed(all)) => {
            assert_eq!(all.keys().map(|k| &**k).collect::<Vec<_>>(), ["a", "b"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_object_that_ceases_to_matter_is_gone() {
    let mut listing = BTreeMap::new();
    let mut object = core::Service {
        metadata: ObjectMeta {
            name: Some("web".to_owned()),
            namespace: Some("shop".to_owned()),
            ..Default::default()
        },
        spec: Some(core::ServiceSpec::default()),
        ..Default::default()
    };
    let change = SERVICES.change(&mut listing, watcher::Event::Apply(object.clone()));
    assert!(matches!(change, Some(Change::Set(..))));
    object.spec = Some(core::ServiceSpec {
        type_: Some("ExternalName".to_owned()),
        ..Default::default()
    });
    let change = SERVICES.change(&mut listing, watcher::Event::Apply(object.clone()));
    assert!(matches!(change, Some(Change::Gone(_))));
    let change = SERVICES.change(&mut listing, watcher::Event::Delete(object));
    assert!(matches!(change, Some(Change::Gone(_))));
}

struct Driven {
    events: mpsc::Sender<Event>,
    published: watch::Receiver<Snapshots>,
    driving: JoinHandle<()>,
}

fn driven() -> Driven {
    let (events, stream) = mpsc::channel(1024);
    let (publish, published) = watch::channel(Snapshots::default());
    let metrics = Metrics::register(&mut Registry::default());
    let cluster = Cluster {
        id: "Kubernetes".to_owned(),
        network: String::new(),
        trust_domain: "cluster.local".to_owned(),
        domain: "cluster.local".to_owned(),
    };
    let driving = tokio::spawn(async move {
        let mut index = Index::new(cluster, "node");
        drive(ReceiverStream::new(stream), &mut index, &publish, &metrics).await;
    });
    Driven {
        events,
        published,
        driving,
    }
}

async fn list_nothing(events: &mpsc::Sender<Event>) {
    for event in [
        Event::Pod(Change::Listed(BTreeMap::new())),
        Event::Service(Change::Listed(BTreeMap::new())),
        Event::Slice(Change::Listed(BTreeMap::new())),
        Event::Namespace(Change::Listed(BTreeMap::new())),
    ] {
        events.send(event).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_is_told_at_once_and_a_storm_of_them_together() {
    let mut driven = driven();
    list_nothing(&driven.events).await;
    driven.published.changed().await.unwrap();
    tokio::time::sleep(SPACING).await;

    let asked = Instant::now();
    let set = |n: u32| {
        let service = service(&format!("s{n}"));
        Event::Service(Change::Set(service.key.clone(), service))
    };
    driven.events.send(set(0)).await.unwrap();
    driven.published.changed().await.unwrap();
    assert_eq!(asked.elapsed(), Duration::ZERO, "a lone change waits for nothing");

    let mut published = 0;
    for n in 0..100 {
        driven.events.send(set(n)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        published += u32::from(driven.published.has_changed().unwrap());
        driven.published.mark_unchanged();
    }
    assert!((5..=12).contains(&published), "{published} in 100 ms");
    drop(driven.events);
    driven.driving.await.unwrap();
    let last = driven.published.borrow().addresses.clone().unwrap();
    assert_eq!(last.len(), 100);
}
