//! What has to be survived: components killed at the worst moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::json;
use spindrift_tests::{
    Scope,
    containers::{self, Container},
    workload::{config_map, container, idle, is_ready, is_running, pod, probe_server, summary, uid},
};

use super::{
    mesh::{Pair, capture_link, only_tunnels},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Alone:
        virtual_node_killed_before_any_of_ten_pods_runs,
        virtual_node_killed_in_the_midst_of_ten_starts,
        virtual_node_killed_again_and_again_during_ten_starts,
        an_agent_killed_in_the_midst_of_ten_starts,
        pods_made_and_deleted_while_virtual_node_is_away_are_dealt_with_after,
        traffic_and_probes_go_on_while_virtual_node_is_away,
        an_agent_killed_fails_closed_and_comes_back_to_its_pods,
        the_agent_of_the_server_killed_fails_closed_and_comes_back,
        the_api_server_killed_disturbs_no_pod,
    ]
}

const PODS: usize = 10;

/// Ten pods of one owner, so that they are spread over both hosts.
async fn create_ten(scope: &Scope) -> anyhow::Result<BTreeMap<String, String>> {
    let owner = scope.create(config_map("owner", json!({}))).await?;
    let owner = json!([{
        "apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.uid(), "controller": true,
    }]);
    let creations = (0..PODS).map(|n| {
        let mut manifest = pod(&format!("web-{n}"), json!({"containers": [probe_server()]}));
        manifest["metadata"]["ownerReferences"] = owner.clone();
        scope.create(manifest)
    });
    let made = try_join_all(creations).await?;
    Ok(made
        .iter()
        .map(|pod| (pod.name_any(), pod.uid().unwrap_or_default()))
        .collect())
}

/// Waits until so many pods run.
pub(crate) async fn running(scope: &Scope, count: usize) -> anyhow::Result<()> {
    let pods: Api<Pod> = scope.api();
    scope
        .wait_within(
            Duration::from_secs(120),
            &format!("that {count} pods run"),
            async || {
                let found = pods
                    .list(&ListParams::default())
                    .await
                    .map_err(|e| e.to_string())?;
                let runs = found.items.iter().filter(|pod| is_running(pod, "main")).count();
                if runs >= count {
                    Ok(())
                } else {
                    Err(format!("{runs} do"))
                }
            },
        )
        .await
}

/// Every pod ends Running exactly once: the same pods, and on all hosts together one
/// sandbox and one container that runs each. `cut_off` of a pod's runs may have been
/// ended in their start: such a run counts as a restart, as under a kubelet.
pub(crate) async fn each_runs_exactly_once(
    scope: &Scope,
    made: &BTreeMap<String, String>,
    cut_off: usize,
) -> anyhow::Result<()> {
    let limit = Duration::from_secs(150);
    for (name, wanted) in made {
        let pod = scope.until_within(limit, name, "is Ready", is_ready).await?;
        ensure!(uid(&pod) == wanted, "{name} was made anew");
        let main = container(&pod, "main").context("it has no container")?;
        ensure!(
            usize::try_from(main.restart_count)? <= cut_off,
            "it was restarted: {}",
            summary(&pod)
        );
    }
    // What was started in vain may still be on its way out.
    scope
        .wait("that each pod is on the hosts once", async || {
            let all = containers::on_hosts(scope.lab())
                .await
                .map_err(|e| format!("{e:#}"))?;
            for (name, uid) in made {
                let own: Vec<&Container> = all.iter().filter(|c| c.pod_uid == *uid).collect();
                let sandboxes = own.iter().filter(|c| c.is_sandbox()).count();
                let runs = own.iter().filter(|c| !c.is_sandbox() && c.pid.is_some()).count();
                if sandboxes != 1 || runs != 1 || own.len() > 2 + cut_off {
                    return Err(format!("{name}: {own:#?}"));
                }
            }
            Ok(())
        })
        .await?;
    let addresses: BTreeSet<_> = try_join_all(made.keys().map(|name| scope.pod(name)))
        .await?
        .iter()
        .filter_map(spindrift_tests::workload::address)
        .collect();
    ensure!(
        addresses.len() == made.len(),
        "addresses are shared: {addresses:?}"
    );
    Ok(())
}

