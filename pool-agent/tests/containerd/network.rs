//! Addresses and who reaches whom, on one host with two tenants that have equal
//! ranges, namespaces and names, and pods outside the mesh.

use std::{
    io::Read,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, ensure};
use mesh_runtime::netns::Netns;
use spindrift_local::topology::{API_SERVER, API_SERVER_PORT, UPLINK, VIRTUAL_NODE};
use tokio::io::AsyncWriteExt;
use tokio_util::task::AbortOnDropHandle;

use super::{
    host::{Host, PATIENCE},
    pod::{Pod, container_id, idle, pod},
    suite::{Case, cases},
};

/// Long enough for a connection that is dropped to show that it is: a SYN is
/// repeated after a second.
const REFUSAL: Duration = Duration::from_millis(2500);

pub(crate) fn tests() -> Vec<Case> {
    let mut all = cases![Others:
        each_pod_has_an_address_of_the_hosts_range_and_a_route_of_its_own,
        pods_of_two_tenants_on_a_host_do_not_meet,
        a_pod_out_of_the_mesh_reaches_of_the_infrastructure_what_is_allowed,
        a_tenant_whose_name_server_is_off_limits_is_refused_by_field,
    ];
    all.extend(cases![Alone: addresses_are_kept_over_a_restart_and_given_to_nobody_else]);
    all
}

async fn address(pod: &Pod<'_>) -> anyhow::Result<IpAddr> {
    pod.until_running().await?.pod_ip.context("it has no address")
}

/// The host's routes to pods.
async fn routes(host: &Host) -> anyhow::Result<String> {
    Ok(host.namespace().ip("route show").await?)
}

fn leads_to(routes: &str, address: IpAddr) -> bool {
    let to = address.to_string();
    routes.lines().any(|line| line.split(' ').next() == Some(&to))
}

async fn each_pod_has_an_address_of_the_hosts_range_and_a_route_of_its_own(
    host: &Host,
) -> anyhow::Result<()> {
    let ours = host.start(pod(vec![idle("main")])).await?;
    let theirs = host.start_for(&host.theirs, pod(vec![idle("main")])).await?;
    let addresses = [address(&ours).await?, address(&theirs).await?];
    ensure!(addresses[0] != addresses[1], "{addresses:?}");
    let known = routes(host).await?;
    for address in addresses {
        ensure!(
            host.range().contains(&address),
            "{address} is not of the host's range"
        );
        ensure!(leads_to(&known, address), "nothing leads to {address}: {known}");
    }
    ensure!(
        known.contains(&format!("unreachable {}", host.range())),
        "what nobody has is not unreachable: {known}"
    );
    ours.forget().await?;
    theirs.forget().await?;
    let known = routes(host).await?;
    for address in addresses {
        ensure!(!leads_to(&known, address), "{address} is still led to: {known}");
    }
    Ok(())
}

async fn pods_of_two_tenants_on_a_host_do_not_meet(host: &Host) -> anyhow::Result<()> {
    let ours = Place::of(host, host.start(pod(vec![idle("main")])).await?).await?;
    let theirs = Place::of(host, host.start_for(&host.theirs, pod(vec![idle("main")])).await?).await?;
    let client = Place::of(host, host.start(pod(vec![idle("main")])).await?).await?;
    let (_ours, _theirs) = (ours.serve(8080)?, theirs.serve(8080)?);
    let heard = client.dial((ours.address, 8080))?;
    ensure!(heard == GREETING, "our own: {heard}");
    let heard = client.dial((theirs.address, 8080));
    ensure!(heard.is_err(), "another tenant's: {heard:?}");
    for place in [ours, theirs, client] {
        place.pod.forget().await?;
    }
    Ok(())
}

/// Greets whoever connects, for as long as what is returned lives.
fn greet(netns: &Netns, at: SocketAddr) -> anyhow::Result<AbortOnDropHandle<()>> {
    let listener = netns.enter(|| TcpListener::bind(at))?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Who broke off has told what he wanted.
            let _broken = stream.write_all(GREETING.as_bytes()).await;
        }
    })))
}

