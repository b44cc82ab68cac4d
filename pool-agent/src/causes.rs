//! Errors in one line, for those who are told of them and cannot see their sources.

/// Bytes of one line at most. It ends in a gRPC status, which is a header: a peer that
/// is sent a longer one breaks the connection off, and hears of nothing. (The kernel
/// explains why it refuses a program in a megabyte.)
const LONGEST: usize = 4096;

/// An error with all its causes.
pub(crate) fn described(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    bounded(text)
}

/// Its beginning and its end, which say most.
fn bounded(text: String) -> String {
    if text.len() <= LONGEST {
        return text;
    }
    let half = LONGEST / 2 - 8;
    let (head, tail) = (
        text.floor_char_boundary(half),
        text.ceil_char_boundary(text.len() - half),
    );
    format!("{} [...] {}", &text[..head], &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_bounded_and_keeps_its_beginning_and_end() {
        assert_eq!(described(&std::io::Error::other("short")), "short");
        let long = format!("first {} last", "ä".repeat(LONGEST));
        let told = described(&std::io::Error::other(long));
        assert!(told.len() <= LONGEST && told.starts_with("first ") && told.ends_with(" last"));
    }
}
