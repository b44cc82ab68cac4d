//! Lets hosts into a pool's cell: approves what a bootstrap token's host asks for
//! (once), and what a host asks for itself, and denies everything else that is asked
//! of the signer of nodes' certificates. See `docs/decisions/the-cell.md`.
//!
//! [`rule`] decides (pure), [`round`] looks and does. Any number of these may run:
//! each step is guarded by the version of what it was decided on.

mod round;
mod rule;

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Parser;
use futures::StreamExt;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{WatchStreamExt, watcher},
};
use pool_cell::names;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How often everything is looked at though nothing was told.
const LOOK: Duration = Duration::from_secs(5);

/// Lets hosts into a pool's cell, by rule.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// How the cell is reached; else as a pod in it.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
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
    let config = match &arguments.kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path).context("--kubeconfig")?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .context("--kubeconfig")?
        }
        None => Config::incluster().context("this is no pod of the cell: say --kubeconfig")?,
    };
    let client = Client::try_from(config).context("making a client of the cell")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = keep(client) => anyhow::bail!("the watch of requests has ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn keep(client: Client) {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("spec.signerName={}", names::CLIENT_SIGNER));
    let mut events = watcher(requests, config).default_backoff().boxed();
    let mut ticks = tokio::time::interval(LOOK);
    tracing::info!("the cell controller looks at requests");
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the watch of requests failed");
                    continue;
                }
                None => return,
            },
            _ = ticks.tick() => {}
        }
        if let Err(error) = round::round(&client).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "a round broke off");
        }
    }
}
