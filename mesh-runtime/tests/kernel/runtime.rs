//! The runtime as the agent uses it, with a control plane that does not answer:
//! what it does then is what it does at every start.

use std::{sync::Arc, time::Duration};

use mesh_runtime::{
    attachment::AttachmentState,
    control::PoolTls,
    pod::{Mode, PodRecord},
    redirect::Deadline,
    runtime::{AttachError, CloseTenantError, Config, MeshRuntime, OpenTenantError, PodAttachment},
};
use pool_agent_api::{Attempt, SandboxKey, Tenant, TenantId, tenant::MeshControl};
use prometheus_client::registry::Registry;

use crate::lab::{DEADLINE, DNS, Lab, Pod, REFUSAL, UPLINK, VIP, eventually};

fn pool_tls() -> PoolTls {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::default()
        .signed_by(&key, &issuer)
        .unwrap();
    PoolTls::from_pem(
        certificate.pem().as_bytes(),
        key.serialize_pem().as_bytes(),
        ca_certificate.pem().as_bytes(),
        "pool.test",
    )
    .unwrap()
}

fn start(lab: &Lab) -> (MeshRuntime, Registry) {
    let mut registry = Registry::default();
    let config = Config {
        host: "host-a".parse().unwrap(),
        bpffs: lab.bpffs.path().to_owned(),
        local_pods: "10.77.1.0/24".parse().unwrap(),
        off_limits: Default::default(),
        pool_tls: pool_tls(),
        limits: mesh_runtime::limits::Limits::default(),
    };
    (MeshRuntime::start(config, &mut registry), registry)
}

fn acme() -> TenantId {
    "acme".parse().unwrap()
}

fn tenant() -> Tenant {
    Tenant {
        id: acme(),
        cluster_pod_range: "10.77.0.0/16".parse().unwrap(),
        cluster_domain: "cluster.local".to_owned(),
        dns_address: DNS.into(),
        upstream_nameservers: Vec::new(),
        mesh_control: MeshControl {
            // Nobody is there.
            address: "127.0.0.1:1".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            network: String::new(),
        },
    }
}

fn wanted(pod: &Pod, attempt: u32, mode: Mode) -> PodAttachment {
    PodAttachment {
        pod: PodRecord {
            key: SandboxKey {
                pod: "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f".parse().unwrap(),
                attempt: Attempt::parse("attempt", attempt).unwrap(),
            },
            tenant: acme(),
            namespace: "shop".parse().unwrap(),
            name: "web-0".parse().unwrap(),
            service_account: "web".parse().unwrap(),
            address: pod.address,
            mode,
        },
        device: pod.device.clone(),
        mac: pod.mac,
        deadline: Deadline::Never,
    }
}

async fn opened(lab: &Lab) -> (MeshRuntime, Registry) {
    let (runtime, registry) = start(lab);
    runtime
        .open_tenant(&tenant(), lab.router.netns.path(), UPLINK)
        .await
        .unwrap();
    (runtime, registry)
}

