use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::{Identity, istio::security as wire};

use super::Facts;

/// Conditions on one connection. The kinds that are given have to hold
/// together; of one kind's values one is enough, and of its `not` values none
/// may match. With no kind at all it matches nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    kinds: Box<[Kind]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Kind {
    values: Values,
    polarity: Polarity,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polarity {
    OneOf,
    NoneOf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Values {
    Namespaces(Box<[Pattern]>),
    ServiceAccounts(Box<[Account]>),
    /// Of the SPIFFE id without `spiffe://`.
    Principals(Box<[Pattern]>),
    SourceAddresses(Box<[IpNet]>),
    DestinationAddresses(Box<[IpNet]>),
    DestinationPorts(Box<[u16]>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// Anything but nothing.
    Present,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    namespace: Box<str>,
    name: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    #[error("namespace or name is empty")]
    NoName,
    #[error("scope has the unknown value {value}")]
    Scope { value: i32 },
    #[error("action has the unknown value {value}")]
    Action { value: i32 },
    #[error("{field}[{index}] has no kind of match")]
    NoPattern { field: &'static str, index: usize },
    #[error("{field}[{index}] is no address with a prefix length")]
    Address { field: &'static str, index: usize },
    #[error("{field}[{index}] is {port}")]
    Port {
        field: &'static str,
        index: usize,
        port: u32,
    },
    #[error("extension {name:?} is unknown")]
    Extension { name: String },
}

impl Match {
    pub fn parse(m: &wire::Match) -> Result<Self, InvalidPolicy> {
        if let Some(extension) = m.extensions.first() {
            return Err(InvalidPolicy::Extension {
                name: extension.name.clone(),
            });
        }
        use Polarity::{NoneOf, OneOf};
        let mut kinds = Vec::new();
        let mut add = |values: Option<Values>, polarity| {
            kinds.extend(values.map(|values| Kind { values, polarity }));
        };
        add(
            some(patterns("namespaces", &m.namespaces)?, Values::Namespaces),
            OneOf,
        );
        add(
            some(patterns("not_namespaces", &m.not_namespaces)?, Values::Namespaces),
            NoneOf,
        );
        add(
            some(accounts(&m.service_accounts), Values::ServiceAccounts),
            OneOf,
        );
        add(
            some(accounts(&m.not_service_accounts), Values::ServiceAccounts),
            NoneOf,
        );
        add(
            some(patterns("principals", &m.principals)?, Values::Principals),
            OneOf,
        );
        add(
            some(patterns("not_principals", &m.not_principals)?, Values::Principals),
            NoneOf,
        );
        add(
            some(nets("source_ips", &m.source_ips)?, Values::SourceAddresses),
            OneOf,
        );
        add(
            some(
                nets("not_source_ips", &m.not_source_ips)?,
                Values::SourceAddresses,
            ),
            NoneOf,
        );
        add(
            some(
                nets("destination_ips", &m.destination_ips)?,
                Values::DestinationAddresses,
            ),
            OneOf,
        );
        add(
            some(
                nets("not_destination_ips", &m.not_destination_ips)?,
                Values::DestinationAddresses,
            ),
            NoneOf,
        );
        add(
            some(
                ports("destination_ports", &m.destination_ports)?,
                Values::DestinationPorts,
            ),
            OneOf,
        );
        add(
            some(
                ports("not_destination_ports", &m.not_destination_ports)?,
                Values::DestinationPorts,
            ),
            NoneOf,
        );
        Ok(Self { kinds: kinds.into() })
    }

    pub(super) fn matches(&self, facts: &Facts) -> bool {
        !self.kinds.is_empty()
            && self.kinds.iter().all(|kind| match kind.polarity {
                Polarity::OneOf => kind.values.hit(facts),
                Polarity::NoneOf => !kind.values.hit(facts),
            })
    }
}

impl Values {
    fn hit(&self, facts: &Facts) -> bool {
        let source = facts.source.as_ref();
        match self {
            Self::Namespaces(patterns) => {
                source.is_some_and(|id| patterns.iter().any(|p| p.matches(id.namespace())))
            }
            Self::ServiceAccounts(accounts) => source.is_some_and(|id| {
                accounts
                    .iter()
                    .any(|a| *a.name == *id.service_account() && *a.namespace == *id.namespace())
            }),
            Self::Principals(patterns) => source.is_some_and(|id| {
                let principal = principal(id);
                patterns.iter().any(|p| p.matches(&principal))
            }),
            Self::SourceAddresses(nets) => within(nets, facts.source_address),
            Self::DestinationAddresses(nets) => within(nets, facts.destination.ip()),
            Self::DestinationPorts(ports) => ports.contains(&facts.destination.port()),
        }
    }
}

fn principal(id: &Identity) -> String {
    format!(
        "{}/ns/{}/sa/{}",
        id.trust_domain(),
        id.namespace(),
        id.service_account()
    )
}

fn within(nets: &[IpNet], address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(whole) => text == &**whole,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }
}

fn some<T>(values: Box<[T]>, kind: fn(Box<[T]>) -> Values) -> Option<Values> {
    (!values.is_empty()).then(|| kind(values))
}

fn patterns(field: &'static str, wire: &[wire::StringMatch]) -> Result<Box<[Pattern]>, InvalidPolicy> {
    use wire::string_match::MatchType;
    wire.iter()
        .enumerate()
        .map(|(index, m)| match &m.match_type {
            Some(MatchType::Exact(text)) => Ok(Pattern::Exact(text.as_str().into())),
            Some(MatchType::Prefix(text)) => Ok(Pattern::Prefix(text.as_str().into())),
            Some(MatchType::Suffix(text)) => Ok(Pattern::Suffix(text.as_str().into())),
            Some(MatchType::Presence(_)) => Ok(Pattern::Present),
            None => Err(InvalidPolicy::NoPattern { field, index }),
        })
        .collect()
}

fn accounts(wire: &[wire::ServiceAccountMatch]) -> Box<[Account]> {
    wire.iter()
        .map(|m| Account {
            namespace: m.namespace.as_str().into(),
            name: m.service_account.as_str().into(),
        })
        .collect()
}

/// A range that cannot be read is no reason to match more, or less: the whole
/// policy is refused.
fn nets(field: &'static str, wire: &[wire::Address]) -> Result<Box<[IpNet]>, InvalidPolicy> {
    wire.iter()
        .enumerate()
        .map(|(index, a)| {
            let invalid = InvalidPolicy::Address { field, index };
            let ip = if let Ok(v4) = <[u8; 4]>::try_from(&a.address[..]) {
                IpAddr::from(v4)
            } else if let Ok(v6) = <[u8; 16]>::try_from(&a.address[..]) {
                IpAddr::from(v6)
            } else {
                return Err(invalid);
            };
            let length = u8::try_from(a.length).map_err(|_| invalid.clone())?;
            IpNet::new(ip, length).map_err(|_| invalid)
        })
        .collect()
}

fn ports(field: &'static str, wire: &[u32]) -> Result<Box<[u16]>, InvalidPolicy> {
    wire.iter()
        .enumerate()
        .map(|(index, &port)| u16::try_from(port).map_err(|_| InvalidPolicy::Port { field, index, port }))
        .collect()
}
