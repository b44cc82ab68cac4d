//! The cgroups the pods run in. The runtime makes the containers' own; these are the
//! pods', their classes' and the one that holds all pods of this agent. Version 1
//! (also hybrid) and 2, with the cgroupfs driver.
//!
//! ```text
//! /PARENT                            memory, tasks: all that pods may use together
//! ├─ pod<uid>-<attempt>              a guaranteed pod: weight by its claim
//! ├─ burstable                       weight: the sum of its pods'
//! │  └─ pod<uid>-<attempt>           memory, tasks, CPU: its allowance
//! └─ besteffort                      the least weight there is
//!    └─ pod<uid>-<attempt>
//! ```
//!
//! As under a kubelet, whose names for the classes these are.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pool_agent_api::SandboxKey;

use crate::{
    allowance::Allowance,
    cri::config::{Qos, cpu_quota, cpu_shares},
    policy::room::HostRoom,
};

/// How often, and how many times, a cgroup is looked at whose processes were killed:
/// a second in all. The kernel may still be busy with what is dead already.
const EMPTYING_POLL: Duration = Duration::from_millis(20);
const EMPTYING_POLLS: usize = 50;
const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The kernel's least shares (version 1) and weight (version 2).
const LEAST_SHARES: u64 = 2;
const LEAST_WEIGHT: u64 = 1;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("making the cgroup of all pods, /{parent}")]
    Parent {
        parent: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the cgroup /{parent} has no {controller} controller, so that pods could not be held to their share: \
         mount it, or (version 2) hand it down in {ROOT}/cgroup.subtree_control"
    )]
    NoController {
        parent: String,
        controller: &'static str,
    },
}

/// What a pod's cgroup counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory that cannot be had back at once: all but the inactive file pages.
    pub working_set_bytes: u64,
    pub tasks: u64,
}

/// What a cgroup is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes: u64,
    pub tasks: u64,
}

#[derive(Debug, Clone)]
pub struct Cgroups {
    /// The hierarchies in which a pod gets a directory.
    hierarchies: Vec<PathBuf>,
    unified: bool,
    /// Below the root of each hierarchy.
    parent: String,
    /// A class's weight is the sum of what is there: one sums at a time.
    summing: Arc<Mutex<()>>,
}

impl Cgroups {
    /// What this machine has, for the pods below `/parent`.
    pub fn detect(parent: &str) -> Self {
        let root = Path::new(ROOT);
        let unified = root.join("cgroup.controllers").exists();
        let hierarchies = if unified {
            vec![root.to_owned()]
        } else {
            std::fs::read_dir(root)
                .map(|entries| {
                    entries
                        .filter_map(|e| e.ok().map(|e| e.path()))
                        .filter(|p| p.join("cgroup.procs").exists() && !p.is_symlink())
                        .collect()
                })
                .unwrap_or_default()
        };
        Self {
            hierarchies,
            unified,
            parent: parent.to_owned(),
            summing: Arc::default(),
        }
    }

    /// Whether the kernel can end a container as a whole when its memory is short
    /// (`memory.oom.group`); a kubelet has it done where it can.
    pub fn can_kill_as_a_whole(&self) -> bool {
        self.unified
    }

