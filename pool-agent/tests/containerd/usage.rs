//! What pods used comes to the operator's collector, whole and once, whatever dies.
//! Time is compressed: a record every 4 s, a look every 2.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::BufReader,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use pool_agent_api::{
    SandboxKey,
    usage_wire::{Batch, usage_collector_client::UsageCollectorClient},
    wire,
};
use pool_usage::{
    Began, Ended, Record,
    line::{self, HostRecord},
};
use spindrift_local::{artifacts, tool::Tool};

use super::{
    host::{Host, wait},
    pod::{empty_dir, job, mounting, pod, shell},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Alone:
        the_sums_of_a_churn_with_kills_are_what_the_cgroups_counted,
        records_wait_for_a_collector_that_is_away_and_say_why_they_ended,
        a_tenants_virtual_node_hands_over_nothing_and_is_asked_for_nothing,
    ]
}

/// A look every so often, as the lab's agents are configured.
const SAMPLE_SECONDS: u64 = 2;
/// What a pod may use between the reader's last look and its end: it is asked to stop,
/// and its shell, its pause process and runc go.
const END_NANOS: u64 = 150_000_000;

/// What an independent reader of the kernel's files has seen of one pod's cgroup.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    cpu_nanos: u64,
    /// Bytes times nanoseconds.
    memory: u128,
    most_memory: u64,
    last: Option<(Instant, u64)>,
}

/// Reads every pod's cgroup some forty times a second, beside the agent and without it.
struct Reader {
    counted: Arc<Mutex<BTreeMap<String, Counted>>>,
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Reader {
    fn start(host: &Host) -> Self {
        let counted: Arc<Mutex<BTreeMap<String, Counted>>> = Arc::default();
        let over = Arc::new(AtomicBool::new(false));
        let (to, until, parent) = (counted.clone(), over.clone(), host.cgroup());
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                for (pod, directories) in pods(&parent) {
                    look(&mut to.lock().unwrap(), &pod, &directories);
                }
                std::thread::sleep(Duration::from_millis(25));
            }
        });
        Self {
            counted,
            over,
            thread,
        }
    }

    fn stop(self) -> BTreeMap<String, Counted> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let counted = self.counted.lock().unwrap();
        counted.clone()
    }
}

/// The pods' cgroups by name, in every hierarchy.
fn pods(parent: &str) -> BTreeMap<String, Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    let mut roots = vec![root.to_owned()];
    roots.extend(
        std::fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path()),
    );
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for root in roots {
        for class in ["", "burstable", "besteffort"] {
            let directory = root.join(parent).join(class);
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some(pod) = name.strip_prefix("pod") {
                    found.entry(pod.to_owned()).or_default().push(entry.path());
                }
            }
        }
    }
    found
}

fn look(all: &mut BTreeMap<String, Counted>, pod: &str, directories: &[PathBuf]) {
    let text = |name: &str| {
        directories
            .iter()
            .find_map(|d| std::fs::read_to_string(d.join(name)).ok())
    };
    let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
    let field = |name: &str, field: &str| {
        let text = text(name)?;
        let line = text.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().parse::<u64>().ok()
    };
    let cpu = number("cpuacct.usage").or_else(|| Some(field("cpu.stat", "usage_usec ")? * 1000));
    let memory = number("memory.usage_in_bytes").or_else(|| number("memory.current"));
    let idle =
        field("memory.stat", "total_inactive_file ").or_else(|| field("memory.stat", "inactive_file "));
    let (Some(cpu), Some(memory), Some(idle)) = (cpu, memory, idle) else {
        return;
    };
    let memory = memory.saturating_sub(idle);
    let counted = all.entry(pod.to_owned()).or_default();
    let now = Instant::now();
    if let Some((at, before)) = counted.last {
        let both = u128::from(before) + u128::from(memory);
        counted.memory += both * now.duration_since(at).as_nanos() / 2;
    }
    counted.last = Some((now, memory));
    counted.cpu_nanos = counted.cpu_nanos.max(cpu);
    counted.most_memory = counted.most_memory.max(memory);
}

/// All that the collector has, by attempt, in order.
fn collected(host: &Host) -> anyhow::Result<BTreeMap<String, Vec<Record>>> {
    let mut all: BTreeMap<String, Vec<Record>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut twice = vec![];
    let mut paths: Vec<_> = std::fs::read_dir(host.usage())?
        .map(|entry| Ok(entry?.path()))
        .collect::<anyhow::Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    paths.sort();
    for path in paths {
        line::read(BufReader::new(std::fs::File::open(&path)?), |_, records| {
            for HostRecord { record, .. } in records {
                let name = format!("{}-{}", record.subject.key.pod, record.subject.key.attempt);
                if !seen.insert((name.clone(), record.sequence)) {
                    twice.push((name.clone(), record.sequence));
                }
                all.entry(name).or_default().push(record);
            }
        })?;
    }
    ensure!(twice.is_empty(), "records that are there twice: {twice:?}");
    Ok(all)
}

fn name(key: &SandboxKey) -> String {
    format!("{}-{}", key.pod, key.attempt)
}

