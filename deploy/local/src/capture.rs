//! What went over a link: tcpdump between a host and the bridge.
//!
//! Everything between two hosts crosses both their links, so a capture of one
//! host's link holds all that it sent to and got from the others.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

use crate::{
    lab::Lab,
    tool::{Tool, ToolError},
    topology::Host,
};

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("cannot run tcpdump")]
    Run(#[source] std::io::Error),
    #[error("tcpdump ended instead of listening: {0}")]
    Ended(String),
    #[error("tcpdump did not answer within {} s", LIMIT.as_secs())]
    TimedOut,
    #[error("cannot read the capture")]
    Read(#[from] ToolError),
    #[error("cannot read {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

const LIMIT: Duration = Duration::from_secs(20);

/// Under way until [`Capture::stop`]; dropped without it, tcpdump is killed.
pub struct Capture {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
    file: PathBuf,
}

/// A finished capture, in a pcap file in the instance's log directory.
#[derive(Debug)]
pub struct Captured {
    pub file: PathBuf,
}

impl Capture {
    /// Captures whole packets on the host's link, and returns once it does.
    pub async fn start(lab: &Lab, host: &Host, name: &str) -> Result<Self, CaptureError> {
        let file = lab.layout().logs().join(format!("{name}.pcap"));
        let mut argv = lab.topology().lab.launcher();
        argv.extend(
            [
                "tcpdump",
                "-i",
                &host.name,
                "-s",
                "0",
                "-U",
                "--immediate-mode",
                "-Z",
                "root",
                "-w",
            ]
            .map(Into::into),
        );
        argv.push(file.clone().into());
        let mut child = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(CaptureError::Run)?;
        let stderr = child
            .stderr
            .take()
            .ok_or_else(|| CaptureError::Ended("no output".into()))?;
        let mut lines = BufReader::new(stderr).lines();
        let mut said = String::new();
        let listening = async {
            while let Some(line) = lines.next_line().await.map_err(CaptureError::Run)? {
                if line.contains("listening on") {
                    return Ok(());
                }
                said += &line;
            }
            Err(CaptureError::Ended(said))
        };
        tokio::time::timeout(LIMIT, listening)
            .await
            .map_err(|_| CaptureError::TimedOut)??;
        Ok(Self { child, lines, file })
    }

    /// Ends it, with all that was seen until now in the file.
    pub async fn stop(mut self) -> Result<Captured, CaptureError> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid {
            // Asked to end, tcpdump writes out what the kernel still holds.
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGINT)
                .map_err(|error| CaptureError::Run(error.into()))?;
        }
        let ended = async {
            while self.lines.next_line().await.map_err(CaptureError::Run)?.is_some() {}
            self.child.wait().await.map_err(CaptureError::Run)
        };
        tokio::time::timeout(LIMIT, ended)
            .await
            .map_err(|_| CaptureError::TimedOut)??;
        Ok(Captured { file: self.file })
    }
}

impl Captured {
    /// The packets that a pcap filter selects, a line each.
    pub async fn packets(&self, filter: &str) -> Result<Vec<String>, CaptureError> {
        let listed = Tool::words("tcpdump -nn -q -r")
            .arg(&self.file)
            .arg(filter)
            .run()
            .await?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    /// Whether the bytes appear anywhere in what was captured. A marker that
    /// is split between two packets is not found: choose short ones.
    pub fn contains(&self, marker: &[u8]) -> Result<bool, CaptureError> {
        let content = std::fs::read(&self.file).map_err(|source| CaptureError::File {
            path: self.file.clone(),
            source,
        })?;
        Ok(!marker.is_empty() && content.windows(marker.len()).any(|window| window == marker))
    }
}
