//! The lab's host driver: it makes pool hosts when Karpenter asks for them, as a cloud
//! makes machines, and serves the contract of `docs/decisions/host-driver.md` on a Unix
//! socket. A host is what [`Lab`](crate::Lab)'s hosts are: a network namespace with a
//! containerd and an agent.
//!
//! ```text
//! Karpenter ──HTTP──▶ serve ──▶ owner: inventory (pure) ──▶ a task for each instance
//!                                 │                           machine: make, remove
//!                                 └─ a file for each instance, before anybody is told
//! ```
//!
//! - One task owns what instances there are. What it has said is on disk: a driver that
//!   is killed goes on with each where it was.
//! - An instance that is to go is removed whole, and its name and slot are taken until
//!   nothing of it is left.

mod contract;
mod inventory;
mod machine;
mod serve;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

pub use contract::{Amounts, Offering, Shape};
pub use inventory::Stock;

use contract::{Instance, Order, Refusal};
use inventory::{Inventory, Record, State};
use machine::Maker;

use crate::{
    artifacts::{Containerd, Spindrift},
    component::{Component, Ready},
    file::{self, Mode},
    images::Images,
    instance::Layout,
};

pub const COMPONENT: &str = "host-driver";

/// Requests that wait for the owner: Karpenter has fewer calls under way at once.
const WAITING: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not what a driver has written", .path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// What the driver's process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    pub shapes: Vec<Shape>,
    /// Hosts at once.
    pub most_hosts: usize,
    pub containerd: PathBuf,
    pub runc: PathBuf,
    pub images: PathBuf,
    pub programs: PathBuf,
    /// The script that configures a host's agent.
    pub first_boot: PathBuf,
}

/// Where a lab's driver listens.
pub fn socket(layout: &Layout) -> PathBuf {
    directory(layout).join("driver.sock")
}

/// How many machines there are of each shape in each zone, as the operator edits it;
/// what is not in it is without limit.
pub fn stock_file(layout: &Layout) -> PathBuf {
    directory(layout).join("stock.json")
}

fn directory(layout: &Layout) -> PathBuf {
    layout.state().join("driver")
}

fn settings_file(layout: &Layout) -> PathBuf {
    directory(layout).join("settings.json")
}

fn instances(layout: &Layout) -> PathBuf {
    directory(layout).join("instances")
}

/// Writes the settings and tells what to run.
pub fn component(layout: &Layout, program: &Path, settings: &Settings) -> Result<Component, DriverError> {
    let path = settings_file(layout);
    make_directory(&instances(layout))?;
    write(&path, settings)?;
    Ok(Component::new(COMPONENT, program)
        .arg("drive")
        .flag("instance", layout.instance())
        .input(path)
        .ready_when(Ready::Socket(socket(layout))))
}

/// Serves until its process is ended. What it has made runs on.
pub async fn run(layout: &Layout) -> Result<(), DriverError> {
    let settings: Settings = read(&settings_file(layout))?;
    let mut records = vec![];
    for path in listed(&instances(layout))? {
        records.push(read(&path)?);
    }
    let maker = Maker::new(
        layout,
        Containerd {
            directory: settings.containerd,
            runc: settings.runc,
        },
        Images::in_directory(settings.images),
        Spindrift {
            directory: settings.programs,
        },
        settings.first_boot,
    );
    let (requests, inbox) = mpsc::channel(WAITING);
    let (reports, told) = mpsc::channel(WAITING);
    let owner = Owner {
        layout: layout.clone(),
        inventory: Inventory::new(layout.instance().as_str(), settings.shapes, settings.most_hosts),
        maker,
        workers: BTreeMap::new(),
        reports,
    };
    let path = socket(layout);
    file::remove(&path).map_err(|source| DriverError::File {
        path: path.clone(),
        source,
    })?;
    let listener = tokio::net::UnixListener::bind(&path).map_err(|source| DriverError::File {
        path: path.clone(),
        source,
    })?;
    let serving = serve::serve(listener, requests);
    tokio::select! {
        done = owner.run(records, inbox, told) => done,
        done = serving => done.map_err(|source| DriverError::File { path, source }),
    }
}

/// What is asked of the owner.
enum Request {
    Shapes(oneshot::Sender<Vec<Shape>>),
    Create(String, Box<Order>, oneshot::Sender<Result<Instance, Refusal>>),
    List(oneshot::Sender<Vec<Instance>>),
    Delete(String, oneshot::Sender<Result<Instance, Refusal>>),
}

/// What an instance's task has found.
enum Report {
    Runs(String),
    Failed(String, String),
    Gone(String),
}

struct Owner {
    layout: Layout,
    inventory: Inventory,
    maker: Maker,
    /// Told: go.
    workers: BTreeMap<String, watch::Sender<bool>>,
    reports: mpsc::Sender<Report>,
}

impl Owner {
    async fn run(
        mut self,
        records: Vec<Record>,
        mut inbox: mpsc::Receiver<Request>,
        mut told: mpsc::Receiver<Report>,
    ) -> Result<(), DriverError> {
        for record in records {
            self.inventory.restore(record.clone());
            self.employ(record);
        }
        loop {
            tokio::select! {
                Some(request) = inbox.recv() => self.answer(request)?,
                Some(report) = told.recv() => self.note(report)?,
                else => return Ok(()),
            }
        }
    }

