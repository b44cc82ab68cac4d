//! The mesh between pods: who reaches whom, as whom, and what of it is seen on
//! the wire between the hosts.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use serde_json::{Value, json};
use spindrift_local::{Lab, netns::Namespace, pool::AGENT_METRICS, tool::Tool, topology};
use spindrift_tests::{
    Scope,
    capture::{Capture, Packets},
    containers,
    journal::Mark,
    stranger,
    workload::{
        PORT, address, deployment, idle, is_ready, merge, netexec, pod, probe_server, service,
        service_account, uid,
    },
};

use super::{
    resolver::Resolver,
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        a_client_reaches_a_replica_on_the_other_host_through_the_service,
        both_ends_see_the_addresses_that_they_know,
        a_captured_connection_has_the_original_destination_as_its_own_address,
        the_far_host_logs_the_identity_that_it_verified,
        a_peer_on_the_same_host_is_verified_too,
        a_pod_reaches_itself_through_its_service,
        a_service_spreads_connections_over_its_replicas,
        many_bytes_arrive_whole_and_a_half_closed_connection_goes_on,
        a_port_nobody_listens_on_is_an_error_at_once,
        a_pod_that_opted_out_speaks_plaintext,
        a_pod_that_opted_out_and_one_in_the_mesh_reach_each_other,
        cluster_names_are_resolved_as_kubernetes_says,
        names_outside_the_cluster_are_asked_of_the_upstream,
        a_pod_reads_the_api_server_with_its_own_token,
        a_pod_cannot_reach_its_host_through_the_proxy,
    ];
    // What is captured, or sent to the wire's other end, is everybody's.
    all.extend(cases![Alone:
        nothing_but_tls_on_the_tunnels_port_passes_between_the_hosts,
        a_pod_that_clears_its_routes_stays_in_the_mesh,
        a_pod_cannot_speak_from_another_pods_address,
        raw_frames_of_a_pod_neither_leave_the_mesh_nor_take_an_identity,
    ]);
    all
}

/// A server on each host and a client, each with an account of its own.
pub(crate) struct Pair {
    pub(crate) client: Pod,
    /// On the client's host.
    pub(crate) near: Pod,
    /// On another.
    pub(crate) far: Pod,
    pub(crate) near_host: String,
    pub(crate) far_host: String,
    /// Of the Service whose one endpoint is `far`.
    pub(crate) far_service: SocketAddrV4,
}

impl Pair {
    pub(crate) async fn start(scope: &Scope) -> anyhow::Result<Self> {
        Self::start_with(scope, json!({}), json!({})).await
    }

    /// `client` goes into the client's container, `labels` onto every pod.
    pub(crate) async fn start_with(scope: &Scope, client: Value, labels: Value) -> anyhow::Result<Self> {
        for account in ["web", "client"] {
            scope.create(service_account(account)).await?;
        }
        let mut own = pod(
            "client",
            json!({"serviceAccountName": "client", "containers": [merge(idle(), client)]}),
        );
        own["metadata"]["labels"] = merge(own["metadata"]["labels"].clone(), labels.clone());
        let client = scope.start(own).await?;
        let near_host = scope.host_of(&client)?;
        let spec = json!({"serviceAccountName": "web", "containers": [probe_server()]});
        let servers = on_both_hosts(scope, spec, labels).await?;
        let (mut near, mut far) = (None, None);
        for (host, server) in servers {
            if host == near_host {
                near = Some(server)
            } else {
                far = Some((host, server))
            }
        }
        let (near, (far_host, far)) = near.zip(far).context("the servers are not on both hosts")?;
        let seat = json!({"metadata": {"labels": {"seat": "far"}}});
        scope.patch::<Pod>(&far.name_any(), seat).await?;
        let mut of_far = service("far");
        of_far["spec"]["selector"] = json!({"seat": "far"});
        scope.create(of_far).await?;
        let far_service = SocketAddrV4::new(cluster_ip(scope, "far").await?, 80);
        let pair = Self {
            client,
            near,
            far,
            near_host,
            far_host,
            far_service,
        };
        // The mesh hears of a new Service a moment after it is made.
        scope
            .wait("that the client reaches the far server", async || {
                pair.dial(scope, pair.far_service, "hello")
                    .await
                    .map_err(|e| format!("{e:#}"))
            })
            .await?;
        Ok(pair)
    }

