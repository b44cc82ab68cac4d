//! The kernel programs of one tenant's router: loaded, attached, pinned, fed.
//!
//! Plain blocking calls, made by the one thread that owns them ([`super::router`])
//! and stands in the router's namespace, because devices are found there.
//!
//! What always holds:
//! - maps and links are pinned under `<bpffs>/v<schema>/<tenant>/`, so the kernel
//!   goes on classifying and dropping when this process is gone; links and
//!   filters hold their programs, so programs need no pin of their own;
//! - a pod's device has its entry before it has its program. Once the entry is
//!   taken away, the program knows no pod there and drops;
//! - a program leaves a pod's device only with the device itself. One without
//!   would be forwarded unclassified.
//!
//! On pods' devices the program is a filter of the clsact queueing discipline,
//! not a tcx link. Both run at the same place of the kernel, tcx first; but the
//! kernel makes a link by waiting, with all of networking's configuration
//! locked, until every CPU has passed through a quiet state: 12 to 25 ms for
//! each pod, one pod after another, against 0.2 ms for a filter. A filter needs
//! no pin either: it lives and dies with its device. The uplink's two links and
//! the look-up's are made once for a tenant, and what is pinned cannot be taken
//! off by accident.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, MapData, MapError, SockMap},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, SkLookup, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
    },
};
use nix::{errno::Errno, net::if_::if_nametoindex};

use super::{
    Deadline, Drops,
    abi::{
        self, MAX_ALLOWED, MAX_HOST_ADDRESSES, MAX_OFF_LIMITS, MAX_PODS, MAX_POOL_RANGES, MAX_SERVICES,
        MAX_WORKLOADS, PodEntry, Reason, SCHEMA, Settings, slot,
    },
    listeners::Listeners,
};
use crate::netns::Netns;

/// Made by `mesh-runtime/ebpf/build` from the sources beside it.
static OBJECT: &[u8] = include_bytes_aligned!("../../ebpf/object/redirect.o");

// SAFETY (each): `repr(C)` of integers with no padding, as the sizes below prove.
unsafe impl aya::Pod for PodEntry {}
unsafe impl aya::Pod for Settings {}
const _: () = assert!(size_of::<PodEntry>() == 4 + 4 + 6 + 1 + 1 + 8);
const _: () = assert!(size_of::<Settings>() == (2 + MAX_POOL_RANGES + MAX_OFF_LIMITS) * 8 + 4 * 4 + 4);

#[derive(Debug, thiserror::Error)]
pub enum ProgramsError {
    #[error("{} is not on a mounted BPF file system", path.display())]
    NotBpffs { path: PathBuf },
    #[error("cannot make {} for pinned maps and links", path.display())]
    MakeDirectory { path: PathBuf, source: io::Error },
    #[error("cannot load the kernel programs")]
    Load { source: Box<EbpfError> },
    #[error("the checked-in kernel object has no {name}")]
    Missing { name: &'static str },
    #[error("the map pinned at {} is of another shape than this agent's: close the tenant and open it anew", path.display())]
    Shape { path: PathBuf },
    #[error("cannot open map {name}")]
    OpenMap {
        name: &'static str,
        source: Box<MapError>,
    },
    #[error("cannot write map {name}")]
    WriteMap {
        name: &'static str,
        source: Box<MapError>,
    },
    #[error("cannot read map {name}")]
    ReadMap {
        name: &'static str,
        source: Box<MapError>,
    },
    #[error("the kernel refuses program {name}")]
    LoadProgram {
        name: &'static str,
        source: Box<ProgramError>,
    },
    #[error("cannot attach program {name} to {target}")]
    Attach {
        name: &'static str,
        target: String,
        source: Box<ProgramError>,
    },
    #[error("cannot read the link pinned at {}", path.display())]
    ReadLink { path: PathBuf, source: Box<LinkError> },
    #[error("cannot pin a link at {}", path.display())]
    Pin {
        path: PathBuf,
        source: Box<aya::pin::PinError>,
    },
    #[error("cannot remove {}", path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("there is no device {name} in the router")]
    NoDevice { name: String, source: Errno },
    #[error("address {address} is another pod's, on device {device}")]
    AddressTaken { address: Ipv4Addr, device: u32 },
    #[error("{count} addresses of the host, more than the {MAX_HOST_ADDRESSES} there is room for")]
    TooManyHostAddresses { count: usize },
    #[error("{count} Service addresses, more than the {MAX_SERVICES} there is room for")]
    TooManyServices { count: usize },
    #[error("{count} addresses of workloads, more than the {MAX_WORKLOADS} there is room for")]
    TooManyWorkloads { count: usize },
}

/// A pod's device, as the agent hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name, in the router, of its host side.
    pub name: String,
    /// Of the pod's side: what its frames carry as their source.
    pub mac: [u8; 6],
    pub address: Ipv4Addr,
    pub mode: crate::pod::Mode,
    /// Until when it may send and be sent to; of a device that is attached already,
    /// what it has stands.
    pub deadline: Deadline,
}

