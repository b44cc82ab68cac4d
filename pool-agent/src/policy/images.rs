//! Which images may be pulled, from where, and how much of that at a time.

use std::{net::SocketAddr, time::Duration};

use ipnet::IpNet;
use serde::Deserialize;

use crate::image::Reference;

/// `[policy.images]`
///
/// ```toml
/// [policy.images]
/// pull_credentials_verification_policy = "NeverVerifyAllowlistedImages"
/// preloaded_images_verification_allowlist = ["images.example/base/*"]
/// allow_registries = ["registry.internal:5000"]
/// allow_networks = ["10.1.2.3/32"]
/// deny_networks = ["203.0.113.0/24"]
/// [policy.images.pulls]
/// per_tenant = 5
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "File")]
pub struct Images {
    pub verification: Verification,
    /// Registries that are asked wherever their name leads.
    pub allow_registries: Vec<Registry>,
    /// Where a registry may be though it is forbidden otherwise.
    pub allow_networks: Vec<IpNet>,
    /// Where none may be beside what is forbidden anyway: the pool's own ranges that
    /// are public addresses.
    pub deny_networks: Vec<IpNet>,
    pub pulls: Pulls,
    /// Where the runtime's HTTP proxy listens, on this host's loopback. None: there
    /// is none.
    pub egress_listen: Option<SocketAddr>,
}

/// Which images on this host a tenant may use without having proven that its registry
/// would give it. A kubelet's names and meanings, but a proof is a tenant's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Verification {
    NeverVerify,
    /// Those that are pinned in the runtime, as operators pin what they import. No
    /// pull pins an image.
    NeverVerifyPreloadedImages,
    NeverVerifyAllowlistedImages(Vec<Repositories>),
    #[default]
    AlwaysVerify,
}

/// A repository, or all that begin with a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repositories {
    One(String),
    /// Ends with `/`.
    Below(String),
}

/// `HOST[:PORT]` as images' names have it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Registry(String);

/// How much is pulled at a time.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pulls {
    /// By one tenant.
    pub per_tenant: usize,
    /// By all. A tenant's first is not counted: it never waits for others'.
    pub per_host: usize,
    /// Of one tenant that wait for their turn; more are refused.
    pub waiting_per_tenant: usize,
    /// Longest that one may take. One that makes no progress is given up much sooner
    /// by the runtime (`image_pull_progress_timeout`).
    #[serde(rename = "longest_seconds", deserialize_with = "seconds")]
    pub longest: Duration,
}

