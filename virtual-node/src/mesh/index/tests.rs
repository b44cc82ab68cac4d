use std::fmt::Write;

use mesh_api::istio::workload::{self as wire, address::Type};
use pool_agent_api::{Attempt, HostName, Namespace as NamespaceName, PodName, PodUid, ServiceAccountName};
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};

use super::*;
use crate::placement::Placement;

const NODE: &str = "spindrift-demo";

fn cluster() -> Cluster {
    Cluster {
        id: "Kubernetes".to_owned(),
        network: String::new(),
        trust_domain: "cluster.local".to_owned(),
        domain: "cluster.local".to_owned(),
    }
}

/// Objects as the API server would list them.
#[derive(Debug, Clone, Default)]
struct Objects(Vec<Value>);

impl Objects {
    fn of_kind<K: serde::de::DeserializeOwned>(&self, kind: &str) -> Vec<K> {
        self.0
            .iter()
            .filter(|object| object["kind"] == kind)
            .map(|object| serde_json::from_value(object.clone()).unwrap())
            .collect()
    }

    fn listed(&self) -> [Event; 4] {
        let pods = self.of_kind::<k8s_openapi::api::core::v1::Pod>("Pod");
        let services = self.of_kind::<k8s_openapi::api::core::v1::Service>("Service");
        let slices = self.of_kind::<k8s_openapi::api::discovery::v1::EndpointSlice>("EndpointSlice");
        let namespaces = self.of_kind::<k8s_openapi::api::core::v1::Namespace>("Namespace");
        [
            Event::Pod(Change::Listed(
                pods.iter()
                    .filter_map(|o| Some((Key::of(&o.metadata)?, Pod::parse(o)?)))
                    .collect(),
            )),
            Event::Service(Change::Listed(
                services
                    .iter()
                    .filter_map(|o| Some((Key::of(&o.metadata)?, Service::parse(o)?)))
                    .collect(),
            )),
            Event::Slice(Change::Listed(
                slices
                    .iter()
                    .filter_map(|o| Some((Key::of(&o.metadata)?, Slice::parse(o)?)))
                    .collect(),
            )),
            Event::Namespace(Change::Listed(
                namespaces
                    .iter()
                    .filter_map(|o| Some((o.metadata.name.as_deref()?.into(), Namespace::parse(&o.metadata))))
                    .collect(),
            )),
        ]
    }

    fn index(&self) -> Index {
        let mut index = Index::new(cluster(), NODE);
        self.listed().into_iter().for_each(|event| index.apply(event));
        index
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.index().publish().unwrap()
    }
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A running, ready pod of ours.
fn pod(namespace: &str, name: &str, ip: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}")},
        "spec": {"containers": [], "nodeName": NODE, "serviceAccountName": "web"},
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn service(namespace: &str, name: &str, ip: &str, ports: Value) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": ports},
    })
}

fn slice(namespace: &str, name: &str, service: &str, ports: Value, endpoints: Value) -> Value {
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": service},
        },
        "ports": ports, "endpoints": endpoints,
    })
}

fn of_pod(name: &str, ip: &str) -> Value {
    json!({
        "addresses": [ip], "conditions": {"ready": true},
        "targetRef": {"kind": "Pod", "name": name, "uid": format!("uid-{name}")},
    })
}