pub(super) struct Programs {
    directory: PathBuf,
    router: Netns,
    uplink: String,
    ebpf: Ebpf,
    by_device: HashMap<MapData, u32, PodEntry>,
    by_address: HashMap<MapData, u32, PodEntry>,
    services: HashMap<MapData, u32, u8>,
    workloads: HashMap<MapData, u32, u8>,
    drops: Arc<Drops>,
}

const POD_INGRESS: &str = "pod_ingress";
const UPLINK_INGRESS: &str = "uplink_ingress";
const UPLINK_EGRESS: &str = "uplink_egress";
const SOCKET_LOOKUP: &str = "socket_lookup";

/// Of the only filter on a pod's device.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Where everything of `tenant` is pinned. The schema stands first, so that an
/// agent with another one makes its own and does not read this one's.
pub(super) fn directory(bpffs: &Path, tenant: &str) -> PathBuf {
    bpffs.join(format!("v{SCHEMA}")).join(tenant)
}

impl Programs {
    /// Loads the programs and attaches them to the router; what an earlier
    /// process pinned is taken over: its links get these programs, its pods stay
    /// until their device goes, `listeners` take its listeners' place.
    ///
    /// The calling thread stands in `router`.
    pub(super) fn open(
        directory: PathBuf,
        router: Netns,
        uplink: String,
        settings: Settings,
        host_addresses: &BTreeSet<u32>,
        allowed: &BTreeSet<u64>,
        listeners: &Listeners,
    ) -> Result<Self, ProgramsError> {
        if host_addresses.len() > MAX_HOST_ADDRESSES {
            return Err(ProgramsError::TooManyHostAddresses {
                count: host_addresses.len(),
            });
        }
        let settings = Settings {
            uplink: index(&uplink)?,
            ..settings
        };
        for part in ["maps", "links"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(|source| ProgramsError::MakeDirectory { path, source })?;
        }
        if nix::sys::statfs::statfs(&directory).map(|s| s.filesystem_type())
            != Ok(nix::sys::statfs::BPF_FS_MAGIC)
        {
            return Err(ProgramsError::NotBpffs { path: directory });
        }

        let maps = directory.join("maps");
        let mut loader = EbpfLoader::new();
        // The programs read only what the kernel promises to user space, so its
        // own types (5 MB to parse) are not needed.
        loader.btf(None);
        for (name, _) in SHAPES {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut ebpf = loader.load(OBJECT).map_err(|source| ProgramsError::Load {
            source: Box::new(source),
        })?;
        for (name, wanted) in SHAPES {
            if shape(&ebpf, name)? != *wanted {
                return Err(ProgramsError::Shape {
                    path: maps.join(name),
                });
            }
        }

        // Every map has to stay open until the programs that name it are loaded.
        let mut router_settings: Array<MapData, Settings> = take(&mut ebpf, "SETTINGS")?;
        // Written only if it changed: a reader in the kernel could see half of it.
        if router_settings.get(&0, 0).map_err(read("SETTINGS"))? != settings {
            router_settings.set(0, settings, 0).map_err(write("SETTINGS"))?;
        }
        let mut hosts = take(&mut ebpf, "HOST_ADDRESSES")?;
        replace(&mut hosts, host_addresses, "HOST_ADDRESSES")?;
        let mut allowances = take(&mut ebpf, "ALLOWED")?;
        replace(&mut allowances, allowed, "ALLOWED")?;
        let mut slots: SockMap<MapData> = take(&mut ebpf, "LISTENERS")?;
        let mut programs = Self {
            by_device: take(&mut ebpf, "PODS_BY_DEVICE")?,
            by_address: take(&mut ebpf, "PODS_BY_ADDRESS")?,
            drops: Arc::new(Drops::new(take(&mut ebpf, "DROPS")?)),
            services: take(&mut ebpf, "SERVICES")?,
            workloads: take(&mut ebpf, "WORKLOADS")?,
            directory,
            router,
            uplink,
            ebpf,
        };

        for name in [POD_INGRESS, UPLINK_INGRESS, UPLINK_EGRESS] {
            programs
                .classifier(name)?
                .load()
                .map_err(|source| refused(name, source))?;
        }
        let uplink = programs.uplink.clone();
        programs.link(UPLINK_EGRESS, TcAttachType::Egress, &uplink, "uplink-egress")?;
        programs.link(UPLINK_INGRESS, TcAttachType::Ingress, &uplink, "uplink-ingress")?;
        programs.sweep()?;
        programs.link_socket_lookup()?;
        programs.doubt_pods()?;
        // Last: until here an old process' listeners served, if there is one.
        for (slot, socket) in [
            (slot::OUTBOUND, listeners.outbound.as_raw_fd()),
            (slot::INBOUND, listeners.inbound.as_raw_fd()),
            (slot::HBONE, listeners.hbone.as_raw_fd()),
            (slot::DNS_UDP, listeners.dns_udp.as_raw_fd()),
            (slot::DNS_TCP, listeners.dns_tcp.as_raw_fd()),
        ] {
            slots.set(slot, &socket, 0).map_err(write("LISTENERS"))?;
        }
        Ok(programs)
    }

    pub(super) fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Keeps every pod from the listeners that are about to change, until it is
    /// attached again: the proxy behind them does not know it yet.
    fn doubt_pods(&mut self) -> Result<(), ProgramsError> {
        for (map, name) in [
            (&mut self.by_device, "PODS_BY_DEVICE"),
            (&mut self.by_address, "PODS_BY_ADDRESS"),
        ] {
            let entries: Vec<_> = map.iter().collect::<Result<_, _>>().map_err(read(name))?;
            for (key, entry) in entries {
                map.insert(key, PodEntry { known: 0, ..entry }, 0)
                    .map_err(write(name))?;
            }
        }
        Ok(())
    }

    /// Classifies what comes from `device` as this pod's from now on. Doing it
    /// again changes nothing.
    pub(super) fn attach(&mut self, device: &Device) -> Result<(), ProgramsError> {
        let index = index(&device.name)?;
        let entry = PodEntry {
            address: device.address.into(),
            device: index,
            mac: device.mac,
            mode: match device.mode {
                crate::pod::Mode::Enrolled => abi::ENROLLED,
                crate::pod::Mode::Unmeshed => abi::UNMESHED,
            },
            known: 1,
            deadline: device.deadline.to_kernel(),
        };
        if let Some(other) = get(&self.by_address, entry.address, "PODS_BY_ADDRESS")?
            && other.device != index
        {
            if exists(other.device) {
                return Err(ProgramsError::AddressTaken {
                    address: device.address,
                    device: other.device,
                });
            }
            self.device_gone(other.device)?;
        }
        let entry = match get(&self.by_device, index, "PODS_BY_DEVICE")? {
            Some(before) if before.address == entry.address => PodEntry {
                deadline: before.deadline,
                ..entry
            },
            Some(before) => {
                remove(&mut self.by_address, before.address, "PODS_BY_ADDRESS")?;
                entry
            }
            None => entry,
        };
        self.by_device
            .insert(index, entry, 0)
            .map_err(write("PODS_BY_DEVICE"))?;
        self.by_address
            .insert(entry.address, entry, 0)
            .map_err(write("PODS_BY_ADDRESS"))?;
        self.filter(&device.name)
    }

    /// Moves the deadlines of the pods with these addresses; one that is not attached
    /// has none to move.
    pub(super) fn set_deadlines(
        &mut self,
        deadlines: &BTreeMap<Ipv4Addr, Deadline>,
    ) -> Result<(), ProgramsError> {
        for (address, deadline) in deadlines {
            let address = u32::from(*address);
            let Some(entry) = get(&self.by_address, address, "PODS_BY_ADDRESS")? else {
                continue;
            };
            let entry = PodEntry {
                deadline: deadline.to_kernel(),
                ..entry
            };
            self.by_device
                .insert(entry.device, entry, 0)
                .map_err(write("PODS_BY_DEVICE"))?;
            self.by_address
                .insert(address, entry, 0)
                .map_err(write("PODS_BY_ADDRESS"))?;
        }
        Ok(())
    }

    /// None if no pod is attached with this address.
    pub(super) fn deadline(&self, address: Ipv4Addr) -> Result<Option<Deadline>, ProgramsError> {
        let entry = get(&self.by_address, address.into(), "PODS_BY_ADDRESS")?;
        Ok(entry.map(|entry| Deadline::of_kernel(entry.deadline)))
    }

    /// Drops everything to and from the pod with this address. Its device keeps
    /// its program for as long as it is there.
    pub(super) fn detach(&mut self, address: Ipv4Addr) -> Result<(), ProgramsError> {
        let address = u32::from(address);
        let Some(entry) = get(&self.by_address, address, "PODS_BY_ADDRESS")? else {
            return Ok(());
        };
        remove(&mut self.by_device, entry.device, "PODS_BY_DEVICE")?;
        remove(&mut self.by_address, address, "PODS_BY_ADDRESS")
    }

    /// Forgets a device that was deleted; its program went with it.
    pub(super) fn device_gone(&mut self, device: u32) -> Result<(), ProgramsError> {
        if let Some(entry) = get(&self.by_device, device, "PODS_BY_DEVICE")? {
            remove(&mut self.by_device, device, "PODS_BY_DEVICE")?;
            if get(&self.by_address, entry.address, "PODS_BY_ADDRESS")?.is_some_and(|e| e.device == device) {
                remove(&mut self.by_address, entry.address, "PODS_BY_ADDRESS")?;
            }
        }
        Ok(())
    }

    /// Looks at all pods' devices: forgets those that are not there any more,
    /// and sees to it that the others have this process' program.
    pub(super) fn sweep(&mut self) -> Result<(), ProgramsError> {
        let devices: Vec<u32> = self
            .by_device
            .keys()
            .collect::<Result<_, _>>()
            .map_err(read("PODS_BY_DEVICE"))?;
        for device in devices {
            self.look_after(device)?;
        }
        // Left behind by a process that died between its two writes.
        let mut orphans = Vec::new();
        for entry in self.by_address.iter() {
            let (address, entry) = entry.map_err(read("PODS_BY_ADDRESS"))?;
            if get(&self.by_device, entry.device, "PODS_BY_DEVICE")?.is_none_or(|e| e.address != address) {
                orphans.push(address);
            }
        }
        for address in orphans {
            remove(&mut self.by_address, address, "PODS_BY_ADDRESS")?;
        }
        Ok(())
    }

    /// The same for one device.
    pub(super) fn look_after(&mut self, device: u32) -> Result<(), ProgramsError> {
        if get(&self.by_device, device, "PODS_BY_DEVICE")?.is_none() {
            return Ok(());
        }
        match name_of(device) {
            Some(name) => self.filter(&name),
            None => self.device_gone(device),
        }
    }

    /// The addresses of all Services of the tenant, so that unmeshed pods' TCP
    /// to them reaches the proxy.
    pub(super) fn set_services(&mut self, addresses: &BTreeSet<u32>) -> Result<(), ProgramsError> {
        if addresses.len() > MAX_SERVICES {
            return Err(ProgramsError::TooManyServices {
                count: addresses.len(),
            });
        }
        replace(&mut self.services, addresses, "SERVICES")
    }

    /// The addresses of the tenant's workloads in the pool's ranges.
    pub(super) fn set_workloads(&mut self, addresses: &BTreeSet<u32>) -> Result<(), ProgramsError> {
        if addresses.len() > MAX_WORKLOADS {
            return Err(ProgramsError::TooManyWorkloads {
                count: addresses.len(),
            });
        }
        replace(&mut self.workloads, addresses, "WORKLOADS")
    }

    /// Takes everything of this router out of the kernel. For a router that is
    /// about to be deleted: what devices it has left are not classified any more.
    pub(super) fn close(self) -> Result<(), ProgramsError> {
        let Self { directory, .. } = self;
        fs::remove_dir_all(&directory).map_err(|source| ProgramsError::Remove {
            path: directory,
            source,
        })
    }

    fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, ProgramsError> {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or(ProgramsError::Missing { name })
    }

    /// Sees to it that a pod's device has this process' program.
    fn filter(&mut self, device: &str) -> Result<(), ProgramsError> {
        let hook = TcAttachType::Ingress;
        let failed = |source| ProgramsError::Attach {
            name: POD_INGRESS,
            target: device.to_owned(),
            source: Box::new(source),
        };
        match qdisc_add_clsact(device) {
            Ok(()) => {}
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(source) => return Err(failed(source.into())),
        }
        let program = self.classifier(POD_INGRESS)?;
        let options = NlOptions {
            priority: FILTER_PRIORITY,
            handle: FILTER_HANDLE,
            classid: None,
        };
        let id = match program.attach_with_options(device, hook, TcAttachOptions::Netlink(options)) {
            Err(ProgramError::TcError(TcError::NetlinkError(error)))
                if error.raw_os_error() == Some(libc::EEXIST) =>
            {
                // An earlier one, of another process or of this: replaced at once.
                let there = SchedClassifierLink::attached(device, hook, FILTER_PRIORITY, FILTER_HANDLE, None)
                    .map_err(|source| failed(TcError::IoError(source).into()))?;
                program.attach_to_link(there)
            }
            result => result,
        }
        .map_err(failed)?;
        // Forgotten, because to drop it would take the filter off the device.
        std::mem::forget(program.take_link(id).map_err(failed)?);
        Ok(())
    }

    /// Sees to it that `device` has this program, by a link pinned at `pin`.
    fn link(
        &mut self,
        name: &'static str,
        hook: TcAttachType,
        device: &str,
        pin: &str,
    ) -> Result<(), ProgramsError> {
        let path = self.directory.join("links").join(pin);
        if self.adopt(name, hook, device, &path)? {
            return Ok(());
        }
        let failed = |source| ProgramsError::Attach {
            name,
            target: device.to_owned(),
            source: Box::new(source),
        };
        let program = self.classifier(name)?;
        let id = program
            .attach_with_options(device, hook, TcAttachOptions::TcxOrder(LinkOrder::default()))
            .map_err(failed)?;
        let link = program.take_link(id).map_err(failed)?;
        let link = FdLink::try_from(link).map_err(|source| ProgramsError::ReadLink {
            path: path.clone(),
            source: Box::new(source),
        })?;
        link.pin(&path).map_err(|source| ProgramsError::Pin {
            path,
            source: Box::new(source),
        })?;
        Ok(())
    }

    /// Puts this process' program into the link pinned at `path`. False if
    /// there is none, or it does not sit on `device` (then its pin is gone).
    fn adopt(
        &mut self,
        name: &'static str,
        hook: TcAttachType,
        device: &str,
        path: &Path,
    ) -> Result<bool, ProgramsError> {
        let Some(link) = pinned(path)? else {
            return Ok(false);
        };
        let failed = |source| ProgramsError::Attach {
            name,
            target: device.to_owned(),
            source: Box::new(source),
        };
        let program = self.classifier(name)?;
        let link =
            SchedClassifierLink::try_from(FdLink::from(link)).map_err(|source| ProgramsError::ReadLink {
                path: path.to_owned(),
                source: Box::new(source),
            })?;
        match program.attach_to_link(link) {
            Ok(id) => {
                // Closes this process' descriptor; the pin keeps the link.
                drop(program.take_link(id).map_err(failed)?);
            }
            // The device it sat on was deleted; this one only has its number.
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                unpin(path)?;
                return Ok(false);
            }
            Err(source) => return Err(failed(source)),
        }
        let own = program.info().map_err(failed)?.id();
        let (_, attached) = SchedClassifier::query_tcx(device, hook).map_err(failed)?;
        if attached.iter().any(|program| program.id() == own) {
            return Ok(true);
        }
        // It sits on a device of an earlier router that something still holds.
        unpin(path)?;
        Ok(false)
    }

