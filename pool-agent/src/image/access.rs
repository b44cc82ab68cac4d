//! Who has proven access to which image on this host. Pure; [`super::records`]
//! keeps it on disk.
//!
//! A proof is of a tenant, for an image by its id (the digest of its configuration,
//! which is what runs), by way of the repository that gave it: a tag that moves
//! leads to another image, and what one repository gives proves nothing of another.
//!
//! An image without an entry was never pulled through this agent: it is the
//! operator's.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use pool_agent_api::TenantId;
use serde::{Deserialize, Serialize};

/// Repositories that are remembered for one tenant and image: the same image under
/// more names than this is asked for again. Its own oldest proof goes first.
const REPOSITORIES: usize = 16;

/// The digest of an image's configuration, in SHA-256.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(String);

impl ImageId {
    /// None for what is no such id.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        (hex.len() == 64 && hex.bytes().all(digit)).then(|| Self(hex.to_owned()))
    }

    /// Without its algorithm; safe as a file's name.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// The proofs for one image, oldest first for each tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proofs {
    tenants: BTreeMap<String, VecDeque<String>>,
}

/// The proofs for all images that were pulled through this agent.
#[derive(Debug, Default)]
pub struct Access {
    images: BTreeMap<ImageId, Proofs>,
}

impl Access {
    pub fn restore(&mut self, image: ImageId, proofs: Proofs) {
        self.images.insert(image, proofs);
    }

    pub fn proven(&self, tenant: &TenantId, image: &ImageId, repository: &str) -> bool {
        self.images
            .get(image)
            .and_then(|proofs| proofs.tenants.get(tenant.as_str()))
            .is_some_and(|repositories| repositories.iter().any(|known| known == repository))
    }

    /// Notes a proof. False: it was known.
    pub fn prove(&mut self, tenant: &TenantId, image: &ImageId, repository: &str) -> bool {
        if self.proven(tenant, image, repository) {
            return false;
        }
        let proofs = self.images.entry(image.clone()).or_default();
        let repositories = proofs.tenants.entry(tenant.to_string()).or_default();
        if repositories.len() >= REPOSITORIES {
            repositories.pop_front();
        }
        repositories.push_back(repository.to_owned());
        true
    }

    /// An image that was pulled through this agent, by whomever.
    pub fn note(&mut self, image: &ImageId) -> bool {
        let new = !self.images.contains_key(image);
        self.images.entry(image.clone()).or_default();
        new
    }

    pub fn pulled_here(&self, image: &ImageId) -> bool {
        self.images.contains_key(image)
    }

    pub fn images(&self) -> impl Iterator<Item = &ImageId> {
        self.images.keys()
    }

    pub fn of(&self, image: &ImageId) -> Option<&Proofs> {
        self.images.get(image)
    }

    pub fn forget(&mut self, image: &ImageId) -> bool {
        self.images.remove(image).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    fn image(digit: char) -> ImageId {
        ImageId::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
    }

    #[test]
    fn a_proof_is_for_its_tenant_its_image_and_its_repository_alone() {
        let mut access = Access::default();
        assert!(access.prove(&tenant("a"), &image('1'), "x.io/app"));
        assert!(access.proven(&tenant("a"), &image('1'), "x.io/app"));
        assert!(!access.proven(&tenant("b"), &image('1'), "x.io/app"));
        assert!(!access.proven(&tenant("a"), &image('2'), "x.io/app"));
        assert!(!access.proven(&tenant("a"), &image('1'), "x.io/other"));
    }

    #[test]
    fn a_proof_goes_with_its_image() {
        let mut access = Access::default();
        access.prove(&tenant("a"), &image('1'), "x.io/app");
        assert!(access.forget(&image('1')));
        assert!(!access.proven(&tenant("a"), &image('1'), "x.io/app"));
        assert!(!access.pulled_here(&image('1')));
    }

    #[test]
    fn a_tenants_many_names_for_an_image_cost_no_other_tenant_its_proof() {
        let mut access = Access::default();
        access.prove(&tenant("a"), &image('1'), "x.io/app");
        for n in 0..10 * REPOSITORIES {
            access.prove(&tenant("b"), &image('1'), &format!("x.io/{n}"));
        }
        assert!(access.proven(&tenant("a"), &image('1'), "x.io/app"));
        assert!(!access.proven(&tenant("b"), &image('1'), "x.io/0"));
        let kept = &access.of(&image('1')).unwrap().tenants["b"];
        assert_eq!(kept.len(), REPOSITORIES);
    }

    #[test]
    fn an_id_is_a_digest_and_no_path() {
        for text in ["", "sha256:", "sha256:../../etc", "0a", "docker.io/a/b:latest"] {
            assert_eq!(ImageId::parse(text), None, "{text:?}");
        }
        assert_eq!(ImageId::parse(&format!("sha256:{}", "A".repeat(64))), None);
    }
}
