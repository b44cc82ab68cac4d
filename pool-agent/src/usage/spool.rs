//! The records of this host on its disk, until the collector has them. A directory of
//! batches; each is a file with the batch's records and the accounts as they stand
//! after them, so that neither is ever durable without the other.
//!
//! ```text
//!  state_dir/usage/00000000000000000041   records the collector does not have yet
//!  state_dir/usage/00000000000000000042   the newest: its accounts are the ones that count
//! ```
//!
//! What always holds:
//! - a batch is there whole or not at all: it is written beside, fsync'd, and renamed;
//! - the newest one stays, taken or not; of the others those that hold records that the
//!   collector has not;
//! - a line is `<checksum> <JSON>`; one that does not read is a record that is lost, or
//!   an account that is begun anew, and is counted.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pool_usage::{Book, Record, account::Account};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::ledger::checksum;

/// Of a batch that is being written.
const NEW: &str = "new";
/// Of one that does not read at all: for a person to look at.
const DAMAGED: &str = "damaged";

#[derive(Debug, thiserror::Error)]
#[error("{doing} {}", path.display())]
pub(super) struct SpoolError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What an earlier agent kept.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) accounts: Vec<Account>,
    pub(super) boot_id: String,
    /// Records lost, with those that were found damaged just now.
    pub(super) lost: u64,
    /// Accounts may be missing.
    pub(super) damaged: bool,
}

/// Written by one thread, read by the courier. Cheap to clone.
#[derive(Clone)]
pub(super) struct Spool {
    inner: Arc<Inner>,
}

struct Inner {
    directory: PathBuf,
    /// Tells a collector this spool's batches from those of one before.
    id: String,
    bound: u64,
    shelf: Mutex<Shelf>,
    /// The number of the newest batch.
    written: watch::Sender<u64>,
}

#[derive(Default)]
struct Shelf {
    newest: u64,
    batches: BTreeMap<u64, Batch>,
}

struct Batch {
    bytes: u64,
    /// It has records that the collector has not.
    waits: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Batch {
        spool: String,
        boot_id: String,
        lost: u64,
        accounts: usize,
        records: usize,
    },
    Account(Box<Account>),
    Record(Box<Record>),
}

/// A file, as far as it reads.
#[derive(Default)]
struct Contents {
    spool: Option<String>,
    boot_id: String,
    lost: u64,
    accounts: Vec<Account>,
    records: Vec<Record>,
    /// Lines that do not read or are not there.
    missing_accounts: usize,
    missing_records: usize,
}

impl Spool {
    /// Whatever the directory is like, there is a spool; what cannot be read is lost, and
    /// said to be.
    pub(super) fn open(directory: &Path, bound: u64) -> (Self, Kept) {
        let (shelf, id, kept) = match read_all(directory) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(
                    error = crate::causes::described(&error),
                    "the records of usage cannot be read"
                );
                let kept = Kept {
                    damaged: true,
                    ..Kept::default()
                };
                (Shelf::default(), None, kept)
            }
        };
        let inner = Inner {
            directory: directory.to_owned(),
            id: id.unwrap_or_else(new_id),
            bound,
            written: watch::Sender::new(shelf.newest),
            shelf: Mutex::new(shelf),
        };
        let spool = Self {
            inner: Arc::new(inner),
        };
        (spool, kept)
    }

    pub(super) fn id(&self) -> &str {
        &self.inner.id
    }

    /// Tells of each batch that is written.
    pub(super) fn written(&self) -> watch::Receiver<u64> {
        self.inner.written.subscribe()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.shelf().batches.values().map(|batch| batch.bytes).sum()
    }

    /// Whether more records may be put here.
    pub(super) fn has_room(&self) -> bool {
        self.bytes() < self.inner.bound
    }

    /// On disk when it returns, accounts and records, or neither.
    pub(super) fn write(&self, book: &Book, records: &[Record]) -> Result<(), SpoolError> {
        let number = self.shelf().newest + 1;
        let directory = &self.inner.directory;
        let path = directory.join(name(number));
        let accounts = book.accounts();
        let mut bytes = encode(&Line::Batch {
            spool: self.inner.id.clone(),
            boot_id: book.boot_id().to_owned(),
            lost: book.lost(),
            accounts: accounts.len(),
            records: records.len(),
        });
        for account in accounts {
            bytes.extend(encode(&Line::Account(Box::new(account.clone()))));
        }
        for record in records {
            bytes.extend(encode(&Line::Record(Box::new(record.clone()))));
        }
        let beside = path.with_extension(NEW);
        let written = std::fs::create_dir_all(directory)
            .and_then(|()| File::create(&beside))
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&beside, &path))
            .and_then(|()| File::open(directory)?.sync_all());
        if let Err(source) = written {
            // It takes what room there is. What is not there need not go.
            for path in [&beside, &path] {
                std::fs::remove_file(path).ok();
            }
            return Err(SpoolError {
                doing: "writing",
                path,
                source,
            });
        }
        let gone: Vec<u64> = {
            let shelf = &mut *self.shelf();
            shelf.newest = number;
            let gone = shelf.batches.extract_if(.., |_, batch| !batch.waits);
            let gone = gone.map(|(number, _)| number).collect();
            let batch = Batch {
                bytes: bytes.len() as u64,
                waits: !records.is_empty(),
            };
            shelf.batches.insert(number, batch);
            gone
        };
        for number in gone {
            self.remove(number);
        }
        self.inner.written.send_replace(number);
        Ok(())
    }

    /// The oldest batch that the collector has not.
    pub(super) fn oldest(&self) -> Option<u64> {
        let shelf = self.shelf();
        let mut waiting = shelf.batches.iter().filter(|(_, batch)| batch.waits);
        waiting.next().map(|(number, _)| *number)
    }

    /// A batch's records, as far as they read.
    pub(super) fn records(&self, number: u64) -> Result<Vec<Record>, SpoolError> {
        let path = self.inner.directory.join(name(number));
        let bytes = std::fs::read(&path).map_err(|source| SpoolError {
            doing: "reading",
            path,
            source,
        })?;
        Ok(Contents::of(&bytes).records)
    }

    /// The collector has it.
    pub(super) fn taken(&self, number: u64) {
        let gone = {
            let shelf = &mut *self.shelf();
            if let Some(batch) = shelf.batches.get_mut(&number) {
                batch.waits = false;
            }
            // The newest has the accounts.
            number != shelf.newest && shelf.batches.remove(&number).is_some()
        };
        if gone {
            self.remove(number);
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // It is changed whole.
        self.inner.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, number: u64) {
        let path = self.inner.directory.join(name(number));
        if let Err(error) = std::fs::remove_file(&path) {
            // The next agent hands it over again, which changes nothing.
            tracing::warn!(path = %path.display(), error = %error, "a batch of usage records stays");
        }
    }
}

