//! Takes the usage records of a pool's hosts, for the pool's operator, and keeps them
//! in its sinks. See `docs/decisions/usage.md`.
//!
//! ```text
//!  pool-agent's courier ──Hand, mutual TLS──▶ service ──▶ sinks: JSON lines, PostgreSQL
//! ```
//!
//! What always holds: a batch is answered when it is durable in every sink; the host is
//! the one in the certificate; a batch that comes again changes nothing.

mod config;
mod service;
mod sink;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use pool_agent_api::usage_wire::usage_collector_server::UsageCollectorServer;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tracing_subscriber::EnvFilter;

use crate::{config::Config, service::Service, sink::Sinks};

/// Calls under way on one connection: a host has one.
const CALLS: usize = 4;

/// Takes the usage records of a Spindrift pool's hosts.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings, in TOML.
    #[arg(long)]
    config: PathBuf,
    /// What is logged, as tracing's filters have it.
    #[arg(long, env = "SPINDRIFT_LOG", default_value = "info")]
    log: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_new(&arguments.log).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let config = Config::load(&arguments.config)?;
    let sinks = Sinks::open(&config).await?;
    let tls = config.tls.server()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let told = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tracing::info!(listen = %config.listen, "the usage collector serves");
    Server::builder()
        .tls_config(tls)
        .context("tls")?
        .concurrency_limit_per_connection(CALLS)
        .add_service(UsageCollectorServer::new(Service::new(
            sinks,
            config.tls.trust_domain,
        )))
        .serve_with_shutdown(config.listen, told)
        .await
        .context("serving")
}
