//! The mesh's certificate authority: a root, and an intermediate that signs the
//! workloads' certificates. `broker` decides who gets one; this signs.
//!
//! Its directory has Istio's file names, so that the files of an Istio "plug-in
//! CA" can be put there as they are:
//!
//! | file | what |
//! |---|---|
//! | `root-cert.pem` | the roots that peers trust: more than one during a change of root |
//! | `root-key.pem` | the root's key; only needed to make an intermediate, so it may be taken away |
//! | `ca-cert.pem`, `ca-key.pem` | the intermediate that signs |
//! | `cert-chain.pem` | optional: further intermediates, from the one above `ca-cert.pem` up |
//!
//! Where there is no directory, a root and an intermediate are made. Where
//! `ca-cert.pem` is missing or about to end and the root's key is there, an
//! intermediate is made: delete the file to replace it.
//!
//! What always holds: a key is in a file that only its owner can read, in a
//! directory that only its owner can enter, or it is not used.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use mesh_api::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::csr::Csr;

/// Longest life of a workload's certificate, and what it gets if it asks for none.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);

/// A certificate is valid this long before it is made, for hosts whose clocks are
/// behind ours. Istio's figure.
const BACKDATED: Duration = Duration::from_secs(120);

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const INTERMEDIATE_LIFE: Duration = Duration::from_secs(2 * 365 * 24 * 3600);

/// An intermediate with less left than this is replaced when the authority is opened.
const RENEWED_BEFORE: Duration = Duration::from_secs(60 * 24 * 3600);

const ROOT_CERT: &str = "root-cert.pem";
const ROOT_KEY: &str = "root-key.pem";
const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} has mode {mode:04o}: others than its owner can get at it; chmod it to {wanted:04o}", path.display())]
    Loose { path: PathBuf, mode: u32, wanted: u32 },
    #[error("{} is missing; a certificate authority needs it, or an empty directory to begin in", path.display())]
    Missing { path: PathBuf },
    #[error("{} is not PEM with what belongs there", path.display())]
    Pem { path: PathBuf },
    #[error("{} and {} are no pair", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf },
    #[error("{} is no certificate that may sign others", path.display())]
    NotCa { path: PathBuf },
    #[error("{} is not valid now: from {not_before} to {not_after}", path.display())]
    NotValid {
        path: PathBuf,
        not_before: String,
        not_after: String,
    },
    #[error("{} does not lead to a root in {}", path.display(), roots.display())]
    NoRoot { path: PathBuf, roots: PathBuf },
    #[error("cannot make a certificate for {what}")]
    Make {
        what: &'static str,
        #[source]
        source: rcgen::Error,
    },
}

#[derive(Debug, thiserror::Error)]
#[error("cannot sign a certificate for {identity}")]
pub struct SignError {
    pub identity: Identity,
    #[source]
    source: rcgen::Error,
}

/// What an authority is made of: the contents of its files, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    pub root_cert: String,
    /// Only needed to make an intermediate.
    pub root_key: Option<String>,
    pub ca_cert: String,
    pub ca_key: String,
    pub chain: Option<String>,
}

impl Material {
    /// The names of the parts, as of the files: those of Istio's "plug-in CA".
    pub const ROOT_CERT: &str = ROOT_CERT;
    pub const ROOT_KEY: &str = ROOT_KEY;
    pub const CA_CERT: &str = CA_CERT;
    pub const CA_KEY: &str = CA_KEY;
    pub const CHAIN: &str = CHAIN;

    /// A new root and its intermediate.
    pub fn begin(called: &Path, now: SystemTime) -> Result<Self, OpenError> {
        let now = OffsetDateTime::from(now);
        let (root_cert, root_key) = make_root(now)?;
        let (ca_cert, ca_key) = make_intermediate(called, &root_cert, &root_key, now)?;
        Ok(Self {
            root_cert,
            root_key: Some(root_key),
            ca_cert,
            ca_key,
            chain: None,
        })
    }

