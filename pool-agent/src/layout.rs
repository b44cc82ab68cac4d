//! Where things are on this host's disk. Names come from ids that are safe as
//! file names (pool-agent-api says so), so no path here can be led elsewhere.
//!
//! ```text
//! state_dir/cell/                         this host's identity in the cell (0600)
//! state_dir/ledger                        what was admitted and what ended
//! state_dir/images/                       who may use which image
//! state_dir/usage/                        what pods used, until the collector has it
//! state_dir/sandboxes/<uid>-<attempt>/    logs/<container>/<restart>.log, volumes/<name>
//! run_dir/sandboxes/<uid>-<attempt>/      spec (0600), status, subpaths/
//!     given/ (tmpfs)                      hosts, hostname, resolv.conf, messages/
//!     memory/, emptydirs/<name> (tmpfs)   sensitive file volumes, emptyDirs in memory
//! run_dir/routers/<tenant>                the tenant's network namespace, bind-mounted
//! ```

use std::path::{Path, PathBuf};

use pool_agent_api::{ContainerName, PodUid, SandboxKey, TenantId, VolumeName};

#[derive(Debug, Clone)]
pub struct Layout {
    state: PathBuf,
    run: PathBuf,
}

impl Layout {
    pub fn new(state: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Self {
        Self {
            state: state.into(),
            run: run.into(),
        }
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    pub fn ledger(&self) -> PathBuf {
        self.state.join("ledger")
    }

    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    pub fn usage(&self) -> PathBuf {
        self.state.join("usage")
    }

    pub fn cell(&self) -> PathBuf {
        self.state.join("cell")
    }

    pub fn router(&self, tenant: &TenantId) -> PathBuf {
        self.run.join("routers").join(tenant.as_str())
    }

    pub fn routers(&self) -> PathBuf {
        self.run.join("routers")
    }

    /// Directories of all sandboxes, on disk and in memory.
    pub fn roots(&self) -> [PathBuf; 2] {
        [self.state.join("sandboxes"), self.run.join("sandboxes")]
    }

    pub fn sandbox(&self, key: &SandboxKey) -> SandboxDirs {
        let name = format!("{}-{}", key.pod, key.attempt);
        let [disk, run] = self.roots();
        SandboxDirs {
            disk: disk.join(&name),
            run: run.join(&name),
        }
    }

    /// The key a sandbox's directory is named after.
    pub fn key_of(name: &str) -> Option<SandboxKey> {
        let (uid, attempt) = name.rsplit_once('-')?;
        Some(SandboxKey {
            pod: PodUid::parse("name", uid).ok()?,
            attempt: pool_agent_api::Attempt::parse("name", attempt.parse().ok()?).ok()?,
        })
    }
}

/// The two directories of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxDirs {
    disk: PathBuf,
    run: PathBuf,
}

impl SandboxDirs {
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The whole spec, secrets included.
    pub fn spec(&self) -> PathBuf {
        self.run.join("spec")
    }

    /// The last status, so that an agent that starts again reports no less than
    /// the one before it.
    pub fn status(&self) -> PathBuf {
        self.run.join("status")
    }

    /// The pod's tmpfs for what its containers write on the host's behalf.
    pub fn given(&self) -> PathBuf {
        self.run.join("given")
    }

    pub fn hosts(&self) -> PathBuf {
        self.given().join("hosts")
    }

    pub fn hostname(&self) -> PathBuf {
        self.given().join("hostname")
    }

    pub fn resolver(&self) -> PathBuf {
        self.given().join("resolv.conf")
    }

    /// In [`Self::given`].
    pub const MESSAGES: &str = "messages";

    /// Where the last words of one run of a container are written.
    pub fn message(&self, container: &ContainerName, restart: u32) -> PathBuf {
        self.messages().join(Self::message_name(container, restart))
    }

    pub fn messages(&self) -> PathBuf {
        self.given().join(Self::MESSAGES)
    }

    pub fn message_name(container: &ContainerName, restart: u32) -> String {
        format!("{container}-{restart}")
    }

    pub fn logs(&self) -> PathBuf {
        self.disk.join("logs")
    }

    /// A run's log, relative to [`Self::logs`].
    pub fn log_name(container: &ContainerName, restart: u32) -> String {
        format!("{container}/{restart}.log")
    }

    pub fn disk_volumes(&self) -> PathBuf {
        self.disk.join("volumes")
    }

    pub fn disk_volume(&self, volume: &VolumeName) -> PathBuf {
        self.disk_volumes().join(volume.as_str())
    }

    /// The sandbox's tmpfs for contents that must not reach a disk.
    pub fn memory(&self) -> PathBuf {
        self.run.join("memory")
    }

    /// An emptyDir in memory has a tmpfs of its own, for its size limit.
    pub fn memory_volume(&self, volume: &VolumeName) -> PathBuf {
        self.memory_volumes().join(volume.as_str())
    }

    pub fn memory_volumes(&self) -> PathBuf {
        self.run.join("emptydirs")
    }

    /// Bind mounts of sub-paths: opened once, so that nothing can be swapped
    /// under the runtime.
    pub fn sub_paths(&self) -> PathBuf {
        self.run.join("subpaths")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_names_its_sandbox() {
        let layout = Layout::new("/s", "/r");
        let key = SandboxKey {
            pod: "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f".parse().unwrap(),
            attempt: pool_agent_api::Attempt::parse("", 12).unwrap(),
        };
        let dirs = layout.sandbox(&key);
        let name = dirs.disk().file_name().unwrap().to_str().unwrap();
        assert_eq!(Layout::key_of(name), Some(key));
        for other in ["", "x", "x-0", "x-y", "-1", "../a-1"] {
            assert_eq!(Layout::key_of(other), None, "{other:?}");
        }
    }
}