    /// One connection from the client; what both ends said of it.
    pub(crate) async fn dial(&self, scope: &Scope, to: SocketAddrV4, text: &str) -> anyhow::Result<Seen> {
        dial(scope, "client", "-", to, text).await
    }

    pub(crate) fn far_pod(&self) -> SocketAddrV4 {
        SocketAddrV4::new(address(&self.far).unwrap_or(Ipv4Addr::UNSPECIFIED), PORT)
    }
}

/// A pod of a Deployment `web` on each host: the placer spreads those of one
/// owner.
async fn on_both_hosts(scope: &Scope, spec: Value, labels: Value) -> anyhow::Result<BTreeMap<String, Pod>> {
    let hosts = scope.lab().topology().hosts.len();
    let mut web = deployment("web", u32::try_from(hosts)?, spec);
    let template = &mut web["spec"]["template"]["metadata"]["labels"];
    *template = merge(template.clone(), labels);
    scope.create(web).await?;
    let pods = scope.pods_until("web", hosts, "are Ready", is_ready).await?;
    let placed = pods.into_iter().map(|pod| Ok((scope.host_of(&pod)?, pod)));
    let placed: BTreeMap<String, Pod> = placed.collect::<anyhow::Result<_>>()?;
    ensure!(placed.len() == hosts, "all are on {:?}", placed.keys());
    Ok(placed)
}

pub(crate) async fn cluster_ip(scope: &Scope, service: &str) -> anyhow::Result<Ipv4Addr> {
    let found = scope.api::<Service>().get(service).await?;
    let ip = found
        .spec
        .and_then(|spec| spec.cluster_ip)
        .context("it has no address")?;
    Ok(ip.parse()?)
}

/// The four addresses of a connection as its two ends saw them.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) client_local: SocketAddrV4,
    pub(crate) client_peer: SocketAddrV4,
    pub(crate) server_local: SocketAddrV4,
    pub(crate) server_peer: SocketAddrV4,
}

impl Seen {
    /// `client local=A peer=B server local=C peer=D`
    pub(crate) fn parse(line: &str) -> anyhow::Result<Self> {
        let mut addresses = line.split_whitespace().filter_map(|word| {
            let (name, value) = word.split_once('=')?;
            ["local", "peer"].contains(&name).then(|| value.parse().ok())?
        });
        let mut next = || {
            addresses
                .next()
                .with_context(|| format!("not what probe says: {line}"))
        };
        Ok(Self {
            client_local: next()?,
            client_peer: next()?,
            server_local: next()?,
            server_peer: next()?,
        })
    }
}

pub(crate) async fn dial(
    scope: &Scope,
    pod: &str,
    from: &str,
    to: SocketAddrV4,
    text: &str,
) -> anyhow::Result<Seen> {
    let said = scope
        .kubectl()
        .exec_ok(pod, &["/probe", "dial", from, &to.to_string(), text])
        .await?;
    Seen::parse(&said)
}

fn host_address(scope: &Scope, host: &str) -> anyhow::Result<Ipv4Addr> {
    Ok(scope.lab().topology().host(host).context("no such host")?.address)
}

/// The tenant's network namespace on a host, where the proxy's sockets are.
fn router(lab: &Lab, host: &str) -> PathBuf {
    lab.layout()
        .host_state(host)
        .join("agent/routers")
        .join(lab.layout().instance().as_str())
}

/// Everything that passes the bridge from and to the host.
pub(crate) async fn capture_link(lab: &Lab, host: &str) -> anyhow::Result<Capture> {
    Capture::start(&lab.topology().lab.path(), host).await
}

/// Checks that of what passed between the two hosts everything was TLS to the
/// tunnel's port, and something was.
pub(crate) fn only_tunnels(lab: &Lab, packets: &Packets) -> anyhow::Result<usize> {
    let hosts = &lab.topology().hosts;
    let of = |index: usize| {
        let host = hosts[index].clone();
        let topology = lab.topology().clone();
        move |ip: Ipv4Addr| {
            ip == host.address || topology.host_of(ip.into()).is_some_and(|h| h.name == host.name)
        }
    };
    let between = packets.between(of(0), of(1));
    ensure!(!between.is_empty(), "nothing passed between the hosts");
    let strange: Vec<_> = between
        .iter()
        .filter(|p| !p.is_tcp_of(mesh_api::HBONE_PORT) && !p.is_unreachable_of(mesh_api::HBONE_PORT))
        .take(5)
        .collect();
    ensure!(strange.is_empty(), "not a tunnel: {strange:?}");
    let records = packets.tls_records(mesh_api::HBONE_PORT)?;
    ensure!(records > 0, "no TLS record was seen");
    Ok(records)
}

