//! A tunnel's socket, read in large pieces. rustls reads a record at a time, and
//! TCP tells the far side of new room after each read: here one call takes many
//! records. A socket with little to say is read as rustls asks for it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::proxy::intake::Intake;

/// Eight records: what we send as one frame.
const MAX_PIECE: usize = 128 << 10;

#[derive(Debug)]
pub(crate) struct ReadAhead {
    socket: TcpStream,
    intake: Intake,
}

impl From<TcpStream> for ReadAhead {
    fn from(socket: TcpStream) -> Self {
        Self {
            socket,
            intake: Intake::new(MAX_PIECE),
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { socket, intake } = self.get_mut();
        if intake.buffer.is_empty() {
            if into.remaining() >= intake.piece() {
                // Straight to where it is wanted.
                intake.give_back();
                let before = into.filled().len();
                ready!(Pin::new(socket).poll_read(cx, into))?;
                intake.adapt(into.filled().len() - before);
                return Poll::Ready(Ok(()));
            }
            ready!(intake.poll_read(&mut socket.split().0, cx))?;
        }
        // Nothing at the end of the stream, which says so.
        let length = into.remaining().min(intake.buffer.len());
        into.put_slice(&intake.buffer[..length]);
        intake.buffer.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn bytes_come_in_order_however_they_are_asked_for_and_nothing_is_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let (near, accepted) = tokio::join!(connect, listener.accept());
        let mut far = accepted.unwrap().0;
        let message: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 11) as u8).collect();
        let sent = message.clone();
        let sending = tokio::spawn(async move {
            far.write_all(&sent).await.unwrap();
            far
        });

        let mut near = ReadAhead::from(near.unwrap());
        let mut got = Vec::new();
        // As rustls asks, and in other ways.
        for size in [4096, 18_437, 5, 1 << 20].into_iter().cycle() {
            let mut into = vec![0; size.min(message.len() - got.len())];
            let read = near.read(&mut into).await.unwrap();
            assert_ne!(read, 0, "ended after {}", got.len());
            got.extend_from_slice(&into[..read]);
            if got.len() == message.len() {
                break;
            }
        }
        assert!(got == message);
        assert!(near.intake.piece() > 4096, "it was busy");

        let mut byte = [0];
        assert!(near.read(&mut byte).now_or_never().is_none());
        assert_eq!(near.intake.buffer.capacity(), 0, "kept while idle");
        drop(sending.await.unwrap());
        assert_eq!(near.read(&mut byte).await.unwrap(), 0);
    }
}
