//! Sums of JSON lines, a batch in memory at a time.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use pool_usage::{
    line,
    sum::{Grain, Group, Sums},
};

use super::Wanted;

pub(super) fn sum(paths: &[PathBuf], wanted: &Wanted, grain: Grain) -> anyhow::Result<Sums> {
    let mut sums = Sums::new();
    for path in expand(paths)? {
        let file = File::open(&path).with_context(|| format!("reading {}", path.display()))?;
        line::read(BufReader::new(file), |_, records| {
            for record in records {
                let group = Group::of(&record.record, grain);
                if wanted.has(&group.tenant, group.day) {
                    *sums.entry(group).or_default() += &record.record;
                }
            }
        })
        .with_context(|| path.display().to_string())?;
    }
    Ok(sums)
}

/// Files as they are named, of a directory those that a collector writes. A file that
/// is named twice counts once.
fn expand(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = vec![];
    for path in paths {
        if !path.is_dir() {
            files.push(real(path)?);
            continue;
        }
        let before = files.len();
        for entry in std::fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            let entry = entry?.path();
            if entry.extension().is_some_and(|extension| extension == "jsonl") {
                files.push(real(&entry)?);
            }
        }
        if files.len() == before {
            bail!("{} has no .jsonl files", path.display());
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

fn real(path: &Path) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use pool_usage::Record;
    use serde_json::json;

    use super::*;

    fn record(tenant: &str, day: &str) -> Record {
        let value = json!({
            "tenant": tenant, "namespace": "shop", "pod": "web", "uid": "u", "attempt": 1,
            "sequence": 0, "class": "", "zone": "", "boot_id": "b",
            "from": format!("{day}T23:59:30Z"), "to": format!("{day}T23:59:59Z"),
            "from_boot_nanos": 0, "to_boot_nanos": 29_000_000_000_u64,
            "began": "Started", "ended": "Stopped", "start": "Cold",
            "requested_cpu_nanos": 1, "requested_memory_byte_seconds": 2, "used_cpu_nanos": 3,
            "used_memory_byte_seconds": 4, "mesh_sent_bytes": 5, "mesh_received_bytes": 6,
            "unsampled_nanos": 0, "lost": 0,
        });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn files_add_up_by_tenant_and_day_and_each_counts_once() {
        let directory = tempfile::tempdir().unwrap();
        let host = "host-a".parse().unwrap();
        for (name, batch, day) in [
            ("usage-1.jsonl", 1, "2026-01-30"),
            ("usage-2.jsonl", 2, "2026-01-31"),
        ] {
            let lines = line::write(&host, "s", batch, &[record("acme", day), record("zeta", day)]).unwrap();
            std::fs::write(directory.path().join(name), lines).unwrap();
        }
        let paths = [
            directory.path().to_owned(),
            directory.path().join("usage-1.jsonl"),
        ];
        let sums = sum(&paths, &Wanted::default(), Grain::Tenant).unwrap();
        let all: Vec<_> = sums
            .iter()
            .map(|(group, sum)| (group.tenant.as_str(), sum.records))
            .collect();
        assert_eq!(all, [("acme", 1), ("acme", 1), ("zeta", 1), ("zeta", 1)]);
        let wanted = Wanted {
            tenant: Some("acme".into()),
            since: Some("2026-01-31".parse().unwrap()),
            until: None,
        };
        let sums = sum(&paths, &wanted, Grain::Tenant).unwrap();
        assert_eq!(sums.len(), 1);
    }

    #[test]
    fn a_bad_line_is_told_by_file_and_number() {
        let directory = tempfile::tempdir().unwrap();
        let host = "host-a".parse().unwrap();
        let mut lines = b"{\"host\":\"host-a\"}\n".to_vec();
        lines.extend(line::write(&host, "s", 1, &[record("acme", "2026-01-31")]).unwrap());
        let path = directory.path().join("usage-1.jsonl");
        std::fs::write(&path, lines).unwrap();
        let error = sum(&[path], &Wanted::default(), Grain::Tenant).unwrap_err();
        let told = format!("{error:#}");
        assert!(told.contains("usage-1.jsonl: line 1: "), "{told}");
        let nothing = tempfile::tempdir().unwrap();
        let error = sum(&[nothing.path().to_owned()], &Wanted::default(), Grain::Tenant).unwrap_err();
        assert!(error.to_string().contains("no .jsonl files"), "{error}");
    }
}