fn name(number: u64) -> String {
    format!("{number:020}")
}

fn new_id() -> String {
    let kernels = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    match kernels {
        Ok(id) => id.trim().to_owned(),
        // Two spools of one host are not begun at one instant.
        Err(_) => format!("{}", jiff::Timestamp::now().as_nanosecond()),
    }
}

fn read_all(directory: &Path) -> Result<(Shelf, Option<String>, Kept), SpoolError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| SpoolError { doing, path, source }
    };
    let (mut shelf, mut kept, mut id) = (Shelf::default(), Kept::default(), None);
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((shelf, None, kept)),
        Err(error) => return Err(failed("reading", directory)(error)),
    };
    let mut numbers = vec![];
    for entry in entries {
        let entry = entry.map_err(failed("reading", directory))?;
        let name = entry.file_name();
        if entry.path().extension().is_some_and(|extension| extension == NEW) {
            // It was never acknowledged to anybody.
            std::fs::remove_file(entry.path()).map_err(failed("removing", &entry.path()))?;
        }
        numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    for number in numbers {
        let path = directory.join(name(number));
        let bytes = std::fs::read(&path).map_err(failed("reading", &path))?;
        let contents = Contents::of(&bytes);
        let newest = &mut shelf.newest;
        *newest = number.max(*newest);
        // Of each file on the way to the newest, which counts what the others lost too.
        let damaged_records = contents.missing_records as u64;
        if damaged_records > 0 || contents.missing_accounts > 0 {
            tracing::error!(
                path = %path.display(), records = contents.missing_records, accounts = contents.missing_accounts,
                "records of usage are damaged"
            );
        }
        kept.lost = kept.lost.max(contents.lost) + damaged_records;
        kept.damaged = contents.spool.is_none() || contents.missing_accounts > 0;
        kept.boot_id = contents.boot_id;
        kept.accounts = contents.accounts;
        let batch = Batch {
            bytes: bytes.len() as u64,
            waits: !contents.records.is_empty(),
        };
        // What reads of it is handed over all the same.
        if contents.spool.is_none() && !batch.waits {
            let aside = path.with_extension(DAMAGED);
            std::fs::rename(&path, &aside).map_err(failed("putting aside", &path))?;
            continue;
        }
        id = contents.spool.or(id);
        shelf.batches.insert(number, batch);
    }
    Ok((shelf, id, kept))
}

fn encode(line: &Line) -> Vec<u8> {
    // Strings and numbers: this cannot fail; an empty line would read as damage.
    let json = serde_json::to_string(line).unwrap_or_default();
    format!("{} {json}\n", checksum(&json)).into_bytes()
}

fn decode(line: &[u8]) -> Option<Line> {
    let (sum, json) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    (sum == checksum(json)).then(|| serde_json::from_str(json).ok())?
}

impl Contents {
    fn of(bytes: &[u8]) -> Self {
        let mut contents = Self::default();
        let (mut accounts, mut records, mut unread) = (0, 0, 0);
        for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match decode(line) {
                Some(Line::Batch {
                    spool,
                    boot_id,
                    lost,
                    accounts: a,
                    records: r,
                }) => {
                    contents.spool = Some(spool);
                    contents.boot_id = boot_id;
                    contents.lost = lost;
                    (accounts, records) = (a, r);
                }
                Some(Line::Account(account)) => contents.accounts.push(*account),
                Some(Line::Record(record)) => contents.records.push(*record),
                None => unread += 1,
            }
        }
        if contents.spool.is_none() {
            // Nobody knows how many there were, or of which boot.
            contents.missing_records = unread;
            contents.missing_accounts = unread.max(contents.accounts.len());
            contents.accounts.clear();
        } else {
            contents.missing_accounts = accounts.saturating_sub(contents.accounts.len());
            contents.missing_records = records.saturating_sub(contents.records.len());
        }
        contents
    }
}

#[cfg(test)]
mod tests;