    /// Puts this process' program into the namespace, before an old one goes:
    /// with both there, either can choose.
    fn link_socket_lookup(&mut self) -> Result<(), ProgramsError> {
        let name = SOCKET_LOOKUP;
        let path = self.directory.join("links").join("socket-lookup");
        let next = self.directory.join("links").join("socket-lookup-next");
        let target = self.router.path().display().to_string();
        let failed = |source| ProgramsError::Attach {
            name,
            target: target.clone(),
            source: Box::new(source),
        };
        let program: &mut SkLookup = self
            .ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or(ProgramsError::Missing { name })?;
        program.load().map_err(|source| refused(name, source))?;
        let id = program.attach(&self.router).map_err(failed)?;
        let link = FdLink::from(program.take_link(id).map_err(failed)?);
        // A process that died in between left it.
        unpin(&next)?;
        link.pin(&next).map_err(|source| ProgramsError::Pin {
            path: next.clone(),
            source: Box::new(source),
        })?;
        unpin(&path)?;
        fs::rename(&next, &path).map_err(|source| ProgramsError::Remove { path: next, source })
    }
}

fn pinned(path: &Path) -> Result<Option<PinnedLink>, ProgramsError> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link)),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ProgramsError::ReadLink {
            path: path.to_owned(),
            source: Box::new(source),
        }),
    }
}

