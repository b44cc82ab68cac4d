//! The name of one lab on this machine, and where its files lie.
//!
//! Everything a lab makes carries the name: namespaces (`sd-NAME-…`), state
//! (`/run/spindrift/NAME`), data (`/var/lib/spindrift/NAME`). Two instances
//! share nothing but the build cache, so a test's lab runs beside a live demo.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// One to sixteen of `a-z`, `0-9` and `-`, starting with a letter: it becomes
/// part of namespace names, paths and the node's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceName(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "instance name {0:?} is not one to sixteen of a-z, 0-9 and '-' that starts with a letter and does not end with '-'"
)]
pub struct InvalidInstanceName(String);

impl InstanceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InstanceName {
    type Err = InvalidInstanceName;

    fn from_str(name: &str) -> Result<Self, InvalidInstanceName> {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let valid = (1..=16).contains(&name.len())
            && name.bytes().all(known)
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-');
        if valid {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidInstanceName(name.to_owned()))
        }
    }
}

impl TryFrom<String> for InstanceName {
    type Error = InvalidInstanceName;

    fn try_from(name: String) -> Result<Self, InvalidInstanceName> {
        name.parse()
    }
}

impl From<InstanceName> for String {
    fn from(name: InstanceName) -> Self {
        name.0
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const STATE: &str = "/run/spindrift";
const DATA: &str = "/var/lib/spindrift";

/// Where an instance's files lie.
#[derive(Clone, Debug)]
pub struct Layout {
    instance: InstanceName,
}

impl Layout {
    pub fn new(instance: InstanceName) -> Self {
        Self { instance }
    }

    /// Every instance that has left state or data on this machine.
    pub fn existing() -> Vec<InstanceName> {
        let mut names: Vec<InstanceName> = [STATE, DATA]
            .iter()
            .filter_map(|directory| std::fs::read_dir(directory).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    pub fn instance(&self) -> &InstanceName {
        &self.instance
    }

    /// What is lost at a reboot, and may be: sockets, credentials, logs.
    pub fn state(&self) -> PathBuf {
        Path::new(STATE).join(self.instance.as_str())
    }

    /// What wants a real disk: etcd's data, container images and snapshots.
    pub fn data(&self) -> PathBuf {
        Path::new(DATA).join(self.instance.as_str())
    }

    /// The cgroup of all pods of a host: the hosts of a machine share its hierarchies.
    pub fn host_cgroup(&self, host: &str) -> String {
        format!("spindrift-{}-{host}", self.instance)
    }

    /// Held by whoever changes the instance. Beside the state, not in it, so
    /// that it outlives `down`.
    pub fn lock(&self) -> PathBuf {
        Path::new(STATE).join(format!(".{}.lock", self.instance))
    }

    /// The options the instance was made with.
    pub fn record(&self) -> PathBuf {
        self.state().join("instance.json")
    }

    pub fn logs(&self) -> PathBuf {
        self.state().join("log")
    }

    pub fn components(&self) -> PathBuf {
        self.state().join("components")
    }

    pub fn pki(&self) -> PathBuf {
        self.state().join("pki")
    }

    pub fn bin(&self) -> PathBuf {
        self.state().join("bin")
    }

    /// For the user's own kubectl: reaches the API server by the relay.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state().join("kubeconfig")
    }

    /// The same, of the pool's own cell where the instance has one.
    pub fn cell_kubeconfig(&self) -> PathBuf {
        self.state().join("cell.kubeconfig")
    }

    /// Of one host of the pool.
    pub fn host_state(&self, host: &str) -> PathBuf {
        self.state().join(host)
    }

    pub fn host_data(&self, host: &str) -> PathBuf {
        self.data().join(host)
    }

    pub fn node_name(&self) -> String {
        format!("spindrift-{}", self.instance)
    }

    /// Of `lab` or of a host.
    pub fn namespace(&self, place: &str) -> String {
        format!("{}{place}", self.namespace_prefix())
    }

    /// No instance's prefix starts another's: the name is followed by `-`, and
    /// `down` compares what follows with the places an instance can have.
    pub fn namespace_prefix(&self) -> String {
        format!("sd-{}-", self.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_fits_into_paths_and_namespaces_is_taken() {
        for name in ["demo", "a", "e2e-1", "abcdefghijklmnop"] {
            assert_eq!(name.parse::<InstanceName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn a_name_that_could_leave_its_directory_or_namespace_is_refused() {
        for name in [
            "",
            "-",
            "1a",
            "a-",
            "A",
            "a/b",
            "..",
            "a b",
            "abcdefghijklmnopq",
            "a_b",
        ] {
            assert_eq!(
                name.parse::<InstanceName>(),
                Err(InvalidInstanceName(name.to_owned())),
                "{name:?}"
            );
        }
    }
}
