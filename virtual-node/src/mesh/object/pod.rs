use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1 as core;
use mesh_api::istio::workload::WorkloadType;
use pool_agent_api::PodUid;

use super::{DataplaneMode, Key};

/// A pod that has an address and has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub key: Key,
    pub uid: PodUid,
    pub addresses: Vec<IpAddr>,
    pub service_account: Arc<str>,
    pub node: Arc<str>,
    pub network: NetworkMode,
    pub readiness: Readiness,
    pub mode: Option<DataplaneMode>,
    pub workload_type: WorkloadType,
    pub workload_name: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// An address of its own.
    Pod,
    /// It shares its node's.
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Also a pod that is being deleted, whatever its condition says.
    NotReady,
}

impl Pod {
    /// None if the pod is no workload: it has no address yet, or has ended, or is
    /// garbage that no API server sends.
    pub fn parse(pod: &core::Pod) -> Option<Self> {
        let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let addresses: Vec<IpAddr> = match status.pod_ips.as_deref() {
            Some(ips) if !ips.is_empty() => ips
                .iter()
                .map(|ip| ip.ip.parse())
                .collect::<Result<_, _>>()
                .ok()?,
            _ => vec![status.pod_ip.as_deref()?.parse().ok()?],
        };
        let meta = &pod.metadata;
        let key = Key::of(meta)?;
        let (workload_type, workload_name) = workload(pod, &key.name);
        let label = |names: [&str; 3]| {
            let labels = meta.labels.as_ref()?;
            names
                .into_iter()
                .find_map(|name| labels.get(name))
                .map(String::as_str)
        };
        // Istio's order of preference.
        let canonical_name = label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .map_or_else(|| Arc::clone(&workload_name), Arc::from);
        let canonical_revision = label([
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ])
        .unwrap_or("latest");
        Some(Self {
            uid: PodUid::parse("metadata.uid", meta.uid.clone()?).ok()?,
            addresses,
            service_account: spec.service_account_name.as_deref().unwrap_or("default").into(),
            node: spec.node_name.as_deref().unwrap_or_default().into(),
            network: match spec.host_network {
                Some(true) => NetworkMode::Host,
                _ => NetworkMode::Pod,
            },
            readiness: readiness(pod, status),
            mode: DataplaneMode::of(meta),
            workload_type,
            canonical_name,
            canonical_revision: canonical_revision.into(),
            workload_name,
            key,
        })
    }
}

fn readiness(pod: &core::Pod, status: &core::PodStatus) -> Readiness {
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    if ready && pod.metadata.deletion_timestamp.is_none() {
        Readiness::Ready
    } else {
        Readiness::NotReady
    }
}

/// What the pod is a replica of, told from its controller's name as Istio does: a
/// Deployment's ReplicaSet ends in the template's hash, a CronJob's Job in its time.
fn workload(pod: &core::Pod, own_name: &Arc<str>) -> (WorkloadType, Arc<str>) {
    let meta = &pod.metadata;
    let label = |name: &str| Some(meta.labels.as_ref()?.get(name)?.as_str());
    let controller = meta
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true));
    let (kind, name) = match controller {
        None => (WorkloadType::Pod, Arc::clone(own_name)),
        Some(owner) => match owner.kind.as_str() {
            "ReplicaSet" => match label("pod-template-hash")
                .and_then(|hash| owner.name.strip_suffix(hash))
                .and_then(|rest| rest.strip_suffix('-'))
            {
                Some(deployment) => (WorkloadType::Deployment, deployment.into()),
                None => (WorkloadType::Pod, owner.name.as_str().into()),
            },
            "Job" => match cron_job(&owner.name) {
                Some(cron_job) => (WorkloadType::Cronjob, cron_job.into()),
                None => (WorkloadType::Job, owner.name.as_str().into()),
            },
            _ => (WorkloadType::Pod, owner.name.as_str().into()),
        },
    };
    match label("service.istio.io/workload-name") {
        Some(told) => (kind, told.into()),
        None => (kind, name),
    }
}

