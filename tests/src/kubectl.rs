//! What a person types: the lab's own kubectl, and what it answered.

use std::{ffi::OsString, process::Stdio, time::Duration};

use anyhow::{Context, bail, ensure};
use spindrift_local::Lab;
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    time::timeout,
};

/// Longer than any command of a test; one that hangs fails its test.
const LIMIT: Duration = Duration::from_secs(90);

/// kubectl for one namespace of the lab's cluster.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: OsString,
    kubeconfig: OsString,
    namespace: String,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Kubectl {
    pub fn new(lab: &Lab, namespace: &str) -> Self {
        Self {
            program: lab.layout().bin().join("kubectl").into(),
            kubeconfig: lab.layout().kubeconfig().into(),
            namespace: namespace.to_owned(),
        }
    }

    /// kubectl of the pool's operator, for one namespace of the lab's cell.
    pub fn of_cell(lab: &Lab, namespace: &str) -> Self {
        Self {
            kubeconfig: lab.layout().cell_kubeconfig().into(),
            ..Self::new(lab, namespace)
        }
    }

    /// Runs it to its end, whatever that is.
    pub async fn ask(&self, words: &[&str]) -> anyhow::Result<Answer> {
        self.ask_with(words, "").await
    }

    /// The same with something on its standard input.
    pub async fn ask_with(&self, words: &[&str], input: &str) -> anyhow::Result<Answer> {
        let mut child = self.command(words).stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        // Beside the waiting: neither side may fill a pipe that nobody reads.
        let feeding = async move { stdin.write_all(input.as_bytes()).await };
        let ending = async { tokio::join!(feeding, child.wait_with_output()) };
        let (_fed, output) = timeout(LIMIT, ending)
            .await
            .with_context(|| format!("kubectl {} did not end", words.join(" ")))?;
        let output = output?;
        Ok(Answer {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// What it printed; an error if it fails.
    pub async fn run(&self, words: &[&str]) -> anyhow::Result<String> {
        let answer = self.ask(words).await?;
        ensure!(
            answer.code == Some(0),
            "kubectl {} ended with {:?}: {}{}",
            words.join(" "),
            answer.code,
            answer.out,
            answer.err
        );
        Ok(answer.out)
    }

    /// `kubectl exec POD -- COMMAND…`
    pub async fn exec(&self, pod: &str, command: &[&str]) -> anyhow::Result<Answer> {
        self.ask(&[&["exec", pod, "--"], command].concat()).await
    }

    /// What a command in a pod printed; an error if it fails.
    pub async fn exec_ok(&self, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let answer = self.exec(pod, command).await?;
        if answer.code != Some(0) {
            bail!(
                "{} in {pod} ended with {:?}: {}{}",
                command.join(" "),
                answer.code,
                answer.out,
                answer.err
            );
        }
        Ok(answer.out)
    }

    /// Leaves it running; dropped, it is killed.
    pub fn start(&self, words: &[&str]) -> anyhow::Result<Child> {
        Ok(self.command(words).stdin(Stdio::null()).spawn()?)
    }

    /// As typed at a terminal: `script` gives it one, and everything that came
    /// to the screen is the answer's `out`.
    pub async fn at_terminal(&self, words: &[&str], typed: &str) -> anyhow::Result<Answer> {
        let quoted: Vec<String> = std::iter::once(self.program.to_string_lossy().into_owned())
            .chain(["--namespace".into(), self.namespace.clone()])
            .chain(words.iter().map(|word| (*word).to_owned()))
            .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
            .collect();
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", &quoted.join(" "), "/dev/null"]);
        let mut child = self
            .prepare(&mut command)
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start script")?;
        let mut stdin = child.stdin.take().context("script has no standard input")?;
        stdin.write_all(typed.as_bytes()).await?;
        let output = timeout(LIMIT, child.wait_with_output())
            .await
            .with_context(|| format!("kubectl {} did not end", words.join(" ")))??;
        drop(stdin);
        Ok(Answer {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--namespace").arg(&self.namespace).args(words);
        self.prepare(&mut command);
        command
    }

    fn prepare<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("KUBECONFIG", &self.kubeconfig)
            // Not the person's: caches of another cluster, and preferences.
            .env("HOME", "/nonexistent")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
    }
}
