//! The accounts of one host: looks at its pods go in, records come out.
//!
//! ```text
//!  open ─▶ read, read, … ─▶ cut ─▶ (durable) ─▶ kept ─▶ read … ─▶ end ─▶ cut ─▶ kept ─▶ forget
//! ```
//!
//! An account counts up from the attempt's admission; a record is the difference
//! between two of its states. [`Book::cut`] changes nothing: what could not be made
//! durable is cut again later, longer. So what is durable adds up to what was counted,
//! and a number is given once.
//!
//! Called by the agent's `usage`, which keeps the accounts on disk beside the records
//! that were cut of them.

use std::{collections::BTreeMap, time::Duration};

use pool_agent_api::SandboxKey;
use serde::{Deserialize, Serialize};

use crate::record::{Amounts, Began, Ended, Moment, Record, Start, Subject};

const NANOS: u128 = 1_000_000_000;

/// What an attempt's claim holds for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
}

/// Bytes that the mesh carried, counted from when the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    pub sent: u64,
    pub received: u64,
}

/// One look at an attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// None: it has no cgroup, not yet or not any more.
    pub cgroup: Option<CgroupReading>,
    pub mesh: Carried,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupReading {
    /// Counts up, over all its containers, also those that are gone.
    pub cpu_nanos: u64,
    /// The working set now.
    pub memory_bytes: u64,
}

/// A sum of bytes over time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ByteTime {
    byte_seconds: u64,
    /// Byte-nanoseconds that make no byte-second yet.
    rest: u64,
}

impl ByteTime {
    /// `twice` bytes halved, over `nanos`.
    fn add(&mut self, twice: u128, nanos: u64) {
        let all = twice.saturating_mul(u128::from(nanos)) / 2 + u128::from(self.rest);
        let seconds = u64::try_from(all / NANOS).unwrap_or(u64::MAX);
        self.byte_seconds = self.byte_seconds.saturating_add(seconds);
        // Less than a second's.
        self.rest = u64::try_from(all % NANOS).unwrap_or(0);
    }
}

/// What was counted since the attempt was admitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Totals {
    cpu_nanos: u64,
    memory: ByteTime,
    mesh: Carried,
    unsampled_nanos: u64,
}

/// The last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    at: Moment,
    cpu_nanos: u64,
    memory_bytes: u64,
    mesh: Carried,
}

/// One attempt's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    subject: Subject,
    claim: Claim,
    start: Start,
    opened: Moment,
    /// Of the next record.
    sequence: u64,
    /// Where the next record begins, and why.
    from: Moment,
    began: Began,
    seen: Seen,
    totals: Totals,
    /// The totals at `from`.
    told: Totals,
    ended: Option<Ended>,
    /// Its last record is durable. What is left of it keeps another account of the
    /// attempt from being opened.
    closed: bool,
    /// The host has forgotten the attempt: nobody will open it again.
    forgotten: bool,
}

impl Account {
    /// What the claim comes to from the admission until `at`: CPU in nanoseconds of a
    /// core, memory in byte-seconds.
    fn requested(&self, at: Moment) -> (u64, u64) {
        let held = u128::from(at.since(self.opened));
        let whole = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
        (
            whole(u128::from(self.claim.cpu_millis) * held / 1000),
            whole(u128::from(self.claim.memory_bytes) * held / NANOS),
        )
    }

    fn record(&self, book: &Book) -> Record {
        let (until, since) = (self.requested(self.seen.at), self.requested(self.from));
        let (now, before) = (&self.totals, &self.told);
        Record {
            subject: self.subject.clone(),
            sequence: self.sequence,
            class: book.place.class.clone(),
            zone: book.place.zone.clone(),
            boot_id: book.boot_id.clone(),
            from: self.from,
            to: self.seen.at,
            began: self.began,
            ended: self.ended.unwrap_or(Ended::Continues),
            start: self.start,
            amounts: Amounts {
                requested_cpu_nanos: until.0 - since.0,
                requested_memory_byte_seconds: until.1 - since.1,
                used_cpu_nanos: now.cpu_nanos - before.cpu_nanos,
                used_memory_byte_seconds: now.memory.byte_seconds - before.memory.byte_seconds,
                mesh_sent_bytes: now.mesh.sent - before.mesh.sent,
                mesh_received_bytes: now.mesh.received - before.mesh.received,
                unsampled_nanos: now.unsampled_nanos - before.unsampled_nanos,
            },
            lost: book.lost,
        }
    }

