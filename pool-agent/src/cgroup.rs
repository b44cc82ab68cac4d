//! The cgroup a pod's containers are put under. The runtime makes the containers'
//! own cgroups; this makes the pod's, with the sum of their limits, and removes
//! it, which the runtime does not. Version 1 (also hybrid) and 2.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pool_agent_api::{SandboxKey, SandboxSpec};

use crate::cri::config::{Qos, cpu_quota, cpu_shares};

/// How often, and how many times, a cgroup is looked at whose processes were killed:
/// a second in all. The kernel may still be busy with what is dead already.
const EMPTYING_POLL: Duration = Duration::from_millis(20);
const EMPTYING_POLLS: usize = 50;
const ROOT: &str = "/sys/fs/cgroup";
/// Below the root of each hierarchy.
const PARENT: &str = "spindrift";

/// What a pod may use, over all its containers; None: unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodLimits {
    pub cpu_request_millis: u64,
    pub cpu_limit_millis: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
}

impl PodLimits {
    /// App containers and sidecars run together, each init container beside the
    /// sidecars before it: the larger of the two counts. A container without a limit
    /// leaves the pod without one.
    pub fn of(spec: &SandboxSpec) -> Self {
        let sum = |pick: fn(&pool_agent_api::spec::ContainerResources) -> Option<u64>| -> Option<u64> {
            let mut sidecars = 0_u64;
            let mut peak = 0_u64;
            for init in &spec.init_containers {
                let amount = pick(&init.resources)?;
                if init.restartable_init {
                    sidecars = sidecars.saturating_add(amount);
                    peak = peak.max(sidecars);
                } else {
                    peak = peak.max(sidecars.saturating_add(amount));
                }
            }
            let mut apps = sidecars;
            for app in &spec.containers {
                apps = apps.saturating_add(pick(&app.resources)?);
            }
            Some(peak.max(apps))
        };
        Self {
            cpu_request_millis: sum(|r| Some(r.cpu_request_millis.or(r.cpu_limit_millis).unwrap_or(0)))
                .unwrap_or(0),
            cpu_limit_millis: sum(|r| r.cpu_limit_millis.filter(|&n| n > 0)),
            memory_limit_bytes: sum(|r| r.memory_limit_bytes.filter(|&n| n > 0)),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Cgroups {
    /// The hierarchies in which a pod gets a directory.
    hierarchies: Vec<PathBuf>,
    unified: bool,
}

impl Cgroups {
    /// What this machine has.
    pub fn detect() -> Self {
        let root = Path::new(ROOT);
        if root.join("cgroup.controllers").exists() {
            return Self {
                hierarchies: vec![root.to_owned()],
                unified: true,
            };
        }
        let hierarchies = std::fs::read_dir(root)
            .map(|entries| {
                entries
                    .filter_map(|e| e.ok().map(|e| e.path()))
                    .filter(|p| p.join("cgroup.procs").exists() && !p.is_symlink())
                    .collect()
            })
            .unwrap_or_default();
        Self {
            hierarchies,
            unified: false,
        }
    }

    /// The pod's cgroup as the runtime is told it.
    pub fn parent(key: &SandboxKey, qos: Qos) -> String {
        let class = match qos {
            Qos::Guaranteed => "guaranteed",
            Qos::Burstable => "burstable",
            Qos::BestEffort => "besteffort",
        };
        format!("/{PARENT}/{class}/pod{}-{}", key.pod, key.attempt)
    }

    /// Wherever the pod's cgroup may be, if its class is not known any more.
    pub fn parents(key: &SandboxKey) -> [String; 3] {
        [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort].map(|qos| Self::parent(key, qos))
    }

    /// Makes the pod's cgroup and sets its limits. May be repeated.
    pub fn create(&self, parent: &str, limits: PodLimits) -> io::Result<()> {
        let below = parent.trim_start_matches('/');
        if self.unified {
            // A controller has to be handed down at each level.
            let mut at = PathBuf::from(ROOT);
            for part in Path::new(below) {
                delegate(&at);
                at.push(part);
                make(&at)?;
            }
            delegate(&at);
            let max = |amount: Option<String>| amount.unwrap_or_else(|| "max".into());
            let weight = cpu_weight(limits.cpu_request_millis);
            write(&at, "cpu.weight", &weight.to_string())?;
            let quota = limits.cpu_limit_millis.map(|m| cpu_quota(m).to_string());
            write(&at, "cpu.max", &format!("{} 100000", max(quota)))?;
            let memory = limits.memory_limit_bytes.map(|b| b.to_string());
            return write(&at, "memory.max", &max(memory));
        }
        for hierarchy in &self.hierarchies {
            let at = hierarchy.join(below);
            std::fs::create_dir_all(&at)?;
            let shares = cpu_shares(limits.cpu_request_millis);
            write(&at, "cpu.shares", &shares.to_string())?;
            if let Some(millis) = limits.cpu_limit_millis {
                write(&at, "cpu.cfs_period_us", "100000")?;
                write(&at, "cpu.cfs_quota_us", &cpu_quota(millis).to_string())?;
            }
            if let Some(bytes) = limits.memory_limit_bytes {
                write(&at, "memory.limit_in_bytes", &bytes.to_string())?;
            }
        }
        Ok(())
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
        Ok(())
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

/// A host that keeps a controller to itself has pods without that limit.
fn delegate(directory: &Path) {
    for controller in ["+cpu", "+memory", "+pids"] {
        if let Err(error) = std::fs::write(directory.join("cgroup.subtree_control"), controller) {
            tracing::debug!(controller, error = %error, "a cgroup controller is not handed down");
        }
    }
}

/// Sets a limit where the hierarchy has it.
fn write(directory: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = directory.join(file);
    if path.exists() {
        std::fs::write(path, value)?;
    }
    Ok(())
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
