//! `throughput-…`, `round-trip-1k…` and `mesh-cpu`: pod to pod across hosts, in
//! the mesh and beside it: the same image on the same two hosts, opted out.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use spindrift_local::{Lab, Progress, artifacts, cache::Cache, images::Image, tool::Tool};

use crate::{
    figure::{Baseline, Figure, Samples, Target},
    pods::{self, NAMESPACE, Pods},
    process,
};

const IMAGE: Image = Image {
    name: "netbench",
    reference: "spindrift.local/netbench:1",
};
const PORT: u16 = 5201;
const ROUNDS: usize = 7;
/// Of one measurement: long enough for windows to have grown, and for the
/// hundredths of a second that processor time is counted in.
const SECONDS: &str = "3";

pub(crate) const NAMES: [&str; 5] = [
    "throughput-1",
    "throughput-4",
    "round-trip-1k",
    "round-trip-1k-added",
    "mesh-cpu",
];

/// The two ends of one path, on different hosts.
struct Pair {
    client: String,
    server: Ipv4Addr,
}

/// What one path was measured to do.
#[derive(Default)]
struct Measured {
    /// Gbit/s with one stream and with four.
    throughput: [Samples; 2],
    /// Microseconds: the median and the 90th percentile of each run.
    round_trip: [Samples; 2],
    /// Processor seconds of both agents for a gigabyte moved.
    cpu: Samples,
}

const STREAMS: [&str; 2] = ["1", "4"];

pub(crate) async fn measure(
    lab: &Lab,
    pods: &Pods,
    cache: &Cache,
    progress: &Progress,
) -> Result<Vec<Figure>> {
    import(lab, cache, progress).await?;
    let mut made = Vec::new();
    let result = async {
        let meshed = pair(lab, pods, "meshed", &mut made).await?;
        let plain = pair(lab, pods, "plain", &mut made).await?;
        let step = progress.step("Measure the data path");
        let mut measured = [Measured::default(), Measured::default()];
        for round in 0..ROUNDS {
            step.note(&format!("round {} of {ROUNDS}", round + 1));
            for turn in [0, 1] {
                let path = (round + turn) % 2;
                run(lab, [&meshed, &plain][path], &mut measured[path]).await?;
            }
        }
        step.done_quietly();
        Ok(figures(measured))
    }
    .await;
    pods.remove(&made).await?;
    result
}

async fn run(lab: &Lab, pair: &Pair, measured: &mut Measured) -> Result<()> {
    let address = format!("{}:{PORT}", pair.server);
    for (streams, samples) in STREAMS.iter().zip(&mut measured.throughput) {
        let before = agents_cpu(lab)?;
        let said = client(lab, pair, &["throughput", &address, streams, SECONDS]).await?;
        let spent = agents_cpu(lab)?.saturating_sub(before);
        let (bytes, seconds) = (number(&said, "bytes")?, number(&said, "seconds")?);
        samples.push(bytes * 8.0 / seconds / 1e9);
        measured.cpu.push(spent.as_secs_f64() / (bytes / 1e9));
    }
    let said = client(lab, pair, &["round-trip", &address, SECONDS]).await?;
    for (quantile, samples) in ["p50", "p90"].iter().zip(&mut measured.round_trip) {
        samples.push(number(&said, quantile)?);
    }
    Ok(())
}

fn figures([meshed, plain]: [Measured; 2]) -> Vec<Figure> {
    const BESIDE: &str = "the same pods opted out of the mesh";
    let mut all: Vec<Figure> = Vec::new();
    for (index, name) in NAMES[..2].iter().enumerate() {
        all.push(Figure {
            name,
            unit: "Gbit/s",
            ours: meshed.throughput[index].clone(),
            baseline: Baseline::Measured {
                what: BESIDE,
                samples: plain.throughput[index].clone(),
            },
            target: (index == 0).then_some(Target::RatioAtLeast(0.27)),
            remarks: Vec::new(),
        });
    }
    let p90 = |side: &Measured| side.round_trip[1].to_string();
    all.push(Figure {
        name: NAMES[2],
        unit: "µs",
        remarks: vec![format!("p90: ours {}; baseline {}", p90(&meshed), p90(&plain))],
        ours: meshed.round_trip[0].clone(),
        baseline: Baseline::Measured {
            what: BESIDE,
            samples: plain.round_trip[0].clone(),
        },
        target: None,
    });
    all.push(Figure {
        name: NAMES[3],
        unit: "µs",
        ours: meshed.round_trip[0].less(&plain.round_trip[0]),
        baseline: Baseline::Stated {
            what: "what a stock ztunnel adds on such cores",
            value: 165.0,
        },
        target: Some(Target::OursAtMost(165.0)),
        remarks: Vec::new(),
    });
    all.push(Figure {
        name: NAMES[4],
        unit: "CPU-s/GB",
        ours: meshed.cpu,
        baseline: Baseline::Stated {
            what: "a stock ztunnel's, both ends; a bare rustls relay pair takes 0.98",
            value: 3.4,
        },
        target: Some(Target::OursAtMost(3.4)),
        remarks: vec![format!("agents while the opted-out pods talk: {}", plain.cpu)],
    });
    all
}

