//! How many descriptors this process may have: raised to what the kernel gives.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Of the whole system: what RLIMIT_NOFILE cannot go beyond.
const NR_OPEN: &str = "/proc/sys/fs/nr_open";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raised {
    pub before: u64,
    /// What holds now.
    pub limit: u64,
}

/// Raises the limit as far as this process can: to `fs.nr_open` with
/// CAP_SYS_RESOURCE, else to the hard limit. To be called before anything is served.
pub fn raise() -> io::Result<Raised> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = std::fs::read_to_string(NR_OPEN)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(hard)
        .max(hard);
    // Only who has the capability may raise the hard limit; there is no better way to
    // know than to try.
    let limit = if setrlimit(Resource::RLIMIT_NOFILE, most, most).is_ok() {
        most
    } else {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        hard
    };
    Ok(Raised { before: soft, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_the_hard_one_at_least() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(256), hard).unwrap();
        let raised = raise().unwrap();
        assert_eq!(raised.before, hard.min(256));
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, raised.limit);
        assert!(soft >= hard);
    }
}
