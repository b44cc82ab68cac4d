//! One virtual node that this replica has: what it needs is read, its parts are started
//! ([`Assembly`]), watched over, and changed with what describes them; its status is
//! told; when it is deleted it is taken out of its tenant's cluster.
//!
//! One task. It ends when its tenure does, at once, or when the object is gone.
//!
//! ```text
//!  VirtualNode ─▶ Terms ─▶ Secrets ─▶ Credentials ─▶ Assembly ⟲ started again after a pause
//!                   └── refused: Accepted=False, and looked at again when it changes
//! ```
//!
//! What always holds: what one tenant's API server does (hang, refuse, lie) is waited
//! for here and nowhere else; a part that panics or fails ends this node's parts only.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Secret};
use kube::{
    Api, Client, Error,
    api::{Patch, PatchParams},
    config::{Config as ClientConfig, KubeConfigOptions},
};
use pool_agent_api::{Epoch, tenant::MeshControl};
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinHandle},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Settings,
    conditions::{self, Standing, Told},
    doors::{Route, WAITING},
    kept::Kept,
    removal,
    resource::{FINALIZER, Key, Ports, VirtualNode},
    slots,
    terms::{Credentials, Refusal, Terms},
};
use crate::{
    api_server::{self, answered},
    assembly::{Assembly, Hosts, KubeletSetup, MeshSetup, Setup},
    incoming::Incoming,
    kubelet::Certificate,
};

/// Between attempts of what failed: doubles.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);
/// A node that ran for so long has proved itself: its next failure is a first one.
const PROVEN: Duration = Duration::from_secs(120);
/// How often Secrets are looked at for a change, and what was refused is looked at.
const LOOK: Duration = Duration::from_secs(60);
/// For the hosts to let claims go. Then it is begun anew, with the node served again.
const RELEASE: Duration = Duration::from_secs(300);
/// For the parts to end, once they are told.
const ENDING: Duration = Duration::from_secs(5);

/// What a keeper is given.
pub(super) struct Keeper {
    pub(super) settings: Arc<Settings>,
    /// Of the cell.
    pub(super) cell: Client,
    pub(super) key: Key,
    /// The object as last seen; None once it is gone.
    pub(super) object: watch::Receiver<Option<Arc<VirtualNode>>>,
    pub(super) epoch: i64,
    /// Where connections of this node go.
    pub(super) route: watch::Sender<Route>,
    pub(super) census: watch::Receiver<Arc<Census>>,
    /// What this node counts, for as long as it runs.
    pub(super) registry: watch::Sender<Option<Arc<Registry>>>,
}

/// What is known of all virtual nodes together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Census {
    /// Kubelet ports that are somebody's.
    pub(super) ports: BTreeSet<u16>,
    /// Of each namespace, the name of the oldest.
    pub(super) first: BTreeMap<String, String>,
}

/// Why it does not run.
#[derive(Debug)]
enum Failed {
    /// The resource or its Secrets have to change.
    Refused(Refusal),
    /// It may do later.
    Later(Standing),
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Failed {
    fn cell(error: &dyn std::error::Error) -> Self {
        Self::Later(Standing::not("CellUnavailable", full(error)))
    }
}

/// What is read before the parts start, and tells a change.
struct Read {
    terms: Terms,
    credentials: Credentials,
    versions: [Option<String>; 2],
}

/// How the parts of a node ended, all of them.
type Ended = Result<anyhow::Result<()>, JoinError>;

/// A node that runs.
struct Running {
    terms: Terms,
    client: Client,
    generation: Option<i64>,
    versions: [Option<String>; 2],
    since: Instant,
    node: watch::Receiver<Option<Arc<Node>>>,
    stop: CancellationToken,
    ended: JoinHandle<anyhow::Result<()>>,
    serving: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.ended.abort();
        self.serving.abort();
    }
}

