//! The collector on a real PostgreSQL, over the pool's mutual TLS. Its server is
//! Debian's, in a directory of its own and on a Unix socket of its own.

// Where a test has to end with a failure, it may do so in a word.
#![allow(clippy::unwrap_used)]

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pool_agent_api::usage_wire::{Batch, Record, usage_collector_client::UsageCollectorClient};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tempfile::TempDir;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

/// How long anything that just has to happen may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends with the test.
struct Process(Child);

impl Process {
    /// `kill -9`, and gone when this returns.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

struct Server {
    directory: TempDir,
    programs: PathBuf,
    process: Process,
}

impl Server {
    /// Made with `initdb` and started.
    fn make() -> Self {
        let programs = std::fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .flatten()
            .map(|version| version.path().join("bin"))
            .find(|bin| bin.join("initdb").exists())
            .expect("no PostgreSQL is here: apt-get install postgresql");
        let directory = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp").unwrap();
        let own = Command::new("chown")
            .arg("postgres")
            .arg(directory.path())
            .status()
            .unwrap();
        assert!(
            own.success(),
            "the user postgres, of the package, is not here, or this is not root"
        );
        let made = as_postgres(&programs.join("initdb"))
            .args(["--no-sync", "--auth", "trust", "--pgdata"])
            .arg(directory.path().join("data"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        let process = run(&programs, directory.path());
        let mut server = Self {
            directory,
            programs,
            process,
        };
        server.wait();
        server
    }

    fn start_again(&mut self) {
        self.process = run(&self.programs, self.directory.path());
        self.wait();
    }

    fn url(&self) -> String {
        format!(
            "host={} user=postgres dbname=postgres",
            self.directory.path().display()
        )
    }

    fn wait(&mut self) {
        until("PostgreSQL serves", || {
            // It does not start while a killed one's children are still there.
            if self.process.0.try_wait().unwrap().is_some() {
                self.process = run(&self.programs, self.directory.path());
            }
            self.try_query("SELECT 1").is_ok_and(|answer| answer == "1")
        });
    }

    /// What `psql` prints.
    fn query(&self, query: &str) -> String {
        self.try_query(query).unwrap()
    }

    fn try_query(&self, query: &str) -> Result<String, String> {
        let answer = Command::new("psql")
            .args([
                "--no-psqlrc",
                "--tuples-only",
                "--no-align",
                "--dbname",
                &self.url(),
                "--command",
                query,
            ])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
        match answer.status.success() {
            true => Ok(text(answer.stdout)),
            false => Err(text(answer.stderr)),
        }
    }
}

/// It runs as nobody who is root.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
        "--pdeathsig=KILL",
    ]);
    command.arg(program).current_dir("/tmp");
    command
}