/// A text that nothing else on this machine has.
fn marker(scope: &Scope, what: &str) -> String {
    format!("MARK-{what}-{}", scope.namespace())
}

/// A field of a log line, bare or quoted.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let start = format!(" {name}=");
    let rest = &line[line.find(&start)? + start.len()..];
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => rest.split(' ').next(),
    }
}

/// The lines of the access log of a host about connections that a pod of its
/// took.
fn inbound(since: &Mark, host: &str, to: SocketAddrV4) -> anyhow::Result<Vec<String>> {
    let to = to.to_string();
    let lines = since.since(&format!("pool-agent@{host}"))?;
    Ok(lines
        .into_iter()
        .filter(|line| field(line, "direction") == Some("inbound") && field(line, "dst.addr") == Some(&to))
        .collect())
}

fn identity(scope: &Scope, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{account}", scope.namespace())
}

/// Waits for the log of the one connection of a client since the mark, and
/// gives the identity in it.
async fn verified(
    scope: &Scope,
    since: &Mark,
    host: &str,
    to: SocketAddrV4,
    from: Ipv4Addr,
) -> anyhow::Result<Option<String>> {
    scope
        .wait(
            &format!("that {host} logs the connection from {from}"),
            async || {
                let lines = inbound(since, host, to).map_err(|e| format!("{e:#}"))?;
                let is_own = |line: &&String| {
                    let from_ip = field(line, "src.addr").and_then(|addr| addr.parse::<SocketAddrV4>().ok());
                    from_ip.is_some_and(|addr| *addr.ip() == from)
                };
                let own = lines.iter().find(is_own).ok_or_else(|| lines.join("\n    "))?;
                Ok(field(own, "src.identity").map(str::to_owned))
            },
        )
        .await
}

async fn a_client_reaches_a_replica_on_the_other_host_through_the_service(
    scope: &Scope,
) -> anyhow::Result<()> {
    let client = scope
        .start(pod("client", json!({"containers": [idle()]})))
        .await?;
    let here = scope.host_of(&client)?;
    let servers = on_both_hosts(scope, json!({"containers": [netexec()]}), json!({})).await?;
    let there = servers
        .iter()
        .find(|(host, _)| **host != here)
        .context("all are on one host")?
        .1;
    scope.create(service("web")).await?;
    let url = format!("http://web.{}/hostname", scope.namespace());
    scope
        .wait(&format!("an answer of {}", there.name_any()), async || {
            let answer = scope
                .kubectl()
                .exec_ok("client", &["timeout", "5", "wget", "-q", "-O", "-", &url])
                .await
                .map_err(|e| format!("{e:#}"))?;
            if answer.trim() == there.name_any() {
                Ok(())
            } else {
                Err(answer)
            }
        })
        .await?;
    // And whom does a replica see? The client, by its own address.
    let url = format!("http://web.{}/clientip", scope.namespace());
    let answer = scope
        .kubectl()
        .exec_ok("client", &["timeout", "5", "wget", "-q", "-O", "-", &url])
        .await?;
    let seen: SocketAddrV4 = answer.trim().parse()?;
    ensure!(Some(*seen.ip()) == address(&client), "a replica saw {seen}");
    Ok(())
}

async fn both_ends_see_the_addresses_that_they_know(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let client = address(&pair.client).context("no address")?;
    for to in [pair.far_service, pair.far_pod()] {
        let seen = pair.dial(scope, to, "hello").await?;
        ensure!(seen.client_peer == to, "the client dialled {to} and has {seen:?}");
        ensure!(*seen.client_local.ip() == client, "{seen:?}");
        ensure!(seen.server_local == pair.far_pod(), "{seen:?}");
        ensure!(*seen.server_peer.ip() == client, "{seen:?}");
    }
    Ok(())
}

