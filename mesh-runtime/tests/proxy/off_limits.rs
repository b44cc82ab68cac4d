//! What a tenant says of its cluster opens nothing of the pool: an endpoint, a Service
//! or an address that is a host's is not dialled.

use std::net::Ipv4Addr;

use mesh_api::istio::workload as wire;
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::TcpStream};

use crate::lab::{ALLOWED, Lab, OTHER_HOST, VIP, service, service_key, within};

const AGENT_PORT: u16 = 7443;

/// Something with an address, as an EndpointSlice names it, behind port 80 of a
/// Service `web`.
fn endpoint(address: Ipv4Addr, port: u16, tunnel: wire::TunnelProtocol) -> wire::Workload {
    wire::Workload {
        uid: "Kubernetes//EndpointSlice/shop/web".to_owned(),
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![address.octets().to_vec()],
        tunnel_protocol: tunnel.into(),
        services: [(
            service_key("web"),
            wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: port.into(),
                    ..Default::default()
                }],
            },
        )]
        .into(),
        ..Default::default()
    }
}

/// What the server said; nothing if the connection was refused or reset.
async fn heard(stream: std::io::Result<TcpStream>) -> Option<String> {
    let mut said = String::new();
    within("an answer or an end", stream.ok()?.read_to_string(&mut said))
        .await
        .ok()?;
    Some(said)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_off_limits_is_not_dialled_whatever_the_tenant_says_of_it() {
    let lab = Lab::new().await;
    for (address, port, name) in [
        (OTHER_HOST, AGENT_PORT, "agent"),
        (OTHER_HOST, 15008, "tunnel"),
        (ALLOWED.0, ALLOWED.1, "allowed"),
        (ALLOWED.0, 15008, "tunnel of what is allowed"),
    ] {
        let listener = lab.wire.listen((address, port));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // A client may not wait for it.
                let _gone = stream.write_all(name.as_bytes()).await;
            }
        });
    }
    let client = lab.pod(0, "client").await;
    lab.control.service(service("web", &[VIP], &[(80, 8080)]));
    lab.control.settled().await;

    let direct = heard(client.connect((OTHER_HOST, AGENT_PORT)).await).await;
    assert_eq!(direct, None, "dialled by its address");
    let none = wire::TunnelProtocol::None;
    let hbone = wire::TunnelProtocol::Hbone;
    for (address, port, tunnel, wanted) in [
        (OTHER_HOST, AGENT_PORT, none, None),
        (OTHER_HOST, 8080, hbone, None),
        (ALLOWED.0, ALLOWED.1, none, Some("allowed")),
        // Another port of it: that of tunnels.
        (ALLOWED.0, ALLOWED.1, hbone, None),
        (ALLOWED.0, 2379, none, None),
    ] {
        lab.control.workload(endpoint(address, port, tunnel));
        lab.control.settled().await;
        let said = heard(client.connect((VIP, 80)).await).await;
        assert_eq!(said.as_deref(), wanted, "an endpoint {address}:{port} {tunnel:?}");
    }

    // A Service that calls the host's address its own is led to its endpoints, and one
    // that passes connections through leads nowhere else than the address itself.
    lab.control.workload(endpoint(ALLOWED.0, ALLOWED.1, none));
    let mut own = service("web", &[OTHER_HOST], &[(AGENT_PORT, 80)]);
    own.load_balancing = Some(wire::LoadBalancing {
        mode: wire::load_balancing::Mode::Passthrough.into(),
        ..Default::default()
    });
    lab.control.service(own);
    lab.control.settled().await;
    let passed = heard(client.connect((OTHER_HOST, AGENT_PORT)).await).await;
    assert_eq!(passed, None, "a Service that passes through");
}
