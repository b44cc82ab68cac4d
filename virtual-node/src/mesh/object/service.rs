use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::util::intstr::IntOrString};
use mesh_api::istio::workload::{AppProtocol, IpFamilies, LoadBalancing, load_balancing};

use super::Key;

/// A Service that has endpoints of its own (not an ExternalName).
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub key: Key,
    /// None if headless.
    pub addresses: Vec<IpAddr>,
    /// Its TCP ports: nothing else is balanced by the proxy.
    pub ports: Vec<ServicePort>,
    pub families: IpFamilies,
    pub load_balancing: Option<LoadBalancing>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty if the Service has one port and did not name it.
    pub name: Arc<str>,
    pub port: u16,
    /// 0 if named: then each workload has its own.
    pub target: u16,
    pub protocol: AppProtocol,
}

impl Service {
    /// None if the mesh has nothing to say of it: an ExternalName is DNS's, and
    /// garbage is what no API server sends.
    pub fn parse(service: &core::Service) -> Option<Self> {
        let key = Key::of(&service.metadata)?;
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let listed = spec.cluster_ips.as_deref().unwrap_or_default();
        let addresses = if listed.is_empty() {
            spec.cluster_ip.as_slice()
        } else {
            listed
        }
        .iter()
        .filter(|ip| !ip.is_empty() && *ip != "None")
        .map(|ip| ip.parse())
        .collect::<Result<_, _>>()
        .ok()?;
        let families = match spec.ip_families.as_deref().unwrap_or_default() {
            [] => IpFamilies::Automatic,
            [one] if one == "IPv4" => IpFamilies::Ipv4Only,
            [_] => IpFamilies::Ipv6Only,
            _ => IpFamilies::Dual,
        };
        Some(Self {
            addresses,
            ports: spec
                .ports
                .iter()
                .flatten()
                .filter_map(ServicePort::parse)
                .collect(),
            families,
            load_balancing: load_balancing(spec),
            key,
        })
    }
}

impl ServicePort {
    fn parse(port: &core::ServicePort) -> Option<Self> {
        if !matches!(port.protocol.as_deref(), None | Some("TCP")) {
            return None;
        }
        let number = u16::try_from(port.port).ok()?;
        Some(Self {
            name: port.name.as_deref().unwrap_or_default().into(),
            port: number,
            target: match &port.target_port {
                None => number,
                Some(IntOrString::Int(target)) => u16::try_from(*target).ok()?,
                Some(IntOrString::String(_)) => 0,
            },
            protocol: app_protocol(port),
        })
    }
}

/// Istio's rule: `appProtocol`, else the port's name up to the first `-`.
fn app_protocol(port: &core::ServicePort) -> AppProtocol {
    let told = match port.app_protocol.as_deref() {
        Some("kubernetes.io/h2c") => return AppProtocol::Http2,
        Some("kubernetes.io/ws") => return AppProtocol::Http11,
        Some("kubernetes.io/wss") => return AppProtocol::Tls,
        Some(told) => told,
        None => port.name.as_deref().unwrap_or_default(),
    }
    .to_ascii_lowercase();
    // gRPC-Web is not gRPC, and Istio's workload API has no word for it.
    if told.starts_with("grpc-web") {
        return AppProtocol::Unknown;
    }
    match told.split('-').next().unwrap_or_default() {
        "http" => AppProtocol::Http11,
        "http2" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "https" | "tls" => AppProtocol::Tls,
        "tcp" => AppProtocol::Tcp,
        // SMTP, DNS, MySQL and MongoDB: the server speaks first, or it is no HTTP.
        _ if matches!(port.port, 25 | 53 | 3306 | 27017) => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

/// What of Kubernetes' traffic policy the workload API can say, in Istio's words
/// for it: local only is strict, a preference falls over.
fn load_balancing(spec: &core::ServiceSpec) -> Option<LoadBalancing> {
    use load_balancing::{HealthPolicy, Mode, Scope};

    let local = spec.internal_traffic_policy.as_deref() == Some("Local");
    let (mode, preference): (Mode, &[Scope]) = if local {
        (Mode::Strict, &[Scope::Node])
    } else {
        match spec.traffic_distribution.as_deref() {
            Some("PreferClose" | "PreferSameZone") => {
                (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone])
            }
            Some("PreferSameNode") => (
                Mode::Failover,
                &[
                    Scope::Network,
                    Scope::Region,
                    Scope::Zone,
                    Scope::Subzone,
                    Scope::Node,
                ],
            ),
            _ => (Mode::UnspecifiedMode, &[]),
        }
    };
    let health = if spec.publish_not_ready_addresses == Some(true) {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    (mode != Mode::UnspecifiedMode || health != HealthPolicy::OnlyHealthy).then(|| LoadBalancing {
        routing_preference: preference.iter().map(|&scope| scope.into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_of_a_port_follows_istios_rule() {
        for (name, told, number, protocol) in [
            ("", None, 80, AppProtocol::Unknown),
            ("web", None, 80, AppProtocol::Unknown),
            ("http", None, 80, AppProtocol::Http11),
            ("http-admin", None, 80, AppProtocol::Http11),
            ("HTTP2", None, 80, AppProtocol::Http2),
            ("grpc", None, 80, AppProtocol::Grpc),
            ("grpc-web", None, 80, AppProtocol::Unknown),
            ("https", None, 443, AppProtocol::Tls),
            ("tcp-x", None, 1, AppProtocol::Tcp),
            ("", None, 3306, AppProtocol::Tcp),
            ("http", Some("tcp"), 80, AppProtocol::Tcp),
            ("", Some("kubernetes.io/h2c"), 80, AppProtocol::Http2),
            ("", Some("kubernetes.io/wss"), 80, AppProtocol::Tls),
        ] {
            let port = core::ServicePort {
                name: Some(name.to_owned()),
                app_protocol: told.map(str::to_owned),
                port: number,
                ..Default::default()
            };
            assert_eq!(app_protocol(&port), protocol, "{name:?} {told:?} {number}");
        }
    }
}
