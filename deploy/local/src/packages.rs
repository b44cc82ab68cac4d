//! Debian's packages, installed when nobody else is at it: a machine that has just
//! started updates itself, and holds the package manager's locks for minutes.

use std::{fs::OpenOptions, path::Path, time::Duration};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc::{F_UNLCK, F_WRLCK, SEEK_SET, flock},
};
use tokio::time::Instant;

use crate::{
    progress::Step,
    tool::{Tool, ToolError},
};

/// How long others may be at it.
const PATIENCE: Duration = Duration::from_secs(900);
/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What apt and dpkg lock (`man apt-get`, FILES; `apt.conf`, DPkg::Lock::Timeout).
const LOCKS: &[&str] = &[
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
];

pub(crate) async fn install(packages: &[&str], step: &Step) -> Result<(), ToolError> {
    let deadline = Instant::now() + PATIENCE;
    when_free(step, deadline, || apt().arg("update")).await?;
    when_free(step, deadline, || {
        // Where a service would be started, as docker-registry's, it stays off:
        // runlevel 1 is what Debian's invoke-rc.d takes as "not now".
        apt()
            .env("RUNLEVEL", "1")
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
    })
    .await
}

fn apt() -> Tool {
    Tool::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .limit(LIMIT)
}

/// Runs it again as long as it ends because of a lock.
async fn when_free(step: &Step, deadline: Instant, tool: impl Fn() -> Tool) -> Result<(), ToolError> {
    loop {
        while Instant::now() < deadline
            && let Some((lock, holder)) = LOCKS
                .iter()
                .find_map(|lock| Some((lock, holder(Path::new(lock))?)))
        {
            step.note(&format!("waits for process {holder}, which holds {lock}"));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        match tool().run_showing(step).await {
            Err(error) if Instant::now() < deadline && is_of_a_lock(&error) => {
                step.note("another package manager was faster");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            done => return done,
        }
    }
}

fn is_of_a_lock(error: &ToolError) -> bool {
    let said = error.to_string();
    said.contains("Could not get lock") || said.contains("Unable to lock")
}

/// The process that holds a lock on the file; None too if that cannot be told.
fn holder(file: &Path) -> Option<i32> {
    let file = OpenOptions::new().read(true).write(true).open(file).ok()?;
    let mut lock = whole(F_WRLCK);
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).ok()?;
    (lock.l_type != F_UNLCK as i16).then_some(lock.l_pid)
}

/// All of a file.
fn whole(kind: i32) -> flock {
    flock {
        l_type: kind as i16,
        l_whence: SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    #[test]
    fn a_lock_is_seen_while_it_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        assert_eq!(holder(&path), None, "there is no file");
        // A lock of an open file, not of a process: this one is not asked about its own.
        let file = std::fs::File::create(&path).unwrap();
        assert_eq!(holder(&path), None);
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole(F_WRLCK))).unwrap();
        assert_eq!(holder(&path), Some(-1));
        drop(file);
        assert_eq!(holder(&path), None);
    }

    #[tokio::test]
    async fn what_failed_for_a_lock_is_run_again_and_what_failed_for_another_reason_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        let run = |failure: &str| {
            let script = format!(
                "echo x >>{0}; [ $(wc -l <{0}) -ge 3 ] || {{ echo '{failure}'; exit 100; }}",
                count.display()
            );
            move || Tool::new("sh").args(["-c", &script])
        };
        let step = Progress::silent().step("Install");
        let deadline = Instant::now() + PATIENCE;
        let busy = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)";
        when_free(&step, deadline, run(busy)).await.unwrap();
        assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\nx\nx\n");
        std::fs::remove_file(&count).unwrap();
        let absent = when_free(&step, deadline, run("E: Unable to locate package x")).await;
        assert!(absent.is_err());
        assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n");
    }
}
