//! Probes of all kinds, against programs that answer them.

use anyhow::{Context, ensure};
use pool_agent_api::wire;
use spindrift_local::images::AGNHOST;

use super::{
    host::Host,
    pod::{container, idle, pod, shell, text},
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        a_probe_of_each_kind_passes_and_fails_in_a_kubelets_words,
        a_probe_may_name_its_host_but_none_that_is_local_to_the_pools,
    ]
}

fn probe(action: wire::probe::Action) -> Option<wire::Probe> {
    Some(wire::Probe {
        action: Some(action),
        initial_delay_seconds: 0,
        period_seconds: 1,
        timeout_seconds: 2,
        success_threshold: 1,
        failure_threshold: 1,
        termination_grace_seconds: None,
    })
}

fn http(port: u32, path: &str, host: &str) -> wire::probe::Action {
    wire::probe::Action::Http(wire::HttpAction {
        host: host.into(),
        port,
        path: path.into(),
        ..Default::default()
    })
}

fn tcp(port: u32, host: &str) -> wire::probe::Action {
    wire::probe::Action::Tcp(wire::TcpAction {
        host: host.into(),
        port,
    })
}

fn exec(script: &str) -> wire::probe::Action {
    wire::probe::Action::Exec(wire::ExecAction {
        command: ["sh", "-c", script].map(Into::into).to_vec(),
    })
}

fn grpc(port: u32, service: &str) -> wire::probe::Action {
    wire::probe::Action::Grpc(wire::GrpcAction {
        port,
        service: service.into(),
    })
}

async fn a_probe_of_each_kind_passes_and_fails_in_a_kubelets_words(host: &Host) -> anyhow::Result<()> {
    let server = shell(
        "http",
        "mkdir /tmp/www && echo hello > /tmp/www/well && exec httpd -f -p 8080 -h /tmp/www",
    );
    let health = wire::Container {
        name: "grpc".into(),
        image: AGNHOST.reference.into(),
        command: [
            "/agnhost",
            "grpc-health-checking",
            "--port=5000",
            "--http-port=5001",
        ]
        .map(text)
        .to_vec(),
        ..idle("grpc")
    };
    // All are in one pod: each probes what another serves.
    let probed = |container: wire::Container, action| wire::Container {
        readiness_probe: probe(action),
        ..container
    };
    let containers = vec![
        probed(server, http(8080, "/well", "")),
        probed(health, grpc(5000, "")),
        probed(idle("tcp"), tcp(8080, "")),
        probed(idle("exec"), exec("true")),
        probed(idle("no-http"), http(8080, "/absent", "")),
        probed(idle("no-grpc"), grpc(5000, "unknown")),
        probed(idle("no-tcp"), tcp(8081, "")),
        probed(idle("no-exec"), exec("echo out of order; exit 1")),
    ];
    let web = host.start(pod(containers)).await?;
    web.until("pass what passes", |status| {
        let ready = |name| container(status, name).is_ok_and(|c| c.ready);
        ["http", "grpc", "tcp", "exec"].into_iter().all(ready)
    })
    .await?;
    for words in [
        "Readiness probe failed: HTTP probe failed with statuscode: 404",
        "Readiness probe failed: dial tcp",
        "Readiness probe failed: out of order",
        "Readiness probe failed: gRPC: ",
    ] {
        web.event("Unhealthy", words).await?;
    }
    let status = web.until_running().await?;
    for name in ["no-http", "no-grpc", "no-tcp", "no-exec"] {
        ensure!(!container(&status, name)?.ready, "{name} is ready");
    }
    web.forget().await
}

/// Another pod's address will do; what is local to the host is off limits, under
/// whatever name. Names are the host's to look up.
async fn a_probe_may_name_its_host_but_none_that_is_local_to_the_pools(host: &Host) -> anyhow::Result<()> {
    let serving = shell(
        "http",
        "mkdir /tmp/www && echo hello > /tmp/www/well && exec httpd -f -p 8080 -h /tmp/www",
    );
    let server = host.start(pod(vec![serving])).await?;
    let address = server
        .until_running()
        .await?
        .pod_ip
        .context("it has no address")?;
    // It would accept whatever is dialled to it.
    let router = mesh_runtime::netns::Netns::open(host.ours.router(host))?;
    let listener = router.enter(|| std::net::TcpListener::bind(("0.0.0.0", 0)))?;
    let port = listener.local_addr()?.port().into();
    let nobody = "x".repeat(300);
    let containers = [
        ("other", http(8080, "/well", &address.to_string())),
        ("local", tcp(port, "localhost")),
        ("metadata", http(80, "/", "169.254.169.254")),
        ("unknown", http(port, "/", &nobody)),
    ];
    let containers = containers.map(|(name, action)| wire::Container {
        readiness_probe: probe(action),
        ..idle(name)
    });
    let web = host.start(pod(containers.to_vec())).await?;
    web.until("reach another pod", |status| {
        container(status, "other").is_ok_and(|c| c.ready)
    })
    .await?;
    for words in [
        "dial tcp localhost: no pod may reach what is local to the host",
        "dial tcp 169.254.169.254: no pod may reach what is local to the host",
        &format!("lookup {nobody}: "),
    ] {
        web.event("Unhealthy", words).await?;
    }
    let status = web.until_running().await?;
    for name in ["local", "metadata", "unknown"] {
        ensure!(!container(&status, name)?.ready, "{name} is ready");
    }
    drop(listener);
    web.forget().await?;
    server.forget().await
}
