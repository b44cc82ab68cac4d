//! Bad input at each edge: refused with a clear error, logged once, nothing
//! lost, and the next honest caller is served.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context, ensure};
use http::StatusCode;
use kube::ResourceExt;
use mesh_api::{HBONE_PORT, Identity};
use pool_agent_api::wire::{
    self, GetHostRequest, LogsRequest, SandboxKey, SandboxSpec, StartSandboxRequest, StopSandboxRequest,
    WatchRequest, pool_agent_client::PoolAgentClient, watch_event::Event,
};
use serde_json::json;
use spindrift_local::{
    Lab,
    netns::Namespace,
    pki::{Authority, Credential, Subject},
    pool::{PoolPki, PoolTls, TRUST_DOMAIN, agent_address, agent_name},
    topology::{Host, VIRTUAL_NODE},
};
use spindrift_tests::{
    Scope,
    stranger::{self, Credentials, dial, dial_tls},
    workload::{PORT, address, is_ready, pod, probe_server, service_account, uid},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tonic::Code;

use super::{
    mesh::Pair,
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others:
        an_agent_refuses_whoever_has_no_certificate_of_the_pool,
        an_agent_refuses_messages_that_are_none_and_goes_on,
        an_agent_refuses_a_spec_and_names_the_field,
        another_tenant_sees_and_touches_nothing,
        a_host_is_no_virtual_node_to_another_host,
        a_certificate_for_a_pod_of_another_host_is_refused_by_name,
        a_certificate_for_an_identity_that_runs_nowhere_is_refused,
        the_mesh_control_refuses_strangers_and_garbage,
        a_tunnel_needs_an_identity_of_the_mesh,
        a_tunnel_leads_only_to_where_it_was_dialled,
        garbage_in_a_tunnel_ends_that_tunnel_alone,
        a_truncated_or_silent_tls_hello_is_given_up,
        garbage_at_the_kubelet_api_is_refused,
    ]
}

/// Longer than any limit on a handshake; shorter than a person's patience.
pub(crate) const GIVEN_UP: Duration = Duration::from_secs(45);

pub(crate) fn lab_namespace(scope: &Scope) -> &Namespace {
    &scope.lab().topology().lab
}

pub(crate) fn host<'a>(lab: &'a Lab, name: &str) -> anyhow::Result<&'a Host> {
    lab.topology()
        .host(name)
        .with_context(|| format!("there is no {name}"))
}

pub(crate) fn shown(tls: PoolTls) -> anyhow::Result<Credentials> {
    Credentials::load(&Credential {
        certificate: tls.certificate,
        key: tls.key,
    })
}

/// Of our own tenant's virtual node.
pub(crate) fn own_tenant(lab: &Lab) -> anyhow::Result<Credentials> {
    shown(PoolPki::open(lab.layout())?.virtual_node(lab.layout().instance().as_str())?)
}

pub(crate) fn other_tenant(lab: &Lab) -> anyhow::Result<Credentials> {
    shown(PoolPki::open(lab.layout())?.virtual_node("somebody-else")?)
}

pub(crate) fn as_host(lab: &Lab, name: &str) -> anyhow::Result<Credentials> {
    shown(PoolPki::open(lab.layout())?.host(host(lab, name)?)?)
}

/// What an authority of one's own gives to anybody who asks.
pub(crate) fn forged(uri: &str) -> anyhow::Result<Credentials> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::open(directory.path().join("ca"), "spindrift pool")?;
    let subject = Subject {
        common_name: "forged".into(),
        uri: Some(uri.into()),
        ..Subject::default()
    };
    Credentials::load(&authority.credential("forged", &subject)?)
}

pub(crate) async fn agent(
    scope: &Scope,
    name: &str,
    credentials: &Credentials,
) -> anyhow::Result<PoolAgentClient<tonic::transport::Channel>> {
    let address = agent_address(host(scope.lab(), name)?);
    Ok(PoolAgentClient::new(
        stranger::grpc(lab_namespace(scope), address, credentials).await?,
    ))
}

/// Whether a TLS server serves whoever shows these. With TLS 1.3 a client
/// learns of a refusal only after its own end of the handshake.
pub(crate) async fn is_served(
    namespace: &Namespace,
    address: SocketAddr,
    credentials: &Credentials,
) -> anyhow::Result<bool> {
    let Ok(mut stream) = dial_tls(namespace, address, credentials, b"h2").await else {
        return Ok(false);
    };
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .ok();
    let mut first = [0; 9];
    let answer = timeout(GIVEN_UP, stream.read_exact(&mut first))
        .await
        .context("no answer at all")?;
    Ok(answer.is_ok())
}

