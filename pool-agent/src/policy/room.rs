//! How much of the host its pods may use, and what the host keeps for itself. Pure.
//!
//! ```toml
//! [policy.room]
//! parent = "spindrift"             # the cgroup all pods are in; one for each agent of a machine
//!
//! [policy.room.reserved]           # kept for the system and the agent; absent: by the host's size
//! cpu_millis = 70
//! memory_bytes = 2_000_000_000
//! ephemeral_storage_bytes = 10_000_000_000
//! pids = 3_000
//!
//! [policy.room.pod]                # bounds of one pod
//! pids = 1_800
//! memory_ratio = 4                 # a claim of memory may be exceeded up to so many times …
//! least_memory_bytes = 536_870_912 # … and up to this by a pod that claims little or none
//! ephemeral_storage_ratio = 4
//! least_ephemeral_storage_bytes = 10_737_418_240
//!
//! [policy.room.eviction]           # pods are evicted below these: an amount or a part of all
//! memory_available = "100Mi"
//! nodefs_available = "10%"
//! nodefs_inodes_free = "5%"
//! pids_available = "5%"
//! pressure_seconds = 300           # how long a pressure is told after it was last seen
//! ```
//!
//! [`Room::of`] makes of it, and of what the host has, the [`HostRoom`] that
//! everything else reads.

use pool_agent_api::{Invalid, Resources};
use serde::Deserialize;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// `[policy.room]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Room {
    pub parent: String,
    pub reserved: Reserved,
    pub pod: PodBounds,
    pub eviction: Eviction,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            parent: "spindrift".into(),
            reserved: Reserved::default(),
            pod: PodBounds::default(),
            eviction: Eviction::default(),
        }
    }
}

/// Kept for the system and the agent. None: by the host's size, see [`Room::of`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reserved {
    pub cpu_millis: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub ephemeral_storage_bytes: Option<u64>,
    pub pids: Option<u64>,
}

/// What one pod may use beyond its claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodBounds {
    /// None: 4,096, or a sixteenth of what all pods may have if that is less.
    pub pids: Option<u64>,
    pub memory_ratio: u64,
    pub least_memory_bytes: u64,
    pub ephemeral_storage_ratio: u64,
    /// None: 10 GiB, or a quarter of what all pods may have if that is less.
    pub least_ephemeral_storage_bytes: Option<u64>,
}

impl Default for PodBounds {
    fn default() -> Self {
        Self {
            pids: None,
            memory_ratio: 4,
            least_memory_bytes: 512 * MIB,
            ephemeral_storage_ratio: 4,
            least_ephemeral_storage_bytes: None,
        }
    }
}

/// When pods are evicted for the host's sake: a kubelet's defaults, and its flag's
/// default for how long a pressure is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eviction {
    pub memory_available: Threshold,
    pub nodefs_available: Threshold,
    pub nodefs_inodes_free: Threshold,
    /// A kubelet has no default here.
    pub pids_available: Threshold,
    pub pressure_seconds: u64,
}

impl Default for Eviction {
    fn default() -> Self {
        Self {
            memory_available: Threshold::Amount(100 * MIB),
            nodefs_available: Threshold::Percent(10),
            nodefs_inodes_free: Threshold::Percent(5),
            pids_available: Threshold::Percent(5),
            pressure_seconds: 300,
        }
    }
}

/// An amount, or a part of all there is: `100Mi`, `1000`, `10%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Threshold {
    Amount(u64),
    Percent(u8),
}

impl Threshold {
    pub fn of(self, all: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            Self::Percent(percent) => part(all, percent.into(), 100),
        }
    }
}

impl TryFrom<String> for Threshold {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither an amount such as 100Mi nor a part such as 10%");
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| wrong());
        if let Some(percent) = text.strip_suffix('%') {
            return match number(percent)? {
                percent @ 0..=99 => Ok(Self::Percent(u8::try_from(percent).map_err(|_| wrong())?)),
                _ => Err(wrong()),
            };
        }
        for (suffix, unit) in [("Ki", 1 << 10), ("Mi", MIB), ("Gi", GIB), ("Ti", 1 << 40)] {
            if let Some(digits) = text.strip_suffix(suffix) {
                return number(digits)?
                    .checked_mul(unit)
                    .map(Self::Amount)
                    .ok_or_else(wrong);
            }
        }
        number(&text).map(Self::Amount)
    }
}

/// The host's room, shared out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoom {
    pub capacity: Resources,
    /// What sandboxes may claim together.
    pub allocatable: Resources,
    /// What all pods together are held to: more than they may claim, by what
    /// eviction keeps free.
    pub memory_bytes: u64,
    pub pids: u64,
    /// Bounds of one pod, see [`crate::allowance`].
    pub pod_pids: u64,
    pub memory_ratio: u64,
    pub least_memory_bytes: u64,
    pub ephemeral_storage_ratio: u64,
    pub least_ephemeral_storage_bytes: u64,
    pub eviction: Eviction,
}

