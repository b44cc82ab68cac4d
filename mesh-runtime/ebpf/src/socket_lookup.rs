//! Hook: socket look-up in the router's namespace. Reached only by packets for
//! which there is no connection yet: hands each to the proxy's listener.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};

use crate::{
    abi::Reason,
    classify::{Arrival, Selection, select},
    maps::{self, LISTENERS, Maps},
};

/// `AF_INET`.
const IPV4: u32 = 2;

#[sk_lookup]
pub fn socket_lookup(context: SkLookupContext) -> u32 {
    // SAFETY: the kernel's own context, valid while the program runs.
    let lookup = unsafe { &*context.lookup };
    let Some(settings) = maps::settings() else {
        return SK_DROP;
    };
    if lookup.family != IPV4 {
        return SK_PASS;
    }
    let arrival = Arrival {
        device: lookup.ingress_ifindex,
        protocol: lookup.protocol as u8,
        destination: u32::from_be(lookup.local_ip4),
        port: lookup.local_port as u16,
    };
    match select(maps::pod_on_device(arrival.device), settings, &arrival, &Maps) {
        Selection::Ordinary => SK_PASS,
        Selection::Slot(slot) => match LISTENERS.redirect_sk_lookup(&context, slot, 0) {
            Ok(()) => SK_PASS,
            Err(_) => {
                maps::count(Reason::NoListener);
                SK_DROP
            }
        },
        Selection::Refuse(reason) => {
            maps::count(reason);
            SK_DROP
        }
    }
}
