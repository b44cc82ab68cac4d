//! What becomes of a packet: a plain function of its headers, the pod it came
//! from and the router's tables. The hooks call it in the kernel; user space
//! compiles it too and holds its tables and properties (`redirect::policy`).
//!
//! What always holds:
//! - what is not known is dropped, with the reason that is counted;
//! - TCP of an enrolled pod is never passed on: it is the proxy's or dropped;
//! - nothing of the pool is reached but the tenant's own workloads, and nobody who
//!   has a pool's address reaches them but they themselves and the mesh;
//! - a packet that passes has the source of the pod whose device it came from;
//! - a pod whose right to run has ended gets nothing through, and nothing gets to it.

use core::hint::black_box;

use super::abi::{ENROLLED, PodEntry, Range, Reason, Settings, slot};

/// Ethernet, IPv4 without options, and the first 8 bytes after: ports, or
/// ICMP's type. No legal packet that could pass is shorter.
pub const HEADERS: usize = 14 + 20 + 8;

/// Where TCP has its flags.
pub const TCP_FLAGS: usize = 14 + 20 + 13;

/// Where an ICMP error holds the protocol of the packet it quotes.
pub const QUOTED_PROTOCOL: usize = HEADERS + 9;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;

pub const HBONE_PORT: u16 = 15008;
pub const DNS_PORT: u16 = 53;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// On to the router's own routing.
    Pass,
    /// Mark it: delivered to a socket of the proxy.
    Capture,
    /// Mark it if the proxy has a connection with just these addresses and
    /// ports, else pass it.
    CaptureIfConnected,
    Drop(Reason),
}

use Verdict::{Capture, CaptureIfConnected, Drop, Pass};

/// The router's tables, looked up only when the answer is needed.
pub trait Tables {
    /// The pod of this host that has this address.
    fn pod(&self, address: u32) -> Option<&PodEntry>;
    /// Whether a Service has this address.
    fn is_service(&self, address: u32) -> bool;
    /// Whether it is one of the host's own.
    fn is_host(&self, address: u32) -> bool;
    /// Whether the tenant has a workload with this address of the pool, on any host.
    fn is_workload(&self, address: u32) -> bool;
    /// Whether the operator lets pods reach this, which is off limits but for that.
    fn is_allowed(&self, address: u32, port: u16) -> bool;
    /// The time that pods' deadlines are of.
    fn now(&self) -> u64;
}

/// What the decision needs of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub source_mac: [u8; 6],
    pub source: u32,
    pub destination: u32,
    pub protocol: u8,
    /// Any part of a fragmented packet, the first included.
    pub fragment: bool,
    /// Not an ICMP packet's: 0.
    pub source_port: u16,
    /// Not an ICMP packet's: 0.
    pub destination_port: u16,
    /// Not another protocol's: 0.
    pub icmp_type: u8,
    /// Not another protocol's: 0. Not among the headers that [`parse`] reads,
    /// for a datagram may end before them.
    pub tcp_flags: u8,
}

#[inline(always)]
fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// Reads the headers of an Ethernet frame.
#[inline(always)]
pub fn parse(f: &[u8; HEADERS]) -> Result<Packet, Reason> {
    match be16(f[12], f[13]) {
        0x0800 => {}
        0x0806 => return Err(Reason::Arp),
        0x86dd => return Err(Reason::Ipv6),
        0x8100 | 0x88a8 => return Err(Reason::Vlan),
        _ => return Err(Reason::Ethertype),
    }
    if f[14] >> 4 != 4 || f[14] & 0xf < 5 {
        return Err(Reason::Malformed);
    }
    if f[14] & 0xf != 5 {
        return Err(Reason::IpOptions);
    }
    let protocol = f[23];
    let has_ports = protocol == TCP || protocol == UDP;
    Ok(Packet {
        source_mac: [f[6], f[7], f[8], f[9], f[10], f[11]],
        source: u32::from_be_bytes([f[26], f[27], f[28], f[29]]),
        destination: u32::from_be_bytes([f[30], f[31], f[32], f[33]]),
        protocol,
        // More-fragments, or an offset.
        fragment: be16(f[20], f[21]) & 0x3fff != 0,
        source_port: if has_ports { be16(f[34], f[35]) } else { 0 },
        destination_port: if has_ports { be16(f[36], f[37]) } else { 0 },
        icmp_type: if protocol == ICMP { f[34] } else { 0 },
        tcp_flags: 0,
    })
}

