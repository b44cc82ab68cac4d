//! A tenant's settings on one host.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    Invalid, TenantId,
    invalid::{each, required},
    wire,
};

/// Bytes of the longest name in DNS, and of a trust domain's (SPIFFE-ID, 2.3).
const MAX_NAME: usize = 253;
/// A name in DNS, and a port.
const MAX_ADDRESS: usize = MAX_NAME + 6;
/// A resolver asks three; more are kept for those that are away.
const MAX_NAMESERVERS: usize = 16;

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
        for (field, text, longest) in [
            ("cluster_domain", &t.cluster_domain, MAX_NAME),
            ("mesh_control.address", &mesh.address, MAX_ADDRESS),
            ("mesh_control.trust_domain", &mesh.trust_domain, MAX_NAME),
            ("mesh_control.cluster_id", &mesh.cluster_id, MAX_NAME),
            ("mesh_control.network", &mesh.network, MAX_NAME),
        ] {
            if text.len() > longest {
                return Err(Invalid::new(
                    field,
                    format_args!("has {} bytes: at most {longest} are allowed", text.len()),
                ));
            }
        }
        if t.upstream_nameservers.len() > MAX_NAMESERVERS {
            return Err(Invalid::new(
                "upstream_nameservers",
                format_args!(
                    "has {} entries: at most {MAX_NAMESERVERS} are allowed",
                    t.upstream_nameservers.len()
                ),
            ));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> wire::Tenant {
        wire::Tenant {
            id: "demo".into(),
            cluster_pod_range: "10.77.0.0/16".into(),
            cluster_domain: "cluster.local".into(),
            dns_address: "10.96.0.10".into(),
            upstream_nameservers: vec!["192.0.2.53".into()],
            mesh_control: Some(wire::MeshControl {
                address: "node.example:7444".into(),
                trust_domain: "cluster.local".into(),
                cluster_id: "Kubernetes".into(),
                network: String::new(),
            }),
        }
    }

    #[test]
    fn no_setting_is_longer_than_what_it_names_can_be() {
        assert!(Tenant::try_from(settings()).is_ok());
        type Change = fn(&mut wire::Tenant, String);
        let fields: [(&str, Change); 6] = [
            ("id", |t, long| t.id = long),
            ("cluster_domain", |t, long| t.cluster_domain = long),
            ("mesh_control.address", |t, long| {
                t.mesh_control.as_mut().unwrap().address = format!("{long}:1");
            }),
            ("mesh_control.trust_domain", |t, long| {
                t.mesh_control.as_mut().unwrap().trust_domain = long;
            }),
            ("mesh_control.cluster_id", |t, long| {
                t.mesh_control.as_mut().unwrap().cluster_id = long;
            }),
            ("mesh_control.network", |t, long| {
                t.mesh_control.as_mut().unwrap().network = long;
            }),
        ];
        for (field, set) in fields {
            let mut long = settings();
            set(&mut long, "a".repeat(10_000));
            assert_eq!(Tenant::try_from(long).unwrap_err().field, field);
        }
        let mut many = settings();
        many.upstream_nameservers = vec!["192.0.2.53".into(); 17];
        assert_eq!(Tenant::try_from(many).unwrap_err().field, "upstream_nameservers");
    }
}
