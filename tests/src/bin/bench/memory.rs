//! `memory-…`: what stays resident of virtual-node and of an agent with fifty
//! pods, beside a stock kubelet with as many.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use spindrift_local::{Lab, Progress, images::BUSYBOX_IMAGE, topology::Host};

use crate::{
    figure::{Baseline, Figure, Target},
    pods::{self, Pods},
    process,
    stock::{self, Stock},
};

pub(crate) const NAMES: [&str; 2] = ["memory-virtual-node", "memory-agent-50-pods"];
const PODS: usize = 50;
/// Started at once.
const BATCH: usize = 10;
/// The placer decides where pods go: with two hosts, one has fifty by then.
const MOST: usize = 2 * PODS;
const COMMAND: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 86400 & wait"];

pub(crate) async fn measure(
    lab: &Lab,
    pods: &Pods,
    stock: &Stock,
    progress: &Progress,
) -> Result<Vec<Figure>> {
    let mut made = Vec::new();
    let result = fill(lab, pods, stock, progress, &mut made).await;
    pods.remove(&made).await?;
    result
}

async fn fill(
    lab: &Lab,
    pods: &Pods,
    stock: &Stock,
    progress: &Progress,
    made: &mut Vec<String>,
) -> Result<Vec<Figure>> {
    let step = progress.step(format!("Start {PODS} pods on a host and on a stock kubelet"));
    let node = lab.layout().node_name();
    let mut held: BTreeMap<String, usize> = BTreeMap::new();
    let full = loop {
        let started = start(pods, "ours", &node, made).await?;
        for pod in &started {
            let host = lab.topology().host_of(pods.address(pod)?.into());
            *held
                .entry(host.context("a pod is on no host")?.name.clone())
                .or_default() += 1;
        }
        step.note(&format!("{held:?}"));
        if let Some((host, count)) = held.iter().find(|(_, count)| **count >= PODS) {
            break (lab.topology().host(host).context("the host is gone")?, *count);
        }
        if held.values().sum::<usize>() >= MOST {
            bail!("no host has {PODS} of {MOST} pods: {held:?}");
        }
    };
    for _ in 0..PODS / BATCH {
        start(pods, "stock", stock::NODE, made).await?;
        step.note("the stock kubelet's");
    }
    step.done_quietly();
    figures(lab, stock, full, held.values().sum())
}

/// A batch of pods, by name.
async fn start(pods: &Pods, kind: &str, node: &str, made: &mut Vec<String>) -> Result<Vec<String>> {
    let names: Vec<String> = (made.len()..made.len() + BATCH)
        .map(|index| format!("{kind}-{index}"))
        .collect();
    made.extend(names.iter().cloned());
    let wanted: Vec<_> = names
        .iter()
        .map(|name| pods::pod(name, node, BUSYBOX_IMAGE.reference, &COMMAND))
        .collect();
    pods.start(&wanted).await?;
    Ok(names)
}

fn figures(lab: &Lab, stock: &Stock, (host, held): (&Host, usize), all: usize) -> Result<Vec<Figure>> {
    let kubelet = process::megabytes(&stock.kubelet(lab)?).context("the kubelet has ended")?;
    let figure = |name, ours: Option<f64>, remark: String| -> Result<Figure> {
        Ok(Figure {
            name,
            unit: "MB",
            ours: [ours.with_context(|| format!("{name}: it has ended"))?]
                .into_iter()
                .collect(),
            baseline: Baseline::Measured {
                what: "a stock kubelet with 50 pods",
                samples: [kubelet].into_iter().collect(),
            },
            target: Some(Target::OursAtMost(40.0)),
            remarks: vec![remark],
        })
    };
    let agent = process::agent(lab, host)?;
    Ok(vec![
        figure(
            NAMES[0],
            process::megabytes(&process::virtual_node(lab)?),
            format!("with {all} pods on the node"),
        )?,
        figure(
            NAMES[1],
            process::megabytes(&agent),
            format!("with {held} pods on {}", host.name),
        )?,
    ])
}
