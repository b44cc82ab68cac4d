//! Carries bytes between an application's socket and where they go: another
//! socket, or a stream of a tunnel.
//!
//! Either direction ends on its own (half-close is carried through) and the
//! connection ends with both. A failure of one ends both, and is told by reset.
//! One that carries nothing for long is ended ([`Patience`]), sooner when one side has
//! said its last. Idle connections hold no buffer; busy ones grow theirs. Nothing is read from
//! one side while the other has no room, and at most a piece beyond its room.
//!
//! Sockets are read and written through tokio's own traits, which learn from a
//! read that was answered with less that the socket is empty. A read by
//! `try_read` finds that out by one system call more.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures::{
    FutureExt,
    future::{Either, select},
};
use h2::{RecvStream, SendStream};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::Instant,
};

use super::intake::Intake;
use crate::telemetry::Flow;

/// What a busy direction reads at once. It fits the core's cache with its
/// encrypted twin; as a frame, with its header, it fills whole TLS records. HTTP/2
/// writes frame by frame, and the kernel cuts what is written into segments of
/// somewhat less than 64 KiB: a frame of just that size costs two of them.
const MAX_PIECE: usize = (128 << 10) - FRAME_HEADER;
/// Of HTTP/2 (RFC 9113, 4.1).
const FRAME_HEADER: usize = 9;
/// Pieces of a tunnel's stream are gathered up to this for one write.
const MAX_GATHERED: usize = 128 << 10;

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
    #[error("nothing was carried for {} s", .0.as_secs())]
    Idle(Duration),
}

impl CopyError {
    fn seen_from_the_far_side(self) -> Self {
        match self {
            Self::Socket(e) => Self::FarSocket(e),
            Self::FarSocket(e) => Self::Socket(e),
            other => other,
        }
    }
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

    /// Both ways, since the connection was opened. All flows count the same.
    fn carried(&self) -> u64 {
        self.flows.first().map_or(0, Flow::carried)
    }
}

/// How long a connection may carry nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) idle: Duration,
    /// Once one side has said its last. Not longer than `idle`.
    pub(crate) half_closed: Duration,
}

/// Between the client's socket and the server's.
pub(crate) async fn sockets(
    client: &mut TcpStream,
    server: &mut TcpStream,
    meter: Meter<'_>,
    patience: Patience,
) -> Result<(), CopyError> {
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    let half = AtomicBool::new(false);
    let copied = async {
        let mut up = pin!(socket_to_socket(client_read, server_write, |n| meter.received(n)));
        let down = async {
            let copied = socket_to_socket(server_read, client_write, |n| meter.sent(n)).await;
            copied.map_err(CopyError::seen_from_the_far_side)
        };
        let mut down = pin!(down);
        match select(up.as_mut(), down.as_mut()).await {
            Either::Left((done, _)) => {
                let client = done?;
                half.store(true, Ordering::Relaxed);
                outlive(&client, down.map(|done| done.map(drop)), CopyError::Socket).await
            }
            Either::Right((done, _)) => {
                let server = done?;
                half.store(true, Ordering::Relaxed);
                outlive(&server, up.map(|done| done.map(drop)), CopyError::FarSocket).await
            }
        }
    };
    patient(copied, meter, &half, patience).await
}

/// Gives a connection up that carries nothing for too long. Looked at now and then,
/// so that bytes cost nothing: it ends at the latest after twice its time.
async fn patient(
    copied: impl Future<Output = Result<(), CopyError>>,
    meter: Meter<'_>,
    half: &AtomicBool,
    patience: Patience,
) -> Result<(), CopyError> {
    let mut copied = pin!(copied);
    let mut ticks = pin!(tokio::time::sleep(patience.half_closed));
    let mut carried = meter.carried();
    let (mut quiet, mut was_half) = (Duration::ZERO, false);
    loop {
        match select(copied.as_mut(), ticks.as_mut()).await {
            Either::Left((done, _)) => return done,
            Either::Right(_) => {}
        }
        ticks.as_mut().reset(Instant::now() + patience.half_closed);
        let (now, is_half) = (meter.carried(), half.load(Ordering::Relaxed));
        let moved = std::mem::replace(&mut carried, now) != now;
        // Its own time begins with the half's end.
        let turned = std::mem::replace(&mut was_half, is_half) != is_half;
        quiet = if moved || turned {
            Duration::ZERO
        } else {
            quiet + patience.half_closed
        };
        if (is_half && !quiet.is_zero()) || quiet >= patience.idle {
            return Err(CopyError::Idle(quiet));
        }
    }
}

