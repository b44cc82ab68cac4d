use std::collections::BTreeMap;

use mesh_api::istio::workload as wire;
use proptest::prelude::*;

use super::*;
use crate::state::Interner;

const KEY: &str = "shop/web.shop";

#[derive(Clone)]
struct Endpoint {
    name: &'static str,
    zone: &'static str,
    region: &'static str,
    node: &'static str,
    capacity: Option<u32>,
    healthy: bool,
    ports: Vec<(u32, u32)>,
}

fn endpoint(name: &'static str) -> Endpoint {
    Endpoint {
        name,
        zone: "z",
        region: "r",
        node: "n",
        capacity: None,
        healthy: true,
        ports: vec![],
    }
}

impl Endpoint {
    fn workload(self) -> Arc<Workload> {
        let ports = self
            .ports
            .iter()
            .map(|&(service_port, target_port)| wire::Port {
                service_port,
                target_port,
                ..Default::default()
            })
            .collect();
        let wire = wire::Workload {
            uid: self.name.to_owned(),
            name: self.name.to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, 1]],
            node: self.node.to_owned(),
            locality: Some(wire::Locality {
                region: self.region.to_owned(),
                zone: self.zone.to_owned(),
                subzone: String::new(),
            }),
            capacity: self.capacity,
            status: if self.healthy {
                wire::WorkloadStatus::Healthy
            } else {
                wire::WorkloadStatus::Unhealthy
            }
            .into(),
            services: [(KEY.to_owned(), wire::PortList { ports })].into(),
            ..Default::default()
        };
        Arc::new(Workload::parse(&wire, &mut Interner::default()).unwrap())
    }
}

fn service(mode: wire::load_balancing::Mode, scopes: &[wire::load_balancing::Scope]) -> Service {
    let wire = wire::Service {
        namespace: "shop".to_owned(),
        hostname: "web.shop".to_owned(),
        ports: vec![
            wire::Port {
                service_port: 80,
                target_port: 8080,
                ..Default::default()
            },
            wire::Port {
                service_port: 90,
                ..Default::default()
            },
        ],
        load_balancing: Some(wire::LoadBalancing {
            mode: mode.into(),
            routing_preference: scopes.iter().map(|s| i32::from(*s)).collect(),
            health_policy: 0,
        }),
        ..Default::default()
    };
    Service::parse(&wire, &mut Interner::default()).unwrap()
}

fn any_service() -> Service {
    service(wire::load_balancing::Mode::UnspecifiedMode, &[])
}

fn here() -> Client {
    Client {
        workload: Some(endpoint("client").workload()),
        node: "n".into(),
        ..Client::default()
    }
}