impl Keeper {
    /// Until the object is gone or the task is aborted, which ends the node's parts at
    /// once.
    pub(super) async fn run(mut self) {
        let mut pause = RETRY_FIRST;
        loop {
            let Some(object) = self.object.borrow_and_update().clone() else {
                return;
            };
            let began = Instant::now();
            let failed = match self.round(&object).await {
                Ok(Next::Gone) => return,
                Ok(Next::Again) => {
                    pause = RETRY_FIRST;
                    continue;
                }
                Err(failed) => failed,
            };
            self.route.send_replace(Route::Nobody);
            let wait = match failed {
                Failed::Refused(refusal) => {
                    info!(
                        reason = refusal.reason,
                        message = refusal.message,
                        "virtual node not accepted"
                    );
                    let standing = Standing::not("NotAccepted", refusal.message.clone());
                    self.tell(&object, Err(refusal), standing, None).await;
                    LOOK
                }
                Failed::Later(standing) => {
                    warn!(
                        reason = standing.reason,
                        message = standing.message,
                        "virtual node does not run"
                    );
                    self.tell(&object, Ok(()), standing, None).await;
                    if began.elapsed() >= PROVEN {
                        pause = RETRY_FIRST;
                    }
                    let wait = pause;
                    pause = (pause * 2).min(RETRY_MOST);
                    wait
                }
            };
            self.changed_or(&object, wait).await;
        }
    }

    /// Waits for another generation, a deletion or an annotation, at most for `wait`.
    async fn changed_or(&mut self, old: &VirtualNode, wait: Duration) {
        let other = |new: &Option<Arc<VirtualNode>>| {
            new.as_ref().is_none_or(|new| {
                new.metadata.generation != old.metadata.generation
                    || new.metadata.annotations != old.metadata.annotations
                    || new.is_going() != old.is_going()
            })
        };
        let _elapsed = tokio::time::timeout(wait, self.object.wait_for(other))
            .await
            .is_err();
    }

    async fn round(&mut self, object: &Arc<VirtualNode>) -> Result<Next, Failed> {
        if object.is_going() {
            if !object.is_held() {
                // Others hold it still.
                return Ok(Next::Gone);
            }
            // One that never was a Node leaves nothing in the tenant's cluster.
            let registered = object.status.as_ref().is_some_and(|s| s.node_uid.is_some());
            if object.is_abandoned() || !registered {
                self.abandon(object).await?;
                return Ok(Next::Gone);
            }
        } else {
            self.hold(object).await?;
        }
        let read = self.read(object).await?;
        let running = self.start(object, read).await?;
        self.watch_over(running).await
    }

