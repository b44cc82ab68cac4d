//! A tenant's router: the network namespace on this host in which the tenant's
//! pods are joined, and out of reach of every other tenant. The proxy's sockets
//! are made there too.

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
};

use ipnet::Ipv4Net;
use mesh_runtime::netns::Netns;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use pool_agent_api::TenantId;
use tokio::sync::Mutex;

use super::{
    HOST_GATEWAY, HOST_MAC, Network, NetworkError, ROUTER_GATEWAY, ROUTER_MAC, ROUTER_UPLINK,
    netlink::{Netlink, Via, set_here, set_within},
    short_name,
};

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Router {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    netns: Netns,
    netlink: Netlink,
    /// The host's own, with the index there of the pair's other end.
    host: Arc<Netlink>,
    outside: u32,
    path: PathBuf,
    address: Ipv4Addr,
    mtu: u32,
    /// Which device each address that the host leads here is behind: of two pods that
    /// had one after the other, the one that ends late takes nothing from the other.
    led: Mutex<HashMap<Ipv4Addr, String>>,
}

impl Router {
    /// The namespace as a file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// The router's own address, out of the host's range: what the agent's probes come
    /// from, and what others on the underlay can answer.
    pub fn address(&self) -> Ipv4Addr {
        self.inner.address
    }

    pub(super) fn netlink(&self) -> &Netlink {
        &self.inner.netlink
    }

    pub(super) fn mtu(&self) -> u32 {
        self.inner.mtu
    }

    /// Leads the host's packets for `address`, which is behind `device` in here, to here.
    pub(super) async fn lead(&self, address: Ipv4Addr, device: &str) -> Result<(), NetworkError> {
        let mut led = self.inner.led.lock().await;
        self.inner
            .host
            .add_route(address.into(), self.way(), None)
            .await?;
        led.insert(address, device.to_owned());
        Ok(())
    }

    /// Leads them here no more, unless another device has the address by now.
    pub(super) async fn stop_leading(&self, address: Ipv4Addr, device: &str) -> Result<(), NetworkError> {
        let mut led = self.inner.led.lock().await;
        if led.get(&address).is_some_and(|newer| newer != device) {
            return Ok(());
        }
        self.inner.host.remove_route(address.into(), self.way()).await?;
        led.remove(&address);
        Ok(())
    }

    fn way(&self) -> Via {
        Via::Gateway(ROUTER_GATEWAY, self.inner.outside)
    }

    pub(super) async fn open(
        network: &Network,
        tenant: &TenantId,
        address: Ipv4Addr,
    ) -> Result<Self, NetworkError> {
        let path = network.layout.router(tenant);
        let in_namespace = |source| NetworkError::Namespace {
            path: path.clone(),
            source,
        };
        hold_namespace(&path).map_err(in_namespace)?;
        let netns = Netns::open(&path).map_err(in_namespace)?;
        let netlink = Netlink::within(&netns)?;
        for (setting, value) in [
            ("net/ipv4/ip_forward", "1"),
            // Spoofing is stopped where a packet enters, by the program on the pod's
            // device; the reverse path of what the proxy sends is not symmetric.
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/accept_redirects", "0"),
            ("net/ipv4/conf/default/accept_redirects", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
        ] {
            set_within(&netns, setting, value)?;
        }
        if netns
            .enter(|| Ok(Path::new("/proc/sys/net/ipv6").exists()))
            .unwrap_or(false)
        {
            set_within(&netns, "net/ipv6/conf/default/disable_ipv6", "1")?;
            set_within(&netns, "net/ipv6/conf/all/disable_ipv6", "1")?;
        }
        let lo = required(&netlink, "lo").await?;
        netlink.raise(lo).await?;

        let outside = short_name("sdr", tenant.as_str());
        let host = &network.host;
        let paired = host.find(&outside).await?.is_some() && netlink.find(ROUTER_UPLINK).await?.is_some();
        if !paired {
            // Half a pair is of a namespace that is gone.
            host.delete(&outside).await?;
            netlink.delete(ROUTER_UPLINK).await?;
            let file = File::open(&path).map_err(in_namespace)?;
            host.add_pair(
                (&outside, HOST_MAC),
                (ROUTER_UPLINK, ROUTER_MAC),
                &file,
                network.mtu,
            )
            .await?;
        }
        let inside = required(&netlink, ROUTER_UPLINK).await?;
        // On this device: the mesh takes what comes from here for the host's own.
        netlink.set_address(inside, address).await?;
        netlink.raise(inside).await?;
        netlink.add_neighbour(inside, HOST_GATEWAY, HOST_MAC).await?;
        let default = Via::Gateway(HOST_GATEWAY, inside);
        netlink
            .add_route(Ipv4Net::default(), default, Some(address))
            .await?;
        // Other tenants' pods of this host are in it too.
        netlink.add_route(network.range, Via::Unreachable, None).await?;

        let index = required(host, &outside).await?;
        if Path::new("/proc/sys/net/ipv6").exists() {
            set_here(&format!("net/ipv6/conf/{outside}/disable_ipv6"), "1")?;
        }
        host.raise(index).await?;
        host.add_neighbour(index, ROUTER_GATEWAY, ROUTER_MAC).await?;
        let router = Self {
            inner: Arc::new(Inner {
                netns,
                netlink,
                host: network.host.clone(),
                outside: index,
                path,
                address,
                mtu: network.mtu,
                led: Mutex::default(),
            }),
        };
        router.lead(address, ROUTER_UPLINK).await?;
        Ok(router)
    }
}

async fn required(netlink: &Netlink, name: &str) -> Result<u32, NetworkError> {
    match netlink.find(name).await? {
        Some(link) => Ok(link.index),
        None => Err(NetworkError::Kernel {
            action: format!("finding device {name}"),
            source: io::ErrorKind::NotFound.into(),
        }),
    }
}

/// Makes a namespace that lives as long as the file at `path`, unless it is there.
fn hold_namespace(path: &Path) -> io::Result<()> {
    if is_namespace(path) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    File::create(path)?;
    let target = path.to_owned();
    // Only the thread that leaves the old namespace is in the new one, so it gets a
    // thread of its own.
    let made = std::thread::spawn(move || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        Ok(())
    });
    made.join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that makes the namespace panicked")))
}

/// Whether the file is a namespace, mounted there.
fn is_namespace(path: &Path) -> bool {
    /// `NSFS_MAGIC` of linux/magic.h.
    const NSFS: i64 = 0x6e73_6673;
    nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type().0 == NSFS)
}
