//! The agent of one pool host. See the library.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use pool_agent::{agent, config::Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The agent of one Spindrift pool host.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings, in TOML.
    #[arg(long)]
    config: PathBuf,
    /// What is logged, as tracing's filters have it.
    #[arg(long, env = "SPINDRIFT_LOG", default_value = "info")]
    log: String,
    /// Log lines as JSON.
    #[arg(long)]
    log_json: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_new(&arguments.log).context("--log")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if arguments.log_json {
        log.json().init();
    } else {
        log.init();
    }
    let config = Config::load(&arguments.config, agent::detect)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        });
        agent::run(config, shutdown).await.map_err(anyhow::Error::from)
    })?;
    // Effects that are under way are the runtime's; the next agent sees how they ended.
    runtime.shutdown_background();
    Ok(())
}
