//! Names that probes and hooks dial, looked up as the host itself would look
//! them up, as a kubelet does. Called by [`super::dial`].
//!
//! What always holds: at most [`LOOKUPS`] look-ups take a thread, also those whose
//! probe has given up; the others wait within their own probe's time.

use std::net::{IpAddr, ToSocketAddrs};

use tokio::sync::Semaphore;

/// The system's resolver blocks, for tens of seconds if no server answers.
const LOOKUPS: usize = 8;
static ROOM: Semaphore = Semaphore::const_new(LOOKUPS);

/// The address that stands for `host`; of several an IPv4 one, which a tenant's
/// router can reach.
pub(super) async fn address(host: &str) -> Result<IpAddr, String> {
    if let Ok(address) = host.parse() {
        return Ok(address);
    }
    let failed = |problem: &dyn std::fmt::Display| format!("lookup {host}: {problem}");
    let permit = ROOM.acquire().await.map_err(|e| failed(&e))?;
    let name = host.to_owned();
    let looked_up = tokio::task::spawn_blocking(move || {
        let found = (name.as_str(), 0).to_socket_addrs();
        // Not before: a look-up goes on when nobody waits for it any more.
        drop(permit);
        found
    });
    let found = looked_up.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let of_choice = addresses.iter().find(|address| address.is_ipv4());
    of_choice
        .or(addresses.first())
        .copied()
        .ok_or_else(|| failed(&"it has no address"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn a_name_of_the_hosts_own_is_looked_up_and_an_address_is_taken_as_it_is() {
        assert_eq!(address("localhost").await, Ok(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(address("10.1.2.3").await, Ok(Ipv4Addr::new(10, 1, 2, 3).into()));
    }

    #[tokio::test]
    async fn a_name_that_nobody_has_is_told_with_the_reason() {
        // Longer than any name: no server has to be asked.
        let name = "x".repeat(300);
        let error = address(&name).await.unwrap_err();
        assert!(error.starts_with(&format!("lookup {name}: ")), "{error}");
    }
}
