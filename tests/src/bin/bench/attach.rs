//! `attach-…`: from the moment containerd hands a pod's network namespace over
//! until its attachment serves, as the agents themselves measure it; with the
//! certificate in hand, and with one to be fetched.
//!
//! Pods are started one at a time, so what a histogram's sum grew by is what
//! one attachment took.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Api, api::PostParams};
use serde_json::json;
use spindrift_local::{Lab, Progress, images::BUSYBOX_IMAGE, pool::AGENT_METRICS, topology::Host};

use crate::{
    figure::{Baseline, Figure, Samples, Target},
    pods::{self, NAMESPACE, Pods},
};

pub(crate) const NAMES: [&str; 2] = ["attach-without-certificate", "attach-with-certificate"];
const METRIC: &str = "pool_agent_attach_seconds";
const ROUNDS: usize = 15;
/// The account whose certificate each host holds.
const HELD: &str = "held";
const COMMAND: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 86400 & wait"];
const STATED: f64 = 4.0;

pub(crate) async fn measure(lab: &Lab, pods: &Pods, progress: &Progress) -> Result<Vec<Figure>> {
    let mut made = Vec::new();
    let result = async {
        account(lab, HELD).await?;
        keep_certificate(lab, pods, &mut made).await?;
        let step = progress.step("Attach pods");
        let mut samples = [Samples::new(), Samples::new()];
        for round in 0..ROUNDS {
            step.note(&format!("round {} of {ROUNDS}", round + 1));
            let fresh = format!("fresh-{round}");
            account(lab, &fresh).await?;
            for (account, samples) in [HELD, fresh.as_str()].iter().zip(&mut samples) {
                let name = format!("attach-{round}-{account}");
                made.push(name.clone());
                samples.push(attach(lab, pods, &name, account).await?.as_secs_f64() * 1e3);
                pods.remove(&[name]).await?;
            }
        }
        step.done_quietly();
        Ok(figures(samples))
    }
    .await;
    pods.remove(&made).await?;
    result
}

fn figures([held, fetched]: [Samples; 2]) -> Vec<Figure> {
    let figure = |name, ours, target| Figure {
        name,
        unit: "ms",
        ours,
        baseline: Baseline::Stated {
            what: "what was promised, without the certificate",
            value: STATED,
        },
        target,
        remarks: Vec::new(),
    };
    vec![
        figure(NAMES[0], held, Some(Target::OursAtMost(STATED))),
        figure(NAMES[1], fetched, None),
    ]
}

/// Starts a pod and tells how long its attachment took.
async fn attach(lab: &Lab, pods: &Pods, name: &str, account: &str) -> Result<Duration> {
    let before = counts(lab)?;
    pods.start(&[pod(lab, name, account)]).await?;
    let after = counts(lab)?;
    let grown = before
        .iter()
        .zip(&after)
        .find(|(before, after)| after.0 > before.0);
    match grown {
        Some((before, after)) if after.0 == before.0 + 1 => Ok(Duration::from_secs_f64(after.1 - before.1)),
        Some(_) => bail!("other pods were attached beside {name}"),
        None => bail!("no agent has counted the attachment of {name}"),
    }
}

/// A pod on each host, so that each holds the certificate of the account.
async fn keep_certificate(lab: &Lab, pods: &Pods, made: &mut Vec<String>) -> Result<()> {
    let owner = pods.owner("keep").await?;
    let hosts = &lab.topology().hosts;
    let names: Vec<String> = (0..hosts.len()).map(|index| format!("keep-{index}")).collect();
    made.extend(names.iter().cloned());
    let wanted: Vec<_> = names
        .iter()
        .map(|name| {
            let mut pod = pod(lab, name, HELD);
            pod["metadata"]["ownerReferences"] = owner.clone();
            pod
        })
        .collect();
    pods.start(&wanted).await?;
    let mut holders = BTreeSet::new();
    for name in &names {
        let host = lab.topology().host_of(pods.address(name)?.into());
        holders.extend(host.map(|host| &host.name));
    }
    if holders.len() < hosts.len() {
        bail!("of as many pods as hosts all went to {holders:?}");
    }
    Ok(())
}

fn pod(lab: &Lab, name: &str, account: &str) -> serde_json::Value {
    let mut pod = pods::pod(name, &lab.layout().node_name(), BUSYBOX_IMAGE.reference, &COMMAND);
    pod["spec"]["serviceAccountName"] = json!(account);
    pod
}

async fn account(lab: &Lab, name: &str) -> Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(lab.client(), NAMESPACE);
    let account = serde_json::from_value(json!({"metadata": {"name": name}}))?;
    match accounts.create(&PostParams::default(), &account).await {
        // Of an earlier run.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        answer => answer.map(drop).map_err(Into::into),
    }
}

/// How many attachments each host's agent has counted, and their seconds.
fn counts(lab: &Lab) -> Result<Vec<(u64, f64)>> {
    lab.topology()
        .hosts
        .iter()
        .map(|host| count(&scrape(host)?))
        .collect()
}

fn count(metrics: &str) -> Result<(u64, f64)> {
    let value = |suffix: &str| {
        let name = format!("{METRIC}_{suffix} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        line.with_context(|| format!("an agent does not tell {METRIC}"))
    };
    Ok((value("count")?.trim().parse()?, value("sum")?.trim().parse()?))
}

/// What the agent tells on its host's loopback.
fn scrape(host: &Host) -> Result<String> {
    const LIMIT: Duration = Duration::from_secs(5);
    let text = host.namespace.enter(|| {
        let mut stream = TcpStream::connect_timeout(&AGENT_METRICS, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: agent\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    text.with_context(|| format!("cannot read the metrics of {}'s agent", host.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histograms_count_and_sum_are_read() {
        let text = format!(
            "# TYPE {METRIC} histogram\n{METRIC}_sum 0.0075\n{METRIC}_count 2\n{METRIC}_bucket{{le=\"1\"}} 2\n"
        );
        assert_eq!(count(&text).unwrap(), (2, 0.0075));
        assert!(count("").is_err());
    }
}
