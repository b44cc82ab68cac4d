//! A name server outside the cluster: it knows one name.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, RecordType, rdata::A},
};
use spindrift_local::netns::Namespace;

/// Ends when dropped.
pub(crate) struct Resolver {
    asked: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
}

impl Resolver {
    /// Serves UDP in the namespace.
    pub(crate) fn start(
        namespace: &Namespace,
        address: SocketAddr,
        name: &str,
        known: Ipv4Addr,
    ) -> io::Result<Self> {
        let socket = namespace.enter(|| UdpSocket::bind(address))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let resolver = Self {
            asked: Arc::default(),
            ended: Arc::default(),
        };
        let (asked, ended, name) = (resolver.asked.clone(), resolver.ended.clone(), name.to_owned());
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while !ended.load(Ordering::Relaxed) {
                // The time-out, to look whether this is the end.
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                if let Some((question, answer)) = answer(&buffer[..length], &name, known) {
                    asked
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(question);
                    socket.send_to(&answer, from).ok();
                }
            }
        });
        Ok(resolver)
    }

    /// The names it was asked for.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn answer(question: &[u8], name: &str, known: Ipv4Addr) -> Option<(String, Vec<u8>)> {
    let mut message = Message::from_vec(question).ok()?;
    let query = message.queries.first()?.clone();
    let asked = query.name().to_ascii();
    message.metadata.message_type = MessageType::Response;
    message.metadata.recursion_available = true;
    if asked == name {
        if query.query_type() == RecordType::A {
            message
                .answers
                .push(Record::from_rdata(query.name().clone(), 60, RData::A(A(known))));
        }
    } else {
        message.metadata.response_code = ResponseCode::NXDomain;
    }
    Some((asked, message.to_vec().ok()?))
}