/// How often each is chosen, over evenly spread draws.
fn spread(service: &Service, endpoints: &[Arc<Workload>]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for i in 0..1000u64 {
        let draw = i * (u64::MAX / 1000);
        if let Ok(chosen) = choose(&here(), service, endpoints, 80, draw, |_| false) {
            *counts.entry(chosen.endpoint.name.to_string()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn connections_spread_by_capacity() {
    let endpoints = [
        Endpoint {
            capacity: Some(1),
            ..endpoint("a")
        },
        Endpoint {
            capacity: Some(3),
            ..endpoint("b")
        },
        Endpoint {
            capacity: Some(0),
            ..endpoint("c")
        },
        endpoint("d"),
    ]
    .map(Endpoint::workload);
    let counts = spread(&any_service(), &endpoints);
    assert_eq!(counts.keys().collect::<Vec<_>>(), ["a", "b", "d"]);
    assert!((195..=205).contains(&counts["a"]), "{counts:?}");
    assert!((595..=605).contains(&counts["b"]), "{counts:?}");
}

#[test]
fn an_unhealthy_endpoint_is_left_out_unless_the_service_takes_it() {
    let endpoints = [
        endpoint("a"),
        Endpoint {
            healthy: false,
            ..endpoint("b")
        },
    ]
    .map(Endpoint::workload);
    assert_eq!(spread(&any_service(), &endpoints).len(), 1);
    let mut takes_all = any_service();
    takes_all.balance.unhealthy = UnhealthyEndpoints::Taken;
    assert_eq!(spread(&takes_all, &endpoints).len(), 2);
}

#[test]
fn the_endpoints_own_port_comes_before_the_services_and_that_before_the_same() {
    let own = Endpoint {
        ports: vec![(80, 8888)],
        ..endpoint("own")
    }
    .workload();
    let plain = endpoint("plain").workload();
    let port = |w: &Arc<Workload>, port| {
        choose(&here(), &any_service(), std::slice::from_ref(w), port, 0, |_| {
            false
        })
        .map(|c| c.port)
    };
    assert_eq!(port(&own, 80), Ok(8888));
    assert_eq!(port(&plain, 80), Ok(8080));
    assert_eq!(port(&plain, 90), Ok(90));
    assert_eq!(port(&plain, 91), Err(NoEndpoint::NoPort));
}

#[test]
fn each_way_to_have_no_endpoint_has_its_name() {
    let sick = [Endpoint {
        healthy: false,
        ..endpoint("a")
    }
    .workload()];
    let well = [endpoint("a").workload()];
    let far = [Endpoint {
        zone: "other",
        ..endpoint("a")
    }
    .workload()];
    let strict = service(
        wire::load_balancing::Mode::Strict,
        &[wire::load_balancing::Scope::Zone],
    );
    let try_one = |s: &Service, e: &[Arc<Workload>], tried: bool| {
        choose(&here(), s, e, 80, 0, |_| tried).map(|c| c.port)
    };
    assert_eq!(try_one(&any_service(), &[], false), Err(NoEndpoint::None));
    assert_eq!(
        try_one(&any_service(), &sick, false),
        Err(NoEndpoint::NoneHealthy)
    );
    assert_eq!(try_one(&any_service(), &well, true), Err(NoEndpoint::AllTried));
    assert_eq!(try_one(&strict, &far, false), Err(NoEndpoint::NoneNear));
    assert_eq!(try_one(&strict, &well, false), Ok(8080));
}

#[test]
fn failover_takes_the_nearest_and_then_the_next() {
    use wire::load_balancing::{Mode, Scope};
    let failover = service(Mode::Failover, &[Scope::Region, Scope::Zone, Scope::Node]);
    let same_node = endpoint("same-node").workload();
    let same_zone = Endpoint {
        node: "m",
        ..endpoint("same-zone")
    }
    .workload();
    let same_region = Endpoint {
        node: "m",
        zone: "y",
        ..endpoint("same-region")
    }
    .workload();
    let elsewhere = Endpoint {
        region: "q",
        ..endpoint("elsewhere")
    }
    .workload();
    let all = [elsewhere, same_region, same_zone, same_node];
    let mut tried: Vec<String> = Vec::new();
    let mut order = Vec::new();
    while let Ok(chosen) = choose(&here(), &failover, &all, 80, 7, |w| {
        tried.contains(&w.name.to_string())
    }) {
        order.push(chosen.endpoint.name.to_string());
        tried.push(chosen.endpoint.name.to_string());
    }
    assert_eq!(order, ["same-node", "same-zone", "same-region", "elsewhere"]);
}

proptest! {
    #[test]
    fn a_choice_is_healthy_untried_and_has_capacity(
        shape in prop::collection::vec((any::<bool>(), 0..3u32, any::<bool>()), 0..8),
        draw: u64,
    ) {
        let endpoints: Vec<_> = shape
            .iter()
            .map(|&(healthy, capacity, _)| {
                Endpoint { healthy, capacity: Some(capacity), ..endpoint("e") }.workload()
            })
            .collect();
        let index = |w: &Workload| endpoints.iter().position(|e| std::ptr::eq(&**e, w)).unwrap();
        let chosen = choose(&here(), &any_service(), &endpoints, 80, draw, |w| shape[index(w)].2);
        let possible = shape.iter().any(|&(healthy, capacity, tried)| healthy && capacity > 0 && !tried);
        prop_assert_eq!(chosen.is_ok(), possible);
        if let Ok(chosen) = chosen {
            let (healthy, capacity, tried) = shape[index(chosen.endpoint)];
            prop_assert!(healthy && capacity > 0 && !tried);
        }
    }
}
