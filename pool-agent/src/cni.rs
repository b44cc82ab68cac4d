//! The agent's end of the CNI plugin: a unix socket on which the shim passes on
//! what containerd asked of it, one request and one answer a connection.
//!
//! An ADD is handed to whoever runs that pod's sandbox at this moment ([`Desk`]):
//! a sandbox nobody here has asked for is refused by name. DEL, CHECK and the rest
//! need nobody.
//!
//! What always holds: only root is heard; a request has at most [`MAX_REQUEST`]
//! bytes and [`PATIENCE`] to arrive; at most [`CONNECTIONS`] are served at a time.

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pool_agent_api::PodUid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
};

/// The network configuration is a few hundred bytes; runtimes add to it.
const MAX_REQUEST: u64 = 256 << 10;
/// For the request to arrive and the answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);
/// For the network and the mesh.
const WORK: Duration = Duration::from_secs(60);
/// Each is a sandbox being started or stopped.
const CONNECTIONS: usize = 128;
/// A sandbox is asked for by one ADD; a runtime that repeats it waits.
const REQUESTS: usize = 2;

/// Versions of the specification whose results we write; the shim tells them.
const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];

/// Error codes of the specification, and one of our own (from 100 up).
mod code {
    pub(super) const INCOMPATIBLE_VERSION: u32 = 1;
    pub(super) const INVALID_ENVIRONMENT: u32 = 4;
    pub(super) const DECODING: u32 = 6;
    pub(super) const TRY_AGAIN: u32 = 11;
    pub(super) const NOT_EXPECTED: u32 = 100;
    pub(super) const FAILED: u32 = 101;
}

/// What the shim sends: its environment and its standard input.
#[derive(Debug, Deserialize)]
struct Request {
    command: String,
    #[serde(default)]
    container_id: String,
    #[serde(default)]
    netns: String,
    #[serde(default)]
    ifname: String,
    #[serde(default)]
    args: String,
    #[serde(default)]
    config: Value,
}

/// What the shim prints: `output` goes to standard output whichever way it went.
#[derive(Debug, Serialize)]
struct Reply {
    ok: bool,
    output: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
struct Refusal {
    code: u32,
    message: String,
    details: String,
}

impl Refusal {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }
}

/// A network namespace for a sandbox that is being started.
#[derive(Debug)]
pub struct Add {
    /// The runtime's id of the sandbox.
    pub sandbox: String,
    pub netns: PathBuf,
    pub answer: oneshot::Sender<Result<Joined, String>>,
}

/// What the pod was given.
#[derive(Debug, Clone)]
pub struct Joined {
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
    pub mac: [u8; 6],
    pub mtu: u32,
}

/// Where those who start a sandbox wait for its network namespace. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Desk {
    expected: Arc<Mutex<HashMap<PodUid, mpsc::Sender<Add>>>>,
}

/// Dropping it ends the expectation.
#[derive(Debug)]
pub struct Expectation {
    desk: Desk,
    pod: PodUid,
    adds: mpsc::Receiver<Add>,
}

impl Desk {
    /// From now on an ADD for this pod is passed to the caller. Of one pod only one
    /// attempt is on this host at a time; a second caller takes the first one's place.
    pub fn expect(&self, pod: &PodUid) -> Expectation {
        let (sender, adds) = mpsc::channel(REQUESTS);
        self.with(|expected| expected.insert(pod.clone(), sender));
        Expectation {
            desk: self.clone(),
            pod: pod.clone(),
            adds,
        }
    }

    fn of(&self, pod: &PodUid) -> Option<mpsc::Sender<Add>> {
        self.with(|expected| expected.get(pod).cloned())
    }

