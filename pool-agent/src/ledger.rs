//! What this host must remember: which attempts were admitted, with which
//! address, and which have ended. One append-only file; a record counts once it
//! has been fsync'd. It holds no secrets: specs are in the run directory.
//!
//! Called by [`crate::host`], which tells a virtual node nothing that is not in
//! here yet. A thread of its own writes, so that records that arrive together
//! share one fsync.
//!
//! A record is a line, `<checksum> <JSON>`. A last line that is torn was never
//! acknowledged and is cut off. Anything else that does not read is damage: the
//! agent then refuses to start rather than forget which attempts are fenced.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
};

use jiff::Timestamp;
use pool_agent_api::{
    Attempt, Invalid, Namespace, PodName, PodUid, Resources, SandboxKey, Tenant, TenantId, wire,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

/// Records of ended attempts kept when the file is rewritten at a start.
const ENDED_KEPT: usize = 100_000;
/// Commits that wait for the disk; a caller beyond that waits for its turn.
const QUEUE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("opening the ledger {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the ledger {path} is damaged at line {line} ({problem}); restore it, or move it away once no \
         attempt it fenced can come again"
    )]
    Damaged {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error("writing the ledger: {0}")]
    Write(String),
    #[error("the ledger's writer has ended")]
    Closed,
}

/// A sandbox as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: SandboxKey,
    pub tenant: TenantId,
    pub namespace: Namespace,
    pub name: PodName,
    pub node_name: String,
    pub claim: Resources,
    pub address: Ipv4Addr,
    /// SPIFFE id; None for a pod outside the mesh. Kept here so that no damaged or
    /// replaced spec can take an enrolled pod out of the mesh.
    pub identity: Option<String>,
    pub accepted_at: Timestamp,
    /// The earliest time by which it was asked to have stopped.
    pub stop_by: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The address that a tenant's router was given out of the host's range.
    Router(TenantId, Ipv4Addr),
    Tenant(Tenant),
    Admitted(Entry),
    Stopping(SandboxKey, Timestamp),
    Ended(SandboxKey),
}

/// What the ledger held when it was opened.
#[derive(Debug, Default)]
pub struct Contents {
    /// How often an agent has been started here; orders revisions over restarts.
    pub generation: u32,
    pub tenants: BTreeMap<TenantId, Tenant>,
    pub routers: BTreeMap<TenantId, Ipv4Addr>,
    pub admitted: BTreeMap<SandboxKey, Entry>,
    /// Oldest first.
    pub ended: Vec<SandboxKey>,
    /// The last address given to a pod.
    pub last_address: Option<Ipv4Addr>,
}

/// The writing end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    commits: mpsc::Sender<Commit>,
}

#[derive(Debug)]
struct Commit {
    records: Vec<Record>,
    done: oneshot::Sender<Result<(), String>>,
}

impl Ledger {
    /// Reads the file, rewrites it without what is over, and begins the next
    /// generation.
    pub fn open(path: &Path) -> Result<(Self, Contents), LedgerError> {
        let opening = |source| LedgerError::Open {
            path: path.to_owned(),
            source,
        };
        let mut contents = read(path)?;
        contents.generation = contents.generation.saturating_add(1);
        if contents.ended.len() > ENDED_KEPT {
            contents.ended.drain(..contents.ended.len() - ENDED_KEPT);
        }
        let file = rewrite(path, &contents).map_err(opening)?;
        let (commits, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("ledger".into())
            .spawn(move || write_commits(file, queue))
            .map_err(opening)?;
        Ok((Self { commits }, contents))
    }

    /// Returns once the records are on disk, all of them or none.
    pub async fn commit(&self, records: Vec<Record>) -> Result<(), LedgerError> {
        let (done, answer) = oneshot::channel();
        self.commits
            .send(Commit { records, done })
            .await
            .map_err(|_| LedgerError::Closed)?;
        answer
            .await
            .map_err(|_| LedgerError::Closed)?
            .map_err(LedgerError::Write)
    }
}

fn write_commits(mut file: File, mut queue: mpsc::Receiver<Commit>) {
    let mut waiting = vec![];
    // After a failed write the end of the file is unknown: nothing more is acknowledged.
    let mut broken: Option<String> = None;
    while queue.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let mut bytes = vec![];
        for commit in &waiting {
            // One line for each commit, so that its records are torn together or not at all.
            bytes.extend(line(&commit.records));
        }
        if broken.is_none()
            && let Err(error) = file.write_all(&bytes).and_then(|()| file.sync_data())
        {
            tracing::error!(error = %error, "the ledger cannot be written");
            broken = Some(error.to_string());
        }
        for commit in waiting.drain(..) {
            let result = broken.clone().map_or(Ok(()), Err);
            if commit.done.send(result).is_err() {
                tracing::debug!("whoever committed to the ledger has gone");
            }
        }
    }
}

