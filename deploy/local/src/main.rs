//! The command behind `deploy/local/up`, `down`, `status` and `tools`.

use std::{
    io::IsTerminal,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use spindrift_local::{
    Lab, Layout, Options, Progress,
    artifacts::{self, Profile},
    burst,
    cache::{self, Cache},
    component::Component,
    demo::{self, Exec},
    driver,
    instance::InstanceName,
    lab::{self, Build, ClusterSource, Extent},
    netns::Namespace,
    relay,
    requirements::{self, Purpose},
    status::Status,
    supervisor,
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
    /// Start again what ends by itself
    #[command(hide = true)]
    Supervise(Instance),
    /// Make hosts when the pool's Karpenter asks for them
    #[command(hide = true)]
    Drive(Instance),
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
    /// Join the cluster of this kubeconfig instead of making one.
    ///
    /// Its user must be an administrator: the virtual node gets its own
    /// certificate and a ClusterRole (deploy/local/manifests/rbac.yaml). The
    /// API server is dialled from this machine. For logs and exec it has to
    /// reach the node, too: see --node-address
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// With --kubeconfig: an address of this machine that the cluster's API
    /// server can reach, on port 10250. Without it the virtual node works, but
    /// kubectl logs and exec do not
    #[arg(long, value_name = "IP", requires = "kubeconfig")]
    node_address: Option<Ipv4Addr>,
    /// How many pool hosts
    #[arg(long, default_value_t = 2)]
    hosts: usize,
    /// Give the pool a cluster of its own, its cell, which places the pods' claims
    #[arg(long)]
    cell: bool,
    /// A cell without a host: Karpenter brings hosts when pods need them
    #[arg(long, conflicts_with_all = ["hosts", "kubeconfig"])]
    elastic: bool,
    /// How much of it is started
    #[arg(long, default_value = "whole")]
    extent: Extent,
    /// Do not run the demo
    #[arg(long)]
    no_demo: bool,
    /// With image registries inside
    #[arg(long)]
    registry: bool,
    /// Run debug builds
    #[arg(long)]
    dev: bool,
    /// Run our programs as they were last built
    #[arg(long)]
    no_build: bool,
    #[command(flatten)]
    environment: Environment,
}

fn main() -> ExitCode {
    // The client logs each answer that says "not yet"; waiting for those is
    // what `up` does.
    let filter = tracing_subscriber::EnvFilter::new("info,kube_client=off");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let done = match Command::parse().verb {
        Verb::Status(Instance { instance }) => return status(&instance),
        // Moves the process between namespaces, so it comes before any thread.
        Verb::Relay {
            listen,
            listen_in,
            dial_in,
            target,
        } => {
            let named = |name: Option<String>| name.map(Namespace::named);
            relay::run(
                named(listen_in).as_ref(),
                listen,
                named(dial_in).as_ref(),
                &target,
            )
            .map_err(Into::into)
        }
        Verb::Supervise(Instance { instance }) => run(async move {
            supervisor::run(&Layout::new(instance)).await;
            Ok(())
        }),
        Verb::Drive(Instance { instance }) => run(async move {
            driver::run(&Layout::new(instance)).await?;
            Ok(())
        }),
        Verb::Up(up) => run(make(up)),
        Verb::Down(Instance { instance }) => {
            run(async move { Ok(lab::down(&instance, &Progress::stderr()).await?) })
        }
        Verb::Tools { what, environment } => run(tools(what, environment)),
        Verb::Component { name, verb, instance } => run(component(name, verb, instance.instance)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error   {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()
        .context("cannot start the runtime")?
        .block_on(work)
}

async fn tools(what: Tools, environment: Environment) -> anyhow::Result<()> {
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
    let purpose = if up.registry { Purpose::Tests } else { Purpose::Lab };
    requirements::ensure(purpose, &up.environment.search_path, &progress).await?;
    let cluster = match up.kubeconfig {
        None => ClusterSource::Made,
        Some(kubeconfig) => {
            let kubeconfig = std::path::absolute(kubeconfig).context("no current directory")?;
            ClusterSource::Joined {
                kubeconfig,
                node_address: up.node_address,
            }
        }
    };
    let options = Options {
        instance: up.instance.instance,
        hosts: if up.elastic { 0 } else { up.hosts },
        profile: if up.dev { Profile::Dev } else { Profile::Release },
        build: if up.no_build { Build::Taken } else { Build::Made },
        extent: up.extent,
        cluster,
        cell: up.cell,
        elastic: up.elastic,
        registry: up.registry,
        cache: up.environment.cache()?,
    };
    let exec = match &options.cluster {
        ClusterSource::Joined {
            node_address: None, ..
        } => Exec::Unreachable,
        ClusterSource::Made | ClusterSource::Joined { .. } => Exec::Works,
    };
    let lab = Lab::up(&options, &progress).await?;
    let demo = !up.no_demo && !options.elastic;
    if options.elastic && options.extent == Extent::Whole && !up.no_demo {
        let shown = burst::run(&lab, &progress).await?;
        println!("\n{shown}\n");
    }
    if options.extent == Extent::Whole && demo {
        let shown = demo::run(&lab, exec, &progress).await?;
        println!("\n{shown}");
    }
    println!("{}", next_steps(&lab, demo.then_some(exec)));
    Ok(())
}

fn next_steps(lab: &Lab, demo: Option<Exec>) -> String {
    let layout = lab.layout();
    let option = match layout.instance().as_str() {
        "demo" => String::new(),
        other => format!(" --instance {other}"),
    };
    let mut text = format!(
        "Try next:\n  export KUBECONFIG={}\n",
        layout.kubeconfig().display()
    );
    if layout.bin().join("kubectl").exists() {
        text += &format!(
            "  export PATH={}:$PATH    # has a kubectl\n",
            layout.bin().display()
        );
    }
    text += "  kubectl get nodes,pods -A -o wide\n";
    if demo == Some(Exec::Works) {
        text += "  kubectl -n demo logs -f deploy/web\n\
                 \x20 kubectl -n demo exec -it deploy/client -- sh    # then: wget -O - http://web/hostname\n";
    }
    if demo.is_some() {
        text += "  kubectl -n demo scale deployment web --replicas=20\n";
    }
    text += &format!(
        "  deploy/local/status{option}\n  \
         deploy/local/component pool-agent@host-a kill{option}    # and up again: start\n  \
         deploy/local/down{option}"
    );
    text
}

fn status(instance: &InstanceName) -> ExitCode {
    let status = Status::of(instance);
    print!("{status}");
    // As of `systemctl status`: 0 runs, 3 does not.
    if status.whole() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}

async fn component(name: String, verb: ComponentVerb, instance: InstanceName) -> anyhow::Result<()> {
    let layout = Layout::new(instance);
    let component = Component::find(&layout, &name)?;
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
