//! The pool's own authority: it signs its members' certificates.

use std::{fs, io, path::PathBuf};

use jiff::Timestamp;
use pool_agent_api::PeerId;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};

/// How long a certificate is good for. Its holder asks for the next at 70 to 90 % of
/// that, so that a cell which is away for half a day makes nobody a stranger.
const LIFE_SECONDS: i64 = 96 * 3600;
/// Clocks may differ.
const SKEW_SECONDS: i64 = 300;

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{certificate} and {key} are no authority")]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        source: rcgen::Error,
    },
    #[error("{0} holds no certificate that signs with the key beside it as the first")]
    First(PathBuf),
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// PEM: the one that signs, then others that are believed too, while a root is
    /// replaced.
    pub roots: String,
    pub trust_domain: String,
}

#[derive(Debug, thiserror::Error)]
#[error("signing a certificate for {member}")]
pub struct SignError {
    member: String,
    #[source]
    source: rcgen::Error,
}

impl Authority {
    /// `certificate` may hold further roots after the one that signs.
    pub fn read(certificate: PathBuf, key: PathBuf, trust_domain: String) -> Result<Self, AuthorityError> {
        let text = |path: &PathBuf| {
            fs::read_to_string(path).map_err(|source| AuthorityError::Read {
                path: path.clone(),
                source,
            })
        };
        let (roots, secret) = (text(&certificate)?, text(&key)?);
        let pair = |source| AuthorityError::Pair {
            certificate: certificate.clone(),
            key: key.clone(),
            source,
        };
        let signing = KeyPair::from_pem(&secret).map_err(pair)?;
        let public = rcgen::PublicKeyData::subject_public_key_info(&signing);
        let first = x509_parser::pem::parse_x509_pem(roots.as_bytes())
            .ok()
            .map(|(_, pem)| pem);
        let fits = first
            .as_ref()
            .and_then(|pem| pem.parse_x509().ok())
            .is_some_and(|certificate| certificate.public_key().raw == public && certificate.is_ca());
        if !fits {
            return Err(AuthorityError::First(certificate));
        }
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&roots, signing).map_err(pair)?,
            roots,
            trust_domain,
        })
    }

    /// The chain as PEM. Of the request only the key is taken.
    pub fn sign(&self, request: &[u8], member: &PeerId, now: Timestamp) -> Result<String, SignError> {
        let failed = |source| SignError {
            member: member.to_string(),
            source,
        };
        let asked =
            CertificateSigningRequestParams::from_pem(&String::from_utf8_lossy(request)).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(
            member.to_string().as_str().try_into().map_err(failed)?,
        )];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let at = |seconds: i64| {
            std::time::SystemTime::UNIX_EPOCH
                + std::time::Duration::from_secs(u64::try_from(now.as_second() + seconds).unwrap_or_default())
        };
        params.not_before = at(-SKEW_SECONDS).into();
        params.not_after = at(LIFE_SECONDS).into();
        let ours = CertificateSigningRequestParams {
            params,
            public_key: asked.public_key,
        };
        let signed = ours.signed_by(&self.issuer).map_err(failed)?;
        Ok(signed.pem())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use certificates::Wanted;
    use rcgen::{BasicConstraints, IsCa};
    use x509_parser::{extensions::GeneralName, pem::parse_x509_pem};

    use super::*;

    /// An authority's files.
    fn make(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let files = (
            directory.join(format!("{name}.crt")),
            directory.join(format!("{name}.key")),
        );
        fs::write(&files.0, params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(&files.1, key.serialize_pem()).unwrap();
        files
    }

    #[test]
    fn a_certificate_has_the_members_name_alone_whatever_else_was_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = make(directory.path(), "ca");
        let authority = Authority::read(certificate, key, "pool".into()).unwrap();
        let member: PeerId = "spiffe://pool/host/host-a".parse().unwrap();
        let more = Wanted {
            common_name: "admin".into(),
            organization: Some("system:masters"),
            dns_names: vec!["kubernetes".into()],
            uris: vec!["spiffe://pool/host/host-b".into()],
            ..Wanted::default()
        };
        let request = certificates::request(&more, &KeyPair::generate().unwrap()).unwrap();
        let now = Timestamp::now();
        let chain = authority.sign(&request.spec.request.0, &member, now).unwrap();
        let (_, pem) = parse_x509_pem(chain.as_bytes()).unwrap();
        let signed = pem.parse_x509().unwrap();
        assert_eq!(signed.subject().to_string(), "");
        let names = signed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            names.value.general_names,
            [GeneralName::URI("spiffe://pool/host/host-a")]
        );
        assert!(!signed.is_ca());
        let lasts = signed.validity().not_after.timestamp() - now.as_second();
        assert_eq!(lasts, LIFE_SECONDS);
    }

    #[test]
    fn a_key_that_is_not_the_first_certificates_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (old, old_key) = make(directory.path(), "old");
        let (new, new_key) = make(directory.path(), "new");
        let refused = Authority::read(old.clone(), new_key.clone(), "pool".into());
        assert!(matches!(refused, Err(AuthorityError::First(_))));
        // A root that is being replaced: the new one signs, both are believed.
        let both = directory.path().join("both.crt");
        let text = |path| fs::read_to_string(path).unwrap();
        fs::write(&both, text(&new) + &text(&old)).unwrap();
        let authority = Authority::read(both.clone(), new_key, "pool".into()).unwrap();
        assert_eq!(authority.roots.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(matches!(
            Authority::read(both, old_key, "pool".into()),
            Err(AuthorityError::First(_))
        ));
    }
}
