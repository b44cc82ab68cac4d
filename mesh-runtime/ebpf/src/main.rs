//! Kernel programs that take pods' connections at the host side of their
//! devices. One instance for each tenant's router; loaded by
//! `mesh-runtime/src/redirect`.
//!
//! One file a hook: [`pod_ingress`], [`uplink_ingress`], [`uplink_egress`] on
//! devices, [`socket_lookup`] on the router's namespace. They read packets and
//! maps; every decision is a plain function in [`classify`], which user space
//! compiles too, to test it. What is shared with the loader stands in [`abi`].
#![no_std]
#![no_main]

#[expect(dead_code, reason = "the loader uses the rest")]
mod abi;
mod classify;
mod frame;
mod maps;
mod pod_ingress;
mod socket_lookup;
mod uplink_egress;
mod uplink_ingress;

/// The kernel withholds some helpers from programs that are not GPL; none of
/// those is used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

/// Nothing here panics: the verifier would refuse a program that could.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