/// A pod from before, and the processes it has.
async fn bystander(scope: &Scope) -> anyhow::Result<(Pod, Vec<Container>)> {
    let pod = scope
        .start(pod("bystander", json!({"containers": [idle()]})))
        .await?;
    let own = own_containers(scope, &pod).await?;
    Ok((pod, own))
}

async fn own_containers(scope: &Scope, pod: &Pod) -> anyhow::Result<Vec<Container>> {
    let mut all = containers::on_hosts(scope.lab()).await?;
    all.retain(|c| c.pod_uid == uid(pod));
    all.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(all)
}

async fn undisturbed(scope: &Scope, (pod, before): &(Pod, Vec<Container>)) -> anyhow::Result<()> {
    let now = own_containers(scope, pod).await?;
    ensure!(now == *before, "its containers were {before:#?} and are {now:#?}");
    let still = scope.until("bystander", "is Ready", is_ready).await?;
    ensure!(uid(&still) == uid(pod), "it was made anew");
    Ok(())
}

async fn kill_and_start(scope: &Scope, component: &str) -> anyhow::Result<()> {
    scope.lab().kill(component).await?;
    scope.lab().start(component).await?;
    Ok(())
}

async fn virtual_node_killed_before_any_of_ten_pods_runs(scope: &Scope) -> anyhow::Result<()> {
    let bystander = bystander(scope).await?;
    let made = create_ten(scope).await?;
    kill_and_start(scope, "virtual-node").await?;
    each_runs_exactly_once(scope, &made, 0).await?;
    undisturbed(scope, &bystander).await
}

pub(crate) async fn virtual_node_killed_in_the_midst_of_ten_starts(scope: &Scope) -> anyhow::Result<()> {
    let bystander = bystander(scope).await?;
    let made = create_ten(scope).await?;
    running(scope, 4).await?;
    kill_and_start(scope, "virtual-node").await?;
    each_runs_exactly_once(scope, &made, 0).await?;
    undisturbed(scope, &bystander).await
}

async fn virtual_node_killed_again_and_again_during_ten_starts(scope: &Scope) -> anyhow::Result<()> {
    let made = create_ten(scope).await?;
    for count in [1, 2, 4, 7] {
        running(scope, count).await?;
        kill_and_start(scope, "virtual-node").await?;
    }
    each_runs_exactly_once(scope, &made, 0).await
}

async fn an_agent_killed_in_the_midst_of_ten_starts(scope: &Scope) -> anyhow::Result<()> {
    let bystander = bystander(scope).await?;
    let made = create_ten(scope).await?;
    running(scope, 3).await?;
    kill_and_start(scope, "pool-agent@host-a").await?;
    each_runs_exactly_once(scope, &made, 1).await?;
    undisturbed(scope, &bystander).await
}

