use mesh_api::istio::workload as wire;
use proptest::prelude::*;

use super::*;
use crate::state::Interner;

const POD: &str = "10.77.2.5";

fn request(method: Method, authority: &str) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = method;
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(authority.parse().unwrap());
    if request.method() != Method::CONNECT {
        uri.scheme = Some("http".parse().unwrap());
        uri.path_and_query = Some("/".parse().unwrap());
    }
    *request.uri_mut() = Uri::from_parts(uri).unwrap();
    request
}

fn asked(method: Method, authority: &str) -> Result<SocketAddr, InvalidRequest> {
    target(&request(method, authority), POD.parse().unwrap())
}

#[test]
fn a_tunnel_leads_to_the_pod_it_was_opened_to_and_nowhere_else() {
    assert_eq!(
        asked(Method::CONNECT, "10.77.2.5:8080"),
        Ok("10.77.2.5:8080".parse().unwrap())
    );
    assert_eq!(
        asked(Method::CONNECT, "10.77.2.6:8080"),
        Err(InvalidRequest::OtherAddress {
            asked: "10.77.2.6:8080".parse().unwrap(),
            tunnel: POD.parse().unwrap()
        })
    );
    assert_eq!(asked(Method::GET, "10.77.2.5:8080"), Err(InvalidRequest::Method));
    for authority in [
        "web.shop:80",
        "10.77.2.5",
        "user@10.77.2.5:80",
        "10.77.2.5:http",
        "010.77.2.5:80",
    ] {
        if let Ok(authority) = authority.parse::<http::uri::Authority>() {
            assert_eq!(
                asked(Method::CONNECT, authority.as_str()),
                Err(InvalidRequest::Authority),
                "{authority}"
            );
        }
    }
    for port in [0, 15001, 15006, 15008] {
        assert_eq!(
            asked(Method::CONNECT, &format!("10.77.2.5:{port}")),
            Err(InvalidRequest::MeshPort { port })
        );
    }
}

#[test]
fn a_request_without_authority_is_refused() {
    let mut bare = Request::new(());
    *bare.method_mut() = Method::CONNECT;
    assert_eq!(
        target(&bare, POD.parse().unwrap()),
        Err(InvalidRequest::Authority)
    );
}

#[test]
fn what_we_ask_is_what_the_far_side_reads() {
    let workload = Workload::parse(
        &wire::Workload {
            uid: "u".to_owned(),
            name: "client-1".to_owned(),
            namespace: "shop".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            workload_name: "client".to_owned(),
            canonical_name: "client".to_owned(),
            ..Default::default()
        },
        &mut Interner::default(),
    )
    .unwrap();
    let to = "10.77.2.5:8080".parse().unwrap();
    let request = connect(
        to,
        "10.77.1.2:5555".parse().unwrap(),
        Some("web.shop.svc"),
        Some(&workload),
    );
    assert_eq!(target(&request, POD.parse().unwrap()), Ok(to));
    let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("forwarded"), "for=\"10.77.1.2:5555\";host=web.shop.svc");
    assert_eq!(
        header("baggage"),
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=client,service.name=client"
    );
    let trace = header("traceparent");
    let parts: Vec<_> = trace.split('-').map(str::len).collect();
    assert_eq!(parts, [2, 32, 16, 2], "{trace}");
}

proptest! {
    #[test]
    fn no_header_breaks_a_request(value: Vec<u8>, authority in "[ -~]{0,40}") {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        for name in [FORWARDED, BAGGAGE, TRACEPARENT] {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                request.headers_mut().insert(name, value);
            }
        }
        let mut uri = http::uri::Parts::default();
        uri.authority = authority.parse().ok();
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        if let Ok(address) = target(&request, POD.parse().unwrap()) {
            prop_assert_eq!(address.ip().to_string(), POD);
        }
    }

    #[test]
    fn any_names_make_a_request(service in ".{0,40}", namespace in ".{0,40}") {
        let workload = Workload::parse(
            &wire::Workload { uid: "u".to_owned(), namespace: "a".to_owned(), workload_name: namespace, ..Default::default() },
            &mut Interner::default(),
        ).unwrap();
        let to = "10.77.2.5:8080".parse().unwrap();
        let request = connect(to, to, Some(&service), Some(&workload));
        prop_assert_eq!(target(&request, POD.parse().unwrap()), Ok(to));
    }
}