fn unpin(path: &Path) -> Result<(), ProgramsError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ProgramsError::Remove {
            path: path.to_owned(),
            source,
        }),
    }
}

fn index(name: &str) -> Result<u32, ProgramsError> {
    if_nametoindex(name).map_err(|source| ProgramsError::NoDevice {
        name: name.to_owned(),
        source,
    })
}

fn name_of(device: u32) -> Option<String> {
    // For one that is not there the wrapper gives an empty name, not an error.
    let name = nix::net::if_::if_indextoname(device).ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}

fn exists(device: u32) -> bool {
    name_of(device).is_some()
}

/// What each map must be like for these programs: sizes of a key and of a
/// value, and the bound. The loader takes a pinned map for the one it would have
/// made, whatever it is.
const SHAPES: &[(&str, [usize; 3])] = &[
    ("PODS_BY_DEVICE", [4, size_of::<PodEntry>(), MAX_PODS]),
    ("PODS_BY_ADDRESS", [4, size_of::<PodEntry>(), MAX_PODS]),
    ("SERVICES", [4, 1, MAX_SERVICES]),
    ("HOST_ADDRESSES", [4, 1, MAX_HOST_ADDRESSES]),
    ("WORKLOADS", [4, 1, MAX_WORKLOADS]),
    ("ALLOWED", [8, 1, MAX_ALLOWED]),
    ("SETTINGS", [4, size_of::<Settings>(), 1]),
    ("LISTENERS", [4, 4, slot::COUNT]),
    ("DROPS", [4, 8, Reason::COUNT]),
];

