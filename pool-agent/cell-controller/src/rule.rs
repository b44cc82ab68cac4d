//! Which requests for a node's client certificate are approved. Pure.
//!
//! - A bootstrap token's user may ask for the host that the token's Secret names, and
//!   for one certificate: the Secret is marked with the request's UID before that is
//!   approved, and removed when the host has shown itself with the certificate (until
//!   then its agent reads the certificate with the token).
//! - A host may ask for itself, while its Node is there.
//! - A request says which machine asks. While a Node of that name is there, no other
//!   machine gets its name: it would take the Node's claims for its own.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequest,
    core::v1::{Node, Secret},
};
use pool_agent_api::HostName;
use pool_cell::{HostRecord, names};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME},
};

use crate::request;

const TOKEN_USER: &str = "system:bootstrap:";
const NODE_USER: &str = "system:node:";
/// A used token whose host did not show itself goes after that.
const LINGER: SignedDuration = SignedDuration::from_mins(15);

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asker {
    /// The id of a bootstrap token.
    Token(String),
    Host(HostName),
}

/// A request that is of the right shape and nobody has decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub uid: String,
    pub host: HostName,
    pub asker: Asker,
    pub machine: String,
}

/// Why a request is denied. The variant's name is the reason on the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("{0} may ask for no node's certificate")]
    Requester(String),
    #[error("the request does not read: {0}")]
    Unreadable(&'static str),
    #[error("the subject has to be O=system:nodes, CN=system:node:HOST and nothing else")]
    Subject,
    #[error("a client's certificate has no names beside its subject and no extensions")]
    Extensions,
    #[error("the usages have to be client auth and digital signature")]
    Usages,
    #[error("the token was used, or has ended")]
    TokenUsed,
    #[error("the token is for {0}")]
    TokenForAnother(String),
    #[error("{0} may ask for itself alone")]
    AnotherHost(HostName),
    #[error("the node is gone: the host needs a new token")]
    NodeGone,
    #[error("a node of this name is there, of another machine: delete it first")]
    NameTaken,
}

impl Denial {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Requester(_) => "Requester",
            Self::Unreadable(_) => "Unreadable",
            Self::Subject => "Subject",
            Self::Extensions => "Extensions",
            Self::Usages => "Usages",
            Self::TokenUsed => "TokenUsed",
            Self::TokenForAnother(_) => "TokenForAnother",
            Self::AnotherHost(_) => "AnotherHost",
            Self::NodeGone => "NodeGone",
            Self::NameTaken => "NameTaken",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Mark the token's Secret as this request's; then it is looked at again.
    Mark,
    Approve,
    Deny(Denial),
}

/// None: it is another signer's, or decided.
pub fn asked(request: &CertificateSigningRequest) -> Option<Result<Asked, Denial>> {
    if request::is_decided(request) || request.spec.signer_name != names::CLIENT_SIGNER {
        return None;
    }
    Some(parse(request))
}

fn parse(request: &CertificateSigningRequest) -> Result<Asked, Denial> {
    let spec = &request.spec;
    let user = spec.username.clone().unwrap_or_default();
    let in_group = |group: &str| spec.groups.iter().flatten().any(|g| g == group);
    let asker = if let Some(id) = user.strip_prefix(TOKEN_USER)
        && in_group(names::BOOTSTRAPPERS)
    {
        Asker::Token(id.to_owned())
    } else if let Some(host) = user.strip_prefix(NODE_USER)
        && in_group(names::NODES)
        && let Ok(host) = host.parse()
    {
        Asker::Host(host)
    } else {
        return Err(Denial::Requester(user));
    };
    let usages: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    let known = ["client auth", "digital signature", "key encipherment"];
    if !usages.iter().all(|u| known.contains(u)) || !known[..2].iter().all(|u| usages.contains(u)) {
        return Err(Denial::Usages);
    }
    let machine = request
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(names::MACHINE))
        .cloned()
        .unwrap_or_default();
    Ok(Asked {
        uid: request.metadata.uid.clone().unwrap_or_default(),
        host: subject(&spec.request.0)?,
        asker,
        machine,
    })
}

