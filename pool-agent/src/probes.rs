//! Probes of containers, and hooks that dial. The verdict is pure ([`verdict`]);
//! the rest dials. Called by a sandbox's `perform`, one task a probe.
//!
//! HTTP, TCP and gRPC are dialled from the tenant's router by sockets made there:
//! they reach the pod outside the mesh's path and are told apart by the socket,
//! not by an address that a pod could forge.

mod dial;
mod resolve;
mod verdict;

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::Ipv4Net;
use mesh_runtime::{netns::Netns, off_limits::OffLimits};
use pool_agent_api::{
    SandboxKey, TenantId,
    spec::{Action, HttpAction, Probe},
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    cri::Runtime,
    sandbox::event::{ContainerId, Event, ProbeKind, Slot},
};
use verdict::Tally;

/// Most of a command's or a server's answer that is shown to a user.
const SHOWN: usize = 1024;

/// Where a pod's probes and hooks are dialled from, and what they may reach.
#[derive(Clone)]
pub struct Vantage {
    /// The tenant's router.
    pub netns: Netns,
    /// The pod's address.
    pub pod: IpAddr,
    pub local_pods: Ipv4Net,
    pub off_limits: Arc<OffLimits>,
    /// Whose the pod is: names are looked up at their expense.
    pub of: Dialler,
}

/// For whom something is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialler {
    pub tenant: TenantId,
    pub key: SandboxKey,
}

/// What a probe needs to reach its container.
pub struct Prober {
    pub runtime: Runtime,
    pub from: Vantage,
    pub container: ContainerId,
}

/// Probes until it is dropped or nobody listens.
pub async fn run(
    prober: Prober,
    probe: &Probe,
    kind: ProbeKind,
    slot: Slot,
    id: ContainerId,
    events: mpsc::Sender<Event>,
) {
    let mut tally = Tally::new(probe.thresholds);
    tokio::time::sleep(probe.initial_delay).await;
    let mut ticks = tokio::time::interval_at(Instant::now(), probe.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let outcome = prober.once(probe).await;
        if let Err(message) = &outcome {
            let failed = Event::ProbeFailed(slot, id.clone(), kind, message.clone());
            if events.send(failed).await.is_err() {
                return;
            }
        }
        if let Some(verdict) = tally.count(outcome.is_ok()) {
            let event = Event::Probed(slot, id.clone(), kind, verdict);
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

impl Prober {
    async fn once(&self, probe: &Probe) -> Result<(), String> {
        let limit = probe.timeout;
        let work = async {
            match &probe.action {
                Action::Exec { command } => self.exec(command, limit).await,
                Action::Http(action) => dial::http(&self.from, action, "kube-probe/1.37").await,
                Action::Tcp { host, port } => dial::tcp(&self.from, host.as_deref(), *port).await.map(drop),
                Action::Grpc { port, service } => dial::grpc(&self.from, *port, service).await,
            }
        };
        // A little more than the runtime gives a command, whose own limit says it better.
        let patience = match probe.action {
            Action::Exec { .. } => limit + Duration::from_secs(1),
            _ => limit,
        };
        tokio::time::timeout(patience, work)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }

    async fn exec(&self, command: &[String], limit: Duration) -> Result<(), String> {
        let output = self
            .runtime
            .exec(&self.container, command, Some(limit))
            .await
            .map_err(|e| e.to_string())?;
        if output.exit_code == 0 {
            Ok(())
        } else {
            Err(shown(&output.output))
        }
    }
}

/// The beginning of what was answered, as text.
fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).into_owned()
}

/// A lifecycle hook: a GET that any answer below 400 satisfies.
pub async fn http_hook(from: &Vantage, action: &HttpAction) -> Result<(), String> {
    dial::http(from, action, "kube-lifecycle/1.37").await
}

/// A lifecycle hook that only dials.
pub async fn tcp_hook(from: &Vantage, host: Option<&str>, port: u16) -> Result<(), String> {
    dial::tcp(from, host, port).await.map(drop)
}
