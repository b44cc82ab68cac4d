//! The two certificate authorities a lab needs beside the tenant's mesh CA
//! (which `virtual-node` makes for itself): the cluster's, for Kubernetes, and
//! the pool's, for hosts and virtual nodes. An operator brings both elsewhere.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::file::{self, Mode};

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot make {what}")]
    Make {
        what: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A certificate and its key, PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// A self-signed authority in a directory: `ca.crt` and `ca.key`.
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate says.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    pub common_name: String,
    pub organization: Option<String>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub uri: Option<String>,
}

/// A lab does not live longer.
const LIFE: Duration = Duration::days(365);
/// Clocks of containers and hosts may differ a little.
const SKEW: Duration = Duration::minutes(5);

impl Authority {
    /// Takes the authority in the directory, or makes one. The certificate is
    /// written last: without it nothing was issued yet.
    pub fn open(directory: PathBuf, name: &str) -> Result<Self, PkiError> {
        let make = |source| PkiError::Make {
            what: format!("the authority {name}"),
            source,
        };
        let (certificate, key) = (directory.join("ca.crt"), directory.join("ca.key"));
        if certificate.exists() {
            let signing = KeyPair::from_pem(&read(&key)?).map_err(make)?;
            let issuer = Issuer::from_ca_cert_pem(&read(&certificate)?, signing).map_err(make)?;
            return Ok(Self { directory, issuer });
        }
        std::fs::create_dir_all(&directory).map_err(|source| PkiError::File {
            path: directory.clone(),
            source,
        })?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        valid_from_now(&mut params);
        let signing = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let signed = params.self_signed(&signing).map_err(make)?;
        write(&key, signing.serialize_pem(), Mode::Private)?;
        write(&certificate, signed.pem(), Mode::Public)?;
        Ok(Self {
            directory,
            issuer: Issuer::new(params, signing),
        })
    }

    pub fn certificate(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    pub fn pem(&self) -> Result<String, PkiError> {
        read(&self.certificate())
    }

    pub fn key(&self) -> PathBuf {
        self.directory.join("ca.key")
    }

    /// The credential called `name`, made if it is not there.
    pub fn credential(&self, name: &str, subject: &Subject) -> Result<Credential, PkiError> {
        let files = Credential {
            certificate: self.directory.join(format!("{name}.crt")),
            key: self.directory.join(format!("{name}.key")),
        };
        if files.certificate.exists() {
            return Ok(files);
        }
        let make = |source| PkiError::Make {
            what: format!("the certificate {name}"),
            source,
        };
        let mut params = subject.params().map_err(make)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        valid_from_now(&mut params);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(make)?;
        write(&files.key, key.serialize_pem(), Mode::Private)?;
        write(&files.certificate, signed.pem(), Mode::Public)?;
        Ok(files)
    }
}

impl Subject {
    fn params(&self) -> Result<CertificateParams, rcgen::Error> {
        let mut params = CertificateParams::new(self.dns_names.clone())?;
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = &self.organization {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params
            .distinguished_name
            .push(DnType::CommonName, &self.common_name);
        params
            .subject_alt_names
            .extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        if let Some(uri) = &self.uri {
            params
                .subject_alt_names
                .push(SanType::URI(uri.as_str().try_into()?));
        }
        Ok(params)
    }

    /// A request for somebody else's authority, and its new key; both PEM.
    pub fn request(&self) -> Result<(String, String), PkiError> {
        let make = |source| PkiError::Make {
            what: format!("a request for {}", self.common_name),
            source,
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let request = self
            .params()
            .map_err(make)?
            .serialize_request(&key)
            .map_err(make)?;
        Ok((request.pem().map_err(make)?, key.serialize_pem()))
    }
}

/// The key pair that signs service account tokens: `NAME.key`, `NAME.pub`.
pub fn signing_key(directory: &Path, name: &str) -> Result<(PathBuf, PathBuf), PkiError> {
    let (private, public) = (
        directory.join(format!("{name}.key")),
        directory.join(format!("{name}.pub")),
    );
    if !public.exists() {
        let make = |source| PkiError::Make {
            what: format!("the key {name}"),
            source,
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        write(&private, key.serialize_pem(), Mode::Private)?;
        write(&public, key.public_key_pem(), Mode::Public)?;
    }
    Ok((private, public))
}

fn valid_from_now(params: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + LIFE;
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, content: String, mode: Mode) -> Result<(), PkiError> {
    file::write(path, content, mode).map_err(|source| PkiError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_opened_again_is_the_same_and_keeps_what_it_issued() {
        let directory = tempfile::tempdir().unwrap();
        let subject = Subject {
            common_name: "host-a".into(),
            uri: Some("spiffe://pool/host/a".into()),
            ..Subject::default()
        };
        let open = || Authority::open(directory.path().join("pool"), "pool").unwrap();
        let first = open().credential("host-a", &subject).unwrap();
        let (authority, certificate) = (
            read(&open().certificate()).unwrap(),
            read(&first.certificate).unwrap(),
        );
        assert_eq!(open().credential("host-a", &subject).unwrap(), first);
        assert_eq!(read(&first.certificate).unwrap(), certificate);
        assert_eq!(read(&open().certificate()).unwrap(), authority);
    }
}
