use std::{net::IpAddr, sync::Arc};

use mesh_api::{Identity, InvalidIdentity, istio::workload as wire};

use super::{Interner, ServiceKey};

/// One pod, or another thing with addresses that the mesh knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// `<cluster>//Pod/<namespace>/<name>` for a pod: the resource's name.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub addresses: Box<[IpAddr]>,
    pub network: Arc<str>,
    /// Whom a connection to it must find there, if it is reached over HBONE.
    pub identity: Identity,
    pub reach: Reach,
    pub node: Arc<str>,
    pub cluster: Arc<str>,
    pub locality: Locality,
    pub kind: Kind,
    /// What owns it, e.g. the Deployment.
    pub owner: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub services: Box<[Membership]>,
    /// Selector policies that apply to it: `<namespace>/<name>`.
    pub policies: Box<[Arc<str>]>,
    pub health: Health,
    /// Share of connections beside a service's other endpoints; 0 takes none.
    pub capacity: u32,
    pub network_mode: NetworkMode,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// TCP as it is.
    Plain,
    /// A tunnel to port 15008 of its address.
    Hbone,
    /// In a way that is not spoken here. Connections to it are refused: to pass
    /// by what the operator put in between would be worse.
    Unsupported(Unsupported),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    #[error("it is behind a waypoint")]
    Waypoint,
    #[error("it is reached by way of a network gateway")]
    NetworkGateway,
    #[error("it takes connections by an application tunnel")]
    ApplicationTunnel,
    #[error("it speaks Istio's TLS without HBONE")]
    LegacyTls,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Deployment,
    CronJob,
    Pod,
    Job,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Healthy,
    Unhealthy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    Standard,
    /// It shares its node's address, so the address does not name it.
    HostNetwork,
}

/// That a workload is an endpoint of a service, and where its ports differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    pub service: ServiceKey,
    pub ports: Box<[PortMap]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMap {
    pub service: u16,
    pub target: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWorkload {
    #[error("uid is empty")]
    NoUid,
    #[error("addresses[{index}] has {length} bytes where 4 or 16 are needed")]
    Address { index: usize, length: usize },
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
    #[error("services[{key:?}] is no NAMESPACE/HOSTNAME")]
    ServiceKey { key: String },
    #[error("services[{key:?}] names port {port}")]
    Port { key: String, port: u32 },
    #[error("{field} has the unknown value {value}")]
    Unknown { field: &'static str, value: i32 },
}

/// 4 or 16 bytes in network order.
pub(super) fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    // A v4 address in v6 clothes is the v4 address: sockets here speak v4.
    <[u8; 16]>::try_from(bytes)
        .ok()
        .map(|v6| IpAddr::from(v6).to_canonical())
}

fn or_default<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

impl Workload {
    pub fn parse(w: &wire::Workload, strings: &mut Interner) -> Result<Self, InvalidWorkload> {
        if w.uid.is_empty() {
            return Err(InvalidWorkload::NoUid);
        }
        let addresses = w
            .addresses
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                address(bytes).ok_or(InvalidWorkload::Address {
                    index,
                    length: bytes.len(),
                })
            })
            .collect::<Result<_, _>>()?;
        let identity = Identity::new(
            or_default(&w.trust_domain, "cluster.local"),
            &w.namespace,
            or_default(&w.service_account, "default"),
        )?;
        let tunnel =
            wire::TunnelProtocol::try_from(w.tunnel_protocol).map_err(|e| unknown("tunnel_protocol", e.0))?;
        let reach = if w.waypoint.is_some() {
            Reach::Unsupported(Unsupported::Waypoint)
        } else if w.network_gateway.is_some() {
            Reach::Unsupported(Unsupported::NetworkGateway)
        } else if w.application_tunnel.is_some() {
            Reach::Unsupported(Unsupported::ApplicationTunnel)
        } else {
            match tunnel {
                wire::TunnelProtocol::None => Reach::Plain,
                wire::TunnelProtocol::Hbone => Reach::Hbone,
                wire::TunnelProtocol::LegacyIstioMtls => Reach::Unsupported(Unsupported::LegacyTls),
            }
        };
        let services = w
            .services
            .iter()
            .map(|(key, list)| membership(key, list, strings))
            .collect::<Result<_, _>>()?;
        let locality = w.locality.clone().unwrap_or_default();
        Ok(Self {
            uid: w.uid.as_str().into(),
            name: w.name.as_str().into(),
            namespace: strings.get(&w.namespace),
            addresses,
            network: strings.get(&w.network),
            identity,
            reach,
            node: strings.get(&w.node),
            cluster: strings.get(&w.cluster_id),
            locality: Locality {
                region: strings.get(&locality.region),
                zone: strings.get(&locality.zone),
                subzone: strings.get(&locality.subzone),
            },
            kind: match wire::WorkloadType::try_from(w.workload_type)
                .map_err(|e| unknown("workload_type", e.0))?
            {
                wire::WorkloadType::Deployment => Kind::Deployment,
                wire::WorkloadType::Cronjob => Kind::CronJob,
                wire::WorkloadType::Pod => Kind::Pod,
                wire::WorkloadType::Job => Kind::Job,
            },
            owner: strings.get(&w.workload_name),
            canonical_name: strings.get(&w.canonical_name),
            canonical_revision: strings.get(&w.canonical_revision),
            services,
            policies: w.authorization_policies.iter().map(|p| strings.get(p)).collect(),
            health: match wire::WorkloadStatus::try_from(w.status).map_err(|e| unknown("status", e.0))? {
                wire::WorkloadStatus::Healthy => Health::Healthy,
                wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
            },
            capacity: w.capacity.unwrap_or(1),
            network_mode: match wire::NetworkMode::try_from(w.network_mode)
                .map_err(|e| unknown("network_mode", e.0))?
            {
                wire::NetworkMode::Standard => NetworkMode::Standard,
                wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
        })
    }

    /// Where this endpoint of `service` takes connections to the service's `port`.
    pub fn target_port(&self, service: &super::Service, port: u16) -> Option<u16> {
        let offered = service.ports.iter().find(|p| p.port == port)?;
        let own = self
            .services
            .iter()
            .find(|m| m.service == service.key)
            .and_then(|m| m.ports.iter().find(|p| p.service == port))
            .map(|p| p.target);
        Some(own.or(offered.target).unwrap_or(port))
    }
}

fn unknown(field: &'static str, value: i32) -> InvalidWorkload {
    InvalidWorkload::Unknown { field, value }
}

fn membership(
    key: &str,
    list: &wire::PortList,
    strings: &mut Interner,
) -> Result<Membership, InvalidWorkload> {
    let service =
        ServiceKey::parse(key, strings).ok_or_else(|| InvalidWorkload::ServiceKey { key: key.to_owned() })?;
    let port = |port: u32| {
        u16::try_from(port).map_err(|_| InvalidWorkload::Port {
            key: key.to_owned(),
            port,
        })
    };
    let mut ports = Vec::with_capacity(list.ports.len());
    for p in &list.ports {
        // 0 says that the endpoint has no port of its own for it.
        if p.target_port != 0 {
            ports.push(PortMap {
                service: port(p.service_port)?,
                target: port(p.target_port)?,
            });
        }
    }
    Ok(Membership {
        service,
        ports: ports.into(),
    })
}
