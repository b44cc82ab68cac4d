//! A TCP connection of an application, with the rule that it ends by reset
//! unless both sides said their last: an application must not take a cut for an
//! end.

use std::ops::{Deref, DerefMut};

use tokio::net::TcpStream;

#[derive(Debug)]
pub(crate) struct Connection {
    stream: Option<TcpStream>,
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Self {
        Self { stream: Some(stream) }
    }
}

impl Connection {
    /// Closes without a reset.
    pub(crate) fn finish(mut self) {
        self.stream = None;
    }
}

impl Deref for Connection {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        match &self.stream {
            Some(stream) => stream,
            // Only `finish` takes it, and that takes the connection too.
            None => unreachable!("a finished connection has no holder"),
        }
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut TcpStream {
        match &mut self.stream {
            Some(stream) => stream,
            None => unreachable!("a finished connection has no holder"),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            // If the socket is broken already, there is nothing to reset.
            let _broken = stream.set_zero_linger();
        }
    }
}
