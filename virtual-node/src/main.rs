//! The binary: command line, log, signals. The rest is the library.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use virtual_node::{
    config::Config,
    fleet::{self, PortRange},
    process,
};

/// A Kubernetes node whose pods run on a pool of hosts.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file (TOML) of the one node that is served.
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    /// What is logged, e.g. `info` or `virtual_node=debug`.
    #[arg(long, env = "SPINDRIFT_LOG", default_value = "info", global = true)]
    log: String,
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true)]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the VirtualNodes of a cell, together with other replicas.
    Serve(Serve),
}

#[derive(Args)]
struct Serve {
    /// How the cell is reached; else as a pod in it.
    #[arg(long)]
    cell_kubeconfig: Option<PathBuf>,
    /// This replica's name; what makes it unlike an earlier process's is added.
    #[arg(long, env = "HOSTNAME", default_value = "replica")]
    replica: String,
    /// The namespace in the cell for what is the replicas' own.
    #[arg(long, default_value = "spindrift-system")]
    namespace: String,
    /// The pool's SPIFFE trust domain.
    #[arg(long)]
    pool_trust_domain: String,
    /// The address by which API servers and hosts reach the ports, at any replica.
    #[arg(long)]
    address: IpAddr,
    /// Where this replica listens for it.
    #[arg(long, default_value = "0.0.0.0")]
    listen: IpAddr,
    /// Other replicas listen at the same address, on the same machine (SO_REUSEPORT).
    #[arg(long)]
    shared: bool,
    /// Two ports of these are given to each virtual node.
    #[arg(long, default_value = "20000-29999")]
    ports: PortRange,
    /// Where the other replicas reach this one, to hand on connections.
    #[arg(long)]
    peer: SocketAddr,
    #[arg(long, default_value = "127.0.0.1:9465")]
    metrics_listen: SocketAddr,
}

impl Serve {
    fn settings(self) -> anyhow::Result<fleet::Settings> {
        let replica = format!(
            "{}-{:08x}",
            self.replica.to_ascii_lowercase(),
            rand::random::<u32>()
        );
        // It is the name of a Lease.
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if replica.len() > 200
            || !replica.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !replica.chars().all(fits)
        {
            return Err(anyhow!("--replica: {replica} is no name of a Kubernetes object"));
        }
        Ok(fleet::Settings {
            cell_kubeconfig: self.cell_kubeconfig,
            replica,
            namespace: self.namespace,
            trust_domain: self.pool_trust_domain,
            listen: self.listen,
            shared: self.shared,
            address: self.address,
            ports: self.ports,
            peer: self.peer,
            metrics_listen: self.metrics_listen,
        })
    }
}

/// What this process is to be.
enum Task {
    One(Box<Config>),
    Many(Box<fleet::Settings>),
}

impl Task {
    fn read(arguments: Arguments) -> anyhow::Result<Self> {
        match (arguments.command, arguments.config) {
            (Some(Command::Serve(serve)), _) => Ok(Self::Many(Box::new(serve.settings()?))),
            (None, Some(config)) => Ok(Self::One(Box::new(Config::read(&config)?))),
            (None, None) => Err(anyhow!("say --config, or serve")),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_new(&arguments.log).context("--log is not a filter")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let task = Task::read(arguments)?;
    let descriptors = bounds::descriptors::raise().context("cannot raise RLIMIT_NOFILE")?;
    tracing::info!(
        limit = descriptors.limit,
        before = descriptors.before,
        "descriptors"
    );
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow!("another cryptography provider is installed"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let stop = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        });
        match task {
            Task::One(config) => process::run(*config, shutdown).await,
            Task::Many(settings) => fleet::run(*settings, shutdown).await,
        }
    })
}