fn shape(ebpf: &Ebpf, name: &'static str) -> Result<[usize; 3], ProgramsError> {
    use aya::maps::Map;
    let map = ebpf.map(name).ok_or(ProgramsError::Missing { name })?;
    let (Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::SockMap(data)) = map else {
        return Err(ProgramsError::Missing { name });
    };
    let info = data.info().map_err(read(name))?;
    Ok([info.key_size(), info.value_size(), info.max_entries()].map(|size| size as usize))
}

fn take<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, ProgramsError>
where
    T: TryFrom<aya::maps::Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(ProgramsError::Missing { name })?;
    T::try_from(map).map_err(|source| ProgramsError::OpenMap {
        name,
        source: Box::new(source),
    })
}

fn get(
    map: &HashMap<MapData, u32, PodEntry>,
    key: u32,
    name: &'static str,
) -> Result<Option<PodEntry>, ProgramsError> {
    match map.get(&key, 0) {
        Ok(entry) => Ok(Some(entry)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(ProgramsError::ReadMap {
            name,
            source: Box::new(source),
        }),
    }
}

fn remove<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    name: &'static str,
) -> Result<(), ProgramsError> {
    match map.remove(&key) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ProgramsError::WriteMap {
            name,
            source: Box::new(source),
        }),
    }
}

