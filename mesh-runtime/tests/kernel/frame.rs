//! Ethernet frames, made by hand, and a socket that sends and sees them.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;

/// A frame to be: change what the test is about, then `bytes`.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) to: [u8; 6],
    pub(crate) from: [u8; 6],
    pub(crate) ethertype: u16,
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) protocol: u8,
    /// Flags and offset, as in the header.
    pub(crate) fragment: u16,
    /// After the IP header.
    pub(crate) payload: Vec<u8>,
    /// In 4-byte words beyond the fixed header.
    pub(crate) options: Vec<u8>,
}

impl Frame {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut f = Vec::new();
        f.extend(self.to);
        f.extend(self.from);
        f.extend(self.ethertype.to_be_bytes());
        let header = 20 + self.options.len();
        let mut ip = vec![0x40 | (header / 4) as u8, 0];
        ip.extend(((header + self.payload.len()) as u16).to_be_bytes());
        ip.extend([0, 7]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, self.protocol, 0, 0]);
        ip.extend(self.source.octets());
        ip.extend(self.destination.octets());
        ip.extend(&self.options);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        f.extend(ip);
        let mut payload = self.payload.clone();
        if self.fragment == 0 {
            let length = (payload.len() as u16).to_be_bytes();
            let pseudo = [
                &self.source.octets()[..],
                &self.destination.octets(),
                &[0, self.protocol],
                &length,
            ]
            .concat();
            match self.protocol {
                TCP if payload.len() >= 20 => {
                    let sum = checksum(&[&pseudo, &payload]);
                    payload[16..18].copy_from_slice(&sum.to_be_bytes());
                }
                ICMP if payload.len() >= 8 => {
                    let sum = checksum(&[&payload]);
                    payload[2..4].copy_from_slice(&sum.to_be_bytes());
                }
                // UDP over IPv4 may go without.
                _ => {}
            }
        }
        f.extend(payload);
        f
    }
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub(crate) fn udp(source: u16, destination: u16, data: &[u8]) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(source.to_be_bytes());
    p.extend(destination.to_be_bytes());
    p.extend((8 + data.len() as u16).to_be_bytes());
    p.extend([0, 0]);
    p.extend(data);
    p
}

pub(crate) fn tcp_syn(source: u16, destination: u16) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(source.to_be_bytes());
    p.extend(destination.to_be_bytes());
    p.extend(0x1234_5678u32.to_be_bytes());
    p.extend([0; 4]);
    p.extend([5 << 4, 0x02, 0x20, 0, 0, 0, 0, 0]);
    p
}

pub(crate) fn icmp(kind: u8, code: u8, rest: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut p = vec![kind, code, 0, 0];
    p.extend(rest);
    p.extend(data);
    p
}

/// A packet socket on one device, bound so that it sees what comes in and out.
pub(crate) struct Tap {
    socket: Socket,
}

impl Tap {
    /// In the namespace the thread stands in.
    pub(crate) fn open(device: &str) -> io::Result<Self> {
        let index = nix::net::if_::if_nametoindex(device)?;
        let all = (libc::ETH_P_ALL as u16).to_be();
        let socket = Socket::new(
            Domain::from(libc::AF_PACKET),
            Type::RAW,
            Some((i32::from(all)).into()),
        )?;
        // SAFETY: a zeroed sockaddr_ll is valid, and only its fields are set.
        let (_, address) = unsafe {
            SockAddr::try_init(|storage, length| {
                let link = storage.cast::<libc::sockaddr_ll>();
                (*link).sll_family = libc::AF_PACKET as u16;
                (*link).sll_protocol = all;
                (*link).sll_ifindex = index as i32;
                *length = size_of::<libc::sockaddr_ll>() as u32;
                Ok(())
            })?
        };
        socket.bind(&address)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        Ok(Self { socket })
    }

    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(drop)
    }

    /// Frames until `wanted` says yes, or the deadline.
    pub(crate) fn find(&self, deadline: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + deadline;
        let mut buffer = vec![0u8; 70_000];
        while Instant::now() < end {
            match nix::sys::socket::recv(
                self.socket.as_raw_fd(),
                &mut buffer,
                nix::sys::socket::MsgFlags::empty(),
            ) {
                Ok(n) if wanted(&buffer[..n]) => return Some(buffer[..n].to_vec()),
                Ok(_) => {}
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {}
                Err(error) => panic!("packet socket: {error}"),
            }
        }
        None
    }

    /// What has arrived already.
    pub(crate) fn drain(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0u8; 70_000];
        while let Ok(n) = nix::sys::socket::recv(
            self.socket.as_raw_fd(),
            &mut buffer,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) {
            frames.push(buffer[..n].to_vec());
        }
        frames
    }
}

pub(crate) fn contains(frame: &[u8], marker: &[u8]) -> bool {
    frame.windows(marker.len()).any(|w| w == marker)
}