/// Waits until the component has logged the peer's misdeed, and checks that it
/// did so once.
async fn logged_once(scope: &Scope, component: &str, peer: SocketAddr) -> anyhow::Result<String> {
    let peer = peer.to_string();
    let told = |lines: &[String]| -> Vec<String> {
        lines
            .iter()
            .filter(|line| line.contains(&peer))
            .cloned()
            .collect()
    };
    scope
        .wait(
            &format!("that {component} logs something of {peer}"),
            async || {
                let lines = scope.journal().since(component).map_err(|e| e.to_string())?;
                if told(&lines).is_empty() {
                    Err("nothing".to_owned())
                } else {
                    Ok(())
                }
            },
        )
        .await?;
    // Time for a second line, had one been on its way: the component answers
    // another request in between.
    host_answers(scope).await?;
    let lines = told(&scope.journal().since(component)?);
    ensure!(
        lines.len() == 1,
        "{component} logged it {} times: {lines:#?}",
        lines.len()
    );
    Ok(lines[0].clone())
}

pub(crate) async fn host_answers(scope: &Scope) -> anyhow::Result<()> {
    for host in &scope.lab().topology().hosts {
        agent(scope, &host.name, &own_tenant(scope.lab())?)
            .await?
            .get_host(GetHostRequest {})
            .await?;
    }
    Ok(())
}

async fn an_agent_refuses_whoever_has_no_certificate_of_the_pool(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let address = agent_address(host(lab, "host-a")?);
    let uri = format!(
        "spiffe://{TRUST_DOMAIN}/tenant/{}/virtual-node",
        lab.layout().instance()
    );
    ensure!(
        is_served(lab_namespace(scope), address, &own_tenant(lab)?).await?,
        "our own is refused"
    );
    for (who, credentials) in [("nobody", Credentials::none()), ("a forger", forged(&uri)?)] {
        ensure!(
            !is_served(lab_namespace(scope), address, &credentials).await?,
            "{who} is served"
        );
    }
    // Not even TLS, and what becomes of it in the log.
    let mut stream = dial(lab_namespace(scope), address).await?;
    let own = stream.local_addr()?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let mut rest = Vec::new();
    timeout(GIVEN_UP, stream.read_to_end(&mut rest))
        .await
        .context("it is not closed")?
        .ok();
    logged_once(scope, &agent_name(host(lab, "host-a")?), own).await?;
    Ok(())
}