/// Slots of the process table that are kept at least.
const LEAST_PIDS_RESERVED: u64 = 1_000;
/// A pod whose bound were lower could not start its containers.
const LEAST_POD_PIDS: u64 = 64;

impl Room {
    /// Shares out a host that has `capacity`, and `pids` for tasks.
    ///
    /// What is kept, where the file does not say, follows GKE's curve for nodes:
    /// - CPU: 6 % of the first core, 1 % of the second, 0.5 % of the next two, 0.25 %
    ///   of the rest;
    /// - memory: 25 % of the first 4 GiB, 20 % of the next 4, 10 % of the next 8, 6 % of
    ///   the next 112, 2 % of the rest; 255 MiB of a host with less than 1 GiB;
    /// - disk: 5 %, at most 10 GiB;
    /// - tasks: 10 %, at least 1,000.
    ///
    /// What eviction keeps free of memory and disk is not claimed either, as a
    /// kubelet counts.
    pub fn of(&self, capacity: Resources, pids: u64) -> Result<HostRoom, Invalid> {
        let reserved = Resources {
            cpu_millis: self
                .reserved
                .cpu_millis
                .unwrap_or_else(|| cpu(capacity.cpu_millis)),
            memory_bytes: self
                .reserved
                .memory_bytes
                .unwrap_or_else(|| memory(capacity.memory_bytes)),
            ephemeral_storage_bytes: self
                .reserved
                .ephemeral_storage_bytes
                .unwrap_or_else(|| (capacity.ephemeral_storage_bytes / 20).min(10 * GIB)),
            sandboxes: 0,
        };
        let kept = Resources {
            memory_bytes: self.eviction.memory_available.of(capacity.memory_bytes),
            ephemeral_storage_bytes: self
                .eviction
                .nodefs_available
                .of(capacity.ephemeral_storage_bytes),
            ..Resources::default()
        };
        let too_much = |field: &str, of: u64| {
            Invalid::new(
                format!("policy.room.reserved.{field}"),
                format_args!("leaves nothing of the host's {of} for pods: lower it, or eviction's threshold"),
            )
        };
        let left = |field, all: u64, reserved: u64, kept: u64| {
            all.checked_sub(reserved.saturating_add(kept))
                .filter(|&left| left > 0)
                .ok_or_else(|| too_much(field, all))
        };
        let allocatable = Resources {
            cpu_millis: left("cpu_millis", capacity.cpu_millis, reserved.cpu_millis, 0)?,
            memory_bytes: left(
                "memory_bytes",
                capacity.memory_bytes,
                reserved.memory_bytes,
                kept.memory_bytes,
            )?,
            ephemeral_storage_bytes: left(
                "ephemeral_storage_bytes",
                capacity.ephemeral_storage_bytes,
                reserved.ephemeral_storage_bytes,
                kept.ephemeral_storage_bytes,
            )?,
            sandboxes: capacity.sandboxes,
        };
        let reserved_pids = self
            .reserved
            .pids
            .unwrap_or_else(|| (pids / 10).max(LEAST_PIDS_RESERVED));
        let pods_pids = left("pids", pids, reserved_pids, 0)?;
        let pod_pids = self
            .pod
            .pids
            .unwrap_or_else(|| 4_096.min(pods_pids / 16).max(LEAST_POD_PIDS));
        let least_ephemeral = self
            .pod
            .least_ephemeral_storage_bytes
            .unwrap_or_else(|| (10 * GIB).min(allocatable.ephemeral_storage_bytes / 4));
        self.check(pod_pids)?;
        Ok(HostRoom {
            capacity,
            allocatable,
            memory_bytes: capacity.memory_bytes.saturating_sub(reserved.memory_bytes),
            pids: pods_pids,
            pod_pids,
            memory_ratio: self.pod.memory_ratio,
            least_memory_bytes: self.pod.least_memory_bytes,
            ephemeral_storage_ratio: self.pod.ephemeral_storage_ratio,
            least_ephemeral_storage_bytes: least_ephemeral,
            eviction: self.eviction,
        })
    }

    fn check(&self, pod_pids: u64) -> Result<(), Invalid> {
        let name = &self.parent;
        let safe = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_');
        if name.is_empty() || name.len() > 128 || !name.bytes().all(safe) {
            return Err(Invalid::new(
                "policy.room.parent",
                "must be one name of letters, digits, - and _",
            ));
        }
        for (field, ratio) in [
            ("memory_ratio", self.pod.memory_ratio),
            ("ephemeral_storage_ratio", self.pod.ephemeral_storage_ratio),
        ] {
            if ratio == 0 {
                return Err(Invalid::new(
                    format!("policy.room.pod.{field}"),
                    "must be 1 or more: a pod may use what it has claimed",
                ));
            }
        }
        // The pause process and a shell have to fit.
        if self.pod.least_memory_bytes < 16 * MIB {
            return Err(Invalid::new(
                "policy.room.pod.least_memory_bytes",
                "must be at least 16 MiB: no container could start",
            ));
        }
        if pod_pids < LEAST_POD_PIDS {
            return Err(Invalid::new(
                "policy.room.pod.pids",
                format_args!("must be at least {LEAST_POD_PIDS}"),
            ));
        }
        Ok(())
    }
}