fn checksum(json: &str) -> String {
    let digest = Sha256::digest(json.as_bytes());
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn line(records: &[Record]) -> Vec<u8> {
    let stored: Vec<Stored> = records.iter().map(Stored::from).collect();
    encode(&stored)
}

fn encode(stored: &[Stored]) -> Vec<u8> {
    // Strings and numbers: this cannot fail; an empty commit would read as nothing.
    let json = serde_json::to_string(stored).unwrap_or_else(|_| "[]".into());
    format!("{} {json}\n", checksum(&json)).into_bytes()
}

fn read(path: &Path) -> Result<Contents, LedgerError> {
    let opening = |source| LedgerError::Open {
        path: path.to_owned(),
        source,
    };
    let mut bytes = vec![];
    match File::open(path) {
        Ok(mut file) => {
            file.read_to_end(&mut bytes).map_err(opening)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
        Err(error) => return Err(opening(error)),
    }
    let mut contents = Contents::default();
    let mut rest = bytes.as_slice();
    let mut number = 0;
    while !rest.is_empty() {
        number += 1;
        let Some(end) = rest.iter().position(|&b| b == b'\n') else {
            // Torn: the commit was never acknowledged.
            tracing::warn!(line = number, "the ledger's last record is torn and is cut off");
            break;
        };
        let damaged = |problem: String| LedgerError::Damaged {
            path: path.to_owned(),
            line: number,
            problem,
        };
        for stored in decode(&rest[..end]).map_err(damaged)? {
            contents.apply(stored).map_err(|e| LedgerError::Damaged {
                path: path.to_owned(),
                line: number,
                problem: e.to_string(),
            })?;
        }
        rest = &rest[end + 1..];
    }
    Ok(contents)
}

fn decode(line: &[u8]) -> Result<Vec<Stored>, String> {
    let text = std::str::from_utf8(line).map_err(|e| e.to_string())?;
    let (sum, json) = text.split_once(' ').ok_or("it has no checksum")?;
    if sum != checksum(json) {
        return Err("its checksum is wrong".into());
    }
    serde_json::from_str(json).map_err(|e| e.to_string())
}

/// Writes a new file beside the old, and puts it in its place.
fn rewrite(path: &Path, contents: &Contents) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory)?;
    let beside = path.with_extension("new");
    let mut bytes = encode(&[Stored::Generation {
        number: contents.generation,
    }]);
    for (tenant, address) in &contents.routers {
        bytes.extend(line(&[Record::Router(tenant.clone(), *address)]));
    }
    for tenant in contents.tenants.values() {
        bytes.extend(line(&[Record::Tenant(tenant.clone())]));
    }
    for key in &contents.ended {
        bytes.extend(line(&[Record::Ended(key.clone())]));
    }
    for entry in contents.admitted.values() {
        bytes.extend(line(&[Record::Admitted(entry.clone())]));
        if let Some(by) = entry.stop_by {
            bytes.extend(line(&[Record::Stopping(entry.key.clone(), by)]));
        }
    }
    if let Some(address) = contents.last_address {
        bytes.extend(encode(&[Stored::LastAddress { address }]));
    }
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&beside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

/// The records as they stand in the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Stored {
    Generation {
        number: u32,
    },
    Tenant {
        id: String,
        cluster_pod_range: String,
        cluster_domain: String,
        dns_address: String,
        upstream_nameservers: Vec<String>,
        mesh_address: String,
        mesh_trust_domain: String,
        mesh_cluster_id: String,
        mesh_network: String,
    },
    Router {
        tenant: String,
        address: Ipv4Addr,
    },
    LastAddress {
        address: Ipv4Addr,
    },
    Admitted {
        uid: String,
        attempt: u32,
        tenant: String,
        namespace: String,
        name: String,
        node_name: String,
        cpu_millis: u64,
        memory_bytes: u64,
        ephemeral_storage_bytes: u64,
        sandboxes: u32,
        address: Ipv4Addr,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        identity: Option<String>,
        #[serde(with = "as_text")]
        accepted_at: Timestamp,
    },
    Stopping {
        uid: String,
        attempt: u32,
        #[serde(with = "as_text")]
        by: Timestamp,
    },
    Ended {
        uid: String,
        attempt: u32,
    },
}

