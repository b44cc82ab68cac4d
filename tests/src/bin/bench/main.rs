//! Measures what the README promises: ours and a baseline, in turns, in one run.
//!
//! `tests/bench` builds and starts it. It makes a lab of its own and, where a
//! figure is held against a stock kubelet, one of those on a host beside the
//! pool. Each figure is a line, `figure NAME ours X baseline Y unit U ratio R`,
//! with comment lines below it; nothing is asserted. docs/performance.md says
//! what each figure means.

mod attach;
mod cri;
mod figure;
mod memory;
mod pods;
mod process;
mod starts;
mod stock;
mod traffic;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use spindrift_local::{
    Lab, Options, Progress,
    artifacts::Profile,
    cache::{self, Cache},
    instance::InstanceName,
    lab,
};

use crate::{pods::Pods, stock::Stock};

#[derive(Parser)]
#[command(name = "bench")]
struct Command {
    /// Figures, by the start of their names; all unless said
    names: Vec<String>,
    /// Leave the lab running for another run, or to look at
    #[arg(long)]
    keep: bool,
    /// Where built things are kept
    #[arg(long, env = "SPINDRIFT_CACHE")]
    cache: Option<PathBuf>,
}

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Starts1,
    Starts10,
    Attach,
    Traffic,
    Memory,
}

/// Groups in the order they run, with the figures each yields. Memory comes
/// last: it fills the hosts.
const GROUPS: [(Group, &[&str]); 5] = [
    (Group::Starts1, &starts::ONE.names),
    (Group::Starts10, &starts::TEN.names),
    (Group::Attach, &attach::NAMES),
    (Group::Traffic, &traffic::NAMES),
    (Group::Memory, &memory::NAMES),
];

impl Command {
    fn wants(&self, figure: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| figure.starts_with(name.as_str()))
    }

    fn groups(&self) -> Result<Vec<Group>> {
        let all = || GROUPS.iter().flat_map(|(_, figures)| figures.iter());
        for name in &self.names {
            if !all().any(|figure| figure.starts_with(name.as_str())) {
                let known: Vec<_> = all().copied().collect();
                anyhow::bail!(
                    "no figure's name starts with {name:?}; there are: {}",
                    known.join(" ")
                );
            }
        }
        let wanted = GROUPS
            .iter()
            .filter(|(_, figures)| figures.iter().any(|figure| self.wants(figure)));
        Ok(wanted.map(|(group, _)| *group).collect())
    }

    fn cache(&self) -> Result<Cache> {
        Ok(Cache::new(match &self.cache {
            Some(root) => root.clone(),
            None => cache::standard()?,
        }))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = Command::parse();
    match run(&command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error   {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: &Command) -> Result<()> {
    let groups = command.groups()?;
    let cache = command.cache()?;
    let progress = Progress::stderr();
    let instance: InstanceName = "bench".parse()?;
    let options = Options {
        profile: if cfg!(debug_assertions) {
            Profile::Dev
        } else {
            Profile::Release
        },
        ..Options::for_tests(instance.clone(), cache.root().to_owned())
    };
    if options.profile == Profile::Dev {
        println!("# debug builds: these figures say nothing");
    }
    let lab = Lab::up(&options, &progress).await?;
    let measured = measure(command, &groups, &lab, &cache, &progress).await;
    if !command.keep {
        lab::down(&instance, &progress).await?;
        stock::remove_cgroups(lab.layout());
    }
    measured
}

async fn measure(
    command: &Command,
    groups: &[Group],
    lab: &Lab,
    cache: &Cache,
    progress: &Progress,
) -> Result<()> {
    let pods = Pods::open(lab.client()).await?;
    let stock = if groups
        .iter()
        .all(|group| matches!(group, Group::Attach | Group::Traffic))
    {
        None
    } else {
        Some(Stock::start(lab, cache, progress).await?)
    };
    let mut failed = None;
    for group in groups {
        let figures = match (group, &stock) {
            (Group::Attach, _) => attach::measure(lab, &pods, progress).await,
            (Group::Traffic, _) => traffic::measure(lab, &pods, cache, progress).await,
            (Group::Starts1, Some(stock)) => starts::measure(lab, &pods, stock, &starts::ONE, progress).await,
            (Group::Starts10, Some(stock)) => {
                starts::measure(lab, &pods, stock, &starts::TEN, progress).await
            }
            (Group::Memory, Some(stock)) => memory::measure(lab, &pods, stock, progress).await,
            (_, None) => continue,
        };
        match figures {
            Ok(figures) => figures
                .iter()
                .filter(|f| command.wants(f.name))
                .for_each(|f| print!("{f}")),
            // The others are still worth having.
            Err(error) => {
                println!("# not measured: {error:#}");
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