    fn read(&mut self, reading: Reading, at: Moment, patience: u64) {
        let passed = at.since(self.seen.at);
        let memory = reading.cgroup.map_or(0, |cgroup| cgroup.memory_bytes);
        let twice = u128::from(self.seen.memory_bytes) + u128::from(memory);
        self.totals.memory.add(twice, passed);
        if let Some(cgroup) = reading.cgroup {
            let more = counted(self.seen.cpu_nanos, cgroup.cpu_nanos);
            self.totals.cpu_nanos = self.totals.cpu_nanos.saturating_add(more);
            self.seen.cpu_nanos = cgroup.cpu_nanos;
        }
        let (mesh, seen) = (&mut self.totals.mesh, &mut self.seen.mesh);
        mesh.sent = mesh.sent.saturating_add(counted(seen.sent, reading.mesh.sent));
        mesh.received = mesh
            .received
            .saturating_add(counted(seen.received, reading.mesh.received));
        *seen = reading.mesh;
        if passed > patience {
            self.totals.unsampled_nanos = self.totals.unsampled_nanos.saturating_add(passed);
        }
        self.seen.memory_bytes = memory;
        self.seen.at = Moment {
            wall: at.wall,
            // Two looks may overtake each other on their way here.
            boot: at.boot.max(self.seen.at.boot),
        };
    }
}

/// How much a counter went up; one that is lower than before began anew.
fn counted(before: u64, now: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

/// Where the host stands in its cell, as its records say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    pub class: String,
    pub zone: String,
}

#[derive(Debug, Clone)]
pub struct Book {
    place: Place,
    boot_id: String,
    /// A longer time between two looks is one that nobody looked at. Nanoseconds.
    patience: u64,
    accounts: BTreeMap<SandboxKey, Account>,
    lost: u64,
}