/// Between a client's socket and the stream of a tunnel to its server.
pub(crate) async fn client_to_tunnel(
    client: &mut TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    meter: Meter<'_>,
    patience: Patience,
) -> Result<(), CopyError> {
    let (read, write) = client.split();
    let half = AtomicBool::new(false);
    let copied = both(
        socket_to_stream(read, send, |n| meter.received(n)),
        stream_to_socket(receive, write, |n| meter.sent(n)),
        &half,
    );
    patient(copied, meter, &half, patience).await
}

/// Between the stream of a client's tunnel and its server's socket.
pub(crate) async fn tunnel_to_server(
    server: &mut TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    meter: Meter<'_>,
    patience: Patience,
) -> Result<(), CopyError> {
    let (read, write) = server.split();
    let half = AtomicBool::new(false);
    let copied = both(
        socket_to_stream(read, send, |n| meter.sent(n)),
        stream_to_socket(receive, write, |n| meter.received(n)),
        &half,
    );
    patient(copied, meter, &half, patience).await
}

/// Drives both directions. When the application has said its last, nothing
/// reads its socket any more, so its death is watched for: a tunnel whose far
/// side never ends its half would keep the descriptor for ever.
async fn both<'a>(
    from_socket: impl Future<Output = Result<ReadHalf<'a>, CopyError>>,
    to_socket: impl Future<Output = Result<(), CopyError>>,
    half: &AtomicBool,
) -> Result<(), CopyError> {
    let mut from_socket = pin!(from_socket);
    let mut to_socket = pin!(to_socket);
    match select(from_socket.as_mut(), to_socket.as_mut()).await {
        Either::Left((done, _)) => {
            let socket = done?;
            half.store(true, Ordering::Relaxed);
            outlive(&socket, to_socket, CopyError::Socket).await
        }
        Either::Right((done, rest)) => {
            done?;
            half.store(true, Ordering::Relaxed);
            rest.await.map(|_| ())
        }
    }
}

/// What is still to come, unless `socket`, which nothing reads any more, dies before.
async fn outlive(
    socket: &ReadHalf<'_>,
    rest: impl Future<Output = Result<(), CopyError>>,
    died: impl Fn(io::Error) -> CopyError,
) -> Result<(), CopyError> {
    match select(pin!(rest), pin!(socket.ready(Interest::ERROR))).await {
        Either::Left((done, _)) => done,
        Either::Right((ready, rest)) => match ready.and_then(|_| pending_error(socket)) {
            Err(error) => Err(died(error)),
            // An event without an error to it: only the copy can tell.
            Ok(()) => rest.await,
        },
    }
}

fn pending_error(socket: &ReadHalf<'_>) -> io::Result<()> {
    match socket.as_ref().take_error()? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Gives the socket that was read back at its end.
async fn socket_to_socket<'a>(
    mut from: ReadHalf<'a>,
    mut to: WriteHalf<'_>,
    count: impl Fn(usize),
) -> Result<ReadHalf<'a>, CopyError> {
    let mut intake = Intake::new(MAX_PIECE);
    loop {
        let read = poll_fn(|cx| intake.poll_read(&mut from, cx)).await;
        if read.map_err(CopyError::Socket)? == 0 {
            shutdown(to).await.map_err(CopyError::FarSocket)?;
            return Ok(from);
        }
        while intake.buffer.has_remaining() {
            let written = to.write_buf(&mut intake.buffer).await;
            count(written.map_err(CopyError::FarSocket)?);
        }
    }
}

/// Says that no more will come. A peer that is gone already needs no telling.
async fn shutdown(mut socket: WriteHalf<'_>) -> io::Result<()> {
    match socket.shutdown().await {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        done => done,
    }
}

