use std::{fmt, str::FromStr, sync::Arc};

/// A workload's SPIFFE id in Istio's shape:
/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// Cheap to clone; compared as a whole.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(Arc<Parts>);

#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Parts {
    trust_domain: Box<str>,
    namespace: Box<str>,
    service_account: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{id:?} is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub struct InvalidIdentity {
    pub id: String,
}

/// What may stand in a segment: SPIFFE's own set (SPIFFE-ID, 2.2: letters,
/// digits, dots, dashes, underscores), never "." or "..".
fn segment(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_'))
}

impl Identity {
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, InvalidIdentity> {
        if [trust_domain, namespace, service_account]
            .into_iter()
            .all(segment)
        {
            Ok(Self(Arc::new(Parts {
                trust_domain: trust_domain.into(),
                namespace: namespace.into(),
                service_account: service_account.into(),
            })))
        } else {
            Err(InvalidIdentity {
                id: format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"),
            })
        }
    }

    pub fn trust_domain(&self) -> &str {
        &self.0.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(id: &str) -> Result<Self, InvalidIdentity> {
        let invalid = || InvalidIdentity { id: id.to_owned() };
        let mut parts = id.strip_prefix("spiffe://").ok_or_else(invalid)?.split('/');
        match [(); 6].map(|()| parts.next()) {
            [
                Some(domain),
                Some("ns"),
                Some(namespace),
                Some("sa"),
                Some(account),
                None,
            ] => Self::new(domain, namespace, account).map_err(|_| invalid()),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts {
            trust_domain,
            namespace,
            service_account,
        } = &*self.0;
        write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_and_written_back() {
        let text = "spiffe://cluster.local/ns/shop/sa/web";
        let id: Identity = text.parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "web")
        );
        assert_eq!(id.to_string(), text);
    }

    #[test]
    fn another_shape_is_no_identity() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/sa/b/ns/a",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a%2f/sa/b",
            "SPIFFE://td/ns/a/sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?}");
        }
    }
}
