//! Images: asked for or not, refused, and in a kubelet's words; whose they are, and
//! what one tenant's pulls cost another.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, ensure};
use pool_agent::{
    cri::{Runtime, wire as cri},
    image::{Images, Wanted},
    policy::images::Images as Policy,
};
use pool_agent_api::{status::ContainerState, wire};
use spindrift_local::{
    images::BUSYBOX_IMAGE,
    netns::Namespace,
    registry::{OPEN, PASSWORD, PRIVATE, USER},
    topology::REGISTRY,
};
use tokio::io::AsyncReadExt;

use super::{
    host::{Host, wait},
    pod::{Pod, container, idle, pod, shell, waits},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        only_always_asks_a_registry_for_an_image_that_is_there,
        always_asks_the_registry_again_for_each_run,
        a_private_image_is_pulled_with_the_credentials_of_its_registry_alone,
        a_name_that_no_image_can_have_is_told,
        a_tenants_private_image_runs_for_no_other_by_any_name,
        a_proof_is_a_tenants_and_is_remembered,
        a_name_that_leads_inside_is_refused_before_anything_is_asked,
        only_what_was_pulled_and_is_not_held_may_be_removed,
        a_registry_that_says_nothing_stops_its_own_tenant_alone_and_is_let_go_with_its_pod,
    ]
}

pub(crate) fn tests_alone() -> Vec<Case> {
    cases![Alone: a_proof_outlives_the_agent]
}

fn credential(registry: &str, password: &str) -> wire::RegistryCredential {
    wire::RegistryCredential {
        registry: registry.into(),
        username: USER.into(),
        password: password.into(),
    }
}

/// A pod of one container that runs the image.
fn running(
    image: &str,
    policy: wire::PullPolicy,
    credentials: &[wire::RegistryCredential],
) -> wire::SandboxSpec {
    wire::SandboxSpec {
        registry_credentials: credentials.to_vec(),
        ..pod(vec![of_image(idle("main"), image, policy)])
    }
}

/// Waits until a container waits for one of these reasons; returns the message.
async fn waits_for(pod: &Pod<'_>, name: &str, reasons: &[&str]) -> anyhow::Result<String> {
    let status = pod
        .until(&format!("wait for one of {reasons:?}"), |status| {
            reasons.contains(&waits(status, name).0)
        })
        .await?;
    let ran = pod.history().iter().any(|status| {
        let state = container(status, name).map(|c| &c.state);
        matches!(
            state,
            Ok(ContainerState::Running { .. } | ContainerState::Terminated(_))
        )
    });
    ensure!(!ran, "{name} ran all the same");
    Ok(waits(&status, name).1.to_owned())
}

fn of_image(mut container: wire::Container, image: &str, policy: wire::PullPolicy) -> wire::Container {
    container.image = image.into();
    container.pull_policy = policy.into();
    container
}

/// The image is on the host, and no registry has it.
async fn only_always_asks_a_registry_for_an_image_that_is_there(host: &Host) -> anyhow::Result<()> {
    let here = BUSYBOX_IMAGE.reference;
    let containers = vec![
        of_image(idle("always"), here, wire::PullPolicy::Always),
        of_image(idle("never"), here, wire::PullPolicy::Never),
        of_image(idle("if-absent"), here, wire::PullPolicy::IfNotPresent),
    ];
    let web = host.start(pod(containers)).await?;
    let status = web
        .until("back off from its pull", |status| {
            waits(status, "always").0 == "ImagePullBackOff"
        })
        .await?;
    let (_, message) = waits(&status, "always");
    ensure!(
        message.starts_with(&format!("Back-off pulling image \"{here}\": ErrImagePull: ")),
        "{message}"
    );
    let history = web.history();
    let first = history
        .iter()
        .find(|status| !["", "ContainerCreating"].contains(&waits(status, "always").0));
    ensure!(
        first.is_some_and(|status| waits(status, "always").0 == "ErrImagePull"),
        "{first:?}"
    );
    web.until("run the others", |status| {
        ["never", "if-absent"].iter().all(|name| {
            let state = container(status, name).map(|c| &c.state);
            matches!(state, Ok(ContainerState::Running { .. }))
        })
    })
    .await?;
    for (reason, words) in [
        ("Pulling", "Pulling image"),
        ("Failed", "Failed to pull image"),
        ("Failed", "Error: ErrImagePull"),
        ("BackOff", "Back-off pulling image"),
        ("Failed", "Error: ImagePullBackOff"),
        ("Pulled", "already present on machine"),
    ] {
        web.event(reason, words).await?;
    }
    web.forget().await
}

