//! What the kernel programs and their loader share: the shape of each map.
//! Compiled on both sides (`mesh-runtime/src/redirect.rs` includes this file).
//!
//! Change a shape and [`SCHEMA`] changes with it: pinned maps outlive the agent
//! that made them, and a program of one shape must never read a map of another.
//!
//! IPv4 addresses are numbers as `u32::from(Ipv4Addr)` gives them, ports as
//! written; the programs convert from the network's order once, in `parse`.

/// Part of the path under which everything is pinned.
pub const SCHEMA: u32 = 3;

/// Put on packets that are the proxy's. A policy route delivers them locally.
pub const MARK: u32 = 0x15;

/// Pods of one tenant on one host. Both pod maps have this bound: well above
/// any number of sandboxes a host takes, and 100 KiB when full.
pub const MAX_PODS: usize = 1024;

/// Service addresses of one tenant. Entries are allocated as they come (about
/// 70 bytes each); Kubernetes itself is tested to 10,000 Services.
pub const MAX_SERVICES: usize = 16_384;

/// Addresses of the host itself, IPv4, on all its devices.
pub const MAX_HOST_ADDRESSES: usize = 256;

/// Ranges of pods, over all hosts of the pool, and ranges of what no pod may
/// reach. They stand in [`Settings`] and are gone through for each packet that
/// is not the proxy's alone, so they are few: what lies side by side is one.
pub const MAX_POOL_RANGES: usize = 16;
pub const MAX_OFF_LIMITS: usize = 64;

/// Addresses and ports that pods may reach all the same.
pub const MAX_ALLOWED: usize = 256;

/// Workloads of one tenant with an address in the pool's ranges, over all hosts.
/// Entries are allocated as they come (about 70 bytes each).
pub const MAX_WORKLOADS: usize = 65_536;

/// A pod of this host.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodEntry {
    pub address: u32,
    /// Index, in the router, of the host side of its device.
    pub device: u32,
    pub mac: [u8; 6],
    /// [`ENROLLED`] or [`UNMESHED`].
    pub mode: u8,
    /// Whether the proxy that listens now knows the pod: 1 or 0. A new process
    /// takes the listeners over before it has learnt of every pod; until then
    /// it would reset what it can't tell, so the kernel keeps it from it.
    pub known: u8,
    /// Nanoseconds since the boot, suspended time included (`CLOCK_BOOTTIME`): after
    /// it everything to and from the pod is dropped, whether or not an agent is there
    /// to see to it. [`NO_DEADLINE`]: there is none. So 0 is one that has passed.
    pub deadline: u64,
}

pub const NO_DEADLINE: u64 = u64::MAX;

impl PodEntry {
    /// Whether the pod has no right to run any more, at `now` of the same clock.
    #[inline(always)]
    pub fn is_over(&self, now: u64) -> bool {
        now > self.deadline
    }
}

pub const ENROLLED: u8 = 1;
pub const UNMESHED: u8 = 2;

/// What holds for the whole router.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The tenant's pods, over all hosts. The tenant's say.
    pub cluster_pods: Range,
    /// The pods of this host, of all tenants.
    pub local_pods: Range,
    /// The pods of the pool, of all tenants over all hosts. The operator's say, as
    /// is what follows.
    pub pool: [Range; MAX_POOL_RANGES],
    /// What no pod may reach: hosts, infrastructure, clouds' metadata services.
    pub off_limits: [Range; MAX_OFF_LIMITS],
    /// The cluster DNS address.
    pub dns: u32,
    /// The link-local address that pods have as their gateway: the source of
    /// what the host itself sends to a pod.
    pub gateway: u32,
    /// The router's own address towards the host; 0 if it has none.
    pub router: u32,
    /// Index of the router's device towards the host.
    pub uplink: u32,
    /// Local ports of the proxy's own connections, first and last. They keep
    /// clear of the ports that a pod's kernel chooses by default, so that for an
    /// unmeshed pod the two can be told apart without looking up a socket.
    pub proxy_ports: [u16; 2],
}

/// `address` has no bits outside `mask`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Range {
    pub address: u32,
    pub mask: u32,
}

impl Range {
    /// Holds no address.
    pub const NONE: Self = Self { address: 1, mask: 0 };

    #[inline(always)]
    pub fn contains(&self, address: u32) -> bool {
        address & self.mask == self.address
    }
}