    /// Whoever asked may be gone: then nobody is answered.
    fn answer(&mut self, request: Request) -> Result<(), DriverError> {
        match request {
            Request::Shapes(reply) => drop(reply.send(self.inventory.shapes().to_vec())),
            Request::List(reply) => drop(reply.send(self.inventory.list())),
            Request::Create(name, order, reply) => {
                let stock = self.stock();
                let answer = match self.inventory.order(&name, *order, &stock, Timestamp::now()) {
                    Ok(record) => {
                        let record = record.clone();
                        if !self.workers.contains_key(&name) {
                            self.keep(&record)?;
                            tracing::info!(instance = name, shape = record.shape, "an instance is made");
                            self.employ(record.clone());
                        }
                        Ok(record.told())
                    }
                    Err(refusal) => {
                        tracing::info!(instance = name, code = ?refusal.code, "an order is refused");
                        Err(refusal)
                    }
                };
                drop(reply.send(answer));
            }
            Request::Delete(name, reply) => {
                let answer = match self.inventory.delete(&name) {
                    Ok(record) => {
                        let record = record.clone();
                        self.keep(&record)?;
                        if let Some(worker) = self.workers.get(&name) {
                            worker.send_replace(true);
                        }
                        Ok(record.told())
                    }
                    Err(refusal) => Err(refusal),
                };
                drop(reply.send(answer));
            }
        }
        Ok(())
    }

    fn note(&mut self, report: Report) -> Result<(), DriverError> {
        match report {
            Report::Runs(name) => {
                tracing::info!(instance = name, "an instance runs");
                self.settle(&name, State::Running, String::new())
            }
            Report::Failed(name, why) => {
                tracing::warn!(instance = name, why, "an instance cannot be made");
                self.settle(&name, State::Failed, why)
            }
            Report::Gone(name) => {
                tracing::info!(instance = name, "an instance is gone");
                self.workers.remove(&name);
                self.inventory.forget(&name);
                let path = self.path(&name);
                file::remove(&path).map_err(|source| DriverError::File { path, source })
            }
        }
    }

    fn settle(&mut self, name: &str, state: State, message: String) -> Result<(), DriverError> {
        match self.inventory.settle(name, state, message).cloned() {
            Some(record) => self.keep(&record),
            // It was told to go meanwhile.
            None => Ok(()),
        }
    }

    fn employ(&mut self, record: Record) {
        let (going, told) = watch::channel(record.state == State::Stopping);
        self.workers.insert(record.name.clone(), going);
        let (maker, reports) = (self.maker.clone(), self.reports.clone());
        tokio::spawn(async move { work(&maker, record, told, &reports).await });
    }

    fn stock(&self) -> Stock {
        // A file that is not there, or half written by a person, limits nothing.
        read(&stock_file(&self.layout)).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        instances(&self.layout).join(format!("{name}.json"))
    }

    fn keep(&self, record: &Record) -> Result<(), DriverError> {
        write(&self.path(&record.name), record)
    }
}

/// One instance, from its order to its end. Told to go, it stops making at once:
/// whatever there is of it is removed.
async fn work(
    maker: &Maker,
    record: Record,
    mut going: watch::Receiver<bool>,
    reports: &mpsc::Sender<Report>,
) {
    let name = record.name.clone();
    let told = async |report| drop(reports.send(report).await);
    if !*going.borrow() && record.state == State::Starting {
        tokio::select! {
            made = maker.make(&record) => match made {
                Ok(()) => told(Report::Runs(name.clone())).await,
                Err(error) => told(Report::Failed(name.clone(), described(&error))).await,
            },
            () = told_to_go(&mut going) => {}
        }
    }
    told_to_go(&mut going).await;
    let mut backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(30))
        .without_max_times()
        .build();
    while let Err(error) = maker.remove(&record).await {
        tracing::warn!(
            instance = name,
            error = described(&error),
            "an instance is not removed yet"
        );
        let wait = backoff.next().unwrap_or(Duration::from_secs(30));
        tokio::time::sleep(wait).await;
    }
    told(Report::Gone(name)).await;
}

async fn told_to_go(going: &mut watch::Receiver<bool>) {
    if going.wait_for(|going| *going).await.is_err() {
        // The owner ends, and the process with it: the host runs on.
        std::future::pending::<()>().await;
    }
}

fn described(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

fn make_directory(path: &Path) -> Result<(), DriverError> {
    std::fs::create_dir_all(path).map_err(|source| DriverError::File {
        path: path.to_owned(),
        source,
    })
}

fn listed(directory: &Path) -> Result<Vec<PathBuf>, DriverError> {
    let at = |source| DriverError::File {
        path: directory.to_owned(),
        source,
    };
    let mut paths = vec![];
    for entry in std::fs::read_dir(directory).map_err(at)? {
        let path = entry.map_err(at)?.path();
        // What a killed write left has another ending.
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, DriverError> {
    let text = std::fs::read(path).map_err(|source| DriverError::File {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| DriverError::Record {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, what: &impl Serialize) -> Result<(), DriverError> {
    let text = serde_json::to_vec_pretty(what).map_err(|source| DriverError::Record {
        path: path.to_owned(),
        source,
    })?;
    // Orders hold tokens.
    file::write(path, text, Mode::Private).map_err(|source| DriverError::File {
        path: path.to_owned(),
        source,
    })
}