impl Default for Pulls {
    fn default() -> Self {
        Self {
            per_tenant: 5,
            per_host: 20,
            // Twice the pods that a kubelet's host takes.
            waiting_per_tenant: 220,
            longest: Duration::from_secs(1800),
        }
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidImages {
    #[error(
        "preloaded_images_verification_allowlist: {0:?} is not a repository without tag, nor one that ends \
         in /*"
    )]
    Pattern(String),
    #[error(
        "preloaded_images_verification_allowlist: goes with pull_credentials_verification_policy = \
         \"NeverVerifyAllowlistedImages\" alone"
    )]
    IdleList,
    #[error("allow_registries: {0:?} is not HOST or HOST:PORT")]
    Registry(String),
    #[error("pulls.{0}: must be at least 1")]
    Nothing(&'static str),
    #[error("egress_listen: must be an address of the host's loopback: whoever reaches it may use it")]
    Exposed,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    pull_credentials_verification_policy: Named,
    preloaded_images_verification_allowlist: Vec<String>,
    allow_registries: Vec<Registry>,
    allow_networks: Vec<IpNet>,
    deny_networks: Vec<IpNet>,
    pulls: Pulls,
    egress_listen: Option<SocketAddr>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Named {
    NeverVerify,
    NeverVerifyPreloadedImages,
    NeverVerifyAllowlistedImages,
    #[default]
    AlwaysVerify,
}

impl TryFrom<File> for Images {
    type Error = InvalidImages;

    fn try_from(file: File) -> Result<Self, InvalidImages> {
        let listed = file.preloaded_images_verification_allowlist;
        let verification = match file.pull_credentials_verification_policy {
            Named::NeverVerifyAllowlistedImages => Verification::NeverVerifyAllowlistedImages(
                listed
                    .into_iter()
                    .map(Repositories::parse)
                    .collect::<Result<_, _>>()?,
            ),
            _ if !listed.is_empty() => return Err(InvalidImages::IdleList),
            Named::NeverVerify => Verification::NeverVerify,
            Named::NeverVerifyPreloadedImages => Verification::NeverVerifyPreloadedImages,
            Named::AlwaysVerify => Verification::AlwaysVerify,
        };
        let Pulls {
            per_tenant,
            per_host,
            waiting_per_tenant,
            longest,
        } = &file.pulls;
        for (field, nothing) in [
            ("per_tenant", *per_tenant == 0),
            ("per_host", *per_host == 0),
            ("waiting_per_tenant", *waiting_per_tenant == 0),
            ("longest_seconds", longest.is_zero()),
        ] {
            if nothing {
                return Err(InvalidImages::Nothing(field));
            }
        }
        if file.egress_listen.is_some_and(|at| !at.ip().is_loopback()) {
            return Err(InvalidImages::Exposed);
        }
        Ok(Self {
            verification,
            allow_registries: file.allow_registries,
            allow_networks: file.allow_networks,
            deny_networks: file.deny_networks,
            pulls: file.pulls,
            egress_listen: file.egress_listen,
        })
    }
}

impl Verification {
    /// Whether a tenant without a proof may use the image: by the repository of the
    /// name it is asked by, and by whether the runtime has it pinned.
    pub fn waived(&self, repository: &str, pinned: bool) -> bool {
        match self {
            Self::NeverVerify => true,
            Self::NeverVerifyPreloadedImages => pinned,
            Self::NeverVerifyAllowlistedImages(listed) => listed.iter().any(|l| l.hold(repository)),
            Self::AlwaysVerify => false,
        }
    }
}

impl Repositories {
    fn parse(pattern: String) -> Result<Self, InvalidImages> {
        // Of a prefix, any repository below it shows whether it is well formed.
        let sample = match pattern.strip_suffix('*') {
            Some(prefix) if prefix.ends_with('/') => format!("{prefix}x"),
            _ => pattern.clone(),
        };
        match Reference::parse(&sample) {
            Ok(reference) if reference.tag.is_none() && reference.digest.is_none() => {
                let repository = reference.repository();
                Ok(match pattern.ends_with('*') {
                    true => Self::Below(repository[..repository.len() - 1].to_owned()),
                    false => Self::One(repository),
                })
            }
            _ => Err(InvalidImages::Pattern(pattern)),
        }
    }

    fn hold(&self, repository: &str) -> bool {
        match self {
            Self::One(one) => one == repository,
            Self::Below(prefix) => repository.starts_with(prefix),
        }
    }
}

impl Registry {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Registry {
    type Error = InvalidImages;

    fn try_from(text: String) -> Result<Self, InvalidImages> {
        match Reference::parse(&format!("{text}/x")) {
            Ok(reference) if reference.registry == text => Ok(Self(text)),
            _ => Err(InvalidImages::Registry(text)),
        }
    }
}

fn seconds<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    u64::deserialize(from).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Images, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn without_a_word_of_the_operator_every_tenant_proves_its_access() {
        let policy = parse("").unwrap();
        assert_eq!(policy, Images::default());
        assert!(!policy.verification.waived("docker.io/library/busybox", true));
    }

    #[test]
    fn what_need_not_be_proven_is_what_a_kubelet_would_not_verify() {
        let listed = parse(
            r#"pull_credentials_verification_policy = "NeverVerifyAllowlistedImages"
               preloaded_images_verification_allowlist = ["x.io/base/*", "busybox", "y.io/*"]"#,
        )
        .unwrap()
        .verification;
        for (repository, waived) in [
            ("x.io/base/a", true),
            ("x.io/base/a/b", true),
            ("x.io/base", false),
            ("x.io/basement/a", false),
            ("docker.io/library/busybox", true),
            ("docker.io/library/busybox2", false),
            ("y.io/a", true),
            ("y.io.evil.example/a", false),
        ] {
            assert_eq!(listed.waived(repository, true), waived, "{repository}");
        }
        let preloaded = parse(r#"pull_credentials_verification_policy = "NeverVerifyPreloadedImages""#)
            .unwrap()
            .verification;
        assert!(preloaded.waived("x.io/a", true));
        assert!(!preloaded.waived("x.io/a", false));
        let never = parse(r#"pull_credentials_verification_policy = "NeverVerify""#).unwrap();
        assert!(never.verification.waived("x.io/a", false));
    }

    #[test]
    fn a_policy_with_a_mistake_is_refused_by_field() {
        const LISTED: &str = r#"pull_credentials_verification_policy = "NeverVerifyAllowlistedImages""#;
        for (text, says) in [
            (
                r#"preloaded_images_verification_allowlist = ["x.io/a"]"#.to_owned(),
                "goes with",
            ),
            (
                format!("{LISTED}\npreloaded_images_verification_allowlist = [\"x.io/a:1\"]"),
                "x.io/a:1",
            ),
            (
                format!("{LISTED}\npreloaded_images_verification_allowlist = [\"x.io/a*\"]"),
                "x.io/a*",
            ),
            (
                format!("{LISTED}\npreloaded_images_verification_allowlist = [\"*\"]"),
                "\"*\"",
            ),
            (r#"allow_registries = ["x.io/a"]"#.to_owned(), "allow_registries"),
            (r#"allow_registries = ["word"]"#.to_owned(), "allow_registries"),
            (r#"allow_networks = ["10.0.0.0/33"]"#.to_owned(), "allow_networks"),
            ("[pulls]\nper_tenant = 0".to_owned(), "per_tenant"),
            ("[pulls]\nlongest_seconds = 0".to_owned(), "longest_seconds"),
            (r#"egress_listen = "192.0.2.11:3128""#.to_owned(), "egress_listen"),
            ("allow_network = []".to_owned(), "allow_network"),
            (
                r#"pull_credentials_verification_policy = "Sometimes""#.to_owned(),
                "Sometimes",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
