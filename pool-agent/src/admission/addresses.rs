//! The addresses of one host: of its pods, whosever they are, and of its tenants'
//! routers. Pure.
//!
//! They come from one range, which is the host's (its configuration says it, never
//! a caller), and no part of it is anybody's before it is given: a tenant needs no
//! slice, and none lies idle. The first and the last address are left out, as in any
//! subnet. Addresses are given in turn, so that one just given back is the last to
//! come again: a connection or a cache that still names it finds nobody rather than
//! another pod.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

#[derive(Debug, Clone)]
pub struct Addresses {
    range: Ipv4Net,
    held: BTreeSet<Ipv4Addr>,
    /// The last address given.
    last: Ipv4Addr,
}

impl Addresses {
    /// A range without host addresses (/31, /32) has none to give.
    pub fn of(range: Ipv4Net) -> Self {
        let range = range.trunc();
        Self {
            range,
            held: BTreeSet::new(),
            last: range.network(),
        }
    }

    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// The next free address.
    pub fn take(&mut self) -> Option<Ipv4Addr> {
        let (first, last) = self.bounds()?;
        let mut candidate = self.last.to_bits();
        // At most `held` addresses are passed over before one is free; fewer if the
        // range has fewer, and then there is none.
        for _ in 0..=self.held.len().min((last - first) as usize) {
            candidate = if (first..last).contains(&candidate) {
                candidate + 1
            } else {
                first
            };
            let address = Ipv4Addr::from_bits(candidate);
            if self.held.insert(address) {
                self.last = address;
                return Some(address);
            }
        }
        None
    }

    /// Notes that somebody has it already. It may lie outside the range: the host's
    /// range has changed since it was given.
    pub fn hold(&mut self, address: Ipv4Addr) {
        self.held.insert(address);
    }

    pub fn give_back(&mut self, address: Ipv4Addr) {
        self.held.remove(&address);
    }

    pub fn resume_after(&mut self, last: Ipv4Addr) {
        if self.range.contains(&last) {
            self.last = last;
        }
    }

    /// The first and the last that may be given.
    fn bounds(&self) -> Option<(u32, u32)> {
        (self.range.prefix_len() <= 30).then(|| {
            (
                self.range.network().to_bits() + 1,
                self.range.broadcast().to_bits() - 1,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn of(range: &str) -> Addresses {
        Addresses::of(range.parse().unwrap())
    }

    #[test]
    fn a_range_gives_all_it_has_and_then_none() {
        for (range, count) in [
            ("10.0.0.0/29", 6),
            ("10.0.0.0/30", 2),
            ("10.0.0.0/31", 0),
            ("10.0.0.1/32", 0),
        ] {
            let mut addresses = of(range);
            let given = std::iter::from_fn(|| addresses.take()).count();
            assert_eq!(given, count, "{range}");
        }
    }

    #[test]
    fn an_address_given_back_is_the_last_to_come_again() {
        let mut addresses = of("10.0.0.0/28");
        let first = addresses.take().unwrap();
        addresses.give_back(first);
        let others: Vec<_> = std::iter::from_fn(|| addresses.take()).collect();
        assert_eq!(others.len(), 14);
        assert_eq!(others.last(), Some(&first));
    }

    #[test]
    fn an_address_of_an_earlier_range_is_held_and_takes_no_room() {
        let mut addresses = of("10.0.0.0/30");
        let earlier: Ipv4Addr = "10.9.9.9".parse().unwrap();
        addresses.hold(earlier);
        addresses.resume_after(earlier);
        assert_eq!(std::iter::from_fn(|| addresses.take()).count(), 2);
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice_or_outside_the_range(
            prefix in 24u8..=30,
            steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..400),
        ) {
            let range: Ipv4Net = format!("10.9.8.0/{prefix}").parse().unwrap();
            let mut addresses = Addresses::of(range);
            let mut held = HashSet::new();
            for (take, which) in steps {
                if take || held.is_empty() {
                    match addresses.take() {
                        Some(address) => {
                            prop_assert!(range.contains(&address));
                            prop_assert_ne!(address, range.network());
                            prop_assert_ne!(address, range.broadcast());
                            prop_assert!(held.insert(address), "{address} given twice");
                        }
                        None => prop_assert_eq!(held.len(), (1usize << (32 - prefix)) - 2),
                    }
                } else {
                    let mut all: Vec<_> = held.iter().copied().collect();
                    all.sort();
                    let address = all[which.index(all.len())];
                    held.remove(&address);
                    addresses.give_back(address);
                }
            }
        }
    }
}
