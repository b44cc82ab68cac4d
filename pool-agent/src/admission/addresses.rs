//! The addresses of one tenant on one host. Pure.
//!
//! The first and the last address of the range are left out, as in any subnet,
//! and the second is the tenant's router's own ([`router_address`]). Addresses are
//! given in turn, so that one just given back is the last to come again: a
//! connection or a cache that still names it finds nobody rather than another pod.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

#[derive(Debug, Clone)]
pub struct Addresses {
    range: Ipv4Net,
    held: BTreeSet<Ipv4Addr>,
    /// The last address given.
    last: Ipv4Addr,
}

/// The router's own address in the tenant's slice: what the agent's probes come
/// from, and what others on the underlay can answer.
pub fn router_address(range: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from_bits(range.network().to_bits().saturating_add(1))
}

impl Addresses {
    /// None unless the range is IPv4 and has an address for a pod.
    pub fn of(range: IpNet) -> Option<Self> {
        let IpNet::V4(range) = range else {
            return None;
        };
        (range.prefix_len() <= 30).then(|| Self {
            range: range.trunc(),
            held: BTreeSet::new(),
            last: router_address(range),
        })
    }

    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// The next free address.
    pub fn take(&mut self) -> Option<Ipv4Addr> {
        let (first, last) = self.bounds();
        // At most `held` addresses are passed over before one is free.
        let mut candidate = self.last.to_bits();
        for _ in 0..=self.held.len() {
            candidate = if candidate >= last || candidate < first {
                first
            } else {
                candidate + 1
            };
            let address = Ipv4Addr::from_bits(candidate);
            if self.held.insert(address) {
                self.last = address;
                return Some(address);
            }
        }
        None
    }

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

    fn bounds(&self) -> (u32, u32) {
        (
            router_address(self.range).to_bits() + 1,
            self.range.broadcast().to_bits() - 1,
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_too_small_for_a_pod_is_refused() {
        for (range, fits) in [
            ("10.0.0.0/30", true),
            ("10.0.0.0/31", false),
            ("10.0.0.1/32", false),
            ("fd00::/64", false),
        ] {
            assert_eq!(Addresses::of(range.parse().unwrap()).is_some(), fits, "{range}");
        }
    }

    #[test]
    fn the_smallest_range_has_one_address() {
        let mut addresses = Addresses::of("10.0.0.0/30".parse().unwrap()).unwrap();
        let only: Ipv4Addr = "10.0.0.2".parse().unwrap();
        assert_eq!(addresses.take(), Some(only));
        assert_eq!(addresses.take(), None);
        addresses.give_back(only);
        assert_eq!(addresses.take(), Some(only));
    }

    #[test]
    fn an_address_given_back_is_the_last_to_come_again() {
        let mut addresses = Addresses::of("10.0.0.0/28".parse().unwrap()).unwrap();
        let first = addresses.take().unwrap();
        addresses.give_back(first);
        let others: Vec<_> = std::iter::from_fn(|| addresses.take()).collect();
        assert_eq!(others.len(), 13);
        assert_eq!(others.last(), Some(&first));
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice_or_outside_the_range(
            prefix in 24u8..=30,
            steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..400),
        ) {
            let range: Ipv4Net = format!("10.9.8.0/{prefix}").parse().unwrap();
            let mut addresses = Addresses::of(range.into()).unwrap();
            let mut held = HashSet::new();
            for (take, which) in steps {
                if take || held.is_empty() {
                    match addresses.take() {
                        Some(address) => {
                            prop_assert!(range.contains(&address));
                            prop_assert_ne!(address, range.network());
                            prop_assert_ne!(address, range.broadcast());
                            prop_assert_ne!(address, router_address(range));
                            prop_assert!(held.insert(address), "{address} given twice");
                        }
                        None => prop_assert_eq!(held.len(), (1usize << (32 - prefix)) - 3),
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
