//! Records as JSON lines, in files that follow each other: `usage-000001.jsonl`, ….
//! The format is [`pool_usage::line`]'s.
//!
//! What always holds:
//! - a batch is fsync'd, records and mark, before it is answered; a write that failed or
//!   was cut off is cut away before the next one;
//! - each file begins with the marks of every host, so that the newest alone says what
//!   is here; a batch that is here is not written again.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufReader, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use pool_usage::line::{self, Committed, LineError};

use super::Handed;

/// Hosts whose last batch is remembered, those heard of last. A host sends one batch
/// again, at once; one that others have pushed out is gone.
const HOSTS: usize = 100_000;
const NEW: &str = "new";

#[derive(Debug, thiserror::Error)]
pub(crate) enum LinesError {
    #[error("{doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is damaged: restore it, or move it away once its sums are made", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: LineError,
    },
    #[error("writing a record as JSON")]
    Json(#[from] serde_json::Error),
}

pub(crate) struct JsonLines {
    directory: PathBuf,
    rotate_bytes: u64,
    number: u64,
    path: PathBuf,
    file: File,
    /// Bytes of whole batches, and bytes that may be there.
    good: u64,
    written: u64,
    /// By host: its last mark, and when it came, counted.
    marks: HashMap<String, (u64, Committed)>,
    counted: u64,
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LinesError {
    let path = path.to_owned();
    move |source| LinesError::Io { doing, path, source }
}

impl JsonLines {
    pub(crate) fn open(directory: &Path, rotate_bytes: u64) -> Result<Self, LinesError> {
        std::fs::create_dir_all(directory).map_err(failed("making", directory))?;
        let mut number = 0;
        for entry in std::fs::read_dir(directory).map_err(failed("reading", directory))? {
            let name = entry.map_err(failed("reading", directory))?.file_name();
            number = number.max(name.to_str().and_then(number_of).unwrap_or(0));
        }
        let mut marks = HashMap::new();
        if number == 0 {
            return Self::begin(directory, rotate_bytes, 1, marks, 0);
        }
        let path = directory.join(name(number));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed("opening", &path))?;
        let mut counted = 0;
        let good = line::read(BufReader::new(&file), |mark, _| {
            counted += 1;
            marks.insert(mark.host.clone(), (counted, mark.clone()));
        });
        let good = good.map_err(|source| LinesError::Damaged {
            path: path.clone(),
            source,
        })?;
        let written = file.metadata().map_err(failed("reading", &path))?.len();
        Ok(Self {
            directory: directory.to_owned(),
            rotate_bytes,
            number,
            path,
            file,
            good,
            written,
            marks,
            counted,
        })
    }

    /// A file that is there with the marks, or not there.
    fn begin(
        directory: &Path,
        rotate_bytes: u64,
        number: u64,
        mut marks: HashMap<String, (u64, Committed)>,
        counted: u64,
    ) -> Result<Self, LinesError> {
        if marks.len() > HOSTS {
            let mut order: Vec<u64> = marks.values().map(|(at, _)| *at).collect();
            order.sort_unstable();
            let oldest = order[order.len() - HOSTS];
            marks.retain(|_, (at, _)| *at >= oldest);
        }
        let path = directory.join(name(number));
        let beside = path.with_extension(NEW);
        let mut bytes = vec![];
        let mut in_order: Vec<_> = marks.values().collect();
        in_order.sort_by_key(|(at, _)| *at);
        for (_, mark) in in_order {
            bytes.extend(line::write_mark(mark)?);
        }
        let made = File::create(&beside).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)?;
            File::open(directory)?.sync_all()?;
            Ok(file)
        });
        let good = bytes.len() as u64;
        Ok(Self {
            directory: directory.to_owned(),
            rotate_bytes,
            number,
            file: made.map_err(failed("making", &path))?,
            path,
            good,
            written: good,
            marks,
            counted,
        })
    }

    pub(crate) fn put(&mut self, handed: &Handed) -> Result<(), LinesError> {
        let host = handed.host.as_str();
        if let Some((_, mark)) = self.marks.get(host)
            && mark.spool == handed.spool
            && handed.batch <= mark.batch
        {
            return Ok(());
        }
        if self.good >= self.rotate_bytes {
            *self = Self::begin(
                &self.directory,
                self.rotate_bytes,
                self.number + 1,
                self.marks.clone(),
                self.counted,
            )?;
        }
        let bytes = line::write(&handed.host, &handed.spool, handed.batch, &handed.records)?;
        self.append(&bytes).map_err(failed("writing", &self.path))?;
        self.counted += 1;
        let mark = Committed {
            host: host.to_owned(),
            spool: handed.spool.clone(),
            batch: handed.batch,
        };
        self.marks.insert(mark.host.clone(), (self.counted, mark));
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written != self.good {
            self.file.set_len(self.good)?;
            self.file.sync_all()?;
            self.written = self.good;
        }
        let end = self.good + bytes.len() as u64;
        self.written = end;
        self.file.write_all_at(bytes, self.good)?;
        self.file.sync_data()?;
        self.good = end;
        Ok(())
    }
}

fn name(number: u64) -> String {
    format!("usage-{number:06}.jsonl")
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix("usage-")?.strip_suffix(".jsonl")?.parse().ok()
}

#[cfg(test)]
mod tests;
