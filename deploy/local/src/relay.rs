//! Carries TCP connections from one network namespace into another.
//!
//! The lab's API server is in a namespace of its own; the user's kubectl is
//! not. A relay process listens on the machine's loopback and dials inside the
//! lab (or the other way round, to a cluster the user brought). It looks at
//! nothing: TLS ends at the two ends.

use std::{fs::File, io, net::SocketAddr, os::fd::AsFd, time::Duration};

use nix::sched::{CloneFlags, setns};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use crate::netns::Namespace;

#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("cannot enter namespace {namespace}")]
    Enter {
        namespace: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
}

/// A port of the machine's loopback that is free right now.
pub fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Connections open at once; more wait in the kernel's queue. kubectl and a
/// few watching programs use tens.
const MOST_CONNECTIONS: usize = 512;

/// Listens in one namespace and dials in another (`None`: where it was
/// started), until the process is ended. Each name of `target` is looked up
/// anew at each connection.
///
/// Must be called before the process has other threads: it moves itself, and
/// threads made after inherit where it is.
pub fn run(
    listen_in: Option<&Namespace>,
    listen: SocketAddr,
    dial_in: Option<&Namespace>,
    target: &str,
) -> Result<(), RelayError> {
    let dial_in = dial_in
        .cloned()
        .map_or_else(own_namespace, |namespace| open(&namespace))?;
    if let Some(namespace) = listen_in {
        enter(&open(namespace)?, namespace.name())?;
    }
    let listener = std::net::TcpListener::bind(listen)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|source| RelayError::Listen {
            address: listen,
            source,
        })?;
    enter(&dial_in, "to dial in")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(RelayError::Runtime)?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener).map_err(RelayError::Runtime)?;
        tracing::info!(%listen, target, "relay listens");
        serve(listener, target).await
    })
}

async fn serve(listener: TcpListener, target: &str) -> Result<(), RelayError> {
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return Ok(());
        };
        let (mut client, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: the next one may fit again.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let target = target.to_owned();
        tokio::spawn(async move {
            match TcpStream::connect(&target).await {
                // Either end may go at any time; that is how connections end.
                Ok(mut server) => drop(copy_bidirectional(&mut client, &mut server).await),
                Err(error) => tracing::warn!(%from, target, %error, "cannot dial"),
            }
            drop(slot);
        });
    }
}

fn own_namespace() -> Result<File, RelayError> {
    File::open("/proc/self/ns/net").map_err(|source| RelayError::Enter {
        namespace: "own".into(),
        source,
    })
}

fn open(namespace: &Namespace) -> Result<File, RelayError> {
    File::open(namespace.path()).map_err(|source| RelayError::Enter {
        namespace: namespace.name().into(),
        source,
    })
}

fn enter(namespace: &File, name: &str) -> Result<(), RelayError> {
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|source| RelayError::Enter {
        namespace: name.to_owned(),
        source: source.into(),
    })
}