/// The host that a request in PEM is for, if it asks for nothing else.
fn subject(pem: &[u8]) -> Result<HostName, Denial> {
    request::read(pem, named).map_err(Denial::Unreadable)?
}

fn named(request: &X509CertificationRequest<'_>) -> Result<HostName, Denial> {
    if request.requested_extensions().into_iter().flatten().count() > 0 {
        return Err(Denial::Extensions);
    }
    let subject = &request.certification_request_info.subject;
    let mut parts = subject.iter_attributes().map(|a| {
        let text = a.as_str().map_err(|_| Denial::Subject)?;
        Ok((a.attr_type().clone(), text))
    });
    let (mut organization, mut name) = (None, None);
    for part in parts.by_ref() {
        let (kind, text) = part?;
        let place = if kind == OID_X509_ORGANIZATION_NAME {
            &mut organization
        } else if kind == OID_X509_COMMON_NAME {
            &mut name
        } else {
            return Err(Denial::Subject);
        };
        if place.replace(text).is_some() {
            return Err(Denial::Subject);
        }
    }
    let host = name.and_then(|n| n.strip_prefix(NODE_USER)?.parse().ok());
    match (organization, host) {
        (Some(names::NODES), Some(host)) => Ok(host),
        _ => Err(Denial::Subject),
    }
}

/// `token` is the Secret of the token that asks, `node` the Node of the host that is
/// asked for; both as they are now.
pub fn verdict(asked: &Asked, token: Option<&Secret>, node: Option<&Node>) -> Verdict {
    let machine = node
        .map(|n| HostRecord::read(n).machine_id)
        .filter(|m| !m.is_empty());
    let taken = machine.is_some_and(|machine| machine != asked.machine);
    match &asked.asker {
        Asker::Host(host) if *host != asked.host => Verdict::Deny(Denial::AnotherHost(host.clone())),
        Asker::Host(_) if node.is_none() => Verdict::Deny(Denial::NodeGone),
        Asker::Host(_) if taken => Verdict::Deny(Denial::NameTaken),
        Asker::Host(_) => Verdict::Approve,
        Asker::Token(_) => {
            let Some(token) = token else {
                return Verdict::Deny(Denial::TokenUsed);
            };
            let of = annotation(token, names::HOST).unwrap_or_default();
            if of != asked.host.as_str() {
                return Verdict::Deny(Denial::TokenForAnother(of.to_owned()));
            }
            match annotation(token, names::USED_BY) {
                Some(request) if request == asked.uid => Verdict::Approve,
                Some(_) => Verdict::Deny(Denial::TokenUsed),
                None if taken => Verdict::Deny(Denial::NameTaken),
                None => Verdict::Mark,
            }
        }
    }
}