    /// With a new intermediate, if the old one ends soon and the root's key is there.
    pub fn renewed(&self, called: &Path, now: SystemTime) -> Result<Option<Self>, OpenError> {
        let now = OffsetDateTime::from(now);
        let path = called.join(CA_CERT);
        let signing = first(&path, parse_certificates(&path, &self.ca_cert)?)?;
        let Some(root_key) = self.root_key.as_ref().filter(|_| {
            // What cannot be read is refused when it is used.
            ends_before(&path, &signing, now + RENEWED_BEFORE).unwrap_or(false)
        }) else {
            return Ok(None);
        };
        let (ca_cert, ca_key) = make_intermediate(called, &self.root_cert, root_key, now)?;
        Ok(Some(Self {
            ca_cert,
            ca_key,
            ..self.clone()
        }))
    }
}

/// An open authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    not_after: OffsetDateTime,
    /// Intermediates from the signing one up, PEM.
    intermediates: Vec<String>,
    /// All roots, PEM.
    roots: String,
}

impl Authority {
    /// Opens the authority in `dir`, or makes one there.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, OpenError> {
        let now = OffsetDateTime::from(now);
        if is_empty(dir)? {
            begin(dir, now)?;
        }
        tight(dir, 0o700)?;
        if exists(&dir.join(ROOT_KEY))? && ends_soon(&dir.join(CA_CERT), now)? {
            replace_intermediate(dir, now)?;
        }
        Self::load(dir, now)
    }

    fn load(dir: &Path, now: OffsetDateTime) -> Result<Self, OpenError> {
        tight(&dir.join(CA_KEY), 0o600)?;
        let chain = dir.join(CHAIN);
        let material = Material {
            ca_cert: read(&dir.join(CA_CERT))?,
            ca_key: read(&dir.join(CA_KEY))?,
            root_cert: read(&dir.join(ROOT_CERT))?,
            root_key: None,
            chain: if exists(&chain)? {
                Some(read(&chain)?)
            } else {
                None
            },
        };
        Self::of(dir, &material, now.into())
    }

    /// From what is no directory; `called` is how errors name it.
    pub fn of(called: &Path, material: &Material, now: SystemTime) -> Result<Self, OpenError> {
        let now = OffsetDateTime::from(now);
        let (cert_path, key_path) = (called.join(CA_CERT), called.join(CA_KEY));
        let key = parse_key(&key_path, &material.ca_key)?;
        let signing = first(&cert_path, parse_certificates(&cert_path, &material.ca_cert)?)?;
        let roots_path = called.join(ROOT_CERT);
        let roots = parse_certificates(&roots_path, &material.root_cert)?;
        let chain = match &material.chain {
            Some(chain) => parse_certificates(&called.join(CHAIN), chain)?,
            None => Vec::new(),
        };
        let not_after = check(&cert_path, &signing, &key, &key_path, now)?;
        if !leads_to_root(&signing, &chain, &roots) {
            return Err(OpenError::NoRoot {
                path: cert_path,
                roots: roots_path,
            });
        }
        let issuer = Issuer::from_ca_cert_der(&signing, key).map_err(|source| OpenError::Make {
            what: "workloads",
            source,
        })?;
        let intermediates = std::iter::once(&signing)
            .chain(chain.iter().filter(|c| **c != signing))
            // A root belongs with the roots; a signing root is its own chain.
            .filter(|c| !roots.contains(c))
            .map(|c| pem(c))
            .collect();
        Ok(Self {
            issuer,
            not_after,
            intermediates,
            roots: roots.iter().map(|c| pem(c)).collect(),
        })
    }

    /// When the signing certificate ends; no workload's lives longer.
    pub fn not_after(&self) -> SystemTime {
        self.not_after.into()
    }

    /// Signs what the request asks for, and nothing that it does not have to: the
    /// identity, the key. Valid for `ttl` (capped) from `now`. The answer is Istio's
    /// shape: the leaf, each intermediate, and all roots as the last element.
    pub fn sign(&self, csr: &Csr, ttl: Duration, now: SystemTime) -> Result<Vec<String>, SignError> {
        let fail = |source| SignError {
            identity: csr.identity.clone(),
            source,
        };
        let now = OffsetDateTime::from(now);
        let ttl = if ttl.is_zero() { MAX_TTL } else { ttl.min(MAX_TTL) };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = now - BACKDATED;
        params.not_after = (now + ttl).min(self.not_after);
        params.serial_number = Some(serial());
        let uri = csr.identity.to_string().try_into().map_err(fail)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&csr.key, &self.issuer).map_err(fail)?;
        let mut chain = vec![leaf.pem()];
        chain.extend(self.intermediates.iter().cloned());
        chain.push(self.roots.clone());
        Ok(chain)
    }
}