async fn a_captured_connection_has_the_original_destination_as_its_own_address(
    scope: &Scope,
) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let to = pair.far_service;
    let _holding = scope.kubectl().start(&[
        "exec",
        "client",
        "--",
        "/probe",
        "hold",
        &to.to_string(),
        "x",
        "100",
    ])?;
    let client = address(&pair.client).context("no address")?.to_string();
    let router = router(scope.lab(), &pair.near_host);
    scope
        .wait("the proxy's end of the captured connection", async || {
            // Local address, then the peer's: getsockname and getpeername.
            let sockets = Tool::new("nsenter")
                .arg(format!("--net={}", router.display()))
                .args(["ss", "-tnH", "state", "established"])
                .run()
                .await
                .map_err(|e| e.to_string())?;
            let found = sockets.lines().any(|line| {
                let mut words = line.split_whitespace().skip(2);
                words.next() == Some(&to.to_string())
                    && words
                        .next()
                        .is_some_and(|peer| peer.rsplit_once(':').map(|(ip, _)| ip) == Some(&client))
            });
            if found { Ok(()) } else { Err(sockets) }
        })
        .await
}

async fn the_far_host_logs_the_identity_that_it_verified(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let since = Mark::now(scope.lab());
    let seen = pair.dial(scope, pair.far_service, "hello").await?;
    let client = *seen.server_peer.ip();
    let who = verified(scope, &since, &pair.far_host, pair.far_pod(), client).await?;
    ensure!(who == Some(identity(scope, "client")), "{who:?}");
    Ok(())
}

async fn a_peer_on_the_same_host_is_verified_too(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let near = SocketAddrV4::new(address(&pair.near).context("no address")?, PORT);
    let since = Mark::now(scope.lab());
    let seen = pair.dial(scope, near, "hello").await?;
    let client = *seen.server_peer.ip();
    ensure!(Some(client) == address(&pair.client), "{seen:?}");
    let who = verified(scope, &since, &pair.near_host, near, client).await?;
    ensure!(who == Some(identity(scope, "client")), "{who:?}");
    Ok(())
}

async fn a_pod_reaches_itself_through_its_service(scope: &Scope) -> anyhow::Result<()> {
    scope.create(service("web")).await?;
    scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    a_pod_reaches_itself(scope, "web").await
}

/// The pod of that name, through the Service of that name.
pub(crate) async fn a_pod_reaches_itself(scope: &Scope, name: &str) -> anyhow::Result<()> {
    let to = SocketAddrV4::new(cluster_ip(scope, name).await?, 80);
    scope
        .wait("that it reaches itself", async || {
            dial(scope, name, "-", to, "hello")
                .await
                .map(drop)
                .map_err(|e| format!("{e:#}"))
        })
        .await
}

async fn a_service_spreads_connections_over_its_replicas(scope: &Scope) -> anyhow::Result<()> {
    scope.create(service("web")).await?;
    let mut servers = BTreeSet::new();
    for turn in 0..3 {
        let mut pod = pod(&format!("web-{turn}"), json!({"containers": [probe_server()]}));
        pod["metadata"]["labels"] = json!({"app": "web"});
        servers.extend(address(&scope.start(pod).await?));
    }
    scope
        .start(pod("client", json!({"containers": [idle()]})))
        .await?;
    let to = SocketAddrV4::new(cluster_ip(scope, "web").await?, 80);
    let mut seen = BTreeSet::new();
    scope
        .wait("connections to every replica", async || {
            if let Ok(one) = dial(scope, "client", "-", to, "hello").await {
                seen.insert(*one.server_local.ip());
            }
            if seen == servers {
                Ok(())
            } else {
                Err(format!("{seen:?} of {servers:?}"))
            }
        })
        .await
}

async fn many_bytes_arrive_whole_and_a_half_closed_connection_goes_on(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let near = SocketAddrV4::new(address(&pair.near).context("no address")?, PORT);
    for to in [pair.far_service, near] {
        let bulk = ["/probe", "bulk", &to.to_string(), "20000000"];
        let said = scope.kubectl().exec_ok("client", &bulk).await?;
        ensure!(said.starts_with("20000000 bytes and the end"), "{said}");
    }
    Ok(())
}