fn metrics(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_waits_for_its_certificate_and_an_unmeshed_one_only_for_the_mesh_state() {
    let mut lab = Lab::new();
    let (runtime, registry) = opened(&lab).await;
    let pod = lab.pod(2);
    let attachment = runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
    assert_eq!(*attachment.state().borrow(), AttachmentState::Redirected);
    let unmeshed = lab.pod(3);
    let mut other = wanted(&unmeshed, 1, Mode::Unmeshed);
    other.pod.key.pod = "another".parse().unwrap();
    let attachment = runtime.attach(other).await.unwrap();
    assert_eq!(*attachment.state().borrow(), AttachmentState::Identified);

    let text = metrics(&registry);
    for line in [
        "mesh_runtime_attachments{state=\"redirected\"} 1",
        "mesh_runtime_attachments{state=\"identified\"} 1",
        "mesh_runtime_attach_seconds_count 2",
        "mesh_runtime_dropped_packets_total{tenant=\"acme\",reason=\"source_mac\"} 0",
    ] {
        assert!(text.contains(line), "{line} not in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_again_changes_nothing() {
    let mut lab = Lab::new();
    let (runtime, _) = opened(&lab).await;
    runtime
        .open_tenant(&tenant(), lab.router.netns.path(), UPLINK)
        .await
        .unwrap();
    let pod = lab.pod(2);
    let runtime = Arc::new(runtime);
    let together: Vec<_> = (0..8)
        .map(|_| {
            let (runtime, wanted) = (Arc::clone(&runtime), wanted(&pod, 1, Mode::Enrolled));
            tokio::spawn(async move { runtime.attach(wanted).await })
        })
        .collect();
    for task in together {
        let attachment = task.await.unwrap().unwrap();
        assert!(*attachment.state().borrow() >= AttachmentState::Redirected);
    }
    let key = wanted(&pod, 1, Mode::Enrolled).pod.key;
    runtime.detach(&key, Duration::ZERO).await;
    runtime.detach(&key, Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_attempt_and_a_changed_one_are_refused_by_name() {
    let mut lab = Lab::new();
    let (runtime, _) = opened(&lab).await;
    let (pod, another) = (lab.pod(2), lab.pod(3));
    runtime.attach(wanted(&pod, 2, Mode::Enrolled)).await.unwrap();

    let error = runtime
        .attach(wanted(&another, 1, Mode::Enrolled))
        .await
        .unwrap_err();
    assert!(
        matches!(error, AttachError::Fenced { newer, .. } if newer.get() == 2),
        "{error}"
    );
    let error = runtime
        .attach(wanted(&another, 2, Mode::Enrolled))
        .await
        .unwrap_err();
    assert!(matches!(error, AttachError::Conflict { .. }), "{error}");
    // A newer one has an address of its own.
    runtime.attach(wanted(&another, 3, Mode::Enrolled)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_attached_leaves_nothing_behind() {
    let mut lab = Lab::new();
    let (runtime, _) = start(&lab);
    let pod = lab.pod(2);
    let error = runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap_err();
    assert!(matches!(error, AttachError::NoTenant { .. }), "{error}");

    runtime
        .open_tenant(&tenant(), lab.router.netns.path(), UPLINK)
        .await
        .unwrap();
    let nowhere = PodAttachment {
        device: "nowhere".to_owned(),
        ..wanted(&pod, 1, Mode::Enrolled)
    };
    let error = runtime.attach(nowhere).await.unwrap_err();
    assert!(matches!(error, AttachError::Redirect { .. }), "{error}");
    // The same key again, now right.
    runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_pod_is_cut_off_and_its_attachment_ends() {
    let mut lab = Lab::new();
    let (runtime, registry) = opened(&lab).await;
    let pod = lab.pod(2);
    let attachment = runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
    let mut state = attachment.state();

    runtime.detach(attachment.key(), Duration::ZERO).await;
    assert!(lab.space(&pod).connect((VIP, 80), REFUSAL).is_err());
    assert_eq!(*state.borrow_and_update(), AttachmentState::Detached);
    assert!(state.changed().await.is_err(), "closed");
    let text = metrics(&registry);
    assert!(
        text.contains("mesh_runtime_attachments{state=\"detached\"} 0"),
        "{text}"
    );
    assert!(text.contains("mesh_runtime_dropped_packets_total{tenant=\"acme\",reason=\"unknown_device\"}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_closed_when_its_last_pod_is_gone() {
    let mut lab = Lab::new();
    let (runtime, _) = opened(&lab).await;
    let pod = lab.pod(2);
    let attachment = runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
    let error = runtime.close_tenant(&acme()).await.unwrap_err();
    assert!(matches!(error, CloseTenantError::InUse { .. }), "{error}");

    runtime.detach(attachment.key(), Duration::ZERO).await;
    runtime.close_tenant(&acme()).await.unwrap();
    assert!(!lab.pins("acme").exists());
    runtime.close_tenant(&acme()).await.unwrap();
    // And opened anew.
    runtime
        .open_tenant(&tenant(), lab.router.netns.path(), UPLINK)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_not_changed_under_its_pods() {
    let lab = Lab::new();
    let (runtime, _) = opened(&lab).await;
    let path = lab.router.netns.path();
    let changed = Tenant {
        cluster_domain: "other.local".to_owned(),
        ..tenant()
    };
    let error = runtime.open_tenant(&changed, path, UPLINK).await.unwrap_err();
    assert!(
        matches!(
            error,
            OpenTenantError::Changed {
                what: "configuration",
                ..
            }
        ),
        "{error}"
    );
    let error = runtime.open_tenant(&tenant(), path, "lo").await.unwrap_err();
    assert!(
        matches!(error, OpenTenantError::Changed { what: "uplink", .. }),
        "{error}"
    );
    let error = runtime
        .open_tenant(&tenant(), lab.outside.netns.path(), UPLINK)
        .await
        .unwrap_err();
    assert!(
        matches!(error, OpenTenantError::Changed { what: "router", .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_process_finds_its_pods_where_the_last_one_left_them() {
    let mut lab = Lab::new();
    let (runtime, _) = opened(&lab).await;
    let pod = lab.pod(2);
    runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
    drop(runtime);

    let (runtime, registry) = opened(&lab).await;
    let attachment = runtime.attach(wanted(&pod, 1, Mode::Enrolled)).await.unwrap();
    assert_eq!(*attachment.state().borrow(), AttachmentState::Redirected);
    // Its connections come to this process: a listener takes them.
    let stream = lab.space(&pod).connect((VIP, 80), DEADLINE);
    assert!(stream.is_ok(), "{stream:?}");
    eventually("told", || metrics(&registry).contains("state=\"redirected\"} 1"));
}