async fn always_asks_the_registry_again_for_each_run(host: &Host) -> anyhow::Result<()> {
    let once = of_image(shell("main", "exit 0"), &Host::pulled(), wire::PullPolicy::Always);
    let web = host.start(pod(vec![once])).await?;
    web.until("have run twice", |status| status.containers[0].restart_count >= 1)
        .await?;
    let pulls = web.events().iter().filter(|e| e.reason == "Pulling").count();
    ensure!(pulls >= 2, "it was asked for {pulls} times");
    web.event("Pulled", "Successfully pulled image").await?;
    web.forget().await
}

async fn a_private_image_is_pulled_with_the_credentials_of_its_registry_alone(
    host: &Host,
) -> anyhow::Result<()> {
    let image = Host::pulled_with_credentials();
    for (credentials, pulls) in [
        (vec![], false),
        (vec![credential(PRIVATE.name, "guessed")], false),
        (vec![credential("other.example", PASSWORD)], false),
        (
            vec![
                credential("other.example", "wrong"),
                credential(PRIVATE.name, PASSWORD),
            ],
            true,
        ),
    ] {
        let main = of_image(idle("main"), &image, wire::PullPolicy::Always);
        let mut spec = pod(vec![main]);
        spec.registry_credentials = credentials;
        let web = host.start(spec).await?;
        if pulls {
            web.until_ready().await?;
        } else {
            let failed = web.event("Failed", "Failed to pull image").await?;
            ensure!(!failed.message.contains("guessed"), "{}", failed.message);
            let refused = ["ErrImagePull", "ImagePullBackOff"];
            web.until("fail to pull", |status| {
                refused.contains(&waits(status, "main").0)
            })
            .await?;
        }
        web.forget().await?;
    }
    Ok(())
}

async fn a_name_that_no_image_can_have_is_told(host: &Host) -> anyhow::Result<()> {
    for policy in [wire::PullPolicy::Always, wire::PullPolicy::IfNotPresent] {
        let web = host
            .start(pod(vec![of_image(idle("main"), "UPPER//case", policy)]))
            .await?;
        let status = web
            .until("be told its name is wrong", |status| {
                waits(status, "main").0 == "InvalidImageName"
            })
            .await?;
        let (_, message) = waits(&status, "main");
        ensure!(message.contains("UPPER//case"), "{message}");
        web.forget().await?;
    }
    Ok(())
}

/// The digest of the manifest that an image's name stands for on the host.
async fn manifest(host: &Host, image: &str) -> anyhow::Result<String> {
    let list = host.ctr(&["images", "list"]).await?;
    let line = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(image));
    let digest = line.and_then(|line| line.split_whitespace().find(|word| word.starts_with("sha256:")));
    Ok(digest
        .with_context(|| format!("{image} is not in {list}"))?
        .to_owned())
}

