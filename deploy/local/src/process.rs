//! A process told apart from a later one with the same number.
//!
//! A pid file alone is a trap: after a crash or a reboot the number may belong
//! to somebody else. The start time the kernel recorded for the process and
//! the id of this boot settle it, so nothing is ever killed by mistake.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pid: i32,
    /// In the kernel's clock ticks since this boot.
    start_ticks: u64,
    boot: String,
}

impl Process {
    /// The process that has this number now; `None` when there is none, or it
    /// has ended and only waits to be reaped.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_ticks: start_ticks(&stat)?,
            boot: boot_id()?,
        })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn runs(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// How long it has run.
    pub fn age(&self) -> Option<Duration> {
        let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
        // USER_HZ is 100 on every architecture that Linux shows to programs.
        Some(Duration::from_secs_f64(
            (uptime - self.start_ticks as f64 / 100.0).max(0.0),
        ))
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib * 1024)
    }

    /// Whether it is a containerd shim, which holds a pod's containers.
    pub fn is_shim(&self) -> bool {
        let line = self.command_line();
        let program = line.first().and_then(|program| program.rsplit('/').next());
        program.is_some_and(|name| name.starts_with("containerd-shim"))
    }

    /// Whether a word of its command line is the path or below it.
    pub fn mentions(&self, path: &Path) -> bool {
        self.command_line()
            .iter()
            .any(|word| Path::new(word).starts_with(path))
    }

    fn command_line(&self) -> Vec<String> {
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        line.split(|b| *b == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    }

    /// Nothing happens if it is gone.
    pub fn signal(&self, signal: Signal) {
        if self.runs() {
            // It may end between the look and the signal; then there is nobody to tell.
            nix::sys::signal::kill(Pid::from_raw(self.pid), signal).ok();
        }
    }

    /// Asks it to end, insists after `grace`, and waits until it is gone.
    pub async fn end(&self, grace: Duration) {
        if !grace.is_zero() {
            self.signal(Signal::SIGTERM);
            if self.gone_within(grace).await {
                return;
            }
        }
        self.signal(Signal::SIGKILL);
        // Only the kernel can keep it now, say in a write to a dead disk.
        self.gone_within(Duration::from_secs(10)).await;
    }

    async fn gone_within(&self, limit: Duration) -> bool {
        let since = Instant::now();
        while self.runs() {
            if since.elapsed() > limit {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Every process that was started with `NAME=value` in its environment.
    pub fn with_environment(name: &str, value: &str) -> Vec<Process> {
        let wanted = format!("{name}={value}");
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environment
                    .split(|b| *b == 0)
                    .any(|variable| variable == wanted.as_bytes())
            })
            .filter_map(Process::of)
            .collect()
    }
}

/// Field 22 of proc_pid_stat(5). The command's name, in parentheses, may hold
/// anything, parentheses too, so counting starts after the last one.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Changes at every boot.
pub fn boot_id() -> Option<String> {
    Some(
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()?
            .trim()
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_command_name() {
        let fields = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0";
        for name in ["sleep", "a b", "evil) S 1 (x", ""] {
            assert_eq!(
                start_ticks(&format!("7 ({name}) S {fields}")),
                Some(4242),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_zombie_does_not_run() {
        assert_eq!(
            start_ticks("7 (x) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0"),
            None
        );
    }

    #[test]
    fn another_process_with_the_same_number_is_not_the_one_we_started() {
        let own = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(own.runs());
        assert!(
            !Process {
                start_ticks: own.start_ticks + 1,
                ..own.clone()
            }
            .runs()
        );
        assert!(
            !Process {
                boot: "another".into(),
                ..own
            }
            .runs()
        );
    }
}
