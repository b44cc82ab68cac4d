//! Records in a table of PostgreSQL, which this sink makes. One statement a batch, in a
//! transaction; a record that is there stays as it is.
//!
//! Connections are made without TLS: over a socket, the host's own loopback, or a
//! network that somebody else secures. One that asks for TLS (`sslmode=require`) is
//! refused.

use std::{sync::Arc, time::Duration};

use pool_usage::Record;
use tokio::{sync::Mutex, time::timeout};
use tokio_postgres::{Client, Config, NoTls, types::ToSql};

use super::Handed;

/// The server's answers are waited for as long as a host waits for ours.
const PATIENCE: Duration = Duration::from_secs(20);

/// Who makes or changes the table, alone; any number that others do not use.
const LOCK: i64 = 0x5370_696e_6472_6966;

/// Applied in order, each once; the number of those that were is in
/// `spindrift_usage_version`.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE spindrift_usage (
        host text NOT NULL,
        tenant text NOT NULL,
        namespace text NOT NULL,
        pod text NOT NULL,
        uid text NOT NULL,
        attempt bigint NOT NULL,
        sequence bigint NOT NULL,
        class text NOT NULL,
        zone text NOT NULL,
        boot_id text NOT NULL,
        \"from\" timestamptz NOT NULL,
        \"to\" timestamptz NOT NULL,
        from_boot_nanos bigint NOT NULL,
        to_boot_nanos bigint NOT NULL,
        began text NOT NULL,
        ended text NOT NULL,
        start text NOT NULL,
        requested_cpu_nanos bigint NOT NULL,
        requested_memory_byte_seconds bigint NOT NULL,
        used_cpu_nanos bigint NOT NULL,
        used_memory_byte_seconds bigint NOT NULL,
        mesh_sent_bytes bigint NOT NULL,
        mesh_received_bytes bigint NOT NULL,
        unsampled_nanos bigint NOT NULL,
        lost bigint NOT NULL,
        -- With the host: one that lies about another's pod takes no name from its records.
        PRIMARY KEY (uid, attempt, sequence, host)
    );
    CREATE INDEX spindrift_usage_by_tenant ON spindrift_usage (tenant, \"from\");
"];

const INSERT: &str = "
    INSERT INTO spindrift_usage
    SELECT $1, tenant, namespace, pod, uid, attempt, sequence, class, zone, boot_id,
        f::timestamptz, t::timestamptz, from_boot_nanos, to_boot_nanos, began, ended, start,
        requested_cpu_nanos, requested_memory_byte_seconds, used_cpu_nanos,
        used_memory_byte_seconds, mesh_sent_bytes, mesh_received_bytes, unsampled_nanos, lost
    FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::text[], $10::text[], $11::text[], $12::text[], $13::text[],
        $14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[],
        $20::bigint[], $21::bigint[], $22::bigint[], $23::bigint[], $24::bigint[], $25::bigint[])
    AS r (tenant, namespace, pod, uid, class, zone, boot_id, f, t, began, ended, start,
        attempt, sequence, from_boot_nanos, to_boot_nanos, requested_cpu_nanos,
        requested_memory_byte_seconds, used_cpu_nanos, used_memory_byte_seconds,
        mesh_sent_bytes, mesh_received_bytes, unsampled_nanos, lost)
    ON CONFLICT (uid, attempt, sequence, host) DO NOTHING";