impl Book {
    pub fn new(place: Place, boot_id: impl Into<String>, patience: Duration) -> Self {
        Self {
            place,
            boot_id: boot_id.into(),
            patience: u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX),
            accounts: BTreeMap::new(),
            lost: 0,
        }
    }

    /// Goes on with what an earlier agent kept, in this boot of the host or (its boot
    /// id) another one: then every attempt is over, as of the last look at it.
    pub fn restore(&mut self, accounts: Vec<Account>, boot_id: &str, lost: u64) {
        self.lost = self.lost.saturating_add(lost);
        for mut account in accounts {
            // The mesh counts from the agent's start.
            account.seen.mesh = Carried::default();
            if boot_id != self.boot_id {
                account.ended = account.ended.or(Some(Ended::HostRestarted));
            }
            self.accounts.insert(account.subject.key.clone(), account);
        }
    }

    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// An attempt was admitted. One that has an account goes on with it.
    pub fn open(&mut self, subject: Subject, claim: Claim, start: Start, at: Moment) {
        let began = match subject.key.attempt.get() {
            1 => Began::Started,
            _ => Began::Moved,
        };
        self.begin(subject, claim, start, at, 0, began);
    }

    /// An attempt is here whose account was lost. Its numbers go on from one that was
    /// not given before, and what it used until now, which may be on a record already,
    /// is on none from here on: `reading` is where its counters stand.
    pub fn reopen(&mut self, subject: Subject, claim: Claim, start: Start, at: Moment, reading: Reading) {
        if self.accounts.contains_key(&subject.key) {
            return;
        }
        let key = subject.key.clone();
        // Numbers are given once a second at most.
        let sequence = u64::try_from(at.wall.as_second()).unwrap_or(0);
        self.begin(subject, claim, start, at, sequence, Began::Resumed);
        if let Some(account) = self.accounts.get_mut(&key) {
            let cgroup = reading.cgroup.unwrap_or_default();
            account.seen.cpu_nanos = cgroup.cpu_nanos;
            account.seen.memory_bytes = cgroup.memory_bytes;
        }
        self.lost = self.lost.saturating_add(1);
    }

    fn begin(
        &mut self,
        subject: Subject,
        claim: Claim,
        start: Start,
        at: Moment,
        sequence: u64,
        began: Began,
    ) {
        self.accounts.entry(subject.key.clone()).or_insert(Account {
            subject,
            claim,
            start,
            opened: at,
            sequence,
            from: at,
            began,
            seen: Seen {
                at,
                cpu_nanos: 0,
                memory_bytes: 0,
                mesh: Carried::default(),
            },
            totals: Totals::default(),
            told: Totals::default(),
            ended: None,
            closed: false,
            forgotten: false,
        });
    }

    /// Attempts that are to be looked at.
    pub fn running(&self) -> Vec<SandboxKey> {
        let running = self
            .accounts
            .iter()
            .filter(|(_, account)| account.ended.is_none());
        running.map(|(key, _)| key.clone()).collect()
    }

    pub fn is_running(&self, key: &SandboxKey) -> bool {
        self.accounts
            .get(key)
            .is_some_and(|account| account.ended.is_none())
    }

    pub fn read(&mut self, key: &SandboxKey, reading: Reading, at: Moment) {
        let patience = self.patience;
        if let Some(account) = self.accounts.get_mut(key).filter(|a| a.ended.is_none()) {
            account.read(reading, at, patience);
        }
    }

    /// The attempt is over, as of the last look at it.
    pub fn end(&mut self, key: &SandboxKey, ended: Ended) {
        if let Some(account) = self.accounts.get_mut(key) {
            account.ended.get_or_insert(ended);
        }
    }

    /// The host has forgotten the attempt: it is never opened again. Its account goes as
    /// soon as its last record is durable.
    pub fn forget(&mut self, key: &SandboxKey) {
        if let Some(account) = self.accounts.get_mut(key) {
            account.forgotten = true;
            if account.closed {
                self.accounts.remove(key);
            }
        }
    }

    /// All of them, whether they run or not.
    pub fn keys(&self) -> Vec<SandboxKey> {
        self.accounts.keys().cloned().collect()
    }

    /// The records that are due: of what has ended, and of intervals that are
    /// `interval` long. At most `most`.
    pub fn cut(&self, interval: Duration, most: usize) -> Vec<Record> {
        let due = |account: &&Account| {
            let length = account.seen.at.since(account.from);
            account.ended.is_some() || u128::from(length) >= interval.as_nanos()
        };
        let open = self.accounts.values().filter(|account| !account.closed);
        let due = open.filter(due).take(most);
        due.map(|account| account.record(self)).collect()
    }

    /// The records are durable: the next ones begin where they end.
    pub fn kept(&mut self, records: &[Record]) {
        for record in records {
            let key = &record.subject.key;
            let Some(account) = self.accounts.get_mut(key) else {
                continue;
            };
            if record.ended != Ended::Continues {
                account.closed = true;
                if account.forgotten {
                    self.accounts.remove(key);
                }
                continue;
            }
            let amounts = &record.amounts;
            let told = &mut account.told;
            told.cpu_nanos += amounts.used_cpu_nanos;
            told.memory.byte_seconds += amounts.used_memory_byte_seconds;
            told.mesh.sent += amounts.mesh_sent_bytes;
            told.mesh.received += amounts.mesh_received_bytes;
            told.unsampled_nanos += amounts.unsampled_nanos;
            account.from = record.to;
            account.began = Began::Continued;
            account.sequence = record.sequence + 1;
        }
    }

    /// What has to be as durable as the records that were cut.
    pub fn accounts(&self) -> impl ExactSizeIterator<Item = &Account> {
        self.accounts.values()
    }

    /// Records that this host has lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    pub fn lose(&mut self, records: u64) {
        self.lost = self.lost.saturating_add(records);
    }

    /// Gives up the accounts of ended attempts beyond `most`, for want of room. Says
    /// how many.
    pub fn give_up(&mut self, most: usize) -> usize {
        let waits = |(_, account): &(&SandboxKey, &Account)| account.ended.is_some() && !account.closed;
        let ended = self.accounts.iter().filter(waits);
        let mut ended: Vec<_> = ended
            .map(|(key, account)| (account.seen.at.boot, key.clone()))
            .collect();
        let beyond = ended.len().saturating_sub(most);
        ended.sort();
        for (_, key) in ended.drain(..beyond) {
            if let Some(account) = self.accounts.get_mut(&key) {
                account.closed = true;
                if account.forgotten {
                    self.accounts.remove(&key);
                }
            }
        }
        self.lose(beyond as u64);
        beyond
    }
}

#[cfg(test)]
mod tests;
