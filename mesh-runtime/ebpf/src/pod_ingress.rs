//! Hook: tcx ingress on the host side of a pod's device. Everything the pod
//! sends comes through here, whatever its own namespace holds.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    abi::Reason,
    classify::{Verdict, from_pod},
    frame::Frame,
    maps::{self, Maps},
};

#[classifier]
pub fn pod_ingress(context: TcContext) -> i32 {
    let frame = Frame::new(context);
    let verdict = verdict(&frame);
    frame.conclude(verdict)
}

#[inline(always)]
fn verdict(frame: &Frame) -> Verdict {
    let (Some(pod), Some(settings)) = (maps::pod_on_device(frame.device()), maps::settings()) else {
        return Verdict::Drop(Reason::UnknownDevice);
    };
    match frame.headers() {
        Ok(packet) => match from_pod(pod, settings, &packet, &Maps) {
            Verdict::Capture => frame.only_if_heard(&packet, Some(pod), settings),
            verdict => verdict,
        },
        Err(reason) => Verdict::Drop(reason),
    }
}