#[derive(Debug, thiserror::Error)]
pub(crate) enum PostgresError {
    #[error("the URL")]
    Url(#[source] tokio_postgres::Error),
    #[error("connecting")]
    Connect(#[source] tokio_postgres::Error),
    #[error("making the table")]
    Migrate(#[source] tokio_postgres::Error),
    #[error("the table is of version {found}, from a newer collector; this one knows {known}")]
    Newer { found: i32, known: i32 },
    #[error("inserting records")]
    Insert(#[source] tokio_postgres::Error),
    #[error("the server does not answer within {} s", PATIENCE.as_secs())]
    Slow,
}

pub(crate) struct Postgres {
    config: Config,
    /// None after a failure: the next batch connects anew.
    client: Arc<Mutex<Option<Client>>>,
}

impl Postgres {
    /// Connects and makes the table, so that what is wrong is told at the start.
    pub(crate) async fn open(url: &str) -> Result<Self, PostgresError> {
        let config: Config = url.parse().map_err(PostgresError::Url)?;
        let client = within(connect(&config)).await?;
        Ok(Self {
            config,
            client: Arc::new(Mutex::new(Some(client))),
        })
    }

    pub(crate) async fn put(&self, handed: &Handed) -> Result<(), PostgresError> {
        let held = &mut *self.client.lock().await;
        // Out of its place until it has answered: one whose answer nobody waited for is
        // not used again.
        let client = match held.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => within(connect(&self.config)).await?,
        };
        within(insert(&client, handed)).await?;
        *held = Some(client);
        Ok(())
    }
}

async fn within<T>(work: impl Future<Output = Result<T, PostgresError>>) -> Result<T, PostgresError> {
    timeout(PATIENCE, work).await.unwrap_or(Err(PostgresError::Slow))
}

async fn connect(config: &Config) -> Result<Client, PostgresError> {
    let (mut client, connection) = config.connect(NoTls).await.map_err(PostgresError::Connect)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::warn!(error = %error, "the connection to PostgreSQL broke off");
        }
    });
    migrate(&mut client).await?;
    Ok(client)
}

async fn migrate(client: &mut Client) -> Result<(), PostgresError> {
    let failed = PostgresError::Migrate;
    let transaction = client.transaction().await.map_err(failed)?;
    transaction
        .execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK])
        .await
        .map_err(failed)?;
    transaction
        .batch_execute("CREATE TABLE IF NOT EXISTS spindrift_usage_version (version integer NOT NULL)")
        .await
        .map_err(failed)?;
    let rows = transaction
        .query("SELECT max(version) FROM spindrift_usage_version", &[])
        .await
        .map_err(failed)?;
    let found: Option<i32> = rows.first().and_then(|row| row.get(0));
    let (found, known) = (
        found.unwrap_or(0),
        i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX),
    );
    if found > known {
        return Err(PostgresError::Newer { found, known });
    }
    for (version, migration) in (1..).zip(MIGRATIONS).skip(usize::try_from(found).unwrap_or(0)) {
        transaction.batch_execute(migration).await.map_err(failed)?;
        transaction
            .execute("INSERT INTO spindrift_usage_version VALUES ($1)", &[&version])
            .await
            .map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

async fn insert(client: &Client, handed: &Handed) -> Result<(), PostgresError> {
    let records = &handed.records;
    let text = |of: fn(&Record) -> String| records.iter().map(of).collect::<Vec<String>>();
    // The edge refused what does not fit.
    let number = |of: fn(&Record) -> u64| {
        let all = records
            .iter()
            .map(|record| i64::try_from(of(record)).unwrap_or(i64::MAX));
        all.collect::<Vec<i64>>()
    };
    let texts = [
        text(|r| r.subject.tenant.to_string()),
        text(|r| r.subject.namespace.to_string()),
        text(|r| r.subject.pod.to_string()),
        text(|r| r.subject.key.pod.to_string()),
        text(|r| r.class.clone()),
        text(|r| r.zone.clone()),
        text(|r| r.boot_id.clone()),
        text(|r| r.from.wall.to_string()),
        text(|r| r.to.wall.to_string()),
        text(|r| r.began.to_string()),
        text(|r| r.ended.to_string()),
        text(|r| r.start.to_string()),
    ];
    let numbers = [
        number(|r| r.subject.key.attempt.get().into()),
        number(|r| r.sequence),
        number(|r| r.from.boot),
        number(|r| r.to.boot),
        number(|r| r.amounts.requested_cpu_nanos),
        number(|r| r.amounts.requested_memory_byte_seconds),
        number(|r| r.amounts.used_cpu_nanos),
        number(|r| r.amounts.used_memory_byte_seconds),
        number(|r| r.amounts.mesh_sent_bytes),
        number(|r| r.amounts.mesh_received_bytes),
        number(|r| r.amounts.unsampled_nanos),
        number(|r| r.lost),
    ];
    let host = handed.host.to_string();
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&host];
    parameters.extend(texts.iter().map(|column| column as &(dyn ToSql + Sync)));
    parameters.extend(numbers.iter().map(|column| column as &(dyn ToSql + Sync)));
    // One statement is a transaction of its own: it is committed when it is answered.
    client
        .execute(INSERT, &parameters)
        .await
        .map(drop)
        .map_err(PostgresError::Insert)
}
