//! Clients of API servers, and single requests to one: each has an end. A watch has
//! none, and is not made here.

mod bounded;

use std::time::Duration;

use bounded::Bounding;
use kube::{Client, Config, Error, client::ClientBuilder};

/// TCP and TLS together.
const CONNECT: Duration = Duration::from_secs(10);

/// Longer than the API server takes for anything that a node asks of it. A request
/// that is lost with its connection would be waited for until TCP gives up.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The answer, or [`Error::Service`] if there is none. Whether a write that was not
/// answered took effect is not known.
pub(crate) async fn answered<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(Error::Service(elapsed.into())),
    }
}

pub(crate) fn client(mut settings: Config) -> Result<Client, Error> {
    settings.connect_timeout = Some(CONNECT);
    Client::try_from(settings)
}

/// A client of a server that nobody answers for: what it sends, and how many requests
/// wait for it, is bounded.
pub(crate) fn tenants_client(mut settings: Config) -> Result<Client, Error> {
    settings.connect_timeout = Some(CONNECT);
    Ok(ClientBuilder::try_from(settings)?
        .with_layer(&Bounding::new())
        .build())
}
