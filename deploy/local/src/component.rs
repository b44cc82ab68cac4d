//! One long-running process of a lab: started, stopped and killed by name.
//!
//! How a component is started is on disk beside its pid file, so any later
//! process (another `up`, a test, a person's `component start`) can start it
//! again just as it was. It survives whoever started it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{File, OpenOptions},
    io::Read,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{file, instance::Layout, netns::Namespace, process::Process};

/// What to run, where, and how to tell that it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// `etcd`, `virtual-node`, `pool-agent@host-a`: also its file name.
    pub name: String,
    /// `None`: the machine's own network namespace.
    pub namespace: Option<Namespace>,
    pub argv: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// Its program and configuration: it is restarted by `up` when one changed.
    pub inputs: Vec<PathBuf>,
    pub ready: Ready,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// Accepts TCP connections in its namespace.
    Accepts(SocketAddr),
    /// The same, of one that listens in another namespace than it starts in.
    AcceptsWithin(Namespace, SocketAddr),
    /// Accepts connections on the Unix socket.
    Socket(PathBuf),
    /// As soon as it runs; somebody else asks further.
    Runs,
}

/// In the environment of every component, and so of its children: it finds a
/// process whose pid file a crash kept from being written.
pub const MARK: &str = "SPINDRIFT_LAB";

