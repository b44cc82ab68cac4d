//! Pods from creation to removal, as a user of a kubelet knows them.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod, discovery::v1::EndpointSlice};
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use spindrift_tests::{
    Scope, containers,
    workload::{
        agnhost, condition, config_map, container, deployment, idle, is_ready, is_running, merge, message,
        netexec, phase, pod, probe_server, reason, secret, service, shell, state, uid, waiting,
    },
};

use super::suite::{Case, cases};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        a_deployment_of_three_becomes_ready_over_both_hosts,
        a_deployment_scales_to_twenty_and_back,
        a_rollout_restart_replaces_every_pod,
        a_running_pod_has_the_status_that_a_kubelet_writes,
        the_events_of_a_start_are_those_that_kubectl_describe_shows,
        deleting_a_pod_runs_pre_stop_then_sends_term_then_waits_for_its_end,
        a_pod_that_ignores_term_is_killed_when_its_grace_is_over,
        a_pod_deleted_by_force_leaves_nothing_on_its_host,
        a_container_that_keeps_failing_is_restarted_with_back_off,
        a_pod_that_is_never_restarted_ends_failed_with_its_exit_code,
        a_pod_restarted_on_failure_ends_when_it_succeeds,
        a_job_completes,
        init_containers_run_one_after_the_other_before_the_rest,
        a_failing_init_container_keeps_the_rest_from_starting,
        a_sidecar_starts_first_and_ends_last_and_keeps_no_pod_from_completing,
        an_unknown_image_is_an_error_then_backs_off,
        an_absent_image_that_must_not_be_pulled_is_named,
        a_pod_whose_config_map_is_missing_starts_once_it_is_there,
        a_pod_whose_config_map_volume_is_missing_starts_once_it_is_there,
        a_pod_too_large_for_the_node_stays_unscheduled,
        a_pod_too_large_that_is_bound_anyway_fails_with_the_kubelets_reason,
        host_network_is_refused_by_name,
        a_host_path_volume_is_refused_by_name,
        the_environment_is_resolved_in_order,
        a_readiness_probe_decides_who_is_an_endpoint,
        a_liveness_probe_restarts_its_container,
        a_startup_probe_holds_the_others_back,
        the_termination_message_and_the_exit_code_are_told,
        a_container_over_its_memory_limit_is_killed_for_it,
        a_container_runs_as_whom_its_security_context_says,
        a_pod_knows_its_name_and_its_resolver,
        a_pod_that_ran_over_its_deadline_fails,
    ]
}

async fn a_deployment_of_three_becomes_ready_over_both_hosts(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(deployment("web", 3, json!({"containers": [netexec()]})))
        .await?;
    let pods = scope.pods_until("web", 3, "are Ready", is_ready).await?;
    let hosts = pods
        .iter()
        .map(|pod| scope.host_of(pod))
        .collect::<anyhow::Result<BTreeSet<_>>>()?;
    ensure!(hosts.len() == 2, "all pods are on {hosts:?}");
    let addresses: BTreeSet<_> = pods
        .iter()
        .filter_map(spindrift_tests::workload::address)
        .collect();
    ensure!(addresses.len() == 3, "two pods share an address: {addresses:?}");
    Ok(())
}

async fn a_deployment_scales_to_twenty_and_back(scope: &Scope) -> anyhow::Result<()> {
    const LIMIT: Duration = Duration::from_secs(180);
    scope
        .create(deployment("web", 1, json!({"containers": [probe_server()]})))
        .await?;
    scope.pods_until("web", 1, "are Ready", is_ready).await?;
    scope
        .kubectl()
        .run(&["scale", "deployment", "web", "--replicas=20"])
        .await?;
    let pods: Api<Pod> = scope.api();
    let count = async |wanted: usize| {
        scope
            .wait_within(LIMIT, &format!("{wanted} Ready pods"), async || {
                let found = pods
                    .list(&ListParams::default())
                    .await
                    .map_err(|e| e.to_string())?
                    .items;
                let ready = found.iter().filter(|pod| is_ready(pod)).count();
                if found.len() == wanted && ready == wanted {
                    Ok(found)
                } else {
                    Err(format!("{ready} of {} are", found.len()))
                }
            })
            .await
    };
    let all = count(20).await?;
    let addresses: BTreeSet<_> = all
        .iter()
        .filter_map(spindrift_tests::workload::address)
        .collect();
    ensure!(addresses.len() == 20, "addresses are shared: {addresses:?}");
    scope
        .kubectl()
        .run(&["scale", "deployment", "web", "--replicas=2"])
        .await?;
    let kept = count(2).await?;
    let kept: BTreeSet<&str> = kept.iter().map(uid).collect();
    nothing_left(scope, all.iter().map(uid).filter(|uid| !kept.contains(uid))).await
}

