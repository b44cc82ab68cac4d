//! One packet at a device hook: reads its headers, carries out the verdict.

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, TC_ACT_OK, TC_ACT_SHOT, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    },
    helpers::{bpf_sk_release, bpf_skc_lookup_tcp},
    programs::TcContext,
};

use crate::{
    abi::{MARK, PodEntry, Reason, Settings},
    classify::{HEADERS, Packet, QUOTED_PROTOCOL, Selection, TCP, TCP_FLAGS, Verdict, parse, select},
    maps::{self, Maps},
};

/// `skb->pkt_type` of a frame addressed to the device it came in by.
const PACKET_HOST: u32 = 0;

/// `bpf_sock.state` of a listening socket.
const TCP_LISTEN: u32 = 10;

pub struct Frame {
    context: TcContext,
}

impl Frame {
    #[inline(always)]
    pub fn new(context: TcContext) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.context.skb.skb
    }

    /// Index of the device it came in by.
    #[inline(always)]
    pub fn device(&self) -> u32 {
        // SAFETY: the kernel's own context, valid while the program runs.
        unsafe { (*self.skb()).ifindex }
    }

    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb()).mark }
    }

    /// Of a frame that came in.
    #[inline(always)]
    pub fn headers(&self) -> Result<Packet, Reason> {
        // SAFETY: as above. A tag may stand beside the frame instead of in it.
        if unsafe { (*self.skb()).vlan_present } != 0 {
            return Err(Reason::Vlan);
        }
        let packet = self.packet()?;
        // SAFETY: as above.
        if unsafe { (*self.skb()).pkt_type } != PACKET_HOST {
            return Err(Reason::NotForThisHost);
        }
        Ok(packet)
    }

    /// Of any frame.
    #[inline(always)]
    pub fn packet(&self) -> Result<Packet, Reason> {
        let headers: [u8; HEADERS] = self.context.load(0).map_err(|_| Reason::Malformed)?;
        let mut packet = parse(&headers)?;
        if packet.protocol == TCP {
            packet.tcp_flags = self.context.load(TCP_FLAGS).map_err(|_| Reason::Malformed)?;
        }
        Ok(packet)
    }

    /// Protocol of the packet that an ICMP error quotes; 0 if it is cut short.
    #[inline(always)]
    pub fn quoted_protocol(&self) -> u8 {
        self.context.load(QUOTED_PROTOCOL).unwrap_or(0)
    }

    /// Whether this namespace has a TCP connection with the packet's addresses
    /// and ports.
    #[inline(always)]
    fn is_connected(&self) -> bool {
        let Ok([source, destination]) = self.context.load::<[u32; 2]>(14 + 12) else {
            return false;
        };
        let Ok([source_port, destination_port]) = self.context.load::<[u16; 2]>(14 + 20) else {
            return false;
        };
        let mut tuple = bpf_sock_tuple {
            __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 {
                ipv4: bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                    saddr: source,
                    daddr: destination,
                    sport: source_port,
                    dport: destination_port,
                },
            },
        };
        // SAFETY: the tuple outlives the call; the socket is released before
        // the program ends, and only read in between.
        unsafe {
            let socket = bpf_skc_lookup_tcp(
                self.context.as_ptr(),
                &raw mut tuple,
                size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>() as u32,
                BPF_F_CURRENT_NETNS as u64,
                0,
            );
            if socket.is_null() {
                return false;
            }
            let connected = (*socket).state != TCP_LISTEN;
            bpf_sk_release(socket.cast());
            connected
        }
    }

    /// For a packet that is the proxy's: one that asks for a listener is dropped
    /// here if there is none to have. The socket look-up could only have it
    /// answered with a reset, and an agent that is back before the next SYN
    /// would not have been missed.
    #[inline(always)]
    pub fn only_if_heard(&self, packet: &Packet, pod: Option<&PodEntry>, settings: &Settings) -> Verdict {
        if !packet.is_opening() {
            return Verdict::Capture;
        }
        match select(pod, settings, &packet.arrival(self.device()), &Maps) {
            Selection::Slot(slot) if maps::has_listener(slot) => Verdict::Capture,
            Selection::Slot(_) => Verdict::Drop(Reason::NoListener),
            Selection::Refuse(reason) => Verdict::Drop(reason),
            Selection::Ordinary => Verdict::Capture,
        }
    }

    /// What the kernel is told.
    #[inline(always)]
    pub fn conclude(self, verdict: Verdict) -> i32 {
        match verdict {
            Verdict::Pass => TC_ACT_OK as i32,
            Verdict::Capture => {
                self.context.set_mark(MARK);
                TC_ACT_OK as i32
            }
            Verdict::CaptureIfConnected => {
                if self.is_connected() {
                    self.context.set_mark(MARK);
                }
                TC_ACT_OK as i32
            }
            Verdict::Drop(reason) => {
                maps::count(reason);
                TC_ACT_SHOT
            }
        }
    }
}
