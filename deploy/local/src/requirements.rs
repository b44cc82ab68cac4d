//! What the machine must have, and its installation where that can be done.
//!
//! Only what is missing is installed, with apt as root. Elsewhere a person is
//! told in one list what to install.

use std::path::Path;

use crate::{packages, progress::Progress, tool::ToolError};

/// What the tools are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// A cluster, a pool, the demo.
    Lab,
    /// Also an image registry, captures and load generators.
    Tests,
}

struct Requirement {
    /// Found in the search path, or a file.
    what: &'static str,
    /// Debian's package.
    package: &'static str,
    purpose: Purpose,
}

const fn needs(what: &'static str, package: &'static str, purpose: Purpose) -> Requirement {
    Requirement {
        what,
        package,
        purpose,
    }
}

const REQUIREMENTS: &[Requirement] = &[
    needs("ip", "iproute2", Purpose::Lab),
    needs("nsenter", "util-linux", Purpose::Lab),
    needs("setsid", "util-linux", Purpose::Lab),
    needs("tar", "tar", Purpose::Lab),
    needs("cc", "gcc", Purpose::Lab),
    needs("/usr/share/doc/libc6-dev", "libc6-dev", Purpose::Lab),
    needs(
        "/etc/ssl/certs/ca-certificates.crt",
        "ca-certificates",
        Purpose::Lab,
    ),
    needs("pkg-config", "pkg-config", Purpose::Lab),
    needs("/usr/include/seccomp.h", "libseccomp-dev", Purpose::Lab),
    needs("umoci", "umoci", Purpose::Lab),
    needs("skopeo", "skopeo", Purpose::Lab),
    needs("/usr/share/doc/busybox-static", "busybox-static", Purpose::Lab),
    needs("tcpdump", "tcpdump", Purpose::Tests),
    needs("nft", "nftables", Purpose::Tests),
    needs("docker-registry", "docker-registry", Purpose::Tests),
    needs("iperf3", "iperf3", Purpose::Tests),
    needs("/usr/lib/postgresql", "postgresql", Purpose::Tests),
];

/// Comes with the language's own installer, not from apt.
const TOOLCHAINS: &[(&str, &str)] = &[
    ("cargo", "Rust, by https://rustup.rs"),
    ("go", "Go 1.26 or newer, from https://go.dev/dl"),
];

/// Where programs for root are that a user's search path may leave out.
const SYSTEM_DIRECTORIES: &[&str] = &["/usr/local/sbin", "/usr/sbin", "/sbin"];

#[derive(Debug, thiserror::Error)]
pub enum RequirementsError {
    #[error(
        "not root: a lab makes network namespaces, mounts and eBPF programs. Run it as root, such as with: sudo -E env \"PATH=$PATH\" …"
    )]
    NotRoot,
    #[error("this machine has no apt-get; install these first: {0}")]
    NoApt(String),
    #[error("missing: {0}")]
    NoToolchain(String),
    #[error("cannot install {packages}")]
    Install {
        packages: String,
        #[source]
        source: ToolError,
    },
    #[error("installed {package}, but there is still no {what}")]
    StillMissing {
        package: &'static str,
        what: &'static str,
    },
    #[error("this kernel is missing what a lab needs: {0}")]
    Kernel(String),
}

/// Checks, and installs what is missing. Instant if nothing is.
pub async fn ensure(
    purpose: Purpose,
    search_path: &str,
    progress: &Progress,
) -> Result<(), RequirementsError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(RequirementsError::NotRoot);
    }
    let has = |what: &str| present(what, search_path);
    let toolchains: Vec<&str> = TOOLCHAINS
        .iter()
        .filter(|(what, _)| !has(what))
        .map(|(_, from)| *from)
        .collect();
    if !toolchains.is_empty() {
        return Err(RequirementsError::NoToolchain(toolchains.join("; ")));
    }
    kernel()?;
    let missing: Vec<&Requirement> = REQUIREMENTS
        .iter()
        .filter(|r| r.purpose <= purpose && !has(r.what))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|requirement| requirement.package).collect();
    packages.dedup();
    let names = packages.join(" ");
    if !has("apt-get") {
        return Err(RequirementsError::NoApt(names));
    }
    let step = progress.step(format!("Install {names}"));
    let failed = |source| RequirementsError::Install {
        packages: names.clone(),
        source,
    };
    packages::install(&packages, &step).await.map_err(failed)?;
    if let Some(absent) = missing.iter().find(|requirement| !has(requirement.what)) {
        return Err(RequirementsError::StillMissing {
            package: absent.package,
            what: absent.what,
        });
    }
    step.done();
    Ok(())
}

fn present(what: &str, search_path: &str) -> bool {
    if what.starts_with('/') {
        return Path::new(what).exists();
    }
    search_path
        .split(':')
        .chain(SYSTEM_DIRECTORIES.iter().copied())
        .any(|d| Path::new(d).join(what).is_file())
}

/// What no package can bring: said at the start rather than found by a failure
/// in the middle.
fn kernel() -> Result<(), RequirementsError> {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    // tcx links came with 6.6.
    if version(&release).is_none_or(|version| version < (6, 6)) {
        return Err(RequirementsError::Kernel(format!(
            "Linux 6.6 or newer (this is {release})"
        )));
    }
    Ok(())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_release_is_read_as_its_version() {
        assert_eq!(version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version("6.6-rc1"), Some((6, 6)));
        assert_eq!(version("weird"), None);
    }

    #[test]
    fn a_program_is_found_on_the_search_path_or_where_root_looks() {
        assert!(present("sh", "/nowhere:/bin"));
        assert!(!present("no-such-program", "/bin"));
        assert!(present("/proc/self/status", ""));
    }
}
