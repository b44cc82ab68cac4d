//! What the operator of a pool asks of it, from a command line.

mod usage;

use clap::{Parser, Subcommand};

/// Asks a Spindrift pool.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// What was used, summed by tenant and day.
    Usage(usage::Usage),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match Arguments::parse().question {
        Question::Usage(usage) => usage.answer(&mut out).await,
    }
}