/// A unary call with these very bytes as its message; the gRPC status, or how
/// HTTP/2 ended.
pub(crate) async fn call_with(scope: &Scope, path: &str, message: &[u8]) -> anyhow::Result<String> {
    let lab = scope.lab();
    let address = agent_address(host(lab, "host-a")?);
    let stream = dial_tls(lab_namespace(scope), address, &own_tenant(lab)?, b"h2").await?;
    let calling = async {
        let (client, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await?;
        let request = http::Request::post(format!("https://agent{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (answer, mut body) = client.send_request(request, false)?;
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len())?.to_be_bytes());
        framed.extend(message);
        body.send_data(framed.into(), true)?;
        let answer = answer.await?;
        let mut status = answer.headers().get("grpc-status").cloned();
        let mut body = answer.into_body();
        while let Some(chunk) = body.data().await {
            body.flow_control().release_capacity(chunk?.len())?;
        }
        if status.is_none() {
            status = body
                .trailers()
                .await?
                .and_then(|trailers| trailers.get("grpc-status").cloned());
        }
        driver.abort();
        let status = status.context("no grpc-status")?;
        anyhow::Ok(status.to_str()?.to_owned())
    };
    timeout(GIVEN_UP, calling).await.context("no answer")?
}

async fn an_agent_refuses_messages_that_are_none_and_goes_on(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let start = "/spindrift.pool.v1.PoolAgent/StartSandbox";
    // Field 1 that claims to be longer than the message; a wire type that is none.
    for message in [&b"\x0a\xff\xff\xff\x0fgarbage"[..], b"\x0f\x00", &[0xff; 64]] {
        let status = call_with(scope, start, message).await?;
        let refused =
            [Code::Internal, Code::InvalidArgument, Code::Unknown].map(|code| (code as i32).to_string());
        ensure!(refused.contains(&status), "grpc-status {status} for {message:?}");
    }
    let status = call_with(scope, "/spindrift.pool.v1.PoolAgent/NoSuchCall", b"").await?;
    ensure!(
        status == (Code::Unimplemented as i32).to_string(),
        "grpc-status {status}"
    );
    // Larger than any spec: refused before it is read.
    let large = call_with(scope, start, &vec![b'x'; 12 << 20]).await;
    ensure!(large.as_ref().map_or(true, |status| status != "0"), "{large:?}");
    // HTTP/2 that is none, on a connection of the tenant's own.
    let address = agent_address(host(lab, "host-a")?);
    let mut stream = dial_tls(lab_namespace(scope), address, &own_tenant(lab)?, b"h2").await?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    stream.write_all(&[0xfe; 4096]).await?;
    let mut rest = Vec::new();
    timeout(GIVEN_UP, stream.read_to_end(&mut rest))
        .await
        .context("it is not closed")?
        .ok();
    host_answers(scope).await
}

/// A spec that an agent would take.
pub(crate) fn valid_spec(tenant: &str) -> SandboxSpec {
    SandboxSpec {
        key: Some(SandboxKey {
            pod_uid: "0fb4bd4c-9a4e-44f9-8d6c-0a4ee1b63a4f".into(),
            attempt: 1,
        }),
        tenant: tenant.into(),
        namespace: "default".into(),
        name: "web".into(),
        service_account: "default".into(),
        mesh: wire::MeshMode::Enrolled.into(),
        restart_policy: wire::RestartPolicy::Never.into(),
        network: Some(wire::PodNetwork {
            hostname: "web".into(),
            ..Default::default()
        }),
        security: Some(wire::PodSecurity::default()),
        claim: Some(wire::Resources {
            sandboxes: 1,
            ..Default::default()
        }),
        containers: vec![wire::Container {
            name: "main".into(),
            image: "spindrift.local/busybox:1".into(),
            pull_policy: wire::PullPolicy::Never.into(),
            security: Some(wire::ContainerSecurity {
                seccomp: wire::SeccompProfile::RuntimeDefault.into(),
                ..Default::default()
            }),
            termination_message_path: "/dev/termination-log".into(),
            ..Default::default()
        }],
        ..SandboxSpec::default()
    }
}

async fn an_agent_refuses_a_spec_and_names_the_field(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let mut agent = agent(scope, "host-a", &own_tenant(lab)?).await?;
    let valid = valid_spec(lab.layout().instance().as_str());
    // But for the one field, each would be taken.
    pool_agent_api::SandboxSpec::try_from(valid.clone())?;
    type Edit = fn(&mut SandboxSpec);
    let edits: [(&str, Edit); 9] = [
        ("spec.key: ", |s| s.key = None),
        ("spec.key.pod_uid: ", |s| {
            s.key.as_mut().unwrap().pod_uid = "../../etc".into()
        }),
        ("spec.key.attempt: ", |s| s.key.as_mut().unwrap().attempt = 0),
        ("spec.tenant: ", |s| s.tenant.clear()),
        ("spec.namespace: ", |s| s.namespace = "a/b".into()),
        ("spec.mesh: ", |s| s.mesh = 0),
        ("spec.network.hostname: ", |s| {
            s.network.as_mut().unwrap().hostname = "a\nnameserver 6.6.6.6".into();
        }),
        ("spec.containers[0].image: ", |s| s.containers[0].image.clear()),
        ("spec.containers: ", |s| s.containers.clear()),
    ];
    let mut refused = vec![(None, "spec: ")];
    for (field, edit) in edits {
        let mut spec = valid.clone();
        edit(&mut spec);
        refused.push((Some(spec), field));
    }
    // Of several mistakes, whose sandbox it is comes first.
    refused.push((Some(SandboxSpec::default()), "spec.key: "));
    for (spec, field) in refused {
        let refusal = agent
            .start_sandbox(StartSandboxRequest { spec })
            .await
            .err()
            .with_context(|| format!("it was taken in spite of {field}"))?;
        ensure!(refusal.code() == Code::InvalidArgument, "{refusal:?}");
        ensure!(
            refusal.message().starts_with(field),
            "{field} is not named: {refusal:?}"
        );
    }
    let of_another = StartSandboxRequest {
        spec: Some(valid_spec("somebody-else")),
    };
    let refusal = agent
        .start_sandbox(of_another)
        .await
        .err()
        .context("it was taken")?;
    ensure!(refusal.code() == Code::PermissionDenied, "{refusal:?}");
    Ok(())
}

async fn another_tenant_sees_and_touches_nothing(scope: &Scope) -> anyhow::Result<()> {
    let web = scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    let host = scope.host_of(&web)?;
    let mut theirs = agent(scope, &host, &other_tenant(scope.lab())?).await?;
    let key = || {
        Some(SandboxKey {
            pod_uid: uid(&web).to_owned(),
            attempt: 1,
        })
    };
    let stopped = theirs
        .stop_sandbox(StopSandboxRequest {
            key: key(),
            grace_seconds: 0,
        })
        .await;
    ensure!(
        stopped.as_ref().is_err_and(|s| s.code() == Code::NotFound),
        "{stopped:?}"
    );
    let forgotten = theirs
        .forget_sandbox(pool_agent_api::wire::ForgetSandboxRequest { key: key() })
        .await;
    // "Succeeds if unknown": that it does must not mean that it did.
    drop(forgotten);
    let logs = theirs
        .logs(LogsRequest {
            key: key(),
            container: "main".into(),
            ..LogsRequest::default()
        })
        .await;
    let code = match logs {
        Err(status) => status.code(),
        Ok(stream) => stream
            .into_inner()
            .message()
            .await
            .err()
            .context("it reads our logs")?
            .code(),
    };
    ensure!(code == Code::NotFound, "{code:?}");
    let mut watch = theirs.watch(WatchRequest {}).await?.into_inner();
    let first = timeout(GIVEN_UP, watch.message())
        .await
        .context("no snapshot")??
        .and_then(|event| event.event);
    ensure!(matches!(first, Some(Event::Synced(_))), "it is told of {first:?}");
    let still = scope.pod("web").await?;
    ensure!(is_ready(&still) && uid(&still) == uid(&web), "{still:?}");
    scope.kubectl().exec_ok("web", &["true"]).await?;
    Ok(())
}

async fn a_host_is_no_virtual_node_to_another_host(scope: &Scope) -> anyhow::Result<()> {
    let answer = match agent(scope, "host-a", &as_host(scope.lab(), "host-b")?).await {
        Ok(mut agent) => agent
            .get_host(GetHostRequest {})
            .await
            .map(drop)
            .map_err(|s| s.to_string()),
        Err(refused) => Err(format!("{refused:#}")),
    };
    ensure!(answer.is_err(), "host-b is taken for a virtual node");
    Ok(())
}

fn broker() -> SocketAddr {
    (VIRTUAL_NODE, 15012).into()
}

fn identity(scope: &Scope, account: &str) -> anyhow::Result<Identity> {
    Ok(Identity::new("cluster.local", scope.namespace(), account)?)
}

/// Starts a pod with an account of its own and tells the other host's name.
async fn elsewhere(scope: &Scope, account: &str) -> anyhow::Result<(String, String)> {
    scope.create(service_account(account)).await?;
    let spec = json!({"serviceAccountName": account, "containers": [probe_server()]});
    let web = scope.start(pod(account, spec)).await?;
    let here = scope.host_of(&web)?;
    let other = scope.lab().topology().hosts.iter().find(|host| host.name != here);
    Ok((here, other.context("there is one host only")?.name.clone()))
}

async fn a_certificate_for_a_pod_of_another_host_is_refused_by_name(scope: &Scope) -> anyhow::Result<()> {
    let (here, other) = elsewhere(scope, "treasurer").await?;
    let wanted = identity(scope, "treasurer")?;
    let lab = scope.lab();
    let refusal = stranger::certificate(lab, broker(), &as_host(lab, &other)?, &wanted)
        .await?
        .err()
        .with_context(|| format!("{other} got the certificate"))?;
    ensure!(refusal.code() == Code::PermissionDenied, "{refusal:?}");
    ensure!(
        refusal.message().contains(&wanted.to_string()) && refusal.message().contains(&other),
        "{refusal:?}"
    );
    let lines = scope.journal().since("virtual-node")?;
    let told: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("CSR refused") && line.contains(&wanted.to_string()))
        .collect();
    ensure!(
        told.len() == 1 && told[0].contains(&format!("host={other}")),
        "{told:#?}"
    );
    // The host that it runs on is granted the same.
    let granted = stranger::certificate(lab, broker(), &as_host(lab, &here)?, &wanted).await?;
    ensure!(granted.is_ok(), "{:?}", granted.err());
    Ok(())
}

