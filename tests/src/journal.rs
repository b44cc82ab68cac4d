//! What the components of a lab have logged, from a moment on.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
};

use spindrift_local::{Lab, Layout, component::Component};

/// Ours; the others' logs are shown when something fails, but promise nothing.
fn is_ours(component: &Component) -> bool {
    component.name == "virtual-node" || component.name.starts_with("pool-agent@")
}

/// A place in each component's log.
#[derive(Clone, Debug)]
pub struct Mark {
    logs: Vec<(String, PathBuf, u64)>,
}

impl Mark {
    /// The end of each log as it is now.
    pub fn now(lab: &Lab) -> Self {
        Self::at(lab, |log| std::fs::metadata(log).map_or(0, |known| known.len()))
    }

    pub fn beginning(lab: &Lab) -> Self {
        Self::at(lab, |_| 0)
    }

    fn at(lab: &Lab, place: impl Fn(&PathBuf) -> u64) -> Self {
        let layout: &Layout = lab.layout();
        let ours = Component::all(layout).into_iter().filter(is_ours);
        let logs = ours.map(|component| {
            let log = component.log(layout);
            let place = place(&log);
            (component.name, log, place)
        });
        Self { logs: logs.collect() }
    }

    /// The lines that a component has logged since, its colours removed.
    pub fn since(&self, component: &str) -> std::io::Result<Vec<String>> {
        let mut lines = Vec::new();
        for (_, log, place) in self.logs.iter().filter(|(name, ..)| name == component) {
            let mut file = File::open(log)?;
            file.seek(SeekFrom::Start(*place))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            lines.extend(plain(&String::from_utf8_lossy(&bytes)).lines().map(str::to_owned));
        }
        Ok(lines)
    }

    /// The lines of all our components, each after its component's name.
    pub fn all(&self) -> std::io::Result<Vec<String>> {
        let mut lines = Vec::new();
        for (name, ..) in &self.logs {
            lines.extend(
                self.since(name)?
                    .into_iter()
                    .map(|line| format!("{name}: {line}")),
            );
        }
        Ok(lines)
    }
}

/// Without the terminal's escape sequences.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\x1b[") {
        plain.push_str(&rest[..at]);
        let sequence = &rest[at + 2..];
        let end = sequence.find(|c: char| c.is_ascii_alphabetic());
        rest = end.map_or("", |end| &sequence[end + 1..]);
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_without_its_colours() {
        assert_eq!(plain("a\x1b[2mb\x1b[0m\x1b[38;5;1mc\nd"), "abc\nd");
        assert_eq!(plain("cut off \x1b[3"), "cut off ");
    }
}
