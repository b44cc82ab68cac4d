//! Where the last lines of a log begin, found from its end.

use std::io::{self, Read, Seek, SeekFrom};

use super::line::parse;

const BLOCK: u64 = 64 << 10;

/// The offset at which the last `lines` lines begin. A line may be of many
/// entries: it ends with the one that is not partial.
pub(super) fn start_of(file: &mut (impl Read + Seek), length: u64, lines: u64) -> io::Result<u64> {
    if lines == 0 {
        return Ok(length);
    }
    // Lines whose end has been passed on the way back, and where the entry after the
    // one being looked at begins.
    let mut seen = 0;
    let mut start = length;
    // Bytes from `at` on, up to the beginning of the entry after.
    let mut held: Vec<u8> = vec![];
    let mut at = length;
    while at > 0 {
        let size = at.min(BLOCK);
        at -= size;
        let mut block = vec![0; usize::try_from(size).unwrap_or_default()];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut block)?;
        block.append(&mut held);
        held = block;
        // Every entry that begins within what is held: after a newline, or at 0.
        loop {
            let body = match held.split_last() {
                Some((b'\n', body)) => body,
                // The last entry may be without its newline.
                _ => &held[..],
            };
            let begin = match body.iter().rposition(|&b| b == b'\n') {
                Some(newline) => newline + 1,
                None if at == 0 => 0,
                None => break,
            };
            if body.is_empty() && begin == 0 {
                break;
            }
            let partial = parse(&body[begin..]).is_some_and(|entry| entry.partial);
            let last_of_file = start == length;
            if !partial || last_of_file {
                if seen == lines {
                    return Ok(start);
                }
                seen += 1;
            }
            start = at + begin as u64;
            held.truncate(begin);
            if begin == 0 {
                break;
            }
        }
    }
    Ok(0)
}
