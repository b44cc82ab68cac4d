//! Hook: tcx ingress on the router's device towards the host. Everything from
//! outside the host to its pods comes through here.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    abi::Reason,
    classify::{Verdict, from_uplink},
    frame::Frame,
    maps::{self, Maps},
};

#[classifier]
pub fn uplink_ingress(context: TcContext) -> i32 {
    let frame = Frame::new(context);
    let verdict = verdict(&frame);
    frame.conclude(verdict)
}

#[inline(always)]
fn verdict(frame: &Frame) -> Verdict {
    let Some(settings) = maps::settings() else {
        return Verdict::Drop(Reason::UnknownDevice);
    };
    match frame.headers() {
        Ok(packet) => {
            let quoted = if packet.is_icmp_error() {
                frame.quoted_protocol()
            } else {
                0
            };
            match from_uplink(settings, &packet, quoted, &Maps) {
                Verdict::Capture => frame.only_if_heard(&packet, None, settings),
                verdict => verdict,
            }
        }
        // The host is no pod: the router and it may ask each other's address.
        Err(Reason::Arp) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}
