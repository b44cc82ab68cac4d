//! The demo and what it shows, read from the running system: pods from the API
//! server, where they are from their addresses, identities and verified peers
//! from the logs of the agents.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{AttachParams, ListParams},
};
use tokio::io::AsyncReadExt;

use crate::{
    cluster::{ClusterError, DEMO, wait},
    lab::Lab,
    pool,
    progress::Progress,
    topology::Host,
};

const MANIFEST: &str = include_str!("../manifests/demo.yaml");
/// Images are imported already; the rest is pods starting on a busy machine.
const ROLLOUT: Duration = Duration::from_secs(180);
/// The Service balances over three replicas on two hosts, so the far host
/// answers about every other time. A bound that chance does not reach.
const MOST_REQUESTS: usize = 40;

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("cannot list the demo's pods")]
    List(#[source] kube::Error),
    #[error("the demo has no running client pod")]
    NoClient,
    #[error("cannot run {command:?} in pod {pod}")]
    Exec {
        pod: String,
        command: String,
        #[source]
        source: kube::Error,
    },
    #[error("cannot read what {command:?} printed in pod {pod}")]
    Output {
        pod: String,
        command: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{command:?} failed in pod {pod}: {said}")]
    Request {
        pod: String,
        command: String,
        said: String,
    },
    #[error("{MOST_REQUESTS} requests were all answered on {0}, the client's own host")]
    NoFarReplica(String),
    #[error("{pod} runs on {host}, but that host logged no verified peer for the request, in {}", .log.display())]
    Unverified { pod: String, host: String, log: PathBuf },
    #[error("cannot read {}", .path.display())]
    Log {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// A pod of the demo as it runs.
#[derive(Clone, Debug)]
pub struct Placed {
    pub pod: String,
    pub address: String,
    pub host: String,
    /// Of the certificate its host holds for it.
    pub identity: Option<String>,
}

/// A request from one host's pod to another's.
#[derive(Clone, Debug)]
pub struct Request {
    pub client: Placed,
    pub url: String,
    pub server: Placed,
    /// The client's address, as a replica saw it.
    pub seen_from: String,
    /// The client's identity, as the server's host verified it.
    pub verified: String,
}

#[derive(Clone, Debug)]
pub struct Shown {
    pub placed: Vec<Placed>,
    /// `None`: the API server cannot reach the node, so there is no exec.
    pub request: Option<Request>,
}

/// Whether the cluster's API server reaches the node's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exec {
    Works,
    Unreachable,
}

/// Applies the demo, waits for it and looks at it.
pub async fn run(lab: &Lab, exec: Exec, progress: &Progress) -> Result<Shown, DemoError> {
    let step = progress.step("Run the demo: three replicas, a Service, a client");
    let node = lab.layout().node_name();
    lab.cluster()
        .apply("demo.yaml", MANIFEST, &[("NODE", &node)])
        .await?;
    let deployments: Api<Deployment> = Api::namespaced(lab.client(), DEMO);
    wait("the demo's rollout", ROLLOUT, async || {
        let mut behind = Vec::new();
        for name in ["web", "client"] {
            let deployment = deployments.get(name).await.map_err(|e| e.to_string())?;
            let wanted = deployment.spec.replicas.unwrap_or(1);
            let status = deployment.status.clone().unwrap_or_default();
            let current = status.observed_generation == deployment.metadata.generation;
            let ready = status.ready_replicas.unwrap_or(0);
            if !current
                || ready < wanted
                || status.updated_replicas != Some(wanted)
                || status.replicas != Some(wanted)
            {
                behind.push(format!("{name} {ready}/{wanted}"));
            }
        }
        step.note(&format!("ready: {}", behind.join(", ")));
        if behind.is_empty() {
            Ok(())
        } else {
            Err(behind.join(", "))
        }
    })
    .await?;
    step.note("requests through the Service");
    let placed = placed(lab).await?;
    let request = match exec {
        Exec::Works => Some(far_request(lab, &placed).await?),
        Exec::Unreachable => None,
    };
    step.done();
    Ok(Shown { placed, request })
}

async fn placed(lab: &Lab) -> Result<Vec<Placed>, DemoError> {
    let pods: Api<Pod> = Api::namespaced(lab.client(), DEMO);
    let listed = pods.list(&ListParams::default()).await.map_err(DemoError::List)?;
    let mut placed = Vec::new();
    for pod in listed
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
    {
        let Some(address) = pod.status.as_ref().and_then(|status| status.pod_ip.clone()) else {
            continue;
        };
        let host = address
            .parse()
            .ok()
            .and_then(|address| lab.topology().host_of(address));
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.as_deref())
            .unwrap_or("default");
        let identity = match host {
            Some(host) => held_identity(&agent_log(lab, host)?, DEMO, account),
            None => None,
        };
        let host = host.map_or_else(|| "not in the pool".to_owned(), |host| host.name.clone());
        placed.push(Placed {
            pod: pod.name_any(),
            address,
            host,
            identity,
        });
    }
    placed.sort_by(|a, b| a.pod.cmp(&b.pod));
    Ok(placed)
}

async fn far_request(lab: &Lab, placed: &[Placed]) -> Result<Request, DemoError> {
    let client = placed
        .iter()
        .find(|placed| placed.pod.starts_with("client-"))
        .ok_or(DemoError::NoClient)?;
    let url = format!("http://web.{DEMO}");
    for _ in 0..MOST_REQUESTS {
        let before: Vec<usize> = lab
            .topology()
            .hosts
            .iter()
            .map(|host| agent_log(lab, host).map(|log| log.len()))
            .collect::<Result<_, _>>()?;
        let answer = get(lab, &client.pod, &format!("{url}/hostname")).await?;
        let Some(server) = placed.iter().find(|placed| placed.pod == answer.trim()) else {
            continue;
        };
        if server.host == client.host {
            continue;
        }
        let Some((host, before)) = lab
            .topology()
            .hosts
            .iter()
            .zip(before)
            .find(|(host, _)| host.name == server.host)
        else {
            continue;
        };
        let verified = verified_peer(lab, host, before, server).await?;
        let seen_from = get(lab, &client.pod, &format!("{url}/clientip")).await?;
        return Ok(Request {
            client: client.clone(),
            url,
            server: server.clone(),
            seen_from,
            verified,
        });
    }
    Err(DemoError::NoFarReplica(client.host.clone()))
}

/// The peer of the connection, from what the far host logged since.
async fn verified_peer(lab: &Lab, host: &Host, before: usize, server: &Placed) -> Result<String, DemoError> {
    let since = Instant::now();
    loop {
        let log = agent_log(lab, host)?;
        let new = log.get(before..).unwrap_or_default();
        if let Some(peer) = new
            .lines()
            .rev()
            .find_map(|line| inbound_peer(line, &server.address))
        {
            return Ok(peer);
        }
        // A connection is logged when it has ended.
        if since.elapsed() > Duration::from_secs(10) {
            let log = lab
                .layout()
                .logs()
                .join(format!("{}.log", pool::agent_name(host)));
            return Err(DemoError::Unverified {
                pod: server.pod.clone(),
                host: host.name.clone(),
                log,
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A pod is Ready to the API server from before a virtual node or an agent was
/// restarted; until those have found each other again nothing runs in it.
const REUNION: Duration = Duration::from_secs(30);

async fn get(lab: &Lab, pod: &str, url: &str) -> Result<String, DemoError> {
    // wget's own time limit crashes in Debian's busybox 1.35.
    let command = ["timeout", "10", "wget", "-q", "-O", "-", url];
    let since = Instant::now();
    loop {
        match exec(lab, DEMO, pod, &command).await {
            Err(DemoError::Exec { .. } | DemoError::Request { .. }) if since.elapsed() < REUNION => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            answer => return answer,
        }
    }
}

/// Runs a command in a pod's first container, as `kubectl exec` does, and
/// returns what it printed.
async fn exec(lab: &Lab, namespace: &str, pod: &str, command: &[&str]) -> Result<String, DemoError> {
    let line = || command.join(" ");
    let pods: Api<Pod> = Api::namespaced(lab.client(), namespace);
    let failed = |source| DemoError::Exec {
        pod: pod.to_owned(),
        command: line(),
        source,
    };
    let unread = |source| DemoError::Output {
        pod: pod.to_owned(),
        command: line(),
        source,
    };
    let parameters = AttachParams::default().stdout(true).stderr(true);
    let mut process = pods
        .exec(pod, command.iter().copied(), &parameters)
        .await
        .map_err(failed)?;
    let (mut out, mut err) = (String::new(), String::new());
    let (stdout, stderr, status) = (process.stdout(), process.stderr(), process.take_status());
    if let (Some(mut stdout), Some(mut stderr)) = (stdout, stderr) {
        tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)).map_err(unread)?;
    }
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    match status {
        Some(status) if status.status.as_deref() == Some("Success") => Ok(out),
        status => {
            let said = format!(
                "{err}{}",
                status.and_then(|status| status.message).unwrap_or_default()
            );
            Err(DemoError::Request {
                pod: pod.to_owned(),
                command: line(),
                said,
            })
        }
    }
}

fn agent_log(lab: &Lab, host: &Host) -> Result<String, DemoError> {
    let path = lab
        .layout()
        .logs()
        .join(format!("{}.log", pool::agent_name(host)));
    std::fs::read(&path)
        .map(|log| String::from_utf8_lossy(&log).into_owned())
        .map_err(|source| DemoError::Log { path, source })
}

/// A field of a log line, `name=value` or `name="value"`.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let start = line.match_indices(name).find_map(|(at, _)| {
        let before = line[..at].chars().next_back();
        let begins = before.is_none_or(|c| !(c.is_alphanumeric() || c == '.' || c == '_'));
        line[at + name.len()..].strip_prefix('=').filter(|_| begins)
    })?;
    match start.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => start.split([' ', '}']).next(),
    }
}

