//! The load of the data path figures: a server, and a client that measures.
//!
//! It runs inside pods from an image of its own, so it is one file without
//! dependencies that is linked statically. `tests/bench` builds the image and
//! runs the client by `kubectl exec`; what the client prints is read there.
//!
//! Throughput is counted where it arrives: the client ends its sending side and
//! takes the time until the server says how many bytes came.

use std::{
    error::Error,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What iperf3 writes at once.
const BLOCK: usize = 128 * 1024;
/// A request and its response.
const MESSAGE: usize = 1024;
/// A peer that stays silent has been lost.
const SILENCE: Duration = Duration::from_secs(20);
/// Before what is counted: a tunnel is opened, windows grow.
const WARM_UP: Duration = Duration::from_millis(300);

const THROUGHPUT: u8 = b't';
const ROUND_TRIP: u8 = b'r';

const USAGE: &str = "netbench serve PORT | throughput ADDRESS STREAMS SECONDS | round-trip ADDRESS SECONDS";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netbench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port] => serve(&TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.parse()?))?),
        ["throughput", address, streams, seconds] => {
            let (bytes, took) = throughput(address.parse()?, streams.parse()?, duration(seconds)?)?;
            println!("bytes {bytes} seconds {:.6}", took.as_secs_f64());
            Ok(())
        }
        ["round-trip", address, seconds] => {
            let mut times = round_trips(address.parse()?, duration(seconds)?)?;
            times.sort_unstable();
            let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
            println!("trips {} p50 {:.2} p90 {:.2}", times.len(), at(50), at(90));
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

fn duration(seconds: &str) -> Result<Duration> {
    Ok(Duration::try_from_secs_f64(seconds.parse()?)?)
}

/// Serves until it is ended.
fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept()?;
        thread::spawn(move || {
            if let Err(error) = answer(stream) {
                eprintln!("netbench: {peer}: {error}");
            }
        });
    }
}

fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind[0] {
        THROUGHPUT => {
            let mut block = vec![0; BLOCK];
            let mut total: u64 = 0;
            loop {
                match stream.read(&mut block)? {
                    0 => break,
                    read => total += read as u64,
                }
            }
            Ok(stream.write_all(&total.to_be_bytes())?)
        }
        ROUND_TRIP => {
            let mut message = [0; MESSAGE];
            while stream.read_exact(&mut message).is_ok() {
                stream.write_all(&message)?;
            }
            Ok(())
        }
        other => Err(format!("asked for {other:#04x}").into()),
    }
}

fn dial(address: SocketAddr, kind: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, SILENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

/// Bytes that arrived over all streams, and the time from the first byte sent
/// to the last server's answer.
fn throughput(address: SocketAddr, streams: usize, time: Duration) -> Result<(u64, Duration)> {
    let streams: Vec<TcpStream> = (0..streams)
        .map(|_| dial(address, THROUGHPUT))
        .collect::<Result<_>>()?;
    let since = Instant::now();
    let senders: Vec<_> = streams
        .into_iter()
        .map(|stream| thread::spawn(move || send(stream, since + time)))
        .collect();
    let mut total = 0;
    for sender in senders {
        total += sender.join().map_err(|_| "a sender panicked")??;
    }
    Ok((total, since.elapsed()))
}

fn send(mut stream: TcpStream, until: Instant) -> Result<u64> {
    let block = vec![0x5a; BLOCK];
    while Instant::now() < until {
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total)?;
    Ok(u64::from_be_bytes(total))
}

/// How long each request and its response took, one after the other on one
/// connection.
fn round_trips(address: SocketAddr, time: Duration) -> Result<Vec<Duration>> {
    let mut stream = dial(address, ROUND_TRIP)?;
    let mut message = [0x5a; MESSAGE];
    let mut trip = || -> Result<Duration> {
        let since = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        Ok(since.elapsed())
    };
    let warm = Instant::now() + WARM_UP;
    while Instant::now() < warm {
        trip()?;
    }
    let until = Instant::now() + time;
    let mut times = Vec::new();
    while Instant::now() < until || times.is_empty() {
        times.push(trip()?);
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(&listener).map_err(|error| error.to_string()));
        address
    }

    #[test]
    fn every_byte_sent_over_every_stream_is_counted_where_it_arrives() {
        let (bytes, took) = throughput(server(), 3, Duration::from_millis(20)).unwrap();
        assert!(
            bytes >= 3 * BLOCK as u64 && bytes.is_multiple_of(BLOCK as u64),
            "{bytes}"
        );
        assert!(took >= Duration::from_millis(20));
    }

    #[test]
    fn a_round_trip_is_measured_at_least_once() {
        assert!(!round_trips(server(), Duration::ZERO).unwrap().is_empty());
    }

    #[test]
    fn words_that_are_not_understood_are_refused() {
        for words in [
            &["serve"][..],
            &[],
            &["throughput", "nowhere", "1", "1"],
            &["serve", "99999"],
        ] {
            assert!(run(words).is_err());
        }
    }
}