async fn a_tenants_private_image_runs_for_no_other_by_any_name(host: &Host) -> anyhow::Result<()> {
    use wire::PullPolicy::{Always, IfNotPresent, Never};
    const REPOSITORY: &str = "secret/app";
    host.push(&format!("{REPOSITORY}:1")).await?;
    host.push(&format!("{REPOSITORY}:2")).await?;
    let repository = format!("{}/{REPOSITORY}", PRIVATE.name);
    let image = format!("{repository}:1");
    let own = host
        .start(running(&image, Always, &[credential(PRIVATE.name, PASSWORD)]))
        .await?;
    own.until_ready().await?;
    let found = Runtime::at(&host.socket()).image(&image, None).await?;
    let id = found.context("it is not there")?.id;
    let hex = id.strip_prefix("sha256:").context(id.clone())?;
    let digest = manifest(host, &image).await?;

    let names = [
        image.clone(),
        format!("{repository}:2"),
        format!("{repository}@{digest}"),
        format!("{repository}:1@{digest}"),
        // The runtime knows images by their ids too, and by what those begin with.
        id.clone(),
        hex.to_owned(),
        hex[..12].to_owned(),
    ];
    // The attacker has no credential, or one that is wrong.
    for credentials in [vec![], vec![credential(PRIVATE.name, "guessed")]] {
        let container_of = |(n, name): (usize, &String)| {
            [
                of_image(idle(&format!("never{n}")), name, Never),
                of_image(idle(&format!("absent{n}")), name, IfNotPresent),
            ]
        };
        let spec = wire::SandboxSpec {
            registry_credentials: credentials,
            ..pod(names.iter().enumerate().flat_map(container_of).collect())
        };
        let web = host.start_for(&host.theirs, spec).await?;
        for (n, name) in names.iter().enumerate() {
            let message = waits_for(&web, &format!("never{n}"), &["ErrImageNeverPull"]).await?;
            let told = format!("Container image \"{name}\" is not present with pull policy of Never");
            ensure!(message == told, "{message}");
            let refused = ["ErrImagePull", "ImagePullBackOff"];
            waits_for(&web, &format!("absent{n}"), &refused).await?;
        }
        web.forget().await?;
    }
    own.forget().await
}

async fn a_proof_is_a_tenants_and_is_remembered(host: &Host) -> anyhow::Result<()> {
    use wire::PullPolicy::{IfNotPresent, Never};
    for repository in ["proven/one:1", "proven/other:1"] {
        host.push(repository).await?;
    }
    let image = format!("{}/proven/one:1", PRIVATE.name);
    let credentials = [credential(PRIVATE.name, PASSWORD)];
    for tenant in [&host.ours, &host.theirs] {
        // For the second it is on the host, and is asked for all the same.
        let first = host
            .start_for(tenant, running(&image, IfNotPresent, &credentials))
            .await?;
        first.until_ready().await?;
        first.event("Pulled", "Successfully pulled image").await?;
        let digest = manifest(host, &image).await?;
        let by_digest = format!("{}/proven/one@{digest}", PRIVATE.name);
        for (name, policy) in [(&image, IfNotPresent), (&image, Never), (&by_digest, Never)] {
            let again = host.start_for(tenant, running(name, policy, &[])).await?;
            again.until_ready().await?;
            again
                .event(
                    "Pulled",
                    "already present on machine and can be accessed by the pod",
                )
                .await?;
            again.forget().await?;
        }
        // The same image, by way of a repository that has not shown it.
        let other = format!("{}/proven/other:1", PRIVATE.name);
        let web = host.start_for(tenant, running(&other, IfNotPresent, &[])).await?;
        waits_for(&web, "main", &["ErrImagePull", "ImagePullBackOff"]).await?;
        web.forget().await?;
        first.forget().await?;
    }
    Ok(())
}

async fn a_proof_outlives_the_agent(host: &Host) -> anyhow::Result<()> {
    use wire::PullPolicy::{Always, Never};
    host.push("remembered/app:1").await?;
    let image = format!("{}/remembered/app:1", PRIVATE.name);
    let web = host
        .start(running(&image, Always, &[credential(PRIVATE.name, PASSWORD)]))
        .await?;
    web.until_ready().await?;
    host.kill_agent().await?;
    host.start_agent().await?;
    let again = host.start(running(&image, Never, &[])).await?;
    again.until_ready().await?;
    let stranger = host.start_for(&host.theirs, running(&image, Never, &[])).await?;
    waits_for(&stranger, "main", &["ErrImageNeverPull"]).await?;
    stranger.forget().await?;
    again.forget().await?;
    web.forget().await
}

