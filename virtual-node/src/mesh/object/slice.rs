use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1 as discovery;
use pool_agent_api::PodUid;

use super::{Key, Readiness};

/// An EndpointSlice of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    pub key: Key,
    /// The Service's name; it is of the slice's namespace.
    pub service: Arc<str>,
    /// The target of each of the Service's ports, by the port's name. TCP only.
    pub ports: BTreeMap<Arc<str>, u16>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A pod of the slice's namespace. The pod itself tells its readiness, sooner.
    /// Without a UID, whichever pod has the name now.
    Pod { name: Arc<str>, uid: Option<PodUid> },
    /// Only an address, such as the API server's.
    Address(Readiness),
}

impl Slice {
    /// None if it is of no Service, or its addresses are names.
    pub fn parse(slice: &discovery::EndpointSlice) -> Option<Self> {
        let key = Key::of(&slice.metadata)?;
        let service = slice
            .metadata
            .labels
            .as_ref()?
            .get("kubernetes.io/service-name")?;
        if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6") {
            return None;
        }
        let ports = slice
            .ports
            .iter()
            .flatten()
            .filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")))
            .filter_map(|port| {
                let number = u16::try_from(port.port?).ok()?;
                Some((port.name.as_deref().unwrap_or_default().into(), number))
            })
            .collect();
        Some(Self {
            service: service.as_str().into(),
            ports,
            endpoints: slice
                .endpoints
                .iter()
                .flatten()
                .filter_map(|endpoint| Endpoint::parse(endpoint, &key))
                .collect(),
            key,
        })
    }
}

impl Endpoint {
    fn parse(endpoint: &discovery::Endpoint, slice: &Key) -> Option<Self> {
        // More than one address has no meaning (API reference: consumers use the first).
        let address = endpoint.addresses.first()?.parse().ok()?;
        let target = match &endpoint.target_ref {
            Some(target) if target.kind.as_deref() == Some("Pod") => {
                // A slice may not make a Service out of another namespace's pods.
                if target
                    .namespace
                    .as_deref()
                    .is_some_and(|ns| ns != &*slice.namespace)
                {
                    return None;
                }
                Target::Pod {
                    name: target.name.as_deref()?.into(),
                    uid: match &target.uid {
                        Some(uid) => Some(PodUid::parse("targetRef.uid", uid.as_str()).ok()?),
                        None => None,
                    },
                }
            }
            _ => {
                let ready = endpoint.conditions.as_ref().and_then(|c| c.ready);
                Target::Address(match ready {
                    Some(false) => Readiness::NotReady,
                    // Unknown counts as ready (API reference).
                    None | Some(true) => Readiness::Ready,
                })
            }
        };
        Some(Self { address, target })
    }
}