/// An address with a port, as a key.
#[inline(always)]
pub fn endpoint(address: u32, port: u16) -> u64 {
    (address as u64) << 16 | port as u64
}

/// Indices of the listeners' map.
pub mod slot {
    pub const OUTBOUND: u32 = 0;
    pub const INBOUND: u32 = 1;
    pub const HBONE: u32 = 2;
    pub const DNS_UDP: u32 = 3;
    pub const DNS_TCP: u32 = 4;
    pub const COUNT: usize = 5;
}

/// Why a packet was dropped; the index of its counter.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No pod is known on the device it came from.
    UnknownDevice = 0,
    /// The Ethernet source is not the pod's.
    SourceMac = 1,
    /// The IP source is not the pod's; or, from outside, it is one of ours.
    SourceAddress = 2,
    /// An Ethernet destination that is not this device's: another station's,
    /// multicast or broadcast.
    NotForThisHost = 3,
    Vlan = 4,
    /// Static neighbours on both sides make it needless, and an answer would be
    /// the pod's say over the router's neighbour table.
    Arp = 5,
    /// Not supported yet, so nothing of it passes.
    Ipv6 = 6,
    Ethertype = 7,
    /// Shorter than its headers, or headers that contradict each other.
    Malformed = 8,
    IpOptions = 9,
    Fragment = 10,
    /// Loopback, multicast, broadcast, reserved or link-local: nothing that is a
    /// pod's to reach.
    Destination = 11,
    /// From outside, to an address that is no pod here.
    NoSuchPod = 12,
    /// UDP pod to pod: only HBONE carries that, and it carries TCP.
    UdpToPod = 13,
    IcmpToPod = 14,
    IcmpType = 15,
    /// Neither TCP, UDP nor ICMP.
    Protocol = 16,
    /// To a Service's address by something else than TCP.
    NotTcpToService = 17,
    /// To an address of the host or of the router. What runs there is not the
    /// tenant's; an answer to the host's own connection is no such packet.
    HostLocal = 18,
    /// The proxy's listener is gone, or the proxy does not know the pod yet: the
    /// agent is down, or just starting.
    NoListener = 19,
    /// A packet for the proxy that was about to leave by the uplink: the policy
    /// route is missing.
    Leak = 20,
    /// To an address of the pool that is no workload of the tenant's, or to one that
    /// the operator keeps for the infrastructure.
    OffLimits = 21,
    /// From outside, in the name of a pod of the pool that is no workload of the
    /// tenant's, and not for the mesh's port.
    ForeignPod = 22,
    /// To or from a pod whose right to run has ended.
    RightEnded = 23,
}

impl Reason {
    pub const ALL: [Self; 24] = [
        Self::UnknownDevice,
        Self::SourceMac,
        Self::SourceAddress,
        Self::NotForThisHost,
        Self::Vlan,
        Self::Arp,
        Self::Ipv6,
        Self::Ethertype,
        Self::Malformed,
        Self::IpOptions,
        Self::Fragment,
        Self::Destination,
        Self::NoSuchPod,
        Self::UdpToPod,
        Self::IcmpToPod,
        Self::IcmpType,
        Self::Protocol,
        Self::NotTcpToService,
        Self::HostLocal,
        Self::NoListener,
        Self::Leak,
        Self::OffLimits,
        Self::ForeignPod,
        Self::RightEnded,
    ];
    pub const COUNT: usize = Self::ALL.len();

    /// As a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::UnknownDevice => "unknown_device",
            Self::SourceMac => "source_mac",
            Self::SourceAddress => "source_address",
            Self::NotForThisHost => "not_for_this_host",
            Self::Vlan => "vlan",
            Self::Arp => "arp",
            Self::Ipv6 => "ipv6",
            Self::Ethertype => "ethertype",
            Self::Malformed => "malformed",
            Self::IpOptions => "ip_options",
            Self::Fragment => "fragment",
            Self::Destination => "destination",
            Self::NoSuchPod => "no_such_pod",
            Self::UdpToPod => "udp_to_pod",
            Self::IcmpToPod => "icmp_to_pod",
            Self::IcmpType => "icmp_type",
            Self::Protocol => "protocol",
            Self::NotTcpToService => "not_tcp_to_service",
            Self::HostLocal => "host_local",
            Self::NoListener => "no_listener",
            Self::Leak => "leak",
            Self::OffLimits => "off_limits",
            Self::ForeignPod => "foreign_pod",
            Self::RightEnded => "right_ended",
        }
    }
}