impl Packet {
    /// Whether it is an error that quotes another packet; which one, the
    /// decision on the uplink needs to know.
    #[inline(always)]
    pub fn is_icmp_error(&self) -> bool {
        self.protocol == ICMP && !self.fragment && matches!(self.icmp_type, 3 | 11 | 12)
    }

    /// Whether it asks for a listener: a SYN without ACK, or a datagram. All
    /// else belongs to a connection.
    #[inline(always)]
    pub fn is_opening(&self) -> bool {
        self.protocol == UDP || (self.protocol == TCP && self.tcp_flags & 0x12 == 0x02)
    }

    /// Echo and errors. Redirects, timestamps, router advertisements and the
    /// rest would let one side steer or measure the other.
    #[inline(always)]
    fn is_useful_icmp(&self) -> bool {
        matches!(self.icmp_type, 0 | 3 | 8 | 11 | 12)
    }

    #[inline(always)]
    fn is_cluster_dns(&self, settings: &Settings) -> bool {
        self.destination == settings.dns
            && self.destination_port == DNS_PORT
            && (self.protocol == UDP || self.protocol == TCP)
    }

    /// Of a tunnel, to an enrolled pod: whoever sends it proves who it is, or is
    /// turned away by the proxy. An answer belongs to a tunnel that was opened here.
    #[inline(always)]
    fn is_tunnels(&self) -> bool {
        self.protocol == TCP
            && (self.destination_port == HBONE_PORT || (self.source_port == HBONE_PORT && !self.is_opening()))
    }

    #[inline(always)]
    fn is_to_proxy_port(&self, settings: &Settings) -> bool {
        let [first, last] = settings.proxy_ports;
        first <= self.destination_port && self.destination_port <= last
    }
}

/// An address that is the router's own.
#[inline(always)]
fn is_router(settings: &Settings, address: u32) -> bool {
    address == settings.gateway || (address == settings.router && address != 0)
}

/// Addresses no pod has business with: "this network", loopback, link-local
/// (a cloud's metadata service gives the host's own credentials), multicast,
/// reserved and broadcast.
#[inline(always)]
fn is_unreachable(address: u32) -> bool {
    let first = (address >> 24) as u8;
    first == 0 || first == 127 || first >= 224 || address >> 16 == 0xa9fe
}

/// Without a branch for each range: a kernel that has to prove the program safe
/// follows both ways of each, and the ways of all of them multiply.
#[inline(always)]
fn within<const N: usize>(ranges: &[Range; N], address: u32) -> bool {
    let mut found = 0;
    for range in ranges {
        // 0 if it is within. What the compiler knows of this it makes a branch of.
        let outside = black_box(u64::from((address & range.mask) ^ range.address));
        found |= outside.wrapping_sub(1) >> 63;
    }
    found != 0
}

/// Whether it is an address of the pool, but none that the tenant may reach.
#[inline(always)]
fn is_off_limits(settings: &Settings, packet: &Packet, tables: &impl Tables) -> bool {
    if within(&settings.off_limits, packet.destination) {
        // In a fragment there may be anything where a port would be.
        return packet.fragment || !tables.is_allowed(packet.destination, packet.destination_port);
    }
    within(&settings.pool, packet.destination) && !tables.is_workload(packet.destination)
}

#[inline(always)]
fn same(a: &[u8; 6], b: &[u8; 6]) -> bool {
    ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5])) == 0
}

/// A packet that a pod sent.
#[inline(always)]
pub fn from_pod(pod: &PodEntry, settings: &Settings, packet: &Packet, tables: &impl Tables) -> Verdict {
    if pod.is_over(tables.now()) {
        return Drop(Reason::RightEnded);
    }
    if !same(&packet.source_mac, &pod.mac) {
        return Drop(Reason::SourceMac);
    }
    if packet.source != pod.address {
        return Drop(Reason::SourceAddress);
    }
    if packet.is_cluster_dns(settings) {
        return if packet.fragment {
            Drop(Reason::Fragment)
        } else {
            Capture
        };
    }
    if is_router(settings, packet.destination) {
        // An answer to the host's own connection (a probe, a pod that reaches
        // itself through a Service); `select` refuses new ones.
        return match packet.protocol {
            TCP if packet.fragment => Drop(Reason::Fragment),
            TCP => Capture,
            _ => Drop(Reason::HostLocal),
        };
    }
    if is_unreachable(packet.destination) {
        return Drop(Reason::Destination);
    }
    if pod.mode == ENROLLED {
        from_enrolled(settings, packet, tables)
    } else {
        from_unmeshed(settings, packet, tables)
    }
}