/// On the host's real containerd, by an agent's hands of its own.
async fn only_what_was_pulled_and_is_not_held_may_be_removed(host: &Host) -> anyhow::Result<()> {
    let runtime = Runtime::at(&host.socket());
    let directory = tempfile::tempdir()?;
    let policy = Policy {
        allow_registries: vec![OPEN.name.to_owned().try_into()?],
        ..Policy::default()
    };
    let images = Images::open(
        runtime.clone(),
        directory.path(),
        &policy,
        &mut prometheus_client::registry::Registry::default(),
    )
    .await?;
    // One like it is there, and not by a pull.
    host.push_content("collected/operators:1", "the operator's")
        .await?;
    let operators = format!("{}/collected/operators:1", OPEN.name);
    host.ctr(&[
        "images",
        "pull",
        "--plain-http",
        "--hosts-dir",
        &host.registries(),
        &operators,
    ])
    .await?;
    host.push_content("collected/app:1", "pulled").await?;
    let name = format!("{}/collected/app:1", OPEN.name);
    let wanted = Wanted {
        tenant: &host.ours.name.parse()?,
        name: &name,
        handler: None,
        credentials: &[],
    };
    let (held, _) = images.pull(wanted, cri::PodSandboxConfig::default()).await?;
    let id = held.info.id.clone();
    let removable = async || anyhow::Ok(images.removable(&runtime.images().await?));
    let found = runtime.images().await?;
    ensure!(found.iter().any(|image| image.id == id), "{found:#?}");
    ensure!(
        found.iter().any(|image| image.repo_tags.contains(&operators)),
        "{found:#?}"
    );
    ensure!(removable().await?.is_empty(), "{:?}", removable().await?);
    drop(held);
    let now = removable().await?;
    ensure!(now.len() == 1 && now[0].name == id, "{now:?}");
    // It comes to be held after it was found to be removable.
    let held = images.present(wanted).await?.context("it is not there")?;
    ensure!(!images.remove(&now[0]).await?, "it was removed under a pod");
    drop(held);
    ensure!(images.remove(&now[0]).await?, "it was not removed");
    let left = runtime.images().await?;
    ensure!(left.iter().all(|image| image.id != id), "{left:#?}");
    ensure!(images.present(wanted).await?.is_none());
    // The proof has gone with it, though another brings it back.
    images.tidy(&left).await?;
    host.ctr(&[
        "images",
        "pull",
        "--plain-http",
        "--hosts-dir",
        &host.registries(),
        &name,
    ])
    .await?;
    wait("that it is there again", async || {
        let all = runtime.images().await.map_err(|e| e.to_string())?;
        match all.iter().any(|image| image.id == id) {
            true => Ok(()),
            false => Err(format!("{all:#?}")),
        }
    })
    .await?;
    ensure!(
        images.present(wanted).await?.is_none(),
        "a proof outlived its image"
    );
    ensure!(removable().await?.is_empty(), "{:?}", removable().await?);
    Ok(())
}

