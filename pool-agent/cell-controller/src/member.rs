//! Who gets which certificate of the pool itself, with which hosts and virtual nodes
//! know each other. Pure.
//!
//! - A host gets its own name, a tenant's virtual node its tenant's: who asks is whom
//!   the API server has authenticated, and the one URI name that the request has must
//!   be the requester's own.
//! - While a Node of the host's name is there, no other machine gets its certificate.

use k8s_openapi::api::{certificates::v1::CertificateSigningRequest, core::v1::Node};
use pool_agent_api::{HostName, Peer, PeerId};
use pool_cell::{HostRecord, names};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
};

use crate::request;

/// The host whose Node has to be looked at before [`verdict`].
pub fn host(request: &CertificateSigningRequest) -> Option<HostName> {
    match member(request)? {
        Peer::Host(host) => Some(host),
        Peer::VirtualNode(_) | Peer::UsageCollector => None,
    }
}

/// Why a request is denied. The variant's name is the reason on the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("{0} is no member of the pool")]
    Requester(String),
    #[error("the request does not read: {0}")]
    Unreadable(&'static str),
    #[error("the request has to have one name, the URI {0}, and no other extension")]
    Names(String),
    #[error("the usages have to be client auth, server auth and digital signature")]
    Usages,
    #[error("a node of this name is there, of another machine: delete it first")]
    NameTaken,
}

impl Denial {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Requester(_) => "Requester",
            Self::Unreadable(_) => "Unreadable",
            Self::Names(_) => "Names",
            Self::Usages => "Usages",
            Self::NameTaken => "NameTaken",
        }
    }
}

/// Who is to be named in the certificate. `node` is the one of [`host`], as it is now.
pub fn verdict(
    request: &CertificateSigningRequest,
    trust_domain: &str,
    node: Option<&Node>,
) -> Result<PeerId, Denial> {
    let spec = &request.spec;
    let peer = member(request).ok_or_else(|| Denial::Requester(spec.username.clone().unwrap_or_default()))?;
    let id = PeerId {
        trust_domain: trust_domain.to_owned(),
        peer,
    };
    let mut usages: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    usages.sort_unstable();
    usages.dedup();
    if usages != ["client auth", "digital signature", "server auth"] {
        return Err(Denial::Usages);
    }
    let asked = request::read(&spec.request.0, only_uri).map_err(Denial::Unreadable)?;
    if asked.as_deref() != Some(id.to_string().as_str()) {
        return Err(Denial::Names(id.to_string()));
    }
    let machine = node
        .map(|node| HostRecord::read(node).machine_id)
        .filter(|machine| !machine.is_empty());
    let asks = request
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(names::MACHINE));
    match (&id.peer, machine) {
        (Peer::Host(_), Some(machine)) if asks != Some(&machine) => Err(Denial::NameTaken),
        _ => Ok(id),
    }
}

/// Whom the API server has seen.
fn member(request: &CertificateSigningRequest) -> Option<Peer> {
    let user = request.spec.username.as_deref()?;
    let groups = &request.spec.groups;
    if let Some(host) = user.strip_prefix("system:node:") {
        let in_group = groups.iter().flatten().any(|group| group == names::NODES);
        return in_group.then(|| host.parse().ok())?.map(Peer::Host);
    }
    names::tenant_of_user(user).map(Peer::VirtualNode)
}