/// The pid file's content.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    process: Process,
    /// Of the specification and the inputs it was started with.
    digest: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ComponentError {
    #[error("there is no component {name:?}; there are: {known}")]
    Unknown { name: String, known: String },
    #[error("cannot read or write the files of {name}")]
    Files {
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot start {name}")]
    Start {
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{name} ended {} it served; the end of {}:\n{tail}", if *.limit_reached { "or hung before" } else { "before" }, .log.display())]
    NotReady {
        name: String,
        limit_reached: bool,
        log: PathBuf,
        tail: String,
    },
}

/// What `start` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    AlreadyRan,
    Started,
    /// It ran with another program or configuration.
    Restarted,
}

impl Component {
    pub fn new(name: impl Into<String>, program: impl AsRef<Path>) -> Self {
        let program = program.as_ref();
        Self {
            name: name.into(),
            namespace: None,
            argv: vec![program.display().to_string()],
            environment: BTreeMap::new(),
            inputs: vec![program.to_owned()],
            ready: Ready::Runs,
        }
    }

    pub fn within(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.argv.push(arg.into());
        self
    }

    /// `--name=value`
    pub fn flag(self, name: &str, value: impl std::fmt::Display) -> Self {
        self.arg(format!("--{name}={value}"))
    }

    pub fn path_flag(self, name: &str, path: impl AsRef<Path>) -> Self {
        self.flag(name, path.as_ref().display())
    }

    /// A configuration file whose change means a restart.
    pub fn input(mut self, path: impl Into<PathBuf>) -> Self {
        self.inputs.push(path.into());
        self
    }

    pub fn environment(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.insert(name.to_owned(), value.into());
        self
    }

    pub fn ready_when(mut self, ready: Ready) -> Self {
        self.ready = ready;
        self
    }

    /// All components the instance has ever started.
    pub fn all(layout: &Layout) -> Vec<Component> {
        let entries = std::fs::read_dir(layout.components())
            .into_iter()
            .flatten()
            .flatten();
        let mut all: Vec<Component> = entries
            .filter(|entry| entry.path().extension().is_some_and(|e| e == "json"))
            .filter_map(|entry| serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok())
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    pub fn find(layout: &Layout, name: &str) -> Result<Component, ComponentError> {
        let all = Self::all(layout);
        let known = || all.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = all.iter().find(|component| component.name == name);
        found.cloned().ok_or_else(|| ComponentError::Unknown {
            name: name.to_owned(),
            known: known(),
        })
    }

    /// Processes of the instance that no pid file names: those of a crashed
    /// start. (Shims are children of containerd and live on without it; they
    /// are no strays.)
    pub fn strays(layout: &Layout) -> Vec<Process> {
        let known: Vec<Process> = Self::all(layout)
            .iter()
            .filter_map(|component| component.process(layout))
            .collect();
        let mut marked = Process::with_environment(MARK, layout.instance().as_str());
        marked.retain(|process| !known.contains(process) && !process.is_shim());
        marked
    }

    /// Its process, if it runs.
    pub fn process(&self, layout: &Layout) -> Option<Process> {
        self.record(layout)
            .map(|record| record.process)
            .filter(Process::runs)
    }

    pub fn log(&self, layout: &Layout) -> PathBuf {
        layout.logs().join(format!("{}.log", self.name))
    }

    /// Starts it unless it runs just so already, and waits until it is ready.
    pub async fn start(&self, layout: &Layout, limit: Duration) -> Result<Start, ComponentError> {
        let start = self.spawn(layout).await?;
        self.wait_ready(layout, limit).await?;
        Ok(start)
    }

    /// Starts it without waiting.
    pub async fn spawn(&self, layout: &Layout) -> Result<Start, ComponentError> {
        let _turn = self.turn(layout).await?;
        let digest = self.digest();
        let mut how = Start::Started;
        if let Some(record) = self.record(layout)
            && record.process.runs()
        {
            if record.digest == digest {
                return Ok(Start::AlreadyRan);
            }
            record.process.end(Duration::from_secs(5)).await;
            how = Start::Restarted;
        }
        let specification = serde_json::to_vec_pretty(self).map_err(|e| self.files(e.into()))?;
        file::write(&self.file(layout, "json"), specification, file::Mode::Private)
            .map_err(|e| self.files(e))?;
        self.run(layout, digest)?;
        Ok(how)
    }

    /// Starts it again if it was started, was not stopped, and has ended all the same.
    /// True: it had.
    pub(crate) async fn revive(&self, layout: &Layout) -> Result<bool, ComponentError> {
        let _turn = self.turn(layout).await?;
        match self.record(layout) {
            Some(record) if !record.process.runs() => {
                self.run(layout, record.digest)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Whether it was started and not stopped, and has ended.
    pub(crate) fn has_failed(&self, layout: &Layout) -> bool {
        self.record(layout).is_some_and(|record| !record.process.runs())
    }

    fn run(&self, layout: &Layout, digest: String) -> Result<(), ComponentError> {
        std::fs::create_dir_all(layout.logs()).map_err(|e| self.files(e))?;
        if let Ready::Socket(socket) = &self.ready {
            // A socket left by a killed predecessor would look like readiness.
            file::remove(socket).map_err(|e| self.files(e))?;
        }
        let process = self.launch(layout).map_err(|source| ComponentError::Start {
            name: self.name.clone(),
            source,
        })?;
        let record = serde_json::to_vec(&Record { process, digest }).map_err(|e| self.files(e.into()))?;
        file::write(&self.file(layout, "pid"), record, file::Mode::Public).map_err(|e| self.files(e))
    }

    fn files(&self, source: std::io::Error) -> ComponentError {
        ComponentError::Files {
            name: self.name.clone(),
            source,
        }
    }

    /// Held by whoever starts or stops it: its supervisor does not start what a
    /// person is stopping.
    async fn turn(&self, layout: &Layout) -> Result<Flock<File>, ComponentError> {
        std::fs::create_dir_all(layout.components()).map_err(|e| self.files(e))?;
        let path = self.file(layout, "lock");
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|e| self.files(e))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(held) => return Ok(held),
                Err((_, nix::Error::EWOULDBLOCK)) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err((_, error)) => return Err(self.files(error.into())),
            }
        }
    }

    pub async fn wait_ready(&self, layout: &Layout, limit: Duration) -> Result<(), ComponentError> {
        let since = Instant::now();
        loop {
            let runs = self.process(layout).is_some();
            if runs && self.is_ready() {
                return Ok(());
            }
            let limit_reached = since.elapsed() > limit;
            if !runs || limit_reached {
                let log = self.log(layout);
                let tail = tail(&log);
                return Err(ComponentError::NotReady {
                    name: self.name.clone(),
                    limit_reached,
                    log,
                    tail,
                });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks it to end and insists after `grace`.
    pub async fn stop(&self, layout: &Layout, grace: Duration) -> Result<(), ComponentError> {
        let _turn = self.turn(layout).await?;
        if let Some(record) = self.record(layout) {
            record.process.end(grace).await;
        }
        file::remove(&self.file(layout, "pid")).map_err(|e| self.files(e))
    }

    /// Leaves nothing of one that was stopped but its log.
    pub async fn forget(&self, layout: &Layout) -> Result<(), ComponentError> {
        let _turn = self.turn(layout).await?;
        for extension in ["json", "pid", "lock"] {
            file::remove(&self.file(layout, extension)).map_err(|e| self.files(e))?;
        }
        Ok(())
    }

    /// `kill -9`: what it must survive.
    pub async fn kill(&self, layout: &Layout) -> Result<(), ComponentError> {
        self.stop(layout, Duration::ZERO).await
    }

    fn is_ready(&self) -> bool {
        match &self.ready {
            Ready::Runs => true,
            Ready::Socket(path) => std::os::unix::net::UnixStream::connect(path).is_ok(),
            Ready::AcceptsWithin(namespace, address) => namespace.accepts(*address),
            Ready::Accepts(address) => match &self.namespace {
                Some(namespace) => namespace.accepts(*address),
                None => std::net::TcpStream::connect_timeout(address, Duration::from_millis(500)).is_ok(),
            },
        }
    }

    /// In a session of its own, so that no terminal's end reaches it. Both
    /// `setsid` and `nsenter` become the program: the child's id is its id.
    fn launch(&self, layout: &Layout) -> std::io::Result<Process> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(layout))?;
        let mut command = Command::new("setsid");
        let launcher: Vec<OsString> = self
            .namespace
            .as_ref()
            .map(Namespace::launcher)
            .unwrap_or_default();
        command.args(launcher).args(&self.argv).envs(&self.environment);
        // Logs are files: no colours in them.
        command.env(MARK, layout.instance().as_str()).env("NO_COLOR", "1");
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(std::io::Error::other)?;
        let process = Process::of(pid);
        // Reaps it if we outlive it, so that it does not stay a zombie. It
        // holds nothing: this process may end first.
        std::thread::spawn(move || child.wait());
        process.ok_or_else(|| std::io::Error::other("it ended at once"))
    }

    fn record(&self, layout: &Layout) -> Option<Record> {
        serde_json::from_slice(&std::fs::read(self.file(layout, "pid")).ok()?).ok()
    }

    fn file(&self, layout: &Layout, extension: &str) -> PathBuf {
        layout.components().join(format!("{}.{extension}", self.name))
    }

    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(self).unwrap_or_default());
        for path in &self.inputs {
            let known = std::fs::metadata(path);
            // Programs are large: size and time tell a rebuilt one. Written
            // configuration is compared by content, as `up` writes it anew.
            match known {
                Ok(known) if known.len() > 1 << 20 => {
                    hash.update(format!(
                        "{} {} {}",
                        known.len(),
                        known.mtime(),
                        known.mtime_nsec()
                    ));
                }
                Ok(_) => hash.update(std::fs::read(path).unwrap_or_default()),
                Err(_) => hash.update("absent"),
            }
        }
        file::hex(&hash.finalize())
    }
}

/// The last lines of a log, indented.
fn tail(log: &Path) -> String {
    /// Enough for a Go panic's first words and the lines before it.
    const BYTES: u64 = 6 * 1024;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..]
        .iter()
        .map(|line| format!("  {line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_is_read_back_as_it_was_written() {
        let component = Component::new("etcd", "/bin/etcd")
            .within(&Namespace::named("sd-x-lab"))
            .flag("data-dir", "/d")
            .environment("A", "b")
            .ready_when(Ready::Accepts(([127, 0, 0, 1], 2379).into()));
        let text = serde_json::to_vec(&component).unwrap();
        assert_eq!(serde_json::from_slice::<Component>(&text).unwrap(), component);
    }

    #[test]
    fn a_changed_flag_or_configuration_changes_the_digest() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config");
        std::fs::write(&config, "a").unwrap();
        let component = Component::new("x", "/bin/true").input(&config);
        let before = component.digest();
        assert_eq!(component.digest(), before);
        assert_ne!(component.clone().flag("v", 1).digest(), before);
        std::fs::write(&config, "b").unwrap();
        assert_ne!(component.digest(), before);
    }
}
