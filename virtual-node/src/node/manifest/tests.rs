use std::sync::Arc;

use pool_agent_api::{Host, Pressure};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;
use crate::{config::TaintEffect, pool::HostView};

fn identity() -> Identity {
    Identity {
        name: "spindrift-demo".into(),
        tenant: "demo".parse().unwrap(),
        address: "192.0.2.2".parse().unwrap(),
        kubelet_port: 10250,
        settings: config::Node {
            labels: BTreeMap::from([("zone".into(), "a".into())]),
            taints: vec![config::Taint {
                key: "virtual-kubelet.io/provider".into(),
                value: "spindrift".into(),
                effect: TaintEffect::NoSchedule,
            }],
            quota: None,
        },
    }
}

fn hosts(reachable: [bool; 2]) -> HostTable {
    reachable
        .into_iter()
        .enumerate()
        .map(|(i, reachable)| {
            let host = Host {
                name: format!("host-{i}").parse().unwrap(),
                version: "0.1.0".into(),
                boot_id: "b".into(),
                address: "192.0.2.11".parse().unwrap(),
                capacity: Resources {
                    cpu_millis: 1500,
                    memory_bytes: 2 << 30,
                    ephemeral_storage_bytes: 4 << 30,
                    sandboxes: 110,
                },
                allocatable: Resources {
                    cpu_millis: 1400,
                    memory_bytes: 1 << 30,
                    ephemeral_storage_bytes: 2 << 30,
                    sandboxes: 110,
                },
                free: Resources::default(),
                pressure: Pressure::default(),
                runtime_version: "containerd://2.2.3".into(),
                kernel_version: "6.18.0".into(),
                os_image: "Debian".into(),
                architecture: "arm64".into(),
            };
            let view = HostView {
                reachable,
                host: Some(Arc::new(host)),
            };
            (format!("host-{i}").parse().unwrap(), view)
        })
        .collect()
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn shape(hosts: &HostTable, node: &Node, now: i64) -> Shape {
    Shape::new(&identity(), hosts, &Standing::of_hosts(hosts), node, at(now))
}

#[test]
fn the_node_is_what_the_pool_is() {
    let node = shape(&hosts([true, true]), &Node::default(), 0).node();
    insta::assert_json_snapshot!(node);
}

#[test]
fn a_settled_node_is_not_written_until_a_heartbeat_is_due() {
    let hosts = hosts([true, true]);
    let node = shape(&hosts, &Node::default(), 0).node();
    assert_eq!(shape(&hosts, &node, 10).status_patch(&node, false), None);
    let beat = shape(&hosts, &node, 300).status_patch(&node, true).unwrap();
    let named: Vec<_> = beat["status"].as_object().unwrap().keys().collect();
    assert_eq!(named, ["conditions"]);
    let ready = beat["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["type"] == "Ready")
        .unwrap();
    let times = (&ready["lastTransitionTime"], &ready["lastHeartbeatTime"]);
    assert_eq!(times.0, &serde_json::to_value(Time(at(0))).unwrap());
    assert_eq!(times.1, &serde_json::to_value(Time(at(300))).unwrap());
}

#[test]
fn a_host_out_of_reach_shrinks_what_may_be_used_and_the_last_one_ends_readiness() {
    let node = shape(&hosts([true, true]), &Node::default(), 0).node();
    let one = shape(&hosts([true, false]), &node, 10);
    assert!(one.ready());
    let patch = one.status_patch(&node, false).unwrap();
    assert_eq!(patch["status"]["allocatable"]["cpu"], "1400m");
    assert_eq!(patch["status"].get("capacity"), None);
    let none = shape(&hosts([false, false]), &node, 20);
    assert!(!none.ready());
    let patch = none.status_patch(&node, false).unwrap();
    let ready = patch["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["type"] == "Ready")
        .unwrap();
    assert_eq!(
        (&ready["status"], &ready["reason"]),
        (&json!("False"), &json!("PoolUnreachable"))
    );
    assert_eq!(
        ready["lastTransitionTime"],
        serde_json::to_value(Time(at(20))).unwrap()
    );
}

#[test]
fn what_others_wrote_survives_and_what_they_changed_of_ours_is_written_again() {
    let hosts = hosts([true, true]);
    let mut node = shape(&hosts, &Node::default(), 0).node();
    let labels = node.metadata.labels.as_mut().unwrap();
    labels.insert("mine".into(), "yes".into());
    let status = node.status.as_mut().unwrap();
    let conditions = status.conditions.as_mut().unwrap();
    conditions.push(NodeCondition {
        type_: "FrequentRestarts".into(),
        status: "False".into(),
        ..NodeCondition::default()
    });
    let shape_now = shape(&hosts, &node, 10);
    assert_eq!(shape_now.metadata_patch(&node), None);
    assert_eq!(shape_now.status_patch(&node, false), None);
    // As the node controller does to a silent node.
    let mut node = node.clone();
    let conditions = node.status.as_mut().unwrap().conditions.as_mut().unwrap();
    let ready = conditions.iter_mut().find(|c| c.type_ == "Ready").unwrap();
    ready.status = "Unknown".into();
    node.metadata.labels.as_mut().unwrap().remove("type");
    let shape_now = shape(&hosts, &node, 20);
    assert!(shape_now.status_patch(&node, false).is_some());
    let labels = shape_now.metadata_patch(&node).unwrap();
    assert_eq!(labels["metadata"]["labels"], json!({"type": "virtual-kubelet"}));
}

#[test]
fn a_quota_is_what_the_node_offers() {
    let mut identity = identity();
    identity.settings.quota = Some(Resources {
        cpu_millis: 500,
        memory_bytes: 1 << 30,
        ephemeral_storage_bytes: 1 << 30,
        sandboxes: 5,
    });
    let (hosts, node) = (hosts([true, true]), Node::default());
    let shape = Shape::new(&identity, &hosts, &Standing::of_hosts(&hosts), &node, at(0));
    let status = shape.node().status.unwrap();
    assert_eq!(status.capacity.unwrap()["pods"].0, "5");
    assert_eq!(status.allocatable.unwrap()["cpu"].0, "500m");
}

#[test]
fn over_a_cell_the_node_is_ready_without_a_host_once_the_quota_is_known() {
    let node = |quota| {
        let standing = Standing::of_quota(quota);
        let shape = Shape::new(&identity(), &HostTable::new(), &standing, &Node::default(), at(0));
        (shape.ready(), shape.node())
    };
    let (ready, before) = node(None);
    assert!(!ready);
    // What was offered before is known from the Node itself; nothing is no offer.
    assert_eq!(offered(&before), None);
    let quota = Resources {
        cpu_millis: 1500,
        memory_bytes: 1 << 30,
        ephemeral_storage_bytes: 1 << 30,
        sandboxes: 10,
    };
    assert!(node(Some(quota)).0);
    let identity = Identity {
        settings: config::Node {
            quota: Some(quota),
            ..identity().settings
        },
        ..identity()
    };
    let standing = Standing::of_quota(Some(quota));
    let shape = Shape::new(&identity, &HostTable::new(), &standing, &Node::default(), at(0));
    assert_eq!(offered(&shape.node()), Some(quota));
}

#[test]
fn the_node_is_short_of_what_all_hosts_in_reach_are_short_of() {
    let mut table = hosts([true, true]);
    let told = |table: &HostTable, kind: &str| {
        let standing = Standing::Hosts {
            reachable: table.len(),
            all: table.len(),
        };
        let conditions = conditions(&standing, table, &[], at(0));
        let found = conditions.into_iter().find(|c| c.type_ == kind).unwrap();
        (found.status, found.reason.unwrap())
    };
    let press = |table: &mut HostTable, i: usize| {
        let view = table.values_mut().nth(i).unwrap();
        Arc::make_mut(view.host.as_mut().unwrap()).pressure.memory = true;
    };
    press(&mut table, 0);
    let fine = ("False".into(), "KubeletHasSufficientMemory".into());
    assert_eq!(told(&table, "MemoryPressure"), fine, "the other has enough");
    press(&mut table, 1);
    let short = ("True".into(), "KubeletHasInsufficientMemory".into());
    assert_eq!(told(&table, "MemoryPressure"), short);
    assert_eq!(told(&table, "DiskPressure").0, "False");
    assert_eq!(
        told(&HostTable::new(), "MemoryPressure").0,
        "False",
        "nobody says"
    );
}
