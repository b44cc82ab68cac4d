//! Carries bytes between an application's socket and where they go: another
//! socket, or a stream of a tunnel.
//!
//! Either direction ends on its own (half-close is carried through) and the
//! connection ends with both. A failure of one ends both, and is told by reset.
//! Idle connections hold no buffer; busy ones grow theirs. Nothing is read from
//! one side that the other has no room for.

use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    pin::pin,
    task::{Poll, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::future::{Either, select};
use h2::{RecvStream, SendStream};
use tokio::{io::Interest, net::TcpStream};

use crate::telemetry::Flow;

/// The first read of a connection; most are answered with less.
const MIN_CHUNK: usize = 4 << 10;
/// What a busy direction reads at once. It fits the core's cache with its
/// encrypted twin, and is a whole number of TLS records.
const MAX_CHUNK: usize = 64 << 10;
/// Chunks of a tunnel's stream written to a socket in one call.
const MAX_SLICES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("the application's socket: {0}")]
    Socket(#[source] io::Error),
    #[error("the far socket: {0}")]
    FarSocket(#[source] io::Error),
    #[error("the tunnel's stream: {0}")]
    Stream(#[source] h2::Error),
    #[error("the tunnel's stream was closed")]
    StreamClosed,
}

/// Who counts, and in which direction the bytes go.
#[derive(Clone, Copy)]
pub(crate) struct Meter<'a> {
    flows: &'a [Flow],
}

impl<'a> Meter<'a> {
    pub(crate) fn new(flows: &'a [Flow]) -> Self {
        Self { flows }
    }

    fn received(&self, bytes: usize) {
        self.flows.iter().for_each(|flow| flow.received(bytes));
    }

    fn sent(&self, bytes: usize) {
        self.flows.iter().for_each(|flow| flow.sent(bytes));
    }
}

/// Between the client's socket and the server's.
pub(crate) async fn sockets(
    client: &TcpStream,
    server: &TcpStream,
    meter: Meter<'_>,
) -> Result<(), CopyError> {
    let up = socket_to_socket(client, server, |n| meter.received(n));
    let down = async {
        socket_to_socket(server, client, |n| meter.sent(n))
            .await
            .map_err(|error| match error {
                CopyError::Socket(e) => CopyError::FarSocket(e),
                CopyError::FarSocket(e) => CopyError::Socket(e),
                other => other,
            })
    };
    futures::try_join!(up, down).map(|_| ())
}

/// Between a client's socket and the stream of a tunnel to its server.
pub(crate) async fn client_to_tunnel(
    client: &TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    meter: Meter<'_>,
) -> Result<(), CopyError> {
    both(
        client,
        socket_to_stream(client, send, |n| meter.received(n)),
        stream_to_socket(receive, client, |n| meter.sent(n)),
    )
    .await
}

/// Between the stream of a client's tunnel and its server's socket.
pub(crate) async fn tunnel_to_server(
    server: &TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    meter: Meter<'_>,
) -> Result<(), CopyError> {
    both(
        server,
        socket_to_stream(server, send, |n| meter.sent(n)),
        stream_to_socket(receive, server, |n| meter.received(n)),
    )
    .await
}

/// Drives both directions. When the application has said its last, nothing
/// reads its socket any more, so its death is watched for: a tunnel whose far
/// side never ends its half would keep the descriptor for ever.
async fn both(
    socket: &TcpStream,
    from_socket: impl Future<Output = Result<(), CopyError>>,
    to_socket: impl Future<Output = Result<(), CopyError>>,
) -> Result<(), CopyError> {
    let mut from_socket = pin!(from_socket);
    let mut to_socket = pin!(to_socket);
    match select(from_socket.as_mut(), to_socket.as_mut()).await {
        Either::Left((done, _)) => {
            done?;
            match select(to_socket, pin!(socket.ready(Interest::ERROR))).await {
                Either::Left((done, _)) => done,
                Either::Right((ready, rest)) => match ready.and_then(|_| pending_error(socket)) {
                    Err(error) => Err(CopyError::Socket(error)),
                    // An event without an error to it: only the copy can tell.
                    Ok(()) => rest.await,
                },
            }
        }
        Either::Right((done, rest)) => {
            done?;
            rest.await
        }
    }
}

fn pending_error(socket: &TcpStream) -> io::Result<()> {
    match socket.take_error()? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// How much to read at once, after what was read before.
struct Chunk(usize);

impl Chunk {
    fn new() -> Self {
        Self(MIN_CHUNK)
    }

    fn adapt(&mut self, read: usize, offered: usize) {
        if read == offered {
            self.0 = (self.0 * 2).min(MAX_CHUNK);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_CHUNK);
        }
    }
}

async fn socket_to_socket(from: &TcpStream, to: &TcpStream, count: impl Fn(usize)) -> Result<(), CopyError> {
    let mut chunk = Chunk::new();
    let mut buffer = BytesMut::new();
    loop {
        let read = read(from, &mut buffer, chunk.0)
            .await
            .map_err(CopyError::Socket)?;
        if read == 0 {
            return shutdown(to).map_err(CopyError::FarSocket);
        }
        chunk.adapt(read, chunk.0);
        while !buffer.is_empty() {
            let written = write(to, &buffer).await.map_err(CopyError::FarSocket)?;
            count(written);
            buffer.advance(written);
        }
        buffer.clear();
    }
}

/// Reads what is there, up to `room`; 0 at the end. Waits without a buffer.
async fn read(from: &TcpStream, buffer: &mut BytesMut, room: usize) -> io::Result<usize> {
    loop {
        if buffer.capacity() == 0 {
            from.readable().await?;
        }
        buffer.reserve(room);
        match from.try_read_buf(&mut buffer.limit(room)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => *buffer = BytesMut::new(),
            done => return done,
        }
    }
}

async fn write(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match to.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            done => return done,
        }
    }
}