#[inline(always)]
fn from_enrolled(settings: &Settings, packet: &Packet, tables: &impl Tables) -> Verdict {
    if packet.fragment {
        return Drop(Reason::Fragment);
    }
    match packet.protocol {
        TCP => Capture,
        UDP if is_pods(settings, packet.destination) => Drop(Reason::UdpToPod),
        ICMP if is_pods(settings, packet.destination) => Drop(Reason::IcmpToPod),
        ICMP if !packet.is_useful_icmp() => Drop(Reason::IcmpType),
        UDP | ICMP if tables.is_service(packet.destination) || packet.destination == settings.dns => {
            Drop(Reason::NotTcpToService)
        }
        UDP | ICMP if tables.is_host(packet.destination) => Drop(Reason::HostLocal),
        UDP | ICMP if is_off_limits(settings, packet, tables) => Drop(Reason::OffLimits),
        UDP | ICMP => Pass,
        _ => Drop(Reason::Protocol),
    }
}

/// Whether it is where pods are, the tenant's or others'. What the tenant says of
/// its own range may be too little.
#[inline(always)]
fn is_pods(settings: &Settings, address: u32) -> bool {
    settings.cluster_pods.contains(address) || within(&settings.pool, address)
}

#[inline(always)]
fn from_unmeshed(settings: &Settings, packet: &Packet, tables: &impl Tables) -> Verdict {
    if packet.protocol == TCP && packet.fragment {
        return Drop(Reason::Fragment);
    }
    if packet.protocol == ICMP && !packet.fragment && !packet.is_useful_icmp() {
        return Drop(Reason::IcmpType);
    }
    match tables.pod(packet.destination) {
        Some(to) if to.is_over(tables.now()) => Drop(Reason::RightEnded),
        Some(to) if to.mode == ENROLLED => to_enrolled(packet),
        Some(_) => to_unmeshed(settings, packet),
        // Nobody else balances a Service here, so the proxy does, in plaintext.
        None if tables.is_service(packet.destination) || packet.destination == settings.dns => {
            match packet.protocol {
                TCP => Capture,
                _ => Drop(Reason::NotTcpToService),
            }
        }
        None if tables.is_host(packet.destination) => Drop(Reason::HostLocal),
        None if is_off_limits(settings, packet, tables) && !is_answer(settings, packet) => {
            Drop(Reason::OffLimits)
        }
        None => Pass,
    }
}

/// Whether it can only be part of a connection that the other side opened. Nobody
/// of the pool opens one to a pod that may not open one to him; the infrastructure
/// may, as an API server that calls a webhook does.
#[inline(always)]
fn is_answer(settings: &Settings, packet: &Packet) -> bool {
    packet.protocol == TCP
        && !packet.fragment
        && !packet.is_opening()
        && !within(&settings.pool, packet.destination)
}

/// A pod's plaintext to an enrolled pod here. TCP is the proxy's to admit.
#[inline(always)]
fn to_enrolled(packet: &Packet) -> Verdict {
    match packet.protocol {
        TCP => Capture,
        UDP => Drop(Reason::UdpToPod),
        ICMP => Drop(Reason::IcmpToPod),
        _ => Drop(Reason::Protocol),
    }
}

/// To an unmeshed pod here, from anywhere: its own, unless it answers a
/// connection that the proxy made in its name.
#[inline(always)]
fn to_unmeshed(settings: &Settings, packet: &Packet) -> Verdict {
    if packet.protocol == TCP && packet.is_to_proxy_port(settings) {
        CaptureIfConnected
    } else {
        Pass
    }
}

/// A packet that came from the host. `quoted` is the protocol of the packet
/// that an ICMP error quotes.
#[inline(always)]
pub fn from_uplink(settings: &Settings, packet: &Packet, quoted: u8, tables: &impl Tables) -> Verdict {
    if settings.local_pods.contains(packet.source) {
        return Drop(Reason::SourceAddress);
    }
    // Another tenant's pod or router, or somebody who takes one's name.
    let foreign = within(&settings.pool, packet.source) && !tables.is_workload(packet.source);
    if packet.destination == settings.router && settings.router != 0 {
        return if foreign { Drop(Reason::ForeignPod) } else { Pass };
    }
    let Some(to) = tables.pod(packet.destination) else {
        return Drop(Reason::NoSuchPod);
    };
    if to.is_over(tables.now()) {
        return Drop(Reason::RightEnded);
    }
    if foreign && !(to.mode == ENROLLED && packet.is_tunnels()) {
        return Drop(Reason::ForeignPod);
    }
    if packet.fragment && (packet.protocol == TCP || to.mode == ENROLLED) {
        return Drop(Reason::Fragment);
    }
    if packet.protocol == ICMP && !packet.fragment && !packet.is_useful_icmp() {
        return Drop(Reason::IcmpType);
    }
    if to.mode != ENROLLED {
        return to_unmeshed(settings, packet);
    }
    let from_pod = is_pods(settings, packet.source);
    match packet.protocol {
        TCP => Capture,
        UDP if from_pod => Drop(Reason::UdpToPod),
        ICMP if from_pod => Drop(Reason::IcmpToPod),
        // About a connection that the proxy made with the pod's address, such
        // as "fragmentation needed": the proxy's socket has to hear it.
        ICMP if packet.is_icmp_error() && quoted == TCP => Capture,
        UDP | ICMP => Pass,
        _ => Drop(Reason::Protocol),
    }
}

