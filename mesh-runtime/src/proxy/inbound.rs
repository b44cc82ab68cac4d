//! Connections to pods of this host: decided upon by the pod's policies, then
//! delivered to the application with the client's own address. Three ways lead
//! here: a tunnel (`hbone::server`), plaintext from outside the mesh
//! ([`plaintext`]), and a pod of the same host (`outbound`).

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use mesh_api::Identity;
use tokio::net::TcpStream;

use super::{
    Mesh,
    connection::Connection,
    copy::{self, Meter},
    failure::Failure,
    live::Subject,
    pods::LocalPod,
};
use crate::{
    policy::Facts,
    telemetry::{Access, Direction, Flow, Labels, Party, Reporter, Security, Side},
};

/// Who wants to connect.
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    /// Verified; None for plaintext.
    pub(crate) identity: Option<Identity>,
    pub(crate) subject: Subject,
    pub(crate) opened: Instant,
}

/// Plaintext to `pod`, as it was captured on its way there.
pub(crate) async fn plaintext(
    mesh: Arc<Mesh>,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    client: Client,
    target: SocketAddr,
) {
    let mut socket = Connection::from(tcp);
    let flow = flow(&mesh, &pod, &client, target);
    let served = async {
        authorize(&mesh, &pod, &client, target).await?;
        let mut server = dial(&mesh, &pod, client.address.ip(), target).await?;
        let meter = Meter::new(std::slice::from_ref(&flow));
        copy::sockets(&mut socket, &mut server, meter, mesh.patience()).await?;
        server.finish();
        Ok::<(), Failure>(())
    }
    .await;
    match served {
        Ok(()) => {
            socket.finish();
            flow.succeed();
        }
        Err(failure) => flow.fail(failure.flag(), failure.to_string()),
    }
}

/// The connection as this end reports it.
pub(crate) fn flow(mesh: &Mesh, pod: &LocalPod, client: &Client, target: SocketAddr) -> Flow {
    let snapshot = mesh.state.snapshot();
    // The address is the client's own say where no tunnel vouches for it, but
    // it is only named here, not believed.
    let source = snapshot.workload_at(&mesh.network.name, client.address.ip());
    let own = snapshot.workload(&pod.uid);
    let labels = Labels {
        reporter: Reporter::Destination,
        source: source
            .map(|w| Party::of(w))
            .unwrap_or_default()
            .with_principal(client.identity.clone()),
        destination: pod.party(own),
        service: None,
        security: match client.identity {
            Some(_) => Security::MutualTls,
            None => Security::None,
        },
    };
    let access = Access {
        direction: Direction::Inbound,
        source: client.address,
        source_workload: source.map(|w| w.name.clone()),
        source_namespace: source.map(|w| w.namespace.clone()),
        source_identity: client.identity.clone(),
        destination: target,
        hbone: None,
        destination_workload: Some(pod.name.clone()),
        destination_namespace: Some(pod.namespace.clone()),
        destination_identity: pod.identity().cloned(),
        service: None,
    };
    Flow::open(&mesh.metrics, labels, access, client.opened).on_account_of(&pod.carried, Side::Server)
}

/// Decides, now and (through the client's subject) whenever policies change.
pub(crate) async fn authorize(
    mesh: &Mesh,
    pod: &Arc<LocalPod>,
    client: &Client,
    target: SocketAddr,
) -> Result<(), Failure> {
    if pod.lease.is_none() {
        // Out of the mesh: its policies are none.
        return Ok(());
    }
    // Which policies apply is said by the pod's own workload, which may still be
    // on its way.
    mesh.own_workload(pod).await?;
    let facts = Facts {
        source: client.identity.clone(),
        source_address: client.address.ip(),
        destination: target,
    };
    client.subject.set(pod.clone(), facts.clone());
    mesh.decide(pod, &facts).into()
}

pub(crate) async fn dial(
    mesh: &Mesh,
    pod: &LocalPod,
    client: IpAddr,
    target: SocketAddr,
) -> Result<Connection, Failure> {
    // A pod's own address would not come back from it.
    let from = if client == IpAddr::from(pod.record.address) {
        mesh.self_call
    } else {
        client
    };
    Ok(mesh.dialer.connect(from, target).await?.into())
}