fn workload(snapshot: &Snapshot, name: &str) -> wire::Workload {
    let resource = snapshot.get(name).unwrap_or_else(|| panic!("no {name}"));
    match wire::Address::decode(&resource.body[..]).unwrap().r#type {
        Some(Type::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

fn tunnel(snapshot: &Snapshot, name: &str) -> wire::TunnelProtocol {
    workload(snapshot, name).tunnel_protocol()
}

fn render(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    for resource in snapshot.iter() {
        let address = wire::Address::decode(&resource.body[..]).unwrap();
        writeln!(text, "## {}", resource.name).unwrap();
        writeln!(text, "aliases: {:?}", resource.aliases).unwrap();
        match address.r#type.unwrap() {
            Type::Workload(workload) => writeln!(text, "{workload:#?}").unwrap(),
            Type::Service(service) => writeln!(text, "{service:#?}").unwrap(),
        }
    }
    text
}

fn demo() -> Objects {
    let mut web = pod("shop", "web-5d9c-x", "10.77.1.2");
    web["metadata"]["labels"] = json!({"app": "web", "version": "v2", "pod-template-hash": "5d9c"});
    web["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9c", "uid": "rs", "controller": true}]);
    let mut starting = pod("shop", "web-5d9c-y", "10.77.2.2");
    starting["status"]["conditions"] = json!([]);
    let mut elsewhere = pod("shop", "old", "10.88.0.7");
    elsewhere["spec"]["nodeName"] = json!("a-real-node");
    let mut daemon = pod("kube-system", "proxy", "192.0.2.7");
    daemon["spec"]["hostNetwork"] = json!(true);
    let mut headless = service(
        "shop",
        "db",
        "None",
        json!([{"name": "sql", "port": 3306, "targetPort": "sql", "protocol": "TCP"}]),
    );
    headless["spec"]["publishNotReadyAddresses"] = json!(true);
    let mut local = service(
        "shop",
        "agent",
        "10.96.0.9",
        json!([{"port": 9, "targetPort": 9}]),
    );
    local["spec"]["internalTrafficPolicy"] = json!("Local");
    Objects(vec![
        namespace("default", json!({})),
        namespace("shop", json!({"istio.io/dataplane-mode": "ambient"})),
        namespace("kube-system", json!({})),
        web,
        starting,
        elsewhere,
        daemon,
        service(
            "shop",
            "web",
            "10.96.0.10",
            json!([
                {"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"},
                {"name": "metrics", "port": 9090, "targetPort": 9091, "protocol": "TCP"},
                {"name": "quic", "port": 80, "targetPort": 8443, "protocol": "UDP"},
            ]),
        ),
        slice(
            "shop",
            "web-abc",
            "web",
            json!([
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"name": "metrics", "port": 9091, "protocol": "TCP"},
                {"name": "quic", "port": 8443, "protocol": "UDP"},
            ]),
            json!([
                of_pod("web-5d9c-x", "10.77.1.2"),
                of_pod("web-5d9c-y", "10.77.2.2"),
                of_pod("old", "10.88.0.7")
            ]),
        ),
        headless,
        local,
        service(
            "default",
            "kubernetes",
            "10.96.0.1",
            json!([{"name": "https", "port": 443, "targetPort": 6443, "protocol": "TCP"}]),
        ),
        slice(
            "default",
            "kubernetes",
            "kubernetes",
            json!([{"name": "https", "port": 6443, "protocol": "TCP"}]),
            json!([{"addresses": ["192.0.2.1"], "conditions": {"ready": true}}]),
        ),
        json!({
            "kind": "Service", "metadata": {"name": "outside", "namespace": "shop"},
            "spec": {"type": "ExternalName", "externalName": "example.com"},
        }),
    ])
}

#[test]
fn a_cluster_becomes_istios_workloads_and_services() {
    insta::assert_snapshot!(render(&demo().snapshot()));
}

#[test]
fn nothing_is_published_before_each_kind_is_listed() {
    let mut index = Index::new(cluster(), NODE);
    let events = demo().listed();
    for (at, event) in events.into_iter().enumerate() {
        assert_eq!(index.publish(), None, "after {at} kinds");
        index.apply(event);
    }
    assert!(index.publish().is_some());
    assert_eq!(index.publish(), None, "nothing changed since");
}

#[test]
fn an_empty_cluster_is_published_too() {
    assert!(Objects::default().snapshot().is_empty());
}

#[test]
fn a_change_that_means_nothing_to_the_mesh_is_not_published() {
    let objects = demo();
    let mut index = objects.index();
    index.publish().unwrap();
    objects.listed().into_iter().for_each(|event| index.apply(event));
    assert_eq!(index.publish(), None);
}

