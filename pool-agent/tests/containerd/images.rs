//! Images: asked for or not, refused, and in a kubelet's words.

use anyhow::ensure;
use pool_agent_api::{status::ContainerState, wire};
use spindrift_local::{
    images::BUSYBOX_IMAGE,
    registry::{PASSWORD, PRIVATE, USER},
};

use super::{
    host::Host,
    pod::{container, idle, pod, shell, waits},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        only_always_asks_a_registry_for_an_image_that_is_there,
        always_asks_the_registry_again_for_each_run,
        a_private_image_is_pulled_with_the_credentials_of_its_registry_alone,
        a_name_that_no_image_can_have_is_told,
    ]
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
    let credential = |registry: &str, password: &str| wire::RegistryCredential {
        registry: registry.into(),
        username: USER.into(),
        password: password.into(),
    };
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
