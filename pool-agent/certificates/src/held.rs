//! A key that was made here and a certificate for it, in one file that only its owner
//! reads.

use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

#[derive(Debug, thiserror::Error)]
pub enum HeldError {
    #[error("reading or writing {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the certificate does not read as PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    #[error("the certificate does not read as X.509")]
    X509,
    #[error("the certificate does not fit its key")]
    Unfit(#[source] rustls::Error),
    #[error("the certificate is of {found:?}, not of {wanted}")]
    Foreign { found: Vec<String>, wanted: Name },
    #[error("the certificate has ended at {0}")]
    Ended(Timestamp),
}

/// Whom a certificate has to name, and nobody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// By its common name.
    User(String),
    /// By its one URI.
    Uri(String),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::User(name) | Self::Uri(name)) = self;
        f.write_str(name)
    }
}

impl Name {
    /// Those of its kind that a certificate has.
    fn found(&self, certificate: &X509Certificate<'_>) -> Vec<String> {
        match self {
            Self::User(_) => certificate
                .subject()
                .iter_common_name()
                .filter_map(|name| name.as_str().ok())
                .map(str::to_owned)
                .collect(),
            Self::Uri(_) => certificate
                .subject_alternative_name()
                .ok()
                .flatten()
                .iter()
                .flat_map(|names| &names.value.general_names)
                .filter_map(|name| match name {
                    GeneralName::URI(uri) => Some((*uri).to_owned()),
                    _ => None,
                })
                .collect(),
        }
    }
}

/// Valid when it was made or read.
#[derive(Clone)]
pub struct Held {
    key: String,
    chain: String,
    begins: Timestamp,
    ends: Timestamp,
    /// A number of this certificate's own.
    digest: u8,
}

impl Held {
    /// `key` and `chain` as PEM.
    pub fn new(name: &Name, key: String, chain: String, now: Timestamp) -> Result<Self, HeldError> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(HeldError::Pem)?;
        let leaf = certificates.first().ok_or(HeldError::X509)?.clone();
        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|_| HeldError::X509)?;
        let found = name.found(&parsed);
        if found != [name.to_string()] {
            return Err(HeldError::Foreign {
                found,
                wanted: name.clone(),
            });
        }
        let time = |seconds| Timestamp::from_second(seconds).map_err(|_| HeldError::X509);
        let begins = time(parsed.validity().not_before.timestamp())?;
        let ends = time(parsed.validity().not_after.timestamp())?;
        if ends <= now {
            return Err(HeldError::Ended(ends));
        }
        let private = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(HeldError::Pem)?;
        CertifiedKey::from_der(certificates, private, &aws_lc_rs::default_provider())
            .map_err(HeldError::Unfit)?;
        let digest = Sha256::digest(&leaf)[0];
        Ok(Self {
            key,
            chain,
            begins,
            ends,
            digest,
        })
    }

    /// None if there is no file.
    pub fn read(path: &Path, name: &Name, now: Timestamp) -> Result<Option<Self>, HeldError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(HeldError::File {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        // The key stands first.
        let at = text.find("-----BEGIN CERTIFICATE-----").unwrap_or(text.len());
        let (key, chain) = text.split_at(at);
        Self::new(name, key.to_owned(), chain.to_owned(), now).map(Some)
    }

    pub fn write(&self, path: &Path) -> Result<(), HeldError> {
        write_private(path, &format!("{}{}", self.key, self.chain))
    }

    /// PEM.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// PEM, the leaf first.
    pub fn chain(&self) -> &str {
        &self.chain
    }

    /// How long to wait before asking for another: until 70 to 90 % of its life are
    /// over, so that those who asked together do not ask together again.
    pub fn renewal(&self, now: Timestamp) -> Duration {
        let life = Duration::try_from(self.ends.duration_since(self.begins)).unwrap_or_default();
        let share = 0.7 + 0.2 * f64::from(self.digest) / 256.0;
        let due = self.begins.checked_add(life.mul_f64(share)).unwrap_or(now);
        Duration::try_from(due.duration_since(now))
            .unwrap_or_default()
            // A clock that jumps is noticed within a day.
            .clamp(Duration::from_secs(1), Duration::from_secs(86_400))
    }

    pub fn due(&self, now: Timestamp) -> bool {
        self.renewal(now) <= Duration::from_secs(1)
    }

    pub fn ends(&self) -> Timestamp {
        self.ends
    }
}

/// Whole or not at all, and for its owner alone.
pub fn write_private(path: &Path, content: &str) -> Result<(), HeldError> {
    write(path, content, 0o600)
}

/// Whole or not at all.
pub(crate) fn write_public(path: &Path, content: &str) -> Result<(), HeldError> {
    write(path, content, 0o644)
}

fn write(path: &Path, content: &str, mode: u32) -> Result<(), HeldError> {
    let beside = path.with_extension("new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|source| HeldError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn signed(name: &str, days: i64) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.not_before = rcgen::date_time_ymd(2026, 1, 1);
        parameters.not_after =
            rcgen::date_time_ymd(2026, 1, 1) + std::time::Duration::from_secs(86_400 * days as u64);
        let certificate = parameters.self_signed(&key).unwrap();
        (key.serialize_pem(), certificate.pem())
    }

    fn day(day: i64) -> Timestamp {
        "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap() + jiff::SignedDuration::from_hours(24 * day)
    }

    #[test]
    fn an_identity_is_found_again_as_it_was_kept_and_nobody_else_reads_it() {
        let host = Name::User("system:node:host-a".into());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity.pem");
        assert!(Held::read(&path, &host, day(1)).unwrap().is_none());
        let (key, chain) = signed("system:node:host-a", 100);
        let identity = Held::new(&host, key, chain, day(1)).unwrap();
        identity.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let found = Held::read(&path, &host, day(1)).unwrap().unwrap();
        assert_eq!((found.key(), found.chain()), (identity.key(), identity.chain()));
    }

    #[test]
    fn another_hosts_certificate_an_ended_one_and_one_of_another_key_are_refused() {
        let host = Name::User("system:node:host-a".into());
        let (key, chain) = signed("system:node:host-a", 100);
        let (other_key, other_chain) = signed("system:node:host-b", 100);
        let refused =
            |key: &str, chain: &str, now| Held::new(&host, key.to_owned(), chain.to_owned(), now).err();
        assert!(matches!(
            refused(&other_key, &other_chain, day(1)),
            Some(HeldError::Foreign { .. })
        ));
        assert!(matches!(
            refused(&other_key, &chain, day(1)),
            Some(HeldError::Unfit(_))
        ));
        assert!(matches!(
            refused(&key, &chain, day(100)),
            Some(HeldError::Ended(_))
        ));
        assert!(refused(&key, &chain, day(99)).is_none());
    }

    #[test]
    fn it_is_renewed_between_seventy_and_ninety_percent_of_its_life() {
        let host = Name::User("system:node:host-a".into());
        let (key, chain) = signed("system:node:host-a", 100);
        let identity = Held::new(&host, key, chain, day(1)).unwrap();
        assert!(!identity.due(day(69)));
        assert!(identity.due(day(91)));
    }
}
