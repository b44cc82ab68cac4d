//! Sums of a collector's table, made by the database.

use std::time::Duration;

use anyhow::Context;
use jiff::civil::Date;
use pool_usage::sum::{Grain, Group, Sum, Sums};
use tokio_postgres::NoTls;

use super::Wanted;

/// To connect; sums take as long as they take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) async fn sum(url: &str, wanted: &Wanted, grain: Grain) -> anyhow::Result<Sums> {
    let connecting = tokio::time::timeout(PATIENCE, tokio_postgres::connect(url, NoTls));
    let (client, connection) = connecting
        .await
        .context("connecting to PostgreSQL: it does not answer")?
        .context("connecting to PostgreSQL")?;
    // Ends with the client.
    let connection = tokio::spawn(connection);
    let finer = match grain {
        Grain::Tenant => "''::text, ''::text",
        Grain::Namespace => "namespace, ''::text",
        Grain::Pod => "namespace, pod",
    };
    let query = format!(
        "SELECT tenant, ((\"from\" AT TIME ZONE 'UTC')::date)::text AS day, {finer},
            count(*), count(*) FILTER (WHERE ended <> 'Continues'),
            sum(requested_cpu_nanos)::text, sum(requested_memory_byte_seconds)::text,
            sum(used_cpu_nanos)::text, sum(used_memory_byte_seconds)::text,
            sum(mesh_sent_bytes)::text, sum(mesh_received_bytes)::text, sum(unsampled_nanos)::text
        FROM spindrift_usage
        WHERE ($1::text IS NULL OR tenant = $1)
            AND ($2::text IS NULL OR \"from\" >= ($2::text || 'T00:00:00Z')::timestamptz)
            AND ($3::text IS NULL OR \"from\" < ($3::text || 'T00:00:00Z')::timestamptz + interval '1 day')
        GROUP BY 1, 2, 3, 4"
    );
    let text = |day: Option<Date>| day.map(|day| day.to_string());
    let rows = client
        .query(
            &query,
            &[&wanted.tenant, &text(wanted.since), &text(wanted.until)],
        )
        .await
        .context("summing the table spindrift_usage")?;
    drop(client);
    connection
        .await
        .context("the connection")?
        .context("the connection")?;
    let mut sums = Sums::new();
    for row in rows {
        let text = |i: usize| row.try_get::<_, String>(i);
        let count = |i: usize| -> anyhow::Result<u64> { Ok(row.try_get::<_, i64>(i)?.try_into()?) };
        let amount = |i: usize| -> anyhow::Result<u128> { Ok(text(i)?.parse()?) };
        let group = Group {
            tenant: text(0)?,
            day: text(1)?.parse()?,
            namespace: (grain != Grain::Tenant).then(|| text(2)).transpose()?,
            pod: (grain == Grain::Pod).then(|| text(3)).transpose()?,
        };
        let sum = Sum {
            records: count(4)?,
            ended: count(5)?,
            requested_cpu_nanos: amount(6)?,
            requested_memory_byte_seconds: amount(7)?,
            used_cpu_nanos: amount(8)?,
            used_memory_byte_seconds: amount(9)?,
            mesh_sent_bytes: amount(10)?,
            mesh_received_bytes: amount(11)?,
            unsampled_nanos: amount(12)?,
        };
        sums.insert(group, sum);
    }
    Ok(sums)
}
