//! The lab's own processes, and what the kernel counts of them.

use std::time::Duration;

use anyhow::{Context, Result};
use spindrift_local::{Lab, node, pool::agent_name, process::Process, topology::Host};

pub(crate) fn agent(lab: &Lab, host: &Host) -> Result<Process> {
    running(lab, &agent_name(host))
}

pub(crate) fn virtual_node(lab: &Lab) -> Result<Process> {
    running(lab, node::COMPONENT)
}

fn running(lab: &Lab, component: &str) -> Result<Process> {
    let process = lab.component(component)?.process(lab.layout());
    process.with_context(|| format!("{component} does not run"))
}

/// Processor time in user and kernel mode together, all threads, in steps of
/// 10 ms.
pub(crate) fn cpu(process: &Process) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).ok()?;
    Some(Duration::from_millis(ticks(&stat)? * 10))
}

/// Resident memory in megabytes (10⁶ bytes).
pub(crate) fn megabytes(process: &Process) -> Option<f64> {
    Some(process.resident()? as f64 / 1e6)
}

/// Fields 14 and 15 of proc_pid_stat(5), in hundredths of a second. The
/// command's name, in parentheses, may hold anything, so counting starts after
/// the last one.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_kernel_time_are_added_whatever_the_process_is_called() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 30 12 99 99";
        for name in ["sleep", "a) b (c"] {
            assert_eq!(ticks(&format!("7 ({name}) {fields}")), Some(42));
        }
        assert_eq!(ticks("7 (x) S 1"), None);
    }

    #[test]
    fn this_process_has_spent_some() {
        let own = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(cpu(&own).is_some() && megabytes(&own).is_some_and(|megabytes| megabytes > 0.1));
    }
}
