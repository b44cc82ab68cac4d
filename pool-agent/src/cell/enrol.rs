//! How this host gets its identity in the cell and keeps it: a key made here, a
//! CertificateSigningRequest, asked for with the bootstrap token the first time and
//! with the identity itself from then on.
//!
//! The key of a request that is under way is on disk, and the request is named after
//! it: an agent that dies in the middle goes on with the same request, so that the
//! token, which is good for one, is not lost with it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use certificates::{CsrError, Held, HeldError, Name, Wanted, held::write_private, pauses};
use jiff::Timestamp;
use kube::{
    Client,
    config::{AuthInfo, KubeConfigOptions, Kubeconfig},
};
use pool_agent_api::HostName;
use pool_cell::names;
use rcgen::{KeyPair, PublicKeyData};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::refused_with;
use crate::causes::described;

/// A request that is not signed by then is looked at with a new connection.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error(transparent)]
    Held(#[from] HeldError),
    #[error("making {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the bootstrap kubeconfig {path}")]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: kube::config::KubeconfigError,
    },
    #[error("the identity does not read as a kubeconfig's user")]
    User(#[source] serde_json::Error),
    #[error("making a client of the cell")]
    Client(#[source] kube::Error),
    #[error("making a key")]
    Key(#[from] rcgen::Error),
    #[error(transparent)]
    Request(#[from] CsrError),
}

struct Applicant {
    kubeconfig: PathBuf,
    directory: PathBuf,
    host: HostName,
    machine_id: String,
}

/// Has an identity as long as the agent runs, and hands out clients that have it.
pub(super) async fn keep(
    kubeconfig: PathBuf,
    directory: PathBuf,
    host: HostName,
    machine_id: String,
    clients: watch::Sender<Option<Client>>,
) {
    let applicant = Applicant {
        kubeconfig,
        directory,
        host,
        machine_id,
    };
    let mut delays = pauses();
    let mut held: Option<Held> = None;
    loop {
        let wait = match applicant.next(held.as_ref()).await {
            Ok((identity, client)) => {
                delays = pauses();
                tracing::info!(ends = %identity.ends(), "this host has its identity in the cell");
                clients.send_replace(Some(client));
                held = Some(identity);
                None
            }
            Err(error) => {
                tracing::warn!(error = described(&error), "no new identity in the cell yet");
                Some(delays.next().unwrap_or(Duration::from_secs(60)))
            }
        };
        match (wait, &held) {
            (Some(wait), _) => tokio::time::sleep(wait).await,
            (None, Some(identity)) => {
                let mut now = Timestamp::now();
                while !identity.due(now) {
                    tokio::time::sleep(identity.renewal(now)).await;
                    now = Timestamp::now();
                }
            }
            (None, None) => {}
        }
    }
}

impl Applicant {
    fn user(&self) -> Name {
        Name::User(names::host_user(&self.host))
    }

    fn kept(&self) -> PathBuf {
        self.directory.join("identity.pem")
    }

    fn pending(&self) -> PathBuf {
        self.directory.join("pending.key")
    }

    /// The identity on disk, or a new one if that is due or absent.
    async fn next(&self, held: Option<&Held>) -> Result<(Held, Client), EnrolError> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(|source| EnrolError::Directory {
                path: self.directory.clone(),
                source,
            })?;
        let now = Timestamp::now();
        let known = match held {
            Some(identity) => Some(identity.clone()),
            None => match Held::read(&self.kept(), &self.user(), now) {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(error = described(&error), "the kept identity is of no use");
                    None
                }
            },
        };
        let valid = known.filter(|identity| identity.ends() > now);
        if held.is_none()
            && let Some(identity) = &valid
        {
            // Also one that is due: it serves while the next is asked for.
            return Ok((identity.clone(), self.client(Some(identity)).await?));
        }
        let client = self.client(valid.as_ref()).await?;
        let identity = self.apply(&client).await?;
        let client = self.client(Some(&identity)).await?;
        Ok((identity, client))
    }

    /// A client with an identity, or else with the bootstrap token.
    async fn client(&self, identity: Option<&Held>) -> Result<Client, EnrolError> {
        let wrong = |source| EnrolError::Kubeconfig {
            path: self.kubeconfig.clone(),
            source,
        };
        let read = Kubeconfig::read_from(&self.kubeconfig).map_err(wrong)?;
        let mut config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .map_err(wrong)?;
        if let Some(identity) = identity {
            config.auth_info = serde_json::from_value::<AuthInfo>(json!({
                "client-certificate-data": BASE64_STANDARD.encode(identity.chain()),
                "client-key-data": BASE64_STANDARD.encode(identity.key()),
            }))
            .map_err(EnrolError::User)?;
        }
        Client::try_from(config).map_err(EnrolError::Client)
    }

    async fn apply(&self, client: &Client) -> Result<Held, EnrolError> {
        let key = self.key()?;
        let chain = match certificates::obtain(client, &self.wanted(&key), &key, PATIENCE).await {
            Err(error @ CsrError::Refused { .. }) => {
                // The next request is another.
                self.drop_pending();
                return Err(error.into());
            }
            Err(CsrError::Api(error)) if refused_with(&error) == Some(404) => {
                // Too old to be kept in the cell.
                self.drop_pending();
                return Err(CsrError::Api(error).into());
            }
            other => other?,
        };
        let identity = Held::new(&self.user(), key.serialize_pem(), chain, Timestamp::now())?;
        identity.write(&self.kept())?;
        self.drop_pending();
        Ok(identity)
    }

    /// The key of the request that is under way, or a new one.
    fn key(&self) -> Result<KeyPair, EnrolError> {
        let path = self.pending();
        if let Ok(text) = std::fs::read_to_string(&path) {
            match KeyPair::from_pem(&text) {
                Ok(key) => return Ok(key),
                Err(error) => tracing::warn!(error = %error, "the pending key is of no use"),
            }
        }
        let key = KeyPair::generate()?;
        write_private(&path, &key.serialize_pem())?;
        Ok(key)
    }

    fn drop_pending(&self) {
        remove(&self.pending());
    }

    /// Subject and usages as the signer demands them: anything else it refuses.
    fn wanted(&self, key: &KeyPair) -> Wanted {
        Wanted {
            signer: names::CLIENT_SIGNER,
            name: Some(request_name(&self.host, key)),
            annotations: [(names::MACHINE.to_owned(), self.machine_id.clone())].into(),
            usages: &["digital signature", "client auth"],
            organization: Some(names::NODES),
            common_name: names::host_user(&self.host),
            ..Wanted::default()
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %error, "a used key stays");
    }
}

/// The same for the same key.
fn request_name(host: &HostName, key: &KeyPair) -> String {
    let digest = Sha256::digest(key.subject_public_key_info());
    let digest: String = digest[..10].iter().map(|b| format!("{b:02x}")).collect();
    format!("host-{host}-{digest}")
}

#[cfg(test)]
mod tests {
    use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

    use super::*;

    fn applicant(directory: &Path) -> Applicant {
        Applicant {
            kubeconfig: directory.join("bootstrap"),
            directory: directory.to_owned(),
            host: "host-a".parse().unwrap(),
            machine_id: "m-1".into(),
        }
    }

    #[test]
    fn the_request_names_the_host_and_asks_for_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let applicant = applicant(directory.path());
        let key = applicant.key().unwrap();
        let request = certificates::request(&applicant.wanted(&key), &key).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&request.spec.request.0).unwrap();
        let (_, parsed) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let info = &parsed.certification_request_info;
        assert_eq!(info.subject.to_string(), "O=system:nodes, CN=system:node:host-a");
        let extensions = parsed.requested_extensions().into_iter().flatten().count();
        assert_eq!(extensions, 0);
    }

    #[test]
    fn an_agent_that_starts_again_in_the_middle_goes_on_with_its_request() {
        let directory = tempfile::tempdir().unwrap();
        let before = applicant(directory.path());
        let name = request_name(&before.host, &before.key().unwrap());
        let after = applicant(directory.path());
        assert_eq!(request_name(&after.host, &after.key().unwrap()), name);
        after.drop_pending();
        assert_ne!(request_name(&after.host, &after.key().unwrap()), name);
    }
}
