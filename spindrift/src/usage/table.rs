//! Sums as they are shown.

use std::io::{self, Write};

use pool_usage::sum::{Grain, Group, Sum, Sums};
use serde::Serialize;

const HOUR: f64 = 3600.0;
const NANOS: f64 = 1e9;
const GIB: f64 = 1_073_741_824.0;
const MIB: f64 = 1_048_576.0;

fn named(grain: Grain) -> &'static [&'static str] {
    match grain {
        Grain::Tenant => &["tenant", "day"],
        Grain::Namespace => &["tenant", "day", "namespace"],
        Grain::Pod => &["tenant", "day", "namespace", "pod"],
    }
}

fn names(group: &Group) -> Vec<String> {
    let finer = [&group.namespace, &group.pod].into_iter().flatten().cloned();
    [group.tenant.clone(), group.day.to_string()]
        .into_iter()
        .chain(finer)
        .collect()
}

/// Amounts of people's size: hours of a core, hours of a GiB, MiB.
#[expect(clippy::cast_precision_loss, reason = "it is rounded for people")]
pub(super) fn people(out: &mut impl Write, sums: &Sums, grain: Grain) -> io::Result<()> {
    let cpu = |nanos: u128| format!("{:.3}", nanos as f64 / NANOS / HOUR);
    let memory = |byte_seconds: u128| format!("{:.3}", byte_seconds as f64 / GIB / HOUR);
    let bytes = |bytes: u128| format!("{:.1}", bytes as f64 / MIB);
    let titles = [
        "CPU REQ (core h)",
        "CPU USED (core h)",
        "MEM REQ (GiB h)",
        "MEM USED (GiB h)",
        "SENT (MiB)",
        "RECEIVED (MiB)",
        "ENDED",
    ];
    let head: Vec<String> = named(grain).iter().map(|name| name.to_uppercase()).collect();
    let mut rows = vec![
        head.into_iter()
            .chain(titles.map(str::to_owned))
            .collect::<Vec<_>>(),
    ];
    for (group, sum) in sums {
        let mut row = names(group);
        row.extend([
            cpu(sum.requested_cpu_nanos),
            cpu(sum.used_cpu_nanos),
            memory(sum.requested_memory_byte_seconds),
            memory(sum.used_memory_byte_seconds),
            bytes(sum.mesh_sent_bytes),
            bytes(sum.mesh_received_bytes),
            sum.ended.to_string(),
        ]);
        rows.push(row);
    }
    let left = named(grain).len();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..left + titles.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column < left {
                line.push_str(&format!("{cell:width$}  "));
            } else {
                line.push_str(&format!("{cell:>width$}  "));
            }
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    group: &'a Group,
    #[serde(flatten)]
    sum: Decimal,
}

/// JSON's readers hold integers up to 2^53: sums are exact as text.
#[derive(Serialize)]
struct Decimal {
    records: u64,
    ended: u64,
    requested_cpu_nanos: String,
    requested_memory_byte_seconds: String,
    used_cpu_nanos: String,
    used_memory_byte_seconds: String,
    mesh_sent_bytes: String,
    mesh_received_bytes: String,
    unsampled_nanos: String,
}

const AMOUNTS: [&str; 9] = [
    "records",
    "ended",
    "requested_cpu_nanos",
    "requested_memory_byte_seconds",
    "used_cpu_nanos",
    "used_memory_byte_seconds",
    "mesh_sent_bytes",
    "mesh_received_bytes",
    "unsampled_nanos",
];

impl From<&Sum> for Decimal {
    fn from(sum: &Sum) -> Self {
        Self {
            records: sum.records,
            ended: sum.ended,
            requested_cpu_nanos: sum.requested_cpu_nanos.to_string(),
            requested_memory_byte_seconds: sum.requested_memory_byte_seconds.to_string(),
            used_cpu_nanos: sum.used_cpu_nanos.to_string(),
            used_memory_byte_seconds: sum.used_memory_byte_seconds.to_string(),
            mesh_sent_bytes: sum.mesh_sent_bytes.to_string(),
            mesh_received_bytes: sum.mesh_received_bytes.to_string(),
            unsampled_nanos: sum.unsampled_nanos.to_string(),
        }
    }
}

/// One object a line.
pub(super) fn json(out: &mut impl Write, sums: &Sums) -> io::Result<()> {
    for (group, sum) in sums {
        let row = Row {
            group,
            sum: sum.into(),
        };
        serde_json::to_writer(&mut *out, &row)?;
        writeln!(out)?;
    }
    Ok(())
}

/// Names have no character that would want quoting: they are Kubernetes'.
pub(super) fn csv(out: &mut impl Write, sums: &Sums, grain: Grain) -> io::Result<()> {
    let head: Vec<&str> = named(grain).iter().copied().chain(AMOUNTS).collect();
    writeln!(out, "{}", head.join(","))?;
    for (group, sum) in sums {
        let d = Decimal::from(sum);
        let mut row = names(group);
        row.extend([d.records, d.ended].map(|n| n.to_string()));
        row.extend([
            d.requested_cpu_nanos,
            d.requested_memory_byte_seconds,
            d.used_cpu_nanos,
            d.used_memory_byte_seconds,
            d.mesh_sent_bytes,
            d.mesh_received_bytes,
            d.unsampled_nanos,
        ]);
        writeln!(out, "{}", row.join(","))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums() -> Sums {
        let group = Group {
            tenant: "acme".into(),
            day: "2026-01-31".parse().unwrap(),
            namespace: Some("shop".into()),
            pod: None,
        };
        let sum = Sum {
            records: 2,
            used_cpu_nanos: 5_400_000_000_000,
            used_memory_byte_seconds: 1 << 70,
            ..Sum::default()
        };
        [(group, sum)].into()
    }

    #[test]
    fn sums_are_exact_for_programs_and_rounded_for_people() {
        let shown = |f: &dyn Fn(&mut Vec<u8>)| {
            let mut out = vec![];
            f(&mut out);
            String::from_utf8(out).unwrap()
        };
        let csv = shown(&|out| csv(out, &sums(), Grain::Namespace).unwrap());
        let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!(lines[0].len(), lines[1].len());
        assert_eq!(lines[1][..3], ["acme", "2026-01-31", "shop"]);
        assert!(csv.contains("1180591620717411303424"), "{csv}");
        let json = shown(&|out| json(out, &sums()).unwrap());
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["used_memory_byte_seconds"], "1180591620717411303424");
        assert_eq!(
            (&value["namespace"], &value["records"]),
            (&"shop".into(), &2.into())
        );
        let table = shown(&|out| people(out, &sums(), Grain::Namespace).unwrap());
        assert!(table.lines().nth(1).unwrap().contains("1.500"), "{table}");
    }
}
