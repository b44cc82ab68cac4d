//! Policies, at the destination, for new and for live connections.

use mesh_api::istio::security::{
    Action, Authorization, Group, Match, Rules, Scope, StringMatch, string_match::MatchType,
};
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::lab::{Lab, NAMESPACE, Pod, TRUST_DOMAIN, carries, lives, until, within};

fn policy(action: Action, scope: Scope, account: &str) -> Authorization {
    Authorization {
        name: "p".to_owned(),
        namespace: NAMESPACE.to_owned(),
        scope: scope.into(),
        action: action.into(),
        groups: vec![Group {
            rules: vec![Rules {
                matches: vec![Match {
                    principals: vec![StringMatch {
                        match_type: Some(MatchType::Exact(format!(
                            "{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{account}"
                        ))),
                    }],
                    ..Default::default()
                }],
            }],
        }],
        ..Default::default()
    }
}

/// Echoes.
fn serve(pod: &Pod) {
    let listener = pod.listen(8080);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _gone = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_hold_for_tunnels_neighbours_and_plaintext() {
    let lab = Lab::new().await;
    let near = lab.pod(1, "near").await;
    let far = lab.pod(0, "far").await;
    let other = lab.pod(0, "other").await;
    let web = lab.pod(1, "web").await;
    serve(&web);
    lab.control.policy(policy(Action::Allow, Scope::Namespace, "far"));
    lab.control.settled().await;
    let open = async |pod: &Pod| carries(pod.connect(web.at(8080)).await).await;
    assert!(open(&far).await);
    assert!(!open(&other).await);
    assert!(!open(&near).await);
    assert!(!carries(lab.wire.connect(web.at(8080)).await).await);
    lab.control
        .policy(policy(Action::Allow, Scope::Namespace, "near"));
    lab.control.settled().await;
    assert!(!open(&far).await);
    assert!(open(&near).await);
    lab.control.remove_policy(&format!("{NAMESPACE}/p"));
    lab.control.settled().await;
    assert!(open(&other).await);
    assert!(carries(lab.wire.connect(web.at(8080)).await).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_connection_is_cut_when_a_policy_comes_that_refuses_it() {
    let lab = Lab::new().await;
    let far = lab.pod(0, "far").await;
    let near = lab.pod(1, "near").await;
    let other = lab.pod(0, "other").await;
    let web = lab.pod(1, "web").await;
    lab.control.settled().await;
    serve(&web);
    let mut streams = Vec::new();
    for pod in [&far, &near, &other] {
        streams.push(pod.connect(web.at(8080)).await.unwrap());
    }
    for stream in &mut streams {
        assert!(lives(stream).await);
    }
    let cut = async |stream: &mut TcpStream| {
        let mut byte = [0];
        !matches!(within("the cut", stream.read(&mut byte)).await, Ok(1..))
    };
    lab.control.policy(policy(Action::Deny, Scope::Namespace, "far"));
    assert!(cut(&mut streams[0]).await, "through a tunnel");
    assert!(lives(&mut streams[1]).await);
    assert!(lives(&mut streams[2]).await);
    lab.control.policy(policy(Action::Deny, Scope::Namespace, "near"));
    assert!(cut(&mut streams[1]).await, "on the same host");
    assert!(lives(&mut streams[2]).await, "whom it does not name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_a_workload_lists_later_cuts_too() {
    let lab = Lab::new().await;
    let far = lab.pod(0, "far").await;
    let web = lab.pod(1, "web").await;
    lab.control
        .policy(policy(Action::Deny, Scope::WorkloadSelector, "far"));
    lab.control.settled().await;
    serve(&web);
    let mut stream = far.connect(web.at(8080)).await.unwrap();
    assert!(lives(&mut stream).await, "it is not listed yet");
    let mut listing = web.workload();
    listing.authorization_policies = vec![format!("{NAMESPACE}/p")];
    lab.control.workload(listing);
    let mut byte = [0];
    assert!(!matches!(
        within("the cut", stream.read(&mut byte)).await,
        Ok(1..)
    ));
    until("a new one is refused", async || {
        !carries(far.connect(web.at(8080)).await).await
    })
    .await;
}