/// The records of attempts that have all ended, once they are all there.
async fn ended(host: &Host, pods: &[SandboxKey]) -> anyhow::Result<BTreeMap<String, Vec<Record>>> {
    wait("that the collector has every pod's last record", async || {
        let mut all = collected(host).map_err(|error| format!("{error:#}"))?;
        let over = |key: &&SandboxKey| {
            let records = all.get(&name(key));
            records.is_none_or(|r| r.last().is_none_or(|r| r.ended == Ended::Continues))
        };
        let missing: Vec<_> = pods.iter().filter(over).map(name).collect();
        if !missing.is_empty() {
            return Err(format!("{missing:?}"));
        }
        all.retain(|pod, _| pods.iter().any(|key| name(key) == *pod));
        Ok(all)
    })
    .await
}

/// Intervals that follow each other without a gap, from the attempt's begin to its end.
fn check_chain(pod: &str, records: &[Record]) -> anyhow::Result<()> {
    ensure!(records[0].began == Began::Started, "{pod}: {:?}", records[0]);
    for (n, record) in records.iter().enumerate() {
        ensure!(record.sequence == n as u64, "{pod} has no record {n}: {record:?}");
        ensure!(record.lost == 0, "{pod}: {record:?}");
        ensure!(record.to.since(record.from) < 60_000_000_000, "{pod}: {record:?}");
        let last = n + 1 == records.len();
        ensure!(last == (record.ended != Ended::Continues), "{pod}: {record:?}");
        if let Some(next) = records.get(n + 1) {
            ensure!(next.from == record.to, "{pod}: {record:?} and {next:?}");
        }
    }
    Ok(())
}

/// Works for a while in short-lived processes, holds some memory, and idles.
fn worker(turns: u32, mebibytes: u32) -> wire::Container {
    let script = format!(
        "dd if=/dev/zero of=/held/x bs=1M count={mebibytes} 2>/dev/null; \
         for i in $(seq {turns}); do sh -c 'n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done'; done; \
         trap exit TERM; while :; do sleep 1000 & wait; done"
    );
    mounting(shell("main", &script), "held", "/held")
}

async fn the_sums_of_a_churn_with_kills_are_what_the_cgroups_counted(host: &Host) -> anyhow::Result<()> {
    const CPU_MILLIS: u64 = 100;
    const MEMORY: u64 = 64 << 20;
    let reader = Reader::start(host);
    let mut keys = vec![];
    let mut running = vec![];
    // As random as a test that fails again should be.
    let mut seed = 0x9e37_79b9_u32;
    let mut random = |below: u32| {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed % below
    };
    for turn in 0..10 {
        for _ in 0..=random(2) {
            let mut spec = pod(vec![worker(random(12), 1 + random(30))]);
            spec.volumes = vec![empty_dir("held", true, Some(u64::from(32_u32 << 20)))];
            spec.claim = Some(wire::Resources {
                cpu_millis: CPU_MILLIS,
                memory_bytes: MEMORY,
                sandboxes: 1,
                ..Default::default()
            });
            let tenant = if random(2) == 0 { &host.ours } else { &host.theirs };
            let pod = host.start_for(tenant, spec).await?;
            keys.push(pod.key.clone());
            running.push(pod);
        }
        match random(4) {
            0 => {
                host.kill_agent().await?;
                tokio::time::sleep(Duration::from_millis(random(1500).into())).await;
                host.start_agent().await?;
            }
            1 => {
                host.kill_collector().await?;
                tokio::time::sleep(Duration::from_millis(random(1500).into())).await;
                host.start_collector().await?;
            }
            _ => tokio::time::sleep(Duration::from_millis(random(1500).into())).await,
        }
        if turn > 3 && !running.is_empty() {
            let pod = running.remove(random(u32::try_from(running.len())?) as usize);
            pod.until_running().await?;
            pod.forget().await?;
        }
    }
    for pod in running {
        pod.until_running().await?;
        pod.forget().await?;
    }
    let records = ended(host, &keys).await?;
    let counted = reader.stop();
    ensure!(records.len() == keys.len());
    let (mut sum, mut sum_counted) = (0, 0);
    for (pod, records) in &records {
        check_chain(pod, records)?;
        let counted = counted
            .get(pod)
            .with_context(|| format!("the reader has not seen {pod}"))?;
        let total = |f: fn(&Record) -> u64| records.iter().map(f).sum::<u64>();
        // The kernel counts; who looks last has the most.
        let cpu = total(|r| r.amounts.used_cpu_nanos);
        ensure!(
            (counted.cpu_nanos..counted.cpu_nanos + END_NANOS).contains(&cpu),
            "{pod} used {cpu} ns by its records, and {} by its cgroup",
            counted.cpu_nanos
        );
        (sum, sum_counted) = (sum + cpu, sum_counted + counted.cpu_nanos);
        // A straight line from look to look: off by what changed between two of them, at
        // the beginning and at the end, and while the agent was dead.
        let memory = u128::from(total(|r| r.amounts.used_memory_byte_seconds));
        let by_reader = counted.memory / 1_000_000_000;
        let unsampled = u128::from(total(|r| r.amounts.unsampled_nanos)).div_ceil(1_000_000_000);
        let off = u128::from(counted.most_memory) * (u128::from(2 * SAMPLE_SECONDS) + unsampled);
        ensure!(
            memory.abs_diff(by_reader) <= off,
            "{pod} used {memory} byte-seconds by its records, {by_reader} by its cgroup, which is not within {off}"
        );
        // The claim, for as long as it was held.
        let held = records[records.len() - 1].to.since(records[0].from);
        ensure!(
            total(|r| r.amounts.requested_cpu_nanos)
                == u64::try_from(u128::from(held) * u128::from(CPU_MILLIS) / 1000)?
        );
        ensure!(
            u128::from(total(|r| r.amounts.requested_memory_byte_seconds))
                == u128::from(held) * u128::from(MEMORY) / 1_000_000_000
        );
    }
    eprintln!(
        "        {} pods, {} records: {:.3} s of CPU by the records, {:.3} by the cgroups",
        keys.len(),
        records.values().map(Vec::len).sum::<usize>(),
        f64::from(u32::try_from(sum / 1_000_000)?) / 1000.0,
        f64::from(u32::try_from(sum_counted / 1_000_000)?) / 1000.0,
    );
    the_command_sums_the_same(host).await
}

