//! A process told apart from a later one with the same number.
//!
//! A pid file alone is a trap: after a crash or a reboot the number may belong
//! to somebody else. The start time the kernel recorded for the process and
//! the id of this boot settle it, so nothing is ever killed by mistake.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
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
        Self::named(pid).filter(Self::runs)
    }

    /// The process that the number stands for, also one that only waits to be reaped.
    fn named(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_ticks: start_ticks(&stat)?,
            boot: boot_id()?,
        })
    }

    /// The kernel's own handle on it: no other process can come to bear it.
    fn handle(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.pid).filter(|_| self.pid > 0)?;
        let handle = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
        // Only now is it certain whom the number stands for.
        (Self::named(self.pid).as_ref() == Some(self)).then_some(handle)
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Until its last thread has ended, and with it what it held: the first may be a
    /// zombie while others still hold the ports it listened on.
    pub fn runs(&self) -> bool {
        self.handle().is_some_and(|handle| !has_ended(&handle))
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
        if let Some(handle) = self.handle() {
            // It may end between the look and the signal; then there is nobody to tell.
            pidfd_send_signal(handle, signal).ok();
        }
    }

    /// Asks it to end, insists after `grace`, and waits until it is gone, with all
    /// that it held.
    pub async fn end(&self, grace: Duration) {
        if !grace.is_zero() {
            self.signal(Signal::TERM);
            if self.gone_within(grace).await {
                return;
            }
        }
        self.signal(Signal::KILL);
        // Only the kernel can keep it now, say in a write to a dead disk.
        if !self.gone_within(Duration::from_secs(30)).await {
            tracing::warn!(pid = self.pid, "a killed process does not go");
        }
    }

    async fn gone_within(&self, limit: Duration) -> bool {
        let Some(handle) = self.handle() else {
            return true;
        };
        let ended = tokio::task::spawn_blocking(move || has_ended_within(&handle, limit));
        ended.await.unwrap_or(false)
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

fn has_ended(handle: &OwnedFd) -> bool {
    has_ended_within(handle, Duration::ZERO)
}

/// A pidfd becomes readable when the last thread has ended: pidfd_open(2).
fn has_ended_within(handle: &OwnedFd, limit: Duration) -> bool {
    let mut looked_at = [PollFd::new(handle, PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    retry_on_intr(|| poll(&mut looked_at, limit.as_ref())).is_ok_and(|ready| ready > 0)
}

/// Field 22 of proc_pid_stat(5). The command's name, in parentheses, may hold
/// anything, parentheses too, so counting starts after the last one.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
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
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        let begun = std::time::Instant::now();
        // Nobody reaps it before the end of the test.
        while Process::of(pid).is_some() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
        assert!(Process::named(pid).is_some(), "it was reaped");
        child.wait().unwrap();
    }

    /// A listener whose first thread has ended: what a killed program looks like while
    /// its other threads are still on their way out.
    #[tokio::test]
    async fn a_process_whose_first_thread_has_ended_still_runs_and_is_gone_with_its_port() {
        // In C, as Rust has no way to end the first thread alone. cc is what Rust links with.
        const PROGRAM: &str = r#"
            #include <arpa/inet.h>
            #include <pthread.h>
            #include <stdio.h>
            #include <unistd.h>
            static void *linger(void *_) { sleep(120); return 0; }
            int main(void) {
                struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
                socklen_t length = sizeof at;
                int s = socket(AF_INET, SOCK_STREAM, 0);
                if (bind(s, (struct sockaddr *)&at, length) || listen(s, 1)) return 1;
                getsockname(s, (struct sockaddr *)&at, &length);
                pthread_t other;
                pthread_create(&other, 0, linger, 0);
                printf("%d\n", ntohs(at.sin_port));
                fflush(stdout);
                pthread_exit(0);
            }"#;
        let directory = tempfile::tempdir().unwrap();
        let (source, program) = (directory.path().join("first.c"), directory.path().join("first"));
        std::fs::write(&source, PROGRAM).unwrap();
        let built = std::process::Command::new("cc")
            .args(["-pthread", "-o"])
            .args([&program, &source])
            .status()
            .unwrap();
        assert!(built.success());
        let mut child = tokio::process::Command::new(&program)
            .stdout(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut told = tokio::io::BufReader::new(child.stdout.take().unwrap());
        let mut port = String::new();
        tokio::io::AsyncBufReadExt::read_line(&mut told, &mut port)
            .await
            .unwrap();
        let port: u16 = port.trim().parse().unwrap();
        let pid = child.id().unwrap().cast_signed();
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let begun = std::time::Instant::now();
        while !state().contains(") Z ") {
            assert!(begun.elapsed() < Duration::from_secs(30), "{}", state());
            tokio::task::yield_now().await;
        }
        let process = Process::of(pid).expect("its second thread runs");
        assert!(std::net::TcpListener::bind(("127.0.0.1", port)).is_err());
        process.end(Duration::ZERO).await;
        std::net::TcpListener::bind(("127.0.0.1", port)).expect("the port is free once it is gone");
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