/// Random, so that two certificates for one key can be told apart. 127 bits: a
/// serial is a positive number of at most 20 bytes (RFC 5280, 4.1.2.2).
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    bytes.to_vec().into()
}

/// Makes the directory with all that belongs in it. A crash leaves either nothing
/// or all of it: it is made beside its place and moved there.
fn begin(dir: &Path, now: OffsetDateTime) -> Result<(), OpenError> {
    let mut draft = dir.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let write = |source| OpenError::Write {
        path: draft.clone(),
        source,
    };
    match fs::remove_dir_all(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(write(error)),
        _ => {}
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&draft)
        .map_err(write)?;
    let (root, key) = make_root(now)?;
    write_file(&draft.join(ROOT_KEY), &key, 0o600)?;
    write_file(&draft.join(ROOT_CERT), &root, 0o644)?;
    replace_intermediate(&draft, now)?;
    // Over an empty directory a rename succeeds.
    fs::rename(&draft, dir).map_err(|source| OpenError::Write {
        path: dir.to_owned(),
        source,
    })?;
    dir.parent().map_or(Ok(()), sync)
}

/// Makes an intermediate with the root's key. The certificate is written last: as
/// long as it is missing, this is done again.
fn replace_intermediate(dir: &Path, now: OffsetDateTime) -> Result<(), OpenError> {
    let root_key = dir.join(ROOT_KEY);
    tight(&root_key, 0o600)?;
    let (certificate, key) = make_intermediate(dir, &read(&dir.join(ROOT_CERT))?, &read(&root_key)?, now)?;
    write_file(&dir.join(CA_KEY), &key, 0o600)?;
    write_file(&dir.join(CA_CERT), &certificate, 0o644)
}

/// Certificate and key, PEM.
fn make_root(now: OffsetDateTime) -> Result<(String, String), OpenError> {
    let make = |source| OpenError::Make {
        what: "the root",
        source,
    };
    let key = KeyPair::generate().map_err(make)?;
    let root = authority("Spindrift mesh root", ROOT_LIFE, now)
        .self_signed(&key)
        .map_err(make)?;
    Ok((root.pem(), key.serialize_pem()))
}

/// Certificate and key, PEM, of the root among `roots` that the key is of.
fn make_intermediate(
    called: &Path,
    roots: &str,
    root_key: &str,
    now: OffsetDateTime,
) -> Result<(String, String), OpenError> {
    let make = |source| OpenError::Make {
        what: "the intermediate",
        source,
    };
    let (roots_path, key_path) = (called.join(ROOT_CERT), called.join(ROOT_KEY));
    let root_key = parse_key(&key_path, root_key)?;
    let root = parse_certificates(&roots_path, roots)?
        .into_iter()
        .find(|root| is_pair(root, &root_key))
        .ok_or(OpenError::Pair {
            certificate: roots_path,
            key: key_path,
        })?;
    let issuer = Issuer::from_ca_cert_der(&root, root_key).map_err(make)?;
    let key = KeyPair::generate().map_err(make)?;
    let mut params = authority("Spindrift mesh intermediate", INTERMEDIATE_LIFE, now);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(make)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// Whether the certificate is missing, or has ended or soon will.
fn ends_soon(path: &Path, now: OffsetDateTime) -> Result<bool, OpenError> {
    if !exists(path)? {
        return Ok(true);
    }
    let certificate = first(path, parse_certificates(path, &read(path)?)?)?;
    ends_before(path, &certificate, now + RENEWED_BEFORE)
}

fn ends_before(
    path: &Path,
    certificate: &CertificateDer<'_>,
    time: OffsetDateTime,
) -> Result<bool, OpenError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| OpenError::Pem {
        path: path.to_owned(),
    })?;
    Ok(parsed.validity().not_after.to_datetime() < time)
}

