//! Counters of what the kernel programs dropped, by reason.

use aya::maps::{MapData, MapError, PerCpuArray};

use super::abi::Reason;

/// Reads the kernel's counters; they live as long as the tenant's maps, through
/// restarts of the agent.
pub struct Drops {
    counters: PerCpuArray<MapData, u64>,
}

impl Drops {
    pub(super) fn new(counters: PerCpuArray<MapData, u64>) -> Self {
        Self { counters }
    }

    /// Packets dropped for this reason so far, over all CPUs.
    pub fn count(&self, reason: Reason) -> Result<u64, MapError> {
        Ok(self.counters.get(&(reason as u32), 0)?.iter().sum())
    }
}