/// Gives the socket back at its end, for [`both`] to watch.
async fn socket_to_stream<'a>(
    mut from: ReadHalf<'a>,
    send: &mut SendStream<Bytes>,
    count: impl Fn(usize),
) -> Result<ReadHalf<'a>, CopyError> {
    let mut intake = Intake::new(MAX_PIECE);
    loop {
        // With any room at all a whole piece is read: the stream keeps what goes
        // beyond, and windows do not cut pieces to crumbs.
        room(send, intake.piece()).await?;
        let read = {
            let read = poll_fn(|cx| intake.poll_read(&mut from, cx));
            // The far side may have given up while nothing is to be sent.
            let given_up = poll_fn(|cx| send.poll_reset(cx));
            match select(read, given_up).await {
                Either::Left((read, _)) => read.map_err(CopyError::Socket)?,
                Either::Right((Ok(reason), _)) => return Err(CopyError::Stream(reason.into())),
                Either::Right((Err(error), _)) => return Err(CopyError::Stream(error)),
            }
        };
        let piece = intake.buffer.split().freeze();
        send.send_data(piece, read == 0).map_err(CopyError::Stream)?;
        if read == 0 {
            return Ok(from);
        }
        count(read);
    }
}

/// Waits until the stream takes at least a byte.
async fn room(send: &mut SendStream<Bytes>, wanted: usize) -> Result<(), CopyError> {
    send.reserve_capacity(wanted);
    poll_fn(|cx| {
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(CopyError::Stream(error))),
                None => return Poll::Ready(Err(CopyError::StreamClosed)),
            }
        }
        Poll::Ready(Ok(()))
    })
    .await
}

async fn stream_to_socket(
    from: &mut RecvStream,
    mut to: WriteHalf<'_>,
    count: impl Fn(usize),
) -> Result<(), CopyError> {
    let mut gathered = Gathered::default();
    loop {
        match poll_fn(|cx| from.poll_data(cx)).await {
            Some(piece) => gathered.push(piece.map_err(CopyError::Stream)?),
            None => return shutdown(to).await.map_err(CopyError::Socket),
        }
        // Whatever else is there goes in the same call.
        poll_fn(|cx| {
            while gathered.remaining() < MAX_GATHERED {
                match from.poll_data(cx) {
                    Poll::Ready(Some(Ok(piece))) => gathered.push(piece),
                    // An end or an error is found again by the next poll.
                    _ => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        while gathered.has_remaining() {
            let written = to.write_buf(&mut gathered).await.map_err(CopyError::Socket)?;
            count(written);
            // Room for the sender, now that it has left here. It cannot be more
            // than was received.
            from.flow_control()
                .release_capacity(written)
                .map_err(CopyError::Stream)?;
        }
    }
}

/// Pieces that are written as one.
#[derive(Debug, Default)]
struct Gathered {
    /// None of them empty.
    pieces: VecDeque<Bytes>,
    remaining: usize,
}

impl Gathered {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.remaining += piece.len();
            self.pieces.push_back(piece);
        }
    }
}

impl Buf for Gathered {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        slices
            .iter_mut()
            .zip(&self.pieces)
            .map(|(slice, piece)| *slice = IoSlice::new(piece))
            .count()
    }

    fn advance(&mut self, mut count: usize) {
        self.remaining -= count;
        while let Some(first) = self.pieces.front_mut() {
            if count < first.len() {
                return first.advance(count);
            }
            count -= first.len();
            self.pieces.pop_front();
        }
        // An idle connection keeps nothing.
        self.pieces = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_piece_and_its_header_fill_whole_records() {
        const RECORD: usize = 16 << 10;
        assert_eq!((MAX_PIECE + FRAME_HEADER) % RECORD, 0);
    }

    proptest! {
        #[test]
        fn what_was_gathered_is_taken_in_order_however_it_is_taken(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..100),
            takes in prop::collection::vec(1..30_usize, 0..100),
        ) {
            let mut gathered = Gathered::default();
            let whole = pieces.concat();
            pieces.into_iter().for_each(|piece| gathered.push(piece.into()));
            let mut taken = Vec::new();
            for take in takes.into_iter().chain(std::iter::repeat(7)) {
                prop_assert_eq!(gathered.remaining(), whole.len() - taken.len());
                if !gathered.has_remaining() {
                    break;
                }
                let mut slices = [IoSlice::new(&[]); 4];
                let used = gathered.chunks_vectored(&mut slices);
                let shown: Vec<u8> = slices[..used].iter().flat_map(|s| s.iter().copied()).collect();
                prop_assert!(shown.starts_with(gathered.chunk()) && !gathered.chunk().is_empty());
                let take = take.min(shown.len());
                taken.extend_from_slice(&shown[..take]);
                gathered.advance(take);
            }
            prop_assert_eq!(taken, whole);
            prop_assert_eq!(gathered.pieces.capacity(), 0);
        }
    }
}
