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
//!
//! A disk that fills up stops no pod from being stopped: room for the ends of what is
//! here is set aside on the disk while there is some, and nothing is admitted
//! without it. A write that failed is cut off again, and the next one is tried.
//!
//! What is over takes room until the file is several times as large as it need be: then
//! it is written anew, as at a start.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::Ipv4Addr,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
};

use jiff::Timestamp;
use nix::fcntl::{FallocateFlags, fallocate};
use pool_agent_api::{
    Attempt, Invalid, Namespace, PodName, PodUid, Resources, SandboxKey, Tenant, TenantId, wire,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use crate::user_ids::IdRange;

/// Records of ended attempts kept when the file is rewritten at a start.
const ENDED_KEPT: usize = 100_000;
/// Commits that wait for the disk; a caller beyond that waits for its turn.
const QUEUE: usize = 256;
/// Set aside on the disk beyond the file's end, in bytes: some thousand stops and ends,
/// more than a host has sandboxes.
const RESERVE: u64 = 1 << 20;
/// The file is written anew when it has so many times the bytes that it had then, but
/// no smaller than this.
const GROWTH: u64 = 4;
const SMALL: u64 = 1 << 20;

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
    #[error("the host's disk has no room to record another sandbox: {0}")]
    NoRoom(String),
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
    /// The ids of its user namespace, which its containers must agree on for as long
    /// as it lives; None if it has none.
    pub user_ids: Option<IdRange>,
    pub accepted_at: Timestamp,
    /// Of the host as it was admitted: under another it is void. None: an older agent
    /// admitted it, which did not say.
    pub boot_id: Option<String>,
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
    Ended(TenantId, SandboxKey),
}

impl Record {
    /// Whether what it says makes the ledger need more room later.
    fn begins(&self) -> bool {
        matches!(self, Self::Router(..) | Self::Tenant(_) | Self::Admitted(_))
    }
}

/// What the ledger held when it was opened.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// How often an agent has been started here; orders revisions over restarts.
    pub generation: u32,
    pub tenants: BTreeMap<TenantId, Tenant>,
    pub routers: BTreeMap<TenantId, Ipv4Addr>,
    pub admitted: BTreeMap<SandboxKey, Entry>,
    /// Oldest first.
    pub ended: Vec<(TenantId, SandboxKey)>,
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
    done: oneshot::Sender<Result<(), LedgerError>>,
}

impl Ledger {
    /// Reads the file, rewrites it without what is over, and begins the next
    /// generation.
    pub fn open(path: &Path) -> Result<(Self, Contents), LedgerError> {
        let opening = |source| LedgerError::Open {
            path: path.to_owned(),
            source,
        };
        let (mut contents, whole) = read(path)?;
        contents.generation = contents.generation.saturating_add(1);
        contents.forget_the_oldest();
        let file = match rewrite(path, &contents) {
            Ok(file) => file,
            Err(error) if is_full(&error) => {
                tracing::warn!(error = %error, "the disk is full: the ledger is written on, not anew");
                write_on(path, whole, contents.generation).map_err(opening)?
            }
            Err(error) => return Err(opening(error)),
        };
        let writer = Writer::new(file).map_err(opening)?;
        let upkeep = Upkeep::new(path, contents.clone(), writer.good);
        if let Err(error) = writer.set_aside(0) {
            tracing::warn!(error = %error, "the disk has no room for the ledger: nothing will be admitted");
        }
        let (commits, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("ledger".into())
            .spawn(move || write_commits(writer, upkeep, queue))
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
        answer.await.map_err(|_| LedgerError::Closed)?
    }
}

/// The file, and how far it is known to be good.
struct Writer {
    file: File,
    /// Bytes that are on disk.
    good: u64,
    /// Bytes that may be in the file.
    written: u64,
}

impl Writer {
    fn new(file: File) -> io::Result<Self> {
        let good = file.metadata()?.len();
        Ok(Self {
            file,
            good,
            written: good,
        })
    }

    /// On disk when it returns, or not there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Of an earlier write that failed a part may be there.
        if self.written != self.good {
            self.file.set_len(self.good)?;
            self.file.sync_all()?;
            self.written = self.good;
        }
        let end = self.good + bytes.len() as u64;
        self.written = end;
        self.file.write_all_at(bytes, self.good)?;
        self.file.sync_data()?;
        self.good = end;
        Ok(())
    }