fn authority(name: &str, life: Duration, now: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - BACKDATED;
    params.not_after = now + life;
    params.serial_number = Some(serial());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Checks that the certificate may sign now, with this key. Answers when it ends.
fn check(
    path: &Path,
    certificate: &CertificateDer<'_>,
    key: &KeyPair,
    key_path: &Path,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, OpenError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| OpenError::Pem {
        path: path.to_owned(),
    })?;
    if !is_pair(certificate, key) {
        return Err(OpenError::Pair {
            certificate: path.to_owned(),
            key: key_path.to_owned(),
        });
    }
    let may_sign = parsed.is_ca()
        && parsed
            .key_usage()
            .is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()));
    if !may_sign {
        return Err(OpenError::NotCa {
            path: path.to_owned(),
        });
    }
    let validity = parsed.validity();
    let (from, to) = (
        validity.not_before.to_datetime(),
        validity.not_after.to_datetime(),
    );
    if now < from || to <= now {
        return Err(OpenError::NotValid {
            path: path.to_owned(),
            not_before: validity.not_before.to_string(),
            not_after: validity.not_after.to_string(),
        });
    }
    Ok(to)
}

fn is_pair(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    X509Certificate::from_der(certificate)
        .is_ok_and(|(_, c)| c.public_key().raw == key.subject_public_key_info())
}

/// Whether signatures lead from the certificate over the chain to one of the roots.
fn leads_to_root(
    certificate: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> bool {
    let signed_by = |subject: &CertificateDer<'_>, issuer: &CertificateDer<'_>| {
        let (Ok((_, subject)), Ok((_, issuer))) = (
            X509Certificate::from_der(subject),
            X509Certificate::from_der(issuer),
        ) else {
            return false;
        };
        subject.issuer() == issuer.subject() && subject.verify_signature(Some(issuer.public_key())).is_ok()
    };
    let mut last = certificate;
    for next in chain.iter().filter(|next| *next != certificate) {
        if !signed_by(last, next) {
            return false;
        }
        last = next;
    }
    roots.iter().any(|root| root == last || signed_by(last, root))
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::prelude::*;

    let text = BASE64_STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    // RFC 7468: lines of 64 characters.
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|&c| char::from(c)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn is_empty(dir: &Path) -> Result<bool, OpenError> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(OpenError::Read {
            path: dir.to_owned(),
            source,
        }),
    }
}

fn exists(path: &Path) -> Result<bool, OpenError> {
    path.try_exists().map_err(|source| OpenError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Refuses what group or others can use.
fn tight(path: &Path, wanted: u32) -> Result<(), OpenError> {
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing {
            path: path.to_owned(),
        },
        _ => OpenError::Read {
            path: path.to_owned(),
            source,
        },
    })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(OpenError::Loose {
            path: path.to_owned(),
            mode,
            wanted,
        });
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, OpenError> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing {
            path: path.to_owned(),
        },
        _ => OpenError::Read {
            path: path.to_owned(),
            source,
        },
    })
}

fn parse_key(path: &Path, text: &str) -> Result<KeyPair, OpenError> {
    KeyPair::from_pem(text).map_err(|_| OpenError::Pem {
        path: path.to_owned(),
    })
}

fn parse_certificates(path: &Path, text: &str) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    let bad = || OpenError::Pem {
        path: path.to_owned(),
    };
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| bad())?;
    if certificates.is_empty() {
        return Err(bad());
    }
    Ok(certificates)
}

fn first(
    path: &Path,
    certificates: Vec<CertificateDer<'static>>,
) -> Result<CertificateDer<'static>, OpenError> {
    certificates.into_iter().next().ok_or_else(|| OpenError::Pem {
        path: path.to_owned(),
    })
}

/// Whole or not at all, and on the disk when this returns.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), OpenError> {
    let draft = path.with_extension("new");
    let write = || {
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&draft)?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().map_err(|source| OpenError::Write {
        path: path.to_owned(),
        source,
    })?;
    path.parent().map_or(Ok(()), sync)
}

fn sync(dir: &Path) -> Result<(), OpenError> {
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| OpenError::Write {
            path: dir.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests;
