//! A tenant's settings on one host.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    Invalid, TenantId,
    invalid::{each, required},
    wire,
};

/// What a host has to know of a tenant before it takes the tenant's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    pub id: TenantId,
    /// Holds the tenant's pods over all hosts, and maybe others'. Only the tenant's say:
    /// the host gives no address by it, and lets nothing through for it.
    pub cluster_pod_range: IpNet,
    /// E.g. `cluster.local`.
    pub cluster_domain: String,
    /// The cluster DNS address in the pods' resolv.conf; the mesh answers there.
    pub dns_address: IpAddr,
    /// Where names outside the cluster are asked.
    pub upstream_nameservers: Vec<IpAddr>,
    pub mesh_control: MeshControl,
}

/// Where the tenant's mesh control plane is served: delta xDS and certificates,
/// over mutual TLS with the pool's CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshControl {
    /// `host:port`.
    pub address: String,
    pub trust_domain: String,
    pub cluster_id: String,
    /// Istio network name; empty for the default.
    pub network: String,
}

impl TryFrom<wire::Tenant> for Tenant {
    type Error = Invalid;

    fn try_from(t: wire::Tenant) -> Result<Self, Invalid> {
        let cidr = |field: &str, text: &str| -> Result<IpNet, Invalid> {
            let net: IpNet = text.parse().map_err(|_| {
                Invalid::new(field, format_args!("{text:?} is not a CIDR such as 10.77.1.0/24"))
            })?;
            if net != net.trunc() {
                return Err(Invalid::new(
                    field,
                    format_args!("has host bits set: write {}", net.trunc()),
                ));
            }
            Ok(net)
        };
        let ip = |field: &str, text: &str| -> Result<IpAddr, Invalid> {
            text.parse()
                .map_err(|_| Invalid::new(field, format_args!("{text:?} is not an IP address")))
        };
        let cluster_pod_range = cidr("cluster_pod_range", &t.cluster_pod_range)?;
        if t.cluster_domain.is_empty() {
            return Err(Invalid::missing("cluster_domain"));
        }
        let mesh = required("mesh_control", t.mesh_control)?;
        if mesh
            .address
            .rsplit_once(':')
            .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
        {
            return Err(Invalid::new("mesh_control.address", "must be host:port"));
        }
        if mesh.trust_domain.is_empty() {
            return Err(Invalid::missing("mesh_control.trust_domain"));
        }
        Ok(Self {
            id: TenantId::parse("id", t.id)?,
            cluster_pod_range,
            cluster_domain: t.cluster_domain,
            dns_address: ip("dns_address", &t.dns_address)?,
            upstream_nameservers: each("upstream_nameservers", t.upstream_nameservers, |s| {
                ip("address", &s)
            })?,
            mesh_control: MeshControl {
                address: mesh.address,
                trust_domain: mesh.trust_domain,
                cluster_id: mesh.cluster_id,
                network: mesh.network,
            },
        })
    }
}

impl From<Tenant> for wire::Tenant {
    fn from(t: Tenant) -> Self {
        Self {
            id: t.id.into(),
            cluster_pod_range: t.cluster_pod_range.to_string(),
            cluster_domain: t.cluster_domain,
            dns_address: t.dns_address.to_string(),
            upstream_nameservers: t.upstream_nameservers.iter().map(IpAddr::to_string).collect(),
            mesh_control: Some(wire::MeshControl {
                address: t.mesh_control.address,
                trust_domain: t.mesh_control.trust_domain,
                cluster_id: t.mesh_control.cluster_id,
                network: t.mesh_control.network,
            }),
        }
    }
}