pub fn annotation<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    secret.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whether a used token can go. `request` is the one it was good for, `node` its host's.
pub fn spent(request: Option<&CertificateSigningRequest>, node: Option<&Node>, now: Timestamp) -> bool {
    let Some(request) = request else {
        // Long ago: the cell itself has removed the request.
        return true;
    };
    let conditions = request.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let approved = conditions
        .filter(|c| c.type_ == "Approved")
        .find_map(|c| c.last_update_time.as_ref().map(|t| t.0));
    let Some(approved) = approved else {
        return false;
    };
    let heard = node
        .and_then(|n| {
            n.status
                .as_ref()?
                .conditions
                .as_ref()?
                .iter()
                .find(|c| c.type_ == "Ready")
        })
        .and_then(|c| c.last_heartbeat_time.as_ref())
        .map(|t| t.0);
    heard.is_some_and(|heard| heard >= approved) || now.duration_since(approved) > LINGER
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{ByteString, api::certificates::v1::CertificateSigningRequestSpec};
    use kube::api::ObjectMeta;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
    use serde_json::json;

    use super::*;

    fn pem(host: &str, change: impl Fn(&mut CertificateParams)) -> Vec<u8> {
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, format!("system:node:{host}"));
        parameters.distinguished_name = subject;
        change(&mut parameters);
        let key = KeyPair::generate().unwrap();
        let request = parameters.serialize_request(&key).unwrap();
        request.pem().unwrap().into_bytes()
    }

    fn request(user: &str, groups: &[&str], pem: Vec<u8>) -> CertificateSigningRequest {
        CertificateSigningRequest {
            metadata: ObjectMeta {
                uid: Some("csr-1".into()),
                annotations: Some([(names::MACHINE.to_owned(), "m-1".to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem),
                signer_name: names::CLIENT_SIGNER.into(),
                usages: Some(vec!["digital signature".into(), "client auth".into()]),
                username: Some(user.into()),
                groups: Some(groups.iter().map(|g| (*g).to_owned()).collect()),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        }
    }

    fn by_token(host: &str) -> CertificateSigningRequest {
        request(
            "system:bootstrap:abcdef",
            &[names::BOOTSTRAPPERS],
            pem(host, |_| {}),
        )
    }

    fn by_host(host: &str, of: &str) -> CertificateSigningRequest {
        request(&format!("system:node:{host}"), &[names::NODES], pem(of, |_| {}))
    }

    fn token(host: &str, used_by: Option<&str>) -> Secret {
        let mut secret: Secret = serde_json::from_value(json!({
            "metadata": {"annotations": {names::HOST: host}}
        }))
        .unwrap();
        if let Some(uid) = used_by {
            let annotations = secret.metadata.annotations.as_mut().unwrap();
            annotations.insert(names::USED_BY.into(), uid.into());
        }
        secret
    }

    fn node(machine: &str, heartbeat: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "host-a"}, "status": {
            "nodeInfo": {
                "machineID": machine, "bootID": "b", "systemUUID": "", "kernelVersion": "", "osImage": "",
                "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
                "operatingSystem": "linux", "architecture": "amd64",
            },
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}],
        }}))
        .unwrap()
    }

    fn told(request: &CertificateSigningRequest) -> Result<Asked, Denial> {
        asked(request).unwrap()
    }

    #[test]
    fn a_token_is_good_for_its_own_host_and_for_one_request() {
        let asked = told(&by_token("host-a")).unwrap();
        assert_eq!(asked.host.as_str(), "host-a");
        assert_eq!(verdict(&asked, Some(&token("host-a", None)), None), Verdict::Mark);
        let mine = token("host-a", Some("csr-1"));
        assert_eq!(verdict(&asked, Some(&mine), None), Verdict::Approve);
        let others = token("host-a", Some("csr-0"));
        assert_eq!(
            verdict(&asked, Some(&others), None),
            Verdict::Deny(Denial::TokenUsed)
        );
        assert_eq!(verdict(&asked, None, None), Verdict::Deny(Denial::TokenUsed));
        let theirs = token("host-b", None);
        assert_eq!(
            verdict(&asked, Some(&theirs), None),
            Verdict::Deny(Denial::TokenForAnother("host-b".into()))
        );
        let nameless: Secret = serde_json::from_value(json!({})).unwrap();
        assert!(matches!(verdict(&asked, Some(&nameless), None), Verdict::Deny(_)));
    }

    #[test]
    fn a_second_machine_does_not_get_the_name_of_a_node_that_is_there() {
        let asked = told(&by_token("host-a")).unwrap();
        let token = token("host-a", None);
        let other = node("m-2", "2026-11-27T16:00:00Z");
        assert_eq!(
            verdict(&asked, Some(&token), Some(&other)),
            Verdict::Deny(Denial::NameTaken)
        );
        // The same machine, installed anew.
        let same = node("m-1", "2026-11-27T16:00:00Z");
        assert_eq!(verdict(&asked, Some(&token), Some(&same)), Verdict::Mark);
        let renewal = told(&by_host("host-a", "host-a")).unwrap();
        assert_eq!(
            verdict(&renewal, None, Some(&other)),
            Verdict::Deny(Denial::NameTaken)
        );
    }

    #[test]
    fn a_host_renews_for_itself_alone_and_while_its_node_is_there() {
        let node = node("m-1", "2026-11-27T16:00:00Z");
        let own = told(&by_host("host-a", "host-a")).unwrap();
        assert_eq!(verdict(&own, None, Some(&node)), Verdict::Approve);
        assert_eq!(verdict(&own, None, None), Verdict::Deny(Denial::NodeGone));
        let other = told(&by_host("host-b", "host-a")).unwrap();
        assert!(matches!(
            verdict(&other, None, Some(&node)),
            Verdict::Deny(Denial::AnotherHost(_))
        ));
    }

    #[test]
    fn whoever_is_neither_is_denied() {
        let pem = || pem("host-a", |_| {});
        for (user, groups) in [
            (
                "system:serviceaccount:tenant-a:default",
                vec!["system:serviceaccounts"],
            ),
            ("spindrift:virtual-node:acme", vec!["system:authenticated"]),
            // A bootstrap token that is not a host's, such as kubeadm's.
            ("system:bootstrap:abcdef", vec!["system:bootstrappers"]),
            ("system:node:host-a", vec!["system:authenticated"]),
        ] {
            let asked = told(&request(user, &groups, pem()));
            assert_eq!(asked, Err(Denial::Requester(user.into())), "{user}");
        }
    }

    #[test]
    fn a_request_for_anything_more_than_the_hosts_name_is_denied() {
        let by = |pem| told(&request("system:bootstrap:abcdef", &[names::BOOTSTRAPPERS], pem));
        let masters = pem("host-a", |p| {
            p.distinguished_name
                .push(DnType::OrganizationName, "system:masters")
        });
        assert_eq!(by(masters), Err(Denial::Subject));
        let title = pem("host-a", |p| {
            p.distinguished_name.push(DnType::OrganizationalUnitName, "x")
        });
        assert_eq!(by(title), Err(Denial::Subject));
        let admin = pem("host-a", |p| {
            p.distinguished_name.push(DnType::CommonName, "kubernetes-admin")
        });
        assert_eq!(by(admin), Err(Denial::Subject));
        let named = pem("host-a", |p| {
            p.subject_alt_names = vec![rcgen::SanType::DnsName("kubernetes".try_into().unwrap())];
        });
        assert_eq!(by(named), Err(Denial::Extensions));
        assert!(matches!(by(b"x".to_vec()), Err(Denial::Unreadable(_))));
        let mut forged = pem("host-a", |_| {});
        let at = forged.len() - 60;
        forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
        assert!(by(forged).is_err());
        let mut serving = by_token("host-a");
        serving.spec.usages = Some(vec!["digital signature".into(), "server auth".into()]);
        assert_eq!(told(&serving), Err(Denial::Usages));
        let mut both = by_token("host-a");
        both.spec.usages.as_mut().unwrap().push("server auth".into());
        assert_eq!(told(&both), Err(Denial::Usages));
    }

    #[test]
    fn what_is_decided_or_another_signers_is_left_alone() {
        let mut request = by_token("host-a");
        request.spec.signer_name = "kubernetes.io/kubelet-serving".into();
        assert_eq!(asked(&request), None);
        let mut request = by_token("host-a");
        request.status =
            serde_json::from_value(json!({"conditions": [{"type": "Denied", "status": "True"}]})).unwrap();
        assert_eq!(asked(&request), None);
    }

    #[test]
    fn a_used_token_goes_when_its_host_has_shown_itself_or_after_a_while() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let mut request = by_token("host-a");
        let now = at("2026-11-27T16:01:00Z");
        // Marked, and whoever marked it died before it approved.
        assert!(!spent(Some(&request), None, now));
        request.status = serde_json::from_value(json!({"conditions": [
            {"type": "Approved", "status": "True", "lastUpdateTime": "2026-11-27T16:00:00Z"}
        ]}))
        .unwrap();
        assert!(!spent(Some(&request), None, now));
        assert!(!spent(
            Some(&request),
            Some(&node("m-1", "2026-11-27T15:00:00Z")),
            now
        ));
        assert!(spent(
            Some(&request),
            Some(&node("m-1", "2026-11-27T16:00:05Z")),
            now
        ));
        assert!(spent(Some(&request), None, at("2026-11-27T16:16:00Z")));
        assert!(spent(None, None, now));
    }
}
