//! `spindrift usage`: sums of what a collector has kept, from its JSON lines or its
//! table. Memory is for the sums, whatever the number of records.

mod files;
mod postgres;
mod table;

use std::{io::Write, path::PathBuf};

use clap::{Args, ValueEnum};
use jiff::civil::Date;
use pool_usage::sum::{Grain, Sums};

#[derive(Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["files", "postgres"])))]
pub(crate) struct Usage {
    /// JSON lines of a collector, or directories of them.
    files: Vec<PathBuf>,
    /// A collector's database: `postgresql://…`, without TLS.
    #[arg(long, env = "SPINDRIFT_USAGE_POSTGRES")]
    postgres: Option<String>,
    /// Only this tenant's.
    #[arg(long)]
    tenant: Option<String>,
    /// The first day, in UTC: 2026-01-31.
    #[arg(long)]
    since: Option<Date>,
    /// The last day.
    #[arg(long)]
    until: Option<Date>,
    /// A sum for each namespace.
    #[arg(long)]
    by_namespace: bool,
    /// A sum for each pod's name.
    #[arg(long)]
    by_pod: bool,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For a person: rounded, in hours.
    Table,
    /// Exact, in the records' units.
    Json,
    /// The same.
    Csv,
}

/// Which records count.
#[derive(Debug, Default)]
struct Wanted {
    tenant: Option<String>,
    since: Option<Date>,
    until: Option<Date>,
}

impl Wanted {
    fn has(&self, tenant: &str, day: Date) -> bool {
        self.tenant.as_deref().is_none_or(|wanted| wanted == tenant)
            && self.since.is_none_or(|since| day >= since)
            && self.until.is_none_or(|until| day <= until)
    }
}

impl Usage {
    pub(crate) async fn answer(self, out: &mut impl Write) -> anyhow::Result<()> {
        let grain = match (self.by_namespace, self.by_pod) {
            (_, true) => Grain::Pod,
            (true, false) => Grain::Namespace,
            (false, false) => Grain::Tenant,
        };
        let wanted = Wanted {
            tenant: self.tenant,
            since: self.since,
            until: self.until,
        };
        let sums: Sums = match &self.postgres {
            Some(url) => postgres::sum(url, &wanted, grain).await?,
            None => files::sum(&self.files, &wanted, grain)?,
        };
        match self.output {
            Output::Table => table::people(out, &sums, grain)?,
            Output::Json => table::json(out, &sums)?,
            Output::Csv => table::csv(out, &sums, grain)?,
        }
        Ok(())
    }
}
