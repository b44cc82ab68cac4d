//! The packets on a device, as tcpdump wrote them, and what a test asks of
//! them: did a text pass in the clear, what passed at all, is it TLS.
//!
//! The file format is libpcap's classic one (`pcap-savefile(5)`), the frames
//! Ethernet, IPv4 and TCP as their RFCs have them.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

/// tcpdump, listening until [`Capture::end`]; dropped, it is killed.
pub struct Capture {
    tcpdump: Child,
    directory: tempfile::TempDir,
}

impl Capture {
    /// Listens on a device of the network namespace that the file is, and
    /// returns once packets are being written.
    pub async fn start(namespace: &Path, device: &str) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut enter = OsString::from("--net=");
        enter.push(namespace);
        let mut command = Command::new("nsenter");
        command
            .arg(enter)
            .arg("--")
            // Every packet at once into the file, whole, as root.
            .args([
                "tcpdump",
                "-n",
                "-U",
                "--immediate-mode",
                "-s",
                "0",
                "-B",
                "32768",
                "-Z",
                "root",
            ])
            .args(["-i", device, "-w"])
            .arg(directory.path().join("packets"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut tcpdump = command.spawn().context("cannot start tcpdump")?;
        let stderr = tcpdump.stderr.take().context("tcpdump has no standard error")?;
        let mut said = BufReader::new(stderr);
        let listening = async {
            let mut all = String::new();
            while said.read_line(&mut all).await? > 0 {
                if all.contains("listening on") {
                    return Ok(());
                }
            }
            bail!("tcpdump ended: {all}")
        };
        timeout(Duration::from_secs(10), listening)
            .await
            .context("tcpdump does not start")??;
        // Its counts at the end; read then.
        tcpdump.stderr = Some(said.into_inner());
        Ok(Self { tcpdump, directory })
    }

    /// Stops and reads everything. A capture that lost packets proves nothing
    /// and is an error.
    pub async fn end(mut self) -> anyhow::Result<Packets> {
        let pid = self.tcpdump.id().context("tcpdump has ended by itself")?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGINT,
        )?;
        timeout(Duration::from_secs(10), self.tcpdump.wait())
            .await
            .context("tcpdump does not end")??;
        let mut counts = String::new();
        if let Some(stderr) = &mut self.tcpdump.stderr {
            stderr.read_to_string(&mut counts).await?;
        }
        let lost = counts.lines().find_map(|line| {
            line.strip_suffix(" packets dropped by kernel")?
                .trim()
                .parse::<u64>()
                .ok()
        });
        ensure!(lost == Some(0), "the capture is not whole: {counts}");
        Packets::read(&self.directory.path().join("packets"))
    }
}

/// What passed.
pub struct Packets {
    raw: Vec<u8>,
    pub packets: Vec<Packet>,
}

/// One IPv4 packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    Tcp {
        from: SocketAddrV4,
        to: SocketAddrV4,
        sequence: u32,
        syn: bool,
        payload: Vec<u8>,
    },
    Udp {
        from: SocketAddrV4,
        to: SocketAddrV4,
        payload: Vec<u8>,
    },
    /// Of another protocol, or a fragment.
    Other {
        from: Ipv4Addr,
        to: Ipv4Addr,
        protocol: u8,
        payload: Vec<u8>,
    },
}

impl Packet {
    pub fn addresses(&self) -> (Ipv4Addr, Ipv4Addr) {
        match self {
            Self::Tcp { from, to, .. } | Self::Udp { from, to, .. } => (*from.ip(), *to.ip()),
            Self::Other { from, to, .. } => (*from, *to),
        }
    }

    /// TCP from or to the port.
    pub fn is_tcp_of(&self, port: u16) -> bool {
        matches!(self, Self::Tcp { from, to, .. } if from.port() == port || to.port() == port)
    }

    /// ICMP that says to whom a TCP segment from or to the port could not be delivered:
    /// a host's word for a pod that has ended, with the segment's beginning.
    pub fn is_unreachable_of(&self, port: u16) -> bool {
        const ICMP: u8 = 1;
        const TCP: u8 = 6;
        const UNREACHABLE: u8 = 3;
        let Self::Other {
            protocol: ICMP,
            payload,
            ..
        } = self
        else {
            return false;
        };
        // RFC 792: type, code, checksum, 4 bytes unused, then what it is about.
        let Some((&UNREACHABLE, quoted)) = payload.first().zip(payload.get(8..)) else {
            return false;
        };
        let header = usize::from(quoted.first().copied().unwrap_or_default() & 15) * 4;
        let is_tcp = quoted.get(9) == Some(&TCP);
        let ports = quoted.get(header..header + 4);
        is_tcp && ports.is_some_and(|p| p[..2] == port.to_be_bytes() || p[2..] == port.to_be_bytes())
    }
}

