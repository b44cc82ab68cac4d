//! Lets hosts into a pool's cell: approves what a bootstrap token's host asks for
//! (once), and what a host asks for itself, and denies everything else that is asked
//! of the signer of nodes' certificates. With the pool's authority it is a signer too:
//! of the certificates by which hosts and virtual nodes know each other. See
//! `docs/decisions/the-cell.md`.
//!
//! It also says of claims that are being deleted whether their hosts' Leases have
//! lapsed, for virtual nodes, which see neither (`docs/decisions/the-right-to-run.md`).
//!
//! [`rule`], [`member`] and [`lapse`] decide (pure), [`round`] and [`witness`] look and
//! do. Any number of these may run: each step is guarded by the version of what it was
//! decided on.

mod authority;
mod lapse;
mod member;
mod request;
mod round;
mod rule;
mod witness;

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

use authority::Authority;

/// How often everything is looked at though nothing was told.
const LOOK: Duration = Duration::from_secs(5);
/// Events that are looked at together.
const GATHER: usize = 1024;

/// Lets hosts into a pool's cell, by rule.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// How the cell is reached; else as a pod in it.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// The pool's authority, PEM: the certificate that signs, then others that are
    /// believed too. Without it no member's certificate is signed.
    #[arg(long, requires_all = ["pool_ca_key", "trust_domain"])]
    pool_ca: Option<PathBuf>,
    /// The key of its first certificate.
    #[arg(long, requires = "pool_ca")]
    pool_ca_key: Option<PathBuf>,
    /// The pool's SPIFFE trust domain.
    #[arg(long, requires = "pool_ca")]
    trust_domain: Option<String>,
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
    let authority = match (arguments.pool_ca, arguments.pool_ca_key, arguments.trust_domain) {
        (Some(certificate), Some(key), Some(trust_domain)) => {
            Some(Authority::read(certificate, key, trust_domain).context("--pool-ca")?)
        }
        _ => None,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = keep(client.clone(), authority) => anyhow::bail!("the watch of requests has ended"),
        () = witness::keep(client) => anyhow::bail!("the watch of claims and leases has ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn keep(client: Client, authority: Option<Authority>) {
    let of = |signer: &str| {
        let config = watcher::Config::default().fields(&format!("spec.signerName={signer}"));
        objects::watch::<CertificateSigningRequest>(Api::all(client.clone()), config)
            .default_backoff()
            .boxed()
    };
    // What comes together is looked at together: a round looks at everything.
    let events = futures::stream::select(of(names::CLIENT_SIGNER), of(names::MEMBER_SIGNER));
    let mut events = events.ready_chunks(GATHER);
    let mut ticks = tokio::time::interval(LOOK);
    tracing::info!("the cell controller looks at requests");
    loop {
        tokio::select! {
            events = events.next() => {
                let Some(events) = events else { return };
                let (told, failed): (Vec<_>, Vec<_>) = events.into_iter().partition(Result::is_ok);
                for error in failed.into_iter().filter_map(Result::err) {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the watch of requests failed");
                }
                if told.is_empty() {
                    continue;
                }
            }
            _ = ticks.tick() => {}
        }
        if let Err(error) = round::round(&client, authority.as_ref()).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "a round broke off");
        }
    }
}