/// Makes the map's keys these, by writing the difference.
fn replace<K: aya::Pod + Ord>(
    map: &mut HashMap<MapData, K, u8>,
    keys: &BTreeSet<K>,
    name: &'static str,
) -> Result<(), ProgramsError> {
    let before: BTreeSet<K> = map.keys().collect::<Result<_, _>>().map_err(read(name))?;
    for &gone in before.difference(keys) {
        remove(map, gone, name)?;
    }
    for &new in keys.difference(&before) {
        map.insert(new, 0, 0).map_err(write(name))?;
    }
    Ok(())
}

fn read(name: &'static str) -> impl FnOnce(MapError) -> ProgramsError {
    move |source| ProgramsError::ReadMap {
        name,
        source: Box::new(source),
    }
}

fn write(name: &'static str) -> impl FnOnce(MapError) -> ProgramsError {
    move |source| ProgramsError::WriteMap {
        name,
        source: Box::new(source),
    }
}

fn refused(name: &'static str, source: ProgramError) -> ProgramsError {
    ProgramsError::LoadProgram {
        name,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Like `mesh-runtime/ebpf/build` does it.
    fn sum_of_sources() -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("ebpf");
        let mut sources: Vec<PathBuf> = fs::read_dir(root.join("src"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "rs"))
            .collect();
        sources.sort();
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        for path in [root.join("Cargo.toml"), root.join("Cargo.lock")]
            .iter()
            .chain(&sources)
        {
            context.update(&fs::read(path).unwrap());
        }
        context
            .finish()
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    #[test]
    fn the_checked_in_object_is_of_these_sources() {
        assert_eq!(
            include_str!("../../ebpf/object/redirect.sha256").trim(),
            sum_of_sources(),
            "the kernel programs changed: run mesh-runtime/ebpf/build and commit object/"
        );
    }
}
