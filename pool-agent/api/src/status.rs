//! What a host reports of a sandbox. Whole each time it changes; the revision
//! orders reports of one sandbox.

use std::net::IpAddr;

use jiff::Timestamp;

use crate::{
    ContainerName, Invalid, Namespace, PodName, SandboxKey,
    invalid::{each, required},
    wire,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxStatus {
    pub key: SandboxKey,
    pub namespace: Namespace,
    pub name: PodName,
    /// The virtual node whose pod this is.
    pub node_name: String,
    /// Grows with each change, also over restarts of the agent.
    pub revision: u64,
    pub state: SandboxState,
    /// CamelCase; empty if there is nothing to say. E.g. `DeadlineExceeded`.
    pub reason: String,
    pub message: String,
    /// None until attached.
    pub pod_ip: Option<IpAddr>,
    pub host_ip: IpAddr,
    pub accepted_at: Timestamp,
    pub mesh: MeshState,
    /// SPIFFE id; None if not enrolled.
    pub identity: Option<String>,
    pub init_containers: Vec<ContainerStatus>,
    pub containers: Vec<ContainerStatus>,
    /// None while nobody has asked for its end.
    pub notice: Option<Notice>,
}

/// Notice that a sandbox has to end: its claim in the cell is being deleted, by a
/// drain, a preemption or the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// CamelCase.
    pub reason: String,
    /// Its host stops it then, if it is there yet.
    pub deadline: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SandboxState {
    /// Volumes, address, attachment; no container yet.
    Preparing,
    /// Containers may run, init containers included.
    Running,
    Stopping,
    /// No process is left and the address is free.
    Stopped,
}

/// `mesh-runtime`'s attachment states; `Detached` for a pod that opted out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MeshState {
    Detached,
    Redirected,
    Identified,
    Serving,
    Draining,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatus {
    pub name: ContainerName,
    pub image: String,
    /// Empty until pulled.
    pub image_id: String,
    /// `containerd://…`; empty until created.
    pub container_id: String,
    pub restart_count: u32,
    pub ready: bool,
    pub started: bool,
    pub state: ContainerState,
    pub last_terminated: Option<Terminated>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerState {
    Waiting {
        /// The kubelet's: `ContainerCreating`, `PodInitializing`, `ErrImagePull`,
        /// `ImagePullBackOff`, `CrashLoopBackOff`, …
        reason: String,
        message: String,
    },
    Running {
        started_at: Timestamp,
    },
    Terminated(Terminated),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminated {
    pub exit_code: i32,
    /// 0 if none.
    pub signal: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerCannotRun`.
    pub reason: String,
    pub message: String,
    /// None if it never started.
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    pub container_id: String,
}

/// An event for the tenant's `kubectl describe`; delivered at most once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEvent {
    pub key: SandboxKey,
    pub severity: Severity,
    /// The kubelet's reasons: `Pulling`, `Pulled`, `Created`, `Started`, …
    pub reason: String,
    pub message: String,
    pub container: Option<EventContainer>,
    pub at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    Normal,
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventContainer {
    pub name: ContainerName,
    pub init: bool,
}

/// A time as protobuf carries it; refused outside the years jiff can hold.
pub fn timestamp(field: &str, at: prost_types::Timestamp) -> Result<Timestamp, Invalid> {
    Timestamp::new(at.seconds, at.nanos).map_err(|e| Invalid::new(field, e))
}

/// The same, towards the wire.
pub fn wire_timestamp(at: Timestamp) -> prost_types::Timestamp {
    let (mut seconds, mut nanos) = (at.as_second(), at.subsec_nanosecond());
    // jiff truncates towards zero; protobuf wants nanos from 0 up.
    if nanos < 0 {
        seconds -= 1;
        nanos += 1_000_000_000;
    }
    prost_types::Timestamp { seconds, nanos }
}

/// Bytes of what is told to users; a container's last words are 4096 at most.
const MAX_MESSAGE: usize = 32 << 10;
/// Bytes of a reason, an image's name and the like.
const MAX_WORDS: usize = 4 << 10;
/// Containers in a status. The API server takes a Pod of 1.5 MiB at most.
const MAX_CONTAINERS: usize = 4096;

/// As much as is kept of a text: it is a host's word, and a host may have been stolen.
fn kept(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.shrink_to_fit();
    }
    text
}

fn few<T>(field: &str, list: Vec<T>) -> Result<Vec<T>, Invalid> {
    if list.len() > MAX_CONTAINERS {
        return Err(Invalid::new(
            field,
            format_args!("are {}, more than {MAX_CONTAINERS}", list.len()),
        ));
    }
    Ok(list)
}

impl TryFrom<wire::Terminated> for Terminated {
    type Error = Invalid;

    fn try_from(t: wire::Terminated) -> Result<Self, Invalid> {
        Ok(Self {
            exit_code: t.exit_code,
            signal: t.signal,
            reason: kept(t.reason, MAX_WORDS),
            message: kept(t.message, MAX_MESSAGE),
            started_at: t.started_at.map(|at| timestamp("started_at", at)).transpose()?,
            finished_at: timestamp("finished_at", required("finished_at", t.finished_at)?)?,
            container_id: kept(t.container_id, MAX_WORDS),
        })
    }
}

impl From<Terminated> for wire::Terminated {
    fn from(t: Terminated) -> Self {
        Self {
            exit_code: t.exit_code,
            signal: t.signal,
            reason: t.reason,
            message: t.message,
            started_at: t.started_at.map(wire_timestamp),
            finished_at: Some(wire_timestamp(t.finished_at)),
            container_id: t.container_id,
        }
    }
}

impl TryFrom<wire::ContainerStatus> for ContainerStatus {
    type Error = Invalid;

    fn try_from(c: wire::ContainerStatus) -> Result<Self, Invalid> {
        use wire::container_state::State;
        let state = match required("state", c.state)?.state {
            None => return Err(Invalid::missing("state")),
            Some(State::Waiting(w)) => ContainerState::Waiting {
                reason: kept(w.reason, MAX_WORDS),
                message: kept(w.message, MAX_MESSAGE),
            },
            Some(State::Running(r)) => ContainerState::Running {
                started_at: timestamp(
                    "state.running.started_at",
                    required("state.running.started_at", r.started_at)?,
                )?,
            },
            Some(State::Terminated(t)) => {
                ContainerState::Terminated(t.try_into().map_err(|e: Invalid| e.within("state.terminated"))?)
            }
        };
        let last_terminated = match c.last_state.and_then(|s| s.state) {
            None => None,
            Some(State::Terminated(t)) => Some(
                t.try_into()
                    .map_err(|e: Invalid| e.within("last_state.terminated"))?,
            ),
            Some(_) => return Err(Invalid::new("last_state", "must be terminated")),
        };
        Ok(Self {
            name: ContainerName::parse("name", c.name)?,
            image: kept(c.image, MAX_WORDS),
            image_id: kept(c.image_id, MAX_WORDS),
            container_id: kept(c.container_id, MAX_WORDS),
            restart_count: c.restart_count,
            ready: c.ready,
            started: c.started,
            state,
            last_terminated,
        })
    }
}

impl From<ContainerStatus> for wire::ContainerStatus {
    fn from(c: ContainerStatus) -> Self {
        use wire::container_state::State;
        let state = match c.state {
            ContainerState::Waiting { reason, message } => State::Waiting(wire::Waiting { reason, message }),
            ContainerState::Running { started_at } => State::Running(wire::Running {
                started_at: Some(wire_timestamp(started_at)),
            }),
            ContainerState::Terminated(t) => State::Terminated(t.into()),
        };
        Self {
            name: c.name.into(),
            image: c.image,
            image_id: c.image_id,
            container_id: c.container_id,
            restart_count: c.restart_count,
            ready: c.ready,
            started: c.started,
            state: Some(wire::ContainerState { state: Some(state) }),
            last_state: c.last_terminated.map(|t| wire::ContainerState {
                state: Some(State::Terminated(t.into())),
            }),
        }
    }
}

impl TryFrom<wire::SandboxStatus> for SandboxStatus {
    type Error = Invalid;

    fn try_from(s: wire::SandboxStatus) -> Result<Self, Invalid> {
        let ip = |field: &str, text: &str| -> Result<IpAddr, Invalid> {
            text.parse()
                .map_err(|_| Invalid::new(field, format_args!("{text:?} is not an IP address")))
        };
        let state = match s.state() {
            wire::SandboxState::Preparing => SandboxState::Preparing,
            wire::SandboxState::Running => SandboxState::Running,
            wire::SandboxState::Stopping => SandboxState::Stopping,
            wire::SandboxState::Stopped => SandboxState::Stopped,
            wire::SandboxState::Unspecified => return Err(Invalid::missing("state")),
        };
        let mesh = match s.mesh() {
            wire::MeshState::Detached => MeshState::Detached,
            wire::MeshState::Redirected => MeshState::Redirected,
            wire::MeshState::Identified => MeshState::Identified,
            wire::MeshState::Serving => MeshState::Serving,
            wire::MeshState::Draining => MeshState::Draining,
            wire::MeshState::Unspecified => return Err(Invalid::missing("mesh")),
        };
        Ok(Self {
            key: SandboxKey::from_wire(s.key)?,
            namespace: Namespace::parse("namespace", s.namespace)?,
            name: PodName::parse("name", s.name)?,
            node_name: kept(s.node_name, MAX_WORDS),
            revision: s.revision,
            state,
            reason: kept(s.reason, MAX_WORDS),
            message: kept(s.message, MAX_MESSAGE),
            pod_ip: if s.pod_ip.is_empty() {
                None
            } else {
                Some(ip("pod_ip", &s.pod_ip)?)
            },
            host_ip: ip("host_ip", &s.host_ip)?,
            accepted_at: timestamp("accepted_at", required("accepted_at", s.accepted_at)?)?,
            mesh,
            identity: Some(kept(s.identity, MAX_WORDS)).filter(|i| !i.is_empty()),
            init_containers: each(
                "init_containers",
                few("init_containers", s.init_containers)?,
                ContainerStatus::try_from,
            )?,
            containers: each(
                "containers",
                few("containers", s.containers)?,
                ContainerStatus::try_from,
            )?,
            notice: match s.notice {
                None => None,
                Some(notice) => Some(Notice {
                    reason: kept(notice.reason, MAX_WORDS),
                    deadline: timestamp("notice.deadline", required("notice.deadline", notice.deadline)?)?,
                }),
            },
        })
    }
}

impl From<SandboxStatus> for wire::SandboxStatus {
    fn from(s: SandboxStatus) -> Self {
        Self {
            key: Some(s.key.into()),
            namespace: s.namespace.into(),
            name: s.name.into(),
            node_name: s.node_name,
            revision: s.revision,
            state: match s.state {
                SandboxState::Preparing => wire::SandboxState::Preparing,
                SandboxState::Running => wire::SandboxState::Running,
                SandboxState::Stopping => wire::SandboxState::Stopping,
                SandboxState::Stopped => wire::SandboxState::Stopped,
            }
            .into(),
            reason: s.reason,
            message: s.message,
            pod_ip: s.pod_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            host_ip: s.host_ip.to_string(),
            accepted_at: Some(wire_timestamp(s.accepted_at)),
            mesh: match s.mesh {
                MeshState::Detached => wire::MeshState::Detached,
                MeshState::Redirected => wire::MeshState::Redirected,
                MeshState::Identified => wire::MeshState::Identified,
                MeshState::Serving => wire::MeshState::Serving,
                MeshState::Draining => wire::MeshState::Draining,
            }
            .into(),
            identity: s.identity.unwrap_or_default(),
            init_containers: s.init_containers.into_iter().map(Into::into).collect(),
            containers: s.containers.into_iter().map(Into::into).collect(),
            notice: s.notice.map(|notice| wire::Notice {
                reason: notice.reason,
                deadline: Some(wire_timestamp(notice.deadline)),
            }),
        }
    }
}

impl TryFrom<wire::PodEvent> for PodEvent {
    type Error = Invalid;

    fn try_from(e: wire::PodEvent) -> Result<Self, Invalid> {
        Ok(Self {
            key: SandboxKey::from_wire(e.key)?,
            severity: if e.warning {
                Severity::Warning
            } else {
                Severity::Normal
            },
            reason: kept(e.reason, MAX_WORDS),
            message: kept(e.message, MAX_MESSAGE),
            container: if e.container.is_empty() {
                None
            } else {
                Some(EventContainer {
                    name: ContainerName::parse("container", e.container)?,
                    init: e.init,
                })
            },
            at: timestamp("at", required("at", e.at)?)?,
        })
    }
}

impl From<PodEvent> for wire::PodEvent {
    fn from(e: PodEvent) -> Self {
        let init = e.container.as_ref().is_some_and(|c| c.init);
        Self {
            key: Some(e.key.into()),
            warning: e.severity == Severity::Warning,
            reason: e.reason,
            message: e.message,
            container: e.container.map(|c| c.name.into()).unwrap_or_default(),
            at: Some(wire_timestamp(e.at)),
            init,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_before_1970_has_its_nanos_from_zero_up() {
        let at = Timestamp::new(-1, -500_000_000).unwrap();
        let wire = wire_timestamp(at);
        assert_eq!((wire.seconds, wire.nanos), (-2, 500_000_000));
        assert_eq!(timestamp("at", wire).unwrap(), at);
    }

    #[test]
    fn a_hosts_words_are_kept_only_as_far_as_somebody_reads_them() {
        let text = "é".repeat(MAX_MESSAGE);
        let cut = kept(text, MAX_MESSAGE);
        assert!(
            cut.len() <= MAX_MESSAGE && cut.capacity() <= 2 * MAX_MESSAGE,
            "{}",
            cut.len()
        );
        let event = PodEvent::try_from(wire::PodEvent {
            key: Some(wire::SandboxKey {
                pod_uid: "u".into(),
                attempt: 1,
            }),
            reason: "x".repeat(1 << 20),
            message: "x".repeat(1 << 20),
            at: Some(wire_timestamp(Timestamp::UNIX_EPOCH)),
            ..wire::PodEvent::default()
        });
        let event = event.unwrap();
        assert_eq!(
            (event.reason.len(), event.message.len()),
            (MAX_WORDS, MAX_MESSAGE)
        );
        let many = vec![wire::ContainerStatus::default(); MAX_CONTAINERS + 1];
        assert!(few("containers", many).is_err());
    }

    #[test]
    fn a_status_survives_the_wire() {
        let at = Timestamp::from_second(1_700_000_000).unwrap();
        let terminated = Terminated {
            exit_code: 137,
            signal: 9,
            reason: "OOMKilled".into(),
            message: String::new(),
            started_at: Some(at),
            finished_at: at,
            container_id: "containerd://x".into(),
        };
        let status = SandboxStatus {
            key: SandboxKey {
                pod: "a-b".parse().unwrap(),
                attempt: crate::Attempt::FIRST,
            },
            namespace: "shop".parse().unwrap(),
            name: "web-0".parse().unwrap(),
            node_name: "node".into(),
            revision: 7,
            state: SandboxState::Running,
            reason: String::new(),
            message: String::new(),
            pod_ip: Some("10.77.1.2".parse().unwrap()),
            host_ip: "192.0.2.11".parse().unwrap(),
            accepted_at: at,
            mesh: MeshState::Serving,
            identity: Some("spiffe://cluster.local/ns/shop/sa/web".into()),
            init_containers: vec![],
            containers: vec![ContainerStatus {
                name: "app".parse().unwrap(),
                image: "busybox".into(),
                image_id: "sha256:1".into(),
                container_id: "containerd://y".into(),
                restart_count: 1,
                ready: true,
                started: true,
                state: ContainerState::Running { started_at: at },
                last_terminated: Some(terminated),
            }],
            notice: Some(Notice {
                reason: "ClaimDeleted".into(),
                deadline: at,
            }),
        };
        let wire = wire::SandboxStatus::from(status.clone());
        assert_eq!(SandboxStatus::try_from(wire).unwrap(), status);
    }
}
