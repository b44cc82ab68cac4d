//! Passes questions on to the tenant's name servers, as they are: what the
//! mesh does not answer it does not change either.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket},
    time::{Instant, timeout, timeout_at},
};

use crate::{netns::Netns, telemetry::Metrics};

/// For one question, over all servers and attempts. A resolver's own first
/// timeout is 5 s.
pub(super) const DEADLINE: Duration = Duration::from_millis(4800);
/// For one attempt over UDP.
const ATTEMPT: Duration = Duration::from_millis(1500);
/// Over UDP; what is larger is asked for again over TCP.
const MAX_DATAGRAM: usize = 4096;

pub(super) struct Upstream {
    router: Netns,
    servers: Box<[SocketAddr]>,
    metrics: Arc<Metrics>,
}

impl Upstream {
    pub(super) fn new(router: Netns, servers: &[IpAddr], metrics: Arc<Metrics>) -> Self {
        Self {
            router,
            servers: servers.iter().map(|&ip| SocketAddr::new(ip, 53)).collect(),
            metrics,
        }
    }

    /// The first answer of any server, each tried twice.
    pub(super) async fn datagram(&self, question: &[u8]) -> Option<Vec<u8>> {
        let end = Instant::now() + DEADLINE;
        for &server in self.servers.iter().chain(&self.servers) {
            self.metrics.dns_upstream_request();
            let until = end.min(Instant::now() + ATTEMPT);
            match timeout_at(until, self.ask(server, question)).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "name server cannot be asked"),
                Err(_) => tracing::debug!(%server, "name server does not answer"),
            }
            if Instant::now() >= end {
                break;
            }
        }
        self.metrics.dns_upstream_failure();
        None
    }

    pub(super) async fn stream(&self, question: &[u8]) -> Option<Vec<u8>> {
        let all = async {
            for &server in &self.servers {
                self.metrics.dns_upstream_request();
                match self.ask_stream(server, question).await {
                    Ok(answer) => return Some(answer),
                    Err(error) => tracing::debug!(%server, %error, "name server cannot be asked"),
                }
            }
            None
        };
        let answer = timeout(DEADLINE, all).await.ok().flatten();
        if answer.is_none() {
            self.metrics.dns_upstream_failure();
        }
        answer
    }

    fn socket(&self, kind: Type, protocol: Protocol, to: SocketAddr) -> io::Result<Socket> {
        self.router.enter(|| {
            Socket::new(
                Domain::for_address(to),
                kind.nonblocking().cloexec(),
                Some(protocol),
            )
        })
    }

    /// From a port of its own and with an id of its own, both by chance: who
    /// cannot see the question cannot answer it.
    async fn ask(&self, server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.socket(Type::DGRAM, Protocol::UDP, server)?;
        socket.connect(&SockAddr::from(server))?;
        let socket = UdpSocket::from_std(socket.into())?;
        let id: [u8; 2] = rand::random();
        let asked = with_id(question, id);
        socket.send(&asked).await?;
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            let length = socket.recv(&mut buffer).await?;
            let answer = &buffer[..length];
            if length == MAX_DATAGRAM {
                // Probably cut off.
                return self.ask_stream(server, question).await;
            }
            if answers(&asked, answer) {
                let own = [question[0], question[1]];
                return Ok(with_id(answer, own));
            }
        }
    }

    async fn ask_stream(&self, server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.socket(Type::STREAM, Protocol::TCP, server)?;
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(server).await?;
        stream.set_nodelay(true)?;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(question);
        stream.write_all(&framed).await?;
        let answer = read_message(&mut stream).await?;
        if answers(question, &answer) {
            Ok(answer)
        } else {
            Err(io::Error::from(io::ErrorKind::InvalidData))
        }
    }
}

/// One message with its length before it.
pub(super) async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

fn with_id(message: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(own) = message.get_mut(..2) {
        own.copy_from_slice(&id);
    }
    message
}

/// Whether it is an answer with the same id to the same question.
fn answers(question: &[u8], answer: &[u8]) -> bool {
    let Some(end) = question_end(question) else {
        return false;
    };
    answer.len() >= end
        && answer[..2] == question[..2]
        && answer[2] & 0x80 != 0
        && answer[12..end].eq_ignore_ascii_case(&question[12..end])
}

/// Where the first entry of the question section ends. A query's own name has
/// no pointers: there is nothing before it to point to.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        match *message.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let end = at + 5;
    (message.len() >= end).then_some(end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUESTION: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x00\x00\x01\x00\x01";

    fn answer() -> Vec<u8> {
        let mut answer = QUESTION.to_vec();
        answer[2] |= 0x80;
        answer
    }

    #[test]
    fn an_answer_has_the_questions_id_and_name_in_any_case() {
        assert!(answers(QUESTION, &answer()));
        let mut other_case = answer();
        other_case[13] = b'W';
        assert!(answers(QUESTION, &other_case));
    }

    #[test]
    fn what_only_looks_like_an_answer_is_not_taken() {
        assert!(!answers(QUESTION, QUESTION), "a question");
        for at in [0, 1, 13, 20, 22, 24, 26] {
            let mut other = answer();
            other[at] ^= 0x01;
            assert!(!answers(QUESTION, &other), "byte {at} differs");
        }
        for length in 0..QUESTION.len() {
            assert!(!answers(QUESTION, &answer()[..length]), "cut to {length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_confuse_the_comparison(question: Vec<u8>, answer: Vec<u8>) {
            answers(&question, &answer);
        }
    }
}