    /// Keeps room on the disk for what has to be written later, beyond `more` bytes.
    fn set_aside(&self, more: usize) -> io::Result<()> {
        let keep = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        let (from, length) = (keep(self.good)?, keep(more as u64 + RESERVE)?);
        match fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, length) {
            // A file system that cannot: then there is no more than the attempt.
            Ok(()) | Err(nix::Error::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What the file amounts to, and when it is written anew.
struct Upkeep {
    path: PathBuf,
    contents: Contents,
    due: u64,
}

impl Upkeep {
    fn new(path: &Path, contents: Contents, size: u64) -> Self {
        Self {
            path: path.to_owned(),
            contents,
            due: Self::due_after(size),
        }
    }

    fn due_after(size: u64) -> u64 {
        size.saturating_mul(GROWTH).max(SMALL)
    }

    fn note(&mut self, records: &[Record]) {
        for record in records {
            // What is in memory was valid before it was stored.
            if let Err(error) = self.contents.apply(Stored::from(record)) {
                tracing::error!(error = %error, "a record of the ledger does not read");
            }
        }
    }

    /// Leaves the writer with a file that holds the same in fewer bytes, or as it was.
    fn compact(&mut self, writer: &mut Writer) {
        if writer.good < self.due {
            return;
        }
        self.contents.forget_the_oldest();
        let anew = rewrite(&self.path, &self.contents).and_then(Writer::new);
        match anew {
            Ok(anew) => {
                tracing::info!(
                    before = writer.good,
                    after = anew.good,
                    "the ledger was written anew"
                );
                *writer = anew;
                if let Err(error) = writer.set_aside(0) {
                    tracing::warn!(error = %error, "the disk has no room for the ledger: nothing will be admitted");
                }
            }
            Err(error) => {
                tracing::warn!(error = %error, "the ledger was not written anew");
                // It may stand in the old one's place for all that: then it is the ledger.
                match in_place(&self.path, &writer.file) {
                    Ok(None) => {}
                    Ok(Some(anew)) => *writer = anew,
                    Err(error) => tracing::error!(error = %error, "the ledger cannot be looked at"),
                }
            }
        }
        self.due = Self::due_after(writer.good);
    }
}

/// What is at `path`, if it is not `file`.
fn in_place(path: &Path, file: &File) -> io::Result<Option<Writer>> {
    let there = OpenOptions::new().write(true).open(path)?;
    if there.metadata()?.ino() == file.metadata()?.ino() {
        return Ok(None);
    }
    Writer::new(there).map(Some)
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn write_commits(mut writer: Writer, mut upkeep: Upkeep, mut queue: mpsc::Receiver<Commit>) {
    let mut waiting = vec![];
    let mut failing = false;
    while queue.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        // One line for each commit, so that its records are torn together or not at all.
        let mut commits: Vec<(Vec<u8>, Commit)> = waiting.drain(..).map(|c| (line(&c.records), c)).collect();
        if commits.iter().any(|(_, commit)| begins(commit)) {
            let more = commits.iter().map(|(line, _)| line.len()).sum();
            if let Err(error) = writer.set_aside(more) {
                tracing::warn!(error = %error, "the disk has no room for the ledger: nothing is admitted");
                let refused = commits.extract_if(.., |(_, commit)| begins(commit));
                for (_, commit) in refused {
                    answer(commit, Err(LedgerError::NoRoom(error.to_string())));
                }
            }
        }
        let bytes: Vec<u8> = commits.iter().flat_map(|(line, _)| line).copied().collect();
        let result = if bytes.is_empty() {
            Ok(())
        } else {
            writer.append(&bytes)
        };
        match &result {
            Ok(()) if failing => tracing::info!("the ledger can be written again"),
            Err(error) if !failing => tracing::error!(error = %error, "the ledger cannot be written"),
            _ => {}
        }
        failing = result.is_err();
        for (_, commit) in commits {
            if result.is_ok() {
                upkeep.note(&commit.records);
            }
            let told = result
                .as_ref()
                .copied()
                .map_err(|e| LedgerError::Write(e.to_string()));
            answer(commit, told);
        }
        upkeep.compact(&mut writer);
    }
}

fn begins(commit: &Commit) -> bool {
    commit.records.iter().any(Record::begins)
}

fn answer(commit: Commit, result: Result<(), LedgerError>) {
    if commit.done.send(result).is_err() {
        tracing::debug!("whoever committed to the ledger has gone");
    }
}

/// Of a line.
pub(crate) fn checksum(json: &str) -> String {
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

/// What the file holds, and how many bytes of it are whole lines.
fn read(path: &Path) -> Result<(Contents, u64), LedgerError> {
    let opening = |source| LedgerError::Open {
        path: path.to_owned(),
        source,
    };
    let mut bytes = vec![];
    match File::open(path) {
        Ok(mut file) => {
            file.read_to_end(&mut bytes).map_err(opening)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Contents::default(), 0)),
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
    Ok((contents, (bytes.len() - rest.len()) as u64))
}

fn decode(line: &[u8]) -> Result<Vec<Stored>, String> {
    let text = std::str::from_utf8(line).map_err(|e| e.to_string())?;
    let (sum, json) = text.split_once(' ').ok_or("it has no checksum")?;
    if sum != checksum(json) {
        return Err("its checksum is wrong".into());
    }
    serde_json::from_str(json).map_err(|e| e.to_string())
}

/// Goes on with the file as it is, after its last whole line.
fn write_on(path: &Path, whole: u64, generation: u32) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    // Not without need: it would give back what was set aside beyond the end.
    if file.metadata()?.len() != whole {
        file.set_len(whole)?;
    }
    let mut writer = Writer::new(file)?;
    // Into what was set aside, as no other room is left.
    writer.append(&encode(&[Stored::Generation { number: generation }]))?;
    Ok(writer.file)
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
    for (tenant, key) in &contents.ended {
        bytes.extend(line(&[Record::Ended(tenant.clone(), key.clone())]));
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
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // It takes what room there is.
        std::fs::remove_file(&beside)?;
        return Err(error);
    }
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
        /// The first of 65536.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_ids: Option<u32>,
        #[serde(with = "as_text")]
        accepted_at: Timestamp,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot_id: Option<String>,
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
        tenant: String,
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
                user_ids: entry.user_ids.map(|ids| ids.first),
                accepted_at: entry.accepted_at,
                boot_id: entry.boot_id.clone(),
            },
            Record::Stopping(key, by) => Self::Stopping {
                uid: key.pod.to_string(),
                attempt: key.attempt.get(),
                by: *by,
            },
            Record::Ended(tenant, key) => Self::Ended {
                uid: key.pod.to_string(),
                attempt: key.attempt.get(),
                tenant: tenant.to_string(),
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
    fn forget_the_oldest(&mut self) {
        if let Some(over @ 1..) = self.ended.len().checked_sub(ENDED_KEPT) {
            self.ended.drain(..over);
        }
    }

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
                let name = id.clone();
                let settings = Tenant::try_from(wire::Tenant {
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
                });
                match settings {
                    Ok(tenant) => drop(self.tenants.insert(tenant.id.clone(), tenant)),
                    // An earlier agent took what this one would not. Its virtual node
                    // configures it again.
                    Err(invalid) => {
                        tracing::warn!(tenant = name, error = %invalid, "a tenant's settings are left out");
                        self.tenants.remove(&TenantId::parse("tenant", name)?);
                    }
                }
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
                user_ids,
                accepted_at,
                boot_id,
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
                        user_ids: user_ids.map(|first| IdRange { first }),
                        accepted_at,
                        boot_id,
                        stop_by: None,
                    },
                );
            }
            Stored::Stopping { uid, attempt, by } => {
                if let Some(entry) = self.admitted.get_mut(&key(uid, attempt)?) {
                    entry.stop_by = Some(entry.stop_by.map_or(by, |known| known.min(by)));
                }
            }
            Stored::Ended { uid, attempt, tenant } => {
                let key = key(uid, attempt)?;
                self.admitted.remove(&key);
                self.ended.push((TenantId::parse("tenant", tenant)?, key));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