async fn a_certificate_for_an_identity_that_runs_nowhere_is_refused(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let host_a = as_host(lab, "host-a")?;
    for wanted in [
        Identity::new("cluster.local", "kube-system", "admin")?,
        Identity::new("pool.spindrift", scope.namespace(), "default")?,
    ] {
        let refusal = stranger::certificate(lab, broker(), &host_a, &wanted)
            .await?
            .err()
            .context("granted")?;
        ensure!(refusal.code() == Code::PermissionDenied, "{refusal:?}");
    }
    Ok(())
}

async fn the_mesh_control_refuses_strangers_and_garbage(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let namespace = lab_namespace(scope);
    ensure!(
        is_served(namespace, broker(), &as_host(lab, "host-a")?).await?,
        "a host is refused"
    );
    for (who, credentials) in [
        ("nobody", Credentials::none()),
        (
            "a forger",
            forged(&format!("spiffe://{TRUST_DOMAIN}/host/host-a"))?,
        ),
        ("another tenant", other_tenant(lab)?),
        ("a virtual node", own_tenant(lab)?),
    ] {
        ensure!(
            !is_served(namespace, broker(), &credentials).await?,
            "{who} is served"
        );
    }
    let mut stream = dial(namespace, broker()).await?;
    let own = stream.local_addr()?;
    stream.write_all(&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3]).await?;
    stream.shutdown().await?;
    let mut rest = Vec::new();
    timeout(GIVEN_UP, stream.read_to_end(&mut rest))
        .await
        .context("it is not closed")?
        .ok();
    logged_once(scope, "virtual-node", own).await?;
    let mut stream = dial_tls(namespace, broker(), &as_host(lab, "host-b")?, b"h2").await?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    stream.write_all(&[0xfe; 4096]).await?;
    timeout(GIVEN_UP, stream.read_to_end(&mut rest))
        .await
        .context("it is not closed")?
        .ok();
    ensure!(
        is_served(namespace, broker(), &as_host(lab, "host-a")?).await?,
        "it serves no more"
    );
    Ok(())
}