/// A machine that takes connections and says nothing.
struct Silent {
    address: SocketAddr,
    /// Connections that came, and those that have not ended.
    came: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Silent {
    fn listen(namespace: &Namespace, address: IpAddr) -> anyhow::Result<Self> {
        let listener = namespace.enter(|| std::net::TcpListener::bind((address, 0)))?;
        listener.set_nonblocking(true)?;
        let silent = Self {
            address: listener.local_addr()?,
            came: Arc::default(),
            open: Arc::default(),
        };
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (came, open) = (silent.came.clone(), silent.open.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                came.fetch_add(1, Ordering::SeqCst);
                open.fetch_add(1, Ordering::SeqCst);
                let open = open.clone();
                tokio::spawn(async move {
                    let mut bytes = [0; 1024];
                    while stream.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Ok(silent)
    }
}

async fn a_name_that_leads_inside_is_refused_before_anything_is_asked(host: &Host) -> anyhow::Result<()> {
    let loopback = Silent::listen(host.inside(), Ipv4Addr::LOCALHOST.into())?;
    let other_host = Silent::listen(host.outside(), spindrift_local::topology::API_SERVER.into())?;
    let names = [
        format!("{}/a:1", loopback.address),
        format!("localhost:{}/a:1", loopback.address.port()),
        format!("[::ffff:127.0.0.1]:{}/a:1", loopback.address.port()),
        format!("127.1:{}/a:1", loopback.address.port()),
        format!("0.0.0.0:{}/a:1", loopback.address.port()),
        format!("{}/a:1", other_host.address),
        "169.254.169.254/latest/meta-data:1".to_owned(),
        "[fd00:ec2::254]/latest:1".to_owned(),
        "169.254.7.7:80/a:1".to_owned(),
        "[fe80::1]:80/a:1".to_owned(),
        "224.0.0.1/a:1".to_owned(),
        // The host itself, a pod, a Service.
        "192.0.2.11:7443/a:1".to_owned(),
        "10.77.1.7:8080/a:1".to_owned(),
        "10.96.0.1:443/a:1".to_owned(),
    ];
    for policy in [wire::PullPolicy::Always, wire::PullPolicy::IfNotPresent] {
        let containers = names
            .iter()
            .enumerate()
            .map(|(n, name)| of_image(idle(&format!("c{n}")), name, policy))
            .collect();
        let web = host.start(pod(containers)).await?;
        let status = web
            .until("be refused as a whole", |status| {
                (0..names.len()).all(|n| waits(status, &format!("c{n}")).0 == "InvalidImageName")
            })
            .await?;
        for (n, name) in names.iter().enumerate() {
            let (_, message) = waits(&status, &format!("c{n}"));
            let field = format!("spec.containers[{n}].image: registry ");
            ensure!(message.starts_with(&field), "{name}: {message}");
            ensure!(message.contains("policy.images"), "{name}: {message}");
        }
        web.forget().await?;
    }
    for silent in [loopback, other_host] {
        ensure!(
            silent.came.load(Ordering::SeqCst) == 0,
            "{} was asked",
            silent.address
        );
    }
    Ok(())
}

async fn a_registry_that_says_nothing_stops_its_own_tenant_alone_and_is_let_go_with_its_pod(
    host: &Host,
) -> anyhow::Result<()> {
    const IMAGES: usize = 100;
    let silent = Silent::listen(host.outside(), REGISTRY.into())?;
    let registry = silent.address.to_string();
    host.plain_http(&registry)?;
    let containers = (0..IMAGES)
        .map(|n| {
            let name = format!("{registry}/slow/app{n}:1");
            of_image(idle(&format!("c{n}")), &name, wire::PullPolicy::IfNotPresent)
        })
        .collect();
    let slow = host.start(pod(containers)).await?;
    let open = silent.open.clone();
    wait("that the silent registry is asked", async || {
        match open.load(Ordering::SeqCst) {
            0 => Err("nobody came".to_owned()),
            _ => Ok(()),
        }
    })
    .await?;
    let other = host
        .start_for(
            &host.theirs,
            running(&Host::pulled(), wire::PullPolicy::Always, &[]),
        )
        .await?;
    other.until_ready().await?;
    let held = silent.open.load(Ordering::SeqCst);
    ensure!((1..=5).contains(&held), "{held} pulls of one tenant run");
    other.forget().await?;
    slow.stop(1).await?;
    slow.until_stopped().await?;
    wait("that the silent registry is let go", async || {
        match silent.open.load(Ordering::SeqCst) {
            0 => Ok(()),
            open => Err(format!("{open} connections are open")),
        }
    })
    .await?;
    slow.forget().await
}
