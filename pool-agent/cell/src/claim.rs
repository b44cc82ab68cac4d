//! A claim: room for one attempt of one pod, as a Pod in the tenant's namespace of
//! the cell. The stock scheduler binds it; its host's agent is its kubelet.
//!
//! `virtual-node` makes one from [`ClaimParts`]; `pool-agent` parses each Pod that
//! is bound to its host. [`placed`] is what became of a claim, [`status`] what the
//! host writes on it.

mod placed;
mod shape;
mod status;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Deref, time::Duration};

use pool_agent_api::{Invalid, Namespace, PodName, Resources, SandboxKey, TenantId};

pub use placed::{Deletion, Placed};
pub use shape::NotAClaim;
pub use status::{ClaimPhase, ClaimStatus, NOT_A_CLAIM};

use crate::names;

/// Images a claim may name: more than any pod has containers, and few enough that
/// none is large.
const MOST_IMAGES: usize = 256;
/// The longest that a claim may outlast its deletion, whatever its pod asks for: a host
/// that is drained, and a tier that gives way to others, would wait for it. The cell's
/// admission policy says the same.
pub const LONGEST_GRACE: Duration = Duration::from_secs(3600);

/// UID of the controller of a pod, in its tenant's cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerUid(String);

impl OwnerUid {
    pub fn parse(field: &str, text: impl Into<String>) -> Result<Self, Invalid> {
        let text = text.into();
        label_value(field, &text)?;
        Ok(Self(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OwnerUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The parts of a claim, before they are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimParts {
    pub tenant: TenantId,
    pub key: SandboxKey,
    /// The pod's own in its tenant's cluster.
    pub namespace: Namespace,
    pub name: PodName,
    /// The virtual node that the pod is bound to.
    pub node_name: String,
    /// Without the runtime's overhead, which the cell's RuntimeClass adds;
    /// `sandboxes` is 1.
    pub requests: Resources,
    /// At least one; distinct.
    pub images: Vec<String>,
    pub runtime_class: Option<String>,
    pub priority_class: Option<String>,
    /// Claims of one owner are kept on different hosts where there is a choice.
    pub owner: Option<OwnerUid>,
    /// Only hosts of this zone will do.
    pub zone: Option<String>,
    /// Only hosts of this class will do.
    pub class: Option<String>,
    /// Only hosts of this architecture will do: GOARCH.
    pub arch: Option<String>,
    /// From the notice that the claim ends to the sandbox's stop; whole seconds.
    pub grace: Duration,
}

/// A checked claim. Reads as its [`ClaimParts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim(Box<ClaimParts>);

impl Deref for Claim {
    type Target = ClaimParts;

    fn deref(&self) -> &ClaimParts {
        &self.0
    }
}

impl Claim {
    pub fn new(parts: ClaimParts) -> Result<Self, Invalid> {
        names::namespace_of(&parts.tenant)?;
        // It is part of a Pod's name and a label's value; UIDs that Kubernetes makes are.
        label_value("key.pod", parts.key.pod.as_str())?;
        PodName::parse("key", names::claim_name(&parts.key))?;
        if parts.node_name.is_empty() || parts.node_name.len() > 253 {
            return Err(Invalid::new("node_name", "must have 1 to 253 characters"));
        }
        if parts.requests.sandboxes != 1 {
            return Err(Invalid::new("requests.sandboxes", "must be 1"));
        }
        for (field, amount) in [
            ("requests.cpu_millis", parts.requests.cpu_millis),
            ("requests.memory_bytes", parts.requests.memory_bytes),
            (
                "requests.ephemeral_storage_bytes",
                parts.requests.ephemeral_storage_bytes,
            ),
        ] {
            // What is more the API server would cut down to that, silently.
            if i64::try_from(amount).is_err() {
                return Err(Invalid::new(field, "is more than Kubernetes can count"));
            }
        }
        if parts.images.is_empty() || parts.images.len() > MOST_IMAGES {
            return Err(Invalid::new(
                "images",
                format_args!("must hold 1 to {MOST_IMAGES}"),
            ));
        }
        for (i, image) in parts.images.iter().enumerate() {
            if image.is_empty() || image.chars().any(char::is_whitespace) {
                return Err(Invalid::new(format!("images[{i}]"), "must be an image's name"));
            }
            if parts.images[..i].contains(image) {
                return Err(Invalid::new(format!("images[{i}]"), "is there twice"));
            }
        }
        for (field, value) in [
            ("zone", &parts.zone),
            ("class", &parts.class),
            ("arch", &parts.arch),
            ("runtime_class", &parts.runtime_class),
            ("priority_class", &parts.priority_class),
        ] {
            if let Some(value) = value {
                label_value(field, value)?;
            }
        }
        if parts.grace.subsec_nanos() != 0 || parts.grace > LONGEST_GRACE {
            return Err(Invalid::new("grace", "must be whole seconds, at most an hour"));
        }
        Ok(Self(Box::new(parts)))
    }

    /// The namespace it is in. [`Claim::new`] has seen that there is one.
    pub fn cell_namespace(&self) -> String {
        names::namespace_of(&self.tenant).map_or_else(|_| String::new(), String::from)
    }

    /// The Pod's name in the cell.
    pub fn cell_name(&self) -> String {
        names::claim_name(&self.key)
    }
}

/// Kubernetes' rule for a label's value, and not empty.
fn label_value(field: &str, text: &str) -> Result<(), Invalid> {
    let bytes = text.as_bytes();
    let edge = |c: Option<&u8>| c.is_some_and(u8::is_ascii_alphanumeric);
    let inner = |c: &u8| c.is_ascii_alphanumeric() || b"-_.".contains(c);
    if bytes.len() > 63 || !edge(bytes.first()) || !edge(bytes.last()) || !bytes.iter().all(inner) {
        return Err(Invalid::new(
            field,
            "must have 1 to 63 letters, digits, '-', '_' or '.', and begin and end with a letter or a digit",
        ));
    }
    Ok(())
}
