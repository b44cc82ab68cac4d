//! `pod-start-…`: a pod created → Ready on our node, mesh on and image present,
//! at one and at ten at once; beside CRI alone and beside a stock kubelet.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::try_join_all;
use spindrift_local::{Lab, Progress, images::BUSYBOX_IMAGE};

use crate::{
    cri::Cri,
    figure::{Baseline, Figure, Samples, Target},
    pods::{self, Pods},
    stock::{self, Stock},
};

const COMMAND: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 86400 & wait"];

/// Who starts a pod, in the order of the first round.
const SIDES: [Side; 3] = [Side::Ours, Side::Kubelet, Side::CriAlone];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Ours,
    Kubelet,
    CriAlone,
}

/// How many at once, and how often.
pub(crate) struct Load {
    pub(crate) at_once: usize,
    pub(crate) rounds: usize,
    /// The names of the two figures: beside CRI alone, and beside a kubelet.
    pub(crate) names: [&'static str; 2],
}

pub(crate) const ONE: Load = Load {
    at_once: 1,
    rounds: 15,
    names: ["pod-start-1", "pod-start-1-vs-kubelet"],
};
pub(crate) const TEN: Load = Load {
    at_once: 10,
    rounds: 5,
    names: ["pod-start-10", "pod-start-10-vs-kubelet"],
};

/// Where pods are started.
struct Places<'a> {
    pods: &'a Pods,
    /// Our node's name.
    ours: String,
    /// The containerd that is used without anybody above it.
    alone: Cri,
    /// Every containerd, to see that it has come to rest.
    all: Vec<Cri>,
}

pub(crate) async fn measure(
    lab: &Lab,
    pods: &Pods,
    stock: &Stock,
    load: &Load,
    progress: &Progress,
) -> Result<Vec<Figure>> {
    let alone = stock.cri_alone(lab.layout()).await?;
    let mut all = vec![alone.clone(), stock.kubelets_cri().await?];
    for host in &lab.topology().hosts {
        let runtime = lab
            .runtime(&host.name)
            .with_context(|| format!("{} has no containerd", host.name))?;
        all.push(Cri::connect(&runtime.socket(), "").await?);
    }
    let places = Places {
        pods,
        ours: lab.layout().node_name(),
        alone,
        all,
    };
    places.measure(load, progress).await
}

impl Places<'_> {
    async fn measure(&self, load: &Load, progress: &Progress) -> Result<Vec<Figure>> {
        let step = progress.step(format!("Start pods, {} at once", load.at_once));
        let mut samples = [const { Samples::new() }; SIDES.len()];
        let mut last = [const { Samples::new() }; SIDES.len()];
        // The first round warms caches up and is not counted.
        for round in 0..=load.rounds {
            step.note(&format!("round {round} of {}", load.rounds));
            for turn in 0..SIDES.len() {
                let side = (round + turn) % SIDES.len();
                let took = self.start(SIDES[side], load.at_once, round).await?;
                for cri in &self.all {
                    cri.wait_idle(pods::NAMESPACE).await?;
                }
                if round > 0 {
                    let milliseconds = || took.iter().map(|took| took.as_secs_f64() * 1e3);
                    samples[side].extend(milliseconds());
                    last[side].extend(milliseconds().reduce(f64::max));
                }
            }
        }
        step.done_quietly();
        let [ours, kubelet, alone] = samples;
        let at_once = load.at_once;
        let remarks = |other: &Samples| match at_once {
            1 => vec![],
            _ => vec![format!(
                "the last of {at_once}: ours {}; baseline {other}",
                last[0]
            )],
        };
        let by_itself = Figure {
            name: load.names[0],
            unit: "ms",
            ours: ours.clone(),
            baseline: Baseline::Measured {
                what: "CRI alone: sandbox + create + start on the same containerd, ptp network",
                samples: alone,
            },
            target: (at_once == 1).then_some(Target::RatioAtMost(1.5)),
            remarks: remarks(&last[2]),
        };
        let beside_kubelet = Figure {
            name: load.names[1],
            unit: "ms",
            ours,
            baseline: Baseline::Measured {
                what: "a stock kubelet on the same containerd, ptp network, no mesh",
                samples: kubelet,
            },
            target: Some(Target::RatioAtMost(1.0)),
            remarks: remarks(&last[1]),
        };
        Ok(vec![by_itself, beside_kubelet])
    }

    async fn start(&self, side: Side, at_once: usize, round: usize) -> Result<Vec<Duration>> {
        let image = BUSYBOX_IMAGE.reference;
        let names: Vec<String> = (0..at_once)
            .map(|index| format!("start-{round}-{index}"))
            .collect();
        let node = match side {
            Side::Ours => self.ours.as_str(),
            Side::Kubelet => stock::NODE,
            Side::CriAlone => {
                let starts = names.iter().map(|name| self.alone.start(name, image, &COMMAND));
                let (sandboxes, took): (Vec<_>, _) = try_join_all(starts).await?.into_iter().unzip();
                try_join_all(sandboxes.into_iter().map(|sandbox| self.alone.remove(sandbox))).await?;
                return Ok(took);
            }
        };
        let wanted: Vec<_> = names
            .iter()
            .map(|name| pods::pod(name, node, image, &COMMAND))
            .collect();
        let took = self.pods.start(&wanted).await?;
        self.pods.remove(&names).await?;
        Ok(took)
    }
}