async fn a_port_nobody_listens_on_is_an_error_at_once(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let nobody = SocketAddrV4::new(*pair.far_pod().ip(), 4242);
    let answer = scope
        .kubectl()
        .exec("client", &["/probe", "dial", "-", &nobody.to_string(), "hello"])
        .await?;
    ensure!(answer.code == Some(1), "{answer:?}");
    // Not a time-out: the far side said so.
    let told = ["refused", "reset", "not connected", "end of file"]
        .iter()
        .any(|w| answer.out.to_lowercase().contains(w));
    ensure!(told, "{answer:?}");
    // And the far server is served as before.
    pair.dial(scope, pair.far_pod(), "hello").await?;
    Ok(())
}

async fn nothing_but_tls_on_the_tunnels_port_passes_between_the_hosts(scope: &Scope) -> anyhow::Result<()> {
    let marker = marker(scope, "wire");
    let capture = capture_link(scope.lab(), "host-a").await?;
    // Begun before the pods are, so that every tunnel is seen from its start.
    let pair = Pair::start(scope).await?;
    for _ in 0..5 {
        for to in [pair.far_service, pair.far_pod()] {
            pair.dial(scope, to, &marker).await?;
        }
    }
    let packets = capture.end().await?;
    only_tunnels(scope.lab(), &packets)?;
    ensure!(
        packets.count(&marker) == 0,
        "the marker was seen {} times",
        packets.count(&marker)
    );
    Ok(())
}

fn opted_out() -> Value {
    json!({"istio.io/dataplane-mode": "none"})
}

async fn a_pod_that_opted_out_speaks_plaintext(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start_with(scope, json!({}), opted_out()).await?;
    // The other side of the proof that nothing is seen: this is.
    let marker = marker(scope, "plain");
    let capture = capture_link(scope.lab(), &pair.near_host).await?;
    let seen = pair.dial(scope, pair.far_pod(), &marker).await?;
    let packets = capture.end().await?;
    ensure!(packets.count(&marker) > 0, "the marker was not seen");
    ensure!(Some(*seen.server_peer.ip()) == address(&pair.client), "{seen:?}");
    Ok(())
}

async fn a_pod_that_opted_out_and_one_in_the_mesh_reach_each_other(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let outside = |name: &str, container: Value| {
        let mut pod = pod(name, json!({"containers": [container]}));
        pod["metadata"]["labels"] = merge(pod["metadata"]["labels"].clone(), opted_out());
        pod
    };
    let outsider = scope.start(outside("outsider", probe_server())).await?;
    let since = Mark::now(scope.lab());
    let from_outside = dial(scope, "outsider", "-", pair.far_pod(), "hello").await?;
    ensure!(
        Some(*from_outside.server_peer.ip()) == address(&outsider),
        "{from_outside:?}"
    );
    let host = scope.host_of(&pair.far)?;
    let peer = *from_outside.server_peer.ip();
    let who = verified(scope, &since, &host, pair.far_pod(), peer).await?;
    ensure!(who.is_none(), "plaintext was taken for {who:?}");
    let to = SocketAddrV4::new(address(&outsider).context("no address")?, PORT);
    let from_inside = pair.dial(scope, to, "hello").await?;
    ensure!(
        Some(*from_inside.server_peer.ip()) == address(&pair.client),
        "{from_inside:?}"
    );
    // A Service's address works for those outside the mesh as well.
    dial(scope, "outsider", "-", pair.far_service, "hello").await?;
    Ok(())
}

/// The addresses that nslookup found in a pod, or what it said instead.
async fn look_up(scope: &Scope, name: &str) -> Result<BTreeSet<Ipv4Addr>, String> {
    let answer = scope
        .kubectl()
        .exec("client", &["nslookup", name])
        .await
        .map_err(|e| format!("{e:#}"))?;
    // The first lines are about the server that was asked.
    let answers = answer.out.split_once("\n\n").map_or("", |(_, answers)| answers);
    let found: BTreeSet<Ipv4Addr> = answers
        .lines()
        .filter_map(|line| line.strip_prefix("Address:")?.trim().parse().ok())
        .collect();
    if found.is_empty() {
        Err(format!("{}{}", answer.out, answer.err))
    } else {
        Ok(found)
    }
}