#[test]
fn only_enrolled_pods_of_our_node_with_an_address_of_their_own_are_tunnelled() {
    let case = |change: &dyn Fn(&mut Value), labels: Value| {
        let mut pod = pod("shop", "web", "10.77.1.2");
        change(&mut pod);
        let snapshot = Objects(vec![namespace("shop", labels), pod]).snapshot();
        tunnel(&snapshot, "Kubernetes//Pod/shop/web")
    };
    let label = |value: &'static str| {
        move |pod: &mut Value| pod["metadata"]["labels"] = json!({"istio.io/dataplane-mode": value})
    };
    let (none, hbone) = (wire::TunnelProtocol::None, wire::TunnelProtocol::Hbone);
    let out = json!({"istio.io/dataplane-mode": "none"});
    assert_eq!(case(&|_| {}, json!({})), hbone);
    assert_eq!(case(&|_| {}, out.clone()), none);
    assert_eq!(case(&label("none"), json!({})), none);
    assert_eq!(case(&label("ambient"), out), hbone);
    assert_eq!(case(&|p| p["spec"]["nodeName"] = json!("other"), json!({})), none);
    assert_eq!(case(&|p| p["spec"]["hostNetwork"] = json!(true), json!({})), none);
}

fn placed(name: &str, enrolled: bool) -> Event {
    let placement = Placement {
        host: HostName::parse("host", "host-a").unwrap(),
        attempt: Attempt::FIRST,
        namespace: NamespaceName::parse("namespace", "shop").unwrap(),
        name: PodName::parse("name", name).unwrap(),
        service_account: ServiceAccountName::parse("account", "web").unwrap(),
        enrolled,
    };
    let uid = PodUid::parse("uid", format!("uid-{name}")).unwrap();
    Event::Placements(Arc::new(Placements {
        pods: [(uid, placement)].into(),
        ..Placements::default()
    }))
}

#[test]
fn labels_that_change_later_move_no_running_pod_in_or_out() {
    let objects = |labels| Objects(vec![namespace("shop", labels), pod("shop", "web", "10.77.1.2")]);
    let opted_out = json!({"istio.io/dataplane-mode": "none"});
    let name = "Kubernetes//Pod/shop/web";
    let mut index = objects(json!({})).index();
    index.apply(placed("web", true));
    assert_eq!(
        tunnel(&index.publish().unwrap(), name),
        wire::TunnelProtocol::Hbone
    );
    // The namespace opts out; the pod's host still has it in the mesh.
    let [_, _, _, namespaces] = objects(opted_out).listed();
    index.apply(namespaces);
    assert_eq!(index.publish(), None);
    // When the placement goes, the label is all there is.
    index.apply(Event::Placements(Arc::default()));
    assert_eq!(
        tunnel(&index.publish().unwrap(), name),
        wire::TunnelProtocol::None
    );
    index.apply(placed("web", true));
    assert_eq!(
        tunnel(&index.publish().unwrap(), name),
        wire::TunnelProtocol::Hbone
    );
}

#[test]
fn an_endpoint_of_the_last_pod_of_a_name_is_not_the_new_ones() {
    let mut new = pod("shop", "db-0", "10.77.1.3");
    new["metadata"]["uid"] = json!("uid-new");
    let ports = json!([{"name": "", "port": 5432, "protocol": "TCP"}]);
    let objects = Objects(vec![
        namespace("shop", json!({})),
        new,
        service(
            "shop",
            "db",
            "10.96.0.3",
            json!([{"port": 5432, "protocol": "TCP"}]),
        ),
        slice("shop", "db-x", "db", ports, json!([of_pod("db-0", "10.77.1.2")])),
    ]);
    let snapshot = objects.snapshot();
    let workload = workload(&snapshot, "Kubernetes//Pod/shop/db-0");
    assert!(workload.services.is_empty(), "{workload:?}");
}

#[test]
fn a_slice_makes_no_service_out_of_another_namespaces_pods() {
    let mut endpoint = of_pod("web", "10.77.1.2");
    endpoint["targetRef"]["namespace"] = json!("shop");
    let ports = json!([{"name": "", "port": 80, "protocol": "TCP"}]);
    let objects = Objects(vec![
        namespace("shop", json!({})),
        namespace("thief", json!({})),
        pod("shop", "web", "10.77.1.2"),
        service("thief", "web", "10.96.0.3", json!([{"port": 80}])),
        slice("thief", "web-x", "web", ports, json!([endpoint])),
    ]);
    let snapshot = objects.snapshot();
    assert!(
        workload(&snapshot, "Kubernetes//Pod/shop/web")
            .services
            .is_empty()
    );
    assert_eq!(snapshot.len(), 2, "the pod and the service, no endpoint");
}

