//! Hook: tcx egress on the router's device towards the host. What was marked
//! for the proxy never leaves: should the policy route be missing, the router
//! would forward it in plaintext, and this stops it.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    abi::{MARK, Reason},
    classify::Verdict,
    frame::Frame,
};

#[classifier]
pub fn uplink_egress(context: TcContext) -> i32 {
    let frame = Frame::new(context);
    let verdict = if frame.mark() == MARK {
        Verdict::Drop(Reason::Leak)
    } else {
        Verdict::Pass
    };
    frame.conclude(verdict)
}