/// Waits until no host has a container of these pods any more.
async fn nothing_left<'a>(scope: &Scope, uids: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
    let uids: BTreeSet<&str> = uids.collect();
    scope
        .wait("that the hosts have nothing left of it", async || {
            let found = containers::on_hosts(scope.lab())
                .await
                .map_err(|e| format!("{e:#}"))?;
            let left: Vec<_> = found
                .iter()
                .filter(|c| uids.contains(c.pod_uid.as_str()))
                .collect();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .await
}

/// Waits until no process of the pod is left on its host.
async fn nothing_runs(scope: &Scope, pod: &Pod) -> anyhow::Result<()> {
    scope
        .wait("that nothing of it runs", async || {
            let found = containers::on_hosts(scope.lab())
                .await
                .map_err(|e| format!("{e:#}"))?;
            let running: Vec<_> = found
                .iter()
                .filter(|c| c.pod_uid == uid(pod) && c.pid.is_some())
                .collect();
            if running.is_empty() {
                Ok(())
            } else {
                Err(format!("{running:?}"))
            }
        })
        .await
}

async fn a_rollout_restart_replaces_every_pod(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(deployment("web", 2, json!({"containers": [probe_server()]})))
        .await?;
    let old = scope.pods_until("web", 2, "are Ready", is_ready).await?;
    let kubectl = scope.kubectl();
    kubectl.run(&["rollout", "restart", "deployment", "web"]).await?;
    kubectl
        .run(&["rollout", "status", "deployment", "web", "--timeout=80s"])
        .await?;
    let new = scope.pods_until("web", 2, "are Ready", is_ready).await?;
    let old: BTreeSet<&str> = old.iter().map(uid).collect();
    ensure!(
        new.iter().all(|pod| !old.contains(uid(pod))),
        "an old pod is still there"
    );
    Ok(())
}

async fn a_running_pod_has_the_status_that_a_kubelet_writes(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        probe_server(),
        json!({"resources": {"requests": {"cpu": "10m", "memory": "16Mi"}}}),
    );
    let pod = scope.start(pod("web", json!({"containers": [main]}))).await?;
    for kind in [
        "PodReadyToStartContainers",
        "Initialized",
        "ContainersReady",
        "Ready",
        "PodScheduled",
    ] {
        ensure!(
            condition(&pod, kind) == Some("True"),
            "{kind} is {:?}",
            condition(&pod, kind)
        );
    }
    let status = pod.status.as_ref().context("there is no status")?;
    ensure!(phase(&pod) == "Running", "{status:?}");
    ensure!(
        status.qos_class.as_deref() == Some("Burstable"),
        "{:?}",
        status.qos_class
    );
    ensure!(status.start_time.is_some(), "there is no start time");
    let ips: Vec<_> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    ensure!(
        ips.first().copied() == status.pod_ip.as_deref() && ips.len() == 1,
        "{ips:?}"
    );
    ensure!(
        status.host_ip.is_some() && status.host_ips.is_some(),
        "the host's address is not told"
    );
    let main = container(&pod, "main").context("the container has no status")?;
    ensure!(
        main.ready && main.started == Some(true) && main.restart_count == 0,
        "{main:?}"
    );
    ensure!(
        main.container_id
            .as_deref()
            .is_some_and(|id| id.starts_with("containerd://")),
        "{main:?}"
    );
    ensure!(
        main.image == spindrift_tests::program::PROBE.reference,
        "{}",
        main.image
    );
    ensure!(!main.image_id.is_empty(), "{main:?}");
    // The id is one that the runtime knows.
    let id = main
        .container_id
        .as_deref()
        .and_then(|id| id.strip_prefix("containerd://"));
    let known = containers::on_host(scope.lab(), &scope.host_of(&pod)?).await?;
    ensure!(
        known
            .iter()
            .any(|c| Some(c.id.as_str()) == id && c.pod_uid == uid(&pod)),
        "{known:?}"
    );
    let shown = scope.kubectl().run(&["get", "pods", "-o", "wide"]).await?;
    ensure!(
        shown.contains("1/1") && shown.contains("Running") && shown.contains(&scope.node_name()),
        "{shown}"
    );
    Ok(())
}

async fn the_events_of_a_start_are_those_that_kubectl_describe_shows(scope: &Scope) -> anyhow::Result<()> {
    scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    for (reason, words) in [
        ("Scheduled", "Successfully assigned"),
        ("Pulled", "already present on machine"),
        ("Created", "Container created"),
        ("Started", "Container started"),
    ] {
        scope.event("web", reason, words).await?;
    }
    let shown = scope.kubectl().run(&["describe", "pod", "web"]).await?;
    for word in [
        "Pulled",
        "Created",
        "Started",
        "Status:           Running",
        "Ready          True",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(
            squeezed(&shown).contains(&squeezed(word)),
            "no {word:?} in:\n{shown}"
        );
    }
    Ok(())
}

