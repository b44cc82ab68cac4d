//! The command behind `deploy/local/up`, `down`, `status` and `tools`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use spindrift_local::{
    Lab, Layout, Options, Progress,
    artifacts::{self, Profile},
    cache::{self, Cache},
    component::Component,
    instance::InstanceName,
    lab::{self, Build, ClusterSource, Extent},
    netns::Namespace,
    relay,
    requirements::{self, Purpose},
};

/// Spindrift on one machine: a Kubernetes control plane, a virtual node, a pool
/// of hosts and a demo.
#[derive(Parser)]
#[command(name = "spindrift-local", version)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make an instance, or complete and mend it; then run the demo
    Up(Up),
    /// Remove an instance and everything it has made
    Down(Instance),
    /// Tell what runs
    Status(Instance),
    /// Install and build what labs and tests need of other projects
    Tools {
        /// How far to go
        #[arg(default_value = "all")]
        what: Tools,
        #[command(flatten)]
        environment: Environment,
    },
    /// Start, stop or kill one component of an instance
    Component {
        /// Such as virtual-node or pool-agent@host-a; `status` lists them
        name: String,
        verb: ComponentVerb,
        #[command(flatten)]
        instance: Instance,
    },
    /// Carry connections between network namespaces
    #[command(hide = true)]
    Relay {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        listen_in: Option<String>,
        #[arg(long)]
        dial_in: Option<String>,
        #[arg(long)]
        target: String,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ComponentVerb {
    Start,
    /// Ask it to end
    Stop,
    /// kill -9
    Kill,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Tools {
    /// Only the machine's packages
    Packages,
    /// Also the Kubernetes control plane, containerd and the test images
    All,
}

#[derive(Args)]
struct Instance {
    /// Everything the instance makes carries this name
    #[arg(long, default_value = "demo")]
    instance: InstanceName,
}

#[derive(Args)]
struct Environment {
    /// Where built things are kept; else in ~/.cache/spindrift
    #[arg(long, env = "SPINDRIFT_CACHE")]
    cache: Option<PathBuf>,
    #[arg(long, env = "PATH", hide = true, default_value = "")]
    search_path: String,
}

impl Environment {
    fn cache(&self) -> anyhow::Result<PathBuf> {
        Ok(self.cache.clone().map_or_else(cache::standard, Ok)?)
    }
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    instance: Instance,
    /// How many pool hosts
    #[arg(long, default_value_t = 2)]
    hosts: usize,
    #[command(flatten)]
    environment: Environment,
    /// How much of it: control-plane, runtimes (also containerd on each host)
    /// or whole
    #[arg(long, default_value = "whole")]
    extent: Extent,
    /// With image registries inside
    #[arg(long)]
    registry: bool,
    /// Run debug builds
    #[arg(long)]
    dev: bool,
    /// Run our programs as they were last built
    #[arg(long)]
    no_build: bool,
}

fn main() -> ExitCode {
    // The client logs each answer that says "not yet"; waiting for those is
    // what `up` does.
    let filter = tracing_subscriber::EnvFilter::new("info,kube_client=off");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error   {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    // Moves the process between namespaces, so it comes before any thread.
    if let Verb::Relay {
        listen,
        listen_in,
        dial_in,
        target,
    } = command.verb
    {
        let named = |name: Option<String>| name.map(Namespace::named);
        return Ok(relay::run(
            named(listen_in).as_ref(),
            listen,
            named(dial_in).as_ref(),
            &target,
        )?);
    }
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        match command.verb {
            Verb::Up(up) => make(up).await,
            Verb::Down(Instance { instance }) => Ok(lab::down(&instance, &Progress::stderr()).await?),
            Verb::Status(Instance { instance }) => status(instance),
            Verb::Tools { what, environment } => tools(what, &environment).await,
            Verb::Component { name, verb, instance } => component(&name, verb, instance.instance).await,
            Verb::Relay { .. } => unreachable!("dealt with above"),
        }
    })
}

async fn tools(what: Tools, environment: &Environment) -> anyhow::Result<()> {
    let progress = Progress::stderr();
    requirements::ensure(Purpose::Tests, &environment.search_path, &progress).await?;
    if what == Tools::All {
        let directory = artifacts::tools(&Cache::new(environment.cache()?), &progress).await?;
        println!("{}", directory.display());
    }
    Ok(())
}

async fn make(up: Up) -> anyhow::Result<()> {
    let progress = Progress::stderr();
    requirements::ensure(Purpose::Lab, &up.environment.search_path, &progress).await?;
    let options = Options {
        instance: up.instance.instance,
        hosts: up.hosts,
        profile: if up.dev { Profile::Dev } else { Profile::Release },
        build: if up.no_build { Build::Taken } else { Build::Made },
        extent: up.extent,
        cluster: ClusterSource::Made,
        registry: up.registry,
        cache: up.environment.cache()?,
    };
    let lab = Lab::up(&options, &progress).await?;
    println!("export KUBECONFIG={}", lab.layout().kubeconfig().display());
    Ok(())
}

fn status(instance: InstanceName) -> anyhow::Result<()> {
    let layout = Layout::new(instance);
    for component in Component::all(&layout) {
        match component.process(&layout) {
            Some(process) => println!("{:<28} runs   {}", component.name, process.pid()),
            None => println!("{:<28} stopped", component.name),
        }
    }
    Ok(())
}

async fn component(name: &str, verb: ComponentVerb, instance: InstanceName) -> anyhow::Result<()> {
    let layout = Layout::new(instance);
    let component = Component::find(&layout, name)?;
    match verb {
        ComponentVerb::Start => drop(
            component
                .start(&layout, std::time::Duration::from_secs(60))
                .await?,
        ),
        ComponentVerb::Stop => {
            component
                .stop(&layout, std::time::Duration::from_secs(30))
                .await?
        }
        ComponentVerb::Kill => component.kill(&layout).await?,
    }
    Ok(())
}
