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
    let (placer, placements) = Placer::start(hosts.subscribe());
    placer.hold(uid("u-1"), ask(), placement("host-a")).await;
    assert_eq!(placements.borrow().pods[&uid("u-1")], placement("host-a"));
}

#[tokio::test(start_paused = true)]
async fn placements_are_complete_once_every_pod_that_was_there_has_told_its_own() {
    let hosts = hosts();
    let (placer, mut placements) = Placer::start(hosts.subscribe());
    placer.hold(uid("u-1"), ask(), placement("host-a")).await;
    placer.expect(["u-1", "u-2", "u-3"].map(uid).into()).await;
    placer.release(uid("u-2")).await;
    // A pod that is new may not stand in for one that was there.
    placer.hold(uid("u-4"), ask(), placement("host-a")).await;
    assert!(!placements.borrow().complete);
    // One that is only about to be placed has told, too.
    let third = placer.clone();
    tokio::spawn(async move {
        {
            let (waiting, _) = watch::channel(None);
            third
                .claim(uid("u-3"), Attempt::FIRST, ask(), waiting)
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
    let (placer, mut placements) = Placer::start(hosts.subscribe());
    placer.expect(BTreeSet::new()).await;
    placements.wait_for(|p| p.complete).await.unwrap();
}