/// Says that no more will come. A peer that is gone already needs no telling.
fn shutdown(socket: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

async fn socket_to_stream(
    from: &TcpStream,
    send: &mut SendStream<Bytes>,
    count: impl Fn(usize),
) -> Result<(), CopyError> {
    let mut chunk = Chunk::new();
    let mut buffer = BytesMut::new();
    loop {
        let room = capacity(send, chunk.0).await?.min(chunk.0);
        let read = {
            let read = read(from, &mut buffer, room);
            // The far side may have given up while nothing is to be sent.
            let given_up = poll_fn(|cx| send.poll_reset(cx));
            match select(pin!(read), given_up).await {
                Either::Left((read, _)) => read.map_err(CopyError::Socket)?,
                Either::Right((Ok(reason), _)) => return Err(CopyError::Stream(reason.into())),
                Either::Right((Err(error), _)) => return Err(CopyError::Stream(error)),
            }
        };
        if read == 0 {
            return send.send_data(Bytes::new(), true).map_err(CopyError::Stream);
        }
        send.send_data(buffer.split().freeze(), false)
            .map_err(CopyError::Stream)?;
        count(read);
        chunk.adapt(read, room);
    }
}

/// Waits until the stream takes at least a byte; how many it takes.
async fn capacity(send: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, CopyError> {
    send.reserve_capacity(wanted);
    poll_fn(|cx| {
        loop {
            match send.capacity() {
                0 => match ready!(send.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(CopyError::Stream(error))),
                    None => return Poll::Ready(Err(CopyError::StreamClosed)),
                },
                room => return Poll::Ready(Ok(room)),
            }
        }
    })
    .await
}

async fn stream_to_socket(
    from: &mut RecvStream,
    to: &TcpStream,
    count: impl Fn(usize),
) -> Result<(), CopyError> {
    let mut chunks: Vec<Bytes> = Vec::new();
    loop {
        let first = match poll_fn(|cx| from.poll_data(cx)).await {
            Some(data) => data.map_err(CopyError::Stream)?,
            None => return shutdown(to).map_err(CopyError::Socket),
        };
        chunks.push(first);
        // Whatever else is there goes in the same call.
        let mut total = chunks[0].len();
        poll_fn(|cx| {
            while chunks.len() < MAX_SLICES && total < MAX_CHUNK {
                match from.poll_data(cx) {
                    Poll::Ready(Some(Ok(data))) => {
                        total += data.len();
                        chunks.push(data);
                    }
                    // An end or an error is found again by the next poll.
                    _ => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        write_all(to, &mut chunks, |written| {
            count(written);
            // Room for the sender, now that it has left here. It cannot be more
            // than was received.
            from.flow_control().release_capacity(written)
        })
        .await?;
    }
}

async fn write_all(
    to: &TcpStream,
    chunks: &mut Vec<Bytes>,
    mut done: impl FnMut(usize) -> Result<(), h2::Error>,
) -> Result<(), CopyError> {
    let mut begin = 0;
    while begin < chunks.len() {
        if chunks[begin].is_empty() {
            begin += 1;
            continue;
        }
        let mut written = match try_write(to, &chunks[begin..]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                to.writable().await.map_err(CopyError::Socket)?;
                continue;
            }
            other => other.map_err(CopyError::Socket)?,
        };
        done(written).map_err(CopyError::Stream)?;
        while written > 0 {
            let take = written.min(chunks[begin].len());
            chunks[begin].advance(take);
            written -= take;
            if chunks[begin].is_empty() {
                begin += 1;
            }
        }
    }
    chunks.clear();
    Ok(())
}

fn try_write(to: &TcpStream, chunks: &[Bytes]) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); MAX_SLICES];
    let mut used = 0;
    for (slice, chunk) in slices.iter_mut().zip(chunks) {
        *slice = IoSlice::new(chunk);
        used += 1;
    }
    to.try_write_vectored(&slices[..used])
}
