use super::*;

fn web() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

#[test]
fn an_identity_is_wanted_as_long_as_somebody_holds_it() {
    let certificates = Certificates::default();
    let first = certificates.want(&web());
    let second = certificates.want(&web());
    drop(first);
    assert!(certificates.state(&web()).is_some());
    drop(second);
    assert!(certificates.state(&web()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_is_away_leaves_the_identity_pending_and_is_asked_again() {
    // Nobody listens there: each attempt fails at once.
    let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
    let certificates = Certificates::default();
    let lease = certificates.want(&web());
    let maintained = tokio::spawn(certificates.clone().maintain(channel, SystemTime::now));
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    assert!(lease.state().borrow().held().is_none());
    assert!(!maintained.is_finished());
    maintained.abort();
}