fn run(programs: &Path, directory: &Path) -> Process {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .unwrap();
    let child = as_postgres(&programs.join("postgres"))
        .arg("-D")
        .arg(directory.join("data"))
        .args(["-c", "listen_addresses=", "-k"])
        .arg(directory)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    Process(child.unwrap())
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The pool's CA.
struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self(Issuer::new(params, key), pem)
    }

    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["collector.test".to_owned()]).unwrap();
        let uri = format!("spiffe://pool/{name}");
        params
            .subject_alt_names
            .push(SanType::URI(uri.as_str().try_into().unwrap()));
        (
            params.signed_by(&key, &self.0).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

struct Collector {
    directory: TempDir,
    authority: Authority,
    port: u16,
    process: Process,
}

impl Collector {
    fn start(postgres: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let (certificate, key) = authority.issue("usage-collector");
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let at = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(at("crt"), certificate).unwrap();
        std::fs::write(at("key"), key).unwrap();
        std::fs::write(at("ca"), &authority.1).unwrap();
        let config = format!(
            "listen = \"127.0.0.1:{port}\"\n\
             [tls]\ncertificate = \"{}\"\nkey = \"{}\"\nca = \"{}\"\ntrust_domain = \"pool\"\n\
             [postgres]\nurl = \"{postgres}\"\n",
            at("crt"),
            at("key"),
            at("ca")
        );
        std::fs::write(at("config.toml"), config).unwrap();
        let process = Self::run(directory.path());
        Self {
            directory,
            authority,
            port,
            process,
        }
    }

    fn run(directory: &Path) -> Process {
        let program = env!("CARGO_BIN_EXE_usage-collector");
        let child = Command::new(program)
            .arg("--config")
            .arg(directory.join("config.toml"))
            .spawn();
        Process(child.unwrap())
    }

    fn start_again(&mut self) {
        self.process = Self::run(self.directory.path());
    }

    fn client(&self, name: &str) -> UsageCollectorClient<Channel> {
        let (certificate, key) = self.authority.issue(name);
        let tls = ClientTlsConfig::new()
            .domain_name("collector.test")
            .ca_certificate(Certificate::from_pem(&self.authority.1))
            .identity(Identity::from_pem(certificate, key));
        let endpoint = Channel::from_shared(format!("https://127.0.0.1:{}", self.port)).unwrap();
        UsageCollectorClient::new(endpoint.tls_config(tls).unwrap().connect_lazy())
    }
}

/// As a host does: again, until it is taken.
async fn hand(client: &mut UsageCollectorClient<Channel>, batch: Batch) {
    let begun = Instant::now();
    loop {
        match client.hand(batch.clone()).await {
            Ok(_) => return,
            Err(status) => assert!(begun.elapsed() < PATIENCE, "not taken: {status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn record(uid: &str, sequence: u64) -> Record {
    let at = |seconds: u64| {
        Some(pool_agent_api::status::wire_timestamp(
            jiff::Timestamp::from_second(i64::try_from(1_769_900_000 + seconds).unwrap()).unwrap(),
        ))
    };
    Record {
        tenant: "acme".into(),
        namespace: "shop".into(),
        pod: "web".into(),
        pod_uid: uid.into(),
        attempt: 1,
        sequence,
        class: "standard".into(),
        zone: "z1".into(),
        from: at(60 * sequence),
        to: at(60 * sequence + 60),
        boot_id: "b".into(),
        from_boot_nanos: sequence * 60_000_000_000,
        to_boot_nanos: (sequence + 1) * 60_000_000_000,
        began: "Continued".into(),
        ended: "Continues".into(),
        start: "Cold".into(),
        requested_cpu_nanos: 100,
        requested_memory_byte_seconds: 1000,
        used_cpu_nanos: 7,
        used_memory_byte_seconds: 70,
        mesh_sent_bytes: 5,
        mesh_received_bytes: 6,
        unsampled_nanos: 0,
        lost: 0,
    }
}

fn batch(number: u64, records: Vec<Record>) -> Batch {
    Batch {
        spool: "spool".into(),
        number,
        records,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_in_the_table_once_whatever_is_killed() {
    let mut server = Server::make();
    let mut collector = Collector::start(&server.url());
    let mut host = collector.client("host/host-a");
    for number in 0..6 {
        let records: Vec<_> = (0..50).map(|n| record("uid-a", number * 50 + n)).collect();
        match number {
            // One that is answered, and comes again: its answer was lost.
            1 => hand(&mut host, batch(number, records.clone())).await,
            2 => collector.process.kill(),
            3 => server.process.kill(),
            _ => {}
        }
        let handing = {
            let (mut host, records) = (host.clone(), records.clone());
            tokio::spawn(async move { hand(&mut host, batch(number, records)).await })
        };
        match number {
            2 => collector.start_again(),
            3 => server.start_again(),
            // In the middle of it.
            4 => {
                collector.process.kill();
                collector.start_again();
            }
            _ => {}
        }
        handing.await.unwrap();
    }
    let counts =
        "SELECT count(*), count(DISTINCT sequence), max(sequence), sum(used_cpu_nanos) FROM spindrift_usage";
    assert_eq!(server.query(counts), "300|300|299|2100");
    assert_eq!(
        server.query("SELECT DISTINCT host, zone FROM spindrift_usage"),
        "host-a|z1"
    );

    // A host that lies about another's pod takes no name from its records.
    let mut liar = record("uid-a", 0);
    liar.used_cpu_nanos = 0;
    hand(&mut collector.client("host/host-b"), batch(1, vec![liar])).await;
    assert_eq!(
        server.query("SELECT host, used_cpu_nanos FROM spindrift_usage WHERE sequence = 0 ORDER BY 1"),
        "host-a|7\nhost-b|0"
    );
    let (records, cpu, days) = summed(&server.url());
    assert_eq!((records, cpu), (301, 2100));
    let by_day = "SELECT count(DISTINCT (\"from\" AT TIME ZONE 'UTC')::date) FROM spindrift_usage";
    assert_eq!(server.query(by_day), days.to_string());
}

/// What `spindrift usage` says of the table: records, CPU, days.
fn summed(url: &str) -> (u64, u64, usize) {
    let program = Path::new(env!("CARGO_BIN_EXE_usage-collector")).with_file_name("spindrift");
    assert!(program.exists(), "build it first: cargo build --workspace --bins");
    let shown = Command::new(program)
        .args(["usage", "--postgres", url, "--output", "json"])
        .output()
        .unwrap();
    assert!(
        shown.status.success(),
        "{}",
        String::from_utf8_lossy(&shown.stderr)
    );
    let (mut records, mut cpu, mut days) = (0, 0, 0);
    for line in String::from_utf8(shown.stdout).unwrap().lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["tenant"], "acme");
        records += row["records"].as_u64().unwrap();
        cpu += row["used_cpu_nanos"].as_str().unwrap().parse::<u64>().unwrap();
        days += 1;
    }
    (records, cpu, days)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_no_host_hands_over_nothing_and_a_bad_record_takes_its_batch_with_it() {
    let server = Server::make();
    let collector = Collector::start(&server.url());
    hand(&mut collector.client("host/host-a"), batch(1, vec![])).await;
    let refused = async |name: &str, batch: Batch| -> Status {
        collector
            .client(name)
            .hand(batch)
            .await
            .expect_err("it was taken")
    };
    for name in ["tenant/acme/virtual-node", "usage-collector"] {
        let status = refused(name, batch(1, vec![record("uid-a", 0)])).await;
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    }
    let mut bad = record("uid-a", 1);
    bad.tenant = "a/b".into();
    let status = refused("host/host-a", batch(2, vec![record("uid-a", 0), bad])).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("records[1].tenant"), "{status:?}");
    assert_eq!(server.query("SELECT count(*) FROM spindrift_usage"), "0");
}
