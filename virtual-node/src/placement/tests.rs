use super::*;
use crate::pool::HostView;

fn uid(text: &str) -> PodUid {
    PodUid::parse("uid", text).unwrap()
}

fn ask() -> Ask {
    Ask {
        claim: pool_agent_api::Resources {
            sandboxes: 1,
            ..pool_agent_api::Resources::default()
        },
        requests: Resources::default(),
        runtime: None,
        owner: None,
        namespace: "shop".parse().unwrap(),
        name: "web".parse().unwrap(),
        images: vec!["app:1".into()],
        grace: Duration::from_secs(30),
    }
}

fn placement(host: &str) -> Placement {
    Placement {
        host: host.parse().unwrap(),
        attempt: Attempt::FIRST,
        namespace: "shop".parse().unwrap(),
        name: "web".parse().unwrap(),
        service_account: "web".parse().unwrap(),
        enrolled: true,
    }
}

/// One that nobody has heard of yet.
fn hosts() -> watch::Sender<HostTable> {
    watch::Sender::new(HostTable::from([(
        "host-a".parse().unwrap(),
        HostView::default(),
    )]))
}

#[tokio::test]
async fn a_placement_is_published_before_it_may_be_used() {
    let hosts = hosts();
    let (placer, placements) = Placer::start(hosts.subscribe(), None);
    placer
        .hold(uid("u-1"), Seat::Pod, ask(), placement("host-a"))
        .await;
    assert_eq!(placements.borrow().pods[&uid("u-1")], placement("host-a"));
}

#[tokio::test(start_paused = true)]
async fn placements_are_complete_once_every_pod_that_was_there_has_told_its_own() {
    let hosts = hosts();
    let (placer, mut placements) = Placer::start(hosts.subscribe(), None);
    placer
        .hold(uid("u-1"), Seat::Pod, ask(), placement("host-a"))
        .await;
    placer.expect(["u-1", "u-2", "u-3"].map(uid).into()).await;
    placer.release(uid("u-2"), Seat::Pod).await;
    // A pod that is new may not stand in for one that was there.
    placer
        .hold(uid("u-4"), Seat::Pod, ask(), placement("host-a"))
        .await;
    assert!(!placements.borrow().complete);
    // One that is only about to be placed has told, too.
    let third = placer.clone();
    tokio::spawn(async move {
        {
            let (waiting, _) = watch::channel(None);
            third
                .claim(
                    uid("u-3"),
                    Seat::Pod,
                    Attempt::FIRST,
                    ask(),
                    Arrival::Before,
                    waiting,
                )
                .await
                .is_ok()
        }
    });
    let complete = placements.wait_for(|p| p.complete).await.unwrap();
    assert_eq!(
        complete.pods.keys().map(PodUid::as_str).collect::<Vec<_>>(),
        ["u-1", "u-4"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_node_without_pods_is_complete_as_soon_as_that_is_known() {
    let hosts = hosts();
    let (placer, mut placements) = Placer::start(hosts.subscribe(), None);
    placer.expect(BTreeSet::new()).await;
    placements.wait_for(|p| p.complete).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn beyond_the_quota_a_claim_is_refused_but_not_before_what_is_on_record_is_counted() {
    let quota = Resources {
        cpu_millis: 1000,
        memory_bytes: u64::MAX,
        ephemeral_storage_bytes: u64::MAX,
        sandboxes: 2,
    };
    let hosts = hosts();
    let (placer, _placements) = Placer::start(hosts.subscribe(), Some(quota));
    let claim = |placer: Placer| async move {
        let (waiting, _shown) = watch::channel(None);
        let new = Arrival::New { created: None };
        placer
            .claim(uid("u-9"), Seat::Pod, Attempt::FIRST, ask(), new, waiting)
            .await
    };
    let first = tokio::spawn(claim(placer.clone()));
    placer.expect(["u-1", "u-2", "u-9"].map(uid).into()).await;
    placer
        .hold(uid("u-1"), Seat::Pod, ask(), placement("host-a"))
        .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!first.is_finished(), "u-2 has told nothing yet");
    placer
        .hold(uid("u-2"), Seat::Pod, ask(), placement("host-a"))
        .await;
    let Claimed::Never(refused) = first.await.unwrap().unwrap() else {
        panic!("it was admitted");
    };
    assert_eq!(
        (refused.resource, refused.used, refused.capacity),
        ("pods", Some(2), 2)
    );
    // A pod that finished makes room.
    placer.release(uid("u-1"), Seat::Pod).await;
    let waiting = tokio::time::timeout(Duration::from_secs(60), claim(placer.clone())).await;
    assert!(waiting.is_err(), "it is admitted, and waits for a host");
}