/// `spindrift usage` over the collector's files says what their records come to.
async fn the_command_sums_the_same(host: &Host) -> anyhow::Result<()> {
    let program = artifacts::built(artifacts::Profile::Dev).program("spindrift")?;
    let shown = Tool::words(&program.display().to_string())
        .args(["usage", "--output", "json"])
        .arg(host.usage())
        .run()
        .await?;
    let mut by_command: BTreeMap<String, u64> = BTreeMap::new();
    for row in shown.lines() {
        let row: serde_json::Value = serde_json::from_str(row)?;
        let (tenant, cpu) = (row["tenant"].as_str(), row["used_cpu_nanos"].as_str());
        let tenant = tenant.context("a sum has a tenant")?.to_owned();
        *by_command.entry(tenant).or_default() += cpu.context("a sum has its CPU")?.parse::<u64>()?;
    }
    let mut by_records: BTreeMap<String, u64> = BTreeMap::new();
    for record in collected(host)?.into_values().flatten() {
        let tenant = record.subject.tenant.to_string();
        *by_records.entry(tenant).or_default() += record.amounts.used_cpu_nanos;
    }
    // Pods of other tests may be on it that still run.
    ensure!(
        by_command.keys().eq(by_records.keys()),
        "{by_command:?} and {by_records:?}"
    );
    for (tenant, cpu) in by_command {
        ensure!(
            cpu > 0 && cpu <= by_records[&tenant],
            "{tenant}: {cpu} of {}",
            by_records[&tenant]
        );
    }
    Ok(())
}

async fn records_wait_for_a_collector_that_is_away_and_say_why_they_ended(host: &Host) -> anyhow::Result<()> {
    host.kill_collector().await?;
    let done = host.start(job(vec![shell("main", "true")])).await?;
    let asked = host.start(pod(vec![shell("main", "sleep 1000")])).await?;
    done.until_stopped().await?;
    asked.until_running().await?;
    done.forget().await?;
    asked.forget().await?;
    // On this host's disk, and nowhere else.
    host.kill_agent().await?;
    let keys = [done.key.clone(), asked.key.clone()];
    let before = collected(host)?;
    ensure!(keys.iter().all(|key| !before.contains_key(&name(key))));
    host.start_agent().await?;
    host.start_collector().await?;
    let records = ended(host, &keys).await?;
    for (key, why) in [(&done.key, Ended::Completed), (&asked.key, Ended::Stopped)] {
        let records = &records[&name(key)];
        check_chain(&name(key), records)?;
        let last = &records[records.len() - 1];
        ensure!(last.ended == why, "{last:?}");
    }
    Ok(())
}

async fn a_tenants_virtual_node_hands_over_nothing_and_is_asked_for_nothing(
    host: &Host,
) -> anyhow::Result<()> {
    let batch = Batch {
        spool: "forged".into(),
        number: 1,
        records: vec![],
    };
    let mut client = UsageCollectorClient::new(host.dial_collector_as(&host.ours)?);
    let refused = client
        .hand(batch)
        .await
        .err()
        .context("a tenant's batch was taken")?;
    ensure!(refused.code() == tonic::Code::PermissionDenied, "{refused:?}");
    // Nobody of the tenant's need acknowledge anything for its records to go.
    let own = host.start(pod(vec![shell("main", "sleep 1000")])).await?;
    own.until_running().await?;
    own.forget().await?;
    ended(host, std::slice::from_ref(&own.key)).await?;
    let spool = host.files().usage();
    wait("that the host keeps nothing that was taken", async || {
        let left = std::fs::read_dir(&spool).map_err(|e| e.to_string())?.count();
        if left <= 2 {
            Ok(())
        } else {
            Err(format!("{left} batches"))
        }
    })
    .await
}