async fn cluster_names_are_resolved_as_kubernetes_says(scope: &Scope) -> anyhow::Result<()> {
    let namespace = scope.namespace();
    let mut replicas = BTreeSet::new();
    for name in ["web-0", "web-1"] {
        let mut pod = pod(name, json!({"containers": [probe_server()]}));
        pod["metadata"]["labels"] = json!({"app": "web"});
        replicas.extend(address(&scope.start(pod).await?));
    }
    scope.create(service("web")).await?;
    let mut headless = service("each");
    headless["spec"]["selector"] = json!({"app": "web"});
    headless["spec"]["clusterIP"] = json!("None");
    scope.create(headless).await?;
    scope
        .start(pod("client", json!({"containers": [idle()]})))
        .await?;
    let own = BTreeSet::from([cluster_ip(scope, "web").await?]);
    let full = |name: &str| format!("{name}.{namespace}.svc.cluster.local");
    for (name, wanted) in [
        (full("web"), &own),
        (full("each"), &replicas),
        (
            "kubernetes.default.svc.cluster.local".to_owned(),
            &BTreeSet::from([topology::KUBERNETES_SERVICE]),
        ),
    ] {
        scope
            .wait(&format!("{name} to be {wanted:?}"), async || {
                let found = look_up(scope, &name).await?;
                if found == *wanted {
                    Ok(())
                } else {
                    Err(format!("{found:?}"))
                }
            })
            .await?;
    }
    // Short names, by the search list, as programs use them.
    for name in [
        "web".to_owned(),
        format!("web.{namespace}"),
        format!("web.{namespace}.svc"),
    ] {
        let url = format!("http://{name}/");
        let answer = scope
            .kubectl()
            .exec("client", &["timeout", "5", "wget", "-q", "-O", "-", &url])
            .await?;
        // probe speaks no HTTP; that it was reached shows in its greeting.
        ensure!(!answer.err.contains("bad address"), "{name}: {answer:?}");
    }
    let absent = look_up(scope, &full("absent")).await;
    ensure!(
        absent.as_ref().is_err_and(|said| said.contains("NXDOMAIN")),
        "{absent:?}"
    );
    Ok(())
}

async fn names_outside_the_cluster_are_asked_of_the_upstream(scope: &Scope) -> anyhow::Result<()> {
    let known = Ipv4Addr::new(203, 0, 113, 7);
    // Where the lab's configuration says that the upstream is.
    let upstream = SocketAddr::from((topology::API_SERVER, 53));
    let resolver = Resolver::start(&scope.lab().topology().lab, upstream, "outside.example.", known)?;
    scope
        .start(pod("client", json!({"containers": [idle()]})))
        .await?;
    let found = look_up(scope, "outside.example.").await;
    ensure!(found == Ok(BTreeSet::from([known])), "{found:?}");
    let absent = look_up(scope, "nobody.example.").await;
    ensure!(
        absent.as_ref().is_err_and(|said| said.contains("NXDOMAIN")),
        "{absent:?}"
    );
    let asked = resolver.asked();
    ensure!(
        asked.iter().any(|name| name == "outside.example.")
            && !asked.iter().any(|name| name.contains("cluster.local")),
        "{asked:?}"
    );
    Ok(())
}

async fn a_pod_reads_the_api_server_with_its_own_token(scope: &Scope) -> anyhow::Result<()> {
    let namespace = scope.namespace();
    scope.create(service_account("reader")).await?;
    scope
        .kubectl()
        .run(&[
            "create",
            "rolebinding",
            "reader",
            "--clusterrole=view",
            &format!("--serviceaccount={namespace}:reader"),
        ])
        .await?;
    let client = scope
        .start(pod(
            "client",
            json!({"serviceAccountName": "reader", "containers": [idle()]}),
        ))
        .await?;
    let url = |namespace: &str| format!("https://kubernetes.default.svc/api/v1/namespaces/{namespace}/pods");
    let own = scope
        .wait("the pods of its own namespace", async || {
            let answer = scope
                .kubectl()
                .exec_ok("client", &["/fetch", &url(namespace)])
                .await;
            let answer = answer.map_err(|e| format!("{e:#}"))?;
            // The right to is known to the API server a moment later.
            if answer.starts_with("200\n") {
                Ok(answer)
            } else {
                Err(answer)
            }
        })
        .await?;
    ensure!(own.contains(uid(&client)), "{own}");
    let other = scope
        .kubectl()
        .exec_ok("client", &["/fetch", &url("kube-system")])
        .await?;
    let name = format!("system:serviceaccount:{namespace}:reader");
    ensure!(other.starts_with("403\n") && other.contains(&name), "{other}");
    Ok(())
}

