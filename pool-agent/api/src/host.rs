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

/// What a host is short of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    /// Bytes or inodes.
    pub disk: bool,
    pub pids: bool,
}

impl Pressure {
    pub fn any(self) -> bool {
        self.memory || self.disk || self.pids
    }
}

impl From<wire::HostPressure> for Pressure {
    fn from(pressure: wire::HostPressure) -> Self {
        Self {
            memory: pressure.memory,
            disk: pressure.disk,
            pids: pressure.pids,
        }
    }
}

impl From<Pressure> for wire::HostPressure {
    fn from(pressure: Pressure) -> Self {
        Self {
            memory: pressure.memory,
            disk: pressure.disk,
            pids: pressure.pids,
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
    /// All there is.
    pub capacity: Resources,
    /// What sandboxes may claim of it.
    pub allocatable: Resources,
    pub free: Resources,
    pub pressure: Pressure,
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
            allocatable: required("allocatable", host.allocatable)?.into(),
            free: required("free", host.free)?.into(),
            pressure: host.pressure.unwrap_or_default().into(),
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
            allocatable: Some(host.allocatable.into()),
            free: Some(host.free.into()),
            pressure: Some(host.pressure.into()),
            runtime_version: host.runtime_version,
            kernel_version: host.kernel_version,
            os_image: host.os_image,
            architecture: host.architecture,
        }
    }
}
