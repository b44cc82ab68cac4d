//! The Lease in `kube-node-lease` that says the node is alive: 40 s, renewed
//! every 10 s, owned by the Node, so that it goes with it.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api_server::answered;

const NAMESPACE: &str = "kube-node-lease";
const DURATION_SECONDS: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// After a renewal that failed.
const RETRY: Duration = Duration::from_secs(2);

/// Renews while the node is `alive`, until `shutdown`. `uids` is the Node's UID.
pub(super) async fn renew(
    client: Client,
    name: String,
    mut uids: watch::Receiver<Option<String>>,
    mut alive: watch::Receiver<bool>,
    shutdown: CancellationToken,
) {
    let api = Api::<Lease>::namespaced(client, NAMESPACE);
    let mut ticks = tokio::time::interval(RENEW);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut held = None;
    let mut gated = false;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = uids.changed() => if changed.is_err() {
                return;
            },
            // A node that has just got its first host does not wait for the next turn.
            changed = alive.changed(), if gated => if changed.is_err() {
                return;
            },
            _ = ticks.tick() => {}
        }
        let Some(uid) = uids.borrow_and_update().clone() else {
            continue;
        };
        let lives = *alive.borrow_and_update();
        if gated == lives {
            gated = !lives;
            if lives {
                info!("the lease is renewed again: the pool is in reach");
            } else {
                warn!("the lease is not renewed: the pool is out of reach");
            }
        }
        if !lives {
            continue;
        }
        match renewed(&api, &name, &uid, held.take(), Timestamp::now()).await {
            Ok(lease) => held = Some(lease),
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot renew the node's lease"
                );
                ticks.reset_after(RETRY);
            }
        }
    }
}

async fn renewed(
    api: &Api<Lease>,
    name: &str,
    uid: &str,
    held: Option<Lease>,
    now: Timestamp,
) -> Result<Lease, kube::Error> {
    let found = match held {
        Some(lease) => Some(lease),
        None => answered(api.get_opt(name)).await?,
    };
    match found {
        None => {
            let lease = next(
                Lease {
                    metadata: ObjectMeta {
                        name: Some(name.to_owned()),
                        namespace: Some(NAMESPACE.to_owned()),
                        ..ObjectMeta::default()
                    },
                    ..Lease::default()
                },
                name,
                uid,
                now,
            );
            answered(api.create(&PostParams::default(), &lease)).await
        }
        // Guarded by its version: somebody else's write is seen, not overwritten.
        Some(lease) => {
            let lease = next(lease, name, uid, now);
            answered(api.replace(name, &PostParams::default(), &lease)).await
        }
    }
}

/// The lease, renewed. Its time only grows.
fn next(mut lease: Lease, name: &str, uid: &str, now: Timestamp) -> Lease {
    lease.metadata.managed_fields = None;
    lease.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    }]);
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    let before = spec.renew_time.as_ref().map(|t| t.0);
    let now = match before.and_then(|t| t.checked_add(Duration::from_micros(1)).ok()) {
        Some(after) => now.max(after),
        None => now,
    };
    spec.acquire_time.get_or_insert(MicroTime(now));
    spec.holder_identity = Some(name.to_owned());
    spec.lease_duration_seconds = Some(DURATION_SECONDS);
    spec.renew_time = Some(MicroTime(now));
    lease
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use http::{Request, Response};
    use http_body_util::Full;
    use kube::client::Body;

    use super::*;

    /// As a flow that is dropped silently: nothing says that no answer comes.
    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_is_never_answered_is_made_again_while_the_lease_holds() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let (answered, mut renewed) = watch::channel(false);
        let server = tower::service_fn(move |_: Request<Body>| {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            let answered = answered.clone();
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                answered.send_replace(true);
                let lease = serde_json::to_vec(&Lease::default()).unwrap();
                Ok::<_, std::convert::Infallible>(Response::new(Full::new(bytes::Bytes::from(lease))))
            }
        });
        let (uid, uids) = watch::channel(Some("uid-1".to_owned()));
        let (alive, lives) = watch::channel(true);
        let client = Client::new(server, "default");
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(renew(client, "n".into(), uids, lives, shutdown.clone()));
        let holds = Duration::from_secs(DURATION_SECONDS.unsigned_abs().into());
        let in_time = tokio::time::timeout(holds, renewed.wait_for(|answered| *answered)).await;
        assert!(in_time.is_ok(), "asked {} times", asked.load(Ordering::SeqCst));
        drop((uid, alive));
        shutdown.cancel();
        task.await.unwrap();
    }

    #[test]
    fn a_renewal_only_moves_forward_and_follows_a_new_node() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let first = next(Lease::default(), "n", "uid-1", at(100));
        let second = next(first.clone(), "n", "uid-2", at(90));
        let time = |l: &Lease| l.spec.as_ref().unwrap().renew_time.as_ref().unwrap().0;
        assert!(time(&second) > time(&first));
        assert_eq!(second.metadata.owner_references.unwrap()[0].uid, "uid-2");
        assert_eq!(second.spec.unwrap().lease_duration_seconds, Some(40));
    }
}
