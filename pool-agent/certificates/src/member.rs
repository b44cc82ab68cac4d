//! The certificate by which a member of a pool, a host or a tenant's virtual node, is
//! known to the others: signed in the pool's cell (`names::MEMBER_SIGNER`), renewed,
//! and kept in files as TLS is configured with.
//!
//! What always holds: the files that are there fit each other and are this member's; a
//! cell that is away leaves them in use until they end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use pool_agent_api::{Peer, PeerId};
use pool_cell::names;
use rcgen::KeyPair;

use crate::{CsrError, Held, HeldError, Name, Wanted, answered, held::write_public, obtain, pauses};

/// A request that is not signed by then is made anew.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the pool's roots are looked at.
const LOOK: Duration = Duration::from_secs(600);
/// Between two certificates, whatever their lives are.
const LEAST: Duration = Duration::from_secs(60);

/// PEM files, and the trust domain of whom they prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Key and chain.
    pub identity: PathBuf,
    /// The pool's roots.
    pub ca: PathBuf,
    pub trust_domain: String,
}

#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error("reading or writing {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Held(#[from] HeldError),
    #[error("making a key")]
    Key(#[from] rcgen::Error),
    #[error("the cell does not tell of its pool (the ConfigMap {})", names::POOL)]
    Pool(#[source] kube::Error),
    #[error("the cell's ConfigMap {} has no {key}", names::POOL)]
    Untold { key: &'static str },
    #[error(transparent)]
    Request(#[from] CsrError),
    #[error("the pool's trust domain is {told} now and was {held}: start anew, without {directory}")]
    TrustDomain {
        held: String,
        told: String,
        directory: PathBuf,
    },
}

#[derive(Debug, Clone)]
pub struct Member {
    /// Its own, for nothing else.
    pub directory: PathBuf,
    pub peer: Peer,
    /// Of a host: which machine asks.
    pub machine_id: Option<String>,
}

/// What the cell says of its pool.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pool {
    roots: String,
    trust_domain: String,
}

impl Member {
    /// What is there from before, if it is still good.
    pub fn files(&self, now: Timestamp) -> Result<Option<Files>, MemberError> {
        let Some(trust_domain) = self.trust_domain()? else {
            return Ok(None);
        };
        let there = self.held(&trust_domain, now).is_some() && self.ca().is_file();
        Ok(there.then(|| self.as_files(trust_domain)))
    }

    /// Asks once, for whom nothing is there yet.
    pub async fn join(&self, client: &Client) -> Result<Files, MemberError> {
        let pool = pool(client).await?;
        self.obtain(client, &pool).await?;
        Ok(self.as_files(pool.trust_domain))
    }

    /// Keeps certificate and roots current, for as long as it is awaited. `client` gives
    /// the newest client of the cell.
    pub async fn keep<F: Future<Output = Client>>(&self, mut client: impl FnMut() -> F) {
        let mut delays = pauses();
        loop {
            let wait = match self.look(&client().await).await {
                Ok(wait) => {
                    delays = pauses();
                    wait
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "this member's certificate is not renewed yet");
                    delays.next().unwrap_or(LEAST)
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn look(&self, client: &Client) -> Result<Duration, MemberError> {
        let pool = pool(client).await?;
        if let Some(held) = self.trust_domain()?
            && held != pool.trust_domain
        {
            return Err(MemberError::TrustDomain {
                held,
                told: pool.trust_domain,
                directory: self.directory.clone(),
            });
        }
        if read(&self.ca())?.as_deref() != Some(pool.roots.as_str()) {
            write_public(&self.ca(), &pool.roots)?;
            tracing::info!("the pool's roots are others now");
        }
        let now = Timestamp::now();
        let held = match self.held(&pool.trust_domain, now).filter(|held| !held.due(now)) {
            Some(held) => held,
            None => self.obtain(client, &pool).await?,
        };
        Ok(held.renewal(Timestamp::now()).clamp(LEAST, LOOK))
    }

    async fn obtain(&self, client: &Client, pool: &Pool) -> Result<Held, MemberError> {
        let key = KeyPair::generate()?;
        let name = self.name(&pool.trust_domain);
        let chain = obtain(client, &self.wanted(&name), &key, PATIENCE).await?;
        let held = Held::new(&name, key.serialize_pem(), chain, Timestamp::now())?;
        fs::create_dir_all(&self.directory).map_err(|source| MemberError::File {
            path: self.directory.clone(),
            source,
        })?;
        // The certificate last: it is what `files` goes by.
        write_public(&self.ca(), &pool.roots)?;
        write_public(&self.domain(), &pool.trust_domain)?;
        held.write(&self.identity())?;
        tracing::info!(ends = %held.ends(), member = %name, "this member of the pool has its certificate");
        Ok(held)
    }

    /// None too if what is there is of no use.
    fn held(&self, trust_domain: &str, now: Timestamp) -> Option<Held> {
        Held::read(&self.identity(), &self.name(trust_domain), now).unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the kept certificate is of no use");
            None
        })
    }

    fn wanted(&self, name: &Name) -> Wanted {
        let machine = self.machine_id.clone();
        Wanted {
            signer: names::MEMBER_SIGNER,
            annotations: machine
                .map(|machine| (names::MACHINE.to_owned(), machine))
                .into_iter()
                .collect(),
            usages: &["digital signature", "client auth", "server auth"],
            uris: vec![name.to_string()],
            ..Wanted::default()
        }
    }

    fn name(&self, trust_domain: &str) -> Name {
        let id = PeerId {
            trust_domain: trust_domain.to_owned(),
            peer: self.peer.clone(),
        };
        Name::Uri(id.to_string())
    }

    fn as_files(&self, trust_domain: String) -> Files {
        Files {
            identity: self.identity(),
            ca: self.ca(),
            trust_domain,
        }
    }

    fn identity(&self) -> PathBuf {
        self.directory.join("member.pem")
    }

    fn ca(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    fn domain(&self) -> PathBuf {
        self.directory.join("trust-domain")
    }

    fn trust_domain(&self) -> Result<Option<String>, MemberError> {
        read(&self.domain())
    }
}

async fn pool(client: &Client) -> Result<Pool, MemberError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), names::POOL_NAMESPACE);
    let told = answered(api.get(names::POOL)).await.map_err(MemberError::Pool)?;
    let mut data = told.data.unwrap_or_default();
    let mut take = |key| {
        data.remove(key)
            .filter(|text| !text.is_empty())
            .ok_or(MemberError::Untold { key })
    };
    Ok(Pool {
        roots: take(names::POOL_CA)?,
        trust_domain: take(names::POOL_TRUST_DOMAIN)?,
    })
}

/// None if there is no such file.
fn read(path: &Path) -> Result<Option<String>, MemberError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(MemberError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, SanType};

    use super::*;

    fn member(directory: &Path) -> Member {
        Member {
            directory: directory.join("pool"),
            peer: Peer::Host("host-a".parse().unwrap()),
            machine_id: Some("m-1".into()),
        }
    }

    /// As if it had been signed for that URI.
    fn hold(member: &Member, uri: &str) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        parameters.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        let chain = parameters.self_signed(&key).unwrap().pem();
        let name = Name::Uri(uri.into());
        let held = Held::new(&name, key.serialize_pem(), chain.clone(), Timestamp::now()).unwrap();
        fs::create_dir_all(&member.directory).unwrap();
        write_public(&member.ca(), &chain).unwrap();
        write_public(&member.domain(), "pool").unwrap();
        held.write(&member.identity()).unwrap();
    }

    #[test]
    fn what_is_there_from_before_is_used_if_it_is_whole_and_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let member = member(directory.path());
        let now = Timestamp::now();
        assert_eq!(member.files(now).unwrap(), None);
        hold(&member, "spiffe://pool/host/host-b");
        assert_eq!(member.files(now).unwrap(), None, "another host's");
        hold(&member, "spiffe://pool/host/host-a");
        let files = member.files(now).unwrap().unwrap();
        assert_eq!(files.trust_domain, "pool");
        fs::remove_file(&files.ca).unwrap();
        assert_eq!(member.files(now).unwrap(), None, "nobody could be verified");
    }
}
