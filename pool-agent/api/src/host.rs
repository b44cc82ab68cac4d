//! What a host of the pool says of itself.

use std::net::IpAddr;

use crate::{HostName, Invalid, invalid::required, wire};

/// Amounts that admission counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_storage_bytes: u64,
    /// Sandbox slots: 1 for each pod.
    pub sandboxes: u32,
}

impl Resources {
    /// What is left of `self` when `claim` is taken, or None if something is short.
    pub fn checked_sub(self, claim: Self) -> Option<Self> {
        Some(Self {
            cpu_millis: self.cpu_millis.checked_sub(claim.cpu_millis)?,
            memory_bytes: self.memory_bytes.checked_sub(claim.memory_bytes)?,
            ephemeral_storage_bytes: self
                .ephemeral_storage_bytes
                .checked_sub(claim.ephemeral_storage_bytes)?,
            sandboxes: self.sandboxes.checked_sub(claim.sandboxes)?,
        })
    }

    /// The sum; it stops at the largest number rather than wrapping, so that a
    /// hostile claim cannot become small.
    pub fn saturating_add(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            ephemeral_storage_bytes: self
                .ephemeral_storage_bytes
                .saturating_add(other.ephemeral_storage_bytes),
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
        }
    }
}

impl From<wire::Resources> for Resources {
    fn from(r: wire::Resources) -> Self {
        Self {
            cpu_millis: r.cpu_millis,
            memory_bytes: r.memory_bytes,
            ephemeral_storage_bytes: r.ephemeral_storage_bytes,
            sandboxes: r.sandboxes,
        }
    }
}

impl From<Resources> for wire::Resources {
    fn from(r: Resources) -> Self {
        Self {
            cpu_millis: r.cpu_millis,
            memory_bytes: r.memory_bytes,
            ephemeral_storage_bytes: r.ephemeral_storage_bytes,
            sandboxes: r.sandboxes,
        }
    }
}

/// Answer of `GetHost`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub name: HostName,
    /// Version of the agent.
    pub version: String,
    /// Changes when the host restarts, not when the agent does.
    pub boot_id: String,
    /// The host's own address in the underlay.
    pub address: IpAddr,
    pub capacity: Resources,
    pub free: Resources,
    /// As in a Node's `nodeInfo.containerRuntimeVersion`.
    pub runtime_version: String,
    pub kernel_version: String,
    pub os_image: String,
    /// GOARCH.
    pub architecture: String,
}

impl TryFrom<wire::Host> for Host {
    type Error = Invalid;

    fn try_from(host: wire::Host) -> Result<Self, Invalid> {
        Ok(Self {
            name: HostName::parse("name", host.name)?,
            version: host.version,
            boot_id: host.boot_id,
            address: host.address.parse().map_err(|e| Invalid::new("address", e))?,
            capacity: required("capacity", host.capacity)?.into(),
            free: required("free", host.free)?.into(),
            runtime_version: host.runtime_version,
            kernel_version: host.kernel_version,
            os_image: host.os_image,
            architecture: host.architecture,
        })
    }
}

impl From<Host> for wire::Host {
    fn from(host: Host) -> Self {
        Self {
            name: host.name.into(),
            version: host.version,
            boot_id: host.boot_id,
            address: host.address.to_string(),
            capacity: Some(host.capacity.into()),
            free: Some(host.free.into()),
            runtime_version: host.runtime_version,
            kernel_version: host.kernel_version,
            os_image: host.os_image,
            architecture: host.architecture,
        }
    }
}