    fn with<T>(&self, f: impl FnOnce(&mut HashMap<PodUid, mpsc::Sender<Add>>) -> T) -> T {
        f(&mut self.expected.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Expectation {
    pub async fn next(&mut self) -> Option<Add> {
        self.adds.recv().await
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.adds.close();
        self.desk.with(|expected| {
            if expected.get(&self.pod).is_some_and(mpsc::Sender::is_closed) {
                expected.remove(&self.pod);
            }
        });
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("listening on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Binds the socket, in place of one an earlier agent left.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Listen {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves the shim until the agent ends.
pub async fn serve(listener: UnixListener, desk: Desk) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let desk = desk.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &desk).await {
                        tracing::warn!(error = %error, "a CNI request broke off");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "a CNI connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    if peer.uid() != 0 {
        tracing::warn!(
            uid = peer.uid(),
            "a CNI request of somebody who is not root was refused"
        );
        return Ok(());
    }
    let mut bytes = vec![];
    let mut limited = (&mut stream).take(MAX_REQUEST + 1);
    tokio::time::timeout(PATIENCE, limited.read_to_end(&mut bytes))
        .await
        .map_err(|_| io::ErrorKind::TimedOut)??;
    let reply = answer(&bytes, desk).await;
    let text = serde_json::to_vec(&reply)?;
    tokio::time::timeout(PATIENCE, async {
        stream.write_all(&text).await?;
        stream.shutdown().await
    })
    .await
    .map_err(|_| io::ErrorKind::TimedOut)?
}

async fn answer(bytes: &[u8], desk: &Desk) -> Reply {
    let (version, outcome) = match parse(bytes) {
        Ok(request) => {
            let version = version_of(&request.config);
            let outcome = perform(request, desk).await;
            (version, outcome)
        }
        Err(refusal) => (VERSIONS[0].to_owned(), Err(refusal)),
    };
    match outcome {
        Ok(output) => Reply { ok: true, output },
        Err(refusal) => {
            tracing::warn!(code = refusal.code, error = %refusal, "a CNI request was refused");
            Reply {
                ok: false,
                output: json!({
                    "cniVersion": version,
                    "code": refusal.code,
                    "msg": refusal.message,
                    "details": refusal.details,
                }),
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Request, Refusal> {
    if bytes.len() as u64 > MAX_REQUEST {
        return Err(Refusal::new(
            code::DECODING,
            format!("the request has more than {MAX_REQUEST} bytes"),
        ));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Refusal::new(code::DECODING, format!("the request does not read: {e}")))
}

fn version_of(config: &Value) -> String {
    config
        .get("cniVersion")
        .and_then(Value::as_str)
        .unwrap_or(VERSIONS[0])
        .chars()
        .take(16)
        .collect()
}

async fn perform(request: Request, desk: &Desk) -> Result<Value, Refusal> {
    let version = version_of(&request.config);
    let written = || {
        if VERSIONS.contains(&version.as_str()) {
            Ok(())
        } else {
            Err(Refusal::new(
                code::INCOMPATIBLE_VERSION,
                format!("cniVersion {version} is not one of {}", VERSIONS.join(", ")),
            ))
        }
    };
    match request.command.as_str() {
        "ADD" => {
            written()?;
            add(request, &version, desk).await
        }
        // The sandbox's own driver takes the device and the attachment away, in its
        // order; a namespace that is deleted takes its device with it in any case.
        "DEL" => Ok(Value::Null),
        "CHECK" => {
            written()?;
            let ifname = request.ifname;
            check(&request.netns, &ifname)
        }
        // Who asks has reached us. There is nothing that only the plugin would know to
        // collect: a sandbox's driver, or the sweep at the start, takes all of it away.
        "STATUS" | "GC" => written().map(|()| Value::Null),
        other => Err(Refusal::new(
            code::INVALID_ENVIRONMENT,
            format!("CNI_COMMAND {other:?} is unknown"),
        )),
    }
}

/// Whether a namespace that was joined still is one.
fn check(netns: &str, ifname: &str) -> Result<Value, Refusal> {
    let path = path_of(netns)?;
    let netns = mesh_runtime::netns::Netns::open(path)
        .map_err(|e| Refusal::new(code::FAILED, format!("CNI_NETNS cannot be opened: {e}")))?;
    let there = netns
        .enter(|| nix::net::if_::if_nametoindex(ifname).map_err(Into::into))
        .map(drop);
    there
        .map(|()| Value::Null)
        .map_err(|e| Refusal::new(code::FAILED, format!("the pod has no device {ifname}: {e}")))
}

fn path_of(netns: &str) -> Result<PathBuf, Refusal> {
    let path = PathBuf::from(netns);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Refusal::new(
            code::INVALID_ENVIRONMENT,
            "CNI_NETNS must be an absolute path",
        ))
    }
}

async fn add(request: Request, version: &str, desk: &Desk) -> Result<Value, Refusal> {
    let netns = path_of(&request.netns)?;
    if request.ifname != crate::network::POD_DEVICE {
        return Err(Refusal::new(
            code::INVALID_ENVIRONMENT,
            format!(
                "CNI_IFNAME {:?} is not {}",
                request.ifname,
                crate::network::POD_DEVICE
            ),
        ));
    }
    let uid = argument(&request.args, "K8S_POD_UID")
        .ok_or_else(|| Refusal::new(code::INVALID_ENVIRONMENT, "CNI_ARGS has no K8S_POD_UID"))?;
    let name = argument(&request.args, "K8S_POD_NAME").unwrap_or("?");
    let namespace = argument(&request.args, "K8S_POD_NAMESPACE").unwrap_or("?");
    let pod = PodUid::parse("K8S_POD_UID", uid)
        .map_err(|e| Refusal::new(code::INVALID_ENVIRONMENT, e.to_string()))?;
    let not_expected = || {
        Refusal::new(
            code::NOT_EXPECTED,
            format!("no sandbox of pod {namespace}/{name} ({pod}) is being started on this host"),
        )
    };
    let driver = desk.of(&pod).ok_or_else(not_expected)?;
    let (answer, joined) = oneshot::channel();
    driver
        .send(Add {
            sandbox: request.container_id,
            netns: netns.clone(),
            answer,
        })
        .await
        .map_err(|_| not_expected())?;
    let joined = tokio::time::timeout(WORK, joined)
        .await
        .map_err(|_| Refusal::new(code::TRY_AGAIN, "the pod was not joined to its network in time"))?
        .map_err(|_| not_expected())?
        .map_err(|message| Refusal::new(code::FAILED, message))?;
    let mac = joined.mac.map(|byte| format!("{byte:02x}")).join(":");
    Ok(json!({
        "cniVersion": version,
        "interfaces": [{
            "name": request.ifname,
            "mac": mac,
            "mtu": joined.mtu,
            "sandbox": netns,
        }],
        "ips": [{
            "interface": 0,
            "address": format!("{}/32", joined.address),
            "gateway": joined.gateway,
        }],
        "routes": [{"dst": "0.0.0.0/0", "gw": joined.gateway}],
        "dns": {},
    }))
}

/// A value of `CNI_ARGS`: `A=1;B=2`.
fn argument<'a>(arguments: &'a str, name: &str) -> Option<&'a str> {
    arguments
        .split(';')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests;
