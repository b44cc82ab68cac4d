use std::collections::BTreeMap;

use mesh_api::istio::workload as wire;
use proptest::prelude::*;

use super::*;
use crate::state::Interner;

fn workload(name: &str, ip: [u8; 4], services: &[&str]) -> Arc<Workload> {
    let wire = wire::Workload {
        uid: format!("c//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![ip.to_vec()],
        services: services
            .iter()
            .map(|key| ((*key).to_owned(), wire::PortList::default()))
            .collect(),
        ..Default::default()
    };
    Arc::new(Workload::parse(&wire, &mut Interner::default()).unwrap())
}

fn service(namespace: &str, hostname: &str, vips: &[(&[u8], Option<u32>)]) -> wire::Service {
    wire::Service {
        name: "web".to_owned(),
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        addresses: vips
            .iter()
            .map(|(ip, length)| wire::NetworkAddress {
                network: String::new(),
                address: ip.to_vec(),
                length: *length,
            })
            .collect(),
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn parsed(s: &wire::Service) -> Change {
    Change::Service(Arc::new(Service::parse(s, &mut Interner::default()).unwrap()))
}

fn endpoints(state: &State, key: &str) -> Vec<String> {
    let key = ServiceKey::parse(key, &mut Interner::default()).unwrap();
    state
        .snapshot()
        .service(&key)
        .map(|view| view.endpoints.iter().map(|w| w.name.to_string()).collect())
        .unwrap_or_default()
}

const WEB: &str = "shop/web.shop.svc.cluster.local";
const WEB_HOST: &str = "web.shop.svc.cluster.local";

#[test]
fn endpoints_that_come_before_their_service_are_in_it_when_it_comes() {
    let mut state = State::default();
    state.apply([Change::Workload(workload("a", [10, 0, 0, 1], &[WEB]))]);
    assert!(state.snapshot().service_named(WEB_HOST, "shop").is_none());
    state.apply([parsed(&service("shop", WEB_HOST, &[(&[10, 96, 0, 1], None)]))]);
    assert_eq!(endpoints(&state, WEB), ["a"]);
}

#[test]
fn a_service_told_anew_keeps_its_endpoints() {
    let mut state = State::default();
    state.apply([
        parsed(&service("shop", WEB_HOST, &[(&[10, 96, 0, 1], None)])),
        Change::Workload(workload("a", [10, 0, 0, 1], &[WEB])),
    ]);
    state.apply([parsed(&service("shop", WEB_HOST, &[(&[10, 96, 0, 2], None)]))]);
    assert_eq!(endpoints(&state, WEB), ["a"]);
    let at = |ip: [u8; 4]| state.snapshot().service_at("", ip.into(), "shop").is_some();
    assert!(!at([10, 96, 0, 1]), "the old address is still the service's");
    assert!(at([10, 96, 0, 2]));
}

#[test]
fn a_range_serves_its_endpoints_as_they_are_now() {
    let mut state = State::default();
    state.apply([parsed(&service("shop", WEB_HOST, &[(&[10, 96, 7, 0], Some(24))]))]);
    for i in 1..=3 {
        state.apply([Change::Workload(workload(
            &format!("w{i}"),
            [10, 0, 0, i],
            &[WEB],
        ))]);
        let view = state
            .snapshot()
            .service_at("", [10, 96, 7, 9].into(), "x")
            .unwrap();
        assert_eq!(view.endpoints.len(), usize::from(i));
    }
    state.apply([Change::RemoveAddress(WEB.into())]);
    assert!(
        state
            .snapshot()
            .service_at("", [10, 96, 7, 9].into(), "x")
            .is_none()
    );
}

#[test]
fn the_longest_range_and_then_the_single_address_win() {
    let mut state = State::default();
    state.apply([
        parsed(&service("a", "wide.a", &[(&[10, 96, 0, 0], Some(16))])),
        parsed(&service("a", "narrow.a", &[(&[10, 96, 1, 0], Some(24))])),
        parsed(&service("a", "one.a", &[(&[10, 96, 1, 1], Some(32))])),
    ]);
    let at = |ip: [u8; 4]| {
        let view = state.snapshot().service_at("", ip.into(), "x").unwrap();
        view.service.key.hostname.to_string()
    };
    assert_eq!(at([10, 96, 9, 9]), "wide.a");
    assert_eq!(at([10, 96, 1, 9]), "narrow.a");
    assert_eq!(at([10, 96, 1, 1]), "one.a");
}

#[test]
fn a_clients_own_namespace_comes_first_then_the_canonical_service() {
    let mut canonical = service("b", "db.example", &[(&[10, 96, 0, 5], None)]);
    canonical.canonical = true;
    let mut hidden = service("d", "db.example", &[(&[10, 96, 0, 5], None)]);
    hidden.visibility = wire::service::Visibility::Namespace.into();
    hidden.canonical = true;
    let mut state = State::default();
    state.apply([
        parsed(&service("a", "db.example", &[(&[10, 96, 0, 5], None)])),
        parsed(&canonical),
        parsed(&service("c", "db.example", &[(&[10, 96, 0, 5], None)])),
        parsed(&hidden),
    ]);
    for (client, chosen) in [("c", "c"), ("x", "b"), ("d", "d")] {
        let by_name = state.snapshot().service_named("db.example", client).unwrap();
        let by_address = state
            .snapshot()
            .service_at("", [10, 96, 0, 5].into(), client)
            .unwrap();
        assert_eq!(*by_name.service.key.namespace, *chosen, "client in {client}");
        assert_eq!(*by_address.service.key.namespace, *chosen, "client in {client}");
    }
}

#[test]
fn an_address_that_changed_hands_is_the_newest_workloads() {
    let mut state = State::default();
    let at = |state: &State| {
        state
            .snapshot()
            .workload_at("", [10, 0, 0, 1].into())
            .map(|w| w.name.to_string())
    };
    state.apply([Change::Workload(workload("old", [10, 0, 0, 1], &[]))]);
    state.apply([Change::Workload(workload("new", [10, 0, 0, 1], &[]))]);
    assert_eq!(at(&state).as_deref(), Some("new"));
    state.apply([Change::RemoveAddress("c//Pod/shop/new".into())]);
    assert_eq!(at(&state).as_deref(), Some("old"));
    state.apply([Change::RemoveAddress("c//Pod/shop/old".into())]);
    assert_eq!(at(&state), None);
}

#[test]
fn only_what_may_change_a_decision_moves_the_policy_epoch() {
    let mut state = State::default();
    let epoch = |state: &State| state.snapshot().policy_epoch();
    state.apply([Change::Workload(workload("a", [10, 0, 0, 1], &[]))]);
    assert_eq!(epoch(&state), 0, "a workload without policies");
    let mut listed = (*workload("a", [10, 0, 0, 1], &[])).clone();
    listed.policies = Box::new(["shop/deny".into()]);
    state.apply([Change::Workload(Arc::new(listed.clone()))]);
    assert_eq!(epoch(&state), 1, "it lists a policy now");
    listed.health = crate::state::Health::Unhealthy;
    state.apply([Change::Workload(Arc::new(listed))]);
    assert_eq!(epoch(&state), 1, "only its health changed");
    state.apply([Change::RemovePolicy("shop/unknown".into())]);
    assert_eq!(epoch(&state), 1, "there was no such policy");
}

#[test]
fn a_push_copies_no_workload_that_it_does_not_name() {
    let mut state = State::default();
    state.apply((0..=255).map(|i| Change::Workload(workload(&format!("w{i}"), [10, 0, 0, i], &[WEB]))));
    let before = state.snapshot().clone();
    state.apply([Change::Workload(workload("w7", [10, 0, 1, 7], &[WEB]))]);
    let after = state.snapshot();
    let shared = (0..=255)
        .filter(|i| {
            let uid = format!("c//Pod/shop/w{i}");
            Arc::ptr_eq(before.workload(&uid).unwrap(), after.workload(&uid).unwrap())
        })
        .count();
    assert_eq!(shared, 255);
    assert!(
        before.workload_at("", [10, 0, 1, 7].into()).is_none(),
        "an old snapshot changed"
    );
}

#[derive(Debug, Clone)]
enum Op {
    Workload { name: u8, ip: u8, services: Vec<u8> },
    Service { name: u8, vip: u8 },
    RemoveWorkload(u8),
    RemoveService(u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..6u8, 0..6u8, prop::collection::vec(0..4u8, 0..3)).prop_map(|(name, ip, services)| Op::Workload {
            name,
            ip,
            services
        }),
        (0..4u8, 0..4u8).prop_map(|(name, vip)| Op::Service { name, vip }),
        (0..6u8).prop_map(Op::RemoveWorkload),
        (0..4u8).prop_map(Op::RemoveService),
    ]
}

fn host(name: u8) -> String {
    format!("s{name}.shop.svc.cluster.local")
}

proptest! {
    /// However pushes are cut, the indices say what the plain lists say.
    #[test]
    fn the_indices_agree_with_a_plain_model(pushes in prop::collection::vec(prop::collection::vec(op(), 1..5), 1..12)) {
        let mut state = State::default();
        let mut workloads: BTreeMap<u8, (u8, Vec<u8>)> = BTreeMap::new();
        let mut services: BTreeMap<u8, u8> = BTreeMap::new();
        for push in pushes {
            let mut changes = Vec::new();
            for op in push {
                match op {
                    Op::Workload { name, ip, mut services } => {
                        services.sort_unstable();
                        services.dedup();
                        let keys: Vec<String> = services.iter().map(|s| format!("shop/{}", host(*s))).collect();
                        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                        changes.push(Change::Workload(workload(&format!("w{name}"), [10, 0, 0, ip], &keys)));
                        workloads.insert(name, (ip, services));
                    }
                    Op::Service { name, vip } => {
                        changes.push(parsed(&service("shop", &host(name), &[(&[10, 96, 0, vip], None)])));
                        services.insert(name, vip);
                    }
                    Op::RemoveWorkload(name) => {
                        changes.push(Change::RemoveAddress(format!("c//Pod/shop/w{name}").into()));
                        workloads.remove(&name);
                    }
                    Op::RemoveService(name) => {
                        changes.push(Change::RemoveAddress(format!("shop/{}", host(name)).into()));
                        services.remove(&name);
                    }
                }
            }
            state.apply(changes);
            let snapshot = state.snapshot();
            prop_assert_eq!(snapshot.counts(), (workloads.len(), services.len()));
            for name in 0..4u8 {
                let view = snapshot.service_named(&host(name), "shop");
                prop_assert_eq!(view.is_some(), services.contains_key(&name));
                if let Some(view) = view {
                    let found: Vec<String> = view.endpoints.iter().map(|w| w.name.to_string()).collect();
                    let wanted: Vec<String> = workloads
                        .iter()
                        .filter(|(_, (_, members))| members.contains(&name))
                        .map(|(w, _)| format!("w{w}"))
                        .collect();
                    prop_assert_eq!(found, wanted);
                }
            }
            for ip in 0..6u8 {
                let found = snapshot.workload_at("", [10, 0, 0, ip].into()).map(|w| w.name.to_string());
                let holders: Vec<String> = workloads
                    .iter()
                    .filter(|(_, (at, _))| *at == ip)
                    .map(|(w, _)| format!("w{w}"))
                    .collect();
                match found {
                    Some(found) => prop_assert!(holders.contains(&found)),
                    None => prop_assert!(holders.is_empty()),
                }
            }
            for vip in 0..4u8 {
                let found = snapshot.service_at("", [10, 96, 0, vip].into(), "x");
                let known = services.values().any(|v| *v == vip);
                prop_assert_eq!(found.is_some(), known);
            }
        }
    }
}
