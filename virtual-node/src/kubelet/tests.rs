//! The gate before the handlers, with real certificates and an API server that
//! answers reviews from a table.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::http::{Method, header::AUTHORIZATION};
use http_body_util::BodyExt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{RootCertStore, crypto::aws_lc_rs, server::WebPkiClientVerifier};
use serde_json::{Value, json};
use tower::{ServiceExt, service_fn};

use super::*;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
    }

    fn certificate(&self, name: &str, group: &str) -> Certificates {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters
            .distinguished_name
            .push(DnType::OrganizationName, group);
        parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = parameters
            .signed_by(&KeyPair::generate().unwrap(), &self.0)
            .unwrap();
        Certificates(Some([certificate.der().clone()].into()))
    }
}

/// An API server that knows the token `good` as `reader`, lets `admin` do all and
/// `reader` get `nodes/proxy`, and counts the reviews.
fn api_server(reviews: Arc<AtomicUsize>) -> Client {
    let service = service_fn(move |request: http::Request<kube::client::Body>| {
        reviews.fetch_add(1, Ordering::SeqCst);
        async move {
            let token_review = request.uri().path().ends_with("/tokenreviews");
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let spec = review["spec"].clone();
            review["status"] = if token_review {
                match spec["token"].as_str() {
                    Some("good") => {
                        json!({"authenticated": true, "user": {"username": "reader", "groups": ["g"]}})
                    }
                    _ => json!({"authenticated": false}),
                }
            } else {
                let attributes = &spec["resourceAttributes"];
                assert_eq!(
                    (&attributes["resource"], &attributes["name"]),
                    (&json!("nodes"), &json!("node"))
                );
                let allowed = match spec["user"].as_str() {
                    Some("admin") => true,
                    Some("reader") => attributes["verb"] == "get" && attributes["subresource"] == "proxy",
                    _ => false,
                };
                json!({"allowed": allowed})
            };
            let body = serde_json::to_vec(&review).unwrap();
            Ok::<_, std::convert::Infallible>(http::Response::new(kube::client::Body::from(body)))
        }
    });
    Client::new(service, "default")
}

struct Door {
    router: Router,
    reviews: Arc<AtomicUsize>,
    authority: Authority,
}

impl Door {
    fn new() -> Self {
        let authority = Authority::new();
        let mut roots = RootCertStore::empty();
        roots.add(authority.0.der().clone()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
            .build()
            .unwrap();
        let reviews = Arc::new(AtomicUsize::new(0));
        let client = api_server(reviews.clone());
        let gate = Gate {
            authenticator: Authenticator::new(client.clone(), verifier),
            authorizer: Authorizer::new(client, "node".into()),
        };
        let router = Router::new()
            .fallback(async || "served")
            .layer(middleware::from_fn_with_state(gate, admit));
        Self {
            router,
            reviews,
            authority,
        }
    }

    async fn knock(
        &self,
        method: Method,
        path: &str,
        certificates: Certificates,
        token: Option<&str>,
    ) -> u16 {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::empty())
            .unwrap();
        request.extensions_mut().insert(certificates);
        if let Some(token) = token {
            request
                .headers_mut()
                .insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        }
        self.router
            .clone()
            .oneshot(request)
            .await
            .unwrap()
            .status()
            .as_u16()
    }
}

const NOBODY: Certificates = Certificates(None);
const LOGS: &str = "/containerLogs/a/b/c";

#[tokio::test]
async fn nobody_is_anonymous() {
    let door = Door::new();
    assert_eq!(door.knock(Method::GET, LOGS, NOBODY, None).await, 401);
    assert_eq!(door.knock(Method::GET, "/healthz", NOBODY, None).await, 401);
    assert_eq!(door.knock(Method::GET, LOGS, NOBODY, Some("bad")).await, 401);
}

#[tokio::test]
async fn a_strangers_certificate_is_nobodys_and_asks_no_review() {
    let door = Door::new();
    let stranger = Authority::new().certificate("admin", "system:masters");
    assert_eq!(door.knock(Method::GET, LOGS, stranger, None).await, 401);
    assert_eq!(door.reviews.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_known_certificate_may_what_the_review_says() {
    let door = Door::new();
    let admin = door.authority.certificate("admin", "ops");
    assert_eq!(door.knock(Method::POST, "/exec/a/b/c", admin, None).await, 200);
    let other = door.authority.certificate("other", "ops");
    assert_eq!(door.knock(Method::GET, LOGS, other, None).await, 403);
}

#[tokio::test]
async fn a_right_to_read_is_no_right_to_run_whatever_the_method() {
    let door = Door::new();
    assert_eq!(door.knock(Method::GET, LOGS, NOBODY, Some("good")).await, 200);
    for path in ["/exec/a/b/c", "/attach/a/b/c", "/portForward/a/b"] {
        assert_eq!(
            door.knock(Method::GET, path, NOBODY, Some("good")).await,
            403,
            "{path}"
        );
    }
}

#[tokio::test]
async fn proxy_stands_in_for_the_fine_grained_subresources() {
    let door = Door::new();
    assert_eq!(door.knock(Method::GET, "/pods", NOBODY, Some("good")).await, 200);
    assert_eq!(
        door.knock(Method::GET, "/stats/summary", NOBODY, Some("good"))
            .await,
        403
    );
}

#[tokio::test]
async fn answers_of_reviews_are_kept() {
    let door = Door::new();
    for _ in 0..5 {
        assert_eq!(door.knock(Method::GET, LOGS, NOBODY, Some("good")).await, 200);
        assert_eq!(door.knock(Method::GET, LOGS, NOBODY, Some("bad")).await, 401);
    }
    // One token review each, one access review.
    assert_eq!(door.reviews.load(Ordering::SeqCst), 3);
}
