use std::time::Duration;

use jiff::Timestamp;
use pool_usage::{
    Claim, Ended, Moment, Reading, Start, Subject,
    account::{CgroupReading, Place},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const BOUND: u64 = 1 << 20;

fn at(seconds: u64) -> Moment {
    Moment {
        wall: Timestamp::from_second(1_700_000_000).unwrap(),
        boot: seconds * 1_000_000_000,
    }
}

fn subject(uid: &str) -> Subject {
    Subject {
        tenant: "acme".parse().unwrap(),
        namespace: "shop".parse().unwrap(),
        pod: "web".parse().unwrap(),
        key: pool_agent_api::SandboxKey {
            pod: uid.parse().unwrap(),
            attempt: pool_agent_api::Attempt::FIRST,
        },
    }
}

fn book() -> Book {
    Book::new(Place::default(), "boot", Duration::from_secs(30))
}

/// Three attempts, one of which has ended and is forgotten.
fn filled() -> Book {
    let mut book = book();
    for uid in ["a", "b", "c"] {
        let subject = subject(uid);
        let key = subject.key.clone();
        let claim = Claim {
            cpu_millis: 100,
            memory_bytes: 100,
        };
        book.open(subject, claim, Start::Cold, at(0));
        let cgroup = CgroupReading {
            cpu_nanos: 1000,
            memory_bytes: 10,
        };
        let reading = Reading {
            cgroup: Some(cgroup),
            ..Reading::default()
        };
        book.read(&key, reading, at(20));
    }
    book.end(&subject("c").key, Ended::Stopped);
    book.forget(&subject("c").key);
    book
}

/// As the meter does; what was cut.
fn write(spool: &Spool, book: &mut Book) -> Vec<Record> {
    let records = book.cut(Duration::from_secs(10), 100);
    let mut next = book.clone();
    next.kept(&records);
    spool.write(&next, &records).unwrap();
    book.kept(&records);
    records
}

fn files(directory: &TempDir) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// All batches that a collector would be handed, in order.
fn waiting(spool: &Spool) -> Vec<Record> {
    let mut all = vec![];
    while let Some(number) = spool.oldest() {
        all.extend(spool.records(number).unwrap());
        spool.taken(number);
    }
    all
}

#[test]
fn records_wait_for_the_collector_over_restarts_and_then_go() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = filled();
    let (spool, kept) = Spool::open(directory.path(), BOUND);
    assert!(kept.accounts.is_empty() && !kept.damaged);
    let mut written = write(&spool, &mut book);
    written.extend(write(&spool, &mut book));
    assert_eq!(written.len(), 3, "the second batch has none");
    let id = spool.id().to_owned();
    drop(spool);
    let (spool, kept) = Spool::open(directory.path(), BOUND);
    assert_eq!(spool.id(), id);
    assert_eq!(
        (kept.accounts.len(), kept.boot_id.as_str(), kept.lost),
        (2, "boot", 0)
    );
    assert_eq!(waiting(&spool), written);
    // The newest has the accounts, and nothing else is left.
    assert_eq!(files(&directory).len(), 1);
    assert_eq!(Spool::open(directory.path(), BOUND).1.accounts.len(), 2);
}

#[test]
fn batches_without_records_do_not_pile_up() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(directory.path(), BOUND);
    let mut book = filled();
    write(&spool, &mut book);
    for _ in 0..10 {
        write(&spool, &mut book);
    }
    assert_eq!(files(&directory).len(), 2);
    assert!(spool.has_room());
    assert!(!Spool::open(directory.path(), 10).0.has_room());
}

#[test]
fn a_batch_that_was_cut_off_in_its_writing_was_never_there() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(directory.path(), BOUND);
    let mut book = filled();
    let written = write(&spool, &mut book);
    let newest = directory.path().join(name(1));
    let bytes = std::fs::read(&newest).unwrap();
    for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(directory.path().join(name(2)).with_extension(NEW), &bytes[..cut]).unwrap();
        let (spool, kept) = Spool::open(directory.path(), BOUND);
        assert!(!kept.damaged && kept.lost == 0);
        assert_eq!(spool.oldest(), Some(1));
        assert_eq!(spool.records(1).unwrap(), written);
        assert_eq!(files(&directory).len(), 1);
    }
}

#[test]
fn a_directory_that_cannot_be_written_keeps_the_accounts_and_heals() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("usage");
    // A file in its place: as good as a full disk, also to root.
    std::fs::write(&path, "").unwrap();
    let (spool, kept) = Spool::open(&path, BOUND);
    assert!(kept.damaged, "nobody knows what was there");
    let mut book = filled();
    let cut = book.cut(Duration::from_secs(10), 100);
    assert!(spool.write(&book, &cut).is_err());
    assert_eq!(spool.oldest(), None);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(write(&spool, &mut book), cut);
    assert_eq!(waiting(&spool), cut);
}

#[test]
fn a_full_disk_takes_no_batch_and_leaves_nothing_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(directory.path(), BOUND);
    let mut book = filled();
    let first = write(&spool, &mut book);
    // As the kernel answers when there is no room to make the file in.
    let blocked = directory.path().join(name(2)).with_extension(NEW);
    std::os::unix::fs::symlink("/dev/full", &blocked).unwrap();
    let error = spool.write(&book, &[]).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    assert_eq!(files(&directory), [name(1)]);
    assert_eq!(waiting(&spool), first);
    spool.write(&book, &[]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whichever bit flips, nothing panics, what reads is what was written, and what does
    /// not is counted.
    #[test]
    fn a_flipped_bit_is_a_loss_that_is_counted(place in 0..10_000usize, bit in 0..8u32) {
        let directory = tempfile::tempdir().unwrap();
        let (spool, _) = Spool::open(directory.path(), BOUND);
        let mut book = filled();
        let written = write(&spool, &mut book);
        let path = directory.path().join(name(1));
        let mut bytes = std::fs::read(&path).unwrap();
        let index = place * bytes.len() / 10_000;
        bytes[index] ^= 1 << bit;
        std::fs::write(&path, &bytes).unwrap();
        let (spool, kept) = Spool::open(directory.path(), BOUND);
        let records = waiting(&spool);
        prop_assert!(records.iter().all(|record| written.contains(record)));
        let missing = (written.len() - records.len()) as u64;
        prop_assert!(kept.lost >= missing, "{} of {missing}", kept.lost);
        prop_assert!(kept.damaged || kept.accounts.len() == 2);
        prop_assert!(kept.damaged || kept.lost > 0, "nothing of it was noticed");
    }
}
