//! What this host's pods use: looked at, put on record, and handed to the pool
//! operator's collector ([why so](../../../docs/decisions/usage.md)).
//!
//! ```text
//!  host, perform ──open, end, settle──▶ Meter ──▶ a thread: looks at cgroups,
//!                                                  Book (pure) ──▶ spool (fsync)
//!                                                                    │
//!                          the operator's collector ◀── courier ◀────┘
//! ```
//!
//! What always holds:
//! - usage keeps no pod from being started or stopped: whoever waits here waits for
//!   [`PATIENCE`] at most, and a disk that is full or a collector that is away is
//!   nobody's concern but this module's;
//! - a record is handed over only when it is durable here, and goes from here only when
//!   it is durable there;
//! - no tenant is asked, and none can hold a record back;
//! - what is lost is counted, and each later record says so.

mod courier;
mod spool;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use bounds::Seldom;
use jiff::Timestamp;
use mesh_runtime::{
    control::{InvalidPoolTls, OpenControlError, PoolTls},
    telemetry::Carried,
};
use nix::time::{ClockId, clock_gettime};
use pool_agent_api::SandboxKey;
use pool_usage::{
    Book, Claim, Ended, Moment, Reading, Start, Subject,
    account::{self, CgroupReading, Place},
};
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use tokio::sync::watch;

use self::spool::Spool;
use crate::{causes::described, cgroup::Cgroups, ledger::Entry, service::tls::Pem};

/// How long somebody who ends a pod waits for its last look to be durable.
const PATIENCE: Duration = Duration::from_secs(2);
/// Accounts of ended attempts that wait in memory for a disk with room.
const ENDED_KEPT: usize = 10_000;
/// Records in one batch: some hundred kilobytes.
const BATCH: usize = 2000;
/// So many samples may be late before what lies between counts as unsampled.
const LATE_SAMPLES: u32 = 2;

/// The host's settings for usage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `HOST:PORT` of the operator's collector.
    pub collector: String,
    /// The longest interval of a record.
    pub interval: Duration,
    /// How often pods are looked at.
    pub sample: Duration,
    /// What records may take of the disk while the collector is away.
    pub keep_bytes: u64,
}

/// Where records go while nobody meters: nowhere. Cheap to clone.
#[derive(Clone)]
pub struct Meter {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    pages: Mutex<Pages>,
    cgroups: Cgroups,
    spool: Spool,
    interval: Duration,
    /// Accounts were lost: what is here already is not counted from its beginning.
    damaged: bool,
    wake: SyncSender<()>,
    /// Rounds that have begun, and the last one that is over.
    begun: AtomicU64,
    over: watch::Sender<u64>,
    tls: Arc<PoolTls>,
    metrics: Metrics,
}

#[derive(Default)]
struct Metrics {
    accounts: Gauge,
    bytes: Gauge,
    lost: Gauge,
    failures: Counter,
}

struct Pages {
    book: Book,
    /// Attempts that are over and want a last look.
    ending: HashMap<SandboxKey, Ended>,
    /// Those that somebody asked to end.
    asked: HashSet<SandboxKey>,
    carried: HashMap<SandboxKey, Arc<Carried>>,
}

impl Meter {
    /// Of a host whose operator wants no records.
    pub fn off() -> Self {
        Self { inner: None }
    }

    /// Goes on with what is in `directory`, and begins to look and to hand over.
    pub fn start(
        settings: &Settings,
        place: Place,
        boot_id: &str,
        cgroups: Cgroups,
        directory: &Path,
        tls: PoolTls,
        registry: &mut Registry,
    ) -> Result<Self, OpenControlError> {
        let (spool, kept) = Spool::open(directory, settings.keep_bytes);
        let mut book = Book::new(place, boot_id, settings.sample * LATE_SAMPLES);
        let damaged = kept.damaged;
        book.restore(kept.accounts, &kept.boot_id, kept.lost);
        let metrics = Metrics::register(registry);
        let (wake, woken) = sync_channel(1);
        let inner = Arc::new(Inner {
            pages: Mutex::new(Pages {
                book,
                ending: HashMap::new(),
                asked: HashSet::new(),
                carried: HashMap::new(),
            }),
            cgroups,
            spool,
            interval: settings.interval,
            damaged,
            wake,
            begun: AtomicU64::new(0),
            over: watch::Sender::new(0),
            tls: Arc::new(tls),
            metrics,
        });
        tokio::spawn(courier::carry(
            inner.spool.clone(),
            courier::dial(&settings.collector, &inner.tls)?,
        ));
        let (meter, sample) = (inner.clone(), settings.sample);
        let thread = thread::Builder::new().name("usage".into());
        if let Err(error) = thread.spawn(move || meter.keep(woken, sample)) {
            tracing::error!(error = %error, "usage is not metered: its thread does not start");
        }
        Ok(Self { inner: Some(inner) })
    }

