//! A pod's names and resolver settings.

use std::net::IpAddr;

use crate::{Invalid, invalid::each, wire};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetwork {
    pub hostname: String,
    /// None unless the pod has a subdomain.
    pub domainname: Option<String>,
    pub nameservers: Vec<IpAddr>,
    pub searches: Vec<String>,
    /// As in resolv.conf: `ndots:5`.
    pub dns_options: Vec<String>,
    pub host_aliases: Vec<HostAlias>,
    /// Ports the pod declares; for information.
    pub ports: Vec<PortMapping>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAlias {
    pub ip: IpAddr,
    pub hostnames: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMapping {
    pub container_port: u16,
    pub protocol: Protocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// What goes into a line of resolv.conf or hosts: one word, no way to begin
/// another line.
fn word(field: &str, text: String) -> Result<String, Invalid> {
    if text.is_empty()
        || text.len() > 253
        || text
            .bytes()
            .any(|c| c.is_ascii_whitespace() || c.is_ascii_control() || c == b'#')
    {
        return Err(Invalid::new(
            field,
            "must be one word of at most 253 characters, without '#'",
        ));
    }
    Ok(text)
}

fn ip(field: &str, text: &str) -> Result<IpAddr, Invalid> {
    text.parse()
        .map_err(|_| Invalid::new(field, format_args!("{text:?} is not an IP address")))
}

/// A port number as protobuf carries it.
pub(crate) fn port(field: &str, number: u32) -> Result<u16, Invalid> {
    u16::try_from(number)
        .ok()
        .filter(|&p| p != 0)
        .ok_or_else(|| Invalid::new(field, format_args!("{number} is not a port (1 to 65535)")))
}

impl TryFrom<wire::PodNetwork> for PodNetwork {
    type Error = Invalid;

    fn try_from(n: wire::PodNetwork) -> Result<Self, Invalid> {
        Ok(Self {
            hostname: word("hostname", n.hostname)?,
            domainname: if n.domainname.is_empty() {
                None
            } else {
                Some(word("domainname", n.domainname)?)
            },
            nameservers: each("nameservers", n.nameservers, |s| ip("address", &s))?,
            searches: each("searches", n.searches, |s| word("domain", s))?,
            dns_options: each("dns_options", n.dns_options, |s| word("option", s))?,
            host_aliases: each("host_aliases", n.host_aliases, |alias| {
                Ok(HostAlias {
                    ip: ip("ip", &alias.ip)?,
                    hostnames: each("hostnames", alias.hostnames, |s| word("hostname", s))?,
                })
            })?,
            ports: each("ports", n.ports, |mapping| {
                Ok(PortMapping {
                    container_port: port("container_port", mapping.container_port)?,
                    protocol: match mapping.protocol.as_str() {
                        "" | "TCP" => Protocol::Tcp,
                        "UDP" => Protocol::Udp,
                        "SCTP" => Protocol::Sctp,
                        other => {
                            return Err(Invalid::new(
                                "protocol",
                                format_args!("{other:?} is not TCP, UDP or SCTP"),
                            ));
                        }
                    },
                })
            })?,
        })
    }
}

impl From<PodNetwork> for wire::PodNetwork {
    fn from(n: PodNetwork) -> Self {
        Self {
            hostname: n.hostname,
            domainname: n.domainname.unwrap_or_default(),
            nameservers: n.nameservers.iter().map(IpAddr::to_string).collect(),
            searches: n.searches,
            dns_options: n.dns_options,
            host_aliases: n
                .host_aliases
                .into_iter()
                .map(|a| wire::HostAlias {
                    ip: a.ip.to_string(),
                    hostnames: a.hostnames,
                })
                .collect(),
            ports: n
                .ports
                .into_iter()
                .map(|p| wire::PortMapping {
                    container_port: p.container_port.into(),
                    protocol: match p.protocol {
                        Protocol::Tcp => "TCP",
                        Protocol::Udp => "UDP",
                        Protocol::Sctp => "SCTP",
                    }
                    .into(),
                })
                .collect(),
        }
    }
}
