//! The one lab of a test process.
//!
//! `main` makes a [`Stage`] and hands it to each test; the first that asks
//! brings the lab up, all the others share it, and [`Stage::clear`] removes it.
//! A lab that does not come up fails every test with the same reason: nothing
//! is skipped.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use anyhow::Context;
use clap::Parser;
use spindrift_local::{
    InstanceName, Lab, Options, Progress, cache::Cache, images::BUSYBOX_IMAGE, lab, registry,
};
use tokio::sync::{OnceCell, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::program;

/// What the lab's registries hold of images: a busybox that no host has yet.
pub const PULLED: &str = "e2e/busybox:1";

/// What may be set from outside; the test runner's own arguments are not ours.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
pub struct Settings {
    /// The lab's name: another one runs beside.
    #[arg(long, env = "SPINDRIFT_TEST_INSTANCE", default_value = "test")]
    instance: InstanceName,
    /// Leave the lab as it is at the end, and use the one that is there.
    #[arg(long, env = "SPINDRIFT_TEST_KEEP")]
    keep: bool,
    /// The pool has a cluster of its own, in which hosts are claimed.
    #[arg(long, env = "SPINDRIFT_TEST_CELL")]
    cell: bool,
    /// The cell has no hosts but those that Karpenter brings.
    #[arg(long, env = "SPINDRIFT_TEST_ELASTIC")]
    elastic: bool,
    #[arg(long, env = "SPINDRIFT_CACHE")]
    cache: Option<PathBuf>,
    #[arg(long, env = "XDG_CACHE_HOME")]
    cache_home: Option<PathBuf>,
    #[arg(long, env = "HOME", default_value = "/root")]
    home: PathBuf,
}

impl Settings {
    pub fn from_environment() -> Self {
        Self::parse_from(std::iter::empty::<&str>())
    }

    pub fn cell(&self) -> bool {
        self.cell
    }

    pub fn elastic(&self) -> bool {
        self.elastic
    }

    fn cache(&self) -> PathBuf {
        let home = || {
            self.cache_home
                .clone()
                .unwrap_or_else(|| self.home.join(".cache"))
        };
        self.cache.clone().unwrap_or_else(|| home().join("spindrift"))
    }
}

/// Whom a test bears beside it on the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// It disturbs nobody.
    Others,
    /// It kills components, or counts what everybody does.
    Alone,
}

/// Held by a test while it runs.
pub enum Turn {
    Shared(OwnedRwLockReadGuard<()>),
    Alone(OwnedRwLockWriteGuard<()>),
}

pub struct Stage {
    settings: Settings,
    lab: OnceCell<Result<Arc<Lab>, String>>,
    turns: Arc<RwLock<()>>,
    /// Why no further test can tell anything, once a test has left the lab so.
    broken: OnceLock<String>,
}

impl Stage {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            lab: OnceCell::new(),
            turns: Arc::default(),
            broken: OnceLock::new(),
        }
    }

    /// Waits for its turn and gives the lab, brought up if it is the first.
    pub async fn enter(&self, company: Company) -> anyhow::Result<(Turn, Arc<Lab>)> {
        let turn = match company {
            Company::Others => Turn::Shared(self.turns.clone().read_owned().await),
            Company::Alone => Turn::Alone(self.turns.clone().write_owned().await),
        };
        let made = self
            .lab
            .get_or_init(|| async {
                self.up()
                    .await
                    .map(Arc::new)
                    .map_err(|error| format!("{error:#}"))
            })
            .await;
        if let Some(broken) = self.broken.get() {
            anyhow::bail!("not run: {broken}");
        }
        match made {
            Ok(lab) => Ok((turn, lab.clone())),
            Err(reason) => anyhow::bail!("the lab did not come up: {reason}"),
        }
    }

    async fn up(&self) -> anyhow::Result<Lab> {
        let progress = Progress::stderr();
        if !self.settings.keep {
            // Left by a run that was killed.
            lab::down(&self.settings.instance, &progress)
                .await
                .context("cannot remove the lab of an earlier run")?;
        }
        let options = Options {
            registry: true,
            cell: self.settings.cell,
            elastic: self.settings.elastic,
            hosts: if self.settings.elastic { 0 } else { 2 },
            ..Options::for_tests(self.settings.instance.clone(), self.settings.cache())
        };
        let lab = Lab::up(&options, &progress).await?;
        registry::push(&lab.topology().lab, lab.images(), BUSYBOX_IMAGE, PULLED).await?;
        program::import(&lab, &Cache::new(options.cache), &progress).await?;
        Ok(lab)
    }

    /// After a test that kills things, with its turn still held: what it left dead is
    /// started, so that the next test is not the one that fails. A lab that cannot be
    /// mended ends the suite, with the name of the test that broke it.
    pub async fn mend(&self, lab: &Lab, test: &str) -> anyhow::Result<()> {
        match lab.mend().await {
            Ok(None) => Ok(()),
            Ok(Some(missing)) => anyhow::bail!("it left the lab without {}", missing.join(", ")),
            Err(error) => {
                let broken = format!(
                    "{test} left a lab that cannot be mended: {:#}",
                    anyhow::Error::from(error)
                );
                let told = self.broken.get_or_init(|| broken).clone();
                anyhow::bail!(told)
            }
        }
    }

    /// Removes the lab, unless it is to stay.
    pub async fn clear(&self) -> anyhow::Result<()> {
        if self.settings.keep || !self.lab.initialized() {
            return Ok(());
        }
        lab::down(&self.settings.instance, &Progress::stderr())
            .await
            .context("cannot remove the lab")
    }
}