fn part(of: u64, numerator: u64, denominator: u64) -> u64 {
    let part = u128::from(of) * u128::from(numerator) / u128::from(denominator.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

/// Walks an amount up the steps of a curve: (how much of it, ten-thousandths kept).
fn curve(all: u64, steps: &[(u64, u64)], rest: u64) -> u64 {
    let mut left = all;
    let mut kept = 0_u64;
    for &(width, tenthousandths) in steps {
        let here = left.min(width);
        kept = kept.saturating_add(part(here, tenthousandths, 10_000));
        left -= here;
    }
    kept.saturating_add(part(left, rest, 10_000))
}

fn cpu(millis: u64) -> u64 {
    curve(millis, &[(1000, 600), (1000, 100), (2000, 50)], 25)
}

fn memory(bytes: u64) -> u64 {
    if bytes < GIB {
        return 255 * MIB;
    }
    let steps = [
        (4 * GIB, 2500),
        (4 * GIB, 2000),
        (8 * GIB, 1000),
        (112 * GIB, 600),
    ];
    curve(bytes, &steps, 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(cpu_millis: u64, memory_gib: u64) -> Resources {
        Resources {
            cpu_millis,
            memory_bytes: memory_gib * GIB,
            ephemeral_storage_bytes: 100 * GIB,
            sandboxes: 110,
        }
    }

    #[test]
    fn a_host_keeps_more_the_larger_it_is_and_a_smaller_part() {
        for (cpu_millis, kept) in [(1000, 60), (2000, 70), (4000, 80), (16_000, 110)] {
            assert_eq!(cpu(cpu_millis), kept, "{cpu_millis}");
        }
        for (gib, kept_mib) in [(1, 256), (4, 1024), (8, 1843), (16, 2662), (128, 9543)] {
            assert_eq!(memory(gib * GIB) / MIB, kept_mib, "{gib} GiB");
        }
        assert_eq!(memory(GIB / 2), 255 * MIB);
    }

    #[test]
    fn what_pods_may_claim_leaves_out_what_is_kept_and_what_eviction_keeps_free() {
        let room = Room::default().of(host(2000, 16), 32_768).unwrap();
        assert_eq!(room.allocatable.cpu_millis, 1930);
        assert_eq!(room.memory_bytes, 16 * GIB - memory(16 * GIB));
        assert_eq!(room.allocatable.memory_bytes, room.memory_bytes - 100 * MIB);
        assert_eq!(room.allocatable.ephemeral_storage_bytes, 85 * GIB);
        assert_eq!((room.pids, room.pod_pids), (32_768 - 3_276, 1_843));
        assert_eq!(room.least_ephemeral_storage_bytes, 10 * GIB);
    }

    #[test]
    fn a_policy_that_leaves_nothing_or_bounds_nothing_is_refused_by_field() {
        let refused = |text: &str| {
            let room: Room = toml::from_str(text).map_err(|e| e.to_string())?;
            let host = room.of(host(2000, 16), 32_768);
            host.map(|_| ()).map_err(|e| e.to_string())
        };
        assert_eq!(refused(""), Ok(()));
        for (text, field) in [
            ("[reserved]\ncpu_millis = 2000", "reserved.cpu_millis"),
            ("[reserved]\nmemory_bytes = 17179869184", "reserved.memory_bytes"),
            ("[reserved]\npids = 40000", "reserved.pids"),
            ("[pod]\nmemory_ratio = 0", "pod.memory_ratio"),
            ("[pod]\npids = 3", "pod.pids"),
            ("[pod]\nleast_memory_bytes = 1", "pod.least_memory_bytes"),
            ("parent = \"../x\"", "room.parent"),
            ("parent = \"\"", "room.parent"),
            ("[eviction]\nmemory_available = \"100%\"", "\"100%\""),
            ("[eviction]\nmemory_available = \"much\"", "\"much\""),
            ("[eviction]\nmemory = \"1\"", "memory"),
        ] {
            let error = refused(text).unwrap_err();
            assert!(error.contains(field), "{text}: {error}");
        }
    }

    #[test]
    fn a_threshold_is_an_amount_or_a_part() {
        for (text, of_1000_gib) in [
            ("100Mi", 100 * MIB),
            ("10%", 100 * GIB),
            ("4096", 4096),
            ("0%", 0),
        ] {
            let threshold = Threshold::try_from(text.to_owned()).unwrap();
            assert_eq!(threshold.of(1000 * GIB), of_1000_gib, "{text}");
        }
    }
}