/// Two Ready pods on different hosts.
async fn pair(lab: &Lab, pods: &Pods, name: &str, made: &mut Vec<String>) -> Result<Pair> {
    let node = lab.layout().node_name();
    let owner = pods.owner(name).await?;
    let names = ["client", "server"].map(|end| format!("{name}-{end}"));
    made.extend(names.clone());
    pods.start(
        &names
            .each_ref()
            .map(|end| peer(end, &node, &owner, name == "plain")),
    )
    .await?;
    let [client, server] = names;
    let at = pods.address(&server)?;
    let host = |address: Ipv4Addr| lab.topology().host_of(address.into()).map(|host| &host.name);
    if host(pods.address(&client)?) == host(at) {
        bail!("{client} and {server} went to the same host");
    }
    Ok(Pair { client, server: at })
}

fn peer(name: &str, node: &str, owner: &Value, opted_out: bool) -> Value {
    let mut pod = pods::pod(
        name,
        node,
        IMAGE.reference,
        &["/netbench", "serve", &PORT.to_string()],
    );
    pod["metadata"]["ownerReferences"] = owner.clone();
    if opted_out {
        pod["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"});
    }
    pod
}

async fn client(lab: &Lab, pair: &Pair, arguments: &[&str]) -> Result<String> {
    let layout = lab.layout();
    let said = Tool::new(layout.bin().join("kubectl"))
        .arg("--kubeconfig")
        .arg(layout.kubeconfig())
        .args(["exec", "--namespace", NAMESPACE, &pair.client, "--", "/netbench"])
        .args(arguments)
        .run()
        .await?;
    Ok(said)
}

/// The number behind a word of what netbench printed.
fn number(said: &str, word: &str) -> Result<f64> {
    let mut words = said.split_whitespace();
    words.find(|found| *found == word);
    let number = words
        .next()
        .with_context(|| format!("netbench said no {word}: {said:?}"))?;
    Ok(number.parse()?)
}

fn agents_cpu(lab: &Lab) -> Result<Duration> {
    lab.topology().hosts.iter().try_fold(Duration::ZERO, |sum, host| {
        let agent = process::agent(lab, host)?;
        let spent = process::cpu(&agent).with_context(|| format!("the agent of {} has ended", host.name))?;
        Ok(sum + spent)
    })
}

/// Builds netbench into an image of its own and hands it to each host.
async fn import(lab: &Lab, cache: &Cache, progress: &Progress) -> Result<()> {
    let source = artifacts::workspace().join("tests/src/bin/netbench.rs");
    let archive = artifacts::program_image(cache, IMAGE, &[source], progress).await?;
    for host in &lab.topology().hosts {
        let runtime = lab
            .runtime(&host.name)
            .with_context(|| format!("{} has no containerd", host.name))?;
        runtime.import_archive(IMAGE, &archive).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_netbench_prints_is_read_by_its_words() {
        let said = "trips 12 p50 81.25 p90 99.00\n";
        assert_eq!(number(said, "p50").unwrap(), 81.25);
        assert_eq!(number(said, "trips").unwrap(), 12.0);
        assert!(number(said, "p99").is_err() && number("", "p50").is_err());
    }

    #[test]
    fn only_pods_of_the_plain_path_are_opted_out() {
        let label = |opted_out| {
            peer("p", "n", &json!([]), opted_out)["metadata"]["labels"]["istio.io/dataplane-mode"].clone()
        };
        assert_eq!((label(true), label(false)), (json!("none"), Value::Null));
    }
}
