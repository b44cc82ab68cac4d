//! Who speaks in the pool's own mutual TLS: the URI name in a certificate of
//! the pool's CA. Tenants' workload identities are another thing, of another CA.

use std::{fmt, str::FromStr};

use crate::{HostName, Invalid, TenantId};

/// `spiffe://<pool trust domain>/host/<name>`, `…/tenant/<id>/virtual-node` or
/// `…/usage-collector`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerId {
    pub trust_domain: String,
    pub peer: Peer,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The agent of a pool host.
    Host(HostName),
    /// The virtual node of a tenant.
    VirtualNode(TenantId),
    /// Who takes the hosts' usage records, for the pool's operator.
    UsageCollector,
}

impl FromStr for PeerId {
    type Err = Invalid;

    fn from_str(uri: &str) -> Result<Self, Invalid> {
        let shape = || {
            Invalid::new(
                "certificate URI",
                format_args!(
                    "{uri:?} is none of spiffe://DOMAIN/host/NAME, spiffe://DOMAIN/tenant/ID/virtual-node and \
                     spiffe://DOMAIN/usage-collector"
                ),
            )
        };
        let rest = uri.strip_prefix("spiffe://").ok_or_else(shape)?;
        let mut parts = rest.split('/');
        let trust_domain = parts
            .next()
            .filter(|d| !d.is_empty())
            .ok_or_else(shape)?
            .to_owned();
        let peer = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("host"), Some(name), None, None) => {
                Peer::Host(HostName::parse("certificate URI: host", name)?)
            }
            (Some("tenant"), Some(id), Some("virtual-node"), None) => {
                Peer::VirtualNode(TenantId::parse("certificate URI: tenant", id)?)
            }
            (Some("usage-collector"), None, None, None) => Peer::UsageCollector,
            _ => return Err(shape()),
        };
        Ok(Self { trust_domain, peer })
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.peer {
            Peer::Host(name) => write!(f, "spiffe://{}/host/{name}", self.trust_domain),
            Peer::VirtualNode(tenant) => {
                write!(f, "spiffe://{}/tenant/{tenant}/virtual-node", self.trust_domain)
            }
            Peer::UsageCollector => write!(f, "spiffe://{}/usage-collector", self.trust_domain),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_read_from_its_uri_and_written_back() {
        for uri in [
            "spiffe://pool.example/host/host-a",
            "spiffe://pool/tenant/acme/virtual-node",
            "spiffe://pool/usage-collector",
        ] {
            assert_eq!(uri.parse::<PeerId>().unwrap().to_string(), uri);
        }
    }

    #[test]
    fn a_uri_of_another_shape_is_nobody() {
        for uri in [
            "",
            "spiffe://",
            "spiffe:///host/a",
            "spiffe://pool/host/",
            "spiffe://pool/host/a/b",
            "spiffe://pool/tenant/acme",
            "spiffe://pool/tenant/acme/virtual-node/x",
            "spiffe://pool/usage-collector/x",
            "spiffe://pool/ns/a/sa/b",
            "https://pool/host/a",
        ] {
            assert!(uri.parse::<PeerId>().is_err(), "{uri:?}");
        }
    }
}
