//! VirtualNodes: nodes of other tenants, served by two replicas of one program.
//!
//! Each test lets a tenant in as the pool's operator does and applies its VirtualNode
//! with kubectl. Their Nodes are in the lab's one cluster, tainted, so that no other
//! test's pods land there; each test runs alone and takes what it applied away again.

use std::{collections::BTreeMap, io::Read, net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::Lease,
        core::v1::{Node, Pod, Secret},
    },
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use spindrift_local::{
    cell::Cell,
    fleet::{KUBECONFIG_SECRET, POOL_SECRET, REPLICAS},
    topology::VIRTUAL_NODE,
};
use spindrift_tests::{
    Scope,
    kubectl::Kubectl,
    workload::{idle, is_ready, merge, pod, probe_server, uid},
};

use super::super::{
    faults::{each_runs_exactly_once, running},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Alone:
        a_virtual_node_is_applied_used_and_deleted_with_kubectl_alone,
        a_tenant_whose_api_server_hangs_and_one_whose_refuses_slow_nobody_else,
        what_cannot_be_served_is_refused_by_the_name_of_its_field,
        a_replica_killed_in_the_midst_of_twelve_starts_is_replaced_and_each_pod_starts_once,
        a_replica_that_stops_hands_over_at_once,
        an_abandoned_virtual_node_goes_without_its_tenants_api_server,
    ]
}

/// What a VirtualNode takes to become ready, and a dead replica to be replaced.
const LONG: Duration = Duration::from_secs(120);

/// A tenant with a VirtualNode `burst`.
struct Tenant<'a> {
    scope: &'a Scope,
    id: &'static str,
    node: String,
    /// As the pool's operator, in the tenant's namespace of the cell.
    operator: Kubectl,
}

impl<'a> Tenant<'a> {
    async fn admitted(scope: &'a Scope, id: &'static str) -> anyhow::Result<Self> {
        let node = format!("spindrift-{id}");
        ensure!(scope.lab().enroll(id, &node).await?, "the lab has no cell");
        Ok(Self {
            operator: Kubectl::of_cell(scope.lab(), &Cell::namespace(id)),
            scope,
            id,
            node,
        })
    }

    fn manifest(&self, spec: Value) -> Value {
        let usual = json!({
            "nodeName": self.node,
            "kubeconfigSecret": {"name": KUBECONFIG_SECRET},
            "poolSecret": {"name": POOL_SECRET},
            "priorityClassName": "spindrift-standard",
            "taints": [{"key": "tenant", "value": self.id, "effect": "NoSchedule"}],
            "cluster": {"dnsAddress": "10.96.0.10", "podRange": "10.77.0.0/16"},
        });
        json!({
            "apiVersion": "spindrift.dev/v1alpha1",
            "kind": "VirtualNode",
            "metadata": {"name": "burst"},
            "spec": merge(usual, spec),
        })
    }

    /// `kubectl apply`: what it answered if it refused.
    async fn apply(&self, manifest: &Value) -> anyhow::Result<Result<(), String>> {
        let answer = self
            .operator
            .ask_with(&["apply", "-f", "-"], &manifest.to_string())
            .await?;
        Ok(match answer.code {
            Some(0) => Ok(()),
            _ => Err(answer.err),
        })
    }

    async fn applied(&self) -> anyhow::Result<()> {
        let applied = self.apply(&self.manifest(json!({}))).await?;
        applied.map_err(anyhow::Error::msg)
    }

    async fn get(&self, path: &str) -> Result<String, String> {
        let path = format!("-o=jsonpath={path}");
        self.operator
            .run(&["get", "virtualnode", "burst", &path])
            .await
            .map_err(|e| format!("{e:#}"))
    }

