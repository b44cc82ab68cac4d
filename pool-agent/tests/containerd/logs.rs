//! Log files on the host's disk.

use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::{
    host::{Host, wait},
    pod::{pod, shell},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others: a_log_that_grows_too_large_is_rotated_and_loses_nothing]
}

/// Printed before anything of interest: with what the runtime writes before each, it
/// takes more than the largest file.
const LINE: &str = "a line of no interest to anybody at all";
const LINES: usize = 150_000;

async fn a_log_that_grows_too_large_is_rotated_and_loses_nothing(host: &Host) -> anyhow::Result<()> {
    let script = format!(
        "yes {LINE} | head -n {LINES}
        i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.1; done"
    );
    let web = host.start(pod(vec![shell("main", &script)])).await?;
    let directory = host.files().sandbox(&web.key).logs().join("main");
    wait("that the log is rotated", async || {
        match written(&directory)?.len() {
            0 | 1 => Err("it is not".to_owned()),
            _ => Ok(()),
        }
    })
    .await?;
    web.log_until("main", "goes on in a new file", |log| log.contains("tick "))
        .await?;
    let all = written(&directory).map_err(anyhow::Error::msg)?.concat();
    // Each line has its time, stream and tag before it.
    let texts = || {
        all.lines()
            .filter_map(|line| line.split_once(" F ").map(|(_, text)| text))
    };
    let dull = texts().filter(|text| *text == LINE).count();
    ensure!(dull == LINES, "{dull} lines of {LINES}");
    let ticks: Vec<u32> = texts()
        .filter_map(|text| text.strip_prefix("tick ")?.parse().ok())
        .collect();
    let counted: Vec<u32> = (0..u32::try_from(ticks.len())?).collect();
    ensure!(!ticks.is_empty() && ticks == counted, "{ticks:?}");
    web.forget().await
}

/// What the files of one run hold, the oldest first: those put aside are named by
/// their time, after the one that is written to.
fn written(directory: &Path) -> Result<Vec<String>, String> {
    let entries = std::fs::read_dir(directory).map_err(|e| e.to_string())?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    if !paths.is_empty() {
        paths.rotate_left(1);
    }
    let read = |path: PathBuf| std::fs::read_to_string(path).map_err(|e| e.to_string());
    paths.into_iter().map(read).collect()
}
