use std::io::BufReader;

use pool_usage::{Record, line::HostRecord};
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// A record as a host would make it.
pub(crate) fn record(uid: &str, sequence: u64) -> Record {
    let value = json!({
        "tenant": "acme", "namespace": "shop", "pod": "web", "uid": uid, "attempt": 1,
        "sequence": sequence, "class": "", "zone": "z1", "boot_id": "b",
        "from": "2026-01-31T23:59:00Z", "to": "2026-02-01T00:00:00Z",
        "from_boot_nanos": 0, "to_boot_nanos": 60_000_000_000_u64,
        "began": "Started", "ended": "Continues", "start": "Cold",
        "requested_cpu_nanos": 1, "requested_memory_byte_seconds": 2, "used_cpu_nanos": 3,
        "used_memory_byte_seconds": 4, "mesh_sent_bytes": 5, "mesh_received_bytes": 6,
        "unsampled_nanos": 0, "lost": 0,
    });
    serde_json::from_value(value).unwrap()
}

pub(crate) fn handed(host: &str, spool: &str, batch: u64) -> Handed {
    Handed {
        host: host.parse().unwrap(),
        spool: spool.into(),
        batch,
        records: vec![record("a", batch), record("b", batch)],
    }
}

fn open(directory: &TempDir, rotate_bytes: u64) -> JsonLines {
    JsonLines::open(directory.path(), rotate_bytes).unwrap()
}

/// Every record of every file, by host and sequence.
fn kept(directory: &TempDir) -> Vec<(String, u64)> {
    let mut paths: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    let mut all = vec![];
    for path in paths {
        let file = BufReader::new(File::open(path).unwrap());
        let told = |r: HostRecord| (r.host, r.record.sequence);
        line::read(file, |_, records| all.extend(records.into_iter().map(told))).unwrap();
    }
    all
}

#[test]
fn a_batch_that_comes_again_changes_nothing_also_after_a_restart_and_a_rotation() {
    let directory = tempfile::tempdir().unwrap();
    let mut sink = open(&directory, 1);
    for batch in [1, 2, 2, 3] {
        sink.put(&handed("host-a", "s", batch)).unwrap();
        sink.put(&handed("host-b", "s", batch)).unwrap();
    }
    drop(sink);
    let mut sink = open(&directory, 1);
    for batch in 1..=4 {
        sink.put(&handed("host-a", "s", batch)).unwrap();
    }
    // Another spool counts anew.
    sink.put(&handed("host-a", "other", 1)).unwrap();
    let mut expected = vec![];
    for batch in 1..=3 {
        expected.extend([
            ("host-a", batch),
            ("host-a", batch),
            ("host-b", batch),
            ("host-b", batch),
        ]);
    }
    expected.extend([("host-a", 4), ("host-a", 4), ("host-a", 1), ("host-a", 1)]);
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(host, n)| (host.to_owned(), n))
        .collect();
    assert_eq!(kept(&directory), expected);
    assert!(
        std::fs::read_dir(directory.path()).unwrap().count() > 3,
        "it was not rotated"
    );
}

#[test]
fn a_batch_that_was_cut_off_is_cut_away_and_written_whole_when_it_comes_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut sink = open(&directory, 1 << 20);
    sink.put(&handed("host-a", "s", 1)).unwrap();
    let (path, first) = (sink.path.clone(), sink.good);
    sink.put(&handed("host-a", "s", 2)).unwrap();
    let whole = sink.good;
    drop(sink);
    let bytes = std::fs::read(&path).unwrap();
    for cut in (first..whole).step_by(37) {
        std::fs::write(&path, &bytes[..usize::try_from(cut).unwrap()]).unwrap();
        let mut sink = open(&directory, 1 << 20);
        sink.put(&handed("host-a", "s", 2)).unwrap();
        drop(sink);
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "cut at {cut}");
    }
}

#[test]
fn a_file_that_is_damaged_before_its_end_is_not_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let mut sink = open(&directory, 1 << 20);
    sink.put(&handed("host-a", "s", 1)).unwrap();
    sink.put(&handed("host-a", "s", 2)).unwrap();
    let path = sink.path.clone();
    drop(sink);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[3] = 0;
    std::fs::write(&path, bytes).unwrap();
    let error = JsonLines::open(directory.path(), 1 << 20).err().unwrap();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.starts_with("line 1: "), "{cause}");
}

#[test]
fn a_disk_that_is_full_takes_no_batch_and_leaves_none_in_part() {
    // A file may not grow beyond this here: as good as a full disk, and nobody else's.
    let directory = tempfile::tempdir().unwrap();
    let mut sink = open(&directory, 1 << 20);
    sink.put(&handed("host-a", "s", 1)).unwrap();
    let (good, file) = (sink.good, sink.file.try_clone().unwrap());
    // One that cannot be written to at all stands in its place.
    sink.file = File::open(&sink.path).unwrap();
    assert!(sink.put(&handed("host-a", "s", 2)).is_err());
    assert_eq!(sink.good, good);
    sink.file = file;
    sink.put(&handed("host-a", "s", 2)).unwrap();
    assert_eq!(kept(&directory).len(), 4);
}