async fn pods_made_and_deleted_while_virtual_node_is_away_are_dealt_with_after(
    scope: &Scope,
) -> anyhow::Result<()> {
    let bystander = bystander(scope).await?;
    let leaving = scope
        .start(pod("leaving", json!({"containers": [idle()]})))
        .await?;
    let forced = scope
        .start(pod("forced", json!({"containers": [idle()]})))
        .await?;
    scope.lab().kill("virtual-node").await?;
    let pods: Api<Pod> = scope.api();
    pods.delete("leaving", &DeleteParams::default()).await?;
    // Gone from the API server before anybody could stop it.
    pods.delete("forced", &DeleteParams::default().grace_period(0))
        .await?;
    scope.gone("forced").await?;
    let manifest = pod(
        "coming",
        json!({"nodeName": scope.node_name(), "containers": [idle()]}),
    );
    scope.create(manifest).await?;
    scope.lab().start("virtual-node").await?;
    scope.ready("coming").await?;
    scope.gone("leaving").await?;
    scope
        .wait("that nothing of the deleted pods is left", async || {
            let all = containers::on_hosts(scope.lab())
                .await
                .map_err(|e| format!("{e:#}"))?;
            let gone = [uid(&leaving), uid(&forced)];
            let left: Vec<_> = all
                .iter()
                .filter(|c| gone.contains(&c.pod_uid.as_str()))
                .collect();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .await?;
    undisturbed(scope, &bystander).await
}

async fn traffic_and_probes_go_on_while_virtual_node_is_away(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let mut storm = Storm::start(scope, &pair, "calm").await?;
    storm.until_ok(scope).await?;
    scope.lab().kill("virtual-node").await?;
    storm.all_ok(scope, 20).await?;
    scope.lab().start("virtual-node").await?;
    storm.all_ok(scope, 20).await?;
    let far = scope.ready(&pair.far.name_any()).await?;
    ensure!(
        container(&far, "main").is_some_and(|c| c.restart_count == 0),
        "{}",
        summary(&far)
    );
    Ok(())
}

/// A new connection from the client to the far server every tenth of a second.
/// Its results are read from the container's log on the host's disk, which
/// needs none of our components.
struct Storm {
    log: PathBuf,
    /// Lines that were read already.
    read: usize,
    /// The latest connection that has ended.
    latest: u64,
}

/// How many turns may have been begun since the latest that has ended: ten a
/// second are, and the probe gives one up after five.
const ON_THEIR_WAY: u64 = 51;

/// How one connection ended.
#[derive(Debug)]
struct Outcome {
    turn: u64,
    ok: bool,
}

impl Storm {
    async fn start(scope: &Scope, pair: &Pair, text: &str) -> anyhow::Result<Self> {
        let to = pair.far_service;
        let command = format!("/probe storm {to} {text} 100 < /dev/null > /proc/1/fd/1 2>&1 &");
        scope.kubectl().exec_ok("client", &["sh", "-c", &command]).await?;
        let sandboxes = scope
            .lab()
            .layout()
            .host_data(&pair.near_host)
            .join("agent/sandboxes");
        let own = std::fs::read_dir(&sandboxes)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with(uid(&pair.client)))
            });
        let log = own
            .context("the client has no directory on its host")?
            .join("logs/main/0.log");
        Ok(Self {
            log,
            read: 0,
            latest: 0,
        })
    }

    /// What has come since the last look.
    fn look(&mut self) -> std::io::Result<Vec<Outcome>> {
        let text = std::fs::read_to_string(&self.log)?;
        let new: Vec<Outcome> = text
            .split_inclusive('\n')
            .skip(self.read)
            .filter_map(parse)
            .collect();
        self.read = text.matches('\n').count();
        self.latest = new.iter().map(|one| one.turn).fold(self.latest, u64::max);
        Ok(new)
    }

    async fn collect(
        &mut self,
        scope: &Scope,
        what: &str,
        enough: impl Fn(&[Outcome]) -> bool,
    ) -> anyhow::Result<Vec<Outcome>> {
        let mut all = Vec::new();
        scope
            .wait(what, async || {
                all.extend(self.look().map_err(|e| e.to_string())?);
                if enough(&all) {
                    Ok(())
                } else {
                    Err(format!("{:?}", all.last()))
                }
            })
            .await?;
        Ok(all)
    }

    async fn until_ok(&mut self, scope: &Scope) -> anyhow::Result<()> {
        self.collect(scope, "a connection that works", |all| {
            all.iter().any(|one| one.ok)
        })
        .await
        .map(drop)
    }

    /// The last connection that may have been begun before this.
    fn begun(&mut self) -> std::io::Result<u64> {
        self.look()?;
        Ok(self.latest + ON_THEIR_WAY)
    }

    /// Waits for so many connections that were begun after this, which all work.
    async fn all_ok(&mut self, scope: &Scope, count: usize) -> anyhow::Result<()> {
        let begun = self.begun()?;
        let since = |all: &[Outcome]| all.iter().filter(|one| one.turn > begun).count();
        let all = self
            .collect(scope, "connections", |all| since(all) >= count)
            .await?;
        let failed: Vec<_> = all.iter().filter(|one| one.turn > begun && !one.ok).collect();
        ensure!(failed.is_empty(), "some failed after {begun}: {failed:?}");
        Ok(())
    }

    /// Waits for one that works, and then for ten that all do.
    async fn steady(&mut self, scope: &Scope) -> anyhow::Result<()> {
        self.until_ok(scope).await?;
        self.all_ok(scope, 10).await
    }

    /// Waits for failures, and for nothing but them among the connections that
    /// were begun after this.
    async fn only_failures(&mut self, scope: &Scope, count: usize) -> anyhow::Result<()> {
        let begun = self.begun()?;
        let all = self
            .collect(scope, "connections that fail", |all| {
                all.iter().filter(|one| one.turn > begun && !one.ok).count() >= count
            })
            .await?;
        let worked: Vec<_> = all.iter().filter(|one| one.ok && one.turn > begun).collect();
        ensure!(worked.is_empty(), "some got through after {begun}: {worked:?}");
        Ok(())
    }
}