/// `report-28374650` is a job of the cron job `report`: the suffix is minutes since
/// the epoch (8 digits until 2160, or seconds in old versions: 10).
fn cron_job(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    ((8..=10).contains(&time.len()) && time.bytes().all(|c| c.is_ascii_digit()) && !name.is_empty())
        .then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(patch: serde_json::Value) -> Option<Pod> {
        let mut pod = json!({
            "metadata": {"name": "web-5d9c-x", "namespace": "shop", "uid": "u-1"},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIP": "10.77.1.2"},
        });
        merge(&mut pod, patch);
        Pod::parse(&serde_json::from_value(pod).unwrap())
    }

    fn merge(into: &mut serde_json::Value, patch: serde_json::Value) {
        match (into, patch) {
            (serde_json::Value::Object(into), serde_json::Value::Object(patch)) => {
                for (name, value) in patch {
                    merge(into.entry(name).or_insert(serde_json::Value::Null), value);
                }
            }
            (into, patch) => *into = patch,
        }
    }

    #[test]
    fn a_pod_without_an_address_or_after_its_end_is_no_workload() {
        assert!(parse(json!({})).is_some());
        for patch in [
            json!({"status": {"podIP": null}}),
            json!({"status": {"podIP": "nonsense"}}),
            json!({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "x"}]}}),
            json!({"status": {"phase": "Succeeded"}}),
            json!({"status": {"phase": "Failed"}}),
            json!({"status": null}),
            json!({"metadata": {"uid": "../x"}}),
        ] {
            assert_eq!(parse(patch.clone()), None, "{patch}");
        }
    }

    #[test]
    fn a_pod_is_ready_only_while_it_is_not_being_deleted() {
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let readiness = |patch| parse(patch).unwrap().readiness;
        assert_eq!(readiness(json!({})), Readiness::NotReady);
        assert_eq!(
            readiness(json!({"status": {"conditions": ready}})),
            Readiness::Ready
        );
        assert_eq!(
            readiness(json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}})),
            Readiness::NotReady
        );
        assert_eq!(
            readiness(
                json!({"status": {"conditions": ready}, "metadata": {"deletionTimestamp": "2026-11-01T00:00:00Z"}})
            ),
            Readiness::NotReady
        );
    }

    #[test]
    fn a_workload_is_named_by_its_controller() {
        let owner = |kind: &str, name: &str| json!([{"apiVersion": "v1", "kind": kind, "name": name, "uid": "o", "controller": true}]);
        let named = |meta: serde_json::Value| {
            let pod = parse(json!({"metadata": meta})).unwrap();
            (pod.workload_type, pod.workload_name.to_string())
        };
        let is = |kind, name: &str| (kind, name.to_owned());
        assert_eq!(named(json!({})), is(WorkloadType::Pod, "web-5d9c-x"));
        assert_eq!(
            named(
                json!({"labels": {"pod-template-hash": "5d9c"}, "ownerReferences": owner("ReplicaSet", "web-5d9c")})
            ),
            is(WorkloadType::Deployment, "web")
        );
        assert_eq!(
            named(json!({"ownerReferences": owner("ReplicaSet", "web-5d9c")})),
            is(WorkloadType::Pod, "web-5d9c")
        );
        assert_eq!(
            named(json!({"ownerReferences": owner("Job", "report-28374650")})),
            is(WorkloadType::Cronjob, "report")
        );
        assert_eq!(
            named(json!({"ownerReferences": owner("Job", "migrate-2")})),
            is(WorkloadType::Job, "migrate-2")
        );
        assert_eq!(
            named(json!({"ownerReferences": owner("StatefulSet", "db")})),
            is(WorkloadType::Pod, "db")
        );
        assert_eq!(
            named(
                json!({"labels": {"service.istio.io/workload-name": "told"}, "ownerReferences": owner("StatefulSet", "db")})
            ),
            is(WorkloadType::Pod, "told")
        );
    }

    #[test]
    fn canonical_names_come_from_labels_in_istios_order() {
        let canonical = |labels| {
            let pod = parse(json!({"metadata": {"labels": labels}})).unwrap();
            (pod.canonical_name.to_string(), pod.canonical_revision.to_string())
        };
        let is = |name: &str, revision: &str| (name.to_owned(), revision.to_owned());
        assert_eq!(canonical(json!({})), is("web-5d9c-x", "latest"));
        assert_eq!(canonical(json!({"app": "a", "version": "v1"})), is("a", "v1"));
        assert_eq!(
            canonical(
                json!({"app": "a", "app.kubernetes.io/name": "b", "version": "v1", "app.kubernetes.io/version": "v2"})
            ),
            is("b", "v2")
        );
        assert_eq!(
            canonical(
                json!({"service.istio.io/canonical-name": "c", "app.kubernetes.io/name": "b",
                "service.istio.io/canonical-revision": "v3"})
            ),
            is("c", "v3")
        );
    }
}