fn tunnel(pair: &Pair) -> SocketAddr {
    (*pair.far_pod().ip(), HBONE_PORT).into()
}

async fn a_tunnel_needs_an_identity_of_the_mesh(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let pair = Pair::start(scope).await?;
    let own = identity(scope, "client")?;
    for (who, credentials) in [
        ("nobody", Credentials::none()),
        ("a forger", forged(&own.to_string())?),
        ("a host of the pool", as_host(lab, &pair.near_host)?),
        ("a virtual node", own_tenant(lab)?),
    ] {
        let served = is_served(lab_namespace(scope), tunnel(&pair), &credentials).await?;
        ensure!(!served, "{who} may open a tunnel");
    }
    pair.dial(scope, pair.far_pod(), "hello").await?;
    Ok(())
}

/// What a host that was taken over really has: the identity of its own pod.
async fn stolen(scope: &Scope, pair: &Pair) -> anyhow::Result<Credentials> {
    let near = as_host(scope.lab(), &pair.near_host)?;
    let own = identity(scope, "client")?;
    Ok(stranger::certificate(scope.lab(), broker(), &near, &own).await??)
}

async fn a_tunnel_leads_only_to_where_it_was_dialled(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let pair = Pair::start(scope).await?;
    let stolen = stolen(scope, &pair).await?;
    let open = async || dial_tls(lab_namespace(scope), tunnel(&pair), &stolen, b"h2").await;
    // It works where it may.
    let right = pair.far_pod().to_string();
    let (status, heard) = stranger::converse(open().await?, &right, "hello", 16).await?;
    ensure!(
        status == StatusCode::OK && heard.starts_with(b"local="),
        "{status} {heard:?}"
    );
    let near = SocketAddrV4::new(address(&pair.near).context("no address")?, PORT);
    let far_host = host(lab, &pair.far_host)?.address;
    for wrong in [
        near.to_string(),
        pair.far_service.to_string(),
        format!("127.0.0.1:{PORT}"),
        "127.0.0.1:9464".into(),
        format!("{far_host}:7443"),
        "169.254.1.1:53".into(),
        "169.254.169.254:80".into(),
        "kubernetes.default.svc:443".into(),
        format!("{}:0", pair.far_pod().ip()),
        format!("[::ffff:{}]:{PORT}", Ipv4Addr::LOCALHOST),
    ] {
        match stranger::connect(open().await?, &wrong).await {
            Ok(status) => ensure!(status.is_client_error(), "CONNECT {wrong}: {status}"),
            // A name that HTTP/2 itself does not let pass.
            Err(error) => ensure!(
                !format!("{error:#}").contains("no answer"),
                "CONNECT {wrong}: {error:#}"
            ),
        }
    }
    pair.dial(scope, pair.far_pod(), "hello").await?;
    Ok(())
}

