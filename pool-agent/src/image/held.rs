//! Images that sandboxes start from, or are about to: while one is held it is not
//! removed, and one that is being removed is not given to anybody.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::access::ImageId;
use crate::cri::ImageInfo;

/// An image that stays on the host while this lives.
#[derive(Debug)]
pub struct Held {
    pub info: ImageInfo,
    id: ImageId,
    book: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
pub(super) struct Holds {
    book: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
struct Book {
    held: HashMap<ImageId, usize>,
    removing: HashSet<ImageId>,
    /// Counts removals as they begin: what was seen before one may be gone.
    removals: u64,
}

/// A removal under way.
#[derive(Debug)]
pub(super) struct Removal {
    id: ImageId,
    book: Arc<Mutex<Book>>,
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    // Every change is made whole before the guard goes.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Holds {
    /// To be read before an image is looked for, and shown to [`Self::hold`] after.
    pub(super) fn removals(&self) -> u64 {
        lock(&self.book).removals
    }

    /// Holds an image that was found. None: it may have been removed since.
    pub(super) fn hold(&self, id: &ImageId, info: ImageInfo, seen: u64) -> Option<Held> {
        let mut book = lock(&self.book);
        if book.removals != seen || book.removing.contains(id) {
            return None;
        }
        *book.held.entry(id.clone()).or_default() += 1;
        Some(Held {
            info,
            id: id.clone(),
            book: self.book.clone(),
        })
    }

    pub(super) fn held(&self, id: &ImageId) -> bool {
        lock(&self.book).held.contains_key(id)
    }

    /// None: somebody holds it, or it is being removed already.
    pub(super) fn begin_removal(&self, id: &ImageId) -> Option<Removal> {
        let mut book = lock(&self.book);
        if book.held.contains_key(id) || !book.removing.insert(id.clone()) {
            return None;
        }
        book.removals += 1;
        Some(Removal {
            id: id.clone(),
            book: self.book.clone(),
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut book = lock(&self.book);
        if let Some(count) = book.held.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                book.held.remove(&self.id);
            }
        }
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        lock(&self.book).removing.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::ImageUser;

    fn id() -> ImageId {
        ImageId::parse(&format!("sha256:{}", "1".repeat(64))).unwrap()
    }

    fn info() -> ImageInfo {
        ImageInfo {
            id: format!("sha256:{}", "1".repeat(64)),
            bytes: 1,
            user: ImageUser::Root,
            pinned: false,
        }
    }

    #[test]
    fn an_image_that_is_held_is_not_removed() {
        let holds = Holds::default();
        let first = holds.hold(&id(), info(), holds.removals()).unwrap();
        let second = holds.hold(&id(), info(), holds.removals()).unwrap();
        drop(first);
        assert!(holds.begin_removal(&id()).is_none());
        drop(second);
        assert!(holds.begin_removal(&id()).is_some());
    }

    #[test]
    fn an_image_that_is_or_was_being_removed_since_it_was_seen_is_not_held() {
        let holds = Holds::default();
        let seen = holds.removals();
        let removal = holds.begin_removal(&id()).unwrap();
        assert!(holds.hold(&id(), info(), seen).is_none());
        // Seen while it is being removed.
        assert!(holds.hold(&id(), info(), holds.removals()).is_none());
        drop(removal);
        assert!(holds.hold(&id(), info(), seen).is_none());
        assert!(holds.hold(&id(), info(), holds.removals()).is_some());
    }
}
