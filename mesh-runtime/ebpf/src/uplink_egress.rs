//! Hook: tcx egress on the router's device towards the host. Everything that the
//! router sends comes through here, of pods and of the sockets that the agent has in
//! it. What is off limits is not sent, whoever asked for it. What was marked for the
//! proxy never leaves: should the policy route be missing, the router would forward
//! it in plaintext, and this stops it.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    abi::{MARK, Reason},
    classify::{Verdict, to_uplink},
    frame::Frame,
    maps::{self, Maps},
};

#[classifier]
pub fn uplink_egress(context: TcContext) -> i32 {
    let frame = Frame::new(context);
    let verdict = verdict(&frame);
    frame.conclude(verdict)
}

#[inline(always)]
fn verdict(frame: &Frame) -> Verdict {
    if frame.mark() == MARK {
        return Verdict::Drop(Reason::Leak);
    }
    let Some(settings) = maps::settings() else {
        return Verdict::Drop(Reason::UnknownDevice);
    };
    match frame.packet() {
        Ok(packet) => to_uplink(settings, &packet, &Maps),
        // The router's own, as ARP is: of what is no plain IPv4 nothing of a pod gets
        // this far.
        Err(_) => Verdict::Pass,
    }
}