async fn deleting_a_pod_runs_pre_stop_then_sends_term_then_waits_for_its_end(
    scope: &Scope,
) -> anyhow::Result<()> {
    let script =
        "trap 'echo got-term; sleep 2; echo done-and-out; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let main = merge(
        shell(script),
        json!({"lifecycle": {"preStop": {"exec": {"command": [
            "sh", "-c", "echo pre-stop > /proc/1/fd/1; sleep 1; echo pre-stop-over > /proc/1/fd/1"
        ]}}}}),
    );
    scope
        .start(pod(
            "web",
            json!({"containers": [main], "terminationGracePeriodSeconds": 30}),
        ))
        .await?;
    let following = scope.kubectl().start(&["logs", "--follow", "web"])?;
    let kubectl = scope.kubectl().clone();
    let asked = std::time::Instant::now();
    kubectl.run(&["delete", "pod", "web", "--wait=false"]).await?;
    let terminating = scope.pod("web").await?;
    ensure!(
        terminating.metadata.deletion_timestamp.is_some(),
        "it is not being deleted"
    );
    scope.gone("web").await?;
    let took = asked.elapsed();
    ensure!(
        took >= Duration::from_secs(3),
        "it was gone after {took:?}, before it had said good-bye"
    );
    ensure!(
        took < Duration::from_secs(30),
        "its end was not noticed before its grace was over"
    );
    let followed = following.wait_with_output().await?;
    let said = String::from_utf8_lossy(&followed.stdout).into_owned();
    ensure!(
        said.split_whitespace()
            .eq(["up", "pre-stop", "pre-stop-over", "got-term", "done-and-out"]),
        "{said}"
    );
    scope.event("web", "Killing", "main").await?;
    Ok(())
}

async fn a_pod_that_ignores_term_is_killed_when_its_grace_is_over(scope: &Scope) -> anyhow::Result<()> {
    let main = shell("trap '' TERM; echo up; while :; do sleep 1; done");
    let web = scope
        .start(pod(
            "web",
            json!({"containers": [main], "terminationGracePeriodSeconds": 3}),
        ))
        .await?;
    let asked = std::time::Instant::now();
    scope.api::<Pod>().delete("web", &DeleteParams::default()).await?;
    scope.gone("web").await?;
    ensure!(
        asked.elapsed() >= Duration::from_secs(3),
        "it had {:?} of 3 s",
        asked.elapsed()
    );
    nothing_left(scope, [uid(&web)].into_iter()).await
}

async fn a_pod_deleted_by_force_leaves_nothing_on_its_host(scope: &Scope) -> anyhow::Result<()> {
    let main = shell("trap '' TERM; while :; do sleep 1; done");
    let web = scope
        .start(pod(
            "web",
            json!({"containers": [main], "terminationGracePeriodSeconds": 600}),
        ))
        .await?;
    scope
        .kubectl()
        .run(&["delete", "pod", "web", "--force", "--grace-period=0"])
        .await?;
    scope.gone("web").await?;
    nothing_left(scope, [uid(&web)].into_iter()).await
}

async fn a_container_that_keeps_failing_is_restarted_with_back_off(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(pod("web", json!({"containers": [shell("echo trying; exit 3")]})))
        .await?;
    let web = scope
        .until("web", "backs off after two restarts", |pod| {
            waiting(pod, "main") == "CrashLoopBackOff"
                && container(pod, "main").is_some_and(|main| main.restart_count >= 2)
        })
        .await?;
    let main = container(&web, "main").context("no status")?;
    let last = main.last_state.as_ref().and_then(|last| last.terminated.as_ref());
    ensure!(
        last.is_some_and(|last| last.exit_code == 3 && last.reason.as_deref() == Some("Error")),
        "{main:?}"
    );
    let why = main
        .state
        .as_ref()
        .and_then(|s| s.waiting.as_ref())
        .and_then(|w| w.message.as_deref());
    ensure!(
        why.is_some_and(|why| why.contains("back-off") && why.contains("main")),
        "{why:?}"
    );
    ensure!(
        phase(&web) == "Running" && condition(&web, "Ready") == Some("False"),
        "{:?}",
        web.status
    );
    scope
        .event("web", "BackOff", "Back-off restarting failed container")
        .await?;
    Ok(())
}

async fn a_pod_that_is_never_restarted_ends_failed_with_its_exit_code(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [shell("exit 42")]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    let end = state(&web, "main")
        .and_then(|s| s.terminated.as_ref())
        .context("it has not ended")?;
    ensure!(
        end.exit_code == 42 && end.reason.as_deref() == Some("Error"),
        "{end:?}"
    );
    ensure!(
        container(&web, "main").is_some_and(|main| main.restart_count == 0),
        "it was restarted"
    );
    ensure!(condition(&web, "Ready") == Some("False"), "{:?}", web.status);
    // Ended, not forgotten: its log is still there.
    scope.kubectl().run(&["logs", "web"]).await?;
    Ok(())
}