    async fn condition(&self, kind: &str) -> Result<(String, String, String), String> {
        let of = |field: &str| format!(r#"{{.status.conditions[?(@.type=="{kind}")].{field}}}"#);
        Ok((
            self.get(&of("status")).await?,
            self.get(&of("reason")).await?,
            self.get(&of("message")).await?,
        ))
    }

    async fn until(&self, kind: &str, status: &str, reason: &str) -> anyhow::Result<String> {
        self.scope
            .wait_within(
                LONG,
                &format!("that {} is {kind}={status} {reason}", self.id),
                async || {
                    let (is, why, message) = self.condition(kind).await?;
                    if is == status && (reason.is_empty() || why == reason) {
                        return Ok(message);
                    }
                    Err(format!("{is} {why}: {message}"))
                },
            )
            .await
    }

    /// Ready, with the serving certificate that somebody has to approve.
    async fn ready(&self) -> anyhow::Result<()> {
        self.approved().await?;
        self.until("Ready", "True", "").await.map(drop)
    }

    async fn approved(&self) -> anyhow::Result<()> {
        let user = format!("system:node:{}", self.node);
        let kept: Api<Secret> = Api::namespaced(self.cell()?.cluster().client(), &Cell::namespace(self.id));
        self.scope
            .wait_within(LONG, "that the node's serving certificate is kept", async || {
                let found = kept.get_opt("burst-kubelet").await.map_err(|e| e.to_string())?;
                if found.is_some() {
                    return Ok(());
                }
                let path = format!(r#"-o=jsonpath={{.items[?(@.spec.username=="{user}")].metadata.name}}"#);
                let requests = self.scope.kubectl().run(&["get", "csr", &path]).await;
                for request in requests.map_err(|e| format!("{e:#}"))?.split_whitespace() {
                    let approve = self
                        .scope
                        .kubectl()
                        .run(&["certificate", "approve", request])
                        .await;
                    approve.map_err(|e| format!("{e:#}"))?;
                }
                Err("it is not".to_owned())
            })
            .await
    }

    /// A pod bound to this node.
    fn pod(&self, name: &str, container: Value) -> Value {
        pod(
            name,
            json!({
                "nodeName": self.node,
                "tolerations": [{"key": "tenant", "operator": "Exists"}],
                "containers": [container],
            }),
        )
    }

    fn cell(&self) -> anyhow::Result<&Cell> {
        self.scope.lab().cell().context("the lab has no cell")
    }

    async fn lease(&self) -> Result<(String, i32), String> {
        let cell = self.cell().map_err(|e| format!("{e:#}"))?;
        let leases: Api<Lease> = Api::namespaced(cell.cluster().client(), &Cell::namespace(self.id));
        let lease = leases
            .get("virtual-node-burst")
            .await
            .map_err(|e| e.to_string())?;
        let spec = lease.spec.unwrap_or_default();
        Ok((
            spec.holder_identity.unwrap_or_default(),
            spec.lease_transitions.unwrap_or_default(),
        ))
    }

    /// The component that has it, and its epoch.
    async fn holder(&self) -> anyhow::Result<(&'static str, i32)> {
        let (holder, epoch) = self.lease().await.map_err(anyhow::Error::msg)?;
        let component = REPLICAS.into_iter().find(|name| holder.starts_with(name));
        Ok((
            component.with_context(|| format!("{holder:?} is no replica"))?,
            epoch,
        ))
    }

    async fn claims(&self) -> anyhow::Result<usize> {
        let claims: Api<Pod> = Api::namespaced(self.cell()?.cluster().client(), &Cell::namespace(self.id));
        Ok(claims.list(&ListParams::default()).await?.items.len())
    }

    /// `kubectl delete`, to its end.
    async fn delete(&self) -> anyhow::Result<()> {
        self.operator
            .run(&[
                "delete",
                "virtualnode",
                "burst",
                "--ignore-not-found",
                "--timeout=80s",
            ])
            .await
            .map(drop)
    }

    /// Whatever a test did, nothing of it is left for the next.
    async fn clear(&self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let deleted = self.delete().await;
        if deleted.is_err() {
            let abandon = ["annotate", "virtualnode", "burst", "spindrift.dev/abandon=true"];
            self.operator.ask(&abandon).await?;
            self.delete().await.ok();
            let nodes: Api<Node> = Api::all(self.scope.client());
            nodes.delete(&self.node, &DeleteParams::default()).await.ok();
        }
        result.and(deleted)
    }
}

async fn a_virtual_node_is_applied_used_and_deleted_with_kubectl_alone(scope: &Scope) -> anyhow::Result<()> {
    let tenant = Tenant::admitted(scope, "acme").await?;
    let used = async {
        tenant.applied().await?;
        tenant.ready().await?;
        let columns = tenant.operator.run(&["get", "virtualnodes"]).await?;
        ensure!(
            columns.contains("spindrift-acme") && columns.contains("NodeReady"),
            "{columns}"
        );
        let talks = json!({
            "name": "main", "image": spindrift_tests::program::PROBE.reference,
            "command": ["sh", "-c", "echo here I am; trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"],
        });
        let pod = scope.start(tenant.pod("web", talks)).await?;
        // By way of whichever replica the connection comes to, several times.
        for _ in 0..8 {
            let log = scope.kubectl().run(&["logs", "web"]).await?;
            ensure!(log.contains("here I am"), "{log:?}");
        }
        let said = scope.kubectl().exec_ok("web", &["echo", "hello"]).await?;
        ensure!(said.trim() == "hello", "{said:?}");
        ensure!(tenant.claims().await? == 1, "the pod has no claim of its tenant's");
        anyhow::Ok(pod)
    }
    .await;
    // With a pod on it still: it is drained.
    let deleted = tenant
        .clear(used.as_ref().map(drop).map_err(|e| anyhow::anyhow!("{e:#}")))
        .await;
    deleted?;
    let nodes: Api<Node> = Api::all(scope.client());
    ensure!(
        nodes.get_opt(&tenant.node).await?.is_none(),
        "the Node is still there"
    );
    ensure!(
        scope.api::<Pod>().get_opt("web").await?.is_none(),
        "the pod is still there"
    );
    ensure!(tenant.claims().await? == 0, "claims are still there");
    let slots: Api<Lease> = Api::namespaced(tenant.cell()?.cluster().client(), "spindrift-system");
    let slots = slots
        .list(&ListParams::default().labels("spindrift.dev/lease=slot"))
        .await?;
    let own = |slot: &&Lease| {
        let holder = slot.spec.as_ref().and_then(|s| s.holder_identity.as_deref());
        holder.is_some_and(|holder| holder.starts_with("tenant-acme/"))
    };
    let left: Vec<&Lease> = slots.items.iter().filter(own).collect();
    ensure!(left.is_empty(), "its ports are still taken: {left:#?}");
    Ok(())
}

/// A server that accepts and never says a word, inside the lab, until dropped.
fn silence(scope: &Scope) -> anyhow::Result<(SocketAddr, std::thread::JoinHandle<()>)> {
    let lab = &scope.lab().topology().lab;
    let listener = lab.enter(|| std::net::TcpListener::bind((VIRTUAL_NODE, 0)))?;
    let address = listener.local_addr()?;
    let thread = std::thread::spawn(move || {
        let mut held = vec![];
        for socket in listener.incoming().flatten() {
            let mut first = [0; 4];
            // The test's own word to end it.
            let mut socket = socket;
            if socket.read_exact(&mut first).is_ok() && &first == b"stop" {
                return;
            }
            held.push(socket);
        }
    });
    Ok((address, thread))
}

/// Sets a tenant's kubeconfig: `change` is made to its text.
async fn change_kubeconfig(tenant: &Tenant<'_>, change: impl Fn(&str) -> String) -> anyhow::Result<()> {
    let secrets: Api<Secret> =
        Api::namespaced(tenant.cell()?.cluster().client(), &Cell::namespace(tenant.id));
    let secret = secrets.get(KUBECONFIG_SECRET).await?;
    let data = secret.data.unwrap_or_default();
    let text = data
        .get("kubeconfig")
        .map(|b| String::from_utf8_lossy(&b.0).into_owned());
    let changed = ByteString(change(&text.unwrap_or_default()).into_bytes());
    let patch = Patch::Merge(json!({"data": {"kubeconfig": changed}}));
    secrets
        .patch(KUBECONFIG_SECRET, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

fn with_server(text: &str, server: &str) -> String {
    let lines = text
        .lines()
        .map(|line| match line.trim_start().starts_with("server:") {
            true => format!("    server: {server}\n"),
            false => format!("{line}\n"),
        });
    lines.collect()
}

async fn a_tenant_whose_api_server_hangs_and_one_whose_refuses_slow_nobody_else(
    scope: &Scope,
) -> anyhow::Result<()> {
    let good = Tenant::admitted(scope, "acme").await?;
    let hangs = Tenant::admitted(scope, "hangs").await?;
    let refuses = Tenant::admitted(scope, "refuses").await?;
    let (silent, thread) = silence(scope)?;
    let tried = async {
        change_kubeconfig(&hangs, |text| with_server(text, &format!("https://{silent}"))).await?;
        // Nobody listens there.
        change_kubeconfig(&refuses, |text| {
            with_server(text, &format!("https://{VIRTUAL_NODE}:9"))
        })
        .await?;
        for tenant in [&hangs, &refuses, &good] {
            tenant.applied().await?;
        }
        hangs.until("Ready", "False", "TenantSilent").await?;
        refuses.until("Ready", "False", "TenantSilent").await?;
        good.ready().await?;
        // As quickly as on the lab's own node, which one process has to itself.
        let took = async |tenant: Option<&Tenant<'_>>, name: &str| {
            let manifest = match tenant {
                Some(tenant) => tenant.pod(name, idle()),
                None => pod(
                    name,
                    json!({"nodeName": scope.node_name(), "containers": [idle()]}),
                ),
            };
            let began = std::time::Instant::now();
            scope.start(manifest).await?;
            anyhow::Ok(began.elapsed())
        };
        let mut times = vec![];
        for n in 0..5 {
            let alone = took(None, &format!("alone-{n}")).await?;
            let beside = took(Some(&good), &format!("beside-{n}")).await?;
            times.push((alone, beside));
        }
        let best = |of: fn(&(Duration, Duration)) -> Duration| times.iter().map(of).min();
        let (alone, beside) = (best(|t| t.0), best(|t| t.1));
        ensure!(
            beside < alone.map(|alone| alone * 2 + Duration::from_secs(1)),
            "a pod starts in {beside:?} beside such tenants, and in {alone:?} without: {times:?}"
        );
        // They are told of, and nothing of them ended.
        hangs.until("Ready", "False", "TenantSilent").await?;
        anyhow::Ok(())
    }
    .await;
    // A word to the silent one, whose requests end then.
    let stop = scope.lab().topology().lab.enter(move || {
        let mut socket = std::net::TcpStream::connect(silent)?;
        std::io::Write::write_all(&mut socket, b"stop")
    });
    stop?;
    drop(thread);
    let tried = good.clear(tried).await;
    let tried = hangs.clear(tried).await;
    refuses.clear(tried).await
}

async fn what_cannot_be_served_is_refused_by_the_name_of_its_field(scope: &Scope) -> anyhow::Result<()> {
    let tenant = Tenant::admitted(scope, "acme").await?;
    // By the cell's API server, at once.
    let cluster = |with: Value| {
        let usual = json!({"dnsAddress": "10.96.0.10", "podRange": "10.77.0.0/16"});
        json!({"cluster": merge(usual, with)})
    };
    for (spec, field) in [
        (json!({"nodeName": "Acme"}), "spec.nodeName"),
        (json!({"zone": "z 1"}), "spec.zone"),
        (json!({"address": "somewhere"}), "spec.address"),
        (
            cluster(json!({"podRange": "10.77.0.1/16"})),
            "spec.cluster.podRange",
        ),
        (cluster(json!({"dnsAddress": "dns"})), "spec.cluster.dnsAddress"),
        (
            cluster(json!({"upstreamNameservers": ["x"]})),
            "spec.cluster.upstreamNameservers",
        ),
        (json!({"mesh": {"source": "Istiod"}}), "spec.mesh.source"),
        (
            json!({"taints": [{"key": "k", "effect": "Never"}]}),
            "spec.taints[0].effect",
        ),
        (
            json!({"kubeconfigSecret": {"name": ""}}),
            "spec.kubeconfigSecret.name",
        ),
    ] {
        let refused = tenant.apply(&tenant.manifest(spec.clone())).await?;
        let said = refused.err().with_context(|| format!("{spec} was taken"))?;
        ensure!(said.contains(field), "{spec}: {said}");
    }
    // By the replica that has it, in its status.
    let tried = async {
        let secret = json!({"poolSecret": {"name": "elsewhere"}});
        tenant
            .apply(&tenant.manifest(secret))
            .await?
            .map_err(anyhow::Error::msg)?;
        let said = tenant.until("Accepted", "False", "SecretMissing").await?;
        ensure!(said.contains("spec.poolSecret.name"), "{said}");

        change_kubeconfig(&tenant, |text| {
            let (before, _) = text.split_once("    client-certificate-data").unwrap_or((text, ""));
            let after = text.split_once("contexts:").map_or("", |(_, after)| after);
            format!(
                "{before}    exec: {{command: touch, args: [/tmp/owned], apiVersion: client.authentication.k8s.io/v1}}\ncontexts:{after}"
            )
        })
        .await?;
        tenant.applied().await?;
        let said = tenant.until("Accepted", "False", "InvalidKubeconfig").await?;
        ensure!(said.contains("kubeconfig.users[0].user.exec"), "{said}");

        let mut renamed = tenant.manifest(json!({"nodeName": "another"}));
        let said = tenant.apply(&renamed).await?.err().context("a node was renamed")?;
        ensure!(said.contains("spec.nodeName"), "{said}");
        renamed["metadata"]["name"] = "second".into();
        tenant.apply(&renamed).await?.map_err(anyhow::Error::msg)?;
        let reason = r#"-o=jsonpath={.status.conditions[?(@.type=="Accepted")].reason}"#;
        let second = scope
            .wait_within(LONG, "that a second one of the tenant is refused", async || {
                let get = ["get", "virtualnode", "second", reason];
                match tenant.operator.run(&get).await {
                    Ok(why) if why == "TenantHasNode" => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
        tenant.operator.run(&["delete", "virtualnode", "second", "--timeout=60s"]).await?;
        second
    }
    .await;
    tenant.clear(tried).await
}

/// Twelve pods of the tenant's node, by name.
async fn twelve(tenant: &Tenant<'_>) -> anyhow::Result<BTreeMap<String, String>> {
    let creations = (0..12).map(|n| {
        let manifest = tenant.pod(&format!("web-{n}"), probe_server());
        tenant.scope.create(manifest)
    });
    let made = try_join_all(creations).await?;
    Ok(made
        .iter()
        .map(|pod| (pod.name_any(), pod.uid().unwrap_or_default()))
        .collect())
}

/// Another replica has it, in a later epoch; how long that took.
async fn replaced(tenant: &Tenant<'_>, before: (&str, i32)) -> anyhow::Result<Duration> {
    let began = std::time::Instant::now();
    tenant
        .scope
        .wait_within(LONG, "that another replica has the virtual node", async || {
            let (holder, epoch) = tenant.lease().await?;
            if !holder.is_empty() && !holder.starts_with(before.0) && epoch > before.1 {
                return Ok(());
            }
            Err(format!("{holder} has it, in epoch {epoch}"))
        })
        .await?;
    Ok(began.elapsed())
}

async fn a_replica_killed_in_the_midst_of_twelve_starts_is_replaced_and_each_pod_starts_once(
    scope: &Scope,
) -> anyhow::Result<()> {
    let tenant = Tenant::admitted(scope, "acme").await?;
    let tried = async {
        tenant.applied().await?;
        tenant.ready().await?;
        let before = tenant.holder().await?;
        let made = twelve(&tenant).await?;
        running(scope, 3).await?;
        scope.lab().kill(before.0).await?;
        let took = replaced(&tenant, before).await?;
        eprintln!(
            "        a killed replica was replaced in {:.1} s",
            took.as_secs_f64()
        );
        each_runs_exactly_once(scope, &made, 0).await?;
        scope.lab().start(before.0).await?;
        anyhow::Ok(())
    }
    .await;
    tenant.clear(tried).await
}

async fn a_replica_that_stops_hands_over_at_once(scope: &Scope) -> anyhow::Result<()> {
    let tenant = Tenant::admitted(scope, "acme").await?;
    let tried = async {
        tenant.applied().await?;
        tenant.ready().await?;
        let stays = scope.start(tenant.pod("stays", idle())).await?;
        let before = tenant.holder().await?;
        let component = scope.lab().component(before.0)?;
        component
            .stop(scope.lab().layout(), Duration::from_secs(20))
            .await?;
        let took = replaced(&tenant, before).await?;
        // A lease that had to end would have taken fifteen.
        ensure!(took < Duration::from_secs(10), "it took {took:?}");
        eprintln!(
            "        a stopped replica was replaced in {:.1} s",
            took.as_secs_f64()
        );
        // The next one starts pods and is asked for logs, and the old one is untouched.
        scope.start(tenant.pod("next", idle())).await?;
        let said = scope.kubectl().exec_ok("stays", &["echo", "hello"]).await?;
        ensure!(said.trim() == "hello", "{said:?}");
        let still = scope.until("stays", "is Ready", is_ready).await?;
        ensure!(uid(&still) == uid(&stays), "it was made anew");
        scope.lab().start(before.0).await?;
        anyhow::Ok(())
    }
    .await;
    tenant.clear(tried).await
}

async fn an_abandoned_virtual_node_goes_without_its_tenants_api_server(scope: &Scope) -> anyhow::Result<()> {
    let tenant = Tenant::admitted(scope, "acme").await?;
    let tried = async {
        tenant.applied().await?;
        tenant.ready().await?;
        scope.start(tenant.pod("left", idle())).await?;
        // Its cluster is gone for ever, as far as the replicas can tell.
        change_kubeconfig(&tenant, |text| {
            with_server(text, &format!("https://{VIRTUAL_NODE}:9"))
        })
        .await?;
        tenant.until("Ready", "False", "TenantSilent").await?;
        let delete = ["delete", "virtualnode", "burst", "--wait=false"];
        tenant.operator.run(&delete).await?;
        let said = tenant.until("Ready", "False", "TenantUnreachable").await?;
        ensure!(said.contains("spindrift.dev/abandon"), "{said}");
        let abandon = ["annotate", "virtualnode", "burst", "spindrift.dev/abandon=true"];
        tenant.operator.run(&abandon).await?;
        tenant.delete().await?;
        ensure!(tenant.claims().await? == 0, "claims are still there");
        anyhow::Ok(())
    }
    .await;
    // What a tenant's own operator does with what is left.
    let nodes: Api<Node> = Api::all(scope.client());
    nodes.delete(&tenant.node, &DeleteParams::default()).await.ok();
    scope
        .api::<Pod>()
        .delete("left", &DeleteParams::default().grace_period(0))
        .await
        .ok();
    tenant.clear(tried).await
}
