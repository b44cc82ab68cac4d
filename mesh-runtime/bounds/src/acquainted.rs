//! Addresses from which somebody has proved who he is: at a [`crate::Door`] his next
//! connection does not stand among strangers. Pure.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// Of one who proved himself. The oldest is forgotten first.
const ADDRESSES: usize = 8;
/// How many are remembered. They hold certificates, so they are not many; whoever
/// comes beyond is served as a stranger is.
const CALLERS: usize = 4096;

/// Callers `C` and the addresses `S` they came from.
#[derive(Debug)]
pub struct Acquainted<C, S> {
    by_caller: HashMap<C, VecDeque<S>>,
}

impl<C, S> Default for Acquainted<C, S> {
    fn default() -> Self {
        Self {
            by_caller: HashMap::new(),
        }
    }
}

impl<C: Eq + Hash, S: PartialEq> Acquainted<C, S> {
    pub fn meet(&mut self, caller: C, address: S) {
        if self.by_caller.len() >= CALLERS && !self.by_caller.contains_key(&caller) {
            return;
        }
        let addresses = self.by_caller.entry(caller).or_default();
        addresses.retain(|known| *known != address);
        addresses.push_back(address);
        if addresses.len() > ADDRESSES {
            addresses.pop_front();
        }
    }

    pub fn knows(&self, address: &S) -> bool {
        self.by_caller.values().any(|known| known.contains(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_from_everywhere_is_known_at_his_last_addresses_and_pushes_out_nobody() {
        let mut acquainted = Acquainted::default();
        acquainted.meet("modest", 0);
        for address in 1..1000 {
            acquainted.meet("restless", address);
        }
        assert!(acquainted.knows(&0) && acquainted.knows(&999) && !acquainted.knows(&1));
        assert_eq!(acquainted.by_caller["restless"].len(), ADDRESSES);
    }
}
