//! Until when a pod may send and be sent to, by the clock that the kernel programs
//! read: it goes on while the machine is suspended, and no clock's correction moves it.

use std::{ops::Add, time::Duration};

use super::abi::NO_DEADLINE;

/// Time since the machine's boot, `CLOCK_BOOTTIME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(Duration);

impl BootTime {
    pub fn now() -> Self {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` outlives the call, which writes it and nothing else.
        let read = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        // Every Linux that has tcx has the clock. Without it everything is over.
        let seconds = u64::try_from(time.tv_sec).unwrap_or(u64::MAX);
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
        match read {
            0 => Self(Duration::new(seconds, nanoseconds)),
            _ => Self(Duration::MAX),
        }
    }

    pub const fn since_boot(time: Duration) -> Self {
        Self(time)
    }

    /// Zero if `earlier` is not.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

/// [`Deadline::Never`] is later than any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deadline {
    At(BootTime),
    Never,
}

impl Deadline {
    pub fn has_passed(self, now: BootTime) -> bool {
        match self {
            Self::At(at) => at < now,
            Self::Never => false,
        }
    }

    /// As the kernel's map has it.
    pub(super) fn to_kernel(self) -> u64 {
        match self {
            // 584 years; what is later is not never.
            Self::At(BootTime(at)) => u64::try_from(at.as_nanos())
                .unwrap_or(NO_DEADLINE)
                .min(NO_DEADLINE - 1),
            Self::Never => NO_DEADLINE,
        }
    }

    pub(super) fn of_kernel(nanoseconds: u64) -> Self {
        match nanoseconds {
            NO_DEADLINE => Self::Never,
            at => Self::At(BootTime(Duration::from_nanos(at))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_what_it_reads_back_and_no_time_is_never() {
        for at in [0, 1, 1 << 40, u64::MAX - 1] {
            let deadline = Deadline::At(BootTime(Duration::from_nanos(at)));
            assert_eq!(deadline.to_kernel(), at);
            assert_eq!(Deadline::of_kernel(at), deadline);
            assert!(deadline < Deadline::Never);
        }
        assert_eq!(Deadline::of_kernel(Deadline::Never.to_kernel()), Deadline::Never);
        let far = Deadline::At(BootTime(Duration::MAX));
        assert_ne!(Deadline::of_kernel(far.to_kernel()), Deadline::Never);
    }

    #[test]
    fn the_clock_goes_on() {
        let before = BootTime::now();
        assert!(before > BootTime::since_boot(Duration::ZERO));
        assert!(BootTime::now() >= before);
    }
}
