//! A pod that fills an emptyDir past its `sizeLimit` has to go, as with a kubelet.
//! One task for each sandbox that has such a limit, spawned by `host`; the end
//! itself is the lifecycle's.
//!
//! What always holds: one tree is walked at a time on this host, and a tree that
//! takes long to walk is walked less often.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use pool_agent_api::VolumeName;
use tokio::sync::{Semaphore, mpsc, watch};

use super::{
    driver::{Command, Progress},
    event::Event,
};
use crate::volumes::usage;

/// As often as a kubelet looks.
const PERIOD: Duration = Duration::from_secs(10);
/// A walk takes at most this part of the time.
const SHARE: u32 = 10;
/// The disk is the pods'.
static WALKS: Semaphore = Semaphore::const_new(1);

/// Measures the volumes until one is too large or the sandbox has ended.
pub async fn watch(
    volumes: Vec<(VolumeName, PathBuf, u64)>,
    mut progress: watch::Receiver<Progress>,
    commands: mpsc::Sender<Command>,
) {
    let mut pause = PERIOD;
    loop {
        tokio::select! {
            // An error tells that the driver has gone.
            _ended = progress.wait_for(|p| p.stopped || p.gone) => return,
            () = tokio::time::sleep(pause) => {}
        }
        let Ok(permit) = WALKS.acquire().await else {
            return;
        };
        let begun = Instant::now();
        let over = over(&volumes).await;
        let took = begun.elapsed();
        drop(permit);
        match over {
            Some(message) => {
                if commands
                    .send(Command::Event(Event::Evict("Evicted", message)))
                    .await
                    .is_err()
                {
                    tracing::debug!("the sandbox ended before it was evicted");
                }
                return;
            }
            None => pause = PERIOD.max(took * SHARE),
        }
    }
}

/// What is told of the first volume that is too large, in a kubelet's words.
async fn over(volumes: &[(VolumeName, PathBuf, u64)]) -> Option<String> {
    for (volume, path, limit) in volumes {
        match usage::exceeds(path, *limit).await {
            Ok(false) => {}
            Ok(true) => {
                return Some(format!(
                    "Usage of EmptyDir volume \"{volume}\" exceeds the limit \"{}\". ",
                    quantity(*limit)
                ));
            }
            // Not made yet, or gone already.
            Err(error) => {
                tracing::debug!(path = %path.display(), error = %error, "a volume was not measured");
            }
        }
    }
    None
}

/// An amount of bytes as Kubernetes would most likely have been given it: with the
/// largest suffix that leaves a whole number, a binary one first.
fn quantity(bytes: u64) -> String {
    const SUFFIXES: [(&str, u64); 8] = [
        ("Ti", 1 << 40),
        ("Gi", 1 << 30),
        ("Mi", 1 << 20),
        ("T", 1_000_000_000_000),
        ("G", 1_000_000_000),
        ("M", 1_000_000),
        ("Ki", 1 << 10),
        ("k", 1_000),
    ];
    SUFFIXES
        .iter()
        .find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit))
        .map_or_else(
            || bytes.to_string(),
            |(suffix, unit)| format!("{}{suffix}", bytes / unit),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_reads_as_it_was_written() {
        for (bytes, text) in [
            (1 << 20, "1Mi"),
            (3 << 30, "3Gi"),
            (1536 << 20, "1536Mi"),
            (100_000_000, "100M"),
            (2048, "2Ki"),
            (5_000, "5k"),
            (1_234_567, "1234567"),
        ] {
            assert_eq!(quantity(bytes), text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_volume_that_grows_past_its_limit_evicts_in_a_kubelets_words() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("scratch");
        std::fs::create_dir(&volume).unwrap();
        let (commands, mut inbox) = mpsc::channel(1);
        let (_driver, progress) = watch::channel(Progress::default());
        let limited = vec![("scratch".parse().unwrap(), volume.clone(), 1 << 20)];
        tokio::spawn(watch(limited, progress, commands));
        let quiet = tokio::time::timeout(PERIOD * 3, inbox.recv()).await;
        assert!(quiet.is_err(), "an empty volume is not too large");
        std::fs::write(volume.join("file"), vec![1; 2 << 20]).unwrap();
        let Some(Command::Event(Event::Evict(reason, message))) = inbox.recv().await else {
            panic!("it was not evicted");
        };
        assert_eq!(reason, "Evicted");
        assert_eq!(
            message,
            "Usage of EmptyDir volume \"scratch\" exceeds the limit \"1Mi\". "
        );
        assert!(inbox.recv().await.is_none(), "it is told once");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_measured_once_the_sandbox_has_stopped() {
        let (commands, mut inbox) = mpsc::channel(1);
        let (driver, progress) = watch::channel(Progress::default());
        tokio::spawn(watch(vec![], progress, commands));
        driver.send_modify(|p| p.stopped = true);
        assert!(inbox.recv().await.is_none());
    }
}
