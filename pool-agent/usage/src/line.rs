//! A collector's JSON lines: one record a line, with its host, and after a batch's
//! records a line that says that the batch is whole. Records after the last such line
//! were never acknowledged, and count for nothing: their host hands them over again.
//!
//! ```text
//!  {"host":"host-a","tenant":"acme",…,"used_cpu_nanos":120934000,…}
//!  {"committed":{"host":"host-a","spool":"6f…","batch":42}}
//! ```

use std::io::{self, BufRead};

use pool_agent_api::HostName;
use serde::{Deserialize, Serialize};

use crate::record::Record;

/// A line is far shorter: names are bounded.
const LONGEST_LINE: usize = 64 * 1024;
/// Of a batch: more than a message has room for.
const LARGEST_BATCH: usize = 100_000;

/// Up to which batch a host's records are here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    pub host: String,
    pub spool: String,
    pub batch: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    pub host: String,
    #[serde(flatten)]
    pub record: Record,
}

#[derive(Serialize, Deserialize)]
struct Mark {
    committed: Committed,
}

#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("reading")]
    Read(#[source] io::Error),
    #[error("line {number}: {problem}")]
    Bad { number: u64, problem: String },
}

/// A batch as lines, whole.
pub fn write(host: &HostName, spool: &str, batch: u64, records: &[Record]) -> serde_json::Result<Vec<u8>> {
    let mut bytes = vec![];
    for record in records {
        let line = HostRecord {
            host: host.into(),
            record: record.clone(),
        };
        serde_json::to_writer(&mut bytes, &line)?;
        bytes.push(b'\n');
    }
    bytes.extend(write_mark(&Committed {
        host: host.into(),
        spool: spool.to_owned(),
        batch,
    })?);
    Ok(bytes)
}

pub fn write_mark(committed: &Committed) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&Mark {
        committed: committed.clone(),
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads a file batch by batch; `each` is told of every whole one. Answers with how many
/// bytes of whole batches there are. What comes after them, torn or not, is not looked at.
pub fn read(
    mut from: impl BufRead,
    mut each: impl FnMut(&Committed, Vec<HostRecord>),
) -> Result<u64, LineError> {
    let (mut number, mut at, mut whole) = (0, 0, 0);
    let mut batch = vec![];
    // What is bad is an error only once something whole comes after it.
    let mut bad: Option<LineError> = None;
    let mut line = vec![];
    loop {
        line.clear();
        let limit = LONGEST_LINE as u64 + 1;
        let read = io::Read::take(&mut from, limit)
            .read_until(b'\n', &mut line)
            .map_err(LineError::Read)?;
        if read == 0 || line.last() != Some(&b'\n') && read as u64 != limit {
            return Ok(whole);
        }
        number += 1;
        at += read as u64;
        let problem = |problem: &dyn std::fmt::Display| LineError::Bad {
            number,
            problem: problem.to_string(),
        };
        if line.last() != Some(&b'\n') || batch.len() == LARGEST_BATCH {
            return Err(bad.unwrap_or_else(|| problem(&"is longer, or its batch larger, than any of ours")));
        }
        if line.starts_with(b"{\"committed\":") {
            let mark: Mark = serde_json::from_slice(&line).map_err(|e| problem(&e))?;
            if let Some(bad) = bad {
                return Err(bad);
            }
            each(&mark.committed, std::mem::take(&mut batch));
            whole = at;
            continue;
        }
        match serde_json::from_slice::<HostRecord>(&line) {
            Ok(record) => batch.push(record),
            Err(error) => bad = bad.or(Some(problem(&error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::sample;

    fn batch(number: u64) -> Vec<u8> {
        let host = "host-a".parse().unwrap();
        write(
            &host,
            "spool",
            number,
            &[sample("acme", "u", number), sample("acme", "v", number)],
        )
        .unwrap()
    }

    fn count(bytes: &[u8]) -> Result<(u64, Vec<(u64, usize)>), String> {
        let mut seen = vec![];
        let whole = read(bytes, |committed, records| {
            seen.push((committed.batch, records.len()))
        });
        whole.map(|whole| (whole, seen)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_batch_counts_once_it_is_whole() {
        let (first, second) = (batch(1), batch(2));
        let both = [first.clone(), second.clone()].concat();
        assert_eq!(count(&both), Ok((both.len() as u64, vec![(1, 2), (2, 2)])));
        // Torn anywhere.
        for cut in first.len()..both.len() {
            assert_eq!(
                count(&both[..cut]),
                Ok((first.len() as u64, vec![(1, 2)])),
                "{cut}"
            );
        }
    }

    #[test]
    fn a_bad_line_before_a_whole_batch_is_told_by_its_number() {
        let first = batch(1);
        let bad = [
            &first[..],
            b"{\"host\":\"host-a\",\"tenant\":\"..\"}\n",
            &batch(2),
        ]
        .concat();
        let error = count(&bad).unwrap_err();
        assert!(error.starts_with("line 4: "), "{error}");
        let long = [&first[..], &vec![b'x'; LONGEST_LINE + 1], b"\n"].concat();
        assert!(count(&long).unwrap_err().starts_with("line 4: "));
    }
}
