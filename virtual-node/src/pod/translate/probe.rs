//! Probes and lifecycle hooks, with named ports looked up.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Probe as PodProbe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use pool_agent_api::spec::{Action, Hook, HttpAction, HttpHeader, Probe, Thresholds};

use super::Untranslatable;

pub(super) fn probe(container: &Container, probe: &PodProbe, at: &str) -> Result<Probe, Untranslatable> {
    let action = if let Some(exec) = &probe.exec {
        Action::Exec {
            command: exec.command.clone().unwrap_or_default(),
        }
    } else if let Some(get) = &probe.http_get {
        Action::Http(http(container, get, &format!("{at}.httpGet"))?)
    } else if let Some(tcp) = &probe.tcp_socket {
        Action::Tcp {
            host: filled(tcp.host.as_ref()),
            port: port(container, &tcp.port, &format!("{at}.tcpSocket.port"))?,
        }
    } else if let Some(grpc) = &probe.grpc {
        if let Some(mode) = grpc
            .mode
            .as_deref()
            .filter(|m| !m.is_empty() && *m != "Plaintext")
        {
            return Err(Untranslatable::unsupported(
                format!("{at}.grpc.mode"),
                format_args!("{mode:?} is not supported"),
            ));
        }
        Action::Grpc {
            port: number(i64::from(grpc.port), &format!("{at}.grpc.port"))?,
            service: grpc.service.clone().unwrap_or_default(),
        }
    } else {
        return Err(Untranslatable::unsupported(
            at,
            "names no action that is supported",
        ));
    };
    // The API server's defaults, for pods that came past it.
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(
            value
                .and_then(|v| u64::try_from(v).ok())
                .filter(|v| *v > 0)
                .unwrap_or(default),
        )
    };
    let count = |value: Option<i32>, default: u32| {
        value
            .and_then(|v| u32::try_from(v).ok())
            .filter(|v| *v > 0)
            .unwrap_or(default)
    };
    Ok(Probe {
        action,
        initial_delay: seconds(probe.initial_delay_seconds, 0),
        period: seconds(probe.period_seconds, 10),
        timeout: seconds(probe.timeout_seconds, 1),
        thresholds: Thresholds {
            success: count(probe.success_threshold, 1),
            failure: count(probe.failure_threshold, 3),
        },
        termination_grace: probe
            .termination_grace_period_seconds
            .and_then(|s| u64::try_from(s).ok())
            .map(Duration::from_secs),
    })
}

pub(super) fn hook(container: &Container, hook: &LifecycleHandler, at: &str) -> Result<Hook, Untranslatable> {
    if let Some(exec) = &hook.exec {
        Ok(Hook::Exec {
            command: exec.command.clone().unwrap_or_default(),
        })
    } else if let Some(get) = &hook.http_get {
        Ok(Hook::Http(http(container, get, &format!("{at}.httpGet"))?))
    } else if let Some(sleep) = &hook.sleep {
        Ok(Hook::Sleep(Duration::from_secs(
            u64::try_from(sleep.seconds).unwrap_or(0),
        )))
    } else if let Some(tcp) = &hook.tcp_socket {
        Ok(Hook::Tcp {
            host: filled(tcp.host.as_ref()),
            port: port(container, &tcp.port, &format!("{at}.tcpSocket.port"))?,
        })
    } else {
        Err(Untranslatable::unsupported(
            at,
            "names no action that is supported",
        ))
    }
}

fn http(container: &Container, get: &HTTPGetAction, at: &str) -> Result<HttpAction, Untranslatable> {
    let tls = match get.scheme.as_deref() {
        None | Some("" | "HTTP") => false,
        Some("HTTPS") => true,
        Some(other) => {
            return Err(Untranslatable::unsupported(
                format!("{at}.scheme"),
                format_args!("{other:?} is not HTTP or HTTPS"),
            ));
        }
    };
    if let Some(protocol) = get.protocol.as_deref().filter(|p| !p.is_empty() && *p != "HTTP1") {
        return Err(Untranslatable::unsupported(
            format!("{at}.protocol"),
            format_args!("{protocol:?} is not supported"),
        ));
    }
    Ok(HttpAction {
        host: filled(get.host.as_ref()),
        port: port(container, &get.port, &format!("{at}.port"))?,
        path: filled(get.path.as_ref()).unwrap_or_else(|| "/".into()),
        tls,
        headers: get
            .http_headers
            .iter()
            .flatten()
            .map(|h| HttpHeader {
                name: h.name.clone(),
                value: h.value.clone(),
            })
            .collect(),
    })
}

fn filled(text: Option<&String>) -> Option<String> {
    text.filter(|t| !t.is_empty()).cloned()
}

fn port(container: &Container, port: &IntOrString, at: &str) -> Result<u16, Untranslatable> {
    match port {
        IntOrString::Int(port) => number(i64::from(*port), at),
        IntOrString::String(name) => {
            if let Ok(port) = name.parse::<u16>() {
                return number(i64::from(port), at);
            }
            let named = container
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_deref() == Some(name))
                .ok_or_else(|| {
                    Untranslatable::unsupported(
                        at,
                        format_args!("no port of the container is named {name:?}"),
                    )
                })?;
            number(i64::from(named.container_port), at)
        }
    }
}

fn number(port: i64, at: &str) -> Result<u16, Untranslatable> {
    u16::try_from(port)
        .ok()
        .filter(|p| *p != 0)
        .ok_or_else(|| Untranslatable::unsupported(at, format_args!("{port} is not a port (1 to 65535)")))
}
