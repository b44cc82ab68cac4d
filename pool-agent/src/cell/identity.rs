//! This host's identity in the cell: a key that was made here and a certificate for
//! `system:node:HOST`, in one file that only root reads.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use pool_agent_api::HostName;
use pool_cell::names;
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
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
    #[error("the certificate is of {found}, not of {wanted}")]
    Foreign { found: String, wanted: String },
    #[error("the certificate has ended at {0}")]
    Ended(Timestamp),
}

/// Valid when it was made or read.
#[derive(Clone)]
pub struct Identity {
    key: String,
    chain: String,
    begins: Timestamp,
    ends: Timestamp,
    /// A number of this certificate's own.
    digest: u8,
}

impl Identity {
    /// `key` and `chain` as PEM.
    pub fn new(host: &HostName, key: String, chain: String, now: Timestamp) -> Result<Self, IdentityError> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(IdentityError::Pem)?;
        let leaf = certificates.first().ok_or(IdentityError::X509)?.clone();
        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|_| IdentityError::X509)?;
        let names: Vec<_> = parsed
            .subject()
            .iter_common_name()
            .filter_map(|cn| cn.as_str().ok())
            .collect();
        let wanted = names::host_user(host);
        if names != [wanted.as_str()] {
            return Err(IdentityError::Foreign {
                found: names.join(", "),
                wanted,
            });
        }
        let time = |seconds| Timestamp::from_second(seconds).map_err(|_| IdentityError::X509);
        let begins = time(parsed.validity().not_before.timestamp())?;
        let ends = time(parsed.validity().not_after.timestamp())?;
        if ends <= now {
            return Err(IdentityError::Ended(ends));
        }
        let private = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(IdentityError::Pem)?;
        CertifiedKey::from_der(certificates, private, &aws_lc_rs::default_provider())
            .map_err(IdentityError::Unfit)?;
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
    pub fn read(path: &Path, host: &HostName, now: Timestamp) -> Result<Option<Self>, IdentityError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(IdentityError::File {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        // The key stands first.
        let at = text.find("-----BEGIN CERTIFICATE-----").unwrap_or(text.len());
        let (key, chain) = text.split_at(at);
        Self::new(host, key.to_owned(), chain.to_owned(), now).map(Some)
    }

    pub fn write(&self, path: &Path) -> Result<(), IdentityError> {
        write_private(path, &format!("{}{}", self.key, self.chain))
    }

    /// As a kubeconfig's user.
    pub fn user(&self) -> Value {
        json!({
            "client-certificate-data": BASE64_STANDARD.encode(&self.chain),
            "client-key-data": BASE64_STANDARD.encode(&self.key),
        })
    }

    /// How long to wait before asking for another: until 70 to 90 % of its life are
    /// over, so that hosts that joined together do not ask together.
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

/// Whole or not at all, and for root alone.
pub fn write_private(path: &Path, content: &str) -> Result<(), IdentityError> {
    let beside = path.with_extension("new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|source| IdentityError::File {
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
        let host: HostName = "host-a".parse().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity.pem");
        assert!(Identity::read(&path, &host, day(1)).unwrap().is_none());
        let (key, chain) = signed("system:node:host-a", 100);
        let identity = Identity::new(&host, key, chain, day(1)).unwrap();
        identity.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let found = Identity::read(&path, &host, day(1)).unwrap().unwrap();
        assert_eq!(found.user(), identity.user());
    }

    #[test]
    fn another_hosts_certificate_an_ended_one_and_one_of_another_key_are_refused() {
        let host: HostName = "host-a".parse().unwrap();
        let (key, chain) = signed("system:node:host-a", 100);
        let (other_key, other_chain) = signed("system:node:host-b", 100);
        let refused =
            |key: &str, chain: &str, now| Identity::new(&host, key.to_owned(), chain.to_owned(), now).err();
        assert!(matches!(
            refused(&other_key, &other_chain, day(1)),
            Some(IdentityError::Foreign { .. })
        ));
        assert!(matches!(
            refused(&other_key, &chain, day(1)),
            Some(IdentityError::Unfit(_))
        ));
        assert!(matches!(
            refused(&key, &chain, day(100)),
            Some(IdentityError::Ended(_))
        ));
        assert!(refused(&key, &chain, day(99)).is_none());
    }

    #[test]
    fn it_is_renewed_between_seventy_and_ninety_percent_of_its_life() {
        let host: HostName = "host-a".parse().unwrap();
        let (key, chain) = signed("system:node:host-a", 100);
        let identity = Identity::new(&host, key, chain, day(1)).unwrap();
        assert!(!identity.due(day(69)));
        assert!(identity.due(day(91)));
    }
}