/// A packet that is about to leave by the uplink, whoever sent it: a pod, whose
/// packets [`from_pod`] has let pass, or a socket of this host in the router (the
/// proxy's, a probe's, a question to a name server). What those may dial is decided
/// where they are; here it is held.
#[inline(always)]
pub fn to_uplink(settings: &Settings, packet: &Packet, tables: &impl Tables) -> Verdict {
    let answer = match packet.protocol {
        // A tunnel's far end proves who it is, and may be known to the proxy before it
        // is to the kernel.
        TCP => {
            !packet.is_opening()
                || (packet.destination_port == HBONE_PORT
                    && !within(&settings.off_limits, packet.destination))
        }
        // The router's own: a pod's to what is off limits has been dropped.
        ICMP => packet.is_icmp_error(),
        _ => false,
    };
    if !answer && is_off_limits(settings, packet, tables) {
        return Drop(Reason::OffLimits);
    }
    // What the proxy still has to send in the name of a pod: the kernel would go on
    // with it when the agent has stopped. No other table has a pod's deadline.
    if tables
        .pod(packet.source)
        .is_some_and(|pod| pod.is_over(tables.now()))
    {
        return Drop(Reason::RightEnded);
    }
    Pass
}

/// A packet that asks for a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Index of the device it came in by.
    pub device: u32,
    pub protocol: u8,
    pub destination: u32,
    pub port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The kernel's ordinary look-up.
    Ordinary,
    /// The listener in this slot, or nothing if the slot is empty.
    Slot(u32),
    Refuse(Reason),
}

impl Packet {
    #[inline(always)]
    pub fn arrival(&self, device: u32) -> Arrival {
        Arrival {
            device,
            protocol: self.protocol,
            destination: self.destination,
            port: self.destination_port,
        }
    }
}

/// Which listener a new connection or datagram goes to. `pod` is the one whose
/// device it came in by.
#[inline(always)]
pub fn select(
    pod: Option<&PodEntry>,
    settings: &Settings,
    arrival: &Arrival,
    tables: &impl Tables,
) -> Selection {
    let Some(pod) = pod else {
        return match tables.pod(arrival.destination) {
            Some(to)
                if arrival.device == settings.uplink && arrival.protocol == TCP && to.mode == ENROLLED =>
            {
                to_slot(to, inbound(arrival.port))
            }
            _ => Selection::Ordinary,
        };
    };
    if arrival.destination == settings.dns && arrival.port == DNS_PORT {
        return to_slot(
            pod,
            if arrival.protocol == UDP {
                slot::DNS_UDP
            } else {
                slot::DNS_TCP
            },
        );
    }
    if arrival.protocol != TCP {
        return Selection::Ordinary;
    }
    if is_router(settings, arrival.destination) || tables.is_host(arrival.destination) {
        return Selection::Refuse(Reason::HostLocal);
    }
    if pod.mode == ENROLLED {
        return to_slot(pod, slot::OUTBOUND);
    }
    match tables.pod(arrival.destination) {
        Some(to) if to.mode == ENROLLED => to_slot(to, inbound(arrival.port)),
        Some(_) => Selection::Ordinary,
        None if tables.is_service(arrival.destination) || arrival.destination == settings.dns => {
            to_slot(pod, slot::OUTBOUND)
        }
        None => Selection::Ordinary,
    }
}

/// The listener for `pod`, once the proxy knows it.
#[inline(always)]
fn to_slot(pod: &PodEntry, slot: u32) -> Selection {
    if pod.known == 0 {
        Selection::Refuse(Reason::NoListener)
    } else {
        Selection::Slot(slot)
    }
}

#[inline(always)]
fn inbound(port: u16) -> u32 {
    if port == HBONE_PORT {
        slot::HBONE
    } else {
        slot::INBOUND
    }
}