/// A line of a CRI log: time, stream, tag, and what the program said.
fn parse(line: &str) -> Option<Outcome> {
    let said = line.strip_suffix('\n')?.splitn(4, ' ').nth(3)?;
    let (turn, how) = said.split_once(' ')?;
    Some(Outcome {
        turn: turn.parse().ok()?,
        ok: how.starts_with("ok "),
    })
}

async fn an_agent_killed_fails_closed_and_comes_back_to_its_pods(scope: &Scope) -> anyhow::Result<()> {
    agent_killed(scope, |pair| pair.near_host.clone()).await
}

async fn the_agent_of_the_server_killed_fails_closed_and_comes_back(scope: &Scope) -> anyhow::Result<()> {
    agent_killed(scope, |pair| pair.far_host.clone()).await
}

async fn agent_killed(scope: &Scope, whose: impl Fn(&Pair) -> String) -> anyhow::Result<()> {
    let marker = format!("MARK-fault-{}", scope.namespace());
    let capture = capture_link(scope.lab(), "host-a").await?;
    let pair = Pair::start(scope).await?;
    let host = whose(&pair);
    let agent = format!("pool-agent@{host}");
    let mut storm = Storm::start(scope, &pair, &marker).await?;
    storm.until_ok(scope).await?;
    let before = containers::on_host(scope.lab(), &host).await?;

    scope.lab().kill(&agent).await?;
    storm.only_failures(scope, 30).await?;
    let now = containers::on_host(scope.lab(), &host).await?;
    ensure!(now == before, "its containers were {before:#?} and are {now:#?}");

    scope.lab().start(&agent).await?;
    // A host that was silent for longer than its pods count as ready is heard again a
    // moment after it serves.
    let mut steady = storm.steady(scope).await;
    for _ in 0..5 {
        if steady.is_ok() {
            break;
        }
        steady = storm.steady(scope).await;
    }
    steady?;
    let now = containers::on_host(scope.lab(), &host).await?;
    ensure!(now == before, "its containers were {before:#?} and are {now:#?}");
    for known in [&pair.client, &pair.near, &pair.far] {
        let name = known.name_any();
        let still = scope.ready(&name).await?;
        ensure!(uid(&still) == uid(known), "{name} was made anew");
        ensure!(
            container(&still, "main").is_some_and(|c| c.restart_count == 0),
            "{}",
            summary(&still)
        );
        scope.kubectl().exec_ok(&name, &["true"]).await?;
    }
    let packets = capture.end().await?;
    only_tunnels(scope.lab(), &packets)?;
    let seen = packets.count(&marker);
    ensure!(seen == 0, "the marker was seen {seen} times");
    Ok(())
}

async fn the_api_server_killed_disturbs_no_pod(scope: &Scope) -> anyhow::Result<()> {
    let bystander = bystander(scope).await?;
    kill_and_start(scope, "kube-apiserver").await?;
    scope
        .lab()
        .cluster()
        .wait_ready(spindrift_tests::scope::PATIENCE)
        .await?;
    scope
        .lab()
        .cluster()
        .wait_node(&scope.node_name(), spindrift_tests::scope::PATIENCE)
        .await?;
    undisturbed(scope, &bystander).await?;
    // Watches go on as well: what is new is seen.
    scope
        .start(pod("newcomer", json!({"containers": [idle()]})))
        .await?;
    Ok(())
}