async fn a_pod_restarted_on_failure_ends_when_it_succeeds(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell("if [ -e /data/tried ]; then exit 0; fi; touch /data/tried; exit 1"),
        json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
    );
    scope
        .create(pod(
            "web",
            json!({
                "restartPolicy": "OnFailure",
                "containers": [main],
                "volumes": [{"name": "data", "emptyDir": {}}],
            }),
        ))
        .await?;
    let web = scope
        .until("web", "has succeeded", |pod| phase(pod) == "Succeeded")
        .await?;
    let main = container(&web, "main").context("no status")?;
    ensure!(main.restart_count == 1, "{main:?}");
    let end = state(&web, "main")
        .and_then(|s| s.terminated.as_ref())
        .context("it has not ended")?;
    ensure!(
        end.exit_code == 0 && end.reason.as_deref() == Some("Completed"),
        "{end:?}"
    );
    Ok(())
}

async fn a_job_completes(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "once"},
            "spec": {
                "completions": 3,
                "parallelism": 2,
                "template": {"spec": {"restartPolicy": "Never", "containers": [shell("echo done")]}},
            },
        }))
        .await?;
    let jobs: Api<Job> = scope.api();
    scope
        .wait("that the job completes", async || {
            let status = jobs
                .get("once")
                .await
                .map_err(|e| e.to_string())?
                .status
                .unwrap_or_default();
            if status.succeeded == Some(3) {
                Ok(())
            } else {
                Err(format!("{status:?}"))
            }
        })
        .await
}