    /// Connections to the collector are made with these from now on.
    pub fn renew(&self, pem: &Pem) -> Result<(), InvalidPoolTls> {
        match &self.inner {
            Some(inner) => inner.tls.replace(&pem.certificate, &pem.key, &pem.ca),
            None => Ok(()),
        }
    }

    /// An attempt was admitted just now.
    pub fn open(&self, entry: &Entry) {
        let Some(inner) = &self.inner else { return };
        let (subject, claim) = of(entry);
        inner.pages().book.open(subject, claim, Start::Cold, now());
        inner.wake();
    }

    /// What the ledger has at the agent's start. Attempts go on with their accounts. Those
    /// that have none began so shortly before the agent died that none was kept; or it
    /// was damaged. Accounts of attempts that the ledger does not have are over.
    pub fn adopt<'a>(&self, admitted: impl Iterator<Item = &'a Entry>) {
        let Some(inner) = &self.inner else { return };
        let mut known = HashSet::new();
        for entry in admitted {
            known.insert(entry.key.clone());
            let (subject, claim) = of(entry);
            let reading = inner.damaged.then(|| inner.look(&entry.key, None));
            let now = now();
            let held = now.wall.duration_since(entry.accepted_at).as_nanos();
            let admitted = Moment {
                wall: entry.accepted_at,
                boot: now.boot.saturating_sub(u64::try_from(held).unwrap_or(0)),
            };
            let book = &mut inner.pages().book;
            match reading {
                Some(reading) => book.reopen(subject, claim, Start::Cold, now, reading),
                None => book.open(subject, claim, Start::Cold, admitted),
            }
        }
        let book = &mut inner.pages().book;
        for key in book.keys() {
            if !known.contains(&key) {
                book.end(&key, Ended::Lost);
                book.forget(&key);
            }
        }
        inner.wake();
    }

    /// The attempt's end is in the ledger: nobody asks for it again.
    pub fn forget(&self, key: &SandboxKey) {
        let Some(inner) = &self.inner else { return };
        inner.pages().book.forget(key);
    }

    /// The mesh counts the attempt's bytes here.
    pub fn carried(&self, key: &SandboxKey, carried: Arc<Carried>) {
        let Some(inner) = &self.inner else { return };
        let mut pages = inner.pages();
        if pages.book.is_running(key) {
            pages.carried.insert(key.clone(), carried);
        }
    }

    /// Somebody asked for the attempt's end.
    pub fn asked(&self, key: &SandboxKey) {
        let Some(inner) = &self.inner else { return };
        let mut pages = inner.pages();
        // What is over already ended for another reason.
        if pages.book.is_running(key) && !pages.ending.contains_key(key) {
            pages.asked.insert(key.clone());
        }
    }

    /// Nothing of the attempt runs any more and its room is free. `reason` is the one in
    /// its status.
    pub fn end(&self, key: &SandboxKey, reason: &str) {
        let Some(inner) = &self.inner else { return };
        let mut pages = inner.pages();
        let asked = pages.asked.remove(key);
        let ended = match reason {
            "Evicted" => Ended::Evicted,
            "DeadlineExceeded" => Ended::DeadlineExceeded,
            "SandboxLost" | "Fenced" => Ended::Lost,
            _ if asked => Ended::Stopped,
            _ => Ended::Completed,
        };
        pages.ending.entry(key.clone()).or_insert(ended);
        drop(pages);
        inner.wake();
    }

    /// Returns when a look at everything that began after now is durable, or cannot be,
    /// or [`PATIENCE`] is over. To be called before a pod's cgroup is removed, and before
    /// its end is recorded.
    pub async fn settle(&self) {
        let Some(inner) = &self.inner else { return };
        let next = inner.begun.load(Ordering::SeqCst) + 1;
        let mut over = inner.over.subscribe();
        inner.wake();
        let settled = tokio::time::timeout(PATIENCE, over.wait_for(|&round| round >= next)).await;
        if !matches!(settled, Ok(Ok(_))) {
            tracing::warn!("a look at what pods use takes too long: nobody waits for it");
        }
    }
}