/// The identity of the last certificate the host got for the service account.
fn held_identity(log: &str, namespace: &str, account: &str) -> Option<String> {
    let suffix = format!("/ns/{namespace}/sa/{account}");
    let mut held = log.lines().rev().filter(|line| line.contains("certificate held"));
    held.find_map(|line| {
        field(line, "identity")
            .filter(|identity| identity.ends_with(&suffix))
            .map(str::to_owned)
    })
}

/// The verified identity in the line of a connection into the pod.
fn inbound_peer(line: &str, pod: &str) -> Option<String> {
    let to = field(line, "dst.addr")?;
    let inbound = field(line, "direction")? == "inbound";
    let same = to.strip_prefix(pod).is_some_and(|rest| rest.starts_with(':'));
    (inbound && same).then(|| field(line, "src.identity").map(str::to_owned))?
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = self
            .placed
            .iter()
            .map(|placed| placed.pod.len())
            .max()
            .unwrap_or(0)
            .max(3);
        writeln!(f, "Where the pods run, and who they are:")?;
        writeln!(
            f,
            "  {:<widest$}  {:<8} {:<12} IDENTITY",
            "POD", "HOST", "ADDRESS"
        )?;
        for placed in &self.placed {
            let identity = placed.identity.as_deref().unwrap_or("none");
            writeln!(
                f,
                "  {:<widest$}  {:<8} {:<12} {identity}",
                placed.pod, placed.host, placed.address
            )?;
        }
        let Some(request) = &self.request else {
            writeln!(
                f,
                "\nNo request is shown: it would be made by kubectl exec, for which the API server of your"
            )?;
            return writeln!(
                f,
                "cluster has to reach the node. See deploy/local/up --help, --node-address."
            );
        };
        let Request {
            client,
            url,
            server,
            seen_from,
            verified,
        } = request;
        writeln!(f, "\nOne request between the hosts:")?;
        writeln!(f, "  {} on {} asked {url}", client.pod, client.host)?;
        writeln!(
            f,
            "  {} on {} answered; a replica saw the client at {}",
            server.pod,
            server.host,
            seen_from.trim()
        )?;
        writeln!(f, "  {} verified the peer as {verified}", server.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_bare_or_quoted_and_not_from_the_end_of_another() {
        let line = r#"INFO conn{dst.addr=1.2.3.4:80}: x.identity=no identity="spiffe://a/b c" n=3 end=here"#;
        assert_eq!(field(line, "identity"), Some("spiffe://a/b c"));
        assert_eq!(field(line, "dst.addr"), Some("1.2.3.4:80"));
        assert_eq!(field(line, "n"), Some("3"));
        assert_eq!(field(line, "addr"), None);
    }

    #[test]
    fn only_an_inbound_connection_to_the_very_pod_tells_its_peer() {
        let line = |direction: &str, to: &str| {
            format!(
                "INFO connection complete direction={direction} src.identity=\"spiffe://x/ns/d/sa/c\" dst.addr={to}"
            )
        };
        let peer = Some("spiffe://x/ns/d/sa/c".to_owned());
        assert_eq!(
            inbound_peer(&line("inbound", "10.77.1.2:8080"), "10.77.1.2"),
            peer
        );
        assert_eq!(
            inbound_peer(&line("outbound", "10.77.1.2:8080"), "10.77.1.2"),
            None
        );
        assert_eq!(
            inbound_peer(&line("inbound", "10.77.1.22:8080"), "10.77.1.2"),
            None
        );
    }
}
