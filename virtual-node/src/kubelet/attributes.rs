//! What a request asks to do, in the terms of an access review: pure.
//!
//! As a kubelet maps its paths (kubernetes.io, "Kubelet authentication and
//! authorization"): the subresources of `nodes` named stats, metrics and log, the
//! fine-grained healthz and pods, and proxy for the rest. Streams ask for
//! `create` whatever the method: a kubelet takes a WebSocket's GET for `get`.

use http::Method;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Attributes {
    pub(super) verb: &'static str,
    /// Subresources of `nodes`; any one of them suffices. In this order.
    pub(super) subresources: &'static [&'static str],
}

pub(super) fn of(method: &Method, path: &str) -> Attributes {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    let subresources: &[&str] = match first {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "healthz" => &["healthz", "proxy"],
        "pods" | "runningpods" => &["pods", "proxy"],
        _ => &["proxy"],
    };
    let verb = match first {
        "exec" | "attach" | "portForward" | "run" => "create",
        _ => match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "get",
        },
    };
    Attributes { verb, subresources }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_map_to_the_subresources_a_kubelet_asks_for() {
        let table: [(&str, &[&str]); 9] = [
            ("/stats/summary", &["stats"]),
            ("/metrics/resource", &["metrics"]),
            ("/logs/kubelet.log", &["log"]),
            ("/healthz", &["healthz", "proxy"]),
            ("/pods", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/containerLogs/a/b/c", &["proxy"]),
            ("/", &["proxy"]),
            ("//stats", &["stats"]),
        ];
        for (path, subresources) in table {
            let expected = Attributes {
                verb: "get",
                subresources,
            };
            assert_eq!(of(&Method::GET, path), expected, "{path}");
        }
    }

    #[test]
    fn what_runs_a_command_asks_for_create_whatever_the_method() {
        for path in [
            "/exec/a/b/c",
            "/attach/a/b/c",
            "/portForward/a/b",
            "/run/a/b/c",
            "//exec/a/b/c",
        ] {
            for method in [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS] {
                assert_eq!(of(&method, path).verb, "create", "{method} {path}");
            }
        }
    }
}
