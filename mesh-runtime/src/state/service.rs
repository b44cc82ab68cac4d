use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_api::istio::workload as wire;

use super::{Interner, Unsupported, Workload, workload::address};

/// What names a service: `<namespace>/<hostname>` on the wire.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    /// E.g. `web.shop.svc.cluster.local`, in lower case.
    pub hostname: Arc<str>,
}

impl ServiceKey {
    pub fn parse(key: &str, strings: &mut Interner) -> Option<Self> {
        let (namespace, hostname) = key.split_once('/')?;
        if namespace.is_empty() || hostname.is_empty() {
            return None;
        }
        Some(Self {
            namespace: strings.get(namespace),
            hostname: strings.get(&hostname.to_ascii_lowercase()),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    /// None for a headless service.
    pub vips: Box<[Vip]>,
    pub ports: Box<[ServicePort]>,
    pub balance: Balance,
    /// Preferred among services of other namespaces with the same host name.
    pub canonical: bool,
    pub visibility: Visibility,
    /// Something stands before it that is not spoken here; connections to it
    /// are refused.
    pub unsupported: Option<Unsupported>,
}

/// An address, or a range of them, that stands for a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    pub network: Arc<str>,
    pub net: IpNet,
}

impl Vip {
    /// The one address, unless it is a range.
    pub fn single(&self) -> Option<IpAddr> {
        (self.net.prefix_len() == self.net.max_prefix_len()).then(|| self.net.addr())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServicePort {
    pub port: u16,
    /// None where each endpoint says its own.
    pub target: Option<u16>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Balance {
    pub mode: Mode,
    /// In order of weight: what an endpoint should share with the client.
    pub scopes: Box<[Scope]>,
    pub unhealthy: UnhealthyEndpoints,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Any endpoint.
    #[default]
    Any,
    /// Only endpoints that share all scopes.
    Strict,
    /// Those that share the longest prefix of the scopes.
    Failover,
    /// As addressed: no choice of endpoint.
    Passthrough,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UnhealthyEndpoints {
    #[default]
    LeftOut,
    Taken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    Public,
    /// Only clients of its own namespace see it.
    Namespace,
}

/// A service with its endpoints at one moment.
#[derive(Debug, Clone)]
pub struct ServiceView {
    pub service: Arc<Service>,
    pub endpoints: Arc<[Arc<Workload>]>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidService {
    #[error("namespace or hostname is empty")]
    NoKey,
    #[error("addresses[{index}] has {length} bytes where 4 or 16 are needed")]
    Address { index: usize, length: usize },
    #[error("addresses[{index}] has the prefix length {length}")]
    Prefix { index: usize, length: u32 },
    #[error("ports[{index}] is {port}")]
    Port { index: usize, port: u32 },
    #[error("{field} has the unknown value {value}")]
    Unknown { field: &'static str, value: i32 },
}

impl Service {
    pub fn parse(s: &wire::Service, strings: &mut Interner) -> Result<Self, InvalidService> {
        if s.namespace.is_empty() || s.hostname.is_empty() {
            return Err(InvalidService::NoKey);
        }
        let key = ServiceKey {
            namespace: strings.get(&s.namespace),
            hostname: strings.get(&s.hostname.to_ascii_lowercase()),
        };
        let vips = s
            .addresses
            .iter()
            .enumerate()
            .map(|(index, a)| vip(index, a, strings))
            .collect::<Result<_, _>>()?;
        let ports = s
            .ports
            .iter()
            .enumerate()
            .map(|(index, p)| {
                let port = |port: u32| u16::try_from(port).map_err(|_| InvalidService::Port { index, port });
                Ok(ServicePort {
                    port: port(p.service_port)?,
                    target: Some(port(p.target_port)?).filter(|&t| t != 0),
                })
            })
            .collect::<Result<_, _>>()?;
        let behind_waypoint = s.waypoint.is_some() || !s.weighted_waypoints.is_empty();
        Ok(Self {
            key,
            name: strings.get(&s.name),
            vips,
            ports,
            balance: s
                .load_balancing
                .as_ref()
                .map(balance)
                .transpose()?
                .unwrap_or_default(),
            canonical: s.canonical,
            visibility: match wire::service::Visibility::try_from(s.visibility)
                .map_err(|e| unknown("visibility", e.0))?
            {
                wire::service::Visibility::Public => Visibility::Public,
                wire::service::Visibility::Namespace => Visibility::Namespace,
            },
            unsupported: behind_waypoint.then_some(Unsupported::Waypoint),
        })
    }
}

fn unknown(field: &'static str, value: i32) -> InvalidService {
    InvalidService::Unknown { field, value }
}

fn vip(index: usize, a: &wire::NetworkAddress, strings: &mut Interner) -> Result<Vip, InvalidService> {
    let ip = address(&a.address).ok_or(InvalidService::Address {
        index,
        length: a.address.len(),
    })?;
    let whole = if ip.is_ipv4() { 32 } else { 128 };
    let length = a.length.unwrap_or(whole);
    let net = u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(ip, length).ok())
        .ok_or(InvalidService::Prefix { index, length })?;
    Ok(Vip {
        network: strings.get(&a.network),
        net: net.trunc(),
    })
}

fn balance(b: &wire::LoadBalancing) -> Result<Balance, InvalidService> {
    use wire::load_balancing::{HealthPolicy, Mode as WireMode, Scope as WireScope};
    let mut scopes = Vec::with_capacity(b.routing_preference.len());
    for &scope in &b.routing_preference {
        scopes.push(
            match WireScope::try_from(scope).map_err(|e| unknown("routing_preference", e.0))? {
                WireScope::Region => Scope::Region,
                WireScope::Zone => Scope::Zone,
                WireScope::Subzone => Scope::Subzone,
                WireScope::Node => Scope::Node,
                WireScope::Cluster => Scope::Cluster,
                WireScope::Network => Scope::Network,
                WireScope::UnspecifiedScope => return Err(unknown("routing_preference", scope)),
            },
        );
    }
    Ok(Balance {
        mode: match WireMode::try_from(b.mode).map_err(|e| unknown("load_balancing.mode", e.0))? {
            WireMode::UnspecifiedMode => Mode::Any,
            WireMode::Strict => Mode::Strict,
            WireMode::Failover => Mode::Failover,
            WireMode::Passthrough => Mode::Passthrough,
        },
        scopes: scopes.into(),
        unhealthy: match HealthPolicy::try_from(b.health_policy)
            .map_err(|e| unknown("load_balancing.health_policy", e.0))?
        {
            HealthPolicy::OnlyHealthy => UnhealthyEndpoints::LeftOut,
            HealthPolicy::AllowAll => UnhealthyEndpoints::Taken,
        },
    })
}
