//! Where records are kept. A batch is put into every sink, and may be put there again.

mod json_lines;
mod postgres;

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use pool_agent_api::HostName;
use pool_usage::Record;

use self::{json_lines::JsonLines, postgres::Postgres};
use crate::config::Config;

/// What a host hands over at a time.
pub(crate) struct Handed {
    pub(crate) host: HostName,
    pub(crate) spool: String,
    pub(crate) batch: u64,
    pub(crate) records: Vec<Record>,
}

pub(crate) struct Sinks {
    /// One batch is written at a time.
    lines: Option<Arc<Mutex<JsonLines>>>,
    postgres: Option<Postgres>,
}

impl Sinks {
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Self> {
        let lines = match &config.json_lines {
            Some(settings) => {
                let lines = JsonLines::open(&settings.directory, settings.rotate_bytes);
                Some(Arc::new(Mutex::new(lines.context("json_lines")?)))
            }
            None => None,
        };
        let postgres = match &config.postgres {
            Some(settings) => Some(Postgres::open(&settings.url).await.context("postgres")?),
            None => None,
        };
        Ok(Self { lines, postgres })
    }

    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self {
            lines: None,
            postgres: None,
        }
    }

    /// Durable in every sink when it returns. Goes on to its end when nobody waits any
    /// more.
    pub(crate) async fn put(&self, handed: Handed) -> anyhow::Result<()> {
        let handed = Arc::new(handed);
        if let Some(postgres) = &self.postgres {
            postgres.put(&handed).await.context("postgres")?;
        }
        if let Some(lines) = self.lines.clone() {
            let written = tokio::task::spawn_blocking(move || {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.put(&handed)
            });
            written.await.context("json_lines")?.context("json_lines")?;
        }
        Ok(())
    }
}
