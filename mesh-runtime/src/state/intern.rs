use std::{collections::HashSet, sync::Arc};

/// Shares equal strings: ten thousand workloads name the same few namespaces,
/// nodes and zones.
#[derive(Debug, Default)]
pub struct Interner {
    strings: HashSet<Arc<str>>,
    /// When the set reaches this size, strings that nobody else holds go.
    sweep_at: usize,
}

/// Below this many strings there is nothing worth sweeping.
const MIN_SWEEP: usize = 1024;

impl Interner {
    pub fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        if self.strings.len() >= self.sweep_at.max(MIN_SWEEP) {
            self.strings.retain(|s| Arc::strong_count(s) > 1);
            self.sweep_at = self.strings.len() * 2;
        }
        let new: Arc<str> = text.into();
        self.strings.insert(new.clone());
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_are_one_and_unused_ones_do_not_pile_up() {
        let mut interner = Interner::default();
        let kept = interner.get("kept");
        for i in 0..100_000 {
            interner.get(&i.to_string());
        }
        assert!(Arc::ptr_eq(&kept, &interner.get("kept")));
        assert!(interner.strings.len() <= MIN_SWEEP + 1);
    }
}