/// Times as RFC 3339.
mod as_text {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(at: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(at)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl From<&Record> for Stored {
    fn from(record: &Record) -> Self {
        match record {
            Record::Router(tenant, address) => Self::Router {
                tenant: tenant.to_string(),
                address: *address,
            },
            Record::Tenant(tenant) => {
                let t = wire::Tenant::from(tenant.clone());
                let mesh = t.mesh_control.unwrap_or_default();
                Self::Tenant {
                    id: t.id,
                    cluster_pod_range: t.cluster_pod_range,
                    cluster_domain: t.cluster_domain,
                    dns_address: t.dns_address,
                    upstream_nameservers: t.upstream_nameservers,
                    mesh_address: mesh.address,
                    mesh_trust_domain: mesh.trust_domain,
                    mesh_cluster_id: mesh.cluster_id,
                    mesh_network: mesh.network,
                }
            }
            Record::Admitted(entry) => Self::Admitted {
                uid: entry.key.pod.to_string(),
                attempt: entry.key.attempt.get(),
                tenant: entry.tenant.to_string(),
                namespace: entry.namespace.to_string(),
                name: entry.name.to_string(),
                node_name: entry.node_name.clone(),
                cpu_millis: entry.claim.cpu_millis,
                memory_bytes: entry.claim.memory_bytes,
                ephemeral_storage_bytes: entry.claim.ephemeral_storage_bytes,
                sandboxes: entry.claim.sandboxes,
                address: entry.address,
                identity: entry.identity.clone(),
                accepted_at: entry.accepted_at,
            },
            Record::Stopping(key, by) => Self::Stopping {
                uid: key.pod.to_string(),
                attempt: key.attempt.get(),
                by: *by,
            },
            Record::Ended(key) => Self::Ended {
                uid: key.pod.to_string(),
                attempt: key.attempt.get(),
            },
        }
    }
}

fn key(uid: String, attempt: u32) -> Result<SandboxKey, Invalid> {
    Ok(SandboxKey {
        pod: PodUid::parse("uid", uid)?,
        attempt: Attempt::parse("attempt", attempt)?,
    })
}

impl Contents {
    fn apply(&mut self, stored: Stored) -> Result<(), Invalid> {
        match stored {
            Stored::Generation { number } => self.generation = number,
            Stored::Tenant {
                id,
                cluster_pod_range,
                cluster_domain,
                dns_address,
                upstream_nameservers,
                mesh_address,
                mesh_trust_domain,
                mesh_cluster_id,
                mesh_network,
            } => {
                let tenant = Tenant::try_from(wire::Tenant {
                    id,
                    cluster_pod_range,
                    cluster_domain,
                    dns_address,
                    upstream_nameservers,
                    mesh_control: Some(wire::MeshControl {
                        address: mesh_address,
                        trust_domain: mesh_trust_domain,
                        cluster_id: mesh_cluster_id,
                        network: mesh_network,
                    }),
                })?;
                self.tenants.insert(tenant.id.clone(), tenant);
            }
            Stored::Router { tenant, address } => {
                self.routers.insert(TenantId::parse("tenant", tenant)?, address);
            }
            Stored::LastAddress { address } => self.last_address = Some(address),
            Stored::Admitted {
                uid,
                attempt,
                tenant,
                namespace,
                name,
                node_name,
                cpu_millis,
                memory_bytes,
                ephemeral_storage_bytes,
                sandboxes,
                address,
                identity,
                accepted_at,
            } => {
                let key = key(uid, attempt)?;
                let tenant = TenantId::parse("tenant", tenant)?;
                self.last_address = Some(address);
                self.admitted.insert(
                    key.clone(),
                    Entry {
                        key,
                        tenant,
                        namespace: Namespace::parse("namespace", namespace)?,
                        name: PodName::parse("name", name)?,
                        node_name,
                        claim: Resources {
                            cpu_millis,
                            memory_bytes,
                            ephemeral_storage_bytes,
                            sandboxes,
                        },
                        address,
                        identity,
                        accepted_at,
                        stop_by: None,
                    },
                );
            }
            Stored::Stopping { uid, attempt, by } => {
                if let Some(entry) = self.admitted.get_mut(&key(uid, attempt)?) {
                    entry.stop_by = Some(entry.stop_by.map_or(by, |known| known.min(by)));
                }
            }
            Stored::Ended { uid, attempt } => {
                let key = key(uid, attempt)?;
                self.admitted.remove(&key);
                self.ended.push(key);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