impl Packets {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let raw = std::fs::read(path)?;
        Ok(Self {
            packets: parse(&raw)?,
            raw,
        })
    }

    /// How often the text is anywhere in what was captured, addresses and all.
    pub fn count(&self, text: &str) -> usize {
        self.raw
            .windows(text.len())
            .filter(|window| *window == text.as_bytes())
            .count()
    }

    /// The packets that carry the text, in short: for messages.
    pub fn carrying(&self, text: &str) -> Vec<String> {
        let carries = |packet: &&Packet| {
            let payload = match packet {
                Packet::Tcp { payload, .. } | Packet::Udp { payload, .. } | Packet::Other { payload, .. } => {
                    payload
                }
            };
            payload
                .windows(text.len())
                .any(|window| window == text.as_bytes())
        };
        let shown = |packet: &Packet| match packet {
            Packet::Tcp { from, to, syn, .. } => format!("TCP {from} > {to} syn={syn}"),
            Packet::Udp { from, to, .. } => format!("UDP {from} > {to}"),
            Packet::Other {
                from, to, protocol, ..
            } => format!("protocol {protocol} {from} > {to}"),
        };
        self.packets.iter().filter(carries).map(shown).collect()
    }

    /// The packets both of whose addresses satisfy the questions, either way.
    pub fn between(&self, one: impl Fn(Ipv4Addr) -> bool, other: impl Fn(Ipv4Addr) -> bool) -> Vec<&Packet> {
        let fits = |packet: &&Packet| {
            let (from, to) = packet.addresses();
            (one(from) && other(to)) || (other(from) && one(to))
        };
        self.packets.iter().filter(fits).collect()
    }

    /// Checks that every TCP stream on the port is TLS records from its first
    /// byte to its last, and returns how many records there were.
    pub fn tls_records(&self, port: u16) -> anyhow::Result<usize> {
        let mut streams: BTreeMap<(SocketAddrV4, SocketAddrV4), Stream> = BTreeMap::new();
        for packet in self.packets.iter().filter(|packet| packet.is_tcp_of(port)) {
            if let Packet::Tcp {
                from,
                to,
                sequence,
                syn,
                payload,
            } = packet
            {
                let stream = streams.entry((*from, *to)).or_default();
                stream.take(*sequence, *syn, payload);
            }
        }
        let mut records = 0;
        for ((from, to), stream) in &streams {
            // One that was there before the capture is not framed from its start.
            let Some(bytes) = stream.bytes() else { continue };
            records += count_records(&bytes).with_context(|| format!("from {from} to {to}"))?;
        }
        Ok(records)
    }
}

/// One direction of a TCP connection. A tuple used again is a stream of its
/// own: its SYN starts anew, after the old one has been kept.
#[derive(Default)]
struct Stream {
    first: Option<u32>,
    parts: BTreeMap<u32, Vec<u8>>,
    ended: Vec<Vec<u8>>,
}

impl Stream {
    fn take(&mut self, sequence: u32, syn: bool, payload: &[u8]) {
        if syn {
            let first = sequence.wrapping_add(1);
            if self.first.is_some_and(|known| known != first) {
                self.ended.extend(self.joined());
                self.parts.clear();
            }
            self.first = Some(first);
        } else if let Some(first) = self.first
            && !payload.is_empty()
        {
            let at = sequence.wrapping_sub(first);
            let known = self.parts.entry(at).or_default();
            // A retransmission may be longer.
            if payload.len() > known.len() {
                *known = payload.to_vec();
            }
        }
    }

    fn joined(&self) -> Option<Vec<u8>> {
        self.first?;
        let mut bytes = Vec::new();
        for (at, part) in &self.parts {
            let at = usize::try_from(*at).unwrap_or(usize::MAX);
            if at > bytes.len() {
                break;
            }
            let known = bytes.len() - at;
            bytes.extend(part.get(known..).unwrap_or_default());
        }
        Some(bytes)
    }

    fn bytes(&self) -> Option<Vec<u8>> {
        let last = self.joined()?;
        Some(self.ended.iter().flatten().copied().chain(last).collect())
    }
}

/// RFC 8446, 5.1: type, version, length. The last record may be cut off by the
/// end of the capture.
fn count_records(mut bytes: &[u8]) -> anyhow::Result<usize> {
    let mut count = 0;
    while !bytes.is_empty() {
        let kind = bytes[0];
        ensure!(
            (20..=23).contains(&kind),
            "a record of type {kind} after {count} records"
        );
        let Some(header) = bytes.get(..5) else { break };
        ensure!(header[1] == 3, "version {}.{}", header[1], header[2]);
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        ensure!(length <= (1 << 14) + 256, "a record of {length} bytes");
        count += 1;
        bytes = bytes.get(5 + length..).unwrap_or_default();
    }
    Ok(count)
}