async fn garbage_in_a_tunnel_ends_that_tunnel_alone(scope: &Scope) -> anyhow::Result<()> {
    let pair = Pair::start(scope).await?;
    let stolen = stolen(scope, &pair).await?;
    let mut holding = scope.kubectl().start(&[
        "exec",
        "client",
        "--",
        "/probe",
        "hold",
        &pair.far_service.to_string(),
        "x",
        "100",
    ])?;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // A frame of 2^24-1 bytes; headers that HPACK cannot read; a window of zero
    // grown by zero; thousands of settings.
    let settings: Vec<u8> = [0u8, 0, 0, 4, 0, 0, 0, 0, 0].repeat(5000);
    for garbage in [
        [preface.clone(), vec![0xff; 4096]].concat(),
        [
            preface.clone(),
            b"\0\0\x05\x01\x04\0\0\0\x01\xff\xff\xff\xff\xff".to_vec(),
        ]
        .concat(),
        [preface.clone(), b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0".to_vec()].concat(),
        [preface.clone(), settings, b"\0\0\x01\x07\0\0\0\0\0x".to_vec()].concat(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 9],
    ] {
        let mut stream = dial_tls(lab_namespace(scope), tunnel(&pair), &stolen, b"h2").await?;
        let peer = stream.get_ref().0.local_addr()?;
        stream.write_all(&garbage).await.ok();
        let mut rest = Vec::new();
        timeout(GIVEN_UP, stream.read_to_end(&mut rest))
            .await
            .with_context(|| format!("{peer} is not closed"))?
            .ok();
    }
    ensure!(holding.try_wait()?.is_none(), "another's connection was broken");
    pair.dial(scope, pair.far_pod(), "hello").await?;
    Ok(())
}

async fn a_truncated_or_silent_tls_hello_is_given_up(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let pair = Pair::start(scope).await?;
    let far = agent_name(host(lab, &pair.far_host)?);
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for (what, sent, closed) in [
        ("cut off", &hello[..], true),
        ("silent in the middle", &hello[..], false),
        ("silent", &[][..], false),
        ("no TLS", b"GET / HTTP/1.1\r\n\r\n", false),
    ] {
        let mut stream = dial(lab_namespace(scope), tunnel(&pair)).await?;
        let peer = stream.local_addr()?;
        stream.write_all(sent).await?;
        if closed {
            stream.shutdown().await?;
        }
        // Meanwhile others are served.
        pair.dial(scope, pair.far_pod(), "hello").await?;
        let mut rest = Vec::new();
        timeout(GIVEN_UP, stream.read_to_end(&mut rest))
            .await
            .with_context(|| format!("{what}: it is kept for ever"))?
            .ok();
        logged_once(scope, &far, peer).await.context(what)?;
    }
    Ok(())
}

async fn garbage_at_the_kubelet_api_is_refused(scope: &Scope) -> anyhow::Result<()> {
    let address: SocketAddr = (VIRTUAL_NODE, 10250).into();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x16, 3, 1, 2, 0, 1],
        &[0xff; 600],
    ] {
        let mut stream = dial(lab_namespace(scope), address).await?;
        stream.write_all(garbage).await?;
        stream.shutdown().await?;
        let mut rest = Vec::new();
        timeout(GIVEN_UP, stream.read_to_end(&mut rest))
            .await
            .context("it is not closed")?
            .ok();
    }
    let mut stream = dial_tls(lab_namespace(scope), address, &Credentials::none(), b"http/1.1").await?;
    stream.write_all(b"GET /pods HTTP/1.1\r\nHost: x\r\nX: ").await?;
    stream.write_all(&vec![b'x'; 1 << 20]).await.ok();
    stream.write_all(b"\r\n\r\n").await.ok();
    let mut rest = Vec::new();
    timeout(GIVEN_UP, stream.read_to_end(&mut rest))
        .await
        .context("it is not closed")?
        .ok();
    ensure!(
        !rest.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&rest)
    );
    // Honest callers go on: the API server reaches it.
    let web = scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    scope.kubectl().exec_ok(&web.name_any(), &["true"]).await?;
    Ok(())
}