/// None: the request has another name, or another extension.
fn only_uri(request: &X509CertificationRequest<'_>) -> Option<String> {
    let mut extensions = request.requested_extensions().into_iter().flatten();
    let ParsedExtension::SubjectAlternativeName(names) = extensions.next()? else {
        return None;
    };
    match names.general_names.as_slice() {
        [GeneralName::URI(uri)] if extensions.next().is_none() => Some((*uri).to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use certificates::Wanted;
    use rcgen::KeyPair;
    use serde_json::json;

    use super::*;

    const USAGES: &[&str] = &["digital signature", "client auth", "server auth"];

    fn asked(user: &str, groups: &[&str], change: impl FnOnce(&mut Wanted)) -> CertificateSigningRequest {
        let mut wanted = Wanted {
            signer: names::MEMBER_SIGNER,
            annotations: [(names::MACHINE.to_owned(), "m-1".to_owned())].into(),
            usages: USAGES,
            uris: vec!["spiffe://pool/host/host-a".into()],
            ..Wanted::default()
        };
        change(&mut wanted);
        let mut request = certificates::request(&wanted, &KeyPair::generate().unwrap()).unwrap();
        request.spec.username = Some(user.into());
        request.spec.groups = Some(groups.iter().map(|g| (*g).to_owned()).collect());
        request
    }

    fn of_host(change: impl FnOnce(&mut Wanted)) -> CertificateSigningRequest {
        asked("system:node:host-a", &[names::NODES], change)
    }

    fn of_tenant(uri: &str) -> CertificateSigningRequest {
        asked("spindrift:virtual-node:acme", &["system:authenticated"], |w| {
            w.uris = vec![uri.into()];
        })
    }

    fn node(machine: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "host-a"}, "status": {"nodeInfo": {
            "machineID": machine, "bootID": "b", "systemUUID": "", "kernelVersion": "", "osImage": "",
            "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
            "operatingSystem": "linux", "architecture": "amd64",
        }}}))
        .unwrap()
    }

    #[test]
    fn a_member_gets_its_own_name() {
        let host = verdict(&of_host(|_| {}), "pool", None).unwrap();
        assert_eq!(host.to_string(), "spiffe://pool/host/host-a");
        assert_eq!(verdict(&of_host(|_| {}), "pool", Some(&node("m-1"))), Ok(host));
        let uri = "spiffe://pool/tenant/acme/virtual-node";
        let tenant = verdict(&of_tenant(uri), "pool", None).unwrap();
        assert_eq!(tenant.to_string(), uri);
    }

    #[test]
    fn nobody_gets_anothers_name_or_a_name_beside_its_own() {
        let others = [
            "spiffe://pool/host/host-b",
            "spiffe://other/host/host-a",
            "spiffe://pool/tenant/acme/virtual-node",
        ];
        for uri in others {
            let request = of_host(|wanted| wanted.uris = vec![uri.into()]);
            assert!(
                matches!(verdict(&request, "pool", None), Err(Denial::Names(_))),
                "{uri}"
            );
        }
        for uri in [
            "spiffe://pool/tenant/other/virtual-node",
            "spiffe://pool/host/host-a",
        ] {
            assert!(
                matches!(verdict(&of_tenant(uri), "pool", None), Err(Denial::Names(_))),
                "{uri}"
            );
        }
        type Change = fn(&mut Wanted);
        let changes: [Change; 4] = [
            |w| w.uris.push("spiffe://pool/host/host-b".into()),
            |w| w.uris.clear(),
            |w| w.dns_names.push("kubernetes".into()),
            |w| w.addresses.push([192, 0, 2, 1].into()),
        ];
        for change in changes {
            assert!(matches!(
                verdict(&of_host(change), "pool", None),
                Err(Denial::Names(_))
            ));
        }
    }

    #[test]
    fn whoever_is_no_member_is_denied() {
        for (user, groups) in [
            ("system:node:host-a", vec!["system:authenticated"]),
            ("system:bootstrap:abcdef", vec![names::BOOTSTRAPPERS]),
            (
                "system:serviceaccount:tenant-acme:default",
                vec!["system:authenticated"],
            ),
            ("spindrift:virtual-node:", vec!["system:authenticated"]),
        ] {
            let request = asked(user, &groups, |_| {});
            assert_eq!(
                verdict(&request, "pool", None),
                Err(Denial::Requester(user.into()))
            );
        }
    }

    #[test]
    fn a_second_machine_does_not_get_the_certificate_of_a_node_that_is_there() {
        let request = of_host(|_| {});
        assert_eq!(host(&request).unwrap().as_str(), "host-a");
        assert_eq!(
            verdict(&request, "pool", Some(&node("m-2"))),
            Err(Denial::NameTaken)
        );
        let unsaid = of_host(|wanted| wanted.annotations.clear());
        assert_eq!(
            verdict(&unsaid, "pool", Some(&node("m-1"))),
            Err(Denial::NameTaken)
        );
    }

    #[test]
    fn other_usages_and_what_does_not_read_are_denied() {
        let request = of_host(|wanted| wanted.usages = &["digital signature", "client auth"]);
        assert_eq!(verdict(&request, "pool", None), Err(Denial::Usages));
        let request = of_host(|wanted| {
            wanted.usages = &["digital signature", "client auth", "server auth", "cert sign"];
        });
        assert_eq!(verdict(&request, "pool", None), Err(Denial::Usages));
        let mut request = of_host(|_| {});
        request.spec.request.0.truncate(200);
        assert!(matches!(
            verdict(&request, "pool", None),
            Err(Denial::Unreadable(_))
        ));
    }
}