/// A small world of changes that meet each other.
fn events() -> impl Strategy<Value = Event> {
    let change = |key: Key, value: Option<Value>, kind: &str| -> Event {
        macro_rules! change {
            ($event:path, $kind:ty, $parse:path) => {{
                let parsed = value.and_then(|v| $parse(&serde_json::from_value::<$kind>(v).unwrap()));
                $event(match parsed {
                    Some(parsed) => Change::Set(key, parsed),
                    None => Change::Gone(key),
                })
            }};
        }
        match kind {
            "Pod" => change!(Event::Pod, k8s_openapi::api::core::v1::Pod, Pod::parse),
            "Service" => change!(
                Event::Service,
                k8s_openapi::api::core::v1::Service,
                Service::parse
            ),
            _ => change!(
                Event::Slice,
                k8s_openapi::api::discovery::v1::EndpointSlice,
                Slice::parse
            ),
        }
    };
    let pods = (0..3u8, 0..3u8, any::<bool>()).prop_map(move |(n, uid, there)| {
        let name = format!("p{n}");
        let mut object = pod("shop", &name, &format!("10.77.1.{n}"));
        object["metadata"]["uid"] = json!(format!("uid-p{}", if uid == 0 { 9 } else { n }));
        change(Key::new("shop", &name), there.then_some(object), "Pod")
    });
    let services = (0..2u8, 0..3u8, any::<bool>()).prop_map(move |(n, ports, there)| {
        let name = format!("s{n}");
        let ports: Vec<_> = (0..ports)
            .map(|p| json!({"name": format!("port{p}"), "port": 80 + p}))
            .collect();
        let object = service("shop", &name, &format!("10.96.0.{n}"), json!(ports));
        change(Key::new("shop", &name), there.then_some(object), "Service")
    });
    let slices = (0..3u8, 0..2u8, 0..16u8, any::<bool>()).prop_map(move |(n, service, members, there)| {
        let name = format!("e{n}");
        let mut endpoints: Vec<_> = (0..3u8)
            .filter(|p| members & (1 << p) != 0)
            .map(|p| of_pod(&format!("p{p}"), &format!("10.77.1.{p}")))
            .collect();
        if members & 8 != 0 {
            // An address that is no pod, twice.
            endpoints.push(json!({"addresses": ["192.0.2.1"]}));
            endpoints.push(json!({"addresses": ["192.0.2.1"], "conditions": {"ready": false}}));
        }
        let ports = json!([{"name": "port0", "port": 8080}, {"name": "port1", "port": 8081}]);
        let object = slice("shop", &name, &format!("s{service}"), ports, json!(endpoints));
        change(Key::new("shop", &name), there.then_some(object), "EndpointSlice")
    });
    let namespaces = any::<bool>().prop_map(|out| {
        let mode = out.then_some(DataplaneMode::None);
        Event::Namespace(Change::Set("shop".into(), Namespace { mode }))
    });
    let placements = (0..3u8, any::<bool>()).prop_map(|(n, enrolled)| placed(&format!("p{n}"), enrolled));
    prop_oneof![4 => pods, 2 => services, 4 => slices, 1 => namespaces, 1 => placements]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn changes_in_any_order_end_as_a_translation_of_what_is_there(
        events in prop::collection::vec((events(), any::<bool>()), 0..40),
    ) {
        let mut index = Objects::default().index();
        let mut published = index.publish().unwrap();
        for (event, publish) in events {
            index.apply(event);
            if publish && let Some(new) = index.publish() {
                published = new;
            }
        }
        if let Some(new) = index.publish() {
            published = new;
        }
        let mut anew = Index::new(cluster(), NODE);
        anew.apply(Event::Placements(Arc::clone(&index.placements)));
        anew.apply(Event::Pod(Change::Listed(index.pods.objects.clone())));
        anew.apply(Event::Slice(Change::Listed(index.slices.objects.clone())));
        anew.apply(Event::Namespace(Change::Listed(index.namespaces.objects.clone())));
        anew.apply(Event::Service(Change::Listed(index.services.objects.clone())));
        let anew_published = anew.publish().unwrap();
        prop_assert_eq!(&published, &anew_published);
        // Nothing is left behind in the reverse indexes.
        prop_assert_eq!(&index.of_pod, &anew.of_pod);
        prop_assert_eq!(&index.of_service, &anew.of_service);
        prop_assert_eq!(&index.endpoints, &anew.endpoints);
    }
}
