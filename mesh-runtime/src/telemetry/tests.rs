use std::io::Write;
use std::sync::Mutex;

use prometheus_client::encoding::text::encode;

use super::*;

fn labels(workload: &str) -> Labels {
    Labels {
        reporter: Reporter::Destination,
        source: Party {
            workload: Some(workload.into()),
            ..Party::default()
        }
        .with_principal(Some("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap())),
        destination: Party::default(),
        service: None,
        security: Security::MutualTls,
    }
}

fn access() -> Access {
    Access {
        direction: Direction::Inbound,
        source: "10.77.1.2:5555".parse().unwrap(),
        source_workload: None,
        source_namespace: None,
        source_identity: Some("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()),
        destination: "10.77.2.5:8080".parse().unwrap(),
        hbone: None,
        destination_workload: None,
        destination_namespace: None,
        destination_identity: None,
        service: None,
    }
}

fn exposed(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).unwrap();
    text
}

#[test]
fn a_connections_bytes_are_its_pods_by_the_way_they_went() {
    let metrics = Arc::new(Metrics::register(&mut Registry::default()));
    let (client, server) = (Arc::new(Carried::default()), Arc::new(Carried::default()));
    for (pod, side) in [(&client, Side::Client), (&server, Side::Server)] {
        let flow = Flow::open(&metrics, labels("web"), access(), Instant::now()).on_account_of(pod, side);
        flow.received(100);
        flow.sent(20);
        flow.succeed();
    }
    assert_eq!((client.sent(), client.received()), (100, 20));
    assert_eq!((server.sent(), server.received()), (20, 100));
}

#[test]
fn a_connection_is_counted_under_istios_names_and_labels() {
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::register(&mut registry));
    let flow = Flow::open(&metrics, labels("web"), access(), Instant::now());
    flow.received(100);
    flow.sent(20);
    flow.succeed();
    Flow::open(&metrics, labels("web"), access(), Instant::now()).fail(Flag::Denied, "no".to_owned());
    let text = exposed(&registry);
    let value = |name: &str, flag: &str| -> u64 {
        let line = text
            .lines()
            .find(|l| {
                l.starts_with(&format!("{name}_total{{")) && l.contains(&format!("response_flags=\"{flag}\""))
            })
            .unwrap_or_else(|| panic!("no {name} {flag} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value("istio_tcp_connections_opened", "-"), 2);
    assert_eq!(value("istio_tcp_connections_closed", "-"), 1);
    assert_eq!(value("istio_tcp_connections_closed", "DENY"), 1);
    assert_eq!(value("istio_tcp_connections_failed", "DENY"), 1);
    assert_eq!(value("istio_tcp_received_bytes", "-"), 100);
    assert_eq!(value("istio_tcp_sent_bytes", "-"), 20);
    for label in [
        "reporter=\"destination\"",
        "source_workload=\"web\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"",
        "destination_service=\"unknown\"",
        "request_protocol=\"tcp\"",
        "connection_security_policy=\"mutual_tls\"",
    ] {
        assert!(text.contains(label), "{label} in {text}");
    }
}

#[test]
fn labels_beyond_the_bound_are_counted_together() {
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::register(&mut registry));
    for i in 0..10_000 {
        metrics.series(labels(&i.to_string())).opened.inc();
    }
    let text = exposed(&registry);
    let series = text
        .lines()
        .filter(|l| l.starts_with("istio_tcp_connections_opened_total"))
        .count();
    assert!(series <= 4097, "{series} series");
    let together = text
        .lines()
        .filter(|l| {
            l.starts_with("istio_tcp_connections_opened_total") && l.contains("source_workload=\"unknown\"")
        })
        .map(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum::<u64>();
    assert_eq!(together, 10_000 - 4096);
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn each_connection_leaves_one_line_with_the_verified_peer() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let metrics = tracing::subscriber::with_default(subscriber, || {
        Arc::new(Metrics::register(&mut Registry::default()))
    });
    Flow::open(&metrics, labels("web"), access(), Instant::now()).succeed();
    drop(Flow::open(&metrics, labels("web"), access(), Instant::now()));
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    let text = loop {
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        if text.lines().count() >= 2 {
            break text;
        }
        assert!(Instant::now() < deadline, "only {text}");
        std::thread::yield_now();
    };
    let [done, cut] = text.lines().collect::<Vec<_>>()[..] else {
        panic!("{text}")
    };
    assert!(done.contains("INFO access: connection closed"), "{done}");
    assert!(
        done.contains("src.identity=spiffe://cluster.local/ns/shop/sa/web"),
        "{done}"
    );
    assert!(!done.contains("error"), "{done}");
    assert!(
        cut.contains("ERROR access") && cut.contains("error=\"cut\""),
        "{cut}"
    );
}

#[test]
fn a_log_that_nobody_reads_stops_nothing_and_is_counted() {
    struct Stuck(Arc<Mutex<()>>);
    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            drop(self.0.lock());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let gate = Arc::new(Mutex::new(()));
    let shut = gate.lock().unwrap();
    let writer = gate.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || Stuck(writer.clone()))
        .finish();
    let mut registry = Registry::default();
    let metrics =
        tracing::subscriber::with_default(subscriber, || Arc::new(Metrics::register(&mut registry)));
    for _ in 0..10_000 {
        Flow::open(&metrics, labels("web"), access(), Instant::now()).succeed();
    }
    assert!(metrics.access.dropped().get() >= 10_000 - 8192 - 1);
    drop(shut);
}