    /// The object stays until we let it go.
    async fn hold(&self, object: &VirtualNode) -> Result<(), Failed> {
        let mut finalizers = object.metadata.finalizers.clone().unwrap_or_default();
        if finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(());
        }
        finalizers.push(FINALIZER.to_owned());
        self.set_finalizers(object, finalizers).await
    }

    async fn let_go(&self, object: &VirtualNode) -> Result<(), Failed> {
        let mut finalizers = object.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|f| f != FINALIZER);
        self.set_finalizers(object, finalizers).await
    }

    async fn set_finalizers(&self, object: &VirtualNode, finalizers: Vec<String>) -> Result<(), Failed> {
        let patch = Patch::Merge(json!({"metadata": {
            "finalizers": finalizers,
            "uid": object.metadata.uid,
            "resourceVersion": object.metadata.resource_version,
        }}));
        let api = Api::<VirtualNode>::namespaced(self.cell.clone(), &self.key.namespace);
        match answered(api.patch(&self.key.name, &PatchParams::default(), &patch)).await {
            Err(Error::Api(refused)) if refused.code == 404 => Ok(()),
            patched => patched.map(drop).map_err(|e| Failed::cell(&e)),
        }
    }

    async fn read(&self, object: &VirtualNode) -> Result<Read, Failed> {
        let terms = Terms::parse(object)?;
        // A host has one mesh for a tenant, and so one place where it is told of it.
        let census = self.census.borrow().clone();
        if let Some(first) = census
            .first
            .get(&self.key.namespace)
            .filter(|first| **first != self.key.name)
        {
            return Err(Failed::Refused(Refusal {
                reason: "TenantHasNode",
                message: format!("{first} is the tenant's virtual node; a second is not served yet"),
            }));
        }
        let (kubeconfig, kubeconfig_version) =
            self.secret("kubeconfigSecret", &terms.kubeconfig_secret).await?;
        let (pool, pool_version) = self.secret("poolSecret", &terms.pool_secret).await?;
        Ok(Read {
            credentials: Credentials::parse(&terms, &self.settings.trust_domain, &kubeconfig, &pool)?,
            terms,
            versions: [kubeconfig_version, pool_version],
        })
    }

    async fn secret(&self, field: &str, name: &str) -> Result<(Secret, Option<String>), Failed> {
        let api = Api::<Secret>::namespaced(self.cell.clone(), &self.key.namespace);
        match answered(api.get_opt(name)).await {
            Ok(Some(secret)) => {
                let version = secret.metadata.resource_version.clone();
                Ok((secret, version))
            }
            Ok(None) => Err(Failed::Refused(Refusal {
                reason: "SecretMissing",
                message: format!(
                    "spec.{field}.name: there is no Secret {name} in {}",
                    self.key.namespace
                ),
            })),
            Err(error) => Err(Failed::cell(&error)),
        }
    }

    async fn ports(&self, object: &VirtualNode) -> Result<Ports, Failed> {
        if let Some(ports) = object.ports().filter(|ports| self.settings.ports.has(*ports)) {
            return Ok(ports);
        }
        let census = self.census.borrow().clone();
        let Settings { namespace, ports, .. } = &*self.settings;
        slots::take(
            self.cell.clone(),
            namespace,
            ports,
            &self.key,
            object,
            &census.ports,
        )
        .await
        .map_err(|error| Failed::Later(Standing::not("NoPorts", full(&error))))
    }

    async fn start(&self, object: &Arc<VirtualNode>, read: Read) -> Result<Running, Failed> {
        let Read {
            terms,
            credentials,
            versions,
        } = read;
        let ports = self.ports(object).await?;
        // On record before anything is told of them.
        let starting = Standing::not("Starting", "the node is being started");
        self.tell(object, Ok(()), starting, Some(ports)).await;
        let settings =
            ClientConfig::from_custom_kubeconfig(credentials.kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| Refusal {
                    reason: "InvalidKubeconfig",
                    message: format!("Secret {}: kubeconfig: {}", terms.kubeconfig_secret, full(&error)),
                })?;
        let client = api_server::tenants_client(settings).map_err(|error| Refusal {
            reason: "InvalidKubeconfig",
            message: format!("Secret {}: kubeconfig: {}", terms.kubeconfig_secret, full(&error)),
        })?;
        let kept = || Kept::new(self.cell.clone(), &self.key, object);
        let authority = kept()
            .authority()
            .await
            .map_err(|error| Failed::Later(Standing::not("NoMeshAuthority", full(&error))))?;
        let address = terms.address.unwrap_or(self.settings.address);
        let (told, certificate) = watch::channel(None);
        let serving = kept().serving(client.clone(), terms.node_name.clone(), address, told);
        let (kubelet, kubelet_arrivals) = mpsc::channel(WAITING);
        let (mesh, mesh_arrivals) = mpsc::channel(WAITING);
        // Its Lease counts from minutes, and a process that a file described, which may
        // have had the node before, in milliseconds.
        let epoch = u64::try_from(self.epoch).ok();
        let epoch = epoch
            .and_then(|minutes| minutes.checked_mul(60_000))
            .and_then(|epoch| Epoch::parse("epoch", epoch).ok())
            .ok_or_else(|| Failed::Later(Standing::not("NoEpoch", "the node's lease counts no holder")))?;
        let setup = Setup {
            node_name: terms.node_name.clone(),
            tenant: terms.tenant.clone(),
            epoch,
            address,
            node: terms.node.clone(),
            client: client.clone(),
            cluster: terms.cluster.clone(),
            kubelet: KubeletSetup {
                port: ports.kubelet,
                incoming: Incoming::Handed(kubelet_arrivals),
                clients: credentials.clients,
                certificate: Certificate::Given(certificate),
            },
            mesh: MeshSetup {
                control: MeshControl {
                    // Hosts reach the replicas at the common address, whatever the
                    // tenant's API server calls the node.
                    address: std::net::SocketAddr::new(self.settings.address, ports.mesh).to_string(),
                    trust_domain: terms.trust_domain.clone(),
                    cluster_id: terms.cluster_id.clone(),
                    network: terms.network.clone(),
                },
                incoming: Incoming::Handed(mesh_arrivals),
                authority,
            },
            pool_tls: credentials.pool_tls,
            hosts: Hosts::Claimed {
                client: self.cell.clone(),
                settings: terms.claims.clone(),
            },
        };
        let stop = CancellationToken::new();
        let mut registry = Registry::with_labels(
            [
                ("tenant".into(), terms.tenant.to_string().into()),
                ("node".into(), terms.node_name.clone().into()),
            ]
            .into_iter(),
        );
        let assembly = Assembly::start(setup, &mut registry, &stop);
        self.registry.send_replace(Some(Arc::new(registry)));
        self.route.send_replace(Route::Here { kubelet, mesh });
        let node = assembly.node();
        let until = stop.clone();
        info!(node = terms.node_name, tenant = %terms.tenant, epoch = self.epoch, "virtual node started");
        Ok(Running {
            terms,
            client,
            generation: object.metadata.generation,
            versions,
            since: Instant::now(),
            node,
            stop,
            ended: tokio::spawn(async move { assembly.ended(&until).await }),
            serving: tokio::spawn(serving),
        })
    }

    async fn watch_over(&mut self, mut running: Running) -> Result<Next, Failed> {
        let mut look = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
        let mut draining: Option<JoinHandle<Result<(), Error>>> = None;
        let (left, mut pods_left) = watch::channel(0);
        loop {
            let Some(object) = self.object.borrow_and_update().clone() else {
                return Ok(Next::Gone);
            };
            if !object.is_going() && object.metadata.generation != running.generation {
                info!("the virtual node has changed: it is started anew");
                self.end(running).await;
                return Ok(Next::Again);
            }
            if object.is_going() && object.is_abandoned() {
                self.end(running).await;
                return Ok(Next::Again);
            }
            if object.is_going() && draining.is_none() {
                info!(
                    node = running.terms.node_name,
                    "the virtual node is deleted: it is drained"
                );
                let (client, node) = (running.client.clone(), running.terms.node_name.clone());
                let left = left.clone();
                let drain = async move {
                    removal::drain(client, &node, |pods| {
                        left.send_replace(pods);
                    })
                    .await
                };
                draining = Some(tokio::spawn(drain));
            }
            let standing = if object.is_going() {
                let pods = *pods_left.borrow_and_update();
                Standing::not("Draining", format!("{pods} pods of the node have yet to end"))
            } else {
                standing(
                    running.node.borrow_and_update().as_deref(),
                    running.since.elapsed(),
                )
            };
            let uid = running
                .node
                .borrow()
                .as_ref()
                .and_then(|n| n.metadata.uid.clone());
            self.tell_with(&object, Ok(()), standing, None, uid).await;
            tokio::select! {
                changed = self.object.changed() => if changed.is_err() {
                    return Ok(Next::Gone);
                },
                changed = running.node.changed() => if changed.is_err() {
                    return Err(self.broke(&mut running, None).await);
                },
                ended = &mut running.ended => return Err(self.broke(&mut running, Some(ended)).await),
                _ = pods_left.changed() => {}
                drained = async { match &mut draining {
                    Some(draining) => draining.await,
                    None => std::future::pending().await,
                } } => {
                    let drained = drained.map_err(|_| Failed::Later(Standing::not("DrainFailed", "the drain broke")))?;
                    drained.map_err(|error| Failed::Later(self.unreachable(&error)))?;
                    return self.remove(&object, running).await;
                }
                _ = look.tick() => {
                    // What cannot be read or used now leaves what runs alone.
                    if let Ok(read) = self.read(&object).await && read.versions != running.versions {
                        info!("the virtual node's Secrets have changed: it is started anew");
                        self.end(running).await;
                        return Ok(Next::Again);
                    }
                }
            }
        }
    }

    fn unreachable(&self, error: &Error) -> Standing {
        Standing::not(
            "TenantUnreachable",
            format!(
                "the node cannot be taken out of the tenant's cluster: {}. If that is gone for ever: \
                 kubectl annotate virtualnode -n {} {} {}=true",
                full(error),
                self.key.namespace,
                self.key.name,
                super::resource::ABANDON,
            ),
        )
    }

    async fn end(&self, mut running: Running) {
        running.stop.cancel();
        let _late = tokio::time::timeout(ENDING, &mut running.ended).await.is_err();
        self.route.send_replace(Route::Nobody);
        self.registry.send_replace(None);
    }

    /// A part of it has ended; `ended`: all have, and so.
    async fn broke(&self, running: &mut Running, ended: Option<Ended>) -> Failed {
        running.stop.cancel();
        let ended = match ended {
            Some(ended) => Some(ended),
            None => tokio::time::timeout(ENDING, &mut running.ended).await.ok(),
        };
        let why = match ended {
            Some(Ok(Err(error))) => format!("{error:#}"),
            Some(Err(error)) => error.to_string(),
            Some(Ok(Ok(()))) | None => "a part of it has ended".to_owned(),
        };
        self.registry.send_replace(None);
        Failed::Later(Standing::not("NodeFailed", why))
    }

    /// All its pods are gone.
    async fn remove(&self, object: &VirtualNode, running: Running) -> Result<Next, Failed> {
        let (client, name) = (running.client.clone(), running.terms.node_name.clone());
        let namespace = running.terms.claims.namespace.to_string();
        let uid = running
            .node
            .borrow()
            .as_ref()
            .and_then(|n| n.metadata.uid.clone());
        let uid = uid.or_else(|| object.status.as_ref()?.node_uid.clone());
        // It would register itself again.
        self.end(running).await;
        if let Some(uid) = uid {
            removal::unregister(client, &name, &uid)
                .await
                .map_err(|error| Failed::Later(self.unreachable(&error)))?;
        }
        self.release(object, &namespace, &name).await?;
        info!(node = name, "the virtual node is gone");
        Ok(Next::Gone)
    }

    /// Without the tenant.
    async fn abandon(&self, object: &VirtualNode) -> Result<(), Failed> {
        let namespace = self.key.namespace.clone();
        self.release(object, &namespace, &object.spec.node_name).await?;
        info!(
            node = object.spec.node_name,
            "the virtual node is gone; its tenant's cluster was not asked"
        );
        Ok(())
    }

    async fn release(&self, object: &VirtualNode, namespace: &str, node: &str) -> Result<(), Failed> {
        // One that never was a Node made no claims, and its name may be another's.
        if object.status.as_ref().is_some_and(|s| s.node_uid.is_some()) {
            let began = Instant::now();
            loop {
                let left = removal::release_claims(self.cell.clone(), namespace, node)
                    .await
                    .map_err(|e| Failed::cell(&e))?;
                if left == 0 {
                    break;
                }
                let standing = Standing::not(
                    "ReleasingClaims",
                    format!("{left} claims of the node are still there; their hosts end them"),
                );
                if began.elapsed() >= RELEASE {
                    return Err(Failed::Later(standing));
                }
                self.tell(object, Ok(()), standing, None).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        if let Some(ports) = object.ports() {
            let Settings {
                namespace,
                ports: range,
                ..
            } = &*self.settings;
            slots::give(self.cell.clone(), namespace, range, ports)
                .await
                .map_err(|e| Failed::cell(&e))?;
        }
        // As it is now: its status has been written since.
        let latest = self.object.borrow().clone();
        self.let_go(latest.as_deref().unwrap_or(object)).await
    }

    // ---- telling

    async fn tell(
        &self,
        object: &VirtualNode,
        accepted: Result<(), Refusal>,
        standing: Standing,
        ports: Option<Ports>,
    ) {
        self.tell_with(object, accepted, standing, ports, None).await;
    }

    /// With the Node's UID: a deletion has to know that there was one.
    async fn tell_with(
        &self,
        object: &VirtualNode,
        accepted: Result<(), Refusal>,
        standing: Standing,
        ports: Option<Ports>,
        node_uid: Option<String>,
    ) {
        // The newest that was seen: what is patched is what differs from it.
        let newest = self.object.borrow().clone();
        let object = newest.as_deref().unwrap_or(object);
        let told = Told {
            holder: self.settings.replica.clone(),
            epoch: self.epoch,
            accepted,
            standing,
            ports,
            node_uid,
        };
        if let Some(patch) = conditions::patch(object, &told, Timestamp::now()) {
            self.patch_status(&Patch::Merge(patch)).await;
        }
    }

    async fn patch_status(&self, patch: &Patch<serde_json::Value>) {
        let api = Api::<VirtualNode>::namespaced(self.cell.clone(), &self.key.namespace);
        let written = answered(api.patch_status(&self.key.name, &PatchParams::default(), patch)).await;
        if let Err(error) = written {
            // The object may be gone; else the next change writes it.
            tracing::debug!(%error, "the status of a virtual node was not written");
        }
    }
}

enum Next {
    /// Begin anew with what is described now.
    Again,
    Gone,
}

/// How the Node stands. `since`: for how long its parts have run.
fn standing(node: Option<&Node>, since: Duration) -> Standing {
    let Some(node) = node else {
        let message = format!(
            "the tenant's API server has not been heard yet, in {} s",
            // In steps, so that a status that is told is not another each time.
            since.as_secs() / 30 * 30
        );
        return Standing::not("TenantSilent", message);
    };
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref());
    let ready = conditions.into_iter().flatten().find(|c| c.type_ == "Ready");
    match ready {
        Some(condition) if condition.status == "True" => Standing::ready(),
        Some(condition) => Standing::not(
            "NodeNotReady",
            condition
                .message
                .clone()
                .unwrap_or_else(|| "the node is not ready".into()),
        ),
        None => Standing::not("NodeNotReady", "the node is not ready yet"),
    }
}

/// An error with its causes.
pub(super) fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}
