//! Names and ids. Each is checked where it enters and is then safe as a file
//! name, as a path segment of a URL and as a label.

use std::{fmt, num::NonZeroU32, str::FromStr};

use crate::{Invalid, wire};

/// RFC 1123 label: Kubernetes' rule for namespaces and container names.
fn dns_label(text: &str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > 63 {
        return Err("must have 1 to 63 characters");
    }
    let edge = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    if !edge(bytes[0]) || !edge(bytes[bytes.len() - 1]) {
        return Err("must begin and end with a lower-case letter or a digit");
    }
    if !bytes.iter().all(|&c| edge(c) || c == b'-') {
        return Err("must consist of lower-case letters, digits and '-'");
    }
    Ok(())
}

/// RFC 1123 subdomain: Kubernetes' rule for pods, nodes and service accounts.
fn dns_subdomain(text: &str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > 253 {
        return Err("must have 1 to 253 characters");
    }
    let edge = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    for label in text.split('.') {
        let bytes = label.as_bytes();
        if bytes.is_empty() || !edge(bytes[0]) || !edge(bytes[bytes.len() - 1]) {
            return Err(
                "must be labels separated by '.', each beginning and ending with a lower-case letter or a digit",
            );
        }
        if !bytes.iter().all(|&c| edge(c) || c == b'-') {
            return Err("must consist of lower-case letters, digits, '-' and '.'");
        }
    }
    Ok(())
}

/// UIDs are opaque to Kubernetes' clients; ours also name directories.
fn opaque_uid(text: &str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > 64 {
        return Err("must have 1 to 64 characters");
    }
    if !text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-') {
        return Err("must consist of letters, digits and '-'");
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $rule:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// Refused if it breaks the rule for such names; the refusal's field is `field`.
            pub fn parse(field: &str, text: impl Into<String>) -> Result<Self, Invalid> {
                let text = text.into();
                match $rule(&text) {
                    Ok(()) => Ok(Self(text.into_boxed_str())),
                    Err(problem) => Err(Invalid::new(field, problem)),
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                Self::parse(stringify!($name), text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }

        impl From<&$name> for String {
            fn from(name: &$name) -> String {
                name.0.clone().into()
            }
        }
    };
}

name!(
    /// `metadata.uid` of a Pod: never reused, unlike its name.
    PodUid, opaque_uid);
name!(
    /// `metadata.name` of a Pod.
    PodName, dns_subdomain);
name!(
    /// A Kubernetes namespace.
    Namespace, dns_label);
name!(
    /// A Kubernetes service account.
    ServiceAccountName, dns_subdomain);
name!(
    /// A container within a pod.
    ContainerName, dns_label);
name!(
    /// A volume within a pod.
    VolumeName, dns_label);
name!(
    /// A tenant: one Kubernetes cluster with its virtual nodes.
    TenantId, dns_label);
name!(
    /// A host of the pool.
    HostName, dns_subdomain);

/// Which placement of a pod this is, from 1. The fencing token: whoever holds
/// an older one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt(NonZeroU32);

impl Attempt {
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    pub fn parse(field: &str, number: u32) -> Result<Self, Invalid> {
        NonZeroU32::new(number)
            .map(Self)
            .ok_or_else(|| Invalid::new(field, "must be at least 1"))
    }

    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// The attempt that fences this one. None after 2^32 - 1 placements.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What every effect is keyed by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxKey {
    pub pod: PodUid,
    pub attempt: Attempt,
}

impl fmt::Display for SandboxKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pod, self.attempt)
    }
}

impl SandboxKey {
    /// Parses a required `key` field.
    pub fn from_wire(key: Option<wire::SandboxKey>) -> Result<Self, Invalid> {
        let key = crate::invalid::required("key", key)?;
        Ok(Self {
            pod: PodUid::parse("key.pod_uid", key.pod_uid)?,
            attempt: Attempt::parse("key.attempt", key.attempt)?,
        })
    }
}

impl From<&SandboxKey> for wire::SandboxKey {
    fn from(key: &SandboxKey) -> Self {
        Self {
            pod_uid: (&key.pod).into(),
            attempt: key.attempt.get(),
        }
    }
}

impl From<SandboxKey> for wire::SandboxKey {
    fn from(key: SandboxKey) -> Self {
        (&key).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_could_leave_its_directory_is_refused() {
        for text in ["", ".", "..", "a/b", "../x", "a\0b", "a b", "ä"] {
            assert!(PodUid::parse("uid", text).is_err(), "{text:?}");
        }
        assert!(PodUid::parse("uid", "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f").is_ok());
    }

    #[test]
    fn a_name_follows_kubernetes_rules() {
        for text in ["a", "web-0", "0a", "x".repeat(63).as_str()] {
            assert!(Namespace::parse("namespace", text).is_ok(), "{text:?}");
        }
        for text in ["", "-a", "a-", "A", "a.b", "a_b", "x".repeat(64).as_str()] {
            assert!(Namespace::parse("namespace", text).is_err(), "{text:?}");
        }
        assert!(PodName::parse("name", "web.example").is_ok());
        for text in [".", "a..b", "-a.b", "a.", "a/b"] {
            assert!(PodName::parse("name", text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_attempt_starts_at_one_and_ends_at_the_last_number() {
        assert!(Attempt::parse("attempt", 0).is_err());
        assert_eq!(Attempt::FIRST.next().map(Attempt::get), Some(2));
        let last = Attempt::parse("attempt", u32::MAX).unwrap();
        assert_eq!(last.next(), None);
    }
}
