//! A pod's names and resolver settings.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use pool_agent_api::spec::{HostAlias, PodNetwork, PortMapping, Protocol};

use super::{NodeFacts, Untranslatable};

/// Linux' limit for a host name.
const HOSTNAME: usize = 64;
/// Kubernetes' limit for a label.
const LABEL: usize = 63;

pub(super) fn network(pod: &Pod, spec: &PodSpec, facts: &NodeFacts) -> Result<PodNetwork, Untranslatable> {
    let (hostname, domainname) = names(pod, spec, facts)?;
    let resolver = resolver(pod, spec, facts)?;
    let host_aliases = spec
        .host_aliases
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, alias)| {
            Ok(HostAlias {
                ip: ip(&alias.ip, &format!("spec.hostAliases[{i}].ip"))?,
                hostnames: alias.hostnames.clone().unwrap_or_default(),
            })
        })
        .collect::<Result<_, Untranslatable>>()?;
    let ports = spec
        .containers
        .iter()
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            Some(PortMapping {
                container_port: u16::try_from(port.container_port).ok()?,
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
            })
        })
        .collect();
    Ok(PodNetwork {
        hostname,
        domainname,
        nameservers: resolver.nameservers,
        searches: resolver.searches,
        dns_options: resolver.options,
        host_aliases,
        ports,
    })
}

fn names(pod: &Pod, spec: &PodSpec, facts: &NodeFacts) -> Result<(String, Option<String>), Untranslatable> {
    if let Some(name) = spec.hostname_override.as_ref().filter(|n| !n.is_empty()) {
        return Ok((name.clone(), None));
    }
    let name = spec
        .hostname
        .as_ref()
        .filter(|n| !n.is_empty())
        .or(pod.metadata.name.as_ref())
        .map(String::as_str)
        .unwrap_or_default();
    let short = match name.get(..LABEL) {
        Some(prefix) => prefix.trim_end_matches(['-', '.']),
        None => name,
    };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let domain = spec
        .subdomain
        .as_ref()
        .filter(|s| !s.is_empty())
        .map(|sub| format!("{sub}.{namespace}.svc.{}", facts.cluster_domain));
    match (&domain, spec.set_hostname_as_fqdn) {
        (Some(domain), Some(true)) => {
            let full = format!("{short}.{domain}");
            if full.len() > HOSTNAME {
                return Err(Untranslatable::unsupported(
                    "spec.setHostnameAsFQDN",
                    format_args!("the FQDN {full:?} has more than {HOSTNAME} characters"),
                ));
            }
            Ok((full, Some(domain.clone())))
        }
        _ => Ok((short.to_owned(), domain)),
    }
}

#[derive(Default)]
struct Resolver {
    nameservers: Vec<IpAddr>,
    searches: Vec<String>,
    options: Vec<String>,
}

fn resolver(pod: &Pod, spec: &PodSpec, facts: &NodeFacts) -> Result<Resolver, Untranslatable> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let domain = &facts.cluster_domain;
    let mut resolver = match spec.dns_policy.as_deref() {
        // Without hostNetwork the two are the same.
        None | Some("" | "ClusterFirst" | "ClusterFirstWithHostNet") => Resolver {
            nameservers: vec![facts.dns_address],
            searches: vec![
                format!("{namespace}.svc.{domain}"),
                format!("svc.{domain}"),
                domain.clone(),
            ],
            options: vec!["ndots:5".into()],
        },
        Some("Default") => Resolver {
            nameservers: facts.upstream_nameservers.clone(),
            ..Resolver::default()
        },
        Some("None") => Resolver::default(),
        Some(other) => {
            return Err(Untranslatable::unsupported(
                "spec.dnsPolicy",
                format_args!("{other:?} is not a policy"),
            ));
        }
    };
    let Some(config) = &spec.dns_config else {
        return Ok(resolver);
    };
    for (i, text) in config.nameservers.iter().flatten().enumerate() {
        let server = ip(text, &format!("spec.dnsConfig.nameservers[{i}]"))?;
        if !resolver.nameservers.contains(&server) {
            resolver.nameservers.push(server);
        }
    }
    for search in config.searches.iter().flatten() {
        if !resolver.searches.contains(search) {
            resolver.searches.push(search.clone());
        }
    }
    for option in config.options.iter().flatten() {
        let name = option.name.as_deref().unwrap_or_default();
        // The pod's own value of an option wins.
        resolver.options.retain(|o| o.split(':').next() != Some(name));
        resolver.options.push(match &option.value {
            Some(value) if !value.is_empty() => format!("{name}:{value}"),
            _ => name.to_owned(),
        });
    }
    Ok(resolver)
}

fn ip(text: &str, at: &str) -> Result<IpAddr, Untranslatable> {
    text.parse()
        .map_err(|_| Untranslatable::unsupported(at, format_args!("{text:?} is not an IP address")))
}