fn parse(raw: &[u8]) -> anyhow::Result<Vec<Packet>> {
    const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
    let word = |at: usize| -> anyhow::Result<u32> {
        let bytes = raw
            .get(at..at + 4)
            .context("the capture ends in the middle of a header")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    ensure!(
        word(0)? == MAGIC_MICROSECONDS,
        "not a capture file of this machine"
    );
    ensure!(word(20)? == 1, "not of an Ethernet device");
    let mut at = 24;
    let mut packets = Vec::new();
    while at < raw.len() {
        let length = usize::try_from(word(at + 8)?)?;
        let frame = raw
            .get(at + 16..at + 16 + length)
            .context("the capture ends in a packet")?;
        packets.extend(ip(frame));
        at += 16 + length;
    }
    Ok(packets)
}

/// The packet in a frame, if it holds one of IPv4. Others (ARP, IPv6) are the
/// link's own business; a text in them is still found by `count`.
fn ip(frame: &[u8]) -> Option<Packet> {
    let packet = frame.get(14..)?;
    if frame.get(12..14)? != [0x08, 0x00] {
        return None;
    }
    let octets = |at: usize| -> Option<Ipv4Addr> {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(octets.into())
    };
    let number = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
    let (from, to, protocol) = (octets(12)?, octets(16)?, *packet.get(9)?);
    let fragment = number(packet.get(6..8)?) & 0x1fff != 0;
    let total = usize::from(number(packet.get(2..4)?));
    // Zero in what was handed to the device for segmentation beyond 64 KiB.
    let end = if total == 0 {
        packet.len()
    } else {
        total.min(packet.len())
    };
    let transport = packet.get(usize::from(packet[0] & 15) * 4..end)?;
    let other = Packet::Other {
        from,
        to,
        protocol,
        payload: transport.to_vec(),
    };
    if fragment || transport.len() < 8 {
        return Some(other);
    }
    let from = SocketAddrV4::new(from, number(&transport[0..2]));
    let to = SocketAddrV4::new(to, number(&transport[2..4]));
    Some(match protocol {
        17 => Packet::Udp {
            from,
            to,
            payload: transport[8..].to_vec(),
        },
        6 => Packet::Tcp {
            from,
            to,
            sequence: u32::from_be_bytes(transport.get(4..8)?.try_into().ok()?),
            syn: transport.get(13)? & 2 != 0,
            payload: transport
                .get(usize::from(transport.get(12)? >> 4) * 4..)?
                .to_vec(),
        },
        _ => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((40 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x30, 0x39, 0x3a, 0xa0]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn file(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut raw = 0xa1b2_c3d4u32.to_le_bytes().to_vec();
        raw.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0]);
        for frame in frames {
            raw.extend([0; 8]);
            raw.extend([(frame.len() as u32).to_le_bytes(); 2].concat());
            raw.extend(frame);
        }
        raw
    }

    fn packets(frames: &[Vec<u8>]) -> Packets {
        let raw = file(frames);
        Packets {
            packets: parse(&raw).unwrap(),
            raw,
        }
    }

    const RECORD: &[u8] = &[23, 3, 3, 0, 4, 1, 2, 3, 4];

    #[test]
    fn tls_records_are_followed_over_segments_that_come_twice_and_out_of_order() {
        let captured = packets(&[
            tcp(99, 2, &[]),
            tcp(103, 24, &RECORD[3..]),
            tcp(100, 24, &RECORD[..3]),
            tcp(100, 24, &RECORD[..3]),
            tcp(109, 24, RECORD),
        ]);
        assert_eq!(captured.tls_records(15008).unwrap(), 2);
    }

    #[test]
    fn plain_text_on_the_port_is_no_tls() {
        let captured = packets(&[
            tcp(99, 2, &[]),
            tcp(100, 24, RECORD),
            tcp(109, 24, b"GET / HTTP/1.1"),
        ]);
        assert!(captured.tls_records(15008).is_err());
        assert_eq!(captured.count("GET / "), 1);
    }

    #[test]
    fn the_padding_of_a_short_frame_is_no_payload() {
        let mut frame = tcp(99, 16, &[]);
        frame.extend([0; 6]);
        let captured = packets(&[frame]);
        assert!(matches!(&captured.packets[0], Packet::Tcp { payload, .. } if payload.is_empty()));
    }

    #[test]
    fn a_capture_that_is_cut_off_is_refused() {
        let raw = file(&[tcp(99, 2, &[])]);
        assert!(parse(&raw[..raw.len() - 1]).is_err());
    }
}
