//! The lab itself, for real: namespaces, processes, containers. Needs root and
//! what `deploy/local/tools` installs; fails where it cannot run.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequest,
    core::v1::{Namespace as KubeNamespace, Node},
};
use kube::{Api, ResourceExt, api::ListParams};
use spindrift_local::{
    Lab, Layout, Options, Progress, cluster,
    component::{Component, MARK},
    demo::{self, Exec},
    images, instance,
    lab::{self, ClusterSource, Extent},
    netns::Namespace,
    process::Process,
    registry,
};

fn options(instance: &str) -> Result<Options> {
    let options = Options::for_tests(instance.parse()?, spindrift_local::cache::standard()?);
    Ok(Options {
        extent: Extent::Runtimes,
        ..options
    })
}

/// What an instance may have left: nothing of this may be there after `down`.
fn remains(instance: &str) -> Result<Vec<String>> {
    let layout = Layout::new(instance.parse()?);
    let mut found: Vec<String> = Process::with_environment(MARK, instance)
        .iter()
        .map(|p| format!("{p:?}"))
        .collect();
    let prefix = layout.namespace_prefix();
    found.extend(
        Namespace::existing()
            .iter()
            .map(|n| n.name().to_owned())
            .filter(|name| name.starts_with(&prefix)),
    );
    let directories = [layout.state(), layout.data()];
    found.extend(
        directories
            .iter()
            .filter(|d| d.exists())
            .map(|d| d.display().to_string()),
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    found.extend(
        mounts
            .lines()
            .filter(|m| {
                directories
                    .iter()
                    .any(|d| m.contains(&format!("{}/", d.display())))
            })
            .map(str::to_owned),
    );
    Ok(found)
}

async fn api_answers(lab: &Lab) -> Result<()> {
    let namespaces: Api<KubeNamespace> = Api::all(lab.client());
    lab.cluster().wait_ready(Duration::from_secs(60)).await?;
    namespaces
        .get("default")
        .await
        .map(drop)
        .context("the API server has no default namespace")
}

async fn run_container(lab: &Lab, host: &str, id: &str) -> Result<()> {
    let runtime = lab.runtime(host).context("no such host")?;
    let reference = images::BUSYBOX_IMAGE.reference;
    runtime
        .ctr()
        .args(["run", "--detach", "--runc-root"])
        .arg(runtime.runc_root())
        .args([reference, id, "sleep", "1000"])
        .run()
        .await
        .map(drop)
        .context("no container")
}

#[tokio::test]
async fn a_lab_mends_what_was_killed_keeps_apart_from_another_and_leaves_nothing() -> Result<()> {
    let progress = Progress::silent();
    let (one, other) = ("e2e-lab-1", "e2e-lab-2");
    for instance in [one, other] {
        lab::down(&instance.parse()?, &progress).await?;
        ensure!(remains(instance)?.is_empty(), "left: {:?}", remains(instance)?);
    }
    let (first, second) = (options(one)?, options(other)?);
    let (first_lab, second_lab) = tokio::try_join!(Lab::up(&first, &progress), Lab::up(&second, &progress))?;
    // The same addresses, in namespaces of their own.
    for lab in [&first_lab, &second_lab] {
        api_answers(lab).await?;
    }
    run_container(&first_lab, "host-a", "e2e-lab-c1").await?;

    // A second `up` finds everything as it should be.
    let processes = |lab: &Lab| -> Vec<i32> {
        Component::all(lab.layout())
            .iter()
            .filter_map(|c| c.process(lab.layout()))
            .map(|p| p.pid())
            .collect()
    };
    let before = processes(&first_lab);
    let first_lab = Lab::up(&first, &progress).await?;
    assert_eq!(processes(&first_lab), before);

    // Killed at once, and one lost with its pid file as in a crash of `up`.
    for component in ["kube-apiserver", "containerd@host-a", "relay"] {
        first_lab.kill(component).await?;
    }
    std::fs::remove_file(first_lab.layout().components().join("etcd.pid"))?;
    first_lab.topology().hosts[1]
        .namespace
        .ip("link delete eth0")
        .await?;
    let first_lab = Lab::up(&first, &progress).await?;
    api_answers(&first_lab).await?;
    let other_host = first_lab.topology().hosts[1].address.to_string();
    first_lab.topology().hosts[0]
        .namespace
        .tool("/bin/busybox ping -c 1 -W 5")
        .arg(other_host)
        .run()
        .await?;
    ensure!(
        Component::strays(first_lab.layout()).is_empty(),
        "a second etcd was left"
    );

    // What ends by itself is started again; what was stopped stays so.
    let relay = first_lab.component("relay")?;
    let ended = relay.process(first_lab.layout()).context("there is no relay")?;
    first_lab.kill("kube-scheduler").await?;
    ended.end(Duration::ZERO).await;
    cluster::wait(
        "the relay to be started again",
        Duration::from_secs(60),
        async || {
            let now = relay.process(first_lab.layout());
            now.filter(|now| *now != ended)
                .map(drop)
                .ok_or_else(|| "it is not".to_owned())
        },
    )
    .await?;
    ensure!(
        first_lab
            .component("kube-scheduler")?
            .process(first_lab.layout())
            .is_none(),
        "what was killed on purpose was started"
    );
    assert_eq!(first_lab.mend().await?, Some(vec!["kube-scheduler".to_owned()]));

    // Other options than it was made with are refused, not half applied.
    let differing = Options {
        hosts: 3,
        ..first.clone()
    };
    ensure!(
        Lab::up(&differing, &progress)
            .await
            .is_err_and(|e| e.to_string().contains("other options"))
    );

    lab::down(&one.parse()?, &progress).await?;
    assert_eq!(remains(one)?, Vec::<String>::new());
    api_answers(&second_lab)
        .await
        .context("the other instance was harmed")?;
    // With nobody to help: everything of it dead, its shim and container too.
    run_container(&second_lab, "host-b", "e2e-lab-c2").await?;
    for process in Process::with_environment(MARK, other) {
        process.end(Duration::ZERO).await;
    }
    lab::down(&other.parse()?, &progress).await?;
    assert_eq!(remains(other)?, Vec::<String>::new());
    ensure!(
        !instance::Layout::existing()
            .iter()
            .any(|i| i.as_str() == one || i.as_str() == other)
    );
    Ok(())
}

#[tokio::test]
async fn an_image_is_pulled_from_the_registries_and_from_the_private_one_only_with_its_password() -> Result<()>
{
    let progress = Progress::silent();
    let instance = "e2e-lab-3";
    lab::down(&instance.parse()?, &progress).await?;
    let lab = Lab::up(
        &Options {
            registry: true,
            // What containerd pulls goes by the agent.
            extent: Extent::Whole,
            ..options(instance)?
        },
        &progress,
    )
    .await?;
    registry::push(
        &lab.topology().lab,
        lab.images(),
        images::BUSYBOX_IMAGE,
        "busybox:pulled",
    )
    .await?;
    let host = &lab.topology().hosts[0];
    let runtime = lab.runtime(&host.name).context("no such host")?;
    let pull = |registry: registry::Registry, user: Option<String>| {
        let ctr = runtime
            .ctr()
            .args(["images", "pull", "--hosts-dir"])
            .arg(runtime.registries());
        let ctr = user
            .into_iter()
            .fold(ctr, |ctr, user| ctr.arg("--user").arg(user));
        ctr.arg(format!("{}/busybox:pulled", registry.name)).run()
    };
    pull(registry::OPEN, None).await?;
    ensure!(
        pull(registry::PRIVATE, None).await.is_err(),
        "pulled without credentials"
    );
    ensure!(
        pull(registry::PRIVATE, Some(format!("{}:wrong", registry::USER)))
            .await
            .is_err(),
        "pulled with wrong ones"
    );
    pull(
        registry::PRIVATE,
        Some(format!("{}:{}", registry::USER, registry::PASSWORD)),
    )
    .await?;
    lab::down(&instance.parse()?, &progress).await?;
    assert_eq!(remains(instance)?, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn the_demo_shows_a_peer_verified_on_the_other_host_also_after_everything_was_killed() -> Result<()> {
    let progress = Progress::silent();
    let (own, joining) = ("e2e-demo", "e2e-join");
    for instance in [joining, own] {
        lab::down(&instance.parse()?, &progress).await?;
    }
    let whole = Options {
        extent: Extent::Whole,
        ..options(own)?
    };
    let lab = Lab::up(&whole, &progress).await?;
    let check = |shown: &demo::Shown| -> Result<()> {
        ensure!(
            shown.placed.len() == 4,
            "not three replicas and a client: {shown:?}"
        );
        for placed in &shown.placed {
            let account = placed.pod.split('-').next().unwrap_or_default();
            let identity = format!("spiffe://cluster.local/ns/demo/sa/{account}");
            ensure!(placed.identity.as_deref() == Some(&*identity), "{placed:?}");
        }
        let request = shown.request.as_ref().context("no request was made")?;
        ensure!(request.client.host != request.server.host, "{request:?}");
        ensure!(
            request.verified == "spiffe://cluster.local/ns/demo/sa/client",
            "{request:?}"
        );
        ensure!(
            request
                .seen_from
                .starts_with(&format!("{}:", request.client.address)),
            "{request:?}"
        );
        Ok(())
    };
    let before = demo::run(&lab, Exec::Works, &progress).await?;
    check(&before)?;
    for component in Component::all(lab.layout()) {
        component.kill(lab.layout()).await?;
    }
    let lab = Lab::up(&whole, &progress).await?;
    let after = demo::run(&lab, Exec::Works, &progress).await?;
    check(&after)?;
    let pods = |shown: &demo::Shown| {
        shown
            .placed
            .iter()
            .map(|p| (p.pod.clone(), p.address.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        pods(&after),
        pods(&before),
        "pods were lost with the processes that look after them"
    );

    // A second pool joins the cluster, and leaves it as it was.
    let kubeconfig = lab.layout().kubeconfig();
    let joined = Options {
        extent: Extent::Whole,
        cluster: ClusterSource::Joined {
            kubeconfig,
            node_address: None,
        },
        hosts: 1,
        ..options(joining)?
    };
    let second = Lab::up(&joined, &progress).await?;
    let nodes: Api<Node> = Api::all(lab.client());
    nodes
        .get(&second.layout().node_name())
        .await
        .context("the second node is not in the first's cluster")?;
    lab::down(&joining.parse()?, &progress).await?;
    assert_eq!(remains(joining)?, Vec::<String>::new());
    ensure!(
        nodes.get_opt(&second.layout().node_name()).await?.is_none(),
        "its Node is left"
    );
    let requests: Api<CertificateSigningRequest> = Api::all(lab.client());
    let left = requests.list(&ListParams::default()).await?;
    ensure!(
        left.iter().all(|request| !request.name_any().contains(joining)),
        "its certificate requests are left"
    );

    lab::down(&own.parse()?, &progress).await?;
    assert_eq!(remains(own)?, Vec::<String>::new());
    Ok(())
}

/// The programs this test starts are built by the same cargo, beside it.
#[test]
fn the_programs_of_a_lab_are_built() {
    let programs = spindrift_local::artifacts::built(spindrift_local::artifacts::Profile::Dev);
    for program in ["spindrift-local", "spindrift-cni", "pool-agent", "virtual-node"] {
        let path: PathBuf = programs.program(program).unwrap();
        assert!(path.is_file(), "{}", path.display());
    }
}