async fn a_pod_out_of_the_mesh_reaches_of_the_infrastructure_what_is_allowed(
    host: &Host,
) -> anyhow::Result<()> {
    const PORT: u16 = 7788;
    let lab = Netns::open(host.underlay().path())?;
    let allowed = SocketAddr::from((API_SERVER, API_SERVER_PORT));
    let others = [
        SocketAddr::from((API_SERVER, PORT)),
        SocketAddr::from((VIRTUAL_NODE, PORT)),
    ];
    let mut serving = vec![greet(&lab, allowed)?];
    for other in others {
        serving.push(greet(&lab, other)?);
    }
    let client = Place::of(host, host.start(pod(vec![idle("main")])).await?).await?;
    let heard = client.dial(allowed)?;
    ensure!(heard == GREETING, "what is allowed: {heard}");
    for other in others {
        let heard = client.dial(other);
        ensure!(heard.is_err(), "{other}: {heard:?}");
    }
    // The agent of its own host.
    let agent = client.dial((host.address(), 7443));
    ensure!(agent.is_err(), "the agent: {agent:?}");
    let ear = lab.enter(|| UdpSocket::bind((VIRTUAL_NODE, PORT)))?;
    ear.set_read_timeout(Some(REFUSAL))?;
    let mouth = client.netns.enter(|| UdpSocket::bind((client.address, 0)))?;
    mouth.send_to(b"hello", (VIRTUAL_NODE, PORT))?;
    let heard = tokio::task::block_in_place(|| ear.recv_from(&mut [0; 16]));
    ensure!(heard.is_err(), "a datagram got there: {heard:?}");
    client.pod.forget().await
}

async fn a_tenant_whose_name_server_is_off_limits_is_refused_by_field(host: &Host) -> anyhow::Result<()> {
    let mut settings = host.ours.settings();
    settings.upstream_nameservers = vec![VIRTUAL_NODE.to_string()];
    let refused = host.ours.client().configure_tenant(settings).await;
    let told = refused.err().context("it was taken")?;
    let words = "upstream_nameservers[0]: 192.0.2.2:53: the address is off limits";
    ensure!(told.message().contains(words), "{told:?}");
    Ok(())
}

async fn addresses_are_kept_over_a_restart_and_given_to_nobody_else(host: &Host) -> anyhow::Result<()> {
    let ours = Place::of(host, host.start(pod(vec![idle("main")])).await?).await?;
    let theirs = host.start_for(&host.theirs, pod(vec![idle("main")])).await?;
    let kept = [ours.address, address(&theirs).await?];
    let gone = host.start(pod(vec![idle("main")])).await?;
    let ended = address(&gone).await?;
    gone.forget().await?;
    host.kill_agent().await?;
    // As if the last agent had died before it took the route away.
    let stray = format!("route add {ended} via {API_SERVER} dev {UPLINK} proto 83");
    host.namespace().ip(&stray).await?;
    host.start_agent().await?;
    ensure!([address(&ours.pod).await?, address(&theirs).await?] == kept);
    let known = routes(host).await?;
    ensure!(!leads_to(&known, ended), "{ended} is still led to: {known}");
    let client = Place::of(host, host.start(pod(vec![idle("main")])).await?).await?;
    let new = client.address;
    ensure!(!kept.contains(&new) && new != ended, "{new} was given again");
    let _served = ours.serve(8080)?;
    let heard = client.dial((kept[0], 8080))?;
    ensure!(heard == GREETING, "after a restart: {heard}");
    for pod in [ours.pod, theirs, client.pod] {
        pod.forget().await?;
    }
    Ok(())
}

/// Where a pod stands in the network: sockets made here are the pod's.
struct Place<'a> {
    pod: Pod<'a>,
    address: IpAddr,
    netns: Netns,
}

const GREETING: &str = "hello";

impl<'a> Place<'a> {
    /// Of a pod with a container `main`.
    async fn of(host: &Host, pod: Pod<'a>) -> anyhow::Result<Self> {
        let status = pod.until_running().await?;
        let process = host.pid(&container_id(&status, "main")?).await?;
        Ok(Self {
            address: status.pod_ip.context("it has no address")?,
            netns: Netns::open(format!("/proc/{process}/ns/net"))?,
            pod,
        })
    }

    /// Greets whoever connects, for as long as what is returned lives.
    fn serve(&self, port: u16) -> anyhow::Result<AbortOnDropHandle<()>> {
        greet(&self.netns, (self.address, port).into())
    }

    /// What is heard there.
    fn dial(&self, to: impl Into<SocketAddr>) -> std::io::Result<String> {
        let to = to.into();
        tokio::task::block_in_place(|| {
            let dialling = || TcpStream::connect_timeout(&to, REFUSAL);
            let mut stream = self.netns.enter(dialling)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut heard = String::new();
            stream.read_to_string(&mut heard)?;
            Ok(heard)
        })
    }
}
