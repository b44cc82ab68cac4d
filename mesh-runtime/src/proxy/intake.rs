//! Reads a socket in pieces that are as large as it is busy.
//!
//! Used by [`super::copy`] for applications' sockets and by
//! [`super::hbone`] for tunnels. What always holds: while there is nothing to
//! read there is no buffer, so an idle connection costs none; a piece is never
//! larger than the owner said.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut, BytesMut};
use tokio::net::tcp::ReadHalf;
use tokio_util::io::poll_read_buf;

/// Most of what is read is answered with less.
const MIN_PIECE: usize = 4 << 10;

#[derive(Debug)]
pub(crate) struct Intake {
    /// What was read and not taken yet.
    pub(crate) buffer: BytesMut,
    piece: usize,
    max_piece: usize,
}

impl Intake {
    pub(crate) fn new(max_piece: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            piece: MIN_PIECE,
            max_piece,
        }
    }

    /// How much the next read asks for.
    pub(crate) fn piece(&self) -> usize {
        self.piece
    }

    /// Reads what is there, up to a piece, behind what is in the buffer; 0 at
    /// the end.
    pub(crate) fn poll_read(
        &mut self,
        from: &mut ReadHalf<'_>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        // Asked first, so that nothing is allocated for a socket that is silent.
        if from.as_ref().poll_read_ready(cx)?.is_ready() {
            self.buffer.reserve(self.piece);
            let into = &mut (&mut self.buffer).limit(self.piece);
            if let Poll::Ready(read) = poll_read_buf(Pin::new(from), cx, into)? {
                self.adapt(read);
                return Poll::Ready(Ok(read));
            }
        }
        self.give_back();
        Poll::Pending
    }

    /// An empty buffer's room.
    pub(crate) fn give_back(&mut self) {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
    }

    /// After a read that asked for a piece.
    pub(crate) fn adapt(&mut self, read: usize) {
        if read >= self.piece {
            self.piece = (self.piece * 2).min(self.max_piece);
        } else if read < self.piece / 4 {
            self.piece = (self.piece / 2).max(MIN_PIECE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures::FutureExt;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let (near, accepted) = tokio::join!(connect, listener.accept());
        (near.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn pieces_follow_what_there_is_to_read() {
        let mut intake = Intake::new(100_000);
        for _ in 0..20 {
            intake.adapt(intake.piece());
        }
        assert_eq!(intake.piece(), 100_000, "not beyond what its owner said");
        intake.adapt(intake.piece() / 2);
        assert_eq!(intake.piece(), 100_000, "half of it is no reason to ask for less");
        for _ in 0..20 {
            intake.adapt(1);
        }
        assert_eq!(intake.piece(), MIN_PIECE);
    }

    #[tokio::test]
    async fn a_socket_with_nothing_to_read_holds_no_buffer() {
        let (mut near, mut far) = pair().await;
        let mut intake = Intake::new(64 << 10);
        let (mut half, _) = near.split();
        let mut read = async |intake: &mut Intake| {
            let read = poll_fn(|cx| intake.poll_read(&mut half, cx));
            read.await.unwrap()
        };
        assert_eq!(read(&mut intake).now_or_never(), None);
        assert_eq!(intake.buffer.capacity(), 0);

        // A whole piece leaves the socket as if there were more.
        let message = vec![7; intake.piece()];
        far.write_all(&message).await.unwrap();
        let mut got = 0;
        while got < message.len() {
            got += read(&mut intake).await;
            intake.buffer.clear();
        }
        assert_eq!(read(&mut intake).now_or_never(), None);
        assert_eq!(intake.buffer.capacity(), 0);
    }

    #[tokio::test]
    async fn no_read_returns_more_than_a_piece() {
        let (mut near, mut far) = pair().await;
        let mut intake = Intake::new(10_000);
        let message: Vec<u8> = (0..200_000_u32).map(|i| (i / 7) as u8).collect();
        let sent = message.clone();
        let sending = tokio::spawn(async move { far.write_all(&sent).await.unwrap() });
        let (mut half, _) = near.split();
        let mut got = Vec::new();
        loop {
            let piece = intake.piece();
            let read = poll_fn(|cx| intake.poll_read(&mut half, cx)).await.unwrap();
            assert!(read <= piece && piece <= 10_000, "{read} of {piece}");
            if read == 0 {
                break;
            }
            got.extend_from_slice(&intake.buffer.split());
        }
        sending.await.unwrap();
        assert!(got == message);
    }
}
