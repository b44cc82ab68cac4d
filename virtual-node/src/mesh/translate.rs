//! From Kubernetes objects to what the mesh calls them: Istio's workloads and
//! services, named and filled as istiod does. Pure; called by `index`.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_api::istio::workload::{self as wire, address};
use prost::Message;

use super::{
    Cluster,
    object::{Endpoint, Key, NetworkMode, Pod, Readiness, Service, Slice, Target},
    snapshot::Resource,
};

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// Mutual TLS to its host's mesh runtime.
    Hbone,
    /// Plain TCP: it is not in the mesh.
    Plain,
}

/// A pod's place in a Service: the slice has the ports.
#[derive(Debug, Clone, Copy)]
pub struct Membership<'a> {
    pub service: &'a Service,
    pub slice: &'a Slice,
}

impl Cluster {
    /// The resource name of a pod's workload, whatever the pod is like.
    pub fn pod_name(&self, pod: &Key) -> String {
        format!("{}//Pod/{}/{}", self.id, pod.namespace, pod.name)
    }

    /// The resource name of a Service.
    pub fn service_name(&self, service: &Key) -> String {
        format!("{}/{}", service.namespace, self.hostname(service))
    }

    fn hostname(&self, service: &Key) -> String {
        format!("{}.{}.svc.{}", service.name, service.namespace, self.domain)
    }

    fn endpoint_name(&self, slice: &Key, address: IpAddr) -> String {
        format!(
            "{}/discovery.k8s.io/EndpointSlice/{}/{}/{address}",
            self.id, slice.namespace, slice.name
        )
    }

    /// Istio leaves its default out.
    fn wire_trust_domain(&self) -> String {
        match self.trust_domain.as_str() {
            "cluster.local" => String::new(),
            other => other.to_owned(),
        }
    }

    fn alias(&self, address: IpAddr) -> Arc<str> {
        format!("{}/{address}", self.network).into()
    }

    pub fn pod(&self, pod: &Pod, tunnel: Tunnel, memberships: &[Membership<'_>]) -> Resource {
        let mut services: BTreeMap<String, wire::PortList> = BTreeMap::new();
        for membership in memberships {
            let ports = &mut services
                .entry(self.service_name(&membership.service.key))
                .or_default()
                .ports;
            // The second slice of a dual-stack Service has the same ports again.
            for port in ports_of(*membership) {
                if !ports.contains(&port) {
                    ports.push(port);
                }
            }
        }
        let workload = wire::Workload {
            uid: self.pod_name(&pod.key),
            name: pod.key.name.to_string(),
            namespace: pod.key.namespace.to_string(),
            addresses: pod.addresses.iter().map(octets).collect(),
            network: self.network.clone(),
            tunnel_protocol: match tunnel {
                Tunnel::Hbone => wire::TunnelProtocol::Hbone,
                Tunnel::Plain => wire::TunnelProtocol::None,
            }
            .into(),
            trust_domain: self.wire_trust_domain(),
            service_account: pod.service_account.to_string(),
            node: pod.node.to_string(),
            canonical_name: pod.canonical_name.to_string(),
            canonical_revision: pod.canonical_revision.to_string(),
            workload_type: pod.workload_type.into(),
            workload_name: pod.workload_name.to_string(),
            services,
            status: status(pod.readiness).into(),
            cluster_id: self.id.clone(),
            network_mode: match pod.network {
                NetworkMode::Pod => wire::NetworkMode::Standard,
                NetworkMode::Host => wire::NetworkMode::HostNetwork,
            }
            .into(),
            ..Default::default()
        };
        let aliases = match pod.network {
            NetworkMode::Pod => pod.addresses.iter().map(|&ip| self.alias(ip)).collect(),
            // A node's address stands for no one pod.
            NetworkMode::Host => Box::default(),
        };
        workload_resource(workload, aliases)
    }

    pub fn service(&self, service: &Service) -> Resource {
        let wire = wire::Service {
            name: service.key.name.to_string(),
            namespace: service.key.namespace.to_string(),
            hostname: self.hostname(&service.key),
            addresses: service
                .addresses
                .iter()
                .map(|ip| wire::NetworkAddress {
                    network: self.network.clone(),
                    address: octets(ip),
                    length: None,
                })
                .collect(),
            ports: service
                .ports
                .iter()
                .map(|port| wire::Port {
                    service_port: port.port.into(),
                    target_port: port.target.into(),
                    app_protocol: port.protocol.into(),
                })
                .collect(),
            load_balancing: service.load_balancing.clone(),
            ip_families: service.families.into(),
            // Nothing else in a cluster may claim a Service's host name.
            canonical: true,
            ..Default::default()
        };
        Resource {
            aliases: service.addresses.iter().map(|&ip| self.alias(ip)).collect(),
            ..Resource::new(
                self.service_name(&service.key),
                encode(address::Type::Service(wire)),
            )
        }
    }

    /// An endpoint that is no pod, as of the API server: known by its address alone,
    /// which others may share. None for a pod's.
    pub fn endpoint(&self, membership: Membership<'_>, endpoint: &Endpoint) -> Option<Resource> {
        let Target::Address(readiness) = endpoint.target else {
            return None;
        };
        let slice = &membership.slice.key;
        let workload = wire::Workload {
            uid: self.endpoint_name(slice, endpoint.address),
            name: slice.name.to_string(),
            namespace: slice.namespace.to_string(),
            addresses: vec![octets(&endpoint.address)],
            network: self.network.clone(),
            tunnel_protocol: wire::TunnelProtocol::None.into(),
            trust_domain: self.wire_trust_domain(),
            services: BTreeMap::from([(
                self.service_name(&membership.service.key),
                wire::PortList {
                    ports: ports_of(membership).collect(),
                },
            )]),
            status: status(readiness).into(),
            cluster_id: self.id.clone(),
            network_mode: wire::NetworkMode::HostNetwork.into(),
            ..Default::default()
        };
        Some(workload_resource(workload, Box::default()))
    }
}

/// Ports that the slice does not resolve do not exist on its endpoints.
fn ports_of(membership: Membership<'_>) -> impl Iterator<Item = wire::Port> {
    membership.service.ports.iter().filter_map(move |port| {
        Some(wire::Port {
            service_port: port.port.into(),
            target_port: (*membership.slice.ports.get(&port.name)?).into(),
            app_protocol: wire::AppProtocol::Unknown.into(),
        })
    })
}

fn workload_resource(workload: wire::Workload, aliases: Box<[Arc<str>]>) -> Resource {
    Resource {
        aliases,
        groups: workload
            .services
            .keys()
            .map(|name| name.as_str().into())
            .collect(),
        ..Resource::new(workload.uid.clone(), encode(address::Type::Workload(workload)))
    }
}

fn encode(kind: address::Type) -> Vec<u8> {
    wire::Address { r#type: Some(kind) }.encode_to_vec()
}

fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn status(readiness: Readiness) -> wire::WorkloadStatus {
    match readiness {
        Readiness::Ready => wire::WorkloadStatus::Healthy,
        Readiness::NotReady => wire::WorkloadStatus::Unhealthy,
    }
}