async fn init_containers_run_one_after_the_other_before_the_rest(scope: &Scope) -> anyhow::Result<()> {
    let named = |name: &str, script: &str| {
        merge(
            shell(script),
            json!({"name": name, "volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
        )
    };
    let step = |name: &str| {
        named(
            name,
            &format!("echo {name}-begins >> /data/log; sleep 1; echo {name}-ends >> /data/log"),
        )
    };
    scope
        .start(pod(
            "web",
            json!({
                "initContainers": [step("first"), step("second")],
                "containers": [named("main", "echo main >> /data/log; cat /data/log; sleep 3600")],
                "volumes": [{"name": "data", "emptyDir": {}}],
            }),
        ))
        .await?;
    let log = scope
        .log_until("web", "ends with main", |log| log.trim_end().ends_with("\nmain"))
        .await?;
    ensure!(
        log.split_whitespace().eq([
            "first-begins",
            "first-ends",
            "second-begins",
            "second-ends",
            "main"
        ]),
        "{log}"
    );
    let web = scope.pod("web").await?;
    for name in ["first", "second"] {
        let end = state(&web, name).and_then(|s| s.terminated.as_ref());
        ensure!(
            end.is_some_and(|end| end.reason.as_deref() == Some("Completed")),
            "{name}: {end:?}"
        );
    }
    Ok(())
}

async fn a_failing_init_container_keeps_the_rest_from_starting(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(pod(
            "web",
            json!({
                "initContainers": [merge(shell("exit 7"), json!({"name": "first"}))],
                "containers": [probe_server()],
            }),
        ))
        .await?;
    let web = scope
        .until("web", "backs off at its init container", |pod| {
            waiting(pod, "first") == "CrashLoopBackOff"
        })
        .await?;
    ensure!(phase(&web) == "Pending", "{}", phase(&web));
    ensure!(
        waiting(&web, "main") == "PodInitializing",
        "{:?}",
        state(&web, "main")
    );
    ensure!(
        condition(&web, "Initialized") == Some("False"),
        "{:?}",
        web.status
    );
    let shown = scope.kubectl().run(&["get", "pod", "web"]).await?;
    ensure!(shown.contains("Init:CrashLoopBackOff"), "{shown}");
    Ok(())
}

async fn a_sidecar_starts_first_and_ends_last_and_keeps_no_pod_from_completing(
    scope: &Scope,
) -> anyhow::Result<()> {
    let mounts = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let sidecar = merge(
        shell(
            "trap 'echo sidecar-term; exit 0' TERM; sleep 1; touch /data/up; echo sidecar-up; while :; do sleep 0.1; done",
        ),
        json!({
            "name": "sidecar",
            "restartPolicy": "Always",
            "volumeMounts": mounts["volumeMounts"],
            "startupProbe": {"exec": {"command": ["test", "-e", "/data/up"]}, "periodSeconds": 1, "failureThreshold": 60},
        }),
    );
    let main = merge(
        shell("test -e /data/up && echo main-saw-the-sidecar && sleep 1"),
        mounts,
    );
    scope
        .create(pod(
            "web",
            json!({
                "restartPolicy": "Never",
                "initContainers": [sidecar],
                "containers": [main],
                "volumes": [{"name": "data", "emptyDir": {}}],
            }),
        ))
        .await?;
    let web = scope
        .until("web", "has succeeded", |pod| phase(pod) == "Succeeded")
        .await?;
    let kubectl = scope.kubectl();
    let log = kubectl.run(&["logs", "web", "--container=main"]).await?;
    ensure!(log.contains("main-saw-the-sidecar"), "{log}");
    let log = kubectl.run(&["logs", "web", "--container=sidecar"]).await?;
    ensure!(log.split_whitespace().eq(["sidecar-up", "sidecar-term"]), "{log}");
    ensure!(
        container(&web, "sidecar").is_some_and(|c| c.restart_count == 0),
        "{:?}",
        container(&web, "sidecar")
    );
    Ok(())
}

async fn an_unknown_image_is_an_error_then_backs_off(scope: &Scope) -> anyhow::Result<()> {
    const IMAGE: &str = "registry.spindrift.local/no/such/image:1";
    let main = json!({"name": "main", "image": IMAGE});
    // Beside one that can run, to which nothing happens.
    scope
        .create(pod(
            "web",
            json!({"containers": [main, merge(idle(), json!({"name": "good"}))]}),
        ))
        .await?;
    let web = scope
        .until("web", "backs off from pulling", |pod| {
            waiting(pod, "main") == "ImagePullBackOff"
        })
        .await?;
    let why = state(&web, "main")
        .and_then(|s| s.waiting.as_ref())
        .and_then(|w| w.message.as_deref());
    ensure!(why.is_some_and(|why| why.contains(IMAGE)), "{why:?}");
    ensure!(phase(&web) == "Pending", "{}", phase(&web));
    scope
        .until("web", "runs its good container", |pod| is_running(pod, "good"))
        .await?;
    scope.event("web", "Pulling", IMAGE).await?;
    scope.event("web", "Failed", "ErrImagePull").await?;
    scope.event("web", "BackOff", IMAGE).await?;
    let shown = scope.kubectl().run(&["get", "pod", "web"]).await?;
    ensure!(
        shown.contains("ImagePullBackOff") || shown.contains("ErrImagePull"),
        "{shown}"
    );
    Ok(())
}

async fn an_absent_image_that_must_not_be_pulled_is_named(scope: &Scope) -> anyhow::Result<()> {
    let main = json!({"name": "main", "image": "spindrift.local/absent:1", "imagePullPolicy": "Never"});
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    scope
        .until("web", "says so", |pod| {
            waiting(pod, "main") == "ErrImageNeverPull"
        })
        .await?;
    scope
        .event("web", "ErrImageNeverPull", "spindrift.local/absent:1")
        .await?;
    Ok(())
}

async fn a_pod_whose_config_map_is_missing_starts_once_it_is_there(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell("echo colour=$COLOUR; sleep 3600"),
        json!({"env": [{"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "paint", "key": "colour"}}}]}),
    );
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    let web = scope
        .until("web", "waits for its ConfigMap", |pod| {
            waiting(pod, "main") == "CreateContainerConfigError"
        })
        .await?;
    let why = state(&web, "main")
        .and_then(|s| s.waiting.as_ref())
        .and_then(|w| w.message.as_deref());
    ensure!(why == Some("configmap \"paint\" not found"), "{why:?}");
    ensure!(phase(&web) == "Pending", "{}", phase(&web));
    scope
        .event("web", "Failed", "configmap \"paint\" not found")
        .await?;
    scope
        .create(config_map("paint", json!({"colour": "teal"})))
        .await?;
    let started = scope.ready("web").await?;
    ensure!(uid(&started) == uid(&web), "it was made anew");
    scope.log_is("web", "colour=teal").await
}

async fn a_pod_whose_config_map_volume_is_missing_starts_once_it_is_there(
    scope: &Scope,
) -> anyhow::Result<()> {
    let main = merge(
        shell("cat /paint/colour; echo; sleep 3600"),
        json!({"volumeMounts": [{"name": "paint", "mountPath": "/paint"}]}),
    );
    scope
        .create(pod(
            "web",
            json!({"containers": [main], "volumes": [{"name": "paint", "configMap": {"name": "paint"}}]}),
        ))
        .await?;
    scope
        .event("web", "FailedMount", "configmap \"paint\" not found")
        .await?;
    let web = scope.pod("web").await?;
    ensure!(
        phase(&web) == "Pending" && waiting(&web, "main") == "ContainerCreating",
        "{:?}",
        web.status
    );
    scope
        .create(config_map("paint", json!({"colour": "teal"})))
        .await?;
    scope.ready("web").await?;
    scope.log_is("web", "teal").await
}

fn greedy() -> Value {
    merge(idle(), json!({"resources": {"requests": {"cpu": "5000"}}}))
}

async fn a_pod_too_large_for_the_node_stays_unscheduled(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(pod("web", json!({"containers": [greedy()]})))
        .await?;
    scope.event("web", "FailedScheduling", "Insufficient cpu").await?;
    // The scheduler tells the event before it writes the condition.
    scope
        .until("web", "is unschedulable", |pod| {
            phase(pod) == "Pending" && condition(pod, "PodScheduled") == Some("False")
        })
        .await
        .map(drop)
}

async fn a_pod_too_large_that_is_bound_anyway_fails_with_the_kubelets_reason(
    scope: &Scope,
) -> anyhow::Result<()> {
    scope
        .create(pod(
            "web",
            json!({"nodeName": scope.node_name(), "containers": [greedy()]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(reason(&web) == "OutOfcpu", "{} {}", reason(&web), message(&web));
    ensure!(message(&web).contains("cpu"), "{}", message(&web));
    // And nothing is claimed: the node takes others as before.
    scope.start(pod("small", json!({"containers": [idle()]}))).await?;
    Ok(())
}

async fn host_network_is_refused_by_name(scope: &Scope) -> anyhow::Result<()> {
    refused_by_name(
        scope,
        json!({"hostNetwork": true, "containers": [idle()]}),
        "spec.hostNetwork",
    )
    .await
}

async fn a_host_path_volume_is_refused_by_name(scope: &Scope) -> anyhow::Result<()> {
    let spec = json!({
        "containers": [merge(idle(), json!({"volumeMounts": [{"name": "etc", "mountPath": "/host"}]}))],
        "volumes": [{"name": "etc", "hostPath": {"path": "/etc"}}],
    });
    refused_by_name(
        scope,
        spec,
        "spec.volumes[0]: volume \"etc\" is of a kind that is not supported: hostPath",
    )
    .await
}

async fn refused_by_name(scope: &Scope, spec: Value, field: &str) -> anyhow::Result<()> {
    scope.create(pod("web", spec)).await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(!reason(&web).is_empty(), "there is no reason: {:?}", web.status);
    ensure!(
        message(&web).contains(field),
        "{field} is not named: {} {}",
        reason(&web),
        message(&web)
    );
    let known = containers::on_hosts(scope.lab()).await?;
    ensure!(
        known.iter().all(|c| c.pod_uid != uid(&web)),
        "something of it runs"
    );
    scope.event("web", reason(&web), field).await?;
    Ok(())
}

async fn the_environment_is_resolved_in_order(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(config_map("paint", json!({"colour": "teal", "SHADE": "dark"})))
        .await?;
    scope.create(secret("vault", json!({"word": "sesame"}))).await?;
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    let env = json!([
        {"name": "NAME", "valueFrom": field("metadata.name")},
        {"name": "NAMESPACE", "valueFrom": field("metadata.namespace")},
        {"name": "UID_", "valueFrom": field("metadata.uid")},
        {"name": "APP", "valueFrom": field("metadata.labels['app']")},
        {"name": "POD_IP", "valueFrom": field("status.podIP")},
        {"name": "HOST_IP", "valueFrom": field("status.hostIP")},
        {"name": "NODE", "valueFrom": field("spec.nodeName")},
        {"name": "ACCOUNT", "valueFrom": field("spec.serviceAccountName")},
        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "paint", "key": "colour"}}},
        {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "vault", "key": "word"}}},
        {"name": "ABSENT", "valueFrom": {"secretKeyRef": {"name": "no-such", "key": "word", "optional": true}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
        {"name": "JOINED", "value": "$(NAME)@$(POD_IP) $$(NAME) $(NO_SUCH)"},
        {"name": "SHADE", "value": "light"},
    ]);
    let main = merge(
        shell("env; echo ARG=$0; sleep 3600"),
        json!({
            "args": ["$(COLOUR)"],
            "env": env,
            "envFrom": [{"configMapRef": {"name": "paint"}}, {"prefix": "V_", "secretRef": {"name": "vault"}}],
            "resources": {"limits": {"cpu": "250m"}},
        }),
    );
    let web = scope.start(pod("web", json!({"containers": [main]}))).await?;
    let log = scope
        .log_until("web", "is whole", |log| log.contains("ARG="))
        .await?;
    let ip = spindrift_tests::workload::address(&web).context("no address")?;
    let host_ip = web
        .status
        .as_ref()
        .and_then(|s| s.host_ip.clone())
        .unwrap_or_default();
    for line in [
        "NAME=web".to_owned(),
        format!("NAMESPACE={}", scope.namespace()),
        format!("UID_={}", uid(&web)),
        "APP=web".into(),
        format!("POD_IP={ip}"),
        format!("HOST_IP={host_ip}"),
        format!("NODE={}", scope.node_name()),
        "ACCOUNT=default".into(),
        "COLOUR=teal".into(),
        "WORD=sesame".into(),
        "CPU=250".into(),
        format!("JOINED=web@{ip} $(NAME) $(NO_SUCH)"),
        "SHADE=light".into(),
        "colour=teal".into(),
        "V_word=sesame".into(),
        "ARG=teal".into(),
        "KUBERNETES_SERVICE_HOST=10.96.0.1".into(),
    ] {
        ensure!(log.lines().any(|l| l == line), "no {line:?} in:\n{log}");
    }
    ensure!(!log.contains("ABSENT="), "{log}");
    Ok(())
}

/// The addresses of a Service's endpoints that are ready.
async fn endpoints(scope: &Scope, service: &str) -> Result<BTreeSet<String>, String> {
    let slices: Api<EndpointSlice> = scope.api();
    let selected = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    let found = slices.list(&selected).await.map_err(|e| e.to_string())?;
    let endpoints = found
        .items
        .into_iter()
        .flat_map(|slice| slice.endpoints.unwrap_or_default());
    Ok(endpoints
        .filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true))
        .flat_map(|e| e.addresses)
        .collect())
}

async fn a_readiness_probe_decides_who_is_an_endpoint(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        idle(),
        json!({"readinessProbe": {
            "exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1,
        }}),
    );
    scope.create(service("web")).await?;
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    let web = scope.until("web", "runs", |pod| is_running(pod, "main")).await?;
    scope.event("web", "Unhealthy", "Readiness probe failed").await?;
    ensure!(!is_ready(&scope.pod("web").await?), "it is Ready");
    ensure!(
        endpoints(scope, "web").await == Ok(BTreeSet::new()),
        "it is an endpoint"
    );
    let ip = spindrift_tests::workload::address(&web)
        .context("no address")?
        .to_string();
    let settles = async |wanted: BTreeSet<String>| {
        scope
            .wait("the endpoints", async || {
                let now = endpoints(scope, "web").await?;
                if now == wanted {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                }
            })
            .await
    };
    scope.kubectl().exec_ok("web", &["touch", "/tmp/ready"]).await?;
    settles(BTreeSet::from([ip])).await?;
    scope.kubectl().exec_ok("web", &["rm", "/tmp/ready"]).await?;
    settles(BTreeSet::new()).await?;
    let web = scope.pod("web").await?;
    ensure!(
        container(&web, "main").is_some_and(|c| c.restart_count == 0),
        "it was restarted"
    );
    Ok(())
}

async fn a_liveness_probe_restarts_its_container(scope: &Scope) -> anyhow::Result<()> {
    // agnhost's own: healthy for ten seconds, then it answers 500.
    let main = merge(
        agnhost(&["liveness"]),
        json!({"livenessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1}}),
    );
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    let web = scope
        .until("web", "was restarted", |pod| {
            container(pod, "main").is_some_and(|c| c.restart_count >= 1)
        })
        .await?;
    ensure!(phase(&web) == "Running", "{}", phase(&web));
    scope.event("web", "Unhealthy", "Liveness probe failed").await?;
    scope.event("web", "Killing", "liveness probe").await?;
    Ok(())
}

async fn a_startup_probe_holds_the_others_back(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        idle(),
        json!({
            "startupProbe": {"exec": {"command": ["test", "-e", "/tmp/started"]}, "periodSeconds": 1, "failureThreshold": 300},
            // Would kill it at once.
            "livenessProbe": {"exec": {"command": ["test", "-e", "/tmp/started"]}, "periodSeconds": 1, "failureThreshold": 1},
        }),
    );
    scope.create(pod("web", json!({"containers": [main]}))).await?;
    scope.event("web", "Unhealthy", "Startup probe failed").await?;
    let web = scope.pod("web").await?;
    let main = container(&web, "main").context("no status")?;
    ensure!(
        main.started == Some(false) && !main.ready && main.restart_count == 0,
        "{main:?}"
    );
    scope.kubectl().exec_ok("web", &["touch", "/tmp/started"]).await?;
    let web = scope.ready("web").await?;
    let main = container(&web, "main").context("no status")?;
    ensure!(main.started == Some(true) && main.restart_count == 0, "{main:?}");
    Ok(())
}

async fn the_termination_message_and_the_exit_code_are_told(scope: &Scope) -> anyhow::Result<()> {
    let written = merge(
        shell("printf 'out of paint' > /dev/termination-log; exit 5"),
        json!({"name": "written"}),
    );
    let logged = merge(
        shell("echo first line; echo the last line; exit 6"),
        json!({"name": "logged", "terminationMessagePolicy": "FallbackToLogsOnError"}),
    );
    scope
        .create(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [written, logged]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    let end = |name: &str| {
        state(&web, name)
            .and_then(|s| s.terminated.clone())
            .context("it has not ended")
    };
    let written = end("written")?;
    ensure!(
        written.exit_code == 5 && written.message.as_deref() == Some("out of paint"),
        "{written:?}"
    );
    let logged = end("logged")?;
    ensure!(
        logged.exit_code == 6
            && logged
                .message
                .as_deref()
                .is_some_and(|m| m.trim_end().ends_with("the last line")),
        "{logged:?}"
    );
    Ok(())
}

async fn a_container_over_its_memory_limit_is_killed_for_it(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell("exec tail -c 200000000 /dev/zero"),
        json!({"resources": {"limits": {"memory": "24Mi"}}}),
    );
    scope
        .create(pod(
            "web",
            json!({"restartPolicy": "Never", "containers": [main]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    let end = state(&web, "main")
        .and_then(|s| s.terminated.as_ref())
        .context("it has not ended")?;
    ensure!(
        end.reason.as_deref() == Some("OOMKilled") && end.exit_code == 137,
        "{end:?}"
    );
    Ok(())
}

async fn a_container_runs_as_whom_its_security_context_says(scope: &Scope) -> anyhow::Result<()> {
    let main = merge(
        shell(
            "id -u; id -g; id -G; touch /file 2>/dev/null && echo writable || echo read-only; touch /data/x && stat -c %g /data/x; grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status; sleep 3600",
        ),
        json!({
            "securityContext": {
                "runAsUser": 1234, "runAsGroup": 2345, "readOnlyRootFilesystem": true,
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        }),
    );
    scope
        .start(pod(
            "web",
            json!({
                "securityContext": {"fsGroup": 3456},
                "containers": [main],
                "volumes": [{"name": "data", "emptyDir": {}}],
            }),
        ))
        .await?;
    let log = scope
        .log_until("web", "is whole", |log| log.contains("CapEff"))
        .await?;
    let lines: Vec<&str> = log.lines().collect();
    ensure!(lines[..2] == ["1234", "2345"], "{log}");
    ensure!(lines[2].split(' ').any(|group| group == "3456"), "{log}");
    ensure!(lines[3..5] == ["read-only", "3456"], "{log}");
    ensure!(lines[5].ends_with('1'), "{log}");
    ensure!(lines[6].ends_with("0000000000000000"), "{log}");
    // Root where root is forbidden does not start at all.
    let root = merge(idle(), json!({"securityContext": {"runAsNonRoot": true}}));
    scope.create(pod("root", json!({"containers": [root]}))).await?;
    let root = scope
        .until("root", "is refused", |pod| {
            waiting(pod, "main") == "CreateContainerConfigError"
        })
        .await?;
    let why = state(&root, "main")
        .and_then(|s| s.waiting.as_ref())
        .and_then(|w| w.message.clone());
    ensure!(
        why.as_deref()
            .is_some_and(|why| why.contains("runAsNonRoot") || why.contains("root")),
        "{why:?}"
    );
    Ok(())
}

async fn a_pod_knows_its_name_and_its_resolver(scope: &Scope) -> anyhow::Result<()> {
    let spec = json!({
        "containers": [idle()],
        "hostname": "bee",
        "hostAliases": [{"ip": "192.0.2.99", "hostnames": ["far.example"]}],
    });
    let web = scope.start(pod("web", spec)).await?;
    let kubectl = scope.kubectl();
    ensure!(
        kubectl.exec_ok("web", &["hostname"]).await?.trim() == "bee",
        "the host name is another"
    );
    let resolver = kubectl.exec_ok("web", &["cat", "/etc/resolv.conf"]).await?;
    let search = format!(
        "search {ns}.svc.cluster.local svc.cluster.local cluster.local",
        ns = scope.namespace()
    );
    for line in ["nameserver 10.96.0.10", search.as_str(), "options ndots:5"] {
        ensure!(
            resolver.lines().any(|l| l.trim() == line),
            "no {line:?} in:\n{resolver}"
        );
    }
    let hosts = kubectl.exec_ok("web", &["cat", "/etc/hosts"]).await?;
    let ip = spindrift_tests::workload::address(&web)
        .context("no address")?
        .to_string();
    for (address, name) in [
        (ip.as_str(), "bee"),
        ("192.0.2.99", "far.example"),
        ("127.0.0.1", "localhost"),
    ] {
        let fits = |line: &str| {
            let mut words = line.split_whitespace();
            words.next() == Some(address) && words.any(|word| word == name)
        };
        ensure!(hosts.lines().any(fits), "no {name} in:\n{hosts}");
    }
    Ok(())
}

async fn a_pod_that_ran_over_its_deadline_fails(scope: &Scope) -> anyhow::Result<()> {
    scope
        .create(pod(
            "web",
            json!({"activeDeadlineSeconds": 3, "containers": [idle()]}),
        ))
        .await?;
    let web = scope
        .until("web", "has failed", |pod| phase(pod) == "Failed")
        .await?;
    ensure!(
        reason(&web) == "DeadlineExceeded",
        "{} {}",
        reason(&web),
        message(&web)
    );
    nothing_runs(scope, &web).await
}
