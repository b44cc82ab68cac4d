//! One entry of CRI's log format (the CRI proposal "kubelet-cri-logging"):
//!
//! ```text
//! 2026-11-23T12:00:00.123456789Z stdout F the line
//! 2026-11-23T12:00:00.123456789Z stderr P a piece of a line that goes on
//! ```

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

/// The runtime cuts lines at 16 KiB; a longer entry is passed on in pieces.
const LONGEST: usize = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub time: &'a str,
    pub partial: bool,
    pub content: &'a [u8],
}

/// None for what is not an entry.
pub(super) fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |&b| b == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = parts.next()?;
    if !matches!(stream, b"stdout" | b"stderr") {
        return None;
    }
    let tags = parts.next()?;
    Some(Entry {
        time,
        // The first of the tags, which are separated by colons.
        partial: tags.split(|&b| b == b':').next()? == b"P",
        content: parts.next().unwrap_or_default(),
    })
}

/// Turns the raw bytes of a log into what a reader is shown.
#[derive(Debug)]
pub(super) struct Writer {
    timestamps: bool,
    since: Option<Timestamp>,
    /// Bytes that may still be shown.
    left: u64,
    pending: BytesMut,
    out: BytesMut,
    /// The next entry begins a line.
    at_start: bool,
}

impl Writer {
    pub(super) fn new(timestamps: bool, since: Option<Timestamp>, limit: Option<u64>) -> Self {
        Self {
            timestamps,
            since,
            left: limit.unwrap_or(u64::MAX),
            pending: BytesMut::new(),
            out: BytesMut::new(),
            at_start: true,
        }
    }

    /// True: nothing more will be shown.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        self.pending.extend_from_slice(bytes);
        while let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
            let mut line = self.pending.split_to(end + 1);
            line.truncate(end);
            self.write(&line);
        }
        if self.pending.len() > LONGEST {
            let line = self.pending.split();
            self.write(&line);
        }
        self.left == 0
    }

    /// The file has ended: what has no newline yet is shown as it is.
    pub(super) fn finish(&mut self) {
        if !self.pending.is_empty() {
            let line = self.pending.split();
            self.write(&line);
        }
    }

    pub(super) fn take(&mut self) -> Bytes {
        self.out.split().freeze()
    }

    fn write(&mut self, line: &[u8]) {
        let Some(entry) = parse(line) else {
            return;
        };
        if let Some(since) = self.since
            && entry.time.parse::<Timestamp>().is_ok_and(|at| at < since)
        {
            return;
        }
        if self.timestamps && self.at_start {
            self.show(entry.time.as_bytes());
            self.show(b" ");
        }
        self.show(entry.content);
        if !entry.partial {
            self.show(b"\n");
        }
        self.at_start = !entry.partial;
    }

    fn show(&mut self, bytes: &[u8]) {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        self.out.extend_from_slice(&bytes[..room]);
        self.left -= room as u64;
    }
}