async fn a_pod_cannot_reach_its_host_through_the_proxy(scope: &Scope) -> anyhow::Result<()> {
    let client = scope
        .start(pod("client", json!({"containers": [idle()]})))
        .await?;
    let host = scope.host_of(&client)?;
    for to in [
        SocketAddrV4::new(host_address(scope, &host)?, 7443),
        SocketAddrV4::new(Ipv4Addr::new(169, 254, 1, 1), 15001),
        SocketAddrV4::new(Ipv4Addr::new(169, 254, 1, 1), 9464),
    ] {
        let answer = scope
            .kubectl()
            .exec("client", &["/probe", "dial", "-", &to.to_string(), "x"])
            .await?;
        ensure!(answer.code == Some(1), "{to}: {answer:?}");
    }
    Ok(())
}

/// What a pod needs to be a nuisance.
fn privileged() -> Value {
    json!({"securityContext": {"capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}}})
}

async fn a_pod_that_clears_its_routes_stays_in_the_mesh(scope: &Scope) -> anyhow::Result<()> {
    let marker = marker(scope, "cleared");
    let capture = capture_link(scope.lab(), "host-a").await?;
    let pair = Pair::start_with(scope, privileged(), json!({})).await?;
    let pid = main_process(scope, &pair.client).await?;
    // With the host's tools, as the pod's own root might bring them along.
    for command in [
        "nft flush ruleset",
        "ip route flush table main",
        "ip neigh flush all nud all",
        "ip route add 169.254.1.1 dev eth0 scope link",
        "ip route add default via 169.254.1.1 dev eth0",
        "ip neigh replace 169.254.1.1 lladdr ff:ff:ff:ff:ff:ff dev eth0 nud permanent",
    ] {
        in_namespace_of(pid, command).await?;
    }
    // Whether it still gets through does not matter, only how.
    for to in [pair.far_pod(), pair.far_service] {
        drop(pair.dial(scope, to, &marker).await);
    }
    in_namespace_of(pid, "ip neigh del 169.254.1.1 dev eth0").await?;
    let gateway = gateway_address(scope, &pair).await?;
    in_namespace_of(
        pid,
        &format!("ip neigh replace 169.254.1.1 lladdr {gateway} dev eth0 nud permanent"),
    )
    .await?;
    let since = Mark::now(scope.lab());
    let seen = pair.dial(scope, pair.far_pod(), &marker).await?;
    let client = *seen.server_peer.ip();
    let who = verified(scope, &since, &pair.far_host, pair.far_pod(), client).await?;
    ensure!(who == Some(identity(scope, "client")), "{who:?}");
    let packets = capture.end().await?;
    only_tunnels(scope.lab(), &packets)?;
    ensure!(
        packets.count(&marker) == 0,
        "the marker was seen {} times",
        packets.count(&marker)
    );
    Ok(())
}

/// The process in the pod's container, as its host numbers it.
async fn main_process(scope: &Scope, pod: &Pod) -> anyhow::Result<u32> {
    let all = containers::on_host(scope.lab(), &scope.host_of(pod)?).await?;
    let main = all.iter().find(|c| c.pod_uid == uid(pod) && c.name == "main");
    main.and_then(|main| main.pid)
        .context("its container does not run")
}

fn network_of(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}

async fn in_namespace_of(pid: u32, command: &str) -> anyhow::Result<String> {
    let tool = Tool::new("nsenter")
        .arg(format!("--net={}", network_of(pid).display()))
        .args(command.split(' '));
    Ok(tool.run().await?)
}

/// The hardware address at which a pod finds its way out, read in another pod.
async fn gateway_address(scope: &Scope, pair: &Pair) -> anyhow::Result<String> {
    let table = scope
        .kubectl()
        .exec_ok(&pair.near.name_any(), &["cat", "/proc/net/arp"])
        .await?;
    let line = table.lines().find(|line| line.starts_with("169.254.1.1 "));
    let mac = line.and_then(|line| line.split_whitespace().nth(3));
    Ok(mac.with_context(|| format!("no way out in {table}"))?.to_owned())
}

/// How many packets a host's kernel has dropped, for whatever reason.
async fn drops(scope: &Scope, host: &str) -> anyhow::Result<f64> {
    let namespace = Namespace::named(scope.lab().layout().namespace(host));
    let text = stranger::get_plain(&namespace, AGENT_METRICS, "/metrics")
        .await?
        .body;
    let lines = text
        .lines()
        .filter(|line| line.starts_with("mesh_runtime_dropped_packets_total"));
    Ok(lines
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum())
}

async fn a_pod_cannot_speak_from_another_pods_address(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start_with(scope, privileged(), json!({})).await?;
    let victim = address(&pair.near).context("no address")?;
    let pid = main_process(scope, &pair.client).await?;
    let marker = marker(scope, "stolen");
    let dropped = drops(scope, &pair.near_host).await?;
    let capture = capture_link(scope.lab(), &pair.near_host).await?;
    in_namespace_of(pid, &format!("ip addr add {victim}/32 dev eth0")).await?;
    for to in [pair.far_pod(), pair.far_service] {
        let said = scope
            .kubectl()
            .exec(
                "client",
                &["/probe", "dial", &victim.to_string(), &to.to_string(), &marker],
            )
            .await?;
        ensure!(said.code == Some(1), "it spoke as another: {said:?}");
    }
    // Nor with the other's hardware address beside it.
    in_namespace_of(pid, &format!("ip addr del {victim}/32 dev eth0")).await?;
    let packets = capture.end().await?;
    ensure!(packets.count(&marker) == 0, "the marker was seen");
    let stolen: Vec<_> = packets
        .packets
        .iter()
        .filter(|p| p.addresses().0 == victim)
        .collect();
    ensure!(stolen.is_empty(), "{stolen:?}");
    let now = drops(scope, &pair.near_host).await?;
    ensure!(now > dropped, "nothing was counted as dropped");
    // Neither identity was taken, and its own it still has.
    for line in inbound(scope.journal(), &pair.far_host, pair.far_pod())? {
        ensure!(
            field(&line, "src.identity") == Some(&identity(scope, "client")),
            "{line}"
        );
    }
    pair.dial(scope, pair.far_pod(), "hello").await?;
    Ok(())
}

async fn raw_frames_of_a_pod_neither_leave_the_mesh_nor_take_an_identity(
    scope: &Scope,
) -> anyhow::Result<()> {
    let pair = Pair::start_with(scope, privileged(), json!({})).await?;
    let (own, victim) = (
        address(&pair.client).context("no address")?,
        address(&pair.near).context("no address")?,
    );
    let marker = marker(scope, "raw");
    let wire = capture_link(scope.lab(), &pair.near_host).await?;
    let neighbour = Capture::start(&network_of(main_process(scope, &pair.near).await?), "eth0").await?;
    let far = pair.far_pod();
    let near = SocketAddrV4::new(victim, PORT);
    let dropped = drops(scope, &pair.near_host).await?;
    let agent = SocketAddrV4::new(host_address(scope, &pair.far_host)?, 7443);
    for from in [own, victim, *far.ip(), topology::VIRTUAL_NODE] {
        let from = SocketAddrV4::new(from, 5555).to_string();
        let send = async |to: SocketAddrV4, kind: &str| {
            let frame = ["/probe", "frame", "eth0", &from, &to.to_string(), kind, &marker];
            scope.kubectl().exec_ok("client", &frame).await
        };
        for to in [far, near, SocketAddrV4::new(*far.ip(), 15008)] {
            for kind in ["syn", "ack", "udp"] {
                send(to, kind).await?;
            }
        }
        // UDP of one's own to what is no pod may pass.
        for kind in ["syn", "ack"] {
            send(agent, kind).await?;
        }
        send(near, "arp").await?;
    }
    let (wire, neighbour) = (wire.end().await?, neighbour.end().await?);
    for (place, packets) in [("on the wire", wire), ("at its neighbour", neighbour)] {
        ensure!(
            packets.count(&marker) == 0,
            "the marker was seen {place}: {:#?}",
            packets.carrying(&marker)
        );
    }
    ensure!(
        drops(scope, &pair.near_host).await? > dropped,
        "nothing was counted as dropped"
    );
    for line in inbound(scope.journal(), &pair.far_host, far)? {
        ensure!(
            field(&line, "src.identity") == Some(&identity(scope, "client")),
            "{line}"
        );
    }
    // The neighbour is reached where it was.
    pair.dial(scope, near, "hello").await?;
    Ok(())
}