fn of(entry: &Entry) -> (Subject, Claim) {
    let subject = Subject {
        tenant: entry.tenant.clone(),
        namespace: entry.namespace.clone(),
        pod: entry.name.clone(),
        key: entry.key.clone(),
    };
    let claim = Claim {
        cpu_millis: entry.claim.cpu_millis,
        memory_bytes: entry.claim.memory_bytes,
    };
    (subject, claim)
}

fn now() -> Moment {
    // It fails for clocks that a kernel does not have; this one it has.
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    Moment {
        wall: Timestamp::now(),
        boot: u64::try_from(boot.as_nanos()).unwrap_or(u64::MAX),
    }
}

impl Inner {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        // A page is changed whole.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full queue: the thread is to wake up already.
        self.wake.try_send(()).ok();
    }

    fn keep(&self, woken: Receiver<()>, sample: Duration) {
        let failing = Seldom::default();
        // A host without pods writes nothing.
        let mut empty = true;
        loop {
            match woken.recv_timeout(sample) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while self.round(&failing, &mut empty) == BATCH {}
        }
    }

    /// Looks at every attempt, and puts on record what is due. Says how many records.
    fn round(&self, failing: &Seldom, empty: &mut bool) -> usize {
        let round = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        // What ends while this round looks has its last look in the next one.
        let (keys, ending) = {
            let pages = self.pages();
            let keys: Vec<_> = pages.book.running();
            let carried = |key: &SandboxKey| pages.carried.get(key).cloned();
            let keys: Vec<_> = keys.into_iter().map(|key| (carried(&key), key)).collect();
            (keys, pages.ending.clone())
        };
        let readings: Vec<_> = keys
            .into_iter()
            .map(|(carried, key)| (self.look(&key, carried.as_deref()), now(), key))
            .collect();
        let (next, records) = {
            let pages = &mut *self.pages();
            for (reading, at, key) in readings {
                pages.book.read(&key, reading, at);
            }
            for (key, ended) in ending {
                pages.book.end(&key, ended);
                pages.ending.remove(&key);
                pages.carried.remove(&key);
            }
            let given_up = pages.book.give_up(ENDED_KEPT);
            if given_up > 0 {
                tracing::error!(
                    records = given_up,
                    lost = pages.book.lost(),
                    "usage records are lost: nothing takes them"
                );
            }
            let records = match self.spool.has_room() {
                true => pages.book.cut(self.interval, BATCH),
                // Nothing is lost: intervals grow longer.
                false => vec![],
            };
            let mut next = pages.book.clone();
            next.kept(&records);
            (next, records)
        };
        let was_empty = std::mem::replace(empty, next.accounts().len() == 0 && records.is_empty());
        let written = match was_empty && *empty {
            true => Ok(()),
            false => self.spool.write(&next, &records),
        };
        match written {
            Ok(()) => self.pages().book.kept(&records),
            Err(error) => {
                *empty = false;
                self.metrics.failures.inc();
                if let Some(left_out) = failing.due(Instant::now()) {
                    tracing::error!(
                        error = described(&error),
                        left_out,
                        "usage cannot be recorded; it is counted on"
                    );
                }
            }
        }
        self.metrics.accounts.set(amount(next.accounts().len() as u64));
        self.metrics.lost.set(amount(next.lost()));
        self.metrics.bytes.set(amount(self.spool.bytes()));
        self.over.send_replace(round);
        records.len()
    }

    fn look(&self, key: &SandboxKey, carried: Option<&Carried>) -> Reading {
        let cgroup = self.cgroups.parents(key).iter().find_map(|parent| {
            Some(CgroupReading {
                cpu_nanos: self.cgroups.cpu_nanos(parent)?,
                memory_bytes: self.cgroups.usage(parent)?.working_set_bytes,
            })
        });
        Reading {
            cgroup,
            mesh: carried.map_or_else(account::Carried::default, |carried| account::Carried {
                sent: carried.sent(),
                received: carried.received(),
            }),
        }
    }
}

fn amount(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let Self {
            accounts,
            bytes,
            lost,
            failures,
        } = &metrics;
        registry.register(
            "pool_agent_usage_accounts",
            "Attempts that have an account",
            accounts.clone(),
        );
        registry.register(
            "pool_agent_usage_spool_bytes",
            "What waits on the disk for the collector",
            bytes.clone(),
        );
        registry.register(
            "pool_agent_usage_lost_records",
            "Records lost, ever",
            lost.clone(),
        );
        registry.register(
            "pool_agent_usage_write_failures",
            "Looks that could not be made durable",
            failures.clone(),
        );
        metrics
    }
}