    /// Makes the cgroup of all pods and holds it to what they may use together.
    pub fn hold(&self, room: &HostRoom) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Parent {
            parent: self.parent.clone(),
            source,
        };
        for class in ["", "/burstable", "/besteffort"] {
            self.make(&format!("{}{class}", self.parent)).map_err(failed)?;
        }
        for (controller, file) in CONTROLLERS.into_iter().zip(match self.unified {
            true => ["cpu.weight", "memory.max", "pids.max"],
            false => ["cpu.shares", "memory.limit_in_bytes", "pids.max"],
        }) {
            if self.path_of(&self.parent, file).is_none() {
                return Err(CgroupError::NoController {
                    parent: self.parent.clone(),
                    controller,
                });
            }
        }
        self.set_weight(&self.parent, room.allocatable.cpu_millis)
            .map_err(failed)?;
        self.set_pids(&self.parent, room.pids).map_err(failed)?;
        if self.unified {
            // As a kubelet has it: what is swapped out is not bounded by any of this.
            self.set(&self.parent, "memory.swap.max", "0").map_err(failed)?;
        }
        match self.set_memory(&self.parent, room.memory_bytes) {
            // Pods of before have more. They run; what is short then is evicted.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => tracing::warn!(
                bytes = room.memory_bytes,
                "pods use more memory than they may have together; the limit of before stays"
            ),
            result => result.map_err(failed)?,
        }
        self.weigh_classes().map_err(failed)
    }

    /// The pod's cgroup as the runtime is told it.
    pub fn parent(&self, key: &SandboxKey, qos: Qos) -> String {
        let class = match qos {
            Qos::Guaranteed => "",
            Qos::Burstable => "burstable/",
            Qos::BestEffort => "besteffort/",
        };
        format!("/{}/{class}pod{}-{}", self.parent, key.pod, key.attempt)
    }

    /// Wherever the pod's cgroup may be, if its class is not known any more.
    pub fn parents(&self, key: &SandboxKey) -> [String; 3] {
        [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort].map(|qos| self.parent(key, qos))
    }

    /// Makes the pod's cgroup and sets its limits. May be repeated.
    pub fn create(&self, parent: &str, allowance: &Allowance) -> io::Result<()> {
        self.make(parent)?;
        self.set_weight(parent, allowance.claim.cpu_millis)?;
        match (allowance.cpu_limit_millis, self.unified) {
            (Some(millis), true) => self.set(parent, "cpu.max", &format!("{} 100000", cpu_quota(millis)))?,
            (None, true) => self.set(parent, "cpu.max", "max 100000")?,
            (Some(millis), false) => {
                self.set(parent, "cpu.cfs_period_us", "100000")?;
                self.set(parent, "cpu.cfs_quota_us", &cpu_quota(millis).to_string())?;
            }
            (None, false) => {}
        }
        self.set_pids(parent, allowance.pids)?;
        self.set_memory(parent, allowance.memory_bytes)?;
        self.weigh_classes()
    }

    /// What a cgroup below the parent, or the parent (""), uses; None if it is gone.
    pub fn usage(&self, parent: &str) -> Option<Usage> {
        let (used, stat, inactive) = match self.unified {
            true => ("memory.current", "memory.stat", "inactive_file"),
            false => ("memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
        };
        let parent = match parent {
            "" => &self.parent,
            parent => parent,
        };
        let used = number(&self.path_of(parent, used)?)?;
        let stat = std::fs::read_to_string(self.path_of(parent, stat)?).ok()?;
        let inactive = stat
            .lines()
            .find_map(|line| line.strip_prefix(inactive)?.trim().parse().ok())
            .unwrap_or(0);
        Some(Usage {
            working_set_bytes: used.saturating_sub(inactive),
            tasks: number(&self.path_of(parent, "pids.current")?)?,
        })
    }

    /// CPU time that a cgroup has used since it was made, with all that was ever below it;
    /// None if it is gone.
    pub fn cpu_nanos(&self, parent: &str) -> Option<u64> {
        if !self.unified {
            return number(&self.path_of(parent, "cpuacct.usage")?);
        }
        let stat = std::fs::read_to_string(self.path_of(parent, "cpu.stat")?).ok()?;
        let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
        micros.trim().parse::<u64>().ok()?.checked_mul(1000)
    }

    /// What all pods together are held to: as the kernel has it.
    pub fn limits(&self) -> Option<Limits> {
        let memory = match self.unified {
            true => "memory.max",
            false => "memory.limit_in_bytes",
        };
        Some(Limits {
            memory_bytes: number(&self.path_of(&self.parent, memory)?)?,
            tasks: number(&self.path_of(&self.parent, "pids.max")?)?,
        })
    }

    // ---- one directory, in each hierarchy

    fn make(&self, below: &str) -> io::Result<()> {
        let below = below.trim_start_matches('/');
        if !self.unified {
            return self
                .hierarchies
                .iter()
                .try_for_each(|hierarchy| std::fs::create_dir_all(hierarchy.join(below)));
        }
        // A controller has to be handed down at each level.
        let mut at = PathBuf::from(ROOT);
        for part in Path::new(below) {
            delegate(&at);
            at.push(part);
            make(&at)?;
        }
        delegate(&at);
        Ok(())
    }

    fn path_of(&self, below: &str, file: &str) -> Option<PathBuf> {
        let below = below.trim_start_matches('/');
        let paths = self.hierarchies.iter().map(|h| h.join(below).join(file));
        paths.into_iter().find(|path| path.exists())
    }

    /// Sets a limit. That there are the controllers was seen by [`Self::hold`].
    fn set(&self, below: &str, file: &str, value: &str) -> io::Result<()> {
        match self.path_of(below, file) {
            Some(path) => std::fs::write(path, value),
            None => Ok(()),
        }
    }

    fn set_weight(&self, below: &str, millis: u64) -> io::Result<()> {
        match self.unified {
            true => self.set(below, "cpu.weight", &cpu_weight(millis).to_string()),
            false => self.set(below, "cpu.shares", &cpu_shares(millis).to_string()),
        }
    }

    fn set_pids(&self, below: &str, pids: u64) -> io::Result<()> {
        self.set(below, "pids.max", &pids.to_string())
    }

    fn set_memory(&self, below: &str, bytes: u64) -> io::Result<()> {
        let bytes = bytes.to_string();
        if self.unified {
            return self.set(below, "memory.max", &bytes);
        }
        // With swap may not be less than without: which comes first depends on what was.
        let _too_small_yet = self.set(below, "memory.memsw.limit_in_bytes", &bytes).is_err();
        self.set(below, "memory.limit_in_bytes", &bytes)?;
        self.set(below, "memory.memsw.limit_in_bytes", &bytes)
    }

    /// Gives burstable pods together the weight of their sum, and best-effort pods the
    /// least: as a kubelet's, a class competes with guaranteed pods by what it claims.
    fn weigh_classes(&self) -> io::Result<()> {
        let _one = self.summing.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, least, most) = match self.unified {
            true => ("cpu.weight", LEAST_WEIGHT, 10_000),
            false => ("cpu.shares", LEAST_SHARES, 262_144),
        };
        let burstable = format!("{}/burstable", self.parent);
        let sum = match self.path_of(&burstable, file).as_deref().and_then(Path::parent) {
            Some(directory) => std::fs::read_dir(directory)?
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                // One that is being removed counts no more.
                .filter_map(|pod| number(&pod.path().join(file)))
                .fold(0, u64::saturating_add),
            None => return Ok(()),
        };
        self.set(&burstable, file, &sum.clamp(least, most).to_string())?;
        self.set(&format!("{}/besteffort", self.parent), file, &least.to_string())
    }

    /// Removes the pod's cgroup with what the runtime left below it, processes
    /// included: of a start that was cut off, containerd may forget a `runc init`.
    pub fn remove(&self, parent: &str) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let directory = hierarchy.join(parent.trim_start_matches('/'));
            let mut polls = 0..EMPTYING_POLLS;
            loop {
                match remove_tree(&directory) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy && polls.next().is_some() => {}
                    result => break result?,
                }
                kill_all(&directory)?;
                std::thread::sleep(EMPTYING_POLL);
            }
        }
        self.weigh_classes()
    }
}

/// The kernel's weight (1 to 10,000) for a CPU request, as runc converts shares.
fn cpu_weight(millis: u64) -> u64 {
    let shares = u64::try_from(cpu_shares(millis)).unwrap_or(2);
    1 + (shares.saturating_sub(2) * 9999) / 262_142
}

fn make(directory: &Path) -> io::Result<()> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Whether that was enough is seen by [`Cgroups::hold`].
fn delegate(directory: &Path) {
    for controller in CONTROLLERS {
        let handed = std::fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"));
        if let Err(error) = handed {
            tracing::debug!(controller, error = %error, "a cgroup controller is not handed down");
        }
    }
}

/// A file that holds one number.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Kills every process in the tree, also where the kernel cannot do it in one step
/// (version 1).
fn kill_all(directory: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            kill_all(&entry.path())?;
        }
    }
    let members = std::fs::read_to_string(directory.join("cgroup.procs"))?;
    // 0 stands for one outside of our own process namespace.
    for pid in members
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|&pid| pid > 0)
    {
        tracing::warn!(pid, cgroup = %directory.display(), "killing a process the runtime forgot");
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_span_the_range_of_shares() {
        assert_eq!([0, 1000, 256_000].map(cpu_weight), [1, 39, 10_000]);
    }
}
