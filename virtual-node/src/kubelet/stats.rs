//! `/stats/summary` and `/metrics/resource`: what the pods use, asked of the
//! hosts at the moment of the question.
//!
//! Names and shapes are a kubelet's (`k8s.io/kubelet/pkg/apis/stats/v1alpha1`;
//! metrics-server reads `/metrics/resource`). The node's own usage is the sum of
//! its pods': there is no machine that could use more.

use std::fmt::Write;

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures::future::join_all;
use jiff::Timestamp;
use pool_agent_api::{status::timestamp, wire};
use serde_json::{Value, json};
use tracing::warn;

use super::Context;

pub(super) async fn summary(State(context): State<Context>) -> Json<Value> {
    let usage = Usage::ask(&context).await;
    Json(usage.summary(&context.node_name, Timestamp::now()))
}

pub(super) async fn resource(State(context): State<Context>) -> Response {
    let usage = Usage::ask(&context).await;
    let text = usage.exposition(Timestamp::now());
    (
        StatusCode::OK,
        [("content-type", "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}

#[derive(Debug, Default)]
struct Usage {
    pods: Vec<wire::SandboxStats>,
    /// A host did not answer: sums are too low.
    incomplete: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Sum {
    cpu_nanos: u64,
    working_set: u64,
}

impl Sum {
    fn add(&mut self, container: &wire::ContainerStats) {
        self.cpu_nanos = self.cpu_nanos.saturating_add(container.cpu_usage_core_nanos);
        self.working_set = self
            .working_set
            .saturating_add(container.memory_working_set_bytes);
    }

    fn of<'a>(containers: impl IntoIterator<Item = &'a wire::ContainerStats>) -> Self {
        let mut sum = Self::default();
        for container in containers {
            sum.add(container);
        }
        sum
    }

    fn json(self, at: &str) -> (Value, Value) {
        (
            json!({"time": at, "usageCoreNanoSeconds": self.cpu_nanos}),
            json!({"time": at, "workingSetBytes": self.working_set}),
        )
    }
}

/// Absent where the host sent none, or one that no clock shows.
fn time(at: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    at.and_then(|at| timestamp("at", *at).ok())
}

impl Usage {
    async fn ask(context: &Context) -> Self {
        let answers = join_all(
            context
                .pool
                .hosts()
                .into_iter()
                .map(async |host| (host.name().clone(), host.stats().await)),
        );
        let mut usage = Self::default();
        for (host, answer) in answers.await {
            match answer {
                Ok(pods) => usage.pods.extend(pods),
                Err(error) => {
                    warn!(%host, error = &error as &dyn std::error::Error, "no usage from a host");
                    usage.incomplete = true;
                }
            }
        }
        // What pods are called comes from hosts: it is escaped where it is printed.
        usage
            .pods
            .sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        usage
    }

    fn all(&self) -> Sum {
        Sum::of(self.pods.iter().flat_map(|p| &p.containers))
    }

    fn summary(&self, node_name: &str, now: Timestamp) -> Value {
        let (cpu, memory) = self.all().json(&now.to_string());
        let pods: Vec<_> = self.pods.iter().map(pod_summary).collect();
        json!({"node": {"nodeName": node_name, "cpu": cpu, "memory": memory}, "pods": pods})
    }

    fn exposition(&self, now: Timestamp) -> String {
        let mut page = Page::default();
        let pods = || self.pods.iter().map(|p| (p, time(p.at.as_ref()).unwrap_or(now)));
        let containers = || pods().flat_map(|(p, at)| p.containers.iter().map(move |c| (p, c, at)));

        page.family(
            "container_cpu_usage_seconds_total",
            "counter",
            "Cumulative CPU time of the container",
        );
        for (p, c, at) in containers() {
            page.sample(
                &[
                    ("container", &c.name),
                    ("namespace", &p.namespace),
                    ("pod", &p.name),
                ],
                seconds(c.cpu_usage_core_nanos),
                at,
            );
        }
        page.family(
            "container_memory_working_set_bytes",
            "gauge",
            "Working set of the container",
        );
        for (p, c, at) in containers() {
            page.sample(
                &[
                    ("container", &c.name),
                    ("namespace", &p.namespace),
                    ("pod", &p.name),
                ],
                c.memory_working_set_bytes as f64,
                at,
            );
        }
        page.family(
            "container_start_time_seconds",
            "gauge",
            "Start of the container since the epoch",
        );
        for (p, c, at) in containers() {
            if let Some(started) = time(c.started_at.as_ref()) {
                page.sample(
                    &[
                        ("container", &c.name),
                        ("namespace", &p.namespace),
                        ("pod", &p.name),
                    ],
                    started.as_millisecond() as f64 / 1e3,
                    at,
                );
            }
        }
        page.family(
            "pod_cpu_usage_seconds_total",
            "counter",
            "Cumulative CPU time of the pod",
        );
        for (p, at) in pods() {
            page.sample(
                &[("namespace", &p.namespace), ("pod", &p.name)],
                seconds(Sum::of(&p.containers).cpu_nanos),
                at,
            );
        }
        page.family("pod_memory_working_set_bytes", "gauge", "Working set of the pod");
        for (p, at) in pods() {
            page.sample(
                &[("namespace", &p.namespace), ("pod", &p.name)],
                Sum::of(&p.containers).working_set as f64,
                at,
            );
        }
        page.family(
            "node_cpu_usage_seconds_total",
            "counter",
            "Cumulative CPU time of the node's pods",
        );
        page.sample(&[], seconds(self.all().cpu_nanos), now);
        page.family(
            "node_memory_working_set_bytes",
            "gauge",
            "Working set of the node's pods",
        );
        page.sample(&[], self.all().working_set as f64, now);
        page.family("scrape_error", "gauge", "1 if a host of the pool did not answer");
        page.plain(f64::from(u8::from(self.incomplete)));
        page.text
    }
}

fn pod_summary(pod: &wire::SandboxStats) -> Value {
    let text = |at: Option<&prost_types::Timestamp>| time(at).map(|t| t.to_string());
    let at = text(pod.at.as_ref()).unwrap_or_default();
    let (cpu, memory) = Sum::of(&pod.containers).json(&at);
    let containers: Vec<_> = pod
        .containers
        .iter()
        .map(|c| {
            let at = text(c.at.as_ref());
            json!({
                "name": c.name,
                "startTime": text(c.started_at.as_ref()),
                "cpu": {"time": at, "usageCoreNanoSeconds": c.cpu_usage_core_nanos},
                "memory": {
                    "time": at,
                    "workingSetBytes": c.memory_working_set_bytes,
                    "usageBytes": c.memory_usage_bytes,
                    "rssBytes": c.memory_rss_bytes,
                },
            })
        })
        .collect();
    json!({
        "podRef": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": pod.key.as_ref().map(|k| &k.pod_uid),
        },
        "startTime": text(pod.started_at.as_ref()),
        "containers": containers,
        "cpu": cpu,
        "memory": memory,
    })
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// The text exposition format; samples here bear the time they were taken, as a
/// kubelet's do, which `prometheus-client` has no way to write.
#[derive(Default)]
struct Page {
    text: String,
    name: &'static str,
}

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64, at: Timestamp) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
            .collect();
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        let name = self.name;
        self.write(format_args!("{name}{labels} {value} {}\n", at.as_millisecond()));
    }

    fn plain(&mut self, value: f64) {
        let name = self.name;
        self.write(format_args!("{name} {value}\n"));
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        // A String takes all that is written to it.
        self.text.write_fmt(text).unwrap_or_default();
    }
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage() -> Usage {
        let at = Some(prost_types::Timestamp {
            seconds: 100,
            nanos: 0,
        });
        let container = |name: &str| wire::ContainerStats {
            name: name.into(),
            started_at: Some(prost_types::Timestamp {
                seconds: 90,
                nanos: 0,
            }),
            at,
            cpu_usage_core_nanos: 1_500_000_000,
            memory_working_set_bytes: 1024,
            memory_rss_bytes: 512,
            memory_usage_bytes: 2048,
        };
        Usage {
            pods: vec![wire::SandboxStats {
                key: Some(wire::SandboxKey {
                    pod_uid: "u".into(),
                    attempt: 1,
                }),
                namespace: "shop".into(),
                name: "we\"b".into(),
                at,
                started_at: at,
                containers: vec![container("a"), container("b")],
            }],
            incomplete: false,
        }
    }

    #[test]
    fn a_summary_sums_what_pods_use() {
        let summary = usage().summary("node", Timestamp::from_second(200).unwrap());
        assert_eq!(summary["node"]["cpu"]["usageCoreNanoSeconds"], 3_000_000_000u64);
        assert_eq!(summary["pods"][0]["podRef"]["uid"], "u");
        assert_eq!(summary["pods"][0]["memory"]["workingSetBytes"], 2048);
        assert_eq!(
            summary["pods"][0]["containers"][1]["startTime"],
            "1970-01-01T00:01:30Z"
        );
    }

    #[test]
    fn resource_metrics_are_a_kubelets_and_labels_are_escaped() {
        let page = usage().exposition(Timestamp::from_second(200).unwrap());
        for line in [
            r#"container_cpu_usage_seconds_total{container="a",namespace="shop",pod="we\"b"} 1.5 100000"#,
            r#"pod_memory_working_set_bytes{namespace="shop",pod="we\"b"} 2048 100000"#,
            "node_cpu_usage_seconds_total 3 200000",
            "scrape_error 0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} not in\n{page}");
        }
    }
}
