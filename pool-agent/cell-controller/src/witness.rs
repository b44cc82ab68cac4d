//! Says of claims that are being deleted whether their hosts' Leases have lapsed: a
//! virtual node, which sees neither Nodes nor Leases, asks by deleting its claim, and
//! believes what is said twice ([`pool_cell::lapse`]).
//!
//! In this order, always: the claims are read, then the Lease, then what is said is
//! written over the claims as they were read.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{
    Api, Client, Error, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    runtime::{WatchStreamExt, watcher, watcher::Event},
};
use pool_cell::{lapse as statement, names};
use tokio::time::{Instant, MissedTickBehavior};

use crate::{
    lapse::{self, Leases},
    round::{answered, outrun},
};

/// Claims that are written at a time.
const AT_A_TIME: usize = 8;

struct Witness {
    client: Client,
    leases: Leases,
    /// Claims that are being deleted, by namespace and name, and their hosts.
    leaving: BTreeMap<(String, String), String>,
}

pub(crate) async fn keep(client: Client) {
    let claims = watcher::Config::default().labels(names::POD_UID);
    let mut claims = objects::watch::<Pod>(Api::all(client.clone()), claims)
        .default_backoff()
        .boxed();
    let leases = Api::namespaced(client.clone(), names::LEASES);
    let mut leases = objects::watch::<Lease>(leases, watcher::Config::default())
        .default_backoff()
        .boxed();
    let mut witness = Witness {
        client,
        leases: Leases::default(),
        leaving: BTreeMap::new(),
    };
    let mut ticks = tokio::time::interval(lapse::EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = claims.next() => match event {
                Some(Ok(event)) => witness.claim(event),
                Some(Err(error)) => failed(&error, "claims"),
                None => return,
            },
            event = leases.next() => match event {
                Some(Ok(event)) => witness.lease(event),
                Some(Err(error)) => failed(&error, "leases"),
                None => return,
            },
            _ = ticks.tick() => witness.look().await,
        }
    }
}

fn failed(error: &watcher::Error, of: &str) {
    tracing::warn!(error = error as &dyn std::error::Error, of, "a watch failed");
}

impl Witness {
    fn claim(&mut self, event: Event<Pod>) {
        match event {
            // What was missed shows when the hosts' claims are read.
            Event::Init => self.leaving.clear(),
            Event::InitDone => {}
            Event::InitApply(pod) | Event::Apply(pod) => {
                let host = pod.spec.as_ref().and_then(|s| s.node_name.clone());
                match host.filter(|_| pod.metadata.deletion_timestamp.is_some()) {
                    Some(host) => drop(self.leaving.insert(id(&pod), host)),
                    None => drop(self.leaving.remove(&id(&pod))),
                }
            }
            Event::Delete(pod) => drop(self.leaving.remove(&id(&pod))),
        }
    }

    fn lease(&mut self, event: Event<Lease>) {
        match event {
            Event::Init | Event::InitDone => {}
            Event::InitApply(lease) | Event::Apply(lease) => {
                self.leases.saw(&lease.name_any(), &lease, Instant::now());
            }
            Event::Delete(lease) => self.leases.gone(&lease.name_any()),
        }
    }

    async fn look(&mut self) {
        let now = Instant::now();
        let hosts: BTreeSet<String> = self.leaving.values().cloned().collect();
        for host in hosts {
            if self.leases.has_lapsed(&host, now)
                && let Err(error) = self.say(&host).await
            {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(host, error, "it is not said yet that a host's lease has lapsed");
            }
        }
    }

    async fn say(&mut self, host: &str) -> Result<(), Error> {
        let of_host = ListParams::default()
            .fields(&format!("spec.nodeName={host}"))
            .labels(names::POD_UID);
        let claims: Vec<Pod> = answered(objects::list(&Api::all(self.client.clone()), &of_host)).await?;
        // The watch may be behind: the Lease itself is read, after the claims.
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), names::LEASES);
        match answered(leases.get_opt(host)).await? {
            Some(lease) => self.leases.saw(host, &lease, Instant::now()),
            None => self.leases.gone(host),
        }
        if !self.leases.has_lapsed(host, Instant::now()) {
            return Ok(());
        }
        let now = Timestamp::now();
        let due = claims.into_iter().filter(|claim| {
            claim.metadata.deletion_timestamp.is_some()
                && lapse::is_due(statement::since(claim), statement::statement(claim), now)
        });
        let client = self.client.clone();
        futures::stream::iter(due)
            .for_each_concurrent(AT_A_TIME, |claim| {
                let client = client.clone();
                async move { write(client, &claim, now).await }
            })
            .await;
        Ok(())
    }
}

async fn write(client: Client, claim: &Pod, now: Timestamp) {
    let api: Api<Pod> = Api::namespaced(client, &claim.namespace().unwrap_or_default());
    let name = claim.name_any();
    let patch = Patch::Strategic(statement::patch(claim, now));
    match answered(api.patch_status(&name, &PatchParams::default(), &patch)).await {
        Ok(_) => tracing::info!(claim = name, "said that the host's lease has lapsed"),
        Err(error) if outrun(&error) => {}
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(claim = name, error, "a claim is not told of its host's lapse");
        }
    }
}

fn id(pod: &Pod) -> (String, String) {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}
