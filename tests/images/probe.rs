//! What the tests run inside pods: connections and frames whose every address
//! is in our hands. It stands alone, so that rustc makes a static program of it.
//!
//! ```text
//! probe serve PORT…                   greet with both addresses of each connection, then echo
//! probe dial FROM ADDRESS TEXT        one connection; FROM is an address or `-`
//! probe storm ADDRESS TEXT PERIOD     a new connection every PERIOD ms, one line each, for ever
//! probe hold ADDRESS TEXT PERIOD      one connection, TEXT echoed every PERIOD ms, until it breaks
//! probe frame DEVICE FROM ADDRESS udp|syn|ack|arp TEXT [MAC]   a raw frame by AF_PACKET
//! probe bulk ADDRESS BYTES            so many bytes out and back at once, then half closed
//! ```
//! Times out by itself after five seconds; prints one line for what it found.

use std::{
    env,
    ffi::{c_int, c_void},
    io::{self, BufRead, BufReader, Read, Write},
    mem::size_of,
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    os::fd::FromRawFd,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", ports @ ..] if !ports.is_empty() => serve(ports),
        ["dial", from, address, text] => dial(from, address, text),
        ["storm", address, text, period] => storm(address, text, period),
        ["hold", address, text, period] => hold(address, text, period),
        ["frame", device, from, to, kind, text, rest @ ..] => frame(device, from, to, kind, text, rest),
        ["bulk", address, bytes] => bulk(address, bytes),
        _ => Err(wrong("see the first lines of probe.rs")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn parse<T: std::str::FromStr>(what: &str) -> io::Result<T> {
    what.parse()
        .map_err(|_| wrong(&format!("{what:?} is not what is wanted there")))
}

fn serve(ports: &[&str]) -> io::Result<()> {
    let listeners: Vec<TcpListener> = ports
        .iter()
        .map(|port| TcpListener::bind(("0.0.0.0", parse(port)?)))
        .collect::<io::Result<_>>()?;
    println!("serving {}", ports.join(" "));
    let threads: Vec<_> = listeners
        .into_iter()
        .map(|listener| {
            thread::spawn(move || {
                for connection in listener.incoming().flatten() {
                    thread::spawn(move || echo(connection));
                }
            })
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| io::Error::other("a listener panicked"))?;
    }
    Ok(())
}

fn echo(mut connection: TcpStream) -> io::Result<()> {
    let greeting = format!(
        "local={} peer={}\n",
        connection.local_addr()?,
        connection.peer_addr()?
    );
    // Also in the container's log, where a test finds it.
    print!("{greeting}");
    connection.write_all(greeting.as_bytes())?;
    let mut from = connection.try_clone()?;
    io::copy(&mut from, &mut connection).map(drop)
}

/// The connection, and what it said of itself at both ends.
fn converse(from: &str, address: &str, text: &str) -> io::Result<(TcpStream, String)> {
    let mut connection = connect(from, address)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let (local, peer) = (connection.local_addr()?, connection.peer_addr()?);
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut greeting = String::new();
    if reader.read_line(&mut greeting)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    exchange(&mut connection, text)?;
    let told = format!("client local={local} peer={peer} server {}", greeting.trim());
    Ok((connection, told))
}

fn exchange(connection: &mut TcpStream, text: &str) -> io::Result<()> {
    connection.write_all(text.as_bytes())?;
    let mut back = vec![0; text.len()];
    connection.read_exact(&mut back)?;
    if back == text.as_bytes() {
        Ok(())
    } else {
        Err(io::Error::other("the echo differs"))
    }
}

fn dial(from: &str, address: &str, text: &str) -> io::Result<()> {
    let (_, told) = converse(from, address, text)?;
    println!("{told}");
    Ok(())
}

fn storm(address: &str, text: &str, period: &str) -> io::Result<()> {
    let period = Duration::from_millis(parse(period)?);
    for turn in 1u64.. {
        let started = Instant::now();
        let (address, text) = (address.to_owned(), format!("{text}-{turn}"));
        // On a thread: one that hangs does not hold up the next.
        thread::spawn(move || match converse("-", &address, &text) {
            Ok((_, told)) => println!("{turn} ok {told}"),
            Err(error) => println!("{turn} failed: {error}"),
        });
        thread::sleep(period.saturating_sub(started.elapsed()));
    }
    Ok(())
}

fn hold(address: &str, text: &str, period: &str) -> io::Result<()> {
    let period = Duration::from_millis(parse(period)?);
    let (mut connection, told) = converse("-", address, text)?;
    println!("{told}");
    for turn in 1u64.. {
        thread::sleep(period);
        exchange(&mut connection, text)?;
        println!("{turn} ok");
    }
    Ok(())
}

fn bulk(address: &str, bytes: &str) -> io::Result<()> {
    let bytes: u64 = parse(bytes)?;
    let (connection, told) = converse("-", address, "hello")?;
    let mut sending = connection.try_clone()?;
    let sender = thread::spawn(move || -> io::Result<()> {
        for chunk in noise(bytes) {
            sending.write_all(&chunk)?;
        }
        // The echo goes on until it has seen this.
        sending.shutdown(Shutdown::Write)
    });
    let mut reader = BufReader::new(connection);
    for chunk in noise(bytes) {
        let mut back = vec![0; chunk.len()];
        reader.read_exact(&mut back)?;
        if back != chunk {
            return Err(io::Error::other("the echo differs"));
        }
    }
    sender
        .join()
        .map_err(|_| io::Error::other("the sender panicked"))??;
    match reader.read(&mut [0])? {
        0 => println!("{bytes} bytes and the end, {told}"),
        _ => return Err(io::Error::other("there is more than was sent")),
    }
    Ok(())
}

/// The same bytes each time, in chunks, that no two places share.
fn noise(bytes: u64) -> impl Iterator<Item = Vec<u8>> {
    const CHUNK: u64 = 50_000;
    (0..bytes.div_ceil(CHUNK)).map(move |index| {
        let length = CHUNK.min(bytes - index * CHUNK);
        let mut state = index + 1;
        (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect()
    })
}

/// By hand, because std cannot choose where a connection comes from.
fn connect(from: &str, address: &str) -> io::Result<TcpStream> {
    let address: SocketAddrV4 = parse(address)?;
    let check = |result: c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: plain calls whose pointers are to values that outlive them; the
    // descriptor is owned by the TcpStream from the moment it exists.
    unsafe {
        let fd = check(socket(AF_INET, SOCK_STREAM, 0))?;
        let connection = TcpStream::from_raw_fd(fd);
        connection.set_write_timeout(Some(PATIENCE))?;
        if from != "-" {
            let own = Inet::new(SocketAddrV4::new(parse(from)?, 0));
            check(bind(fd, (&raw const own).cast(), size_of::<Inet>() as u32))?;
        }
        let to = Inet::new(address);
        // The send timeout also bounds connect: EINPROGRESS says it is over.
        check(connect_(fd, (&raw const to).cast(), size_of::<Inet>() as u32))?;
        Ok(connection)
    }
}

fn frame(device: &str, from: &str, to: &str, kind: &str, text: &str, rest: &[&str]) -> io::Result<()> {
    let (from, to): (SocketAddrV4, SocketAddrV4) = (parse(from)?, parse(to)?);
    let own = match rest {
        [mac] => hardware_address(mac)?,
        _ => hardware_address(&std::fs::read_to_string(format!(
            "/sys/class/net/{device}/address"
        ))?)?,
    };
    let index: c_int = parse(std::fs::read_to_string(format!("/sys/class/net/{device}/ifindex"))?.trim())?;
    let gateway = gateway(device).unwrap_or([0xff; 6]);
    let mut frame = Vec::new();
    frame.extend(gateway);
    frame.extend(own);
    if kind == "arp" {
        frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2]);
        frame.extend(own);
        frame.extend(from.ip().octets());
        frame.extend(gateway);
        frame.extend(to.ip().octets());
    } else {
        frame.extend([0x08, 0x00]);
        frame.extend(packet(from, to, kind, text.as_bytes())?);
    }
    // SAFETY: as in `connect`.
    unsafe {
        let fd = socket(AF_PACKET, SOCK_RAW, c_int::from(0x0800u16.to_be()));
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let place = LinkLayer {
            family: AF_PACKET as u16,
            index,
            length: 6,
            ..LinkLayer::default()
        };
        let length = size_of::<LinkLayer>() as u32;
        if sendto(
            fd,
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const place).cast(),
            length,
        ) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    println!("sent {} bytes of {kind} from {from} to {to}", frame.len());
    Ok(())
}

/// IPv4 with a TCP or UDP header; checksums as they have to be.
fn packet(from: SocketAddrV4, to: SocketAddrV4, kind: &str, text: &[u8]) -> io::Result<Vec<u8>> {
    let (protocol, mut transport) = match kind {
        "udp" => (17u8, {
            let mut header = ports(from, to);
            header.extend((8 + text.len() as u16).to_be_bytes());
            header.extend([0, 0]);
            header
        }),
        "syn" | "ack" => (6u8, {
            let mut header = ports(from, to);
            header.extend(0x1234_5678u32.to_be_bytes());
            header.extend(if kind == "ack" { 0x1111_1111u32 } else { 0 }.to_be_bytes());
            header.extend([
                5 << 4,
                if kind == "ack" { 0x18 } else { 0x02 },
                0xff,
                0xff,
                0,
                0,
                0,
                0,
            ]);
            header
        }),
        _ => return Err(wrong("udp, syn, ack or arp")),
    };
    let checksum_at = if protocol == 17 { 6 } else { 16 };
    transport.extend(text);
    let mut pseudo = [from.ip().octets(), to.ip().octets()].concat();
    pseudo.extend([0, protocol]);
    pseudo.extend((transport.len() as u16).to_be_bytes());
    pseudo.extend(&transport);
    let sum = checksum(&pseudo).to_be_bytes();
    transport[checksum_at..checksum_at + 2].copy_from_slice(&sum);

    let mut packet = vec![0x45, 0];
    packet.extend((20 + transport.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    let sum = checksum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet.extend(transport);
    Ok(packet)
}

fn ports(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    [from.port().to_be_bytes(), to.port().to_be_bytes()].concat()
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Of the one neighbour that the pod has: its way out.
fn gateway(device: &str) -> Option<[u8; 6]> {
    let table = std::fs::read_to_string("/proc/net/arp").ok()?;
    let line = table.lines().skip(1).find(|line| line.ends_with(device))?;
    hardware_address(line.split_whitespace().nth(3)?).ok()
}

fn hardware_address(text: &str) -> io::Result<[u8; 6]> {
    let bytes: Vec<u8> = text
        .trim()
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes
        .try_into()
        .map_err(|_| wrong("a hardware address has six bytes"))
}

const AF_INET: c_int = 2;
const AF_PACKET: c_int = 17;
const SOCK_STREAM: c_int = 1;
const SOCK_RAW: c_int = 3;

/// `struct sockaddr_in`
#[repr(C)]
struct Inet {
    family: u16,
    port: [u8; 2],
    address: Ipv4Octets,
    zero: [u8; 8],
}

type Ipv4Octets = [u8; 4];

impl Inet {
    fn new(address: SocketAddrV4) -> Self {
        let ip: &Ipv4Addr = address.ip();
        Self {
            family: AF_INET as u16,
            port: address.port().to_be_bytes(),
            address: ip.octets(),
            zero: [0; 8],
        }
    }
}

/// `struct sockaddr_ll`
#[repr(C)]
#[derive(Default)]
struct LinkLayer {
    family: u16,
    protocol: u16,
    index: c_int,
    hardware: u16,
    packet: u8,
    length: u8,
    address: [u8; 8],
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const c_void, length: u32) -> c_int;
    #[link_name = "connect"]
    fn connect_(fd: c_int, address: *const c_void, length: u32) -> c_int;
    fn sendto(
        fd: c_int,
        bytes: *const c_void,
        length: usize,
        flags: c_int,
        address: *const c_void,
        address_length: u32,
    ) -> isize;
}
