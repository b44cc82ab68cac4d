use mesh_api::istio::workload as wire;

use super::*;
use crate::state::{Change, Interner, Service, State};

fn network() -> Network {
    Network {
        name: "".into(),
        cluster_pods: "10.77.0.0/16".parse().unwrap(),
        host: ["192.0.2.11".parse().unwrap(), "10.77.1.0".parse().unwrap()].into(),
        off_limits: Arc::new(
            OffLimits::new(
                &["10.77.0.0/16".parse().unwrap(), "10.78.0.0/16".parse().unwrap()],
                &["192.0.2.0/24".parse().unwrap()],
                ["192.0.2.1:6443".parse().unwrap()],
            )
            .unwrap(),
        ),
    }
}

fn state() -> State {
    let mut strings = Interner::default();
    let workload = wire::Workload {
        uid: "w".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 77, 2, 5], vec![10, 96, 0, 2]],
        ..Default::default()
    };
    let service = wire::Service {
        namespace: "shop".to_owned(),
        hostname: "web.shop".to_owned(),
        addresses: [[10, 96, 0, 1], [10, 96, 0, 2], [127, 0, 0, 5]]
            .map(|ip| wire::NetworkAddress {
                address: ip.to_vec(),
                ..Default::default()
            })
            .to_vec(),
        ..Default::default()
    };
    let mut state = State::default();
    state.apply([
        Change::Workload(Arc::new(Workload::parse(&workload, &mut strings).unwrap())),
        Change::Service(Arc::new(Service::parse(&service, &mut strings).unwrap())),
    ]);
    state
}

fn resolved(to: &str) -> String {
    let state = state();
    match resolve(&network(), state.snapshot(), "shop", to.parse().unwrap()) {
        Destination::Service(view) => format!("service {}", view.service.key.hostname),
        Destination::Workload(workload) => format!("workload {}", workload.uid),
        Destination::UnknownPod => "unknown pod".to_owned(),
        Destination::Outside => "outside".to_owned(),
        Destination::Refused(Refused::HostLocal) => "host local".to_owned(),
        Destination::Refused(Refused::NotUnicast) => "not unicast".to_owned(),
        Destination::Refused(Refused::OffLimits) => "off limits".to_owned(),
    }
}

#[test]
fn each_address_goes_where_it_belongs() {
    for (to, wanted) in [
        ("10.96.0.1:80", "service web.shop"),
        ("10.96.0.2:80", "service web.shop"),
        ("10.77.2.5:80", "workload w"),
        ("10.77.2.6:80", "unknown pod"),
        // Of the pool, whatever the tenant says of its own pods.
        ("10.78.2.6:80", "unknown pod"),
        ("[::ffff:10.77.2.5]:80", "workload w"),
        ("198.51.100.1:443", "outside"),
        ("10.96.0.9:80", "outside"),
    ] {
        assert_eq!(resolved(to), wanted, "{to}");
    }
}

#[test]
fn what_is_local_to_the_host_is_refused_whatever_the_mesh_says_of_it() {
    for to in [
        "127.0.0.1:15001",
        "127.0.0.5:80",
        "169.254.1.1:15001",
        "169.254.169.254:80",
        "192.0.2.11:7443",
        "10.77.1.0:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[fe80::1]:80",
    ] {
        assert_eq!(resolved(to), "host local", "{to}");
    }
    for to in [
        "0.0.0.0:80",
        "0.1.2.3:80",
        "224.0.0.1:80",
        "255.255.255.255:80",
        "240.0.0.1:80",
        "[ff02::1]:80",
    ] {
        assert_eq!(resolved(to), "not unicast", "{to}");
    }
}

#[test]
fn what_is_the_pools_is_dialled_for_nobody_but_where_the_operator_allows_it() {
    for (to, refused) in [
        ("192.0.2.12:7443", Some(Refused::OffLimits)),
        ("192.0.2.1:7443", Some(Refused::OffLimits)),
        ("192.0.2.1:6443", None),
        // The host's own, whatever is allowed.
        ("192.0.2.11:7443", Some(Refused::HostLocal)),
        ("168.63.129.16:80", Some(Refused::OffLimits)),
        ("198.51.100.1:443", None),
        ("10.77.2.5:80", None),
    ] {
        assert_eq!(refuse(&network(), to.parse().unwrap()), refused, "{to}");
    }
}
