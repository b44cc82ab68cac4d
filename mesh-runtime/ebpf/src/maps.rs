//! The maps, each pinned under its name by the loader. Their bounds and shapes
//! stand in `abi`.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, PerCpuArray, SockMap},
    helpers::{bpf_ktime_get_boot_ns, bpf_map_lookup_elem, bpf_sk_release},
    macros::btf_map,
};

use crate::{
    abi::{
        endpoint, MAX_ALLOWED, MAX_HOST_ADDRESSES, MAX_PODS, MAX_SERVICES, MAX_WORKLOADS, PodEntry, Reason, Settings,
        slot,
    },
    classify::Tables,
};

/// Pods by the index of the host side of their device. A device that is not
/// here gets nothing through.
#[btf_map]
static PODS_BY_DEVICE: HashMap<u32, PodEntry, MAX_PODS> = HashMap::new();

/// The same pods by address.
#[btf_map]
static PODS_BY_ADDRESS: HashMap<u32, PodEntry, MAX_PODS> = HashMap::new();

/// Addresses of Services; the value says nothing.
#[btf_map]
static SERVICES: HashMap<u32, u8, MAX_SERVICES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Addresses of the host and of the router; the value says nothing.
#[btf_map]
static HOST_ADDRESSES: HashMap<u32, u8, MAX_HOST_ADDRESSES> = HashMap::new();

/// The tenant's workloads in the pool's ranges, by address; the value says nothing.
#[btf_map]
static WORKLOADS: HashMap<u32, u8, MAX_WORKLOADS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// What is off limits but for this: an address, and a port in the lowest 16 bits; the
/// value says nothing.
#[btf_map]
static ALLOWED: HashMap<u64, u8, MAX_ALLOWED> = HashMap::new();

#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();

/// The proxy's listeners. The kernel empties a slot when its socket closes.
#[btf_map]
pub static LISTENERS: SockMap<{ slot::COUNT }> = SockMap::new();

/// Packets dropped, by reason.
#[btf_map]
static DROPS: PerCpuArray<u64, { Reason::COUNT }> = PerCpuArray::new();

/// Whether somebody listens there.
#[inline(always)]
pub fn has_listener(slot: u32) -> bool {
    // SAFETY: the map and the key outlive the call, and the socket it may give
    // is released at once, as the verifier demands.
    unsafe {
        let socket = bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const slot).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
        true
    }
}

#[inline(always)]
pub fn pod_on_device(device: u32) -> Option<&'static PodEntry> {
    // SAFETY: the loader replaces whole entries and never reuses one in place
    // for another device; at worst a packet in flight sees the entry it came
    // under.
    unsafe { PODS_BY_DEVICE.get(device) }
}

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own slot, and the program cannot be preempted by
        // itself; a counter torn by a nested run loses one count.
        unsafe { *counter += 1 }
    }
}

/// The maps as `classify` asks them.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn pod(&self, address: u32) -> Option<&PodEntry> {
        // SAFETY: as in `pod_on_device`.
        unsafe { PODS_BY_ADDRESS.get(address) }
    }

    #[inline(always)]
    fn is_service(&self, address: u32) -> bool {
        // SAFETY: only the presence is looked at.
        unsafe { SERVICES.get(address) }.is_some()
    }

    #[inline(always)]
    fn is_host(&self, address: u32) -> bool {
        // SAFETY: only the presence is looked at.
        unsafe { HOST_ADDRESSES.get(address) }.is_some()
    }

    #[inline(always)]
    fn is_workload(&self, address: u32) -> bool {
        // SAFETY: only the presence is looked at.
        unsafe { WORKLOADS.get(address) }.is_some()
    }

    #[inline(always)]
    fn is_allowed(&self, address: u32, port: u16) -> bool {
        // SAFETY: only the presence is looked at.
        unsafe { ALLOWED.get(endpoint(address, port)) }.is_some()
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: it reads a clock.
        unsafe { bpf_ktime_get_boot_ns() }
    }
}
