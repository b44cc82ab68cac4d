//! Probes and lifecycle hooks.

use std::time::Duration;

use super::network::port;
use crate::{Invalid, invalid::required, wire};

/// What a probe or a hook does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Http(HttpAction),
    Tcp {
        /// None: the pod's own address.
        host: Option<String>,
        port: u16,
    },
    Exec {
        command: Vec<String>,
    },
    Grpc {
        port: u16,
        service: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAction {
    /// None: the pod's own address.
    pub host: Option<String>,
    pub port: u16,
    pub path: String,
    pub tls: bool,
    pub headers: Vec<HttpHeader>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpHeader {
    pub name: String,
    pub value: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub action: Action,
    pub initial_delay: Duration,
    /// At least a second.
    pub period: Duration,
    /// At least a second.
    pub timeout: Duration,
    pub thresholds: Thresholds,
    /// For the restart that a failed liveness or startup probe causes.
    pub termination_grace: Option<Duration>,
}

/// How many results in a row change the verdict; each at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    pub success: u32,
    pub failure: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    Http(HttpAction),
    Exec {
        command: Vec<String>,
    },
    Sleep(Duration),
    /// Kept for old pods; a kubelet only dials.
    Tcp {
        host: Option<String>,
        port: u16,
    },
}

fn host(text: String) -> Option<String> {
    Some(text).filter(|h| !h.is_empty())
}

impl TryFrom<wire::HttpAction> for HttpAction {
    type Error = Invalid;

    fn try_from(a: wire::HttpAction) -> Result<Self, Invalid> {
        Ok(Self {
            host: host(a.host),
            port: port("port", a.port)?,
            path: a.path,
            tls: a.tls,
            headers: a
                .headers
                .into_iter()
                .map(|h| HttpHeader {
                    name: h.name,
                    value: h.value,
                })
                .collect(),
        })
    }
}

impl From<HttpAction> for wire::HttpAction {
    fn from(a: HttpAction) -> Self {
        Self {
            host: a.host.unwrap_or_default(),
            port: a.port.into(),
            path: a.path,
            tls: a.tls,
            headers: a
                .headers
                .into_iter()
                .map(|h| wire::HttpHeader {
                    name: h.name,
                    value: h.value,
                })
                .collect(),
        }
    }
}

fn command(action: wire::ExecAction) -> Result<Vec<String>, Invalid> {
    if action.command.is_empty() {
        return Err(Invalid::new("exec.command", "must hold at least the program"));
    }
    Ok(action.command)
}

impl TryFrom<wire::Probe> for Probe {
    type Error = Invalid;

    fn try_from(p: wire::Probe) -> Result<Self, Invalid> {
        use wire::probe::Action as W;
        let at_least_one = |field: &str, n: u32| {
            if n == 0 {
                Err(Invalid::new(field, "must be at least 1"))
            } else {
                Ok(n)
            }
        };
        let action = match required("action", p.action)? {
            W::Http(a) => Action::Http(a.try_into().map_err(|e: Invalid| e.within("http"))?),
            W::Tcp(a) => Action::Tcp {
                host: host(a.host),
                port: port("tcp.port", a.port)?,
            },
            W::Exec(a) => Action::Exec { command: command(a)? },
            W::Grpc(a) => Action::Grpc {
                port: port("grpc.port", a.port)?,
                service: a.service,
            },
        };
        Ok(Self {
            action,
            initial_delay: Duration::from_secs(p.initial_delay_seconds.into()),
            period: Duration::from_secs(at_least_one("period_seconds", p.period_seconds)?.into()),
            timeout: Duration::from_secs(at_least_one("timeout_seconds", p.timeout_seconds)?.into()),
            thresholds: Thresholds {
                success: at_least_one("success_threshold", p.success_threshold)?,
                failure: at_least_one("failure_threshold", p.failure_threshold)?,
            },
            termination_grace: p.termination_grace_seconds.map(Duration::from_secs),
        })
    }
}

impl From<Probe> for wire::Probe {
    fn from(p: Probe) -> Self {
        use wire::probe::Action as W;
        let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
        Self {
            action: Some(match p.action {
                Action::Http(a) => W::Http(a.into()),
                Action::Tcp { host, port } => W::Tcp(wire::TcpAction {
                    host: host.unwrap_or_default(),
                    port: port.into(),
                }),
                Action::Exec { command } => W::Exec(wire::ExecAction { command }),
                Action::Grpc { port, service } => W::Grpc(wire::GrpcAction {
                    port: port.into(),
                    service,
                }),
            }),
            initial_delay_seconds: seconds(p.initial_delay),
            period_seconds: seconds(p.period),
            timeout_seconds: seconds(p.timeout),
            success_threshold: p.thresholds.success,
            failure_threshold: p.thresholds.failure,
            termination_grace_seconds: p.termination_grace.map(|d| d.as_secs()),
        }
    }
}

impl TryFrom<wire::Hook> for Hook {
    type Error = Invalid;

    fn try_from(h: wire::Hook) -> Result<Self, Invalid> {
        use wire::hook::Action as W;
        Ok(match required("action", h.action)? {
            W::Http(a) => Self::Http(a.try_into().map_err(|e: Invalid| e.within("http"))?),
            W::Exec(a) => Self::Exec { command: command(a)? },
            W::SleepSeconds(s) => Self::Sleep(Duration::from_secs(s)),
            W::Tcp(a) => Self::Tcp {
                host: host(a.host),
                port: port("tcp.port", a.port)?,
            },
        })
    }
}

impl From<Hook> for wire::Hook {
    fn from(h: Hook) -> Self {
        use wire::hook::Action as W;
        Self {
            action: Some(match h {
                Hook::Http(a) => W::Http(a.into()),
                Hook::Exec { command } => W::Exec(wire::ExecAction { command }),
                Hook::Sleep(d) => W::SleepSeconds(d.as_secs()),
                Hook::Tcp { host, port } => W::Tcp(wire::TcpAction {
                    host: host.unwrap_or_default(),
                    port: port.into(),
                }),
            }),
        }
    }
}
