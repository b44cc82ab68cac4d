//! Which hosts' Leases have lapsed, by this process' own clock: a host is given as long
//! as its Lease says from the moment a renewal was seen, and a margin. Times of day, the
//! host's or the cell's, say nothing here. Pure; [`crate::witness`] looks and says.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use tokio::time::Instant;

/// Between statements about one claim, at first; later a tenth of how long it has been
/// said, so that a host that is gone for good costs little.
pub(crate) const EVERY: Duration = Duration::from_secs(2);

/// The host counts from before it sent a renewal, by a clock that may be a little off.
fn margin(lease: Duration) -> Duration {
    Duration::from_secs(1) + lease / 100
}

#[derive(Debug, Clone, PartialEq)]
struct Renewal {
    /// As the host wrote it: only whether it changes is of interest.
    renewed: Option<Timestamp>,
    lease: Duration,
    seen: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct Leases {
    hosts: BTreeMap<String, Renewal>,
}

impl Leases {
    /// The host's Lease as it is now, or was a moment ago.
    pub(crate) fn saw(&mut self, host: &str, lease: &Lease, now: Instant) {
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
        let renewal = Renewal {
            renewed: spec.renew_time.map(|at| at.0),
            lease: Duration::from_secs(seconds.unwrap_or(0)),
            seen: now,
        };
        match self.hosts.get(host) {
            Some(known) if known.renewed == renewal.renewed && known.lease == renewal.lease => {}
            _ => {
                self.hosts.insert(host.to_owned(), renewal);
            }
        }
    }

    pub(crate) fn gone(&mut self, host: &str) {
        self.hosts.remove(host);
    }

    /// False for a host that was never seen: it is given its time from then on.
    pub(crate) fn has_lapsed(&self, host: &str, now: Instant) -> bool {
        self.hosts
            .get(host)
            .is_some_and(|known| now.duration_since(known.seen) > known.lease + margin(known.lease))
    }
}

/// Whether it is time to say it (again): since when it has been said, and when last.
pub(crate) fn is_due(since: Option<Timestamp>, last: Option<Timestamp>, now: Timestamp) -> bool {
    let (Some(since), Some(last)) = (since, last) else {
        return true;
    };
    let passed = |from: Timestamp| Duration::try_from(now.duration_since(from)).unwrap_or_default();
    passed(last) >= EVERY.max(passed(since) / 10)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::coordination::v1::LeaseSpec, apimachinery::pkg::apis::meta::v1::MicroTime};

    use super::*;

    fn lease(renewed: i64, seconds: i32) -> Lease {
        Lease {
            spec: Some(LeaseSpec {
                renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
                lease_duration_seconds: Some(seconds),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        }
    }

    #[test]
    fn a_lease_lapses_when_it_has_not_changed_for_as_long_as_it_says_by_our_own_clock() {
        let (mut leases, begun) = (Leases::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        // What time the host has is its own affair.
        leases.saw("a", &lease(5, 40), at(0));
        leases.saw("a", &lease(5, 40), at(30));
        assert!(!leases.has_lapsed("a", at(41)));
        assert!(leases.has_lapsed("a", at(42)));
        leases.saw("a", &lease(6, 40), at(42));
        assert!(!leases.has_lapsed("a", at(82)));
        assert!(leases.has_lapsed("a", at(84)));
        assert!(!leases.has_lapsed("b", at(1000)), "it was never seen");
        leases.gone("a");
        assert!(!leases.has_lapsed("a", at(1000)));
    }

    #[test]
    fn it_is_said_again_soon_at_first_and_seldom_later() {
        let at = |s| Timestamp::from_second(s).unwrap();
        assert!(is_due(None, None, at(0)));
        assert!(!is_due(Some(at(0)), Some(at(2)), at(3)));
        assert!(is_due(Some(at(0)), Some(at(2)), at(4)));
        assert!(!is_due(Some(at(0)), Some(at(1000)), at(1050)));
        assert!(is_due(Some(at(0)), Some(at(1000)), at(1200)));
    }
}
