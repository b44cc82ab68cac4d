//! Runs another program to its end and keeps what it said.
//!
//! A program that fails yields an error with its name and the end of what it
//! printed, since that is what a person needs to go on.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

use crate::progress::Step;

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("cannot start {program}")]
    Start {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot read the output of {program}")]
    Read {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{command} failed ({status}): {output}")]
    Failed {
        command: String,
        status: std::process::ExitStatus,
        output: String,
    },
    #[error("{command} did not end within {} s", .limit.as_secs())]
    TimedOut { command: String, limit: Duration },
}

/// A program about to be run. Its standard input is empty.
#[derive(Clone, Debug)]
pub struct Tool {
    argv: Vec<OsString>,
    env: Vec<(String, OsString)>,
    directory: Option<PathBuf>,
    limit: Duration,
}

/// More than any tool's useful last words; the rest of a long build log is
/// dropped as it comes.
const KEPT_LINES: usize = 40;

impl Tool {
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            argv: vec![program.into()],
            env: Vec::new(),
            directory: None,
            limit: Duration::from_secs(60),
        }
    }

    /// `line` split at spaces: for fixed commands that stay readable so.
    pub fn words(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap_or_default();
        Self::new(program).args(words)
    }

    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.argv.push(arg.into());
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// How long it may take; a minute unless said.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// What it printed on standard output.
    pub async fn run(self) -> Result<String, ToolError> {
        let output = tokio::time::timeout(self.limit, self.command().output())
            .await
            .map_err(|_| ToolError::TimedOut {
                command: self.line(),
                limit: self.limit,
            })?
            .map_err(|source| ToolError::Start {
                program: self.program(),
                source,
            })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        Err(ToolError::Failed {
            command: self.line(),
            status: output.status,
            output: tail(String::from_utf8_lossy(&said).lines().map(str::to_owned)),
        })
    }

    /// Whether it ended with success; for questions.
    pub async fn succeeds(self) -> bool {
        self.run().await.is_ok()
    }

    /// Runs a long one, showing its latest line as the step's note.
    pub async fn run_showing(self, step: &Step) -> Result<(), ToolError> {
        let start = |source| ToolError::Start {
            program: self.program(),
            source,
        };
        let mut command = self.command();
        // One pipe for both streams keeps their lines in order.
        let (reader, writer) = std::io::pipe().map_err(start)?;
        command.stdout(writer.try_clone().map_err(start)?).stderr(writer);
        let mut child = command.kill_on_drop(true).spawn().map_err(start)?;
        // The command holds the pipe's writing ends: reading ends once it goes.
        drop(command);
        let reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader.into()).map_err(start)?;
        let mut lines = BufReader::new(reader).split(b'\n');
        let mut kept = std::collections::VecDeque::with_capacity(KEPT_LINES);
        let reading = async {
            while let Some(line) = lines.next_segment().await? {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if line.is_empty() {
                    continue;
                }
                step.note(&line);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            child.wait().await
        };
        let status = tokio::time::timeout(self.limit, reading)
            .await
            .map_err(|_| ToolError::TimedOut {
                command: self.line(),
                limit: self.limit,
            })?
            .map_err(|source| ToolError::Read {
                program: self.program(),
                source,
            })?;
        if status.success() {
            Ok(())
        } else {
            Err(ToolError::Failed {
                command: self.line(),
                status,
                output: tail(kept),
            })
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.argv[0]);
        command
            .args(&self.argv[1..])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    fn program(&self) -> String {
        self.argv[0].to_string_lossy().into_owned()
    }

    fn line(&self) -> String {
        let words: Vec<_> = self.argv.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }
}

fn tail(lines: impl IntoIterator<Item = String>) -> String {
    let lines: Vec<String> = lines.into_iter().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(KEPT_LINES)..].join("\n  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    #[tokio::test]
    async fn a_failure_names_the_command_and_what_it_said() {
        let error = Tool::new("sh")
            .args(["-c", "echo out; echo err >&2; exit 3"])
            .run()
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit 3") && error.contains("out") && error.contains("err"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_given_up() {
        let error = Tool::words("sleep 60")
            .limit(Duration::from_millis(50))
            .run()
            .await
            .unwrap_err();
        assert!(matches!(error, ToolError::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_shown_program_keeps_only_its_last_lines() {
        let progress = Progress::silent();
        let step = progress.step("test");
        let error = Tool::new("sh")
            .args([
                "-c",
                "i=0; while [ $i -lt 500 ]; do i=$((i+1)); echo line $i; done; exit 1",
            ])
            .run_showing(&step)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 500") && !error.contains("line 400\n"),
            "{error}"
        );
    }
}
